"""Where the checkpoints of a run lie: a directory that all of its processes see.

What lives here: writing one there, the pointers, rotation, room, finding the newest whole one. What must not: stores
behind URLs (`stored`), what is in a checkpoint, or what a run does when a save fails.
"""

from __future__ import annotations

import json
import math
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pretrain.config_types import redacted
from pretrain.files import TEMPORARY_PREFIX, ArtifactError, bytes_in, make_directories, replace_file
from pretrain.ranks import Ranks
from pretrain.training import checkpoint
from pretrain.training.checkpoint_files import Content, together, write_checkpoint
from pretrain.training.progress import Progress
from pretrain.training.room import amount

SAVED_MARK = "run.json"
"""Written with a run's first checkpoint: where it stands and no checkpoint does, they were taken away."""

RECORD = "store.json"
"""In the training directory: the store that holds the newest checkpoints, for whoever looks for them there."""

SEEN_SECONDS = 15.0
"""How long a file of another machine may take to be seen: network file systems keep old listings for a while."""

Report = Callable[[str], None]


class Place(Protocol):
    """Where checkpoints are kept. What names `ranks` is called by all of them together, the rest by the first one."""

    @property
    def name(self) -> str:
        """For messages."""

    def where(self, step: int) -> str:
        """Where the checkpoint of a step lies, or would, for messages."""

    def check(self, ranks: Ranks) -> None:
        """Refuse a place that cannot be used, before anything is trained.

        Raises:
            ValueError: names what is in the way, and the remedy.
        """

    def write(self, content: Content, ranks: Ranks, report: Report) -> str:
        """Write a checkpoint, all of it or nothing; returns where it lies.

        Raises:
            OSError: when it is not whole; everything is as it was.
        """

    def settle(self, content: Content, *, best: int | None, keep: int) -> None:
        """Move the pointers to a checkpoint that is whole, then remove what is no longer kept.

        Args:
            content: of the checkpoint.
            best: the step that is the best so far, which stays whatever the pointer said before.
            keep: `checkpoint.keep`.

        Raises:
            ArtifactError, OSError: when that failed; the checkpoint is whole all the same.
        """

    def steps(self, run_id: str | None = None) -> list[int]:
        """Steps of the complete checkpoints, in order: of the run, or of all.

        Raises:
            OSError: when that cannot be told now: which is not to say that there are none.
        """

    def make_room(self, run_id: str, best: int | None) -> list[str]:
        """Remove every checkpoint but the newest, the best and what is pointed at; returns what was removed."""

    def free_bytes(self) -> int | None:
        """What may still be written; None where nobody knows."""

    def check_space(self, progress: Progress, *, one: int, keep: int, save_every: int, judged: bool) -> None:
        """Refuse a run whose checkpoints do not fit, before it is trained.

        Args:
            progress: where the run stands.
            one: bytes of a checkpoint.
            keep: `checkpoint.keep`.
            save_every: steps between two saves.
            judged: whether a validation set decides which one is best.

        Raises:
            ArtifactError: with the numbers and the remedy.
        """

    def find(self, ranks: Ranks, report: Report) -> Path | None:
        """A local directory with the newest whole checkpoint, every digest compared; None when nothing was saved.

        Raises:
            ArtifactError: when there were checkpoints and none can be used.
        """

    def repair(self, wanted: Mapping[checkpoint.Pointer, int], run_id: str, report: Report) -> None:
        """Let the pointers name these steps of the run: a kill, or damage, may have left other ones."""

    def done(self, found: Path) -> None:
        """What `find` gave has been read by all; for one process of each machine."""


@dataclass(frozen=True)
class Shared:
    """A directory of this machine, or one that all machines of the job share.

    Attributes:
        directory: the training directory (`<run>/train`).
    """

    directory: Path

    @property
    def name(self) -> str:
        """The directory."""
        return str(self.directory)

    def where(self, step: int) -> str:
        """The checkpoint's own directory."""
        return str(checkpoint.checkpoint_path(self.directory, step))

    def check(self, ranks: Ranks) -> None:
        """See that all ranks see one directory: the first one leaves a file there, and the others look for it."""
        if ranks.world == 1:
            return
        token = f"{TEMPORARY_PREFIX}seen-{ranks.broadcast(uuid.uuid4().hex[:12])}"

        def leave() -> None:
            make_directories(self.directory)
            replace_file(self.directory / token, b"")

        ranks.on_main(leave)
        hosts = ranks.gather([socket.gethostname(), self._seen(token)])
        if ranks.main:
            (self.directory / token).unlink(missing_ok=True)
        blind = [(rank, host) for rank, (host, seen) in enumerate(hosts) if not seen]
        if blind:
            rank, host = blind[0]
            raise ValueError(
                f"out: rank {rank} on {host} does not see what rank 0 on {hosts[0][0]} writes into `{self.directory}`; "
                "give out= on a disk that all machines share, or keep the checkpoints in a store: "
                "checkpoint.to=s3://BUCKET/FOLDER"
            )

    def _seen(self, token: str) -> bool:
        deadline = time.monotonic() + SEEN_SECONDS
        while not (self.directory / token).exists():
            with suppress(OSError):
                list(self.directory.iterdir())  # a listing makes a network file system look again
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def write(self, content: Content, ranks: Ranks, report: Report) -> str:
        """Write a checkpoint; where another run's stands in its place, that one is moved aside."""

        def aside() -> None:
            moved = checkpoint.move_foreign_aside(self.directory, content.step, content.run_id)
            if moved is not None:
                report(f"another run's checkpoint stood at step {content.step:,}; it lies in {moved} now")

        together(ranks, aside if ranks.main else lambda: None)
        return str(write_checkpoint(self.directory, content, ranks))

    def settle(self, content: Content, *, best: int | None, keep: int) -> None:
        """Mark the run as saved, move the pointers, rotate. What is pointed at, rotation spares."""
        if not (self.directory / SAVED_MARK).exists():
            replace_file(self.directory / SAVED_MARK, (json.dumps({"run_id": content.run_id}) + "\n").encode())
        checkpoint.point(self.directory, "latest", content.step)
        if best is not None and best in self.steps(content.run_id):
            checkpoint.point(self.directory, "best", best)
        (self.directory / RECORD).unlink(missing_ok=True)
        checkpoint.rotate(self.directory, keep=keep)

    def steps(self, run_id: str | None = None) -> list[int]:
        """Steps of the complete checkpoints."""
        return [int(path.name.partition("-")[2]) for path in checkpoint.list_checkpoints(self.directory, run_id=run_id)]

    def make_room(self, run_id: str, best: int | None) -> list[str]:
        """Remove what only `checkpoint.keep` holds."""
        return [path.name for path in checkpoint.make_room(self.directory, run_id=run_id, best=best)]

    def free_bytes(self) -> int:
        """What an ordinary user may still write where the directory lies, or will lie."""
        place = self.directory
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(str(place)).free

    def check_space(self, progress: Progress, *, one: int, keep: int, save_every: int, judged: bool) -> None:
        """Count what lies there together at most: `keep`, the best one, and the one that is being written."""
        own = checkpoint.list_checkpoints(self.directory, run_id=progress.run_id)
        to_come = math.ceil((progress.total_steps - progress.step) / save_every)
        side_by_side = min(keep + 1 + judged, len(own) + to_come)
        side_by_side = max(side_by_side, len(own) + 1)  # the first save comes before any removal
        missing = max(one, side_by_side * one - sum(bytes_in(path) for path in own))
        free = self.free_bytes()
        if missing > free:
            raise ArtifactError(
                f"`{self.directory}` has {amount(free)} free, and the checkpoints need {amount(missing)}: "
                f"{side_by_side} of {amount(one)} lie there together (checkpoint.keep: {keep}, the "
                f"one that is being written{', the best one' if judged else ''}), {len(own)} are there already. Free "
                f"{amount(missing - free)}, lower checkpoint.keep, or give another place with out="
            )

    def find(self, ranks: Ranks, report: Report) -> Path | None:
        """The newest whole checkpoint."""

        def refuse_other_place() -> None:
            if (run := recorded_store(self.directory)) is not None:
                raise ArtifactError(
                    f"the newest checkpoints of `{self.directory}` lie in {run['run']}; give "
                    f"checkpoint.to={redacted(run['to'])} again, or copy them to "
                    f"`{self.directory / 'checkpoints'}` and remove `{RECORD}`"
                )

        ranks.on_main(refuse_other_place)
        return self.newest(ranks, report)

    def newest(self, ranks: Ranks, report: Report) -> Path | None:
        """The newest whole checkpoint that lies here, whether others lie elsewhere or not."""

        def look() -> str | None:
            found = checkpoint.find_resumable(self.directory, report=report)
            if found is None and (self.directory / SAVED_MARK).exists():
                raise ArtifactError(
                    f"`{self.directory}` had checkpoints, and there is none now; put them back, give another name=, or "
                    f"start anew with `pretrain run --fresh` (or by removing `{self.directory}`)"
                )
            return None if found is None else str(found)

        found: Any = ranks.on_main(look)
        return None if found is None else Path(found)

    def repair(self, wanted: Mapping[checkpoint.Pointer, int], run_id: str, report: Report) -> None:
        """Let the pointers name these steps, and say so where the best one is concerned."""
        own = self.steps(run_id)
        for name, step in wanted.items():
            path = checkpoint.checkpoint_path(self.directory, step)
            try:
                pointed = checkpoint.read_pointer(self.directory, name)
                if pointed is None and name == "best":
                    report(f"the pointer to the best checkpoint is missing; it names {path.name} again")
            except ArtifactError as error:
                pointed = None
                if name == "best":  # the latest was spoken of when it was looked for
                    report(f"the pointer to the best checkpoint is not used, it names {path.name} again: {error}")
            if pointed != path and step in own:
                with suppress(OSError, ArtifactError):  # on a full disk; the next save tries again
                    checkpoint.point(self.directory, name, step)

    def done(self, found: Path) -> None:
        """It stays."""


def recorded_store(directory: Path) -> dict[str, str] | None:
    """Where a training directory says that the checkpoints lie: `to` as configured, `run` for messages; None if here.

    Raises:
        ArtifactError: when the record cannot be read.
    """
    path = directory / RECORD
    try:
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        return {"to": str(found["to"]), "run": str(found["run"])}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"`{path}` was altered ({error}); put it back, or remove it") from error
