"""Every engine with one process on a CUDA device: the same run as the plain one in bf16, and fp16 that overflows."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import RunConfig
from pretrain.train import build_trainer
from pretrain.training.trainer import Trainer
from tests.gpu.synthetic import make_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
ENGINES = ["ddp", "fsdp2", *(pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (1, 2, 3))]
STEPS = 20


def run_of(folder: Path, strategy: str, **train: Any) -> RunConfig:
    keys = {"steps": STEPS, "batch_tokens": 2048, "micro_batch": 4, "max_grad_norm": 0.5, "strategy": strategy}
    sections: dict[str, Any] = {"train": {**keys, **train}, "optimizer": {"name": "muon", "lr": 1e-2}}
    return make_run(folder / strategy, **sections, checkpoint={"every": STEPS // 2})


def losses(trainer: Trainer) -> list[float]:
    lines = (trainer.directory / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "grad_norm" in entry]


@pytest.mark.parametrize("strategy", ENGINES)
def test_an_engine_makes_the_run_of_the_plain_one_in_bf16(tmp_path: Path, strategy: str) -> None:
    ends = []
    for name in ("single", strategy):
        trainer = build_trainer(run_of(tmp_path, name, precision="bf16"))
        assert trainer.train().finished
        ends.append(losses(trainer))
    plain, other = ends
    assert len(plain) == STEPS
    assert plain[-1] < plain[0]
    assert max(abs(a - b) for a, b in zip(plain, other, strict=True)) < 0.02


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_fp16_that_overflows_finds_its_scale(tmp_path: Path, strategy: str) -> None:
    """The scaler starts so high that the first gradients cannot be finite: those steps are given up, and no more."""
    trainer = build_trainer(run_of(tmp_path, strategy, precision="fp16", steps=60))
    scaler = trainer.job.accelerator.scaler
    scaler._init_scale = 2.0**36
    progress = trainer.train().progress
    assert progress.guard.skipped.get("overflow", 0) >= 5
    assert set(progress.guard.skipped) == {"overflow"}
    assert scaler.get_scale() < 2.0**36
    assert all(trainer.engine.parameter(name).isfinite().all() for name in trainer.engine.names())
    made = losses(trainer)
    assert math.isfinite(made[-1])
    assert made[-1] < made[0]


@pytest.mark.parametrize("strategy", ENGINES)
def test_a_run_goes_on_under_another_engine(tmp_path: Path, strategy: str) -> None:
    """Half by the plain engine, half by this one, in fp32: the straight run's losses."""
    straight = build_trainer(run_of(tmp_path / "straight", "single", precision="fp32"))
    straight.train()
    config = run_of(tmp_path, "single", precision="fp32")
    half = build_trainer(config)
    step = half._step

    def stopping(progress: Any, *rest: Any) -> Any:
        if progress.step == STEPS // 2:
            raise KeyboardInterrupt
        return step(progress, *rest)

    half._step = stopping  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        half.train()
    train = config.train.model_copy(update={"strategy": strategy})
    other = build_trainer(config.model_copy(update={"train": train}))
    assert other.train().finished
    gaps = [abs(a - b) for a, b in zip(losses(straight), losses(other), strict=True)]
    assert max(gaps) < 1e-3
