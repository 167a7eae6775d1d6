"""Trainings in which one rank of several is injured, one after another in the same processes: the job of `ranks`.

What lives here: the injuries, starting a job of so many processes, and what its trainings found. What must not: what
must hold. `python scripts/faults/injured_ranks.py LEGS.json` is what each process runs.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import tiny  # noqa: E402


@dataclass(frozen=True)
class Leg:
    """A training, and what is done to one of its ranks.

    Attributes:
        run: YAML file of the run.
        overrides: `key=value`, as on the command line.
        kind: "nan loss", "inf loss", "nan gradient", "inf gradient" (of the rank's first micro-batch); "flip" (a bit of
            the gradient after it was summed); "norm" (a layer norm is moved by 1e-6); "slow forward", "slow data".
        rank: that is injured.
        step: at which, from 1; the slow ones are slow at every step.
        bit: of the gradient's largest element, for "flip".
    """

    run: str
    overrides: tuple[str, ...]
    kind: str
    rank: int
    step: int = 0
    bit: int = 0


@dataclass
class Found:
    """What a rank found.

    Attributes:
        code: exit code of `pretrain train`.
        error: what ended it otherwise.
        said: what was shown.
        last: the last step that was made.
        step_ms, check_ms, measure_ms: medians of a step and of comparing the copies, and the mean a step of measuring
            slow ranks, in milliseconds.
    """

    code: int | None = None
    error: str = ""
    said: str = ""
    last: int = 0
    step_ms: float = 0.0
    check_ms: float = 0.0
    measure_ms: float = 0.0


def train_all(legs: Sequence[Leg], folder: Path, *, processes: int) -> list[list[Found]]:
    """Train the legs in one job; of each leg, what every rank found.

    Raises:
        RuntimeError: when the job ended otherwise than it should, with what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    legs_file, found_file = folder / "legs.json", folder / "found.json"
    legs_file.write_text(json.dumps([asdict(leg) for leg in legs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    ended = tiny.execute([*command, str(Path(__file__).resolve()), str(legs_file)], timeout=60 + 60 * len(legs))
    if ended.code != 0 or not found_file.is_file():
        raise RuntimeError(f"the job of {processes} processes ended with {ended.code}:\n{ended.output[-6000:]}")
    return [[Found(**entry) for entry in leg] for leg in json.loads(found_file.read_text())]


# --- in each process ------------------------------------------------------------------------------------------------


@dataclass
class _Clock:
    """Seconds that parts of the trainer took."""

    steps: list[float] = field(default_factory=list)
    checks: list[float] = field(default_factory=list)
    measures: list[float] = field(default_factory=list)


def _timed(function: Any, into: list[float]) -> Any:
    def timed(*arguments: Any, **keywords: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*arguments, **keywords)
        finally:
            into.append(time.perf_counter() - begun)

    return timed


@contextmanager
def _replaced(*places: tuple[Any, str, Any]) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, value in places:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextmanager
def _injured(leg: Leg, clock: _Clock, found: Found) -> Iterator[None]:
    from pretrain.data.loader import DataPlane
    from pretrain.training.pending import AtOnce
    from pretrain.training.replicas import Replicas
    from pretrain.training.slow_ranks import SlowRanks
    from pretrain.training.trainer import Trainer

    mine = int(os.environ["RANK"]) == leg.rank
    step, backward, update, batch = Trainer._step, Trainer._backward, AtOnce.update, DataPlane.batch
    now = {"step": 0, "micro": 0}

    def stepping(self: Trainer, progress: Any, *rest: Any) -> None:
        now.update(step=progress.step + 1, micro=0)
        found.last = now["step"]
        _timed(step, clock.steps)(self, progress, *rest)

    def hook(module: Any, inputs: Any, output: Any) -> None:
        if leg.kind == "slow forward":
            time.sleep(0.05)
        elif now == {"step": leg.step, "micro": 0}:
            output.loss = _spoiled(output.loss, leg.kind)
        now["micro"] += 1

    def hooked(self: Trainer, *arguments: Any) -> Any:
        handle = self.engine.bare.register_forward_hook(hook) if mine else None
        try:
            return backward(self, *arguments)
        finally:
            if handle is not None:
                handle.remove()

    def updating(self: AtOnce, state: Any, sent: Any, *rest: Any) -> Any:
        if mine and sent.step == leg.step:
            _touch(self._engine, leg)
        return update(self, state, sent, *rest)

    def loading(self: DataPlane, number: int, rows: slice | None = None) -> Any:
        if mine and leg.kind == "slow data" and now["step"]:
            time.sleep(0.05)
        return batch(self, number, rows)

    measured = [(SlowRanks, name, _timed(getattr(SlowRanks, name), clock.measures)) for name in ("arrive", "leave")]
    with _replaced(
        (Trainer, "_step", stepping),
        (Trainer, "_backward", hooked),
        (AtOnce, "update", updating),
        (DataPlane, "batch", loading),
        (Replicas, "check", _timed(Replicas.check, clock.checks)),
        (SlowRanks, "look", _timed(SlowRanks.look, clock.measures)),
        *measured,
    ):
        yield


def _spoiled(loss: Any, kind: str) -> Any:
    if kind.endswith(" loss"):
        return loss * (math.nan if kind == "nan loss" else math.inf)
    if kind.endswith(" gradient"):
        same = loss * 1.0
        same.register_hook(lambda gradient: gradient * (math.nan if kind == "nan gradient" else math.inf))
        return same
    return loss


def _touch(engine: Any, leg: Leg) -> None:
    """Change what this rank alone holds."""
    import torch

    for name in engine.names():
        parameter = engine._parameters[name]
        if leg.kind == "flip" and parameter.ndim == 2 and "embed" in name:
            gradient = parameter.grad
            bits = gradient.view(-1).view(torch.int32)
            bits[int(gradient.abs().argmax())] ^= 1 << leg.bit if leg.bit < 31 else -(1 << 31)
            return
        if leg.kind == "norm" and "norm" in name and name.endswith("weight"):
            held = parameter.detach()
            part = held.to_local() if hasattr(held, "to_local") else held
            part += 1e-6
            return
    if leg.kind in ("flip", "norm"):
        raise RuntimeError(f"no tensor for {leg.kind} among {engine.names()}")


def _train(leg: Leg) -> Found:
    from rich.console import Console

    from pretrain.config import load_config
    from pretrain.train import train

    found, clock, shown = Found(), _Clock(), StringIO()
    with _injured(leg, clock, found):
        try:
            config = load_config(leg.run, leg.overrides)
            found.code = train(config, console=Console(file=shown, width=200))
        except ValueError as error:
            found.error = f"{type(error).__name__}: {error}"
    found.said = shown.getvalue()
    found.step_ms, found.check_ms = _median_ms(clock.steps), _median_ms(clock.checks)
    found.measure_ms = 1000 * sum(clock.measures) / max(1, len(clock.steps))
    return found


def _median_ms(seconds: Sequence[float]) -> float:
    return 1000 * sorted(seconds)[len(seconds) // 2] if seconds else 0.0


def main() -> None:
    """Train the legs that a file names; the main process writes what every rank found."""
    legs_file = Path(sys.argv[1])
    legs: list[Mapping[str, Any]] = json.loads(legs_file.read_text())
    from pretrain.ranks import Ranks
    from pretrain.training.engines.job import close_job

    found = [_train(Leg(**{**leg, "overrides": tuple(leg["overrides"])})) for leg in legs]
    ranks = Ranks.of_job(timeout=120)
    of_all = [ranks.gather(asdict(one)) for one in found]
    if ranks.main:
        (legs_file.parent / "found.json").write_text(json.dumps(of_all))
    close_job()


if __name__ == "__main__":
    main()
