"""When and what a run saves, and how it goes on from what it finds.

What lives here: the pieces of a run that a checkpoint holds, the pointers, rotation, and resuming. What must not: the
form on the disk (`checkpoint`), or the loop.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from pretrain.config import RunConfig, config_to_dict
from pretrain.files import update_file
from pretrain.training import checkpoint
from pretrain.training.progress import Progress
from pretrain.training.resuming import record_of, take_up


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

    def save(self, progress: Progress, *, loss: float | None = None) -> Path:
        """Write a checkpoint, move the pointers, then remove what is no longer kept.

        Args:
            progress: where the run stands.
            loss: of validation at this very step, which decides what is best; None when it was not scored.
        """
        is_best = loss is not None and (progress.best is None or loss < progress.best["loss"])
        if is_best:
            assert loss is not None
            progress.best = {"step": progress.step, "loss": loss}
        scaler = self.accelerator.scaler
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
        checkpoint.point(self.directory, "latest", progress.step)
        if is_best:
            checkpoint.point(self.directory, "best", progress.step)
        checkpoint.rotate(self.directory, keep=self.config.checkpoint.keep)
        return path

    @property
    def arithmetic(self) -> str:
        """Precision and device as they were resolved: what else decides the last bits."""
        precision = self.accelerator.mixed_precision
        return f"{'fp32' if precision == 'no' else precision} on {self.accelerator.device.type}"

    def resume(self, allow: Collection[str] = ()) -> Progress | None:
        """Go on from the newest whole checkpoint; None when there is none.

        Args:
            allow: keys of the configuration, or whole sections, that may differ from the checkpoint's.

        Raises:
            ChangedConfigError: when the configuration differs in a way that is not allowed.
            ArtifactError: when what is there cannot be used.
            ValueError: when the data is not what the checkpoint saw.
        """
        found = checkpoint.find_resumable(self.directory, report=lambda line: self.console.print(line, highlight=False))
        if found is None:
            return None
        loaded = checkpoint.load_checkpoint(found, verify=False)  # its digests were just compared
        progress = Progress(**loaded.state["progress"])
        was = {group["name"]: group["initial_lr"] for group in loaded.optimizer.groups}
        rates = {group["name"]: (was.get(group["name"], 0.0), group["initial_lr"]) for group in self._groups()}
        lines = take_up(
            progress,
            loaded.state["config"],
            self.config,
            num_rows=self.data.num_rows,
            rates=rates,
            arithmetic=self.arithmetic,
            allow=allow,
        )
        self.data.for_run(progress.total_steps)
        self.data.check(loaded.state["data"])
        self.store.read(self.model, found / "model")
        checkpoint.load_optimizer_state_by_name(self.model, self.optimizer, loaded.optimizer)
        checkpoint.restore_rng(loaded.rng)
        if self.accelerator.scaler and loaded.state["scaler"]:
            self.accelerator.scaler.load_state_dict(loaded.state["scaler"])
        finished = progress.step >= progress.total_steps
        lines.append(
            f"the run is finished: {progress.step:,} of {progress.total_steps:,} steps ({found}); nothing is trained"
            if finished
            else f"going on from step {progress.step:,} of {progress.total_steps:,} ({found})"
        )
        for line in lines:
            self.console.print(line, highlight=False)
        record = record_of(self.directory)
        if progress.changes or record.is_file():
            update_file(record, (json.dumps(progress.changes, indent=2) + "\n").encode())
        return progress

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups
