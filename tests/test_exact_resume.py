"""An interrupted run is the uninterrupted one, bit for bit: rows, losses, learning rates, scores, final weights.

Real commands in children that signal themselves at chosen places (`interrupted.py`), on tiny models with dropout and,
where they are masked, masks. The long sweep, at random times, is `scripts/faults/resume.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import load_config
from pretrain.data.loader import DataPlane
from pretrain.files import ArtifactError
from pretrain.train import build_trainer
from pretrain.training.checkpoint import capture_rng, optimizer_state_by_name, save_checkpoint
from scripts.faults import tiny
from tests.interrupted import STOPPED, Trap, finish, train

KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
CODES = {KILL: -9, TERM: STOPPED, INT: STOPPED}
CAUSAL: dict[str, Any] = {
    "model": {"architecture": "gpt2", "attention_dropout": 0.1, "embedding_dropout": 0.1},
    "optimizer": {"name": "muon", "lr": 0.02},
    "schedule": {"kind": "wsd", "warmup": 2, "decay": "25%"},
}
TIMED: dict[str, Any] = {"train": {"steps": None, "minutes": 2e-3}, "schedule": {"warmup": "10%"}}


def metrics(run: tiny.Run) -> list[dict[str, float]]:
    """Every line of `metrics.jsonl` without what a clock or the process's memory says, and the order of lines."""
    measured = {"seconds", "tokens_per_second", "data_wait", "memory_gib"}
    lines = (run.directory / "train" / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in measured} for line in lines]


def same(run: tiny.Run, whole: tiny.Run) -> None:
    assert tiny.trace(run).difference(tiny.trace(whole)) == ""
    assert metrics(run) == metrics(whole)
    assert not list((run.directory / "train").rglob(".tmp*"))


@pytest.fixture(scope="module", params=["masked", "causal"])
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CAUSAL if request.param == "causal" else {}


@pytest.fixture(scope="module")
def whole(kind: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    """A run that nothing interrupted: 8 steps of 2 micro-batches, saved every 2 steps, evaluated at 0, 4, 8."""
    run = tiny.make(tmp_path_factory.mktemp("whole"), **kind)
    assert train(run).code == 0
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in metrics(run) if "validation/loss" in line] == [0, 4, 8]
    return run


@pytest.mark.parametrize(
    "traps",
    [
        [Trap("micro", 1, KILL)],  # in the first step, before the first save
        [Trap("step", 1, KILL)],
        [Trap("micro", 6, KILL)],  # in the middle of an accumulation
        [Trap("save", 2, KILL)],
        [Trap("save", 4, KILL)],
        [Trap("evaluation", 2, KILL)],
        [Trap("evaluation", 3, KILL)],
        [Trap("micro", 16, KILL)],  # the last step
        [Trap("step", 1, TERM)],
        [Trap("micro", 6, INT)],
        [Trap("save", 1, INT)],
        [Trap("evaluation", 1, TERM)],
        [Trap("evaluation", 1, TERM, 0.002), Trap("evaluation", 1, INT), Trap("evaluation", 1, KILL)],
        [Trap("evaluation", 2, INT)],
        [Trap("evaluation", 3, TERM)],
        [Trap("step", 7, TERM), Trap("load", 1, TERM), Trap("load", 1, KILL)],
        [Trap("step", 2, TERM), Trap("step", 3, TERM), Trap("micro", 3, KILL), Trap("step", 5, INT)],
    ],
    ids=lambda traps: ", ".join(map(str, traps)),
)
def test_an_interrupted_run_is_the_uninterrupted_one(
    whole: tiny.Run, kind: dict[str, Any], tmp_path: Path, traps: list[Trap]
) -> None:
    run = tiny.make(tmp_path, **kind)
    for trap in traps:
        ended = train(run, trap)
        assert ended.code == CODES[trap.signal], ended.output
    ended = finish(run)
    assert ended.code == 0, ended.output
    same(run, whole)


def test_several_cuts_in_an_epoch_and_over_its_end_lose_no_row(tmp_path: Path) -> None:
    """Rows are counted: in each epoch every row once, although the run was cut three times in it."""
    sections: dict[str, Any] = {"train": {"steps": 12}, "checkpoint": {"every": 5}, "evaluate": {"every": 100}}
    run = tiny.make(tmp_path, tokens=1000, **sections)
    for trap in [Trap("step", 2), Trap("micro", 3, KILL), Trap("step", 4, INT), Trap("save", 1, KILL), Trap("step", 9)]:
        train(run, trap)
    assert finish(run).code == 0
    num_rows = DataPlane.from_config(load_config(run.config)).num_rows
    assert 2 * num_rows < 12 * 8, "the run must go over the end of an epoch"
    seen: dict[int, list[int]] = {}
    for text in tiny.trace(run).rows.values():
        ids = [int(number) for number in re.findall(r"\d+", text.rpartition(" ")[0])]  # (source, epoch, row) of each
        for epoch, row in zip(ids[1::3], ids[2::3], strict=True):
            seen.setdefault(epoch, []).append(row)
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(num_rows))
    assert all(len(set(rows)) == len(rows) for rows in seen.values())


def test_a_signal_while_the_budget_is_measured(tmp_path: Path) -> None:
    """The time of a step is measured to its end, the length of the run is fixed, and step 0 is saved."""
    run = tiny.make(tmp_path, **TIMED)
    ended = train(run, Trap("measure", 1, TERM))
    assert ended.code == STOPPED, ended.output
    assert "stopped by SIGTERM at step 0" in ended.output
    steps = json.loads((run.directory / "train" / "budget.json").read_text())["steps"]
    assert finish(run).code == 0
    assert sorted(tiny.trace(run).losses) == list(range(1, steps + 1))
    counted = tiny.make(tmp_path / "counted", schedule=TIMED["schedule"], train={"steps": steps})
    assert train(counted).code == 0
    assert tiny.trace(run).difference(tiny.trace(counted)) == ""


@pytest.mark.parametrize(("number", "code"), [(TERM, 143), (INT, 130)])
def test_a_signal_before_training_has_a_code_of_its_own(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Nothing is there to save; the same command trains."""
    run = tiny.make(tmp_path)
    ended = train(run, Trap("build", 1, number))
    assert ended.code == code
    assert f"{number.name}; run the same command again to go on" in ended.output
    assert finish(run).code == 0


def test_a_kill_while_the_budget_is_measured_starts_over_and_says_so(tmp_path: Path) -> None:
    run = tiny.make(tmp_path, **TIMED)
    assert train(run, Trap("measure", 1, KILL)).code == -9
    ended = finish(run)
    assert ended.code == 0
    assert "ended before it saved anything: starting at step 0" in ended.output


def test_a_finished_run_does_nothing_three_times(whole: tiny.Run) -> None:
    """Exit code 0, one line that says so, and no file written: neither its bytes nor its time."""
    files = [path for path in sorted(whole.directory.rglob("*")) if path.is_file()]
    before = [(path, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files]
    for _ in range(3):
        ended = train(whole)
        assert ended.code == 0
        assert "finished already: nothing is trained after step 8 of 8" in ended.output
    files = [path for path in sorted(whole.directory.rglob("*")) if path.is_file()]
    assert [(path, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files] == before


@pytest.mark.parametrize("generator", ["python", "numpy", "torch"])
def test_a_missing_random_generator_is_an_error(whole: tiny.Run, tmp_path: Path, generator: str) -> None:
    """Not a line in a log: without it the run could not be exact."""
    run = tiny.copy(whole, tmp_path)
    trainer = build_trainer(load_config(run.config))
    rng = capture_rng()
    del rng[generator]
    state = json.loads((run.checkpoints / "step-00000008" / "trainer.json").read_text())
    for path in run.checkpoints.glob("step-*"):
        step, progress = int(path.name[5:]), state["state"]["progress"]
        save_checkpoint(
            run.directory / "train",
            step=step,
            run_id=state["run_id"],
            write_model=lambda directory: trainer.saver.store.write(trainer.engine.bare, {}, directory),
            optimizer=optimizer_state_by_name(trainer.engine.bare, trainer.engine.optimizer),
            state=state["state"] | {"progress": progress | {"step": step, "scored_at": None}},
            rngs=[rng],
            inputs=state["inputs"],
        )
    with pytest.raises(ArtifactError, match=rf"random state.*'{generator}'.*cannot go on exactly"):
        trainer.train()
    assert train(run).code == 2


def test_the_first_batch_is_there_at_once_wherever_a_run_goes_on(whole: tiny.Run) -> None:
    """At sample 10^9 and 10^15 as at 0: nothing is skipped over, and the batch is the same whoever asks."""
    config = load_config(whole.config)
    for sample in (10**9, 10**15):
        step = sample // config.rows_per_batch
        started = time.perf_counter()
        data = DataPlane.from_config(config)
        batch = data.batch(step)
        assert time.perf_counter() - started < 1.0
        rows = [data.batch(step, slice(row, row + 1)).row_ids[0].tolist() for row in range(config.rows_per_batch)]
        assert batch.row_ids.tolist() == rows
        assert batch.row_ids[0, 1] == step * config.rows_per_batch // data.num_rows


@pytest.mark.slow
@pytest.mark.parametrize("trap", [Trap("micro", 1), Trap("step", 3), Trap("micro", 9, KILL)], ids=str)
def test_compiled_runs_are_exact_too(tmp_path: Path, trap: Trap) -> None:
    """torch.compile on this machine: what is compiled anew after the cut is the same program."""
    compiled: dict[str, Any] = {"train": {"compile": True}}
    whole, run = tiny.make(tmp_path / "whole", **compiled), tiny.make(tmp_path / "cut", **compiled)
    assert train(whole, timeout=300).code == 0
    assert train(run, trap, timeout=300).code == CODES[trap.signal]
    assert finish(run).code == 0
    same(run, whole)
