"""Files behind URLs: what lies there now, and a local copy of it that is whole or not there.

What lives here: listing, the state of a remote file, downloads, the cache. What must not: what is in a file. This is
fsspec's door for reading (`pretrain.stores` writes); http and https go through Python's own urllib, so that they need
no further package.

The cache is `$PRETRAIN_CACHE`, or `pretrain` in `$XDG_CACHE_HOME` or `~/.cache`. A copy lies in
`remote/KEY/VERSION/NAME`: KEY is a hash of the URL, VERSION one of the size, the entity tag or checksum, and the time
of change that the server gives, so that another content is another copy. Copies are shared by all runs; old ones stay
until somebody removes them. A download is written under a temporary name, goes on where it broke off when the file has
a tag or a time, and is renamed once its size is right. It is given up after `ATTEMPTS` attempts in a row that brought
nothing. Where a server cannot be reached, or `PRETRAIN_OFFLINE=1` is set, the last known copy is used.

Names are as `redacted` gives them: no password, key, token or signature of a URL is written to a file or a message.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

import fsspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from pretrain.config_types import redacted
from pretrain.files import ArtifactError, replace_file, sha256_json, sync_directory
from pretrain.stores import connection_errors

ATTEMPTS = 5
FIRST_WAIT = 0.5
"""Seconds before the second attempt; each further wait is twice as long."""
_TIMEOUT = 60.0
_BLOCK = 1 << 20
_THREADS = 8
_REMEMBERED = 20.0  # seconds that a file's state is not asked for again
_HTTP = ("http", "https")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
# What a filesystem tells of a file that changes with its content, by the names that its backends use.
_TAGS = ("etag", "ETag", "md5Hash", "md5", "checksum", "generation", "blob_id", "oid", "sha", "xet_hash")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Remote:
    """A remote file as it is now. `url` may hold secrets and is never written, `name` is the one that is shown.

    `size` in bytes, None where the server does not say. `facts` are its tags, or its times where it has no tag.
    """

    name: str
    size: int | None
    facts: dict[str, str]
    url: str = field(default="", repr=False)

    @property
    def version(self) -> str:
        """Another content has another one, as far as the server tells."""
        return sha256_json([self.size, self.facts])[:16]

    def is_same(self, other: Remote) -> bool:
        """Whether the two are one content; a listing may say less of it, or more, than a single question."""
        common = self.facts.keys() & other.facts.keys()
        sizes = self.size == other.size or None in (self.size, other.size)
        return sizes and all(self.facts[key] == other.facts[key] for key in common)


class GoneError(ValueError):
    """There is no such file."""


class RefusedError(ValueError):
    """The server does not give it with these credentials."""


_listings: dict[str, tuple[float, list[Remote]]] = {}  # listings, by URL: when they were asked for
_downloads: dict[Path, Remote] = {}  # what belongs at a place of the cache
_unreachable: set[str] = set()  # servers that did not answer: their other files are not waited for again


def is_url(entry: str) -> bool:
    """Whether an entry of the configuration is a URL; a `file://` one is a path."""
    return "://" in entry and not entry.startswith("file://")


def below(url: str, name: str) -> str:
    """The URL of what is called `name` in the directory of a URL."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def local_path(entry: str) -> str:
    """A path, out of `file:///path` too."""
    return unquote(entry.removeprefix("file://")) if entry.startswith("file://") else entry


def cache_directory() -> Path:
    """Where copies lie."""
    if given := os.environ.get("PRETRAIN_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pretrain"


def find(url: str) -> list[Remote]:
    """The file of a URL, the files below a directory, or those that a glob matches; sorted by name.

    Raises:
        ValueError: when there is nothing (`GoneError`), the server refuses, a package is missing, or neither the
            server nor a copy can be had; names the URL and the remedy.
    """
    known = _listings.get(url)
    if known is not None and time.monotonic() - known[0] < _REMEMBERED:
        return known[1]
    record = cache_directory() / "listings" / f"{_key(url)}.json"
    server = "/".join(url.split("/", 3)[:3])
    offline = os.environ.get("PRETRAIN_OFFLINE") == "1"
    try:
        if offline or (server in _unreachable and record.is_file()):
            raise ConnectionError("PRETRAIN_OFFLINE=1" if offline else "the server did not answer before")
        found = sorted(_persevere(lambda: _list(url), redacted(url)), key=lambda remote: remote.name)
    except GoneError:
        _remember(record, [])
        raise
    except connection_errors() as error:
        found = _last_known(url, record, error)
        _unreachable.add(server)
    else:
        _remember(record, found)
    _listings[url] = time.monotonic(), found
    return found


def place(remote: Remote, *beside: Remote) -> Path:
    """Where a file's copy belongs; the files `beside` it (an index, say) belong in the same folder."""
    version = sha256_json([each.version for each in (remote, *beside)])[:16] if beside else remote.version
    folder = cache_directory() / "remote" / _key(remote.name) / version
    for each in (remote, *beside):
        _downloads[folder / _basename(each.name)] = each
    return folder / _basename(remote.name)


def fetch(paths: Sequence[str | Path], console: Console | None = None) -> None:
    """Download what is missing of the places that `place` gave; others are left alone.

    Raises:
        ValueError: when a download fails; names the URL.
    """
    wanted = [(Path(path), _downloads[Path(path)]) for path in paths if Path(path) in _downloads]
    missing = [(path, remote) for path, remote in wanted if not path.is_file()]
    if not missing:
        return
    columns = (TextColumn("downloading {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    quiet = console is None or not console.is_terminal
    with Progress(*columns, console=console, disable=quiet, transient=True) as bar:
        task = bar.add_task(f"{len(missing)} files", total=sum(remote.size or 0 for _, remote in missing) or None)
        with ThreadPoolExecutor(max_workers=_THREADS) as pool:
            jobs = [
                pool.submit(_download, remote, path, lambda size: bar.advance(task, size)) for path, remote in missing
            ]
            try:
                for job in jobs:
                    job.result()
            finally:
                for job in jobs:
                    job.cancel()


# --- the cache ------------------------------------------------------------------------------------------------------


def _key(url: str) -> str:
    return hashlib.sha256(redacted(url).encode()).hexdigest()[:32]


def _basename(name: str) -> str:
    return unquote(urlsplit(name).path).rstrip("/").rpartition("/")[2] or "file"


def _remember(record: Path, found: list[Remote]) -> None:
    plain = [{key: value for key, value in asdict(each).items() if key != "url"} for each in found]
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        replace_file(record, json.dumps(plain).encode())
    except OSError as error:  # a cache that others filled may be for reading alone
        _log.debug("%s cannot be written (%s)", record, error)


def _last_known(url: str, record: Path, error: BaseException) -> list[Remote]:
    """What was there when the server last answered.

    Raises:
        ValueError: when it never did.
    """
    name = redacted(url)
    if not record.is_file():
        raise ValueError(
            f"`{name}` cannot be reached ({_reason(error)}), and `{cache_directory()}` has no copy of it; check the "
            "URL, the connection and the credentials"
        ) from None
    if os.environ.get("PRETRAIN_OFFLINE") != "1":
        _log.warning("%s cannot be reached (%s); what is in the cache is used", name, _reason(error))
    found = [Remote(**entry) for entry in json.loads(record.read_text(encoding="utf-8"))]
    if not found:
        raise GoneError(f"`{name}` named no file when its server was last reached; check the URL")
    return found


def _download(remote: Remote, path: Path, told: Callable[[int], object]) -> None:
    """Bring one file to its place, once, whoever else wants it too."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(error) from error
    part = path.with_name(f".{path.name}.part")
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            return
        if not remote.url or os.environ.get("PRETRAIN_OFFLINE") == "1":
            raise ValueError(f"`{remote.name}` cannot be reached, and the cache has no copy of it; go online once")
        if not remote.facts:
            part.unlink(missing_ok=True)
        best = failures = 0
        while True:
            try:
                _continue(remote, part, told)
                break
            except connection_errors() as error:
                _refuse_for_good(remote.name, error)
                reached = part.stat().st_size if part.is_file() else 0
                failures = 1 if reached > best else failures + 1
                best = max(best, reached)
                if failures >= ATTEMPTS:
                    raise ValueError(
                        f"`{remote.name}` could not be downloaded: {ATTEMPTS} attempts in a row brought nothing more "
                        f"than {best:,} bytes of {_shown(remote.size)} ({_reason(error)}); check the connection and "
                        "the server, and run the same command again"
                    ) from error
                time.sleep(FIRST_WAIT * 2 ** (failures - 1))
        part.replace(path)
        sync_directory(path.parent)


def _continue(remote: Remote, part: Path, told: Callable[[int], object]) -> None:
    """Append what is missing of a file, and check its size.

    Raises:
        OSError: when the connection broke; what came so far stays.
        ValueError: when it is another file by now, or the disk cannot hold it.
    """
    start = part.stat().st_size if part.is_file() else 0
    if start and start == remote.size:
        return
    if remote.size is not None and start > remote.size:
        start = 0
    with _opened(remote, start) as (stream, begin), _written(part, begin) as file:
        size = begin
        while block := stream.read(_BLOCK):
            try:
                file.write(block)
            except OSError as error:
                raise _unwritable(error) from error
            size += len(block)
            told(len(block))
    if remote.size is None or size == remote.size:
        return
    if size > remote.size:
        part.unlink()
    raise ConnectionError(f"{size:,} bytes came of {remote.size:,}")


@contextmanager
def _written(part: Path, begin: int) -> Iterator[IO[bytes]]:
    with part.open("r+b" if begin else "wb") as file:
        file.truncate(begin)
        file.seek(begin)
        try:
            yield file
        finally:
            file.flush()
            os.fsync(file.fileno())


# --- servers --------------------------------------------------------------------------------------------------------


def _list(url: str) -> list[Remote]:
    """What a URL names; `GoneError` when nothing."""
    if urlsplit(url).scheme in _HTTP:
        if "*" in urlsplit(url).path:
            raise ValueError(f"`{redacted(url)}`: a web server lists no files; name each of them")
        with _http(url, {}) as response:
            return [_of_headers(url, response)]
    filesystem, path = _filesystem(url)
    bare = url.rstrip("/")
    prefix = bare.removesuffix(path) if bare.endswith(path) else url.partition("://")[0] + "://"
    filesystem.invalidate_cache()
    try:
        info = filesystem.info(path)
        found = {path: info} if info["type"] == "file" else filesystem.find(path, detail=True)
    except FileNotFoundError:
        found = filesystem.glob(path, detail=True) if any(character in path for character in "*?[") else {}
    files = [_of_info(prefix + name, info) for name, info in found.items() if info["type"] == "file"]
    if not files:
        raise GoneError(f"`{redacted(url)}` names no file; check the URL")
    return files


def _of_info(url: str, info: dict[str, Any]) -> Remote:
    facts = {key: str(info[key]) for key in _TAGS if info.get(key)}
    if not facts:
        facts = {key: _time(info[key]) for key in _TIMES if info.get(key) is not None}
    size = None if info.get("size") is None else int(info["size"])
    return Remote(redacted(url), size, facts, url)


def _time(value: Any) -> str:
    """A time as one text, whichever way a backend gives it."""
    seconds = value.timestamp() if isinstance(value, datetime) else value
    return f"{seconds:.3f}" if isinstance(seconds, int | float) else str(seconds)


def _of_headers(url: str, response: http.client.HTTPResponse) -> Remote:
    length, ranges = response.headers["Content-Length"], response.headers["Content-Range"]
    if ranges is not None:
        length = ranges.rpartition("/")[2]
    size = int(length) if length is not None and length.isdigit() else None
    facts = {key: response.headers[key] for key in ("ETag", "Last-Modified") if response.headers[key]}
    return Remote(redacted(url), size, facts, url)


@contextmanager
def _opened(remote: Remote, start: int) -> Iterator[tuple[Any, int]]:
    """The file's bytes from `start`, or from wherever the server begins: (stream, begin).

    Raises:
        ValueError: when it is another file by now.
    """
    changed = f"`{remote.name}` changed while it was read; run the same command again"
    if urlsplit(remote.url).scheme in _HTTP:
        with _http(remote.url, {"Range": f"bytes={start}-"} if start else {}) as response:
            begin = start if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
            if not remote.is_same(_of_headers(remote.url, response)):
                raise ValueError(changed)
            yield response, begin
        return
    filesystem, path = _filesystem(remote.url)
    filesystem.invalidate_cache()
    if not remote.is_same(_of_info(remote.url, filesystem.info(path))):
        raise ValueError(changed)
    with filesystem.open(path, "rb") as stream:
        if start:
            stream.seek(start)
        yield stream, start


def _filesystem(url: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0]
    if "::" in url:
        raise ValueError(f"`{redacted(url)}`: chained URLs are not read; unpack the file and name what is in it")
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        how = f"pip install {package}" if package else redacted(str(error))
        raise ValueError(f"`{redacted(url)}`: {protocol}:// needs a package that is not here: {how}") from error
    except ValueError as error:
        raise ValueError(f"`{redacted(url)}`: {redacted(str(error))}; check the part before ://") from error
    return filesystem, str(path)


def _http(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    bare = urlunsplit((parts.scheme, host, parts.path, parts.query, ""))
    request = urllib.request.Request(bare, headers={"Accept-Encoding": "identity", **headers})
    if "@" in parts.netloc:  # not sent on to where the server redirects
        secret = base64.b64encode(unquote(parts.netloc.rpartition("@")[0]).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT)
    return response


# --- errors ---------------------------------------------------------------------------------------------------------


def _persevere(attempt: Callable[[], _T], name: str) -> _T:
    """Try up to `ATTEMPTS` times; errors that will not pass are raised at once."""
    for number in range(ATTEMPTS - 1):
        try:
            return attempt()
        except connection_errors() as error:
            _refuse_for_good(name, error)
            time.sleep(FIRST_WAIT * 2**number)
    return attempt()


def _refuse_for_good(name: str, error: BaseException) -> None:
    """Raise ValueError for what another attempt would not mend."""
    status = error.code if isinstance(error, urllib.error.HTTPError) else None
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        raise GoneError(f"`{name}` names no file ({_reason(error)}); check the URL") from None
    if isinstance(error, PermissionError) or status in (401, 403):
        raise RefusedError(
            f"`{name}` may not be read ({_reason(error)}); give the credentials that its storage looks for, such as "
            "AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS or HF_TOKEN"
        ) from None
    if status is not None and 400 <= status < 500 and status not in (408, 416, 425, 429):
        raise ValueError(f"`{name}` is refused ({_reason(error)}); check the URL") from None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise _unwritable(error) from error


def _unwritable(error: OSError) -> ArtifactError:
    return ArtifactError(
        f"the cache `{cache_directory()}` cannot be written ({error.strerror}); free some space, or set PRETRAIN_CACHE "
        "to a folder elsewhere"
    )


def _reason(error: BaseException) -> str:
    return redacted(" ".join(str(error).split())) or type(error).__name__


def _shown(size: int | None) -> str:
    return "an unknown number" if size is None else f"{size:,}"
