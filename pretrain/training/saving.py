"""When and what a run saves, what it does when that fails, and how it goes on from what it finds.

What lives here: the pieces of a run that a checkpoint holds, the save beside the training, what follows from a failed
one, and resuming. What must not: the form on the disk (`checkpoint_files`), where it lies (`places`, `stored`), which
rank holds what (`snapshots`), or the loop.

With `checkpoint.asynchronous` training waits for a copy of the weights and the state alone; a thread hashes, writes and
publishes it. One save is in flight at most: the next one waits for it. What a thread says is said by all ranks: a save
that failed on one of them has failed.

A save that fails leaves the older checkpoints as they were. With `checkpoint.on_error: keep-going` training goes on and
the next save tries again. The last save of a process (the end, a stop signal, or any with `on_error: stop`) must
succeed: it makes room among the run's own older checkpoints, tries for a while, and then ends with an error that says
what is lost.
"""

from __future__ import annotations

import errno
import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from torch import Tensor

from pretrain.config import config_to_dict, dump_config
from pretrain.config_loop import LoopConfig
from pretrain.files import ArtifactError, make_directories, update_file
from pretrain.ranks import PATIENT_SECONDS, LostRankError, Ranks, words_of
from pretrain.training import checkpoint, restoring
from pretrain.training.checkpoint_files import Content, together
from pretrain.training.engines import Engine
from pretrain.training.engines.job import Job
from pretrain.training.feed import Data
from pretrain.training.places import Place
from pretrain.training.progress import Progress
from pretrain.training.room import amount, checkpoint_bytes
from pretrain.training.snapshots import Snapshots
from pretrain.training.stored import open_place

PATIENCE_SECONDS = 30.0
"""How long the last save is tried again: shorter than what a scheduler waits between SIGTERM and SIGKILL."""

_SECONDS_BETWEEN_TRIES = 2.0
_WORTH_SAYING = 0.5  # seconds that training waited for the save before
_FULL = (None, errno.ENOSPC, errno.EDQUOT)  # None: of another rank, told in words alone


class NotSavedError(ValueError):
    """The last checkpoint of a process could not be written; says what is lost and how to go on."""


class ModelStore(Protocol):
    """Writes and reads the model in its published form."""

    def write(self, model: Any, weights: Mapping[str, Tensor], directory: Path) -> dict[str, str]:
        """Write the directory of `model` with these whole weights by its own names; return its files' SHA-256."""

    def together(self, model: Any, names: Collection[str]) -> Sequence[Sequence[str]]:
        """The names of the model's tensors, each once; those of one list must be written by one process."""

    def write_share(
        self,
        model: Any,
        weights: Mapping[str, Tensor],
        directory: Path,
        shares: Sequence[Collection[str]],
        number: int,
    ) -> dict[str, str]:
        """Write share `number` of the directory; weights of the other shares hold no data. All go into one place."""

    def read(self, model: Any, directory: Path) -> Mapping[str, Tensor]:
        """The weights of a model directory by the names of `model`, in the precision that is stored."""


class Publisher(Protocol):
    """Pushes checkpoints to somewhere else, beside the training; never raises."""

    def take(self, path: Path, *, step: int, tokens: int, run_id: str, total_steps: int) -> None:
        """Put a whole checkpoint aside, before older ones are removed."""

    def look(self) -> None:
        """Say what has been found out meanwhile; cheap, for every step."""

    def give_up(self) -> list[str]:
        """Remove what is put aside, because the last checkpoint needs the room; returns what was removed."""


@dataclass(frozen=True)
class _Save:
    """A save: what it holds, and what follows from it when it is whole."""

    content: Content
    best: dict[str, Any] | None
    last: bool

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint once this one is whole; None before there is one."""
        return None if self.best is None else int(self.best["step"])


@dataclass(frozen=True)
class _Flight:
    """A save that a thread works at."""

    save: _Save
    progress: Progress
    future: Future[str | None]


@dataclass
class Saver:
    """Saves a run and takes it up again. All ranks call its methods together, but for `write_copies`.

    Attributes:
        config: the run configuration.
        directory: where the run keeps its records (`<run>/train`), and checkpoints unless `checkpoint.to` is set.
        engine: holds the weights and the optimizer's state.
        data: the data plane.
        store: writes and reads the model.
        job: the processes of the run.
        console: where one line says what was found or what failed.
        inputs: digests of what is trained on; every checkpoint holds them.
        publisher: pushes what was saved on a disk; only the first rank has one.
    """

    config: LoopConfig
    directory: Path
    engine: Engine
    data: Data
    store: ModelStore
    job: Job
    console: Console
    inputs: Mapping[str, str] = field(default_factory=dict)
    publisher: Publisher | None = None
    place: Place = field(init=False)
    # With a group of their own: a thread agrees while the loop does, and waits for a store or a disk, however slow.
    _ranks: Ranks = field(init=False)
    _snapshots: Snapshots = field(init=False)
    _thread: ThreadPoolExecutor | None = field(init=False, default=None)
    _flight: _Flight | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.place = open_place(self.config, self.directory)
        self._ranks = self.job.ranks.another_group(timeout=PATIENT_SECONDS)
        above = self.config.checkpoint.shard_above_bytes
        self._snapshots = Snapshots(self.engine, above, lambda names: self.store.together(self.engine.bare, names))

    # --- saving -----------------------------------------------------------------------------------------------------

    def save(self, progress: Progress, *, loss: float | None = None, last: bool = True) -> str | None:
        """Save the run, or begin to: a save that is not the last one may be made beside the training.

        Args:
            progress: where the run stands; its `best` is moved once the save is whole.
            loss: of validation at this very step, which decides what is best; None when it was not scored.
            last: whether nothing is trained after it, so that what it does not hold is lost.

        Returns:
            Where it lies, or will; None when it could not be written and training goes on.

        Raises:
            NotSavedError: when the last one could not be written, or any with `checkpoint.on_error: stop`.
        """
        self.wait(say=True)
        beside = self.config.checkpoint.asynchronous and not last
        save = self._begin(progress, loss, last=last, copied=beside)
        if not beside:
            return self._settled(save, progress, self._try(save))
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="save")
        self._flight = _Flight(save, progress, self._thread.submit(self._try, save))
        return self.place.where(progress.step)

    def look(self) -> None:
        """Between two steps: take note of a save that ended meanwhile.

        Raises:
            NotSavedError: when it failed and had to succeed.
        """
        if self.publisher is not None:
            self.publisher.look()
        if self._flight is None:
            return
        ended = self._flight.future.done()
        ranks = self.job.ranks
        if ended if ranks.world == 1 else not ranks.any(not ended):
            self.wait()

    def wait(self, *, say: bool = False) -> bool:
        """Wait for the save in flight; returns whether it is whole, and True when there is none.

        Args:
            say: in the log, that training had to wait.

        Raises:
            NotSavedError: when it failed and had to succeed.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return True
        started = time.monotonic()
        path = flight.future.result()
        waited = time.monotonic() - started
        if say and waited > _WORTH_SAYING:
            self._say(
                f"training waited {waited:.1f} s for the save of step {flight.save.content.step:,}: saves take longer "
                "than the steps between them; raise checkpoint.every"
            )
        return self._settled(flight.save, flight.progress, path) is not None

    def close(self) -> None:
        """Let the save in flight end, whatever else went wrong; its own failure is a line of the log."""
        try:
            self.wait()
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            self._say(words_of(error))
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _settled(self, save: _Save, progress: Progress, path: str | None) -> str | None:
        if path is not None:
            progress.best = save.best
        return path

    def _begin(self, progress: Progress, loss: float | None, *, last: bool, copied: bool) -> _Save:
        """All that the save needs, as it is now."""
        best: dict[str, Any] | None = progress.best
        if loss is not None and _better(loss, best):
            best = {"step": progress.step, "loss": loss}
        snapshot = self._snapshots.take(copied=copied)
        shares, rank = snapshot.shares, self._ranks.rank

        def write_model(directory: Path) -> Mapping[str, str]:
            if shares.count == 1:
                return self.store.write(self.engine.bare, snapshot.weights, directory)
            return self.store.write_share(self.engine.bare, snapshot.weights, directory, shares.weights, rank)

        content = Content(
            step=progress.step,
            run_id=progress.run_id,
            write_model=write_model,
            optimizer=snapshot.optimizer,
            rngs=[checkpoint.capture_rng()],  # of this rank; the others' come when it is written
            inputs=self.inputs,
            shares=shares.count,
            state={
                "progress": asdict(progress) | {"best": best},
                "data": self.data.state(progress.samples),
                "config": config_to_dict(self.config),
                "scaler": self.engine.scaler_state(),
            },
        )
        return _Save(content, best, last)

    def _try(self, save: _Save) -> str | None:
        """Save as often as it takes, by the first rank's decision; beside the training this is a thread's work."""
        deadline: float | None = None
        rngs = [rng for own in self._ranks.gather(save.content.rngs) for rng in own]
        save = replace(save, content=replace(save.content, rngs=rngs))
        while True:
            try:
                return self._write(save)
            except LostRankError:  # an OSError, but of no disk: what is there must stay
                raise
            except OSError as error:
                failed = error
            verdict, words = self._ranks.on_main(lambda: self._after(save, failed, deadline))  # noqa: B023
            if verdict == "go on":
                return None
            if verdict == "lost":
                raise NotSavedError(words)
            if deadline is None:
                deadline = time.monotonic() + PATIENCE_SECONDS
            if verdict == "wait":
                time.sleep(min(_SECONDS_BETWEEN_TRIES, PATIENCE_SECONDS))

    def _write(self, save: _Save) -> str:
        """One try.

        Raises:
            OSError: when the checkpoint is not whole; everything is as it was.
        """
        path = self.place.write(save.content, self._ranks, self._say)

        def settle() -> None:
            self._publish(save.content, path)
            try:
                self.place.settle(save.content, best=save.best_step, keep=self.config.checkpoint.keep)
            except (OSError, ArtifactError) as error:  # it is whole: a run goes on from it whatever else failed
                self._say(f"saved {path}, but could not move the pointers or remove older checkpoints: {error}")

        together(self._ranks, settle if self._ranks.main else lambda: None)  # it may last: all end the save at once
        return path

    def _publish(self, content: Content, path: str) -> None:
        """Put it aside for pushing before anything is removed."""
        if self.publisher is not None:
            progress = content.state["progress"]
            self.publisher.take(
                Path(path),
                step=content.step,
                tokens=progress["tokens"],
                run_id=content.run_id,
                total_steps=progress["total_steps"],
            )

    def _after(self, save: _Save, error: OSError, deadline: float | None) -> tuple[str, str]:
        """What follows from a failed try: `go on` training, try again at `once` or after a `wait`, or it is `lost`."""
        message = self._not_saved(save, error)
        if not save.last and self.config.checkpoint.on_error == "keep-going":
            if deadline is None and error.errno in _FULL and self._give_up_pushes():
                self._say(f"{message} Trying again.")
                return "once", ""
            self._say(f"{message} Training goes on; the next save tries again.")
            return "go on", ""
        if deadline is None:
            self._say(message)
            if self._make_room(save):
                return "once", ""
            self._say(f"trying again for {PATIENCE_SECONDS:.0f} s")
            deadline = time.monotonic() + PATIENCE_SECONDS
        if time.monotonic() > deadline:
            return "lost", f"{message} {self._lost(save)}"
        return "wait", ""

    def _not_saved(self, save: _Save, error: OSError) -> str:
        try:
            whole = self.place.steps(save.content.run_id)
            newest = f"the newest whole one is step-{whole[-1]:08d}" if whole else "there is none yet"
        except OSError as unknown:
            newest = f"which one is the newest cannot be told ({unknown})"
        free = self.place.free_bytes()
        needs = f"It needs {amount(self.checkpoint_bytes())}" + ("" if free is None else f", {amount(free)} are free")
        return (
            f"the checkpoint of step {save.content.step:,} was not saved: {error.strerror or error}. {needs} in "
            f"`{self.place.name}`; {newest}. Free space there, or lower checkpoint.keep."
        )

    def _lost(self, save: _Save) -> str:
        try:
            whole = self.place.steps(save.content.run_id)
        except OSError:
            return "When there is an answer, run the same command again: it goes on from the newest checkpoint there."
        first = whole[-1] if whole else 0
        return (
            f"Steps {first + 1:,} to {save.content.step:,} are lost; when there is space, run the same command again: "
            f"it goes on from step {first:,}."
        )

    def _make_room(self, save: _Save) -> bool:
        """Remove what only `checkpoint.keep` holds; returns whether there was something."""
        try:
            removed = self.place.make_room(save.content.run_id, save.best_step)
        except (OSError, ArtifactError) as error:
            self._say(f"no room was made: {error}")
            return False
        for name in removed:
            self._say(f"removed {name} to make room for the last checkpoint")
        return self._give_up_pushes() or bool(removed)

    def _give_up_pushes(self) -> bool:
        """Remove what waits to be published, which takes only the room that no checkpoint needs."""
        removed = [] if self.publisher is None else self.publisher.give_up()
        for name in removed:
            self._say(f"removed {name} to make room for a checkpoint")
        return bool(removed)

    def _say(self, line: str) -> None:
        with suppress(OSError):  # the log may lie on the disk that is full
            self.console.print(line, highlight=False, markup=False)  # errors of gloo hold [/paths]

    # --- before the first step --------------------------------------------------------------------------------------

    def checkpoint_bytes(self) -> int:
        """At most what one checkpoint takes on the disk."""
        return checkpoint_bytes(self.config, self.engine)

    def check(self) -> None:
        """Refuse a place for checkpoints that cannot be used.

        Raises:
            ValueError: names what is in the way, and the remedy.
        """
        self.place.check(self._ranks)

    def check_space(self, progress: Progress, *, save_every: int, judged: bool) -> None:
        """Refuse a run whose checkpoints do not fit on the disk, before it is trained.

        Raises:
            ArtifactError: with the numbers and the remedy.
        """
        keep, one = self.config.checkpoint.keep, self.checkpoint_bytes()
        self.place.check_space(progress, one=one, keep=keep, save_every=save_every, judged=judged)

    # --- going on ---------------------------------------------------------------------------------------------------

    @property
    def arithmetic(self) -> str:
        """Precision and device, as they were resolved: another one is not exact."""
        return f"{self.job.precision} on {self.job.device.type}"

    def write_copies(self, changes: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write `config.yaml`, the configuration as it is resolved, and `changes.json`, what was changed on the way."""
        make_directories(self.directory)
        update_file(self.directory / "config.yaml", dump_config(self.config).encode())
        record = self.directory / "changes.json"
        if changes or record.is_file():
            update_file(record, (json.dumps(list(changes), indent=2) + "\n").encode())

    def resume(self, allow_changes: Collection[str] = ()) -> Progress | None:
        """Go on from the newest whole checkpoint; None when there is none.

        Args:
            allow_changes: keys of the configuration, or whole sections, that may differ from the checkpoint's.

        Raises:
            ChangedConfigError: when the configuration differs in a way that is not allowed.
            ArtifactError: when what is there cannot be used.
            ValueError: when the data is not what the checkpoint saw.
        """
        ranks = self._ranks
        found = self.place.find(ranks, self._say)
        if found is None:
            return None
        progress, notes = restoring.restore(
            found,
            self.config,
            engine=self.engine,
            data=self.data,
            read_model=lambda directory: self.store.read(self.engine.bare, directory),
            arithmetic=self.arithmetic,
            allow=allow_changes,
        )
        what = "finished already: nothing is trained after" if progress.finished else "going on from"
        where = self.place.where(progress.step)
        for note in (*notes, f"{what} step {progress.step:,} of {progress.total_steps:,} ({where})"):
            self._say(note)
        if not progress.finished:
            ranks.on_main(lambda: self.write_copies(progress.changes))
        if ranks.main:
            wanted: dict[checkpoint.Pointer, int] = {"latest": progress.step}
            if progress.best is not None:
                wanted["best"] = int(progress.best["step"])
            self.place.repair(wanted, progress.run_id, self._say)
        ranks.barrier()
        if ranks.local_rank == 0:
            self.place.done(found)
        return progress


def _better(loss: float, best: Mapping[str, Any] | None) -> bool:
    """Whether a loss makes its checkpoint the best one."""
    return math.isfinite(loss) and (best is None or not math.isfinite(best["loss"]) or loss < best["loss"])
