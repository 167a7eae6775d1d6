"""Signs of life of a process of a job: which step and phase it is in, and its stacks when somebody asks.

What lives here: writing them (cheap, and never a reason to fail) and reading them. What must not: torch, or deciding
that a process hangs.

When the environment names a directory in `PRETRAIN_HEARTBEAT`, each process keeps one line of JSON there, in
`rank-00000`, written over in place: one `pwrite` a beat. The signal `SIGRTMIN+1` makes it append the stacks of all its
threads to `stack-00000`, whatever holds the interpreter.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

Phase = Literal["start", "step", "evaluate", "save", "end"]

ENVIRONMENT = "PRETRAIN_HEARTBEAT"
STACKS_SIGNAL: int | None = signal.SIGRTMIN + 1 if hasattr(signal, "SIGRTMIN") else None
"""The signal for stacks; None where there are no real-time signals (macOS)."""

_WIDTH = 160  # bytes of the line: one length for ever, so that no old end stands behind a new beginning
_UNSTEADY = 2  # the first intervals of a process hold compiling and warming up


@dataclass(frozen=True)
class Beat:
    """What a process said last.

    Attributes:
        step: optimizer steps made so far; the one under way is the next.
        phase: what it is doing.
        beat: how many times it has said anything.
        time: when, by the machine's monotonic clock, in seconds.
        slowest: seconds of its slowest normal step so far; None before there was one.
    """

    step: int
    phase: Phase
    beat: int
    time: float
    slowest: float | None = None


class Heartbeat:
    """The writer of one process. Without a directory, all of it does nothing.

    Args:
        directory: where the line is kept; made when it is missing.
        rank: of this process.
    """

    def __init__(self, directory: Path | None = None, rank: int = 0) -> None:
        self._descriptor: int | None = None
        self._beats = self._steady = 0
        self._slowest: float | None = None
        self._last: tuple[int, Phase, float] = (0, "start", 0.0)
        if directory is None:
            return
        # A directory that cannot be written is the watcher's problem: training goes on without being watched.
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(beat_file(directory, rank), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            _show_stacks_on_signal(stack_file(directory, rank))
        self.beat(0, "start")

    @classmethod
    def from_environment(cls, rank: int) -> Self:
        """The writer that `PRETRAIN_HEARTBEAT` asks for; one that does nothing when it is not set."""
        directory = os.environ.get(ENVIRONMENT)
        return cls(Path(directory) if directory else None, rank)

    def beat(self, step: int, phase: Phase) -> None:
        """Say that this process lives.

        Args:
            step: optimizer steps made so far.
            phase: what comes next: another step, an evaluation (one beat a batch), a save, the end.
        """
        if self._descriptor is None:
            return
        now = time.monotonic()
        last_step, last_phase, last_time = self._last
        if phase == last_phase == "step" and step == last_step + 1:
            self._steady += 1
            if self._steady > _UNSTEADY:
                self._slowest = max(self._slowest or 0.0, now - last_time)
        self._last = step, phase, now
        self._beats += 1
        # A full disk, or one that went away, must not end the training.
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, beat_line(Beat(step, phase, self._beats, now, self._slowest)), 0)


_stacks: dict[str, int] = {}  # descriptors that the signal's handler writes to; they must stay open


def _show_stacks_on_signal(path: Path) -> None:
    if STACKS_SIGNAL is None or str(path) in _stacks:
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    faulthandler.register(STACKS_SIGNAL, file=descriptor, all_threads=True, chain=False)
    _stacks[str(path)] = descriptor


def beat_file(directory: Path, rank: int) -> Path:
    """Where a process keeps its line."""
    return directory / f"rank-{rank:05d}"


def stack_file(directory: Path, rank: int) -> Path:
    """Where a process writes its stacks."""
    return directory / f"stack-{rank:05d}"


def beat_line(beat: Beat) -> bytes:
    """The line of a beat, of the one width that all have."""
    slowest = "null" if beat.slowest is None else f"{beat.slowest:.4f}"
    text = (
        f'{{"step": {beat.step}, "phase": "{beat.phase}", "beat": {beat.beat}, "time": {beat.time:.4f}, '
        f'"slowest": {slowest}}}'
    )
    return text.ljust(_WIDTH - 1).encode() + b"\n"


def read_beats(directory: Path) -> dict[int, Beat]:
    """The newest beat of every process, by rank; one that is being written, or was never, is left out."""
    beats = {}
    for path in sorted(directory.glob("rank-*")):
        digits = path.name.removeprefix("rank-")
        try:
            with path.open("rb") as file:
                beat = Beat(**json.loads(file.read(_WIDTH)))
        except (OSError, ValueError, TypeError):
            continue
        if digits.isdecimal() and beat.phase in get_args(Phase):
            beats[int(digits)] = beat
    return beats
