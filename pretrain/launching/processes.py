"""N processes of one command with torch's variables: started together, told of signals, ended together.

What lives here: a job of this machine and how it ended. What must not: starting it again, or what it computes.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from pretrain import heartbeat
from pretrain.files import make_directories

EXIT_STOPPED = 75
"""What a process says that a signal stopped and that has saved (the same as in `pretrain.runtime`, without torch)."""

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
LOG_BYTES = 16 << 20
"""A log that grows beyond this loses its beginning."""

_KEPT_BYTES = 4 << 20
_POLL_SECONDS = 0.05
_LOG_SECONDS = 1.0
_LAST_LINES = 12
_DEATH_OF_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Bounds:
    """How long processes may take to end, in seconds.

    Attributes:
        grace: once one has failed, for the others to fail by themselves; SIGTERM follows.
        terminate: after that SIGTERM; SIGKILL follows.
        save: after a stop signal was passed on, or one has ended well, for all to save and end; SIGKILL follows.
    """

    grace: float = 10.0
    terminate: float = 5.0
    save: float = 900.0


@dataclass(frozen=True)
class Ending:
    """How a job ended.

    Attributes:
        codes: of every process by rank; negative: the signal that ended it.
        first: the process that failed first; None when none did.
        why: what the launcher itself did to it, and why; empty when it ended by itself.
    """

    codes: Mapping[int, int]
    first: int | None
    why: str = ""

    @property
    def code(self) -> int:
        """0 or 75 when all processes say so; else the code of the first that failed, 128 + n for signal n."""
        said = set(self.codes.values())
        if said in ({0}, {EXIT_STOPPED}):
            return said.pop()
        failed = self.codes[self.first] if self.first is not None else 1
        return 128 - failed if failed < 0 else failed


class Signals:
    """Collects the signals that are to be passed on. A context manager; handlers are put back after.

    A signal that is ignored (SIGHUP under nohup, say) stays ignored.
    """

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self._waiting: list[signal.Signals] = []
        self._previous: dict[signal.Signals, Any] = {}

    def take(self) -> list[signal.Signals]:
        """Those that came since the last call."""
        taken, self._waiting = self._waiting, []
        return taken

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number))
        self._waiting.append(signal.Signals(number))

    def __enter__(self) -> Self:
        for number in PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)


@dataclass
class Job:
    """Processes of one command, each with its rank in the environment.

    Attributes:
        command: what each runs.
        processes: how many.
        logs: what rank 1 and above say goes into `rank-00001.log` there; rank 0 writes where the launcher does.
        beats: the directory of their signs of life.
        port: where they meet.
    """

    command: Sequence[str]
    processes: int
    logs: Path
    beats: Path
    port: int
    running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)
    first: int | None = None
    _starts: dict[int, int] = field(default_factory=dict)  # where this job begins in a log

    def start(self) -> None:
        """Start all processes; when one cannot be started, none is left."""
        make_directories(self.logs)
        for path in self.beats.iterdir():
            path.unlink()
        for rank in range(self.processes):  # here a full disk is an error; the processes only write over
            first = heartbeat.Beat(0, "start", 0, time.monotonic())
            heartbeat.beat_file(self.beats, rank).write_bytes(heartbeat.beat_line(first))
        try:
            for rank in range(self.processes):
                self.running[rank] = self._start(rank)
        except BaseException:
            self.kill()
            raise

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        output = None
        if rank:
            path = self.log(rank)
            output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            os.write(output, f"--- started {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            self._starts[rank] = os.fstat(output).st_size
        try:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment(rank),
                process_group=0,  # Ctrl-C reaches the launcher alone, which passes it on once
                preexec_fn=_die_with(os.getpid()),
            )
        finally:
            if output is not None:
                os.close(output)

    def environment(self, rank: int) -> dict[str, str]:
        """The variables of a process: torch's, and where its signs of life go."""
        threads = max(1, len(_cores()) // self.processes)
        return {
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.processes),
            "LOCAL_WORLD_SIZE": str(self.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            heartbeat.ENVIRONMENT: str(self.beats),
        }

    def log(self, rank: int) -> Path:
        """Where a process other than rank 0 writes."""
        return self.logs / f"rank-{rank:05d}.log"

    def last_lines(self, rank: int) -> list[str]:
        """What a process other than rank 0 said last in this job."""
        try:
            with self.log(rank).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._starts.get(rank, 0) if size < LOG_BYTES else 0, size - 65536))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return []
        return lines[-_LAST_LINES:]

    # --- while it runs ----------------------------------------------------------------------------------------------

    def poll(self) -> bool:
        """Note who has ended; whether any process still runs."""
        ended = {rank: code for rank, process in self.running.items() if (code := process.poll()) is not None}
        for rank in ended:
            del self.running[rank]
        self.codes |= ended
        failed = {rank: code for rank, code in ended.items() if code not in (0, EXIT_STOPPED)}
        if self.first is None and failed:
            # Of those that ended since the last look: one that a signal ended did not merely lose the others, nor did
            # one with a code of its own.
            self.first = min(failed, key=lambda rank: (failed[rank] >= 0, failed[rank] == 1, rank))
        return bool(self.running)

    def send(self, number: int) -> None:
        """Send a signal to every process that runs."""
        for process in self.running.values():
            process.send_signal(number)

    def kill(self) -> None:
        """End every process, a stopped one too, and what they started; wait until they are gone."""
        for process in self.running.values():
            for number in (signal.SIGKILL, signal.SIGCONT):
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)
        for process in self.running.values():
            process.wait()
        self.poll()

    def wait(self, signals: Signals, bounds: Bounds, *, hangs: Callable[[], bool] | None = None) -> Ending:
        """Wait until all processes have ended, passing signals on.

        Args:
            signals: what came for the launcher.
            bounds: how long processes may take to end.
            hangs: called often; when it says True, all are killed.
        """
        leaving = _Leaving(bounds)
        looked = 0.0
        while self.poll():
            now = time.monotonic()
            for number in signals.take():
                self.send(number)
                leaving.saving(now, f"{number.name} was passed on")
            if self.codes:
                leaving.saving(now, "another process had ended")
            if self.first is not None:
                leaving.failing(now)
            if number_due := leaving.due(now):
                self.send(number_due)
            if leaving.overdue:
                return self._killed(leaving.overdue)
            if hangs is not None and hangs():
                return self._killed("a process hung")
            if now - looked > _LOG_SECONDS:
                looked = now
                self._bound_logs()
            time.sleep(_POLL_SECONDS)
        return Ending(dict(self.codes), self._blamed())

    def _killed(self, why: str) -> Ending:
        """End those that are left. Whoever ended well before the signal came was not killed."""
        self.kill()
        return Ending(dict(self.codes), self._blamed(), why if self.first is not None else "")

    def _blamed(self) -> int | None:
        """The first that failed; where some said 0 and others 75, the first that stopped; None when all agree."""
        if self.first is not None:
            return self.first
        return min(self.codes, key=lambda rank: -self.codes[rank]) if len(set(self.codes.values())) > 1 else None

    def _bound_logs(self) -> None:
        for rank in range(1, self.processes):
            with suppress(OSError), self.log(rank).open("r+b") as file:
                size = file.seek(0, os.SEEK_END)
                if size <= LOG_BYTES:
                    continue
                file.seek(size - _KEPT_BYTES)
                kept = file.read()
                file.truncate(0)  # the process appends, wherever the end is
                file.seek(0)
                file.write(kept[kept.find(b"\n") + 1 :])
                self._starts[rank] = 0


class _Leaving:
    """When a job that is ending must be told, and then made, to end."""

    def __init__(self, bounds: Bounds) -> None:
        self.overdue = ""  # why the processes that are left must be killed now
        self._bounds = bounds
        self._saving: tuple[float, str] | None = None
        self._failing: float | None = None
        self._told = False

    def saving(self, now: float, why: str) -> None:
        """From now on there is as long as a save may take."""
        if self._saving is None:
            self._saving = now, why

    def failing(self, now: float) -> None:
        """From now on there is the grace alone."""
        if self._failing is None:
            self._failing = now

    def due(self, now: float) -> signal.Signals | None:
        """SIGTERM, once, when the grace is over; sets `overdue` when killing is due."""
        if self._saving is not None and now - self._saving[0] > self._bounds.save:
            self.overdue = f"it had not ended {self._bounds.save:g} s after {self._saving[1]}, and was killed"
        if self._failing is None or now - self._failing <= self._bounds.grace:
            return None
        if now - self._failing > self._bounds.grace + self._bounds.terminate:
            self.overdue = "killed, as it had not ended after another process failed"
        told, self._told = self._told, True
        return None if told else signal.SIGTERM


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _die_with(parent: int) -> Callable[[], None]:
    """What a new process does before it becomes the command: it will be killed when the launcher is gone."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(_DEATH_OF_PARENT, signal.SIGKILL)
            if os.getppid() != parent:  # it went before we could ask
                os._exit(1)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # it may write to the terminal, though it is not in front
        if heartbeat.STACKS_SIGNAL is not None:
            signal.signal(heartbeat.STACKS_SIGNAL, signal.SIG_IGN)  # until it can show its stacks

    return prepare


def name_of_signal(number: int) -> str:
    """SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def free_port() -> int:
    """A port of this machine that nobody listens on, below those that connections take at random."""
    source = random.Random(os.urandom(16))
    for port in (source.randrange(20_000, 32_000) for _ in range(100)):
        if is_free(port):
            return port
    with socket.socket() as any_port:
        any_port.bind(("", 0))
        return int(any_port.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether a server could listen on the port now."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError:
            return False
    return True
