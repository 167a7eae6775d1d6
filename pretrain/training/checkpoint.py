"""Checkpoints: everything a run needs to go on, in a directory that is whole or not there.

What lives here: the form on the disk, writing, verifying, finding, pointing, rotating. What must not: the loop, how a
model is published (a callable writes it), pickle in any shape.

    <run>/train/checkpoints/
        step-00001000/
            model/             the published model; its weights are the fp32 masters
            optimizer/         optimizer-00001-of-00001.safetensors: tensors by `<parameter>/<key>`
                               optimizer.json: groups with hyper-parameters and member names
            trainer.json       step, run id, random generators of each rank, the trainer's own state
            manifest.json      SHA-256 of every file, taken of the memory that was written
        latest.json best.json  pointers, replaced atomically

A checkpoint is written under a temporary name, flushed, and renamed. Nothing in it is used before every digest was
compared. Order is by step and run id, never by file times: clocks step back, and copies get new times.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pretrain.files import (
    MANIFEST,
    TEMPORARY_PREFIX,
    ArtifactError,
    Manifest,
    commit_directory,
    read_manifest,
    remove_leftovers,
    replace_file,
    sync_directory,
    verify_manifest,
    write_json,
    write_manifest,
    write_safetensors,
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
    "optimizer_state_by_name",
    "point",
    "read_pointer",
    "restore_rng",
    "rotate",
    "save_checkpoint",
    "tensor_bytes",
    "tidy",
]

KIND = "checkpoint"
_FORMAT_VERSION = 1
_STEP_NAME = re.compile(r"step-(\d{8,})")
_MOVED_ASIDE = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}old-(step-\d{{8,}})-[0-9a-f]+")
_log = logging.getLogger(__name__)

WriteModel = Callable[[Path], Mapping[str, str]]
"""Writes a model into an empty directory, every file flushed to the disk; returns file name -> SHA-256."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose digests were compared.

    Attributes:
        directory: `step-00001000`; the model lies in `directory / "model"`.
        step: optimizer steps done.
        run_id: the run that wrote it.
        state: what the trainer handed in.
        rngs: the random generators' states, one for each rank.
        optimizer: tensors are read from the file when they are touched.
        manifest: what is in it.
    """

    directory: Path
    step: int
    run_id: str
    state: dict[str, Any]
    rngs: list[dict[str, Any]]
    optimizer: OptimizerState
    manifest: Manifest

    @property
    def rng(self) -> dict[str, Any]:
        """The random generators of the first rank."""
        return self.rngs[0]


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in a training directory (`<run>/train`)."""
    return directory / "checkpoints" / f"step-{step:08d}"


# --- writing --------------------------------------------------------------------------------------------------------


def save_checkpoint(
    directory: Path,
    *,
    step: int,
    run_id: str,
    write_model: WriteModel,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    rngs: Sequence[Mapping[str, Any]] | None = None,
    inputs: Mapping[str, str] | None = None,
) -> Path:
    """Write the checkpoint of `step`, all of it or nothing; an older one of the same step is replaced.

    Args:
        directory: the training directory (`<run>/train`).
        step: optimizer steps done.
        run_id: stays the same over all resumes of a run.
        write_model: writes the published model.
        model: gives the parameters' names.
        optimizer: its state is saved by these names.
        state: plain data (JSON): progress, data, metrics; its `config` also goes into the manifest.
        rngs: random-generator states of all ranks; this process's own when left out.
        inputs: digests of what the run was made from.

    Raises:
        ArtifactError: when `write_model` does not account for a file that it wrote.
        OSError: when the disk is full, say; older checkpoints are untouched.
    """
    path = checkpoint_path(directory, step)
    trainer: dict[str, Any] = {
        "format_version": _FORMAT_VERSION,
        "step": step,
        "run_id": run_id,
        "inputs": dict(inputs or {}),
        "rng": [dict(rng) for rng in rngs] if rngs is not None else [capture_rng()],
        "state": dict(state),
    }
    with commit_directory(path, replace=True) as temporary:
        (temporary / "model").mkdir()
        files = {f"model/{name}": digest for name, digest in write_model(temporary / "model").items()}
        _refuse_unlisted(temporary, files)
        files |= _write_optimizer(temporary, optimizer_state_by_name(model, optimizer))
        files["trainer.json"] = write_json(temporary / "trainer.json", trainer)
        write_manifest(
            temporary,
            kind=KIND,
            config=trainer["state"].get("config") or {},
            inputs=trainer["inputs"],
            files=files,
            facts={"step": step, "run_id": run_id},
        )
    return path


def _write_optimizer(directory: Path, state: OptimizerState) -> dict[str, str]:
    (directory / "optimizer").mkdir()
    tensors, groups = "optimizer/optimizer-00001-of-00001.safetensors", "optimizer/optimizer.json"
    return {
        tensors: write_safetensors(
            directory / tensors,
            ((name, tensor_bytes(tensor)) for name, tensor in state.tensors.items()),
            {"format": "pt"},
        ),
        groups: write_json(directory / groups, {"groups": state.groups, "stateless": list(state.stateless)}),
    }


def _refuse_unlisted(directory: Path, files: Mapping[str, str]) -> None:
    """Hashing a file from the disk would bless whatever the disk made of it, so every digest must be handed over."""
    written = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    if unlisted := sorted(written ^ set(files)):
        raise ArtifactError(f"the model's writer gave no digest for `{unlisted[0]}`, or did not write it")


# --- reading --------------------------------------------------------------------------------------------------------


def load_checkpoint(directory: Path, *, verify: bool = True) -> Checkpoint:
    """Read a checkpoint. With `verify`, every file's digest is compared before anything is used.

    Raises:
        ArtifactError: names the first file that is missing, altered or unreadable.
    """
    manifest = read_manifest(directory, KIND)
    if verify:
        verify_manifest(directory, manifest)
    trainer = _read_json(directory / "trainer.json")
    groups = _read_json(directory / "optimizer" / "optimizer.json")
    tensors = dict(_read_tensors(directory, manifest))
    try:
        if trainer["format_version"] != _FORMAT_VERSION:
            raise ArtifactError(
                f"`{directory}` has trainer format {trainer['format_version']}, this version reads {_FORMAT_VERSION}; "
                "resume with the version that wrote it"
            )
        loaded = Checkpoint(
            directory=directory,
            step=trainer["step"],
            run_id=trainer["run_id"],
            state=trainer["state"],
            rngs=trainer["rng"],
            optimizer=OptimizerState(tensors, groups["groups"], tuple(groups["stateless"])),
            manifest=manifest,
        )
    except KeyError as error:
        raise ArtifactError(f"`{directory}` lacks the entry {error} in its JSON; it cannot be used") from error
    if verify:
        _verify_manifest_itself(loaded, trainer["inputs"])
    return loaded


def _read_tensors(directory: Path, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """Tensors of all optimizer files. They are views of the mapped files: bytes are read when they are touched."""
    for file in (name for name in manifest.files if re.fullmatch(r"optimizer/[^/]+\.safetensors", name)):
        try:
            with safe_open(directory / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                    yield name, opened.get_tensor(name)
        except (SafetensorError, FileNotFoundError) as error:
            raise ArtifactError(f"`{directory / file}` cannot be read ({error}); use an older checkpoint") from error


def _verify_manifest_itself(loaded: Checkpoint, inputs: Mapping[str, str]) -> None:
    """The manifest has no digest of its own: compare it with `trainer.json`, and its bytes with its contents."""
    manifest, path = loaded.manifest, loaded.directory / MANIFEST
    same = (
        manifest.facts == {"step": loaded.step, "run_id": loaded.run_id}
        and manifest.config == (loaded.state.get("config") or {})
        and manifest.inputs == inputs
        and loaded.directory.name == checkpoint_path(Path(), loaded.step).name
        and path.read_bytes() == (json.dumps(manifest.__dict__, indent=2, ensure_ascii=False) + "\n").encode()
    )
    if not same:
        raise ArtifactError(f"`{path}` was altered: it does not agree with trainer.json")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"`{path}` is missing from the {KIND}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"`{path}` cannot be read ({error})") from error


# --- finding --------------------------------------------------------------------------------------------------------


def list_checkpoints(directory: Path, *, run_id: str | None = None) -> list[Path]:
    """Complete checkpoints (every file there, digests not compared), oldest first, by step and run id."""
    found: list[tuple[int, str, Path]] = []
    for path in _step_directories(directory):
        try:
            manifest = read_manifest(path, KIND)
        except ArtifactError:
            continue
        step, run = manifest.facts.get("step"), manifest.facts.get("run_id")
        whole = all((path / name).is_file() for name in manifest.files)
        if whole and isinstance(step, int) and isinstance(run, str) and run_id in (None, run):
            found.append((step, run, path))
    return [path for _, _, path in sorted(found)]


def find_resumable(directory: Path, *, report: Callable[[str], None] = _log.warning) -> Path | None:
    """The newest checkpoint that is whole, every digest compared; None when there is none at all.

    For the process that owns the run: what a killed one left half done is cleaned up first. Where `latest` names a
    run, checkpoints of other runs in the same folder are passed over.

    Args:
        directory: the training directory (`<run>/train`).
        report: gets one line for each checkpoint that is passed over.

    Raises:
        ArtifactError: when there are checkpoints and not one of them is whole.
    """
    tidy(directory)
    candidates = sorted(_step_directories(directory), key=_step_of, reverse=True)
    try:
        owner = _read_pointer_file(directory, "latest").get("run_id")
    except ArtifactError as error:
        owner = None
        report(f"the pointer to the latest checkpoint is not used: {error}")
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


def tidy(directory: Path) -> list[Path]:
    """Clean up after a killed process: put back a checkpoint that was moved aside, remove temporary entries."""
    folder = directory / "checkpoints"
    for aside in sorted(folder.glob(f"{TEMPORARY_PREFIX}old-step-*")):
        match = _MOVED_ASIDE.fullmatch(aside.name)
        if match is not None and not (folder / match[1]).exists():
            aside.rename(folder / match[1])
    return remove_leftovers(folder)


def _step_directories(directory: Path) -> list[Path]:
    folder = directory / "checkpoints"
    return [path for path in folder.glob("step-*") if _STEP_NAME.fullmatch(path.name)] if folder.is_dir() else []


def _step_of(path: Path) -> int:
    match = _STEP_NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


# --- pointers and rotation ------------------------------------------------------------------------------------------


def point(directory: Path, name: Literal["latest", "best"], step: int) -> None:
    """Let `latest` or `best` name the checkpoint of `step`, replacing the pointer atomically.

    Raises:
        ArtifactError: when there is no such checkpoint.
    """
    path = checkpoint_path(directory, step)
    facts = read_manifest(path, KIND).facts
    pointer = {"checkpoint": path.name, "step": step, "run_id": facts["run_id"]}
    replace_file(path.parent / f"{name}.json", (json.dumps(pointer, indent=2) + "\n").encode())


def read_pointer(directory: Path, name: Literal["latest", "best"]) -> Path | None:
    """The checkpoint that `latest` or `best` names; None when there is no pointer, or its checkpoint is gone.

    Raises:
        ArtifactError: when the pointer's file cannot be read.
    """
    pointer = _read_pointer_file(directory, name)
    path = directory / "checkpoints" / str(pointer.get("checkpoint"))
    return path if _STEP_NAME.fullmatch(path.name) and (path / MANIFEST).is_file() else None


def _read_pointer_file(directory: Path, name: str) -> dict[str, Any]:
    path = directory / "checkpoints" / f"{name}.json"
    pointer = _read_json(path) if path.is_file() else {}
    if not isinstance(pointer, dict):
        raise ArtifactError(f"`{path}` cannot be read (it is no JSON object)")
    return pointer


def rotate(directory: Path, *, keep: int) -> list[Path]:
    """Remove old checkpoints of the run that `latest` names, and return them.

    The newest `keep` stay, and what `latest` and `best` name. Nothing is removed while `latest` names nothing whole.

    Raises:
        ArtifactError: when a pointer cannot be read: then it is not known what to spare.
    """
    latest, best = read_pointer(directory, "latest"), read_pointer(directory, "best")
    own = list_checkpoints(directory, run_id=_read_pointer_file(directory, "latest").get("run_id"))
    if latest not in own:
        return []
    removed = [path for path in own[: max(0, len(own) - keep)] if path not in (latest, best)]
    for path in removed:
        # Out of sight by one rename first: a kill in the middle of the removal leaves no half checkpoint.
        doomed = path.with_name(f"{TEMPORARY_PREFIX}removed-{path.name}")
        path.rename(doomed)
        sync_directory(path.parent)
        shutil.rmtree(doomed)
    return removed
