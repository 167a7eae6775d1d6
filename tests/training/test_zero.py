"""DeepSpeed's engines: their configuration, and real processes against one process (tests/training/zero_job.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import RunConfig, config_from_dict
from pretrain.strategy import Launch
from pretrain.training.engines.zero_config import (
    ZeroSettings,
    free_settings,
    generate,
    load_deepspeed,
    make_accelerator,
    owned_settings,
)

JOB = Path(__file__).with_name("zero_job.py")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"
)


def settings(**keys: Any) -> ZeroSettings:
    base = {"stage": 2, "limit": 0.5, "precision": "bf16", "offload": None, "world": 2, "pinned": False}
    return ZeroSettings(**(base | keys))  # type: ignore[arg-type]


# --- the configuration ----------------------------------------------------------------------------------------------


def test_everything_that_decides_the_arithmetic_is_said() -> None:
    found = generate(settings(), {}, "nobody")
    assert found["gradient_clipping"] == 0.5
    assert found["zero_optimization"]["stage"] == 2
    assert (found["fp16"], found["bf16"]) == ({"enabled": False}, {"enabled": False})
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert found["torch_autocast"] == autocast
    assert found["communication_data_type"] == found["data_types"]["grad_accum_dtype"] == "fp32"
    assert found["zero_optimization"]["offload_optimizer"]["device"] == "none"
    unclipped = generate(settings(limit=None, precision="fp32", offload="all", stage=3), {}, "nobody")
    assert unclipped["gradient_clipping"] == 0.0  # left out, it would be 1.0
    assert unclipped["torch_autocast"]["enabled"] is False
    assert unclipped["zero_optimization"]["offload_param"]["device"] == "cpu"
    json.dumps(found)


def nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("key", sorted(owned_settings(settings())))
def test_what_the_run_decides_is_the_runs(key: str) -> None:
    ours = owned_settings(settings())[key]
    assert generate(settings(), nest(key, "auto"), "x") == generate(settings(), nest(key, ours), "x")
    other = {bool: not ours, int: 77, float: 7.5, str: "else", list: ["torch.nn.Linear"]}[type(ours)]
    with pytest.raises(ValueError, match=key.replace(".", r"\.")) as refused:
        generate(settings(), nest(key, other), "my.json")
    for word in ("my.json", json.dumps(other), json.dumps(ours), "remove it"):
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("user", "told"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, "optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled.*train\.precision"),
        ({"train_batch_size": 64}, r"train_batch_size.*train\.batch_tokens"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage.*train\.strategy"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, r"train\.offload"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "zero_hpz_partition_size"),
        ({"amp": {"enabled": True}}, "amp"),
    ],
)
def test_what_has_no_place_is_refused_by_name(user: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        generate(settings(), user, "my.json")


def test_a_file_of_a_usual_kind_is_taken() -> None:
    """As the Hugging Face documentation writes it: much is "auto", and speed and memory are the user's."""
    user = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "amp": {"enabled": False},
        "optimizer": "auto",
        "zero_optimization": {
            "stage": "auto",
            "overlap_comm": True,
            "reduce_bucket_size": 1000,
            "stage3_prefetch_bucket_size": "auto",
            "offload_optimizer": {"device": "auto", "pin_memory": False},
        },
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "wall_clock_breakdown": False,
    }
    found = generate(settings(pinned=True), user, "my.json")
    section = found["zero_optimization"]
    assert section["overlap_comm"] is True
    assert section["reduce_bucket_size"] == 1000
    assert section["offload_optimizer"] == {"device": "none", "ratio": 1.0, "pin_memory": False}
    assert "stage3_prefetch_bucket_size" not in section
    assert found["fp16"] == {"enabled": False}
    assert "optimizer" not in found
    assert '"auto"' not in json.dumps(found)
    assert not set(free_settings(settings())) & set(owned_settings(settings()))


def run_config(**train: Any) -> RunConfig:
    return config_from_dict(
        {
            "name": "toy",
            "data": {"train": ["x"], "sequence_length": 8},
            "model": {"architecture": "gpt2"},
            "objective": {"kind": "causal"},
            "optimizer": {"name": "adamw", "lr": 0.01},
            "train": {"steps": 10, "batch_tokens": 64, "strategy": "zero2"} | train,
        }
    )


def refusal(config: RunConfig, launch: Launch) -> str:
    with pytest.raises(ValueError, match=r".") as refused:
        make_accelerator(config, "zero2", launch, "fp32", timedelta(seconds=5), cpu=True)
    return str(refused.value)


def test_files_of_the_run_and_of_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, broken = (tmp_path / name for name in ("one.json", "two.json", "broken.json"))
    one.write_text('{"zero_optimization": {"stage": 1}}')
    two.write_text('{"gradient_clipping": 3.0}')
    broken.write_text("{")
    assert "train.deepspeed" in refusal(run_config(deepspeed=str(one)), Launch())
    assert "cannot be read" in refusal(run_config(deepspeed=str(broken)), Launch())
    assert "cannot be read" in refusal(run_config(deepspeed=str(tmp_path / "none.json")), Launch())
    assert "accelerate launch" in refusal(run_config(), Launch(wish="zero2", deepspeed=str(two)))
    assert "two DeepSpeed files" in refusal(run_config(deepspeed=str(one)), Launch(wish="zero2", deepspeed=str(two)))
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "2.5")
    assert "gradient_clipping: 2.5" in refusal(run_config(), Launch(wish="zero2"))


def test_compiling_under_zero3_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.compile.*zero2"):
        make_accelerator(run_config(compile=True), "zero3", Launch(), "fp32", timedelta(seconds=5), cpu=True)


def test_a_missing_deepspeed_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"zero3 needs DeepSpeed.*pip install"):
        load_deepspeed("zero3", cpu=True)


# --- real processes -------------------------------------------------------------------------------------------------


def run(folder: Path, processes: int, *scenarios: str) -> dict[str, Any]:
    """What the scenarios found, the same on every rank. Neither a compiler nor ninja is on the path."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nothing = folder / "path"
    nothing.mkdir()
    environment = os.environ | {
        "PATH": str(nothing),
        "TORCH_EXTENSIONS_DIR": str(nothing),
        "PYTHONPATH": str(JOB.parents[2]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": "1",
    }
    out = folder / "found.json"
    jobs = [
        subprocess.Popen(
            [sys.executable, str(JOB), str(out), *scenarios],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        texts = [job.communicate(timeout=600)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0] * processes, "\n".join(texts)
    assert not any(text.strip() for text in texts), "\n".join(texts)  # neither chatter nor warnings, also at the end
    ranks = json.loads(out.read_text())
    assert all(found == ranks[0] for found in ranks)
    return ranks[0]


def expect_parity(name: str, found: Mapping[str, Any], steps: int = 50) -> None:
    """Losses as one process has them, through clipped steps that learn something."""
    assert found["names"], name
    assert found["steps"] == [float(steps)], name
    assert found["clipped"] > 0.5, name
    bf16 = "bf16" in name
    # bf16 rounds to 2^-8: another split is another rounding, and Adam's and Muon's updates have a size of their own.
    assert found["loss"] < (5e-3 if bf16 else 1e-5), (name, found)
    assert found["norm"] < (0.1 if bf16 else 1e-4), (name, found)
    assert found["falls"] > (0.1 if steps == 50 else 0.0), (name, found)


def expect_all(name: str, found: Mapping[str, Any]) -> None:
    assert found, name
    assert {key for key, good in found.items() if not good} == set(), name


@needs_deepspeed
def test_two_processes_are_one(tmp_path: Path) -> None:
    """One job (about 25 s), for the start of two processes costs more than the steps of most scenarios."""
    told = ("zero2 refusals", "zero3 refusals", "zero2 scaled", "relay")
    steps = ("zero1 muon", "zero2 adamw", "zero3 muon short")
    found = run(tmp_path, 2, *steps, *told, "zero3 evaluation", "zero3 unused", "checks")
    expect_parity("zero1 muon", found["zero1 muon"])
    expect_parity("zero2 adamw", found["zero2 adamw"])
    expect_parity("zero3 muon short", found["zero3 muon short"], steps=12)
    for name in told:
        expect_all(name, found[name])
    assert max(found["zero3 evaluation"].values()) < 1e-5
    assert "`spare` is trained but got no gradient" in found["zero3 unused"]
    agreed, tampered = found["checks"]
    assert agreed == []
    assert tampered == ["DeepSpeed's gradient_clipping"]


STAGES = ("zero1 muon", "zero2 muon", "zero3 muon", "zero1 adamw", "zero2 adamw", "zero3 adamw")
OTHERS = ("zero1 stable", "zero3 stable", "fsdp2 muon", "fsdp2 adamw", "fsdp2 stable", "zero2 bf16", "zero3 bf16")
OFFLOADED = ("zero1 offload", "zero2 offload", "zero3 offload")
TOLD = ("zero1 refusals", "offload refusals", "zero3 offload refusals", "zero3 scaled", "offload scaled", "relay adamw")
FROZEN = ("zero1 frozen", "zero3 frozen")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "scenarios"),
    [
        (1, (*STAGES, *OTHERS, *OFFLOADED)),
        (1, (*TOLD, *FROZEN)),
        (2, (*STAGES, *OTHERS)),
        (2, (*OFFLOADED, *TOLD, *FROZEN)),
        (3, ("zero1 muon", "zero3 muon", "zero2 adamw", "zero1 stable", "zero2 offload", "relay", *FROZEN)),
    ],
)
def test_every_engine_and_optimizer(tmp_path: Path, processes: int, scenarios: tuple[str, ...]) -> None:
    for name, found in run(tmp_path, processes, *scenarios).items():
        if name in (*STAGES, *OTHERS, *OFFLOADED):
            expect_parity(name, found)
        else:
            expect_all(name, found)


@needs_deepspeed
@pytest.mark.slow
def test_without_clipping(tmp_path: Path) -> None:
    """DeepSpeed clips at 1.0 when nothing is said."""
    found = run(tmp_path, 2, "unclipped")["unclipped"]
    assert found["loss"] < 1e-5
    assert found["norm"] < 1e-5
