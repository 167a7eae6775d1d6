"""The launcher behind `pretrain train --processes N`: the processes of a run on this machine, relaunched when told to.

What lives here: which command each process runs, what a person is told, when to start again and when to give up. What
must not: torch, or what the processes compute.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console

from pretrain.config import RunConfig
from pretrain.config_types import redacted
from pretrain.data.loader import DataPlane
from pretrain.files import read_manifest
from pretrain.heartbeat import Beat, read_beats
from pretrain.launching.hangs import MARGIN_SECONDS, Watch, dump_stacks
from pretrain.launching.processes import EXIT_STOPPED, Bounds, Ending, Job, Signals, free_port, is_free, name_of_signal
from pretrain.training.records import length_of_run, newest_state, newest_stored

EXIT_USER_ERROR = 2
SAME_PLACE = 3
"""So many failures in a row at one step end a supervised run."""

_PORTS = 3  # starts, when another program took the port between choosing and using it
_LONGEST_PAUSE = 30.0
_ROWS_SHOWN = 8


@dataclass(frozen=True)
class Supervision:
    """How failed processes are started again.

    Attributes:
        max_restarts: in a row, without a newer checkpoint.
        hang_seconds: of silence that are never taken for a hang, whatever the rule of the steps says.
        margin: see `pretrain.launching.hangs.MARGIN_SECONDS`.
        pause: seconds before the first restart; doubled each time, up to 30.
    """

    max_restarts: int = 10
    hang_seconds: float = 0.0
    margin: float = MARGIN_SECONDS
    pause: float = 1.0


def started_by_launcher() -> bool:
    """Whether torchrun, accelerate, deepspeed or this launcher started the process: nothing is launched then."""
    # `accelerate launch` of one process sets no rank, but says its precision.
    return os.environ.keys() >= {"RANK", "WORLD_SIZE"} or "ACCELERATE_MIXED_PRECISION" in os.environ


def train_command(
    name: str, overrides: Sequence[str] = (), *, resume: str = "auto", allow_changes: Collection[str] = ()
) -> list[str]:
    """What each process runs: this Python's `pretrain train`, with the arguments as they were given.

    With `-P`, modules in the working directory do not stand in for installed ones, as they do not for the command.
    """
    allowed = [word for key in allow_changes for word in ("--allow-change", key)]
    module = "-m" if Path(__file__).parent.parent == Path.cwd() else "-Pm"  # a checkout may not be installed
    return [sys.executable, module, "pretrain", "train", name, *overrides, "--resume", resume, *allowed]


def launch(
    config: RunConfig,
    command: Callable[[str], Sequence[str]],
    *,
    processes: int,
    resume: str = "auto",
    supervision: Supervision | None = None,
    bounds: Bounds = Bounds(),
    console: Console | None = None,
) -> int:
    """Run the processes of a training to their end, passing signals on; return the exit code.

    Args:
        config: the run configuration.
        command: gives what each process runs, for a value of `--resume`.
        processes: how many.
        resume: of the first start; every later one goes on from the newest checkpoint.
        supervision: start again after a failure or a hang; None: not.
        bounds: how long processes may take to end.
        console: where the launcher speaks.

    Returns:
        0 when all are done; 75 when all were stopped and saved; else the code of the process that failed first, 128 + n
        for signal n (137, too, when the processes were killed because one hung).

    Raises:
        ArtifactError: when the run's tokenizer or data are missing.
        OSError: when nothing can be started.
    """
    for kind in ("tokenizer", "data"):
        read_manifest(config.directory / kind, kind)
    console = console or Console(stderr=True, soft_wrap=True)
    history = History(config)
    trained = False
    with Signals() as signals, tempfile.TemporaryDirectory(prefix="pretrain-", dir=_memory_folder()) as folder:
        while True:
            launched = Launched(config, command(resume), processes, Path(folder), console)
            ending = launched.run(signals, supervision, bounds)
            # Code 2 is a mistake of the user's before the first step; after it, a disk or a store that failed.
            trained = trained or launched.trained
            final = (0, EXIT_STOPPED) if trained else (0, EXIT_STOPPED, EXIT_USER_ERROR)
            if supervision is None or signals.received or ending.code in final:
                return ending.code
            if reason := history.failed(launched.place(ending), supervision.max_restarts):
                say(console, f"{reason}; the processes' logs: {launched.logs}")
                return ending.code
            pause = min(_LONGEST_PAUSE, supervision.pause * 2 ** (len(history.failures) - 1))
            say(console, f"starting again in {pause:g} s, from {history.from_where()}")
            if _stopped_within(pause, signals):
                return 128 + signals.received[-1]
            resume = "auto"


def say(console: Console, text: str) -> None:
    """Show a line of the launcher."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _memory_folder() -> str | None:
    """A folder in memory for the signs of life, where there is one: no disk can slow them down or be full."""
    folder = "/dev/shm"
    return folder if os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK) else None


def _stopped_within(seconds: float, signals: Signals) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not signals.received:
        time.sleep(0.05)
    return bool(signals.received)


# --- one start ------------------------------------------------------------------------------------------------------


class Launched:
    """One start of all processes, and what is said about how it ended."""

    def __init__(
        self, config: RunConfig, command: Sequence[str], processes: int, beats: Path, console: Console
    ) -> None:
        self.logs = config.directory / "train" / "logs"
        self._command = command
        self._processes = processes
        self._beats = beats
        self._console = console
        self._watch: Watch | None = None

    def run(self, signals: Signals, supervision: Supervision | None, bounds: Bounds) -> Ending:
        """Start, wait, and say what went wrong. A port that another program took is no failure: another is chosen."""
        for _ in range(_PORTS):
            job = Job(self._command, self._processes, self.logs, self._beats, free_port())
            job.start()
            if supervision is not None:
                self._watch = Watch(job, margin=supervision.margin, at_least=supervision.hang_seconds)
            ending = job.wait(signals, bounds, hangs=partial(self._hangs, job) if self._watch else None)
            if ending.code == 0 or self.trained or ending.why or signals.received or is_free(job.port):
                break
            say(self._console, f"port {job.port} was taken by another program; starting again with another")
        self._tell(job, ending)
        return ending

    @property
    def trained(self) -> bool:
        """Whether any process came past the start."""
        return any(beat.phase != "start" for beat in read_beats(self._beats).values())

    def _hangs(self, job: Job) -> bool:
        watch = self._watch
        assert watch is not None
        if not watch.look():
            return False
        assert watch.hang is not None
        page = dump_stacks(job, watch.beats, watch.hang.describe(), self.logs)
        say(self._console, f"{watch.hang.describe()}; ending all processes; their stacks: {page}")
        return True

    def _tell(self, job: Job, ending: Ending) -> None:
        """Name the process that failed first, and show what it said last; rank 0 has said it already."""
        rank = ending.first
        if rank is None or (self._watch is not None and self._watch.hang is not None):
            return
        code = ending.codes[rank]
        if code == ending.codes[0] == EXIT_USER_ERROR and not self.trained:
            return
        how = f"was ended by {name_of_signal(-code)}" if code < 0 else f"ended with code {code}"
        if code == -9 and not ending.why:
            how += " (somebody's, or the kernel's when memory ran out)"
        why = f": {ending.why}" if ending.why else ""
        log = f"; its log: {job.log(rank)}" if rank else ""
        say(self._console, f"rank {rank} of {self._processes} {how} in {self.place(ending).words}{why}{log}")
        for line in job.last_lines(rank) if rank else ():
            say(self._console, f"  rank {rank}: {line}")

    def place(self, ending: Ending) -> Place:
        """Where the process that failed first, or hangs, was."""
        if self._watch is not None and self._watch.hang is not None:
            return Place.of(self._watch.hang.beat)
        beats = read_beats(self._beats)
        return Place.of(beats.get(ending.first) if ending.first is not None else None)


@dataclass(frozen=True)
class Place:
    """Where in a run a process was: in words, and the step under way, as the log counts, when it was in one."""

    words: str
    step: int | None = None

    @classmethod
    def of(cls, beat: Beat | None) -> Place:
        """By the last sign of life."""
        if beat is None or beat.phase == "start":
            return cls("the start")
        if beat.phase == "step":
            return cls(f"step {beat.step + 1:,}", beat.step + 1)
        name = {"evaluate": "the evaluation", "save": "the save", "end": "the end"}[beat.phase]
        return cls(f"{name} after step {beat.step:,}")


# --- when to give up ------------------------------------------------------------------------------------------------


@dataclass
class History:
    """The failures of a supervised run since its last new checkpoint."""

    config: RunConfig
    failures: list[Place] = field(default_factory=list)
    saved: int | None = None
    store: str = ""  # that holds the newest checkpoint; empty when it lies in the run's directory

    def failed(self, place: Place, max_restarts: int) -> str:
        """Note a failure; why the run must not be started again, empty when it may."""
        before, (self.saved, self.store) = self.saved, self._newest()
        if self.saved != before:
            self.failures.clear()
        self.failures.append(place)
        if self.failures[-SAME_PLACE:] == [place] * SAME_PLACE:
            return f"{place.words} failed {SAME_PLACE} times in a row: not started again{self._rows(place.step)}"
        if len(self.failures) > max_restarts:
            return f"{max_restarts} restarts in a row gave no newer checkpoint: not started again"
        return ""

    def from_where(self) -> str:
        """What a new start goes on from."""
        if self.store:
            of_step = f", of step {self.saved:,}" if self.saved else ""
            return f"the newest checkpoint in {self.store}{of_step}"
        if self.saved:
            return f"the checkpoint of step {self.saved:,}"
        if (to := self.config.checkpoint.to) is not None:
            return f"the newest checkpoint in {redacted(to)}, if there is one"
        return "step 0: nothing is saved yet"

    def _newest(self) -> tuple[int, str]:
        """The step of the newest checkpoint, 0 without one, and the store that holds it."""
        directory = self.config.directory / "train"
        state = newest_state(directory)
        step = 0 if state is None else int(state["progress"]["step"])
        stored = newest_stored(directory)
        return stored if stored is not None and stored[0] >= step else (step, "")

    def _rows(self, step: int | None) -> str:
        """The rows of a step, and the command that shows them; empty when it was no step."""
        if step is None:
            return ""
        directory = self.config.directory / "train"
        shows = f"`pretrain inspect {directory / 'config.yaml'} --step {step}` shows its rows"
        try:
            data = DataPlane.from_config(self.config, keep_plan=False)
            length = length_of_run(self.config, directory, data.num_rows, newest_state(directory))
            if length is not None:
                data.for_run(length.steps)
            rows = data.batch(step - 1).row_ids.tolist()
        except (ValueError, OSError):  # data that cannot be read may be why it failed
            return f"; {shows}"
        named = ", ".join(str(row) for row in rows[:_ROWS_SHOWN])
        more = f" and {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else ""
        return f"; {shows}: {named}{more}"
