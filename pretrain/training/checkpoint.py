"""The checkpoints of a run: everything it needs to go on, in directories that are whole or not there.

What lives here: finding, pointing, rotating. What must not: the form of one on the disk (`checkpoint_files`), the loop,
how a model is published (a callable writes it), pickle in any shape.

    <run>/train/checkpoints/
        step-00001000/
            model/             the published model; its weights are the fp32 masters
            optimizer/         optimizer-00001-of-00001.safetensors: tensors by `<parameter>/<key>`
                               optimizer.json: groups with hyper-parameters and member names
            trainer.json       step, run id, random generators of each rank, the trainer's own state
            manifest.json      SHA-256 of every file, taken of the memory that was written
        latest.json best.json  pointers with a digest of their own, replaced atomically

A checkpoint is written under a temporary name, flushed, and renamed. Nothing in it is used before every digest was
compared. Order is by step and run id, never by file times: clocks step back, and copies get new times.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pretrain.files import (
    TEMPORARY_PREFIX,
    ArtifactError,
    read_manifest,
    remove_leftovers,
    sha256_json,
    sync_directory,
    update_file,
)
from pretrain.training.checkpoint_files import (
    KIND,
    Checkpoint,
    checkpoint_path,
    load_checkpoint,
    read_config,
    save_checkpoint,
    verify_model,
)
from pretrain.training.state import (
    OptimizerState,
    capture_rng,
    load_optimizer_state_by_name,
    optimizer_state_by_name,
    restore_rng,
    tensor_bytes,
)

__all__ = [
    "Checkpoint",
    "OptimizerState",
    "capture_rng",
    "checkpoint_path",
    "find_resumable",
    "list_checkpoints",
    "load_checkpoint",
    "load_optimizer_state_by_name",
    "make_room",
    "move_foreign_aside",
    "newest_config",
    "optimizer_state_by_name",
    "point",
    "pointer_bytes",
    "read_pointer",
    "restore_rng",
    "rotate",
    "save_checkpoint",
    "tensor_bytes",
    "tidy",
    "verify_model",
]

Pointer = Literal["latest", "best"]
Report = Callable[[str], None]

_STEP_NAME = re.compile(r"step-(\d{8,})")
_MOVED_ASIDE = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}old-(step-\d{{8,}})-[0-9a-f]+")
_log = logging.getLogger(__name__)


# --- finding --------------------------------------------------------------------------------------------------------


def list_checkpoints(directory: Path, *, run_id: str | None = None) -> list[Path]:
    """Complete checkpoints (every file there, digests not compared), oldest first, by step and run id."""
    found: list[tuple[int, str, Path]] = []
    for path in _step_directories(directory):
        try:
            manifest = read_manifest(path, KIND)
        except (ArtifactError, OSError):
            continue
        whole = all((path / name).is_file() for name in manifest.files)
        step, run = manifest.facts.get("step"), manifest.facts.get("run_id")
        if whole and isinstance(step, int) and isinstance(run, str) and run_id in (None, run):
            found.append((step, run, path))
    return [path for _, _, path in sorted(found)]


def newest_config(directory: Path) -> dict[str, Any] | None:
    """The configuration in the newest checkpoint whose manifest and `trainer.json` agree; None when there is none.

    A look that reads no tensors: whether the rest is whole is found out when a run goes on. Where `latest` names a run,
    those of others are passed over.
    """
    owner = None
    with suppress(ArtifactError):
        owner = _read_pointer_file(directory, "latest").get("run_id")
    for path in reversed(list_checkpoints(directory, run_id=owner)):
        with suppress(ArtifactError, OSError):
            return read_config(path)
    return None


def find_resumable(directory: Path, *, report: Report = _log.warning) -> Path | None:
    """The newest checkpoint that is whole, every digest compared; None when there is none at all.

    For the process that owns the run: what a killed one left half done is cleaned up first. Where a pointer names a
    run, checkpoints of other runs in the same folder are passed over.

    Args:
        directory: the training directory (`<run>/train`).
        report: gets one line for each checkpoint that is passed over, and for a pointer that is missing or altered.

    Raises:
        ArtifactError: when there are checkpoints and not one of them is whole, or when they are of several runs and
            nothing says which one is meant.
    """
    tidy(directory)
    candidates = sorted(_step_directories(directory), key=_step_of, reverse=True)
    owner = _owner(directory, report) if candidates else None
    for path in candidates:
        try:
            loaded = load_checkpoint(path)
        except (ArtifactError, OSError) as error:
            report(f"checkpoint {path.name} is not used: {error}")
            continue
        if owner is not None and loaded.run_id != owner:
            report(f"checkpoint {path.name} is not used: it is of run {loaded.run_id}, this is run {owner}")
            continue
        return path
    if candidates:
        raise ArtifactError(
            f"none of the {len(candidates)} checkpoints in `{directory / 'checkpoints'}` can be used; put back a whole "
            "one, or move the folder away to start anew"
        )
    return None


def _owner(directory: Path, report: Report) -> str | None:
    """The run id of the run that lives here, by its pointers; None when they are silent and there is one run only."""
    for name in ("latest", "best"):
        try:
            pointer = _read_pointer_file(directory, name)
        except ArtifactError as error:
            report(f"the pointer to the {name} checkpoint is not used: {error}")
            continue
        if pointer:
            return str(pointer["run_id"])
        if name == "latest":
            report("the pointer to the latest checkpoint is missing; the newest one is looked for")
    runs = sorted({read_manifest(path, KIND).facts["run_id"] for path in list_checkpoints(directory)})
    if len(runs) > 1:
        raise ArtifactError(
            f"`{directory / 'checkpoints'}` holds checkpoints of the runs {', '.join(runs)}, and no pointer says which "
            "one is to go on; move those of the others away"
        )
    return None


def tidy(directory: Path) -> list[Path]:
    """Clean up after a killed process: put back a checkpoint that was moved aside, remove temporary entries."""
    folder = directory / "checkpoints"
    for aside in sorted(folder.glob(f"{TEMPORARY_PREFIX}old-step-*")):
        match = _MOVED_ASIDE.fullmatch(aside.name)
        if match is not None and not (folder / match[1]).exists():
            aside.rename(folder / match[1])
            sync_directory(folder)
    return remove_leftovers(folder) + remove_leftovers(directory)


def move_foreign_aside(directory: Path, step: int, run_id: str) -> Path | None:
    """Where another run's checkpoint stands in the place of `step`, move it aside and return its new place."""
    path = checkpoint_path(directory, step)
    try:
        foreign = str(read_manifest(path, KIND).facts["run_id"])
    except (ArtifactError, KeyError):
        return None
    aside = path.with_name(f"run-{foreign}-{path.name}")
    if foreign == run_id or aside.exists():
        return None
    path.rename(aside)
    sync_directory(path.parent)
    return aside


def _step_directories(directory: Path) -> list[Path]:
    folder = directory / "checkpoints"
    return [path for path in folder.glob("step-*") if _STEP_NAME.fullmatch(path.name)] if folder.is_dir() else []


def _step_of(path: Path) -> int:
    match = _STEP_NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


# --- pointers -------------------------------------------------------------------------------------------------------


def point(directory: Path, name: Pointer, step: int) -> None:
    """Let `latest` or `best` name the checkpoint of `step`, replacing the pointer atomically unless it does already.

    Raises:
        ArtifactError: when there is no such checkpoint.
    """
    path = checkpoint_path(directory, step)
    facts = read_manifest(path, KIND).facts
    pointer = {"checkpoint": path.name, "step": step, "run_id": facts["run_id"]}
    update_file(path.parent / f"{name}.json", pointer_bytes(pointer))


def read_pointer(directory: Path, name: Pointer) -> Path | None:
    """The checkpoint that `latest` or `best` names; None when there is no pointer, or its checkpoint is gone.

    Raises:
        ArtifactError: when the pointer's file was altered.
    """
    pointer = _read_pointer_file(directory, name)
    if not pointer:
        return None
    name_of_step = str(pointer["checkpoint"])
    path = directory / "checkpoints" / name_of_step
    return path if _STEP_NAME.fullmatch(name_of_step) and path.is_dir() else None


def pointer_bytes(pointer: dict[str, Any]) -> bytes:
    """A pointer as it lies on the disk, with the SHA-256 of what it says."""
    return (json.dumps({**pointer, "sha256": sha256_json(pointer)}, indent=2) + "\n").encode()


def _read_pointer_file(directory: Path, name: str) -> dict[str, Any]:
    """What a pointer says; empty when there is none."""
    path = directory / "checkpoints" / f"{name}.json"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    with suppress(ValueError):  # JSON or UTF-8 that is none
        pointer = json.loads(data)
        if isinstance(pointer, dict):
            pointer.pop("sha256", None)
            if {"checkpoint", "step", "run_id"} == set(pointer) and pointer_bytes(pointer) == data:
                return pointer
    raise ArtifactError(f"`{path}` was altered: its SHA-256 is not its own")


# --- rotation -------------------------------------------------------------------------------------------------------


def rotate(directory: Path, *, keep: int) -> list[Path]:
    """Remove old checkpoints of the run that `latest` names, and return them.

    The newest `keep` stay, and what `latest` and `best` name. Nothing is removed while `latest` names nothing whole.
    What lies beyond `latest` was passed over when the run went on, and counts for nothing.

    Raises:
        ArtifactError: when a pointer cannot be read: then it is not known what to spare.
        OSError: when something cannot be removed.
    """
    latest, best = read_pointer(directory, "latest"), read_pointer(directory, "best")
    own = list_checkpoints(directory, run_id=_read_pointer_file(directory, "latest").get("run_id"))
    if latest is None or latest not in own:
        return []
    own = own[: own.index(latest) + 1]
    removed = [path for path in own[: max(0, len(own) - keep)] if path not in (latest, best)]
    for path in removed:
        _remove(path)
    return removed


def make_room(directory: Path, *, run_id: str, best: int | None = None) -> list[Path]:
    """Remove the run's checkpoints before its newest, whose digests are compared first, and return them.

    What `latest`, `best` and the argument name stays. What lies beyond `latest` was passed over when the run went on,
    or is newer than a pointer that could not be moved: it stays too, and is not what is relied on.

    Args:
        directory: the training directory.
        run_id: of the run.
        best: the step of its best checkpoint, whatever the pointer says.

    Raises:
        ArtifactError: when the newest is not whole, or a pointer cannot be read; nothing is removed then.
    """
    own = list_checkpoints(directory, run_id=run_id)
    latest = read_pointer(directory, "latest")
    if latest in own:
        own = own[: own.index(latest) + 1]
    if len(own) < 2:
        return []
    load_checkpoint(own[-1])
    spared = {own[-1], read_pointer(directory, "best")}
    if best is not None:
        spared.add(checkpoint_path(directory, best))
    removed = [path for path in own if path not in spared]
    for path in removed:
        _remove(path)
    return removed


def _remove(path: Path) -> None:
    """Out of sight by one rename first: a kill in the middle of the removal leaves no half checkpoint."""
    doomed = path.with_name(f"{TEMPORARY_PREFIX}removed-{path.name}")
    path.rename(doomed)
    sync_directory(path.parent)
    shutil.rmtree(doomed)
