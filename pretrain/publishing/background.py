"""Pushes beside the training: checkpoints put aside as they are saved, and a process of its own that sends them.

What lives here: the spool, the process that empties it started and watched, what is said about it. What must not:
sending (`pushing`), torch, or anything that could end a run: a failure is a line of the log.

    <run>/train/publish/
        target.json            the repository, and whether it is private
        step-00001000/         hard links to a checkpoint's files (copies where a disk has none): rotation may go on
        step-00001000.json     step, tokens, run id, digests; written last: without it nothing is sent
        last.json              the step that was put aside last
        said.txt               what the process said

The process runs at the lowest priority. It sends what lies there, oldest first, removes what the Hub has confirmed, and
ends. What it could not send is tried again at the next save, and at the next start of the run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from pretrain.config_types import amount_in_steps
from pretrain.files import ArtifactError, make_directories, read_manifest, replace_file

FOLDER = "publish"
TARGET, LAST, SAID = "target.json", "last.json", "said.txt"
MOST = 4
"""Checkpoints that wait at most: the oldest one is given up for a newer one, so that the disk does not fill."""

ON_THE_WAY = "... "
"""How lines of the process begin that matter only when it comes to no end."""

SECONDS_BETWEEN_STARTS = 30.0
"""The process takes half a second of a processor to begin: less than 2% of one core, however often a run is saved."""

_STOP_SECONDS = 2.0  # a run that is told to stop waits no longer
_MODULE = "pretrain.publishing.pushing"


@dataclass(frozen=True)
class Target:
    """Where checkpoints are pushed to.

    Attributes:
        to: OWNER/NAME.
        private: of a repository that is made.
        timeout: seconds that an answer may take; None for the usual.
    """

    to: str
    private: bool = True
    timeout: float | None = None


@dataclass(frozen=True)
class Waiting:
    """A checkpoint's model that was put aside.

    Attributes:
        folder: where its files lie.
        step: optimizer steps done.
        tokens: token positions seen.
        run_id: of the run.
        digests: SHA-256 of its files, of the memory that was written.
    """

    folder: Path
    step: int
    tokens: int
    run_id: str
    digests: Mapping[str, str]

    @property
    def mark(self) -> Path:
        """The file that says that it is whole."""
        return self.folder.with_suffix(".json")

    def remove(self) -> None:
        """The mark first: what is cut short is sent by nobody."""
        self.mark.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def waiting_in(spool: Path) -> list[Waiting]:
    """What waits in a spool, oldest first."""
    found = []
    for mark in sorted(spool.glob("step-*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            raw = json.loads(mark.read_text(encoding="utf-8"))
            folder = mark.with_suffix("")
            found.append(Waiting(folder, raw["step"], raw["tokens"], raw["run_id"], dict(raw["digests"])))
    return sorted(found, key=lambda waiting: waiting.step)


@dataclass
class Publisher:
    """Puts checkpoints aside and keeps the process that sends them going. For the first rank; never raises.

    Attributes:
        spool: `<run>/train/publish`.
        target: where they go.
        every: the first checkpoint after each so many steps, or share of the run, is sent; None: every one.
        wait: seconds that the end of the run waits for what is not sent yet.
        say: gets a line for the log.
        finished: whether the run has come to its end, so that waiting is worth it.
    """

    spool: Path
    target: Target
    every: str | int | None
    wait: float
    say: Callable[[str], None]
    finished: bool = False
    _process: subprocess.Popen[bytes] | None = field(init=False, default=None)
    _said: list[str] = field(init=False, default_factory=list)
    _started: float | None = field(init=False, default=None)
    # A checkpoint is put aside by the thread that saves it, while the loop looks.
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def start(self) -> None:
        """Send what an earlier start of the run has left."""
        try:
            with self._lock:
                self._start()
        except (OSError, ValueError) as error:
            self.say(f"publishing: {error}")

    def take(self, path: Path, *, step: int, tokens: int, run_id: str, total_steps: int) -> None:
        """Put the model of a whole checkpoint aside, if it is its turn, and see that the rest is on its way.

        Called before older checkpoints are removed. Costs a hard link for each file.
        """
        try:
            with self._lock:
                if self._is_its_turn(step, total_steps, run_id):
                    self._put_aside(path, step, tokens, run_id)
                self._make_way()
                self._start()
        except (OSError, ValueError, KeyError, TypeError, ArtifactError) as error:
            self.say(f"publishing: step {step:,} is not put aside: {error}; training goes on")

    def look(self) -> None:
        """Say what the process said, once it has ended; cheap, for every step."""
        if self._process is not None and self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._lock.release()

    def _look(self) -> None:
        if self._process is None or self._process.poll() is None:
            return
        code, self._process = self._process.returncode, None
        lines = [line for line in self._lines() if not line.startswith(ON_THE_WAY)]
        if code and not lines:
            lines = [f"the process that sends checkpoints ended with code {code}"]
        for line in lines:
            if line not in self._said:  # a server that stays away is mentioned once
                self.say(f"publishing: {line}")
        self._said = lines if code else []

    def close(self) -> None:
        """Wait for what is on its way: as long as `wait` says at the end of a run, else hardly."""
        deadline = time.monotonic() + (self.wait if self.finished else _STOP_SECONDS)
        try:
            with self._lock:
                self._wait(deadline)
                if self.finished and waiting_in(self.spool) and time.monotonic() < deadline:
                    self._start(at_once=True)  # once more: all that failed before, and what came late
                    self._wait(deadline)
                self._stop()
            left = [waiting.step for waiting in waiting_in(self.spool)]
            if left:
                steps = ", ".join(f"{step:,}" for step in left)
                self.say(
                    f"publishing: not sent yet: step {steps}. The next start of the run sends them, or `pretrain "
                    f"publish {self.spool.parent.parent} {self.target.to} --steps --yes`"
                )
        except (OSError, ValueError) as error:
            self.say(f"publishing: {error}")

    def give_up(self) -> list[str]:
        """Remove what waits, for room on the disk; `take` puts the next ones aside."""
        with self._lock:
            self._stop()
            self._started = None
            waiting = waiting_in(self.spool)
            for one in waiting:
                one.remove()
        return [f"{one.folder.name} of what waits to be published" for one in waiting]

    # --- the spool ------------------------------------------------------------------------------------------------

    def _is_its_turn(self, step: int, total_steps: int, run_id: str) -> bool:
        if self.every is None or step >= total_steps:
            return True
        every = max(1, amount_in_steps(self.every, total_steps))
        last: Any = {}
        with suppress(OSError, ValueError):
            last = json.loads((self.spool / LAST).read_text(encoding="utf-8"))
        before = int(last["step"]) if last.get("run_id") == run_id and int(last["step"]) <= step else 0
        return step // every > before // every

    def _put_aside(self, path: Path, step: int, tokens: int, run_id: str) -> None:
        files = read_manifest(path, "checkpoint").files
        digests = {name.removeprefix("model/"): files[name] for name in files if name.startswith("model/")}
        waiting = Waiting(self.spool / path.name, step, tokens, run_id, digests)
        waiting.remove()
        for name in digests:
            place = waiting.folder / name
            make_directories(place.parent)
            _link(path / "model" / name, place)
        said = {"step": step, "tokens": tokens, "run_id": run_id, "digests": digests}
        replace_file(waiting.mark, (json.dumps(said) + "\n").encode())
        replace_file(self.spool / LAST, (json.dumps({"step": step, "run_id": run_id}) + "\n").encode())

    def _make_way(self) -> None:
        """Give up the oldest ones where more wait than may; the one that is being sent now may be among them."""
        waiting = waiting_in(self.spool)
        for oldest in waiting[: max(0, len(waiting) - MOST)]:
            oldest.remove()
            self.say(
                f"publishing: step {oldest.step:,} is given up: {MOST} newer checkpoints wait; `pretrain publish "
                "--steps` sends what the run keeps"
            )

    # --- the process ----------------------------------------------------------------------------------------------

    def _start(self, *, at_once: bool = False) -> None:
        """Start the process that sends, unless it runs, has nothing to do, or ran a moment ago."""
        self._look()
        now = time.monotonic()
        early = self._started is not None and now < self._started + SECONDS_BETWEEN_STARTS and not at_once
        if self._process is not None or early or not waiting_in(self.spool):
            return
        self._started = now
        replace_file(self.spool / TARGET, (json.dumps(asdict(self.target)) + "\n").encode())
        with (self.spool / SAID).open("wb") as said:
            self._process = _begin([sys.executable, "-Pm", _MODULE, str(self.spool.resolve())], said)

    def _wait(self, deadline: float) -> None:
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, deadline - time.monotonic()))
        self._look()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            for line in self._lines()[-1:] or ["there was no answer yet"]:
                self.say(f"publishing: {line.removeprefix(ON_THE_WAY)}")

    def _lines(self) -> list[str]:
        with suppress(OSError):
            return (self.spool / SAID).read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        return []


def _link(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:  # a disk without hard links
        shutil.copyfile(source, place)


def _begin(command: list[str], said: IO[bytes]) -> subprocess.Popen[bytes]:
    """A process of its own group: Ctrl-C at the training is not for it, which ends it itself.

    But of the same session: Linux shares a processor out between sessions first, whatever their priorities are.
    """
    # The job's own variables (ranks, addresses, a launcher's) mean nothing to it; only rank 0 starts one.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=subprocess.STDOUT,
        env=environment,
        process_group=0,
    )
