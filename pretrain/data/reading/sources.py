"""Which files a configuration names: paths, directories, globs, URLs, Hub datasets, embedded corpora.

What lives here: names to files, formats by suffix, digests of inputs. What must not: reading documents out of them, or
what is in an embedded corpus (`embedded`).
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from rich.console import Console

from pretrain.config_data import Source
from pretrain.config_types import redacted
from pretrain.data.reading import remote
from pretrain.data.reading.embedded import EMBEDDED, STDLIB, stdlib_corpus
from pretrain.files import ArtifactError, is_below, read_manifest, sha256_file

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
_TOKEN_FORMATS = {".bin": "bin", ".ds": "ds"}
TOKEN_FORMATS = ("bin", "ds", "megatron")
"""Files of ready ids: nanoGPT's, llm.c's (bin), Megatron's (bin beside an idx), datatrove's, nanotron's, ours (ds)."""
_COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".xz": "xz"}
_BLOCK = 1 << 20

Told = Callable[[int], None]
"""Called, from any thread, with the number of bytes that were hashed since the last call."""


@dataclass(frozen=True)
class SourceFile:
    """One input file.

    `name` is how people see it (the path as it was given, a URL without its secrets); `entry` is the line of the
    configuration that it came from, `source` the name of its `Source` (empty when it has none), `bytes` its size on the
    disk. Of a remote file `path` is where its copy lies once it is fetched, and `version` tells one content of it from
    another. `encoding` is what the configuration says of its text.
    """

    name: str
    path: str
    format: str
    bytes: int
    compression: str | None = None
    entry: str = ""
    source: str = ""
    version: str = ""
    encoding: str = "auto"

    @property
    def beside(self) -> str | None:
        """The path of the index that belongs to a file of ready ids, if its format has one."""
        if self.format == "megatron":
            return self.path.removesuffix(".bin") + ".idx"
        return self.path + ".index" if self.format == "ds" else None


def resolve_sources(
    entries: Sequence[str | Source], *, key: str = "data.train", encoding: str = "auto", download: bool = True
) -> list[SourceFile]:
    """Turn `data.train`, or a list like it, into files, in the order of the list (sorted within an entry).

    `encoding` is that of entries that name none of their own. Remote files are downloaded into the cache, unless
    `download` is false: then `fetch_files` must come before reading.

    Raises:
        ValueError: for an entry that names nothing, a file of unknown format, a file that comes twice, or one that
            cannot be downloaded; names `key` or the URL.
    """
    files: list[SourceFile] = []
    for entry in entries:
        names, source, own = (
            (entry.files, entry.name, entry.encoding) if isinstance(entry, Source) else ((entry,), "", None)
        )
        for name in names:
            files.extend(replace(file, encoding=own or encoding) for file in _resolve(name, source, key))
    refuse_repeated(files, key)
    if download:
        fetch_files(files)
    return files


def fetch_files(files: Iterable[SourceFile], console: Console | None = None) -> None:
    """Download the remote files that the cache does not have; a bar on `console` shows how far it is.

    Raises:
        ValueError: when one cannot be had whole; names the URL.
    """
    paths = [path for file in files if file.version for path in (file.path, file.beside) if path is not None]
    remote.fetch(paths, console)


def state_of(file: SourceFile) -> str:
    """What changes with a file's content and is cheap to ask: size and time here, the server's version elsewhere."""
    if file.version:
        return file.version
    return state_here([path for path in (file.path, file.beside) if path is not None])


def state_here(paths: Iterable[str]) -> str:
    """Sizes and times of files on this machine."""
    return " ".join(f"{status.st_size} {status.st_mtime_ns}" for status in map(os.stat, paths))


def with_index(path: str) -> list[str]:
    """The path of a file, and that of the index beside it when it is one of ready ids."""
    index = path.removesuffix(".bin") + ".idx" if path.endswith(".bin") else path + ".index"
    return [path, index] if path.endswith((".bin", ".ds")) and os.path.exists(index) else [path]


def refuse_repeated(files: Iterable[SourceFile], key: str) -> None:
    """Raise ValueError when two entries name the same file: it would be read twice, or trained on and held out."""
    seen: dict[str | tuple[int, int], SourceFile] = {}
    for file in files:
        identity: str | tuple[int, int] = file.path
        if file.format != "hub" and not file.version:
            status = os.stat(file.path)
            identity = (status.st_dev, status.st_ino)
        if (other := seen.setdefault(identity, file)) is not file:
            raise ValueError(f"{key}: `{file.name}` comes twice, from `{other.entry}` and `{file.entry}`; remove one")


def _resolve(entry: str, source: str, key: str) -> list[SourceFile]:
    if entry in EMBEDDED:
        return [
            SourceFile(f"{entry}/{name}", str(path), "txt", path.stat().st_size, None, entry, source)
            for name, path in EMBEDDED[entry]()
        ]
    if entry.startswith(HUB_PREFIX):
        if not is_below(entry.removeprefix(HUB_PREFIX).partition(":")[0]):
            raise ValueError(f"{key}: `{entry}` is no name on the Hub; a directory is named without `{HUB_PREFIX}`")
        return [SourceFile(entry, entry.removeprefix(HUB_PREFIX), "hub", 0, None, entry, source)]
    if remote.is_url(entry):
        return _remote_files(entry, source, key)
    path = Path(remote.local_path(entry)).expanduser()
    if path.is_dir():
        if _is_prepared(path):
            raise ValueError(f"{key}: `{entry}` holds prepared shards, not text; give data.from: {entry} instead")
        found = [_source_file(inner, entry, source, key) for inner in _known_files_below(path)]
        if not found:
            known = ", ".join(_FORMATS)
            raise ValueError(
                f"{key}: the directory `{entry}` holds no file of a known format ({known}; .gz .zst .xz; .bin with "
                ".idx, .ds with .ds.index; a .bin alone must be named itself)"
            )
        return found
    if path.is_file():
        return [_source_file(str(path), entry, source, key)]
    matches = sorted(match for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
    matches = [match for match in matches if len(matches) == 1 or not _is_index(match)]
    if not matches:
        raise ValueError(
            f"{key}: `{entry}` names no file, directory, glob, hub:NAME, {' or '.join(EMBEDDED)}; check the path"
        )
    return [_source_file(match, entry, source, key) for match in matches]


def _is_prepared(directory: Path) -> bool:
    try:
        read_manifest(directory, "data")
    except ArtifactError:
        return False
    return True


def _known_files_below(directory: Path) -> list[str]:
    """Files of a known format in a directory and those in it, hidden ones left out, sorted by relative path."""
    found: list[str] = []
    for folder, inner, names in os.walk(directory):
        inner[:] = [name for name in inner if not name.startswith(".")]
        visible = (
            name
            for name in names
            if not name.startswith(".") and _is_data(name, lambda other: other in names)  # noqa: B023 (used at once)
        )
        found.extend(os.path.join(folder, name) for name in visible)
    return sorted(found)


def _is_index(name: str) -> bool:
    return name.endswith((".idx", ".ds.index", ".ds.metadata"))


def _is_data(name: str, exists: Callable[[str], bool]) -> bool:
    """Whether a file that was not named itself is to be read: a `.bin` may be anything, so its index must be there."""
    file_format = _format_of(name, exists)[0]
    if file_format in TOKEN_FORMATS:
        return exists(name.removesuffix(".bin") + ".idx" if file_format == "megatron" else name + ".index")
    return file_format is not None


def _format_of(path: str, exists: Callable[[str], bool] = os.path.exists) -> tuple[str | None, str | None]:
    """Format and compression by suffix; None for a format that is not known."""
    stem, suffix = os.path.splitext(path)
    compression = _COMPRESSIONS.get(suffix.lower())
    if suffix == ".bin" and exists(stem + ".idx"):
        return "megatron", None
    inner = os.path.splitext(stem)[1] if compression else suffix
    return _FORMATS.get(inner.lower(), None if compression else _TOKEN_FORMATS.get(suffix)), compression


def _known_format(name: str, key: str, exists: Callable[[str], bool] = os.path.exists) -> tuple[str, str | None]:
    """As `_format_of`.

    Raises:
        ValueError: when it is of none, or its index is missing.
    """
    file_format, compression = _format_of(name, exists)
    if file_format is None or (file_format == "parquet" and compression):
        known = ", ".join((*_FORMATS, *_TOKEN_FORMATS))
        raise ValueError(
            f"{key}: `{name}` is of no known format; known are {known}, and all text but parquet with .gz, .zst or "
            ".xz; give the file one of these suffixes"
        )
    if file_format == "ds" and not exists(name + ".index"):
        raise ValueError(f"{key}: `{name}` has no `{name}.index` beside it, which says where its documents end")
    return file_format, compression


def _source_file(path: str, entry: str, source: str, key: str) -> SourceFile:
    file_format, compression = _known_format(path, key)
    return SourceFile(path, path, file_format, os.stat(path).st_size, compression, entry, source)


def _remote_files(entry: str, source: str, key: str) -> list[SourceFile]:
    """The files of a URL: itself, those below it, or those that it matches."""
    try:
        found = remote.find(entry)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    listed = {_path_of(each.name): each for each in found}
    alone = len(found) == 1
    if not alone:
        found = [each for each in found if _is_data(_path_of(each.name), listed.__contains__)]
    if not found:
        raise ValueError(f"{key}: `{redacted(entry)}` holds no file of a known format ({', '.join(_FORMATS)})")
    return [_remote_file(each, listed, redacted(entry), source, key) for each in found]


def _path_of(url: str) -> str:
    return urlsplit(url).path


def _remote_file(
    file: remote.Remote, listed: Mapping[str, remote.Remote], entry: str, source: str, key: str
) -> SourceFile:
    """One remote file; the index of a file of ready ids is looked for beside it."""
    path = _path_of(file.name)
    indices: dict[str, remote.Remote] = {}

    def exists(other: str) -> bool:
        if other not in listed:
            parts = urlsplit(file.url or file.name)
            try:
                indices[other] = remote.find(urlunsplit(parts._replace(path=other)))[0]
            except (remote.GoneError, remote.RefusedError):  # storage may hide what is missing behind a refusal
                return False
        else:
            indices[other] = listed[other]
        return True

    file_format, compression = _known_format(path, key, exists)
    place = str(remote.place(file, *indices.values()))
    version = os.path.basename(os.path.dirname(place))
    if file.size is None:
        remote.fetch([place])
    size = file.size if file.size is not None else os.path.getsize(place)
    return SourceFile(file.name, place, file_format, size, compression, entry, source, version=version)


# --- digests ----------------------------------------------------------------------------------------------------------


def corpus_digest() -> str:
    """SHA-256 over the names and contents of `python-stdlib`: two machines with the same one have the same text."""
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


def hash_with_index(paths: Sequence[str], max_bytes: int | None = None, told: Told | None = None) -> str:
    """SHA-256 of a file, as `hash_file`; with an index behind it, of both digests."""
    digests = [hash_file(path, max_bytes, told) for path in paths]
    return digests[0] if len(digests) == 1 else digest_of_files(zip(("ids", "index"), digests, strict=True))


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
