"""Seeing that a process hangs, and writing down where each one stands before they are ended.

What lives here: how long which phase may be silent, and the page of stacks. What must not: ending or starting anything.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain import heartbeat
from pretrain.heartbeat import Beat, Phase, read_beats
from pretrain.launching.processes import Job

PHASE_SECONDS: Mapping[Phase, float] = {
    "start": 1800.0,
    "step": 1800.0,
    "evaluate": 600.0,
    "save": 1800.0,
    "end": 600.0,
}
"""How long a process may be silent in a phase; in `step` as long as it is not known how long a step takes."""

MARGIN_SECONDS = 10.0
"""A step hangs after twice the slowest normal one and this long besides."""

_LOOK_SECONDS = 0.25
_STACK_SECONDS = 2.0
_KEPT_PAGES = 10
_MOST_BYTES = 1 << 20  # of one process's stacks


@dataclass(frozen=True)
class Hang:
    """A process that was silent for too long.

    Attributes:
        rank: the one that is most likely to keep the others waiting.
        beat: what it said last.
        silent: for how many seconds.
        allowed: how many it may be.
        stopped: whether the operating system has stopped it (SIGSTOP, a debugger).
    """

    rank: int
    beat: Beat
    silent: float
    allowed: float
    stopped: bool

    def describe(self) -> str:
        """In words."""
        stopped = ", stopped by a signal or a debugger" if self.stopped else ""
        return (
            f"rank {self.rank} hangs in phase {self.beat.phase} after step {self.beat.step:,}{stopped}: silent for "
            f"{self.silent:.1f} s, {self.allowed:.1f} s are allowed"
        )


class Watch:
    """Looks at the signs of life of a job's processes.

    Silence is counted in the watcher's own looks, so that time in which the watcher itself was stopped is nobody's.

    Args:
        job: whose processes.
        margin: see `MARGIN_SECONDS`.
        at_least: seconds of silence that no phase takes for a hang.
        phases: see `PHASE_SECONDS`.
    """

    def __init__(
        self,
        job: Job,
        *,
        margin: float = MARGIN_SECONDS,
        at_least: float = 0.0,
        phases: Mapping[Phase, float] = PHASE_SECONDS,
    ) -> None:
        self.hang: Hang | None = None
        self.beats: dict[int, Beat] = {}
        self._job = job
        # What is promised holds between two looks, too.
        self._margin = margin - min(2 * _LOOK_SECONDS, margin / 2)
        self._at_least = at_least
        self._phases = phases
        self._silent: dict[int, float] = {}
        self._looked = time.monotonic()

    def look(self) -> bool:
        """Whether a process hangs; `hang` says which."""
        now = time.monotonic()
        passed = now - self._looked
        if passed < _LOOK_SECONDS:
            return False
        self._looked = now
        new = read_beats(self._job.beats)
        late = []
        for rank in self._job.running:
            beat = new.get(rank, self.beats.get(rank))
            if beat is None:
                continue
            if self.beats.get(rank) != beat:
                self._silent[rank] = 0.0
            self._silent[rank] = self._silent.get(rank, 0.0) + min(passed, 4 * _LOOK_SECONDS)
            self.beats[rank] = beat
            if self._silent[rank] > self._allowed(beat):
                late.append(rank)
        if late:
            self.hang = self._blame()
        return bool(late)

    def _allowed(self, beat: Beat) -> float:
        if beat.phase == "step" and beat.slowest is not None:
            usual = 2 * beat.slowest + self._margin
        else:
            usual = self._phases[beat.phase]
        return max(usual, self._at_least)

    def _blame(self) -> Hang:
        """Of all that run: one that is stopped, else the one that got least far, else the one silent for longest."""
        stopped = {rank: is_stopped(process.pid) for rank, process in self._job.running.items()}
        known = [rank for rank in self._job.running if rank in self.beats]
        rank = min(known, key=lambda rank: (not stopped[rank], self.beats[rank].step, -self._silent[rank]))
        beat = self.beats[rank]
        return Hang(rank, beat, self._silent[rank], self._allowed(beat), stopped[rank])


def is_stopped(pid: int) -> bool:
    """Whether the operating system keeps a process from running; False where it does not tell."""
    return _of_process(pid, "status").partition("State:\t")[2][:1] in ("T", "t")


def dump_stacks(job: Job, beats: Mapping[int, Beat], title: str, folder: Path) -> Path:
    """Write what every running process is doing into `stacks-TIME.txt`; return the file.

    Each is asked for the stacks of its threads by a signal. One that is stopped is let go on for that moment, once the
    state it was found in is written down.

    Args:
        job: its processes; all of them will be ended after this.
        beats: what each said last.
        title: the first line.
        folder: of the file; the newest ten are kept.
    """
    found = {rank: _state(process.pid) for rank, process in job.running.items()}
    if heartbeat.STACKS_SIGNAL is not None:
        job.send(heartbeat.STACKS_SIGNAL)
        job.send(signal.SIGCONT)
        _wait_for_stacks(job)
    parts = [title]
    for rank, state in found.items():
        stacks = heartbeat.stack_file(job.beats, rank)
        text = stacks.read_bytes()[:_MOST_BYTES].decode(errors="replace") if stacks.is_file() else ""
        said = beats.get(rank)
        last = f"last sign of life: step {said.step}, {said.phase}" if said else "no sign of life"
        parts.append(f"=== rank {rank}, process {job.running[rank].pid}; {last}\n{state}\n{text or '(no stacks)'}")
    path = folder / f"stacks-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    with suppress(OSError):  # a full disk must not keep a run from going on
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        for old in sorted(folder.glob("stacks-*.txt"))[:-_KEPT_PAGES]:
            old.unlink()
    return path


def _wait_for_stacks(job: Job) -> None:
    """Until every process has written and has finished writing, or it takes too long."""
    deadline = time.monotonic() + _STACK_SECONDS
    sizes: list[int] = []
    while time.monotonic() < deadline:
        time.sleep(0.1)
        before = sizes
        files = [heartbeat.stack_file(job.beats, rank) for rank in job.running]
        sizes = [path.stat().st_size if path.is_file() else 0 for path in files]
        if all(sizes) and sizes == before:
            return


def _state(pid: int) -> str:
    """What the kernel says of a process; a part that it does not tell is left out."""
    wanted = ("State", "Threads", "VmRSS", "SigBlk", "SigIgn", "SigCgt")
    lines = [line for line in _of_process(pid, "status").splitlines() if line.startswith(wanted)]
    for name in ("wchan", "stack"):
        if text := _of_process(pid, name).strip():
            lines.append(f"{name}: {text}")
    return "\n".join(lines)


def _of_process(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
