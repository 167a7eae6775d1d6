"""Files in a store behind a URL: put, get, list, delete, and whether it can be written at all.

What lives here: fsspec's door for writing, retries with back-off, and what a broken connection can raise. What must
not: what the files are, or reading text (`data/reading/remote`).

A store has names, not directories: `step-00001000/model/config.json` below the store's URL. A file is there when `put`
has returned; nothing is promised of one whose `put` was cut short, so whoever needs a whole must write a marker last.
No password, key or token of a URL is shown.
"""

from __future__ import annotations

import errno
import http.client
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from pretrain.config_types import redacted
from pretrain.files import TEMPORARY_PREFIX, make_directories, sync_directory, sync_file

ATTEMPTS = 5
FIRST_WAIT = 0.5
"""Seconds before the second attempt; each further wait is twice as long."""

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_PACKAGES |= {"webdav": "webdav4", "webdavs": "webdav4", "sftp": "paramiko", "ssh": "paramiko", "smb": "smbprotocol"}
_READ_ONLY = ("http", "https", "data", "git", "github", "gist", "zip", "tar", "libarchive", "reference", "jupyter")
_LOCAL = ("file", "local")
_WITH_DIRECTORIES = (*_LOCAL, "memory", "sftp", "ssh", "ftp", "webdav", "webdavs", "smb", "hdfs", "dbfs")
# Errors of backends that are not OSError, by where they are defined.
_FOREIGN = (
    ("botocore.exceptions", ("BotoCoreError", "ClientError")),
    ("aiohttp", ("ClientError",)),
    ("httpx", ("HTTPError",)),
    ("httpx2", ("HTTPError",)),
    ("gcsfs.retry", ("HttpError",)),
    ("google.auth.exceptions", ("GoogleAuthError",)),
    ("azure.core.exceptions", ("AzureError",)),
    ("paramiko.ssh_exception", ("SSHException",)),
    ("smbprotocol.exceptions", ("SMBException",)),
    ("webdav4.client", ("ClientError",)),
    ("ftplib", ("Error",)),
)
_NOT_MENDED = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
_Made = TypeVar("_Made")


class StoreError(OSError):
    """A store that did not do what it was asked for, however often; names the file and why."""


@dataclass(frozen=True)
class Store:
    """The files below one URL.

    Attributes:
        name: the URL, for messages, without secrets.
        filesystem: fsspec's.
        root: of the files, as the filesystem names it.
        protocol: the part of the URL before `://`.
    """

    name: str
    filesystem: Any
    root: str
    protocol: str

    @classmethod
    def at(cls, url: str) -> Self:
        """The store of a URL; nothing is asked of it yet.

        Raises:
            ValueError: when its protocol is unknown, cannot be written, or needs a package that is not here.
        """
        protocol = url.partition("://")[0] if "://" in url else "file"
        shown = redacted(url)
        if "::" in url or protocol in _READ_ONLY:
            raise ValueError(
                f"checkpoint.to: `{shown}` cannot be written: fsspec only reads {protocol}://; give a store such as "
                "s3://bucket/folder, gs://bucket/folder, webdav://host/folder or file:///folder"
            )
        import fsspec  # here alone: a run without a store needs no fsspec

        try:
            filesystem, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            package = _PACKAGES.get(protocol)
            how = f"pip install {package}" if package else redacted(str(error))
            raise ValueError(
                f"checkpoint.to: `{shown}`: {protocol}:// needs a package that is not here: {how}"
            ) from error
        except ValueError as error:
            raise ValueError(f"checkpoint.to: `{shown}`: {redacted(str(error))}; check the part before ://") from error
        return cls(shown.rstrip("/"), filesystem, str(root).rstrip("/"), protocol)

    def below(self, name: str) -> Store:
        """The store of the files whose names begin with `name/`."""
        return type(self)(f"{self.name}/{name}", self.filesystem, f"{self.root}/{name}", self.protocol)

    def put(self, name: str, path: Path) -> None:
        """Write a file over whatever is there, and see that all of it has come.

        Raises:
            StoreError: when it could not be written.
        """

        def send(target: str) -> None:
            self.filesystem.put_file(str(path), target)
            self.filesystem.invalidate_cache()
            size, wanted = self.filesystem.info(target).get("size"), path.stat().st_size
            if size is not None and int(size) != wanted:
                raise OSError(f"{size:,} bytes lie there, {wanted:,} were sent")

        self._persevere(lambda: self._publish(name, send), name, "written")

    def put_bytes(self, name: str, data: bytes) -> None:
        """Write a small file over whatever is there.

        Raises:
            StoreError: when it could not be written.
        """
        send = lambda target: self.filesystem.pipe_file(target, data)  # noqa: E731
        self._persevere(lambda: self._publish(name, send), name, "written")

    def get(self, name: str, path: Path) -> None:
        """Copy a file to a local path, whose directory is made.

        Raises:
            StoreError: when it could not be read.
        """
        make_directories(path.parent)
        self._persevere(lambda: self.filesystem.get_file(self._path(name), str(path)), name, "read")

    def read(self, name: str) -> bytes | None:
        """A small file; None when it is not there.

        Raises:
            StoreError: when it could not be read.
        """

        def bring() -> bytes | None:
            self.filesystem.invalidate_cache()
            try:
                return bytes(self.filesystem.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

        return self._persevere(bring, name, "read")

    def list(self) -> list[str]:
        """The names of all files, sorted.

        Raises:
            StoreError: when it could not be asked.
        """

        def ask() -> list[str]:
            self.filesystem.invalidate_cache()
            try:
                found = self.filesystem.find(self.root)
            except FileNotFoundError:
                return []
            start = self.root.lstrip("/") + "/"
            return sorted(path.lstrip("/").removeprefix(start) for path in found if path.lstrip("/").startswith(start))

        return self._persevere(ask, "", "listed")

    def delete(self, name: str) -> None:
        """Remove a file; one that is not there is no error.

        Raises:
            StoreError: when it could not be removed.
        """

        def remove() -> None:
            try:
                self.filesystem.rm_file(self._path(name))
            except FileNotFoundError:
                return
            if self.protocol in _LOCAL:  # what is removed after it must not be gone before it
                sync_directory(Path(self._path(name)).parent)

        self._persevere(remove, name, "removed")

    def probe(self) -> None:
        """Write a file, read it, and remove it.

        Raises:
            ValueError: when that does not work; names the store, why, and the remedy.
        """
        name, data = f".probe-{uuid.uuid4().hex[:12]}", b"pretrain"
        try:
            self.put_bytes(name, data)
            found = self.read(name)
            self.delete(name)
        except (StoreError, NotImplementedError) as error:
            raise ValueError(
                f"checkpoint.to: `{self.name}` cannot be used ({error}); check the URL, and the credentials that its "
                "storage looks for, such as AWS_ACCESS_KEY_ID or GOOGLE_APPLICATION_CREDENTIALS"
            ) from error
        if found != data:
            raise ValueError(f"checkpoint.to: `{self.name}` does not give back what was written to it; give another")

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _publish(self, name: str, send: Callable[[str], None]) -> None:
        """Let `send` write a file. A directory's old file stays until the new one is whole and on the disk."""
        target = self._path(name)
        if self.protocol not in _LOCAL:
            if self.protocol in _WITH_DIRECTORIES:
                self.filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            send(target)
            return
        path = Path(target)
        temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
        make_directories(path.parent)
        try:
            send(str(temporary))
            sync_file(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)

    def _persevere(self, attempt: Callable[[], _Made], name: str, what: str) -> _Made:
        """Try up to `ATTEMPTS` times; what another attempt would not mend is raised at once."""
        for number in range(ATTEMPTS):
            try:
                return attempt()
            except connection_errors() as error:
                full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
                if isinstance(error, _NOT_MENDED) or full or number + 1 == ATTEMPTS:
                    where = f"{self.name}/{name}".rstrip("/")
                    reason = redacted(" ".join(str(error).split())) or type(error).__name__
                    raise StoreError(f"`{where}` could not be {what}: {reason}") from error
            time.sleep(FIRST_WAIT * 2**number)
        raise AssertionError("the last attempt returns or raises")


def connection_errors() -> tuple[type[BaseException], ...]:
    """What a broken connection can raise, of the libraries that are loaded."""
    foreign = [
        getattr(sys.modules[module], name)
        for module, names in _FOREIGN
        if module in sys.modules
        for name in names
        if hasattr(sys.modules[module], name)
    ]
    return OSError, EOFError, http.client.HTTPException, *foreign
