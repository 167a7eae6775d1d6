"""Where a model directory comes from: its run, its step, the tokens that it has seen, the digests it was written with.

What lives here: reading what lies around a model. What must not: the Hub, or making models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.files import MANIFEST, ArtifactError, Manifest, read_manifest
from pretrain.publishing.record import RECORD, Origin, Record

TRAINER = "trainer.json"
RESULT, MODEL = "result.json", "model"


@dataclass(frozen=True)
class Source:
    """A model directory with what is known of it.

    Attributes:
        directory: the model directory.
        origin: the run and the step.
        run: the run's directory, where it lies around the model.
        digests: SHA-256 of its files as they were written; None when nobody has written them down.
        checkpoint: that it is the model of; None for the end of the run.
    """

    directory: Path
    origin: Origin
    run: Path | None = None
    digests: dict[str, str] | None = None
    checkpoint: Path | None = None


def is_run(path: Path) -> bool:
    """Whether a directory is a run's, with its training."""
    return (path / "train").is_dir()


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint."""
    return (path / TRAINER).is_file() and (path / "model").is_dir()


def is_tuning(path: Path) -> bool:
    """Whether a directory is a fine-tuning's, with the model that it kept."""
    return _tuning(path) is not None


def _tuning(path: Path) -> dict[str, Any] | None:
    """What the result of a fine-tuning says; None of other directories."""
    try:
        found = json.loads((path / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # JSON or UTF-8 that is none
        return None
    return found if isinstance(found, dict) and "best_seed" in found else None


def of_tuning(directory: Path) -> Source:
    """The model that a fine-tuning kept, OUT/NAME/model; its origin is the checkpoint of the best seed.

    Raises:
        ArtifactError: when that checkpoint cannot be read.
    """
    result, origin = _tuning(directory) or {}, Origin()
    for seed in result.get("seeds") or ():
        checkpoint = directory / f"seed-{seed['seed']}" / str(seed["checkpoint"])
        if seed["seed"] == result.get("best_seed") and is_checkpoint(checkpoint):
            origin = origin_of_checkpoint(checkpoint)
    return Source(directory / MODEL, origin, directory)


def of_checkpoint(checkpoint: Path) -> Source:
    """The model of a checkpoint.

    Raises:
        ArtifactError: when the checkpoint cannot be read.
    """
    manifest = read_manifest(checkpoint, "checkpoint")
    digests = {
        name.removeprefix("model/"): digest for name, digest in manifest.files.items() if name.startswith("model/")
    }
    folders = checkpoint.resolve().parents
    run = folders[2] if len(folders) > 2 and folders[1].name == "train" else None
    return Source(checkpoint / "model", origin_of_checkpoint(checkpoint), run, digests, checkpoint)


def origin_of_checkpoint(checkpoint: Path) -> Origin:
    """The run, the step and the tokens of a checkpoint.

    Raises:
        ArtifactError: when it does not say.
    """
    try:
        trainer = json.loads((checkpoint / TRAINER).read_text(encoding="utf-8"))
        tokens = (trainer["state"].get("progress") or {}).get("tokens")
        return Origin(str(trainer["run_id"]), int(trainer["step"]), None if tokens is None else int(tokens))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"`{checkpoint / TRAINER}` cannot be read ({error}); give another checkpoint") from error


def of_directory(directory: Path) -> Source:
    """A model directory: an export of a run, a fine-tuning's, the model of a checkpoint, one from a Hub, or any other.

    Raises:
        ArtifactError: when a manifest beside it cannot be read.
    """
    place = directory.resolve()
    if place.name == "model" and is_checkpoint(place.parent):
        return of_checkpoint(directory.resolve().parent)
    if place.name == MODEL and is_tuning(place.parent):
        return of_tuning(place.parent)
    if place.name == "export" and is_run(place.parent) and (directory / MANIFEST).is_file():
        manifest = read_manifest(directory, "export")
        return Source(directory, _of_export(place.parent, manifest.inputs), place.parent, manifest.files)
    own = _own_manifest(directory)
    record = None
    if (directory / RECORD).is_file():
        record = Record.read((directory / RECORD).read_bytes())
    origin = record.origin if record is not None else Origin()
    return Source(directory, origin, digests=None if own is None else own.files)


def _own_manifest(directory: Path) -> Manifest | None:
    """The manifest of an export that lies elsewhere than in its run; None where another library's lies, or none.

    Raises:
        ArtifactError: when it is an export's, and cannot be read.
    """
    try:
        found = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return read_manifest(directory, "export") if isinstance(found, dict) and found.get("kind") == "export" else None


def _of_export(run: Path, inputs: dict[str, str]) -> Origin:
    """The origin of a run's export: of the checkpoint that it was made from, or as the run's result says."""
    for checkpoint in sorted((run / "train" / "checkpoints").glob("step-*"), reverse=True):
        try:
            if read_manifest(checkpoint, "checkpoint").digest == inputs.get("checkpoint"):
                return origin_of_checkpoint(checkpoint)
        except ArtifactError:
            continue
    try:
        result: Any = json.loads((run / "train" / "result.json").read_text(encoding="utf-8"))
        return Origin(str(result["run_id"]), int(result["step"]), int(result["tokens"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Origin()
