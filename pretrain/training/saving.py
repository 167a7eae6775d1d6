"""When and what a run saves, what it does when that fails, and how it goes on from what it finds.

What lives here: the pieces of a run that a checkpoint holds, the room that they need, the pointers, rotation, a full
disk, and resuming. What must not: the form on the disk (`checkpoint_files`), or the loop.

A save that fails leaves the older checkpoints as they were. With `checkpoint.on_error: keep-going` training goes on and
the next save tries again. The last save of a process (the end, a stop signal, or any with `on_error: stop`) must
succeed: it makes room among the run's own older checkpoints, tries for a while, and then ends with an error that says
what is lost.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from torch import Tensor

from pretrain.config import RunConfig, config_to_dict, dump_config
from pretrain.files import ArtifactError, bytes_in, make_directories, replace_file, update_file
from pretrain.runtime import set_seed
from pretrain.training import checkpoint
from pretrain.training.engines import Engine
from pretrain.training.engines.job import Job
from pretrain.training.feed import Data
from pretrain.training.optim import state_keys
from pretrain.training.progress import Progress
from pretrain.training.resuming import take_up
from pretrain.training.state import OptimizerState, whole_state

PATIENCE_SECONDS = 30.0
"""How long the last save is tried again: shorter than what a scheduler waits between SIGTERM and SIGKILL."""

_SECONDS_BETWEEN_TRIES = 2.0


class NotSavedError(ValueError):
    """The last checkpoint of a process could not be written; says what is lost and how to go on."""


SAVED_MARK = "run.json"
"""Written with a run's first checkpoint: where it stands and no checkpoint does, they were taken away."""


class ModelStore(Protocol):
    """Writes and reads the model in its published form."""

    def write(self, model: Any, weights: Mapping[str, Tensor], directory: Path) -> dict[str, str]:
        """Write the directory of `model` with these whole weights by its own names; return its files' SHA-256."""

    def read(self, model: Any, directory: Path) -> dict[str, Tensor]:
        """The weights of a model directory by the names of `model`, in the precision that is stored."""


@dataclass(frozen=True)
class Saver:
    """Saves a run and takes it up again.

    Attributes:
        config: the run configuration.
        directory: where checkpoints go (`<run>/train`).
        engine: holds the weights and the optimizer's state.
        data: the data plane.
        store: writes and reads the model.
        job: the processes of the run.
        console: where one line says what was found or what failed.
        inputs: digests of what is trained on; every checkpoint holds them.
    """

    config: RunConfig
    directory: Path
    engine: Engine
    data: Data
    store: ModelStore
    job: Job
    console: Console
    inputs: Mapping[str, str] = field(default_factory=dict)

    # --- saving -----------------------------------------------------------------------------------------------------

    def save(self, progress: Progress, *, loss: float | None = None, last: bool = True) -> Path | None:
        """Write a checkpoint, move the pointers, then remove what is no longer kept.

        Args:
            progress: where the run stands.
            loss: of validation at this very step, which decides what is best; None when it was not scored.
            last: whether nothing is trained after it, so that what it does not hold is lost.

        Returns:
            Where it lies; None when it could not be written and training goes on.

        Raises:
            NotSavedError: when the last one could not be written, or any with `checkpoint.on_error: stop`.
        """
        whole = self._gather()
        rngs = self.job.ranks.gather(checkpoint.capture_rng())
        path = self.job.ranks.on_main(lambda: _name(self._try(progress, loss, last, whole, rngs)))
        progress.best = self.job.ranks.broadcast(progress.best)
        return None if path is None else Path(path)

    def _try(
        self,
        progress: Progress,
        loss: float | None,
        last: bool,
        whole: tuple[dict[str, Tensor], OptimizerState],
        rngs: Sequence[Mapping[str, Any]],
    ) -> Path | None:
        """Save as often as it takes."""
        deadline = None
        while True:
            try:
                return self._save(progress, loss, whole, rngs)
            except OSError as error:
                message = self._not_saved(progress, error)
            if not last and self.config.checkpoint.on_error == "keep-going":
                self._say(f"{message} Training goes on; the next save tries again.")
                return None
            if deadline is None:
                deadline = time.monotonic() + PATIENCE_SECONDS
                self._say(message)
                if self._make_room(progress):
                    continue
                self._say(f"trying again for {PATIENCE_SECONDS:.0f} s")
            if time.monotonic() > deadline:
                raise NotSavedError(f"{message} {self._lost(progress)}")
            time.sleep(min(_SECONDS_BETWEEN_TRIES, PATIENCE_SECONDS))

    def _gather(self) -> tuple[dict[str, Tensor], OptimizerState]:
        """Weights and optimizer state, whole. All ranks call it together."""
        weights: dict[str, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        for name in self.engine.names():
            parameter, state = self.engine.parameter(name), self.engine.state(name)
            if self.job.ranks.main:
                weights[name] = parameter
                tensors |= {f"{name}/{key}": value for key, value in state.items()}
        return weights, whole_state(self.engine.groups(), tensors)

    def _save(
        self,
        progress: Progress,
        loss: float | None,
        whole: tuple[dict[str, Tensor], OptimizerState],
        rngs: Sequence[Mapping[str, Any]],
    ) -> Path:
        """One try.

        Raises:
            OSError: when the checkpoint is not whole; everything is as it was.
        """
        aside = checkpoint.move_foreign_aside(self.directory, progress.step, progress.run_id)
        if aside is not None:
            self._say(f"another run's checkpoint stood at step {progress.step:,}; it lies in {aside} now")
        before = progress.best
        is_best = (
            loss is not None
            and math.isfinite(loss)
            and (before is None or not math.isfinite(before["loss"]) or loss < before["loss"])
        )
        if is_best:
            assert loss is not None
            progress.best = {"step": progress.step, "loss": loss}
        weights, optimizer = whole
        try:
            path = checkpoint.save_checkpoint(
                self.directory,
                step=progress.step,
                run_id=progress.run_id,
                write_model=lambda directory: self.store.write(self.engine.bare, weights, directory),
                optimizer=optimizer,
                rngs=rngs,
                inputs=self.inputs,
                state={
                    "progress": asdict(progress),
                    "data": self.data.state(progress.samples),
                    "config": config_to_dict(self.config),
                    "scaler": self.engine.scaler_state(),
                },
            )
        except OSError:
            progress.best = before
            raise
        try:
            if not (self.directory / SAVED_MARK).exists():
                replace_file(self.directory / SAVED_MARK, (json.dumps({"run_id": progress.run_id}) + "\n").encode())
            checkpoint.point(self.directory, "latest", progress.step)
            if is_best:
                checkpoint.point(self.directory, "best", progress.step)
            checkpoint.rotate(self.directory, keep=self.config.checkpoint.keep)
        except (OSError, ArtifactError) as error:  # the checkpoint is whole: a run goes on from it whatever else failed
            self._say(f"saved {path}, but could not move the pointers or remove older checkpoints: {error}")
        return path

    def _not_saved(self, progress: Progress, error: OSError) -> str:
        whole = checkpoint.list_checkpoints(self.directory, run_id=progress.run_id)
        newest = f"the newest whole one is {whole[-1].name}" if whole else "there is none yet"
        return (
            f"the checkpoint of step {progress.step:,} was not saved: {error.strerror or error}. It needs "
            f"{_amount(self.checkpoint_bytes())}, {_amount(_free_bytes(self.directory))} are free in "
            f"`{self.directory}`; {newest}. Free space there, or lower checkpoint.keep."
        )

    def _lost(self, progress: Progress) -> str:
        whole = checkpoint.list_checkpoints(self.directory, run_id=progress.run_id)
        first = int(whole[-1].name.partition("-")[2]) if whole else 0
        return (
            f"Steps {first + 1:,} to {progress.step:,} are lost; when there is space, run the same command again: it "
            f"goes on from step {first:,}."
        )

    def _make_room(self, progress: Progress) -> bool:
        """Remove what only `checkpoint.keep` holds; returns whether there was something."""
        try:
            removed = checkpoint.make_room(self.directory, run_id=progress.run_id)
        except (OSError, ArtifactError) as error:
            self._say(f"no room was made: {error}")
            return False
        for path in removed:
            self._say(f"removed {path.name} to make room for the last checkpoint")
        return bool(removed)

    def _say(self, line: str) -> None:
        with suppress(OSError):  # the log may lie on the disk that is full
            self.console.print(line, highlight=False)

    # --- room -------------------------------------------------------------------------------------------------------

    def checkpoint_bytes(self) -> int:
        """At most what one checkpoint takes on the disk."""
        weights = {name: shape.nbytes for name, shape in self.engine.shapes().items()}
        state = 0
        tensors = len(weights)
        for group in self.engine.groups():
            keys = len(state_keys(group)) - 1  # all but the step, a number
            state += keys * sum(weights[name] for name in group["parameters"])
            tensors += (keys + 1) * len(group["parameters"])
        buffers = sum(buffer.nbytes for buffer in self.engine.bare.buffers())
        tokenizer = bytes_in(self.config.directory / "tokenizer")
        # Names and shapes, the random generators and the configuration as JSON, and half-filled blocks of the disk.
        slack = 400 * tensors + 192 * 1024 + (sum(weights.values()) + state) // 100
        return sum(weights.values()) + state + buffers + tokenizer + slack

    def check_space(self, progress: Progress, *, save_every: int, judged: bool) -> None:
        """Refuse a run whose checkpoints do not fit on the disk, before it is trained.

        Counts what lies there together at most: `checkpoint.keep`, the best one where a validation set judges, and the
        one that is being written.

        Raises:
            ArtifactError: with the numbers and the remedy.
        """
        one = self.checkpoint_bytes()
        own = checkpoint.list_checkpoints(self.directory, run_id=progress.run_id)
        to_come = math.ceil((progress.total_steps - progress.step) / save_every)
        together = min(self.config.checkpoint.keep + 1 + judged, len(own) + to_come)
        together = max(together, len(own) + 1)  # the first save comes before any removal
        missing = max(one, together * one - sum(bytes_in(path) for path in own))
        free = _free_bytes(self.directory)
        if missing > free:
            raise ArtifactError(
                f"`{self.directory}` has {_amount(free)} free, and the checkpoints need {_amount(missing)}: "
                f"{together} of {_amount(one)} lie there together (checkpoint.keep: {self.config.checkpoint.keep}, the "
                f"one that is being written{', the best one' if judged else ''}), {len(own)} are there already. Free "
                f"{_amount(missing - free)}, lower checkpoint.keep, or give another place with out="
            )

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
        found = self.job.ranks.on_main(self._find)
        return None if found is None else self._take_up(Path(found), allow_changes)

    def _find(self) -> str | None:
        """The newest whole checkpoint; None when nothing was ever saved."""
        found = checkpoint.find_resumable(self.directory, report=self._say)
        if found is None and (self.directory / SAVED_MARK).exists():
            raise ArtifactError(
                f"`{self.directory}` had checkpoints, and there is none now; put them back, give another name=, or "
                f"start anew with `pretrain run --fresh` (or by removing `{self.directory}`)"
            )
        return _name(found)

    def _take_up(self, found: Path, allow_changes: Collection[str]) -> Progress:
        """Go on from a checkpoint whose digests were compared."""
        loaded = checkpoint.load_checkpoint(found, verify=False)  # its digests were just compared
        saved = loaded.state["progress"]
        if unknown := sorted(set(saved) - {known.name for known in fields(Progress)}):
            raise ArtifactError(f"`{found}` holds `{unknown[0]}`, which this version does not know; use a newer one")
        progress = Progress(**saved)
        budget_before = progress.total_steps
        notes = take_up(
            progress,
            loaded.state["config"],
            self.config,
            num_rows=self.data.num_rows,
            rates=self._rates(loaded.optimizer.groups),
            arithmetic=self.arithmetic,
            allow=allow_changes,
            attention_dropout=getattr(getattr(self.engine.bare, "config", None), "attention_dropout", None),
            processes=(len(loaded.rngs), self.job.ranks.world),
        )
        told = self.data.for_run(progress.total_steps)
        self.data.check(loaded.state["data"])
        notes = [*notes, *(told if progress.total_steps != budget_before else ())]
        self.engine.load(self.store.read(self.engine.bare, found / "model"), loaded.optimizer)
        ranks = self.job.ranks
        if len(loaded.rngs) == ranks.world or ranks.main:
            checkpoint.restore_rng(loaded.rngs[ranks.rank])
        else:  # another number of processes: what is drawn without a key starts anew
            set_seed(self.config.train.seed + ranks.rank + progress.step * ranks.world)
        self.engine.load_scaler_state(loaded.state["scaler"])
        what = "finished already: nothing is trained after" if progress.finished else "going on from"
        for note in (*notes, f"{what} step {progress.step:,} of {progress.total_steps:,} ({found})"):
            self._say(note)
        if not progress.finished:
            ranks.on_main(lambda: self.write_copies(progress.changes))
        if ranks.main:
            self._repair_pointers(progress)
        return progress

    def _rates(self, saved: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
        """Peak learning rates by optimizer group: (the checkpoint's, the one wanted now)."""
        before = {str(group.get("name")): float(group["initial_lr"]) for group in saved}
        now = {str(group.get("name")): float(group["initial_lr"]) for group in self.engine.groups()}
        return {name: (before[name], rate) for name, rate in now.items() if name in before}

    def _repair_pointers(self, progress: Progress) -> None:
        """Let the pointers name what this checkpoint says: a kill, or damage, may have left other ones."""
        wanted: dict[checkpoint.Pointer, int] = {"latest": progress.step}
        if progress.best is not None:
            wanted["best"] = int(progress.best["step"])
        for name, step in wanted.items():
            path = checkpoint.checkpoint_path(self.directory, step)
            try:
                pointed = checkpoint.read_pointer(self.directory, name)
                if pointed is None and name == "best":
                    self._say(f"the pointer to the best checkpoint is missing; it names {path.name} again")
            except ArtifactError as error:
                pointed = None
                if name == "best":  # the latest was spoken of when it was looked for
                    self._say(f"the pointer to the best checkpoint is not used, it names {path.name} again: {error}")
            if pointed != path and path.is_dir():
                with suppress(OSError, ArtifactError):  # on a full disk; the next save tries again
                    checkpoint.point(self.directory, name, step)


def _name(path: Path | None) -> str | None:
    """A path as plain data."""
    return None if path is None else str(path)


def _free_bytes(directory: Path) -> int:
    """What an ordinary user may still write where `directory` lies, or will lie."""
    place = directory
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(os.fspath(place)).free


def _amount(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} GiB"
