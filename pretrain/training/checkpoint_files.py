"""One checkpoint on the disk: its form, how it is written, and how it is read.

What lives here: the files of a checkpoint's directory and their digests. What must not: which checkpoint is the newest,
what is kept (`checkpoint`), when one is written (`saving`), pickle in any shape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain import __version__
from pretrain.files import (
    MANIFEST,
    ArtifactError,
    Manifest,
    commit_directory,
    manifest_bytes,
    read_manifest,
    verify_manifest,
    write_json,
    write_manifest,
    write_safetensors,
)
from pretrain.ranks import LostRankError, OtherRankError, Ranks, words_of
from pretrain.training.state import OptimizerState, capture_rng, late_bytes

KIND = "checkpoint"
TRAINER = "trainer.json"
_FORMAT_VERSION = 1

WriteModel = Callable[[Path], Mapping[str, str]]
"""Writes a model, or a share of it, into a directory, every file flushed to the disk; returns name -> SHA-256."""


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


@dataclass(frozen=True)
class Content:
    """What a checkpoint is to hold, as one process of the job knows it.

    Attributes:
        step: optimizer steps done.
        run_id: stays the same over all resumes of a run.
        write_model: writes the published model, or this process's share of it.
        optimizer: its state by the parameters' names, or this process's share of the tensors.
        state: plain data (JSON): progress, data, metrics; its `config` also goes into the manifest.
        rngs: random-generator states of all ranks.
        inputs: digests of what the run was made from.
        shares: how many processes write tensors: the first ones; 1 or all of them.
    """

    step: int
    run_id: str
    write_model: WriteModel
    optimizer: OptimizerState
    state: Mapping[str, Any]
    rngs: Sequence[Mapping[str, Any]]
    inputs: Mapping[str, str] = field(default_factory=dict)
    shares: int = 1


def save_checkpoint(
    directory: Path,
    *,
    step: int,
    run_id: str,
    write_model: WriteModel,
    optimizer: OptimizerState,
    state: Mapping[str, Any],
    rngs: Sequence[Mapping[str, Any]] | None = None,
    inputs: Mapping[str, str] | None = None,
) -> Path:
    """Write the checkpoint of `step` from one process, all of it or nothing; see `Content` and `write_checkpoint`."""
    known = rngs if rngs is not None else [capture_rng()]
    content = Content(step, run_id, write_model, optimizer, state, known, dict(inputs or {}))
    return write_checkpoint(directory, content)


def write_checkpoint(directory: Path, content: Content, ranks: Ranks | None = None) -> Path:
    """Write a checkpoint, all of it or nothing; an older one of the same step is replaced. All ranks call it together.

    Each rank writes its share into one temporary directory and hands the digests to the first one, which publishes it
    by a rename.

    Args:
        directory: the training directory (`<run>/train`).
        content: as this rank knows it.
        ranks: who writes; None for one process.

    Raises:
        ArtifactError: when `write_model` does not account for a file that it wrote.
        OSError: when a disk is full, say, on any rank; older checkpoints are untouched.
    """
    ranks = ranks or Ranks.alone()
    path = checkpoint_path(directory, content.step)
    with ExitStack() as commit:
        begin = lambda: str(commit.enter_context(commit_directory(path, replace=True)))  # noqa: E731
        temporary = Path(together(ranks, begin if ranks.main else _nothing)[0])
        shares = together(ranks, lambda: write_share(temporary, content, ranks.rank))

        def publish() -> None:
            write_head(temporary, content, shares)
            commit.close()

        together(ranks, publish if ranks.main else _nothing)
    return path


def together(ranks: Ranks, function: Callable[[], Any]) -> list[Any]:
    """What `function` returns (JSON) on each rank, by rank. Where it fails on one, all of them raise.

    Raises:
        OSError: when the disk, or a store, failed some of them; one's own, or one that names the rank.
        ValueError: when some failed for another reason.
        BaseException: one's own, whatever it is; the others raise `OtherRankError`.
    """
    result, error = None, None
    try:
        result = function()
    except (LostRankError, KeyboardInterrupt, SystemExit):  # nobody is told: this process ends
        raise
    except (OSError, ValueError) as failed:
        error = failed
    except BaseException as failed:  # no memory, say; in a thread it would end no process, and the others would wait
        ranks.gather([None, [_words(failed), False]])
        raise
    failure = None if error is None else [_words(error), isinstance(error, OSError)]
    found = ranks.gather([result, failure])
    failures = [(rank, words, disk) for rank, (_, failure) in enumerate(found) if failure for words, disk in [failure]]
    if not failures:
        return [result for result, _ in found]
    all_disks = all(disk for _, _, disk in failures)
    if error is not None and isinstance(error, OSError) == all_disks:
        raise error
    rank, words, _ = next(failure for failure in failures if failure[2] == all_disks)
    raise (OSError if all_disks else OtherRankError)(f"rank {rank}: {words}")


def _words(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or words_of(error))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _nothing() -> None:
    """What the other ranks do while one works."""


def write_share(directory: Path, content: Content, rank: int) -> dict[str, str]:
    """Write what is a rank's to write: tensors, and from the first rank all that goes with them; return the digests.

    Raises:
        ArtifactError: when `write_model` does not account for a file that it wrote.
        OSError: when the disk is full, say.
    """
    if rank >= content.shares:
        return {}
    for folder in ("model", "optimizer"):
        (directory / folder).mkdir(exist_ok=True)
    files = {f"model/{name}": digest for name, digest in content.write_model(directory / "model").items()}
    if missing := sorted(name for name in files if not (directory / name).is_file()):
        raise ArtifactError(f"the model's writer gave a digest for `{missing[0]}`, and did not write it")
    state = content.optimizer
    file = f"optimizer/optimizer-{rank + 1:05d}-of-{content.shares:05d}.safetensors"
    tensors = ((name, late_bytes(tensor, partial(_same, tensor))) for name, tensor in state.tensors.items())
    files[file] = write_safetensors(directory / file, tensors, {"format": "pt"})
    if rank == 0:
        groups = "optimizer/optimizer.json"
        plain = {"groups": state.groups, "stateless": list(state.stateless)}
        files[groups] = write_json(directory / groups, plain)
    return files


def write_head(directory: Path, content: Content, shares: Sequence[Mapping[str, str]]) -> Manifest:
    """Write `trainer.json` and the manifest of all shares; the first rank's work.

    Args:
        directory: where its own share lies.
        content: as it knows it.
        shares: digests of the files of each rank.
    """
    trainer: dict[str, Any] = {
        "format_version": _FORMAT_VERSION,
        "code_version": __version__,
        "step": content.step,
        "run_id": content.run_id,
        "inputs": dict(content.inputs),
        "rng": [dict(rng) for rng in content.rngs],
        "state": dict(content.state),
    }
    files = {name: digest for share in shares for name, digest in share.items()}
    _refuse_unlisted(directory, files)
    files[TRAINER] = write_json(directory / TRAINER, trainer)
    return write_manifest(
        directory,
        kind=KIND,
        config=trainer["state"].get("config") or {},
        inputs=trainer["inputs"],
        files=files,
        facts={"step": content.step, "run_id": content.run_id},
    )


def _refuse_unlisted(directory: Path, files: Mapping[str, str]) -> None:
    """Hashing a file from the disk would bless whatever the disk made of it, so every digest must be handed over."""
    written = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    if unlisted := sorted(written - set(files)):
        raise ArtifactError(f"the model's writer gave no digest for `{unlisted[0]}`")


# --- reading --------------------------------------------------------------------------------------------------------


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration that a checkpoint was made with, from `trainer.json`, whose digest is compared first.

    Raises:
        ArtifactError: when it cannot be told.
    """
    manifest = read_manifest(directory, KIND)
    verify_manifest(directory, replace(manifest, files={TRAINER: manifest.files.get(TRAINER, "")}))
    config = _read_json(directory / TRAINER)["state"].get("config") or {}
    if config != manifest.config:
        raise ArtifactError(f"`{directory / MANIFEST}` was altered: it does not agree with {TRAINER}")
    return dict(config)


def verify_model(directory: Path) -> None:
    """Compare every file of a model that lies in a checkpoint with its digest; a model from elsewhere has none.

    Args:
        directory: the model, `step-00001000/model` say.

    Raises:
        ArtifactError: names the first file that is missing or altered, and the remedy.
    """
    directory = directory.resolve()
    home = directory.parent
    named = re.fullmatch(r"step-\d{8,}", home.name) is not None and (home / MANIFEST).is_file()
    if directory.name != "model" or not (named or (home / TRAINER).is_file()):
        return
    try:
        manifest = read_manifest(home, KIND)
        model = {name: digest for name, digest in manifest.files.items() if name.startswith("model/")}
        verify_manifest(home, replace(manifest, files=model))
    except ArtifactError as error:
        raise ArtifactError(
            f"{error}. Put the file back as it was, or remove `{home}`, and `pretrain run` trains on from the "
            "checkpoint before it; to use the model as it is, copy it out of the checkpoint"
        ) from error


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
        _verify_manifest_itself(loaded, trainer)
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


def _verify_manifest_itself(loaded: Checkpoint, trainer: Mapping[str, Any]) -> None:
    """Compare the manifest with `trainer.json`, and every byte of it with what it says."""
    manifest, path = loaded.manifest, loaded.directory / MANIFEST
    same = (
        manifest.facts == {"step": loaded.step, "run_id": loaded.run_id}
        and manifest.config == (loaded.state.get("config") or {})
        and manifest.inputs == trainer.get("inputs")
        and manifest.code_version == trainer.get("code_version", manifest.code_version)
        and loaded.directory.name == checkpoint_path(Path(), loaded.step).name
        and path.read_bytes() == manifest_bytes(manifest)
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
