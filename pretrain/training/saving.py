"""When and what a run saves, and how it goes on from what it finds.

What lives here: the pieces of a run that a checkpoint holds, the pointers, rotation, and resuming. What must not: the
form on the disk (`checkpoint`), or the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from pretrain.config import RunConfig, config_to_dict
from pretrain.training import checkpoint
from pretrain.training.progress import Progress


class ModelStore(Protocol):
    """Writes and reads the model in its published form."""

    def write(self, model: Any, directory: Path) -> dict[str, str]:
        """Write the model directory; return its files' SHA-256."""

    def read(self, model: Any, directory: Path) -> None:
        """Load the weights of a model directory into `model`, bit for bit."""


class SavedData(Protocol):
    """What a checkpoint needs of a data plane."""

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

    def resume(self) -> Progress | None:
        """Go on from the newest whole checkpoint; None when there is none.

        Raises:
            ArtifactError: when what is there cannot be used.
            ValueError: when the data is not what the checkpoint saw.
        """
        found = checkpoint.find_resumable(self.directory, report=lambda line: self.console.print(line, highlight=False))
        if found is None:
            return None
        loaded = checkpoint.load_checkpoint(found, verify=False)  # its digests were just compared
        self.data.check(loaded.state["data"])
        self.store.read(self.model, found / "model")
        checkpoint.load_optimizer_state_by_name(self.model, self.optimizer, loaded.optimizer)
        checkpoint.restore_rng(loaded.rng)
        if self.accelerator.scaler and loaded.state["scaler"]:
            self.accelerator.scaler.load_state_dict(loaded.state["scaler"])
        progress = Progress(**loaded.state["progress"])
        self.console.print(
            f"going on from step {progress.step:,} of {progress.total_steps:,} ({found})", highlight=False
        )
        return progress
