"""Bad steps: a loss or a gradient that is not finite, and losses a hundred times too large.

What lives here: rows 27 and 28, injected into the loss of one micro-batch of `pretrain train`'s own code, in this
process. What must not: the guard's arithmetic, which has tests of its own.
"""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
from outcome import Fault, Outcome

Places = Mapping[tuple[int, int | None], str | float]
"""What is done to the loss, by (step from 1, micro-batch from 0 or None for all): a factor, or a kind of `_KINDS`."""

_KINDS = {
    "nan loss": lambda loss: loss * math.nan,
    "inf loss": lambda loss: loss * math.inf,
    "nan gradient": lambda loss: _with_gradient(loss, math.nan),
    "inf gradient": lambda loss: _with_gradient(loss, math.inf),
}


def _with_gradient(loss: Any, factor: float) -> Any:
    """The same loss, whose gradient is multiplied."""
    same = loss * 1.0
    same.register_hook(lambda gradient: gradient * factor)
    return same


@dataclass
class Ran:
    """How a call of `pretrain train` ended: exit code, or the error; and the rows that each step saw."""

    code: int | None
    error: str
    rows: dict[int, list[Any]] = field(default_factory=dict)


def train(run: tiny.Run, places: Places, *, stop_after: int | None = None, **keys: Any) -> Ran:
    """`pretrain train` with other `train` keys, bad losses at `places`, and a SIGTERM after a step."""
    from rich.console import Console

    from pretrain.config import load_config
    from pretrain.train import train as verb

    config = load_config(run.config, [f"train.{key}={value}" for key, value in keys.items()])
    ran = Ran(None, "")
    with (run.directory / "console.txt").open("a", encoding="utf-8") as said, _injected(places, ran, stop_after):
        try:
            ran.code = verb(config, console=Console(file=said, width=200))
        except ValueError as error:
            ran.error = f"{type(error).__name__}: {error}"
    return ran


@contextmanager
def _injected(places: Places, ran: Ran, stop_after: int | None) -> Iterator[None]:
    from pretrain.training.trainer import Trainer

    step, backward = Trainer._step, Trainer._backward
    now = {"step": 0, "micro": 0}

    def injected(self: Trainer, progress: Any, micro_batches: Any, *rest: Any) -> Any:
        now["step"], now["micro"] = progress.step + 1, 0
        ran.rows[progress.step + 1] = [row for batch in micro_batches for row in batch.row_ids.tolist()]
        result = step(self, progress, micro_batches, *rest)
        if progress.step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    def spoil(module: Any, inputs: Any, output: Any) -> None:
        for place in ((now["step"], now["micro"]), (now["step"], None)):
            if place in places:
                what = places[place]
                output.loss = _KINDS[what](output.loss) if isinstance(what, str) else output.loss * what
        now["micro"] += 1

    def hooked(self: Trainer, micro_batches: Any, num_targets: int) -> Any:
        hook = self.engine.bare.register_forward_hook(spoil)
        try:
            return backward(self, micro_batches, num_targets)
        finally:
            hook.remove()

    Trainer._step, Trainer._backward = injected, hooked  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer._step, Trainer._backward = step, backward  # type: ignore[method-assign]


def lines(run: tiny.Run, name: str) -> list[dict[str, Any]]:
    """The lines of a log of the run; NaN is read as it is written."""
    path = run.directory / "train" / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def losses(run: tiny.Run) -> dict[int, dict[str, Any]]:
    """Lines of training steps in `metrics.jsonl`, by step."""
    return {line["step"]: line for line in lines(run, "metrics.jsonl") if "loss" in line}


def all_finite(run: tiny.Run) -> bool:
    """Whether every tensor of every checkpoint, of model and optimizer, is finite."""
    from safetensors.torch import load_file

    files = list(run.checkpoints.rglob("*.safetensors"))
    return all(bool(tensor.isfinite().all()) for file in files for tensor in load_file(file).values())


# --- row 27 ---------------------------------------------------------------------------------------------------------


def not_finite(folder: Path) -> Outcome:
    """Each kind at the first, a middle and the last step, in the first or the last micro-batch; skip and stop."""
    tries = survived = 0
    reason = ""
    made = tiny.make(folder / "made", log={"to": ["jsonl"], "every": 3})
    for kind in _KINDS:
        for step, micro in ((1, 0), (5, 0), (8, 1)):
            for policy in ("skip", "stop"):
                run = tiny.copy(made, folder / f"try-{tries}")
                wrong = _try_not_finite(run, kind, step, micro, policy)
                tries, survived = tries + 1, survived + (not wrong)
                reason = reason or (f"{kind}, step {step}, micro-batch {micro}, {policy}: {wrong}" if wrong else "")
    lost = "the bad step's update (skip); back to the last checkpoint (stop)"
    return Outcome(tries, survived, lost, reason or "NaN and inf in loss and gradient; a stopped run goes on with skip")


def _try_not_finite(run: tiny.Run, kind: str, step: int, micro: int, policy: str) -> str:
    """What broke the promise; empty when it held."""
    ran = train(run, {(step, micro): kind}, on_nonfinite=policy)
    if policy == "stop" and not (ran.error.startswith("NonFiniteError") and f"step {step}:" in ran.error):
        return f"not stopped: {ran}"
    if policy == "stop" and str(ran.rows[step][0]) not in ran.error:
        return "the error names no rows"
    if not all_finite(run):
        return "a checkpoint holds values that are not finite"
    logged = losses(run).get(step)
    if logged is None or logged.get("skipped") != 1:
        return "the step is not logged as skipped"
    if math.isfinite(logged["loss"]) != ("gradient" in kind) or math.isfinite(logged["grad_norm"]):
        return f"the log shows {logged['loss']} and {logged['grad_norm']}"
    found = lines(run, "skipped.jsonl")
    if [entry["step"] for entry in found] != [step] or found[0]["rows"] != ran.rows[step]:
        return "skipped.jsonl does not name the rows"
    if policy == "stop":
        ran = train(run, {(step, micro): kind}, on_nonfinite="skip")
    if ran.code != 0:
        return f"ended with {ran.code} {ran.error}"
    others = [line for number, line in losses(run).items() if number != step]
    if not all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in others):
        return "another step's loss is not finite"
    return "" if all_finite(run) else "the weights are not finite"


# --- row 28 ---------------------------------------------------------------------------------------------------------

_STEPS, _FIRST = 170, 90
_GUARDED = {"spike_sigma": 6.0, "spike_window": 64, "on_nonfinite": "skip"}
_LONG: dict[str, Any] = {
    "model": {"hidden_dropout": 0.0},
    "schedule": {"kind": "constant", "warmup": 10},
    "train": {"steps": _STEPS},
    "checkpoint": {"every": 50},
    "evaluate": {"every": _STEPS, "max_tokens": 4096},
}


def spikes(folder: Path) -> Outcome:
    """One batch x100, thirty x100, a NaN and then a spike; each also cut by SIGTERM inside or before, and after."""
    clean = tiny.make(folder / "clean", tokens=60_000, **_LONG)
    unharmed = tiny.copy(clean, folder / "unharmed")
    wrong = [] if train(unharmed, {}, **_GUARDED).code == 0 and not lines(unharmed, "skipped.jsonl") else ["false skip"]
    tries, notes = 1, []
    poisons: dict[str, Places] = {
        "one batch x100": {(_FIRST, None): 100.0},
        "30 batches x100": {(step, None): 100.0 for step in range(_FIRST, _FIRST + 30)},
        "a NaN, then a batch x100": {(_FIRST, 1): "nan loss", (_FIRST + 2, None): 100.0},
    }
    for name, places in poisons.items():
        whole = tiny.copy(clean, folder / name)
        tries += 1
        ran = train(whole, places, **_GUARDED)
        expected = [step for step, _ in places]
        if ran.code != 0 or [entry["step"] for entry in lines(whole, "skipped.jsonl")] != expected:
            wrong.append(f"{name}: {ran.error}; skipped {[entry['step'] for entry in lines(whole, 'skipped.jsonl')]}")
        for entry in lines(whole, "skipped.jsonl"):
            if entry["rows"] != ran.rows[entry["step"]]:
                wrong.append(f"{name}: step {entry['step']} names other rows")
        off = _distance(whole, unharmed, expected[-1])
        notes.append(f"{name}: {len(expected)} skipped, loss {off:+.2%} 50 steps on")
        if abs(off) > 0.01:
            wrong.append(notes[-1])
        for cut in (expected[-1] - 1, expected[-1] + 5):
            tries += 1
            parts = tiny.copy(clean, folder / f"{name} cut at {cut}")
            stopped = train(parts, places, stop_after=cut, **_GUARDED)
            ended = train(parts, places, **_GUARDED)
            if stopped.code != 75 or ended.code != 0 or _left(parts) != _left(whole):
                wrong.append(f"{name}, cut after step {cut}: not the uninterrupted run")
    return Outcome(tries, tries - len(wrong), "the bad steps' updates", wrong[0] if wrong else "; ".join(notes))


def _distance(run: tiny.Run, clean: tiny.Run, last: int) -> float:
    """Loss relative to the unharmed run, over the ten steps that end 50 steps after the last bad one."""
    window = range(last + 41, last + 51)
    mine, theirs = (sum(losses(which)[step]["loss"] for step in window) for which in (run, clean))
    return mine / theirs - 1


def _left(run: tiny.Run) -> str:
    """All that a run leaves, as text, so that NaN compares: losses, rates, rows, the guard's memory, weights."""
    state = json.loads((max(run.checkpoints.glob("step-*")) / "trainer.json").read_text(encoding="utf-8"))["state"]
    steps = [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in losses(run).values()]
    return repr((steps, lines(run, "skipped.jsonl"), state["progress"]["guard"], tiny.weights(run)))


FAULTS = [
    Fault(
        "27",
        "NaN or infinite loss or gradient in one micro-batch",
        "no parameter and no optimizer state is touched; skipped or stopped by policy; the log shows NaN, never 0; "
        "the rows are written down",
        not_finite,
    ),
    Fault(
        "28",
        "loss x100 for one batch, for 30, and after a NaN",
        "exactly the bad steps are skipped; the window survives a stop, bit for bit; loss within 1% of the unharmed "
        "run 50 steps later",
        spikes,
    ),
]
