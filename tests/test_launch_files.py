"""The ready files for launching: Accelerate's and DeepSpeed's load and are accepted, the Slurm script requeues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from pretrain.launching.processes import free_port
from pretrain.strategy import ZERO
from scripts.faults import tiny
from scripts.faults.fake_slurm import asked, install

ROOT = Path(__file__).resolve().parent.parent
ACCELERATE = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
SLURM = ROOT / "scripts" / "launch" / "slurm.sh"


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_what_accelerate_would_launch_is_the_strategy_that_the_file_is_named_after(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    from pretrain.strategy import read_launch

    strategy = path.stem.removeprefix("cpu-")
    assert load_config_from_file(str(path)).num_processes == (2 if path.stem.startswith("cpu-") else -1)
    words = ["--config_file", str(path), "--num_processes", "2", "-m", "pretrain", "train", "CONFIG"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert not arguments.cpu, "it would start one process alone"
    if strategy in ZERO:
        pytest.importorskip("deepspeed")
        arguments.deepspeed_fields_from_accelerate_config = ""
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    said = read_launch({**environment, "RANK": "0", "WORLD_SIZE": "2"})
    assert said.wish == (None if strategy == "ddp" else strategy)
    assert said.precision is None, "the run's own precision holds"


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_files_leave_to_the_run_what_the_run_decides(path: Path) -> None:
    zero_config = pytest.importorskip("pretrain.training.engines.zero_config")
    user = json.loads(path.read_text(encoding="utf-8"))
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert user[key] == "auto"
    assert user["gradient_clipping"] == "auto"
    for limit in (None, 0.5):
        settings = zero_config.ZeroSettings(
            stage=int(path.stem.removeprefix("zero")[0]),
            limit=limit,
            precision="bf16",
            offload="all" if "offload" in path.stem else None,
            world=8,
            pinned=False,
        )
        made = zero_config.generate(settings, user, path.name)
        assert made["gradient_clipping"] == (limit or 0.0)
        assert made["zero_optimization"]["stage"] == settings.stage


def test_every_strategy_has_its_files() -> None:
    strategies = {"ddp", "fsdp2", *ZERO}
    assert {path.stem for path in ACCELERATE} == strategies | {f"cpu-{name}" for name in strategies}
    assert {path.stem for path in DEEPSPEED} == {*ZERO, "zero3-offload"}
    for path in ACCELERATE:
        assert f"configs/accelerate/{path.name}" in path.read_text(encoding="utf-8"), "it says how to use it"
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["mixed_precision"] == "no"


# --- launchers ------------------------------------------------------------------------------------------------------

LAUNCHERS = {
    "accelerate, fsdp2": ["accelerate", "launch", "--config_file", "configs/accelerate/cpu-fsdp2.yaml", "-m"],
    "accelerate, zero3": ["accelerate", "launch", "--config_file", "configs/accelerate/cpu-zero3.yaml", "-m"],
    "torchrun": ["torchrun", "--nproc-per-node", "2", "-m"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--module"],
}
PORTS = {"accelerate": "--main_process_port", "torchrun": "--master-port", "deepspeed": "--master_port"}


@pytest.mark.slow  # half a minute each: two processes, and each launcher's own start
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_trains_on_two_processes(name: str, tmp_path: Path) -> None:
    """To the end; its evaluations have one batch, fewer than there are processes that meet in each forward pass."""
    if name in ("accelerate, zero3", "deepspeed"):
        pytest.importorskip("deepspeed")
    program, *words = LAUNCHERS[name]
    made = tiny.make(tmp_path, train={"steps": 4}, evaluate={"every": 2})
    command = [str(Path(sys.executable).parent / program), *words, "pretrain", "train", str(made.config)]
    last = command.index(words[-1])
    command[last:last] = [PORTS[program], str(free_port())]
    if name == "deepspeed":
        command.append("train.strategy=zero2")
    told = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {key: value for key, value in os.environ.items() if key not in told} | tiny.ENVIRONMENT
    with subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as launcher:
        try:
            output, _ = launcher.communicate(timeout=150)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 0, output
    lines = [json.loads(line) for line in (made.directory / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "validation/loss" in line] == [0, 2, 4]
    assert json.loads((made.directory / "train" / "result.json").read_text())["step"] == 4


# --- Slurm ----------------------------------------------------------------------------------------------------------

TASK = """#!{python}
import os, signal, sys, time
rank = os.environ["RANK"]
open(f"{place}/task-{rank}", "w").write(" ".join(sys.argv[1:]) + "\\n" + repr(dict(os.environ)))
def stop(number, frame):
    time.sleep(0.5)  # it saves
    sys.exit(75)
if not {starting}:
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, stop)
open(f"{place}/ready-{rank}", "w")
time.sleep({seconds})
sys.exit({code})
"""


def batch(
    folder: Path, *, seconds: float, code: int = 0, send: signal.Signals | None = None, starting: bool = False
) -> tuple[int, str]:
    """Run the script with two tasks that stand in for the training; its exit code and what it said."""
    environment = {**os.environ, **install(folder, tasks=2), "OMP_NUM_THREADS": "3"}
    program = TASK
    values = {"python": sys.executable, "place": folder, "seconds": seconds, "code": code, "starting": starting}
    for name, value in values.items():
        program = program.replace(f"{{{name}}}", str(value))
    (folder / "python").write_text(program)
    (folder / "python").chmod(0o755)
    command = ["bash", str(SLURM), "run.yaml", "train.steps=4"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        if send is not None:
            deadline = time.monotonic() + 30
            while len(list(folder.glob("ready-*"))) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            job.send_signal(send)
        output, _ = job.communicate(timeout=60)
    return job.returncode, output


def test_slurm_tasks_get_torchs_variables(tmp_path: Path) -> None:
    code, output = batch(tmp_path, seconds=0)
    assert code == 0, output
    for rank in range(2):
        words, environment = (tmp_path / f"task-{rank}").read_text().split("\n", 1)
        assert words == "-m pretrain train run.yaml train.steps=4 train.stop_signals=[SIGTERM, SIGINT, SIGUSR1]"
        wanted = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**wanted, "MASTER_PORT": 24242, "OMP_NUM_THREADS": 3}.items():
            assert f"'{name}': '{value}'" in environment
    assert asked(tmp_path) == []


def test_slurm_requeues_once_before_the_time_limit(tmp_path: Path) -> None:
    code, output = batch(tmp_path, seconds=60, send=signal.SIGUSR1)
    assert (code, asked(tmp_path)) == (75, ["requeue 4242"]), output


def test_slurm_requeues_tasks_that_the_signal_met_while_they_started(tmp_path: Path) -> None:
    """They have no handler for it yet, and it ends them."""
    code, output = batch(tmp_path / "limit", seconds=60, send=signal.SIGUSR1, starting=True)
    assert (code, asked(tmp_path / "limit")) == (138, ["requeue 4242"]), output
    code, output = batch(tmp_path / "person", seconds=60, send=signal.SIGTERM, starting=True)
    assert (code, asked(tmp_path / "person")) == (143, []), output
    assert batch(tmp_path / "own", seconds=0, code=138)[0] == 138
    assert asked(tmp_path / "own") == [], "the limit had not come"


def test_slurm_does_not_requeue_what_a_person_stopped_or_what_failed(tmp_path: Path) -> None:
    assert batch(tmp_path / "stopped", seconds=60, send=signal.SIGTERM)[0] == 75
    assert batch(tmp_path / "failed", seconds=0, code=3)[0] == 3
    assert [asked(tmp_path / name) for name in ("stopped", "failed")] == [[], []]


def test_the_signal_of_the_script_is_one_that_training_stops_at() -> None:
    text = SLURM.read_text(encoding="utf-8")
    assert "#SBATCH --signal=B:USR1@" in text
    assert "SIGUSR1]'" in text


@pytest.mark.parametrize("script", ["slurm.sh", "torchrun.sh"])
def test_a_script_without_a_config_says_how_it_is_used(script: str) -> None:
    environment = {**os.environ, "NODES": "1", "NODE": "0", "MAIN": "127.0.0.1"}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "launch" / script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "usage:" in done.stderr
