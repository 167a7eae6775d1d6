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

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from pretrain.config import RunConfig, config_to_dict, dump_config
from pretrain.files import ArtifactError, bytes_in, make_directories, replace_file, update_file
from pretrain.training import checkpoint
from pretrain.training.optim import state_keys
from pretrain.training.progress import Progress
from pretrain.training.resuming import take_up

PATIENCE_SECONDS = 30.0
"""How long the last save is tried again: shorter than what a scheduler waits between SIGTERM and SIGKILL."""

_SECONDS_BETWEEN_TRIES = 2.0


class NotSavedError(ValueError):
    """The last checkpoint of a process could not be written; says what is lost and how to go on."""


SAVED_MARK = "run.json"
"""Written with a run's first checkpoint: where it stands and no checkpoint does, they were taken away."""


class ModelStore(Protocol):
    """Writes and reads the model in its published form."""

    def write(self, model: Any, directory: Path) -> dict[str, str]:
        """Write the model directory; return its files' SHA-256."""

    def read(self, model: Any, directory: Path) -> None:
        """Load the weights of a model directory into `model`, bit for bit."""


class SavedData(Protocol):
    """What a checkpoint needs of a data plane."""

    @property
    def num_rows(self) -> int:
        """Rows an epoch."""

    def for_run(self, total_steps: int) -> Sequence[str]:
        """Fix what depends on the length of the run."""

    def state(self, samples_seen: int) -> dict[str, Any]:
        """What a checkpoint must hold of the data, as plain data."""

    def check(self, state: dict[str, Any]) -> None:
        """Raise ValueError with the difference when `state` was made by other data."""


@dataclass(frozen=True)
class Saver:
    """Saves a run and takes it up again.

    Attributes:
        config: the run configuration.
        directory: where checkpoints go (`<run>/train`).
        model: not wrapped.
        optimizer: not wrapped.
        data: the data plane.
        store: writes and reads the model.
        accelerator: holds the loss scaler.
        console: where one line says what was found or what failed.
        inputs: digests of what is trained on; every checkpoint holds them.
    """

    config: RunConfig
    directory: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: SavedData
    store: ModelStore
    accelerator: Accelerator
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
        deadline = None
        while True:
            try:
                return self._save(progress, loss)
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

    def _save(self, progress: Progress, loss: float | None) -> Path:
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
        scaler = self.accelerator.scaler
        try:
            path = checkpoint.save_checkpoint(
                self.directory,
                step=progress.step,
                run_id=progress.run_id,
                write_model=lambda directory: self.store.write(self.model, directory),
                model=self.model,
                optimizer=self.optimizer,
                inputs=self.inputs,
                state={
                    "progress": asdict(progress),
                    "data": self.data.state(progress.samples),
                    "config": config_to_dict(self.config),
                    "scaler": scaler.state_dict() if scaler else None,
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
        weights = {parameter: parameter.nbytes for parameter in self.model.parameters()}
        state = 0
        tensors = len(weights)
        for group in self.optimizer.param_groups:
            keys = len(state_keys(group)) - 1  # all but the step, a number
            state += keys * sum(weights[parameter] for parameter in group["params"])
            tensors += (keys + 1) * len(group["params"])
        buffers = sum(buffer.nbytes for buffer in self.model.buffers())
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
        precision = self.accelerator.mixed_precision
        return f"{'fp32' if precision == 'no' else precision} on {self.accelerator.device.type}"

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
        found = checkpoint.find_resumable(self.directory, report=self._say)
        if found is None and (self.directory / SAVED_MARK).exists():
            raise ArtifactError(
                f"`{self.directory}` had checkpoints, and there is none now; put them back, give another name=, or "
                f"start anew with `pretrain run --fresh` (or by removing `{self.directory}`)"
            )
        if found is None:
            return None
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
        )
        told = self.data.for_run(progress.total_steps)
        self.data.check(loaded.state["data"])
        notes = [*notes, *(told if progress.total_steps != budget_before else ())]
        self.store.read(self.model, found / "model")
        checkpoint.load_optimizer_state_by_name(self.model, self.optimizer, loaded.optimizer)
        checkpoint.restore_rng(loaded.rng)
        if self.accelerator.scaler and loaded.state["scaler"]:
            self.accelerator.scaler.load_state_dict(loaded.state["scaler"])
        what = "finished already: nothing is trained after" if progress.finished else "going on from"
        for note in (*notes, f"{what} step {progress.step:,} of {progress.total_steps:,} ({found})"):
            self._say(note)
        if not progress.finished:
            self.write_copies(progress.changes)
        self._repair_pointers(progress)
        return progress

    def _rates(self, saved: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
        """Peak learning rates by optimizer group: (the checkpoint's, the one wanted now)."""
        before = {str(group.get("name")): float(group["initial_lr"]) for group in saved}
        now = {str(group.get("name")): float(group["initial_lr"]) for group in self.optimizer.param_groups}
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
