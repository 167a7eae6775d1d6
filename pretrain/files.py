"""Files that are whole or not there: atomic directories, hashing writers, manifests, safetensors.

What lives here: bytes in, digest out. What must not: torch, or any knowledge of what the bytes mean.

An artifact is a directory with a `manifest.json`. It is written under a temporary name beside its final one, every
file and directory is flushed to the disk, and one rename publishes it. A reader never sees half of one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import IO, Any, ParamSpec, Self, TypeVar

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
LOCK = ".lock"
_CHECKSUM = "checksum"  # of all else that a manifest says
_BLOCK = 1 << 20


class ArtifactError(ValueError):
    """An artifact that is missing, incomplete, altered or made for something else; names the path and the remedy."""


class HashingWriter:
    """A binary file that hashes what it is given before the disk sees it (SHA-256).

    Used as a context manager; `digest` and `size` hold after closing. The file is flushed to the disk on close.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        self._file: IO[bytes] = path.open("wb")

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`."""
        self._hash.update(data)
        self._file.write(data)
        self.size += data.nbytes if isinstance(data, memoryview) else len(data)

    @property
    def digest(self) -> str:
        """SHA-256 of everything written so far, in hexadecimal."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Flush to the disk and close."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            with suppress(OSError):  # a full disk fails the rest of the buffer too; the first error tells more
                self._file.close()


def write_bytes(path: Path, data: bytes) -> str:
    """Write one file, flushed to the disk; return its SHA-256."""
    with HashingWriter(path) as writer:
        writer.write(data)
    return writer.digest


def write_json(path: Path, value: Any) -> str:
    """Write plain data as JSON (readable, keys in order, final newline); return its SHA-256."""
    return write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def replace_file(path: Path, data: bytes) -> None:
    """Write one file so that a reader sees the old bytes or the new ones, never a mixture."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        write_bytes(temporary, data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def update_file(path: Path, data: bytes) -> None:
    """Like `replace_file`, but a file that holds these bytes already is not touched."""
    if not path.is_file() or path.read_bytes() != data:
        replace_file(path, data)


def make_directories(path: Path) -> None:
    """Make a directory and its parents where they are missing, each flushed to the disk in the one that holds it."""
    if not path.is_dir():
        make_directories(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Flush to the disk what somebody else has written into a file."""
    _sync(path)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk, so that a rename survives a power loss."""
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def commit_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Make a directory all at once: yields a temporary one beside `path`, renamed to `path` on success.

    Files must be flushed by whoever wrote them (`HashingWriter` does). On an error the temporary directory is
    removed and `path` is as it was. With `replace`, an existing `path` is moved aside first and removed last.

    Raises:
        ArtifactError: when `path` exists and `replace` is not given.
    """
    if path.exists() and not replace:
        raise ArtifactError(f"`{path}` exists already; choose another name, or remove it")
    make_directories(path.parent)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
    aside: Path | None = None
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, _ in os.walk(temporary):
            sync_directory(Path(folder))
        if replace and path.exists():
            aside = path.with_name(f"{TEMPORARY_PREFIX}old-{path.name}-{uuid.uuid4().hex[:8]}")
            path.rename(aside)
            sync_directory(path.parent)
        temporary.rename(path)
    except BaseException:
        if aside is not None and aside.exists() and not path.exists():
            aside.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)  # what is left of it is removed by `remove_leftovers`


_owned: set[Path] = set()  # directories that this process owns


@contextmanager
def lock_directory(path: Path) -> Iterator[None]:
    """Own a directory while the block runs; the lock goes with the process, however it ends.

    A block inside a block of the same process owns it already. The lock is a kernel's lock (flock) on `.lock`, which
    says who holds it; a file that a killed process left behind locks nothing. It is removed at the end, and so is the
    directory when nothing was put into it.

    Raises:
        ArtifactError: when another process owns it; names the process and the machine.
    """
    path = path.resolve()
    if path in _owned:
        yield
        return
    descriptor = _take_lock(path)
    _owned.add(path)
    try:
        yield
    finally:
        _owned.discard(path)
        if _is_file(descriptor, path / LOCK):
            (path / LOCK).unlink()
            with suppress(OSError):
                path.rmdir()  # refuses what is not empty
        os.close(descriptor)


Given = ParamSpec("Given")
Made = TypeVar("Made")


def owning_directory(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """Let a function own the directory of its first argument, `config`, while it works."""

    @wraps(function)
    def owner(*arguments: Given.args, **keywords: Given.kwargs) -> Made:
        config: Any = arguments[0] if arguments else keywords["config"]
        with lock_directory(config.directory):
            return function(*arguments, **keywords)

    return owner


def _take_lock(path: Path) -> int:
    """Lock `.lock` in `path`, write into it who we are, and return its descriptor."""
    lock = path / LOCK
    while True:
        make_directories(path)
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # its last owner has just removed the directory
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise ArtifactError(f"{holder} works in `{path}`; wait for it or stop it, or give another name=") from None
        if _is_file(descriptor, lock):  # and not one that its last owner removed between our two calls
            with suppress(OSError):  # on a full disk the lock holds all the same
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that lies at `path` now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def remove_leftovers(parent: Path) -> list[Path]:
    """Remove temporary entries that a killed process left in `parent`; return what was removed."""
    leftovers = sorted(parent.glob(f"{TEMPORARY_PREFIX}*")) if parent.is_dir() else []
    for entry in leftovers:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
    return leftovers


def bytes_in(directory: Path) -> int:
    """Bytes of all the files in a directory and in those below it."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of plain data, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


# --- manifests ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, what it was made from, and the digest of every file in it."""

    kind: str
    config: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    code_version: str = ""

    @property
    def digest(self) -> str:
        """One hash for the artifact: of what is in it, whoever made it and whenever."""
        return sha256_json({"kind": self.kind, "files": self.files, "format_version": self.format_version})


def write_manifest(
    directory: Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write `manifest.json`. `files` maps names to digests; files left out of it are hashed from the disk.

    `config` is the part of the configuration that decides the artifact, `inputs` the digests of what it was made
    from, `facts` what was found out on the way (counts, sizes).
    """
    from pretrain import __version__

    digests = dict(files or {})
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in digests and name != MANIFEST:
            digests[name] = sha256_file(path)
    manifest = Manifest(
        kind=kind,
        config=dict(config),
        inputs=dict(inputs or {}),
        files=dict(sorted(digests.items())),
        facts=dict(facts or {}),
        code_version=__version__,
    )
    write_bytes(directory / MANIFEST, manifest_bytes(manifest))
    return manifest


def manifest_bytes(manifest: Manifest) -> bytes:
    """A manifest as it lies on the disk, with the SHA-256 of what it says."""
    plain = json.loads(json.dumps(manifest.__dict__))
    return (json.dumps({**plain, _CHECKSUM: sha256_json(plain)}, indent=2, ensure_ascii=False) + "\n").encode()


def read_manifest(directory: Path, kind: str) -> Manifest:
    """Read the manifest of an artifact of the given kind.

    Raises:
        ArtifactError: when it is missing, unreadable, altered, of another kind, or of another format version.
    """
    path = directory / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        checksum = raw.pop(_CHECKSUM, None) if isinstance(raw, dict) else None
        manifest = Manifest(**raw)
        for part in (manifest.config, manifest.inputs, manifest.files, manifest.facts):
            if not isinstance(part, dict):
                raise TypeError(f"{part!r} stands where entries by name should")
        for name in manifest.files:
            if not is_below(name):
                raise TypeError(f"{name!r} names no file below the directory")
    except FileNotFoundError:
        raise ArtifactError(f"`{directory}` holds no {kind}: {MANIFEST} is missing; make it first") from None
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"`{path}` cannot be read ({error}); make the {kind} again") from error
    if manifest.kind != kind:
        raise ArtifactError(f"`{directory}` holds a {manifest.kind}, not a {kind}; give the right directory")
    if manifest.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"`{directory}` has format version {manifest.format_version}, this version reads {FORMAT_VERSION}; "
            f"make the {kind} again"
        )
    if checksum is not None and checksum != sha256_json(raw):
        raise ArtifactError(
            f"`{path}` was altered: its SHA-256 is {sha256_json(raw)}, and was {checksum} when it was written; make "
            f"the {kind} again"
        )
    return manifest


def is_below(name: str) -> bool:
    """Whether a name leads to a file below the directory it is taken in: a manifest may come from anywhere."""
    return "\0" not in name and all(part not in ("", ".", "..") for part in name.split("/"))


def check_inside(path: Path) -> None:
    """Refuse a file that is a link to somewhere outside its directory: what it leads to is not what was given.

    A snapshot of the Hub's cache, whose files are links to the blobs of its own repository, is inside.

    Raises:
        ArtifactError: names the link and where it leads.
    """
    if not path.is_symlink():
        return
    directory, target = path.parent.resolve(), path.resolve()
    homes = [directory]
    if directory.parent.name == "snapshots":
        homes.append(directory.parent.parent / "blobs")
    if not any(target.is_relative_to(home) for home in homes):
        raise ArtifactError(f"`{path}` is a link that leads outside, to `{target}`; copy the file into the directory")


def verify_manifest(directory: Path, manifest: Manifest) -> None:
    """Read every file of an artifact and compare digests.

    Raises:
        ArtifactError: names the first file that is missing or altered.
    """
    for name, digest in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise ArtifactError(f"`{path}` is missing from the {manifest.kind}")
        if sha256_file(path) != digest:
            raise ArtifactError(f"`{path}` was altered: its SHA-256 is not the manifest's")


# --- safetensors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorBytes:
    """A tensor as safetensors holds it: dtype by the format's name (`F32`, `BF16`, `I64`, ...), shape, raw bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def nbytes(self) -> int:
        """How many bytes `data` holds."""
        return self.data.nbytes


@dataclass(frozen=True)
class LateBytes:
    """A tensor whose bytes are made, or brought, when it is their turn to be written, and let go after.

    Attributes:
        dtype: by the format's name.
        shape: of the tensor.
        nbytes: how many bytes there will be.
        make: gives them.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    make: Callable[[], memoryview]

    @property
    def data(self) -> memoryview:
        """The bytes, made anew each time."""
        return self.make()


def write_safetensors(
    path: Path, tensors: Iterable[tuple[str, TensorBytes | LateBytes]], metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors in the safetensors format, hashing the memory that is written; return the file's SHA-256.

    The header needs names and shapes alone: with `LateBytes` one tensor's bytes are held at a time.

    Source: the safetensors format (8 bytes header length, JSON header, little-endian tensors one after another).
    """
    entries = list(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in entries:
        size = tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with HashingWriter(path) as writer:
        writer.write(len(encoded).to_bytes(8, "little"))
        writer.write(encoded)
        for name, tensor in entries:
            data = tensor.data
            assert data.nbytes == tensor.nbytes, name
            flat = data.cast("B") if data.nbytes else memoryview(b"")
            for start in range(0, flat.nbytes, _BLOCK):
                writer.write(flat[start : start + _BLOCK])
    return writer.digest
