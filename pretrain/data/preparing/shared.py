"""Artifacts that another run made, in a directory or behind a URL, taken over file by file under their digests.

What lives here: copying or linking them, and the data of a run out of another's (`data.from`). What must not: how they
were made.

On one file system the files are linked, not copied: a run that is given another's shards needs no space for them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from pretrain.config_types import redacted
from pretrain.data.reading import remote
from pretrain.files import (
    MANIFEST,
    ArtifactError,
    Manifest,
    check_inside,
    commit_directory,
    read_manifest,
    sha256_file,
    write_manifest,
)

_THREADS = 8


def manifest_of(place: str, kind: str) -> Manifest:
    """The manifest of the artifact in a directory or behind a URL.

    Raises:
        ArtifactError: when there is none of this kind.
        ValueError: when the URL cannot be read.
    """
    try:
        return read_manifest(_folder(place), kind)
    except remote.GoneError as error:
        raise ArtifactError(f"`{redacted(place)}` holds no {kind}: {error}") from error


def take_artifact(place: str, directory: Path, kind: str, console: Console | None = None) -> Manifest:
    """Bring every file of an artifact into `directory`, and compare it with its digest; return the manifest.

    The manifest itself is not written.

    Raises:
        ArtifactError: when a file is missing or altered, or the artifact is none; names the file.
        ValueError: when a URL cannot be read.
    """
    manifest = manifest_of(place, kind)
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        sources = list(pool.map(lambda name: _source(place, name), manifest.files))
    if remote.is_url(place):
        remote.fetch(sources, console)
    for folder in {directory / Path(name).parent for name in manifest.files}:
        folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:  # hashing lets go of Python's lock
        jobs = [
            pool.submit(_take, source, directory / name, digest, f"{redacted(place)}/{name}")
            for source, (name, digest) in zip(sources, manifest.files.items(), strict=True)
        ]
        for job in jobs:
            job.result()
    return manifest


def take_data(
    place: str, directory: Path, *, tokenizer: str, config: Mapping[str, Any], console: Console | None = None
) -> Manifest:
    """Make `directory` the data of a run out of the prepared shards at `place`; return its manifest.

    Args:
        place: a data directory of another run, or the URL of one.
        directory: where the data goes; it appears whole.
        tokenizer: digest of the run's tokenizer.
        config: the keys that decide the data.
        console: where a download is shown.

    Raises:
        ArtifactError: when the shards are not whole, or another tokenizer made them.
        ValueError: when a URL cannot be read.
    """
    made = manifest_of(place, "data")
    made_with = made.inputs.get("tokenizer", "")
    if made_with != tokenizer:
        raise ArtifactError(
            f"data.from: `{redacted(place)}` was prepared with another tokenizer ({made_with[:12]}) than this run's "
            f"({tokenizer[:12]}); give tokenizer.from: the tokenizer directory of the run that made it"
        )
    with commit_directory(directory) as temporary:
        take_artifact(place, temporary, "data", console)
        return write_manifest(
            temporary,
            kind="data",
            config=config,
            inputs={"from": made.digest, "tokenizer": tokenizer},
            files=made.files,
            facts={**made.facts, "made_from": {"config": made.config, "inputs": made.inputs}},
        )


def is_unchanged(place: str, digest: str) -> bool:
    """Whether the artifact at `place` is the one of this digest; one that is there no more cannot have changed."""
    try:
        return manifest_of(place, "data").digest == digest
    except ArtifactError:
        return not remote.is_url(place) and not Path(remote.local_path(place)).exists()


def _folder(place: str) -> Path:
    """The directory that holds the manifest; of a remote artifact its copy alone."""
    if not remote.is_url(place):
        return Path(remote.local_path(place)).expanduser()
    path = _source(place, MANIFEST)
    remote.fetch([path])
    return path.parent


def _source(place: str, name: str) -> Path:
    """Where a file of the artifact lies, or will once it is fetched."""
    if not remote.is_url(place):
        return Path(remote.local_path(place)).expanduser() / name
    return remote.place(remote.find(remote.below(place, name))[0])


def _take(source: Path, target: Path, digest: str, name: str) -> None:
    check_inside(source)
    try:
        try:
            os.link(source, target)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, target)
            with target.open("rb") as file:
                os.fsync(file.fileno())
    except FileNotFoundError:
        raise ArtifactError(f"`{name}` is missing; get the artifact anew") from None
    if sha256_file(target) != digest:
        raise ArtifactError(f"`{name}` was altered: its SHA-256 is not the manifest's; get the artifact anew")
