"""Which files a configuration names: paths, directories, globs, Hub datasets, the embedded corpus.

What lives here: names to files, formats by suffix, digests of inputs. What must not: reading documents out of them.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pretrain.config_data import Source
from pretrain.files import sha256_file

STDLIB = "python-stdlib"
HUB_PREFIX = "hub:"
_FORMATS = {
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".xz": "xz"}
_NOT_IN_STDLIB_CORPUS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "__pycache__",
}
_STDLIB_MINIMUM = 5_000_000
_BLOCK = 1 << 20

Told = Callable[[int], None]
"""Called, from any thread, with the number of bytes that were hashed since the last call."""


@dataclass(frozen=True)
class SourceFile:
    """One input file.

    `name` is how people see it (the path as it was given); `entry` is the line of the configuration that it came
    from, `source` the name of its `Source` (empty when it has none), `bytes` its size on the disk.
    """

    name: str
    path: str
    format: str
    bytes: int
    compression: str | None = None
    entry: str = ""
    source: str = ""


def resolve_sources(entries: Sequence[str | Source], *, key: str = "data.train") -> list[SourceFile]:
    """Turn `data.train`, or a list like it, into files, in the order of the list (sorted within an entry).

    Raises:
        ValueError: for an entry that names nothing, a file of unknown format, or a file that comes twice; names `key`.
    """
    files: list[SourceFile] = []
    for entry in entries:
        if isinstance(entry, Source):
            for name in entry.files:
                files.extend(_resolve(name, entry.name, key))
        else:
            files.extend(_resolve(entry, "", key))
    refuse_repeated(files, key)
    return files


def refuse_repeated(files: Iterable[SourceFile], key: str) -> None:
    """Raise ValueError when two entries name the same file: it would be read twice, or trained on and held out."""
    seen: dict[str | tuple[int, int], SourceFile] = {}
    for file in files:
        identity: str | tuple[int, int] = file.path
        if file.format != "hub":
            status = os.stat(file.path)
            identity = (status.st_dev, status.st_ino)
        if (other := seen.setdefault(identity, file)) is not file:
            raise ValueError(f"{key}: `{file.name}` comes twice, from `{other.entry}` and `{file.entry}`; remove one")


def _resolve(entry: str, source: str, key: str) -> list[SourceFile]:
    if entry == STDLIB:
        return [
            SourceFile(f"{STDLIB}/{name}", str(path), "txt", path.stat().st_size, None, entry, source)
            for name, path in stdlib_corpus()
        ]
    if entry.startswith(HUB_PREFIX):
        return [SourceFile(entry, entry.removeprefix(HUB_PREFIX), "hub", 0, None, entry, source)]
    if "://" in entry:
        raise ValueError(f"{key}: `{entry}` is a URL; give a local file, or hub:NAME for a dataset on the Hub")
    path = Path(entry).expanduser()
    if path.is_dir():
        found = [_source_file(inner, entry, source, key) for inner in _known_files_below(path)]
        if not found:
            known = ", ".join(_FORMATS)
            raise ValueError(f"{key}: the directory `{entry}` holds no file of a known format ({known}; .gz .zst .xz)")
        return found
    if path.is_file():
        return [_source_file(str(path), entry, source, key)]
    matches = sorted(match for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
    if not matches:
        raise ValueError(f"{key}: `{entry}` names no file, directory, glob, hub:NAME or {STDLIB}; check the path")
    return [_source_file(match, entry, source, key) for match in matches]


def _known_files_below(directory: Path) -> list[str]:
    """Files of a known format in a directory and those in it, hidden ones left out, sorted by relative path."""
    found: list[str] = []
    for folder, inner, names in os.walk(directory):
        inner[:] = [name for name in inner if not name.startswith(".")]
        visible = (name for name in names if not name.startswith(".") and _format_of(name)[0] is not None)
        found.extend(os.path.join(folder, name) for name in visible)
    return sorted(found)


def _format_of(path: str) -> tuple[str | None, str | None]:
    stem, suffix = os.path.splitext(path)
    compression = _COMPRESSIONS.get(suffix.lower())
    inner = os.path.splitext(stem)[1] if compression else suffix
    return _FORMATS.get(inner.lower()), compression


def _source_file(path: str, entry: str, source: str, key: str) -> SourceFile:
    file_format, compression = _format_of(path)
    if file_format is None or (file_format == "parquet" and compression):
        known = ", ".join(_FORMATS)
        raise ValueError(
            f"{key}: `{path}` is of no known format; known are {known}, and all but parquet with .gz, .zst or .xz; "
            "give the file one of these suffixes"
        )
    return SourceFile(path, path, file_format, os.stat(path).st_size, compression, entry, source)


# --- the embedded corpus --------------------------------------------------------------------------------------------


def stdlib_corpus() -> list[tuple[str, Path]]:
    """The source files of this machine's Python standard library: (relative path, path), sorted.

    Left out: tests, idlelib, lib2to3, encodings, site- and dist-packages, pydoc_data.

    Raises:
        ValueError: when fewer than 5 MB are there, as on an interpreter without its library's sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[tuple[str, Path]] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _NOT_IN_STDLIB_CORPUS]
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        found.extend((path.relative_to(root).as_posix(), path) for path in paths)
    found.sort()
    size = sum(path.stat().st_size for _, path in found)
    if size < _STDLIB_MINIMUM:
        raise ValueError(
            f"{STDLIB}: `{root}` holds {size:,} bytes of Python source, fewer than {_STDLIB_MINIMUM:,}; "
            "use a Python with its library's sources, or give text files of your own in data.train"
        )
    return found


def corpus_digest() -> str:
    """SHA-256 over the names and contents of the embedded corpus: two machines with the same one have the same text."""
    return digest_of_files((f"{STDLIB}/{name}", sha256_file(path)) for name, path in stdlib_corpus())


def digest_of_files(files: Iterable[tuple[str, str]]) -> str:
    """One hash for several files, given as (name, SHA-256): of the listing that `sha256sum` prints."""
    listing = "".join(f"{digest}  {name}\n" for name, digest in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def hash_file(path: str, max_bytes: int | None = None, told: Told | None = None) -> str:
    """SHA-256 of a file, or of its first `max_bytes`; `told` is called with the bytes of each block hashed."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        left = max_bytes
        while block := file.read(_BLOCK if left is None else min(_BLOCK, left)):
            digest.update(block)
            if told is not None:
                told(len(block))
            if left is not None:
                left -= len(block)
    return digest.hexdigest()


def hash_files(
    paths: Sequence[str], threads: int = 4, *, max_bytes: int | None = None, told: Told | None = None
) -> list[str]:
    """SHA-256 of each file, or of its first `max_bytes`, several at a time (hashing lets go of Python's lock)."""
    with ThreadPoolExecutor(max_workers=threads) as pool:
        return list(pool.map(lambda path: hash_file(path, max_bytes, told), paths))


def first_files(files: Iterable[SourceFile], max_bytes: int) -> list[SourceFile]:
    """The first files that together hold `max_bytes`; a Hub dataset, whose size is not known, is taken to do so."""
    taken: list[SourceFile] = []
    for file in files:
        taken.append(file)
        max_bytes -= max_bytes if file.format == "hub" else file.bytes
        if max_bytes <= 0:
            break
    return taken
