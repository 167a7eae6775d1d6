"""Is what a run would train on still what was prepared? Asked before the first step.

What lives here: comparing shards, packing plans, the tokenizer and the text on this machine with what the manifests
say. What must not: making any of them again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from pretrain.config import RunConfig
from pretrain.config_data import DataConfig, Source
from pretrain.data.batches import check_tokenizer
from pretrain.data.packing import PackingSpec, plan_directory
from pretrain.data.reading.embedded import embedded_paths
from pretrain.data.reading.remote import is_url
from pretrain.data.reading.sources import (
    HUB_PREFIX,
    SourceFile,
    Told,
    hash_with_index,
    resolve_sources,
    state_here,
    with_index,
)
from pretrain.data.shards import INDEX_SUFFIX, MARKS_SUFFIX, TOKENS_SUFFIX, digests_of, token_dtype
from pretrain.files import ArtifactError, Manifest, bytes_in, read_manifest

_BLOCK = 1 << 20
_THREADS = 4
_NAMED = 5


@dataclass(frozen=True)
class _File:
    """A file of the data: where it lies, the digest it must have, its size if that is known, and the width of ids."""

    path: Path
    digest: str
    size: int | None = None
    ids: np.dtype[Any] | None = None


def verify_run(config: RunConfig, console: Console | None = None) -> None:
    """Refuse to train a run on anything but what was prepared for it. `data.verify` says how closely it is looked at.

    Raises:
        ArtifactError: names the shards, plans or texts that are not what they were, with both digests, and the remedy.
    """
    directory, tokenizer = config.directory / "data", config.directory / "tokenizer"
    full = config.data.verify == "full"
    verify_tokenizer(tokenizer)
    check_tokenizer(read_manifest(directory, "data"), tokenizer, directory)
    verify_inputs(config.data, directory, full=full)
    with _shown(directory, full, console) as told:
        verify_data(directory, full=full, told=told)


def verify_data(directory: Path, *, full: bool, told: Told | None = None) -> None:
    """Compare shards and packing plans with their manifests.

    Args:
        directory: what prepare made.
        full: read every byte, compare SHA-256, and look for ids beyond the vocabulary; otherwise sizes alone.
        told: called with the bytes read, from several threads.

    Raises:
        ArtifactError: names the first files that are missing, cut off or altered, with both digests, and the remedy.
    """
    manifest = read_manifest(directory, "data")
    vocab_size: int = manifest.facts["tokenizer"]["vocab_size"]
    files = [*_shards(directory, manifest, token_dtype(vocab_size)), *_others(directory, manifest)]
    plans = list(_plans(directory, manifest))
    _refuse(_problems(files, full, vocab_size, told), "prepare the data again, or put the files back as they were")
    remedy = "remove the directory of such a plan, and it is made again"
    _refuse(_problems(plans, full, vocab_size, told), remedy)


def bytes_to_verify(directory: Path) -> int:
    """How many bytes `verify_data` reads."""
    return bytes_in(directory)


def verify_tokenizer(directory: Path) -> None:
    """Compare a tokenizer with its manifest.

    Raises:
        ArtifactError: names the file that is missing or altered, with both digests, and the remedy.
    """
    manifest = read_manifest(directory, "tokenizer")
    files = [_File(directory / name, digest) for name, digest in manifest.files.items()]
    _refuse(
        _problems(files, True, 0, None), "put the tokenizer back, or make it and the data again under another name="
    )


# --- shards and plans -----------------------------------------------------------------------------------------------


def _shards(directory: Path, manifest: Manifest, dtype: np.dtype[Any]) -> Iterator[_File]:
    for split in manifest.facts["splits"].values():
        for shard in split["shards"]:
            sizes = {
                TOKENS_SUFFIX: (shard["tokens"] * dtype.itemsize, dtype),
                INDEX_SUFFIX: (shard["documents"] * 8, None),
                MARKS_SUFFIX: (shard["tokens"], None),
            }
            for name, digest in digests_of(shard).items():
                size, ids = sizes[name.removeprefix(shard["name"])]
                if manifest.files.get(name, digest) != digest:
                    raise ArtifactError(
                        f"`{directory}`: its manifest contradicts itself about {name}; prepare it again"
                    )
                yield _File(directory / name, digest, size, ids)


def _others(directory: Path, manifest: Manifest) -> Iterator[_File]:
    shards = (TOKENS_SUFFIX, INDEX_SUFFIX, MARKS_SUFFIX)
    for name, digest in manifest.files.items():
        if not name.endswith(shards):
            yield _File(directory / name, digest)


def _plans(directory: Path, manifest: Manifest) -> Iterator[_File]:
    """Files of the packing plans; each plan lies under a name made of its parameters and of its shards."""
    for split, facts in manifest.facts["splits"].items():
        digests = [shard["index_digest"] for shard in facts["shards"]]
        for plan in sorted((directory / split).glob("packing-*")):
            made = read_manifest(plan, "packing")
            try:
                right = plan_directory(directory / split, PackingSpec(**made.config), digests)
            except TypeError as error:
                raise ArtifactError(
                    f"`{plan}` is of another version ({error}); remove it, and it is made again"
                ) from error
            if right != plan or list(made.inputs.values()) != digests:
                raise ArtifactError(f"`{plan}` is the plan of other rows or shards; remove it, and it is made again")
            yield from (_File(plan / name, digest) for name, digest in made.files.items())


def _problems(files: Sequence[_File], full: bool, vocab_size: int, told: Told | None) -> list[str]:
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        found = pool.map(lambda file: _problem(file, full, vocab_size, told), files)
        return [problem for problem in found if problem is not None]


def _problem(file: _File, full: bool, vocab_size: int, told: Told | None) -> str | None:
    """What is wrong with a file."""
    if not file.path.is_file():
        return f"`{file.path}` is missing"
    size = file.path.stat().st_size
    if file.size is not None and size != file.size:
        return f"`{file.path}` has {size:,} bytes, and had {file.size:,}: it was cut off or altered"
    if not full:
        return None
    digest = hashlib.sha256()
    largest = 0
    with file.path.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            if file.ids is not None and len(block) % file.ids.itemsize == 0:
                largest = max(largest, int(np.frombuffer(block, dtype=file.ids).max()))
            if told is not None:
                told(len(block))
    if digest.hexdigest() != file.digest:
        return f"`{file.path}` was altered: its SHA-256 is {digest.hexdigest()}, and was {file.digest}"
    if file.ids is not None and largest >= vocab_size:
        return f"`{file.path}` holds id {largest}, beyond the vocabulary of {vocab_size}"
    return None


def _refuse(problems: Sequence[str], remedy: str) -> None:
    if problems:
        more = f"\n  and {len(problems) - _NAMED:,} more" if len(problems) > _NAMED else ""
        raise ArtifactError("\n  ".join([problems[0], *problems[1:_NAMED]]) + f"{more}; {remedy}")


# --- the text -------------------------------------------------------------------------------------------------------


def verify_inputs(data: DataConfig, directory: Path, *, full: bool, told: Told | None = None) -> None:
    """Compare the text on this machine with what was prepared: nothing added, removed or changed.

    A file of the same size and time is taken as unchanged; another is read and compared. Where none of the text is left
    (the shards were carried elsewhere), there is nothing to compare; what lies behind a URL or on the Hub is not asked.

    Raises:
        ArtifactError: lists the differences, and the remedy.
    """
    manifest = read_manifest(directory, "data")
    seen = manifest.facts.get("inputs_seen")
    listing = directory / "files.jsonl"
    if not seen or data.from_ is not None or manifest.config.get("max_bytes") is not None or not listing.is_file():
        return
    recorded = {line["name"]: line["sha256"] for line in map(json.loads, listing.read_bytes().splitlines())}
    recorded = {name: digest for name, digest in recorded.items() if _is_here(name)}
    paths = _paths(recorded)
    if recorded and not any(path.is_file() for path in paths.values()):
        return
    differences = _changed_keys(data, manifest)
    wanted = None if differences else _named_now(data)
    if wanted is not None:
        differences += [f"added: `{name}`" for name in wanted if name not in recorded]
        differences += [f"removed: `{name}`" for name in recorded if name not in wanted]
    else:
        differences += [f"removed: `{name}`" for name, path in paths.items() if not path.is_file()]
    for name, path in paths.items():
        if path.is_file() and (change := _change(path, seen.get(name, ""), recorded[name], full, told)):
            differences.append(f"changed: `{name}`, {change}")
    if differences:
        shown = "".join(f"\n  {difference}" for difference in differences[:20])
        raise ArtifactError(
            f"`{directory}` was prepared from other text than data.train and data.validation name now:{shown}\n"
            "Put it back as it was, or prepare it under another name="
        )


def _is_here(name: str) -> bool:
    return not is_url(name) and not name.startswith(HUB_PREFIX)


def _paths(names: Iterable[str]) -> dict[str, Path]:
    names = list(names)
    embedded = embedded_paths(names)
    return {name: embedded.get(name, Path(name)) for name in names}


def _entries(places: Iterable[str | Source | dict[str, Any]]) -> list[str]:
    """The files, globs and directories on this machine that a list of the configuration names."""
    names: list[str] = []
    for place in places:
        files = place["files"] if isinstance(place, dict) else place.files if isinstance(place, Source) else (place,)
        names.extend(name for name in files if _is_here(name))
    return names


def _changed_keys(data: DataConfig, manifest: Manifest) -> list[str]:
    """Keys that decided the shards and have another value now."""
    now: dict[str, Any] = data.model_dump(mode="json")
    keys = [key for key in ("document", "text_field", "ids_field", "encoding") if key in manifest.config]
    changed = [
        f"data.{key}: {manifest.config[key]!r} -> {now[key]!r}" for key in keys if manifest.config[key] != now[key]
    ]
    for key in ("train", "validation"):
        before, after = manifest.config.get(key), now[key]
        if isinstance(before, list) and isinstance(after, list) and _entries(before) != _entries(after):
            changed.append(f"data.{key}: {', '.join(_entries(before))} -> {', '.join(_entries(after))}")
    return changed


def _named_now(data: DataConfig) -> list[str] | None:
    """The names of the files on this machine that the configuration names now; None when an entry names nothing."""
    validation = data.validation if isinstance(data.validation, tuple) else ()
    files: list[SourceFile] = []
    try:
        for places, key in ((data.train, "data.train"), (validation, "data.validation")):
            files += resolve_sources(_entries(places), key=key, download=False)
    except ValueError:
        return None
    return [file.name for file in files]


def _change(path: Path, seen: str, digest: str, full: bool, told: Told | None) -> str | None:
    """How a text differs from what was prepared."""
    status, paths = os.stat(path), with_index(str(path))
    if not seen or seen == state_here(paths) or not digest:
        return None
    size = seen.split()[0]
    if size != str(status.st_size):
        now = f"{status.st_size:,} bytes, and had {size}"
        return f"{now}: its SHA-256 is {hash_with_index(paths, told=told)}, and was {digest}" if full else now
    if full and (current := hash_with_index(paths, told=told)) != digest:
        return f"its SHA-256 is {current}, and was {digest}"
    return None


@contextmanager
def _shown(directory: Path, full: bool, console: Console | None) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes that are compared."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    quiet = console is None or not console.is_terminal or not full
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet, transient=True) as bar:
        task = bar.add_task("comparing the shards with their digests", total=bytes_to_verify(directory))
        yield lambda size: bar.advance(task, size)
