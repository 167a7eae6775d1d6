"""Trying a fault many times: counting what came of it, and what must hold of a run that was injured.

What lives here: the tally, the checks, sharing tries out. What must not: any fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import tiny
from outcome import Outcome
from warm import Warm

STEPS, EVERY = 6, 2
# Saves that training waits for come at the same system calls every time; rows about the others say so themselves.
CHECKPOINT: dict[str, Any] = {"every": EVERY, "asynchronous": False}
SECTIONS: dict[str, dict[str, Any]] = {"train": {"steps": STEPS}, "checkpoint": CHECKPOINT}
TRAIN = "train"
WORKERS = 2
EXIT_STOPPED = 75


class Tally:
    """Tries and what came of them; the first reason of a failure is the note."""

    def __init__(self) -> None:
        self.tries = self.survived = self.repeated = 0
        self.reason = ""

    def add(self, reason: str, *, repeated: int = 0) -> None:
        """Count a try: survived when there is no `reason` against it."""
        self.tries += 1
        self.survived += not reason
        self.reason = self.reason or reason
        self.repeated = max(self.repeated, repeated)

    def outcome(self, note: str, *, lost: str = "") -> Outcome:
        """For the table."""
        note = f"{note}; first failure: {self.reason}" if self.reason else note
        return Outcome(self.tries, self.survived, lost or f"at most {self.repeated} steps", note)


def not_run(why: str) -> Outcome:
    """A fault that this machine cannot inject: no try, and why."""
    return Outcome(0, 0, "-", f"not run: {why}")


# --- what must hold after ------------------------------------------------------------------------------------------


def whole(run: tiny.Run) -> list[int]:
    """Steps of the checkpoints whose every digest is right."""
    from pretrain.files import ArtifactError
    from pretrain.training.checkpoint import load_checkpoint

    steps = []
    for path in sorted(run.checkpoints.glob("step-*")):
        with suppress(ArtifactError, OSError):
            steps.append(load_checkpoint(path).step)
    return steps


def against(run: tiny.Run, oracle: tiny.Trace) -> str:
    """What is wrong with a run that has ended; empty when it is exact and left nothing behind."""
    leftovers = [path.name for path in (run.directory / "train").rglob(".tmp-*")]
    if leftovers or (run.directory / ".lock").exists():
        return f"left behind: {leftovers[:1] or '.lock'}"
    try:
        return tiny.trace(run).difference(oracle)
    except ValueError as error:
        return str(error)


def repeated(run: tiny.Run) -> int:
    """Steps that were trained more than once, by the record of rows."""
    return max(0, len(tiny._lines(run.directory / "rows.jsonl")) - STEPS)


def go_on(warm: Warm, run: tiny.Run, oracle: tiny.Trace) -> str:
    """Start the same command again; what is wrong then, empty when nothing is."""
    ended = warm.execute([TRAIN, str(run.config)])
    if ended.code:
        return f"exit {ended.code} on the next start: {ended.output[-300:]}"
    return against(run, oracle)


def spread(items: Sequence[Any], work: Callable[[Warm, Sequence[Any]], None]) -> None:
    """Share items out between two warm processes."""

    def one(share: Sequence[Any]) -> None:
        with Warm() as warm:
            work(warm, share)

    with ThreadPoolExecutor(WORKERS) as pool:
        for done in [pool.submit(one, items[number::WORKERS]) for number in range(WORKERS)]:
            done.result()
