"""The HTTP side of the local Hub: the requests that `huggingface_hub` makes, answered as huggingface.co does.

What lives here: routes, who may do what, bodies in and out. What must not: what a repository is (`repositories`).

Answered: who am I; repositories made, described, listed (tree, paths, refs, commits); branches and tags made and
removed; a commit (preupload, large files in one or several parts, verification, the commit itself); files, whole or by
range. Xet is answered with 404, so that clients that ask go on with large-file storage.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from tests.local_hub.faults import Fault, Faults
from tests.local_hub.repositories import RefusedError, Repositories

USER = "local"
WRITER, READER = "hf_" + 3 * "localwriter", "hf_" + 3 * "localreader"
"""Tokens of the user `local`: one that may write, and one that may only read."""

_BLOCK = 1 << 16
_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True)
class Request:
    """What was asked, for tests: `received` are the bytes of the body."""

    method: str
    path: str
    status: int
    received: int
    token: str | None


class LocalHub:
    """A server of its own thread on 127.0.0.1; a context manager.

    Args:
        folder: where the repositories are kept.
        port: 0 for a free one.
        large_bytes: see `Repositories`.
        part_bytes: large files above this size are asked for in parts.
    """

    def __init__(
        self, folder: Path, port: int = 0, *, large_bytes: int = 10_000_000, part_bytes: int = 50_000_000
    ) -> None:
        self.repositories = Repositories(folder, large_bytes)
        self.part_bytes = part_bytes
        self.faults = Faults()
        self.requests: list[Request] = []
        self.tokens = {WRITER: "write", READER: "read"}
        self.closing = threading.Event()
        hub = self

        class Handler(_Handler):
            local = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        """For `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> Self:
        """Answer from now on."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Answer no more."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def wait(self) -> None:
        """Until somebody interrupts."""
        while self._thread.is_alive():
            self._thread.join(1.0)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def asked(self, method: str = "", path: str = "") -> list[Request]:
        """The requests so far that fit."""
        return [
            request
            for request in list(self.requests)
            if request.method == (method or request.method) and re.search(path, request.path)
        ]


class _CutError(Exception):
    """The connection is to be lost."""


class _Handler(BaseHTTPRequestHandler):
    local: LocalHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is two writes, and the second one would wait for 40 ms
    wbufsize = -1

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    # --- one request ----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.route, self.query = split.path, parse_qs(split.query)
        self.received, self.status, self._left = 0, 0, self._body_bytes()
        fault = self.local.faults.of(self.command, self.path)
        self._cut = fault is not None and fault.kind == "cut"
        try:
            if fault is None or not self._strike(fault):
                try:
                    self._answer()
                except RefusedError as refused:
                    self._refuse(refused)
            if fault is not None and fault.kind == "lose":
                raise _CutError
            self._flush()
        except (_CutError, ConnectionError):
            self.close_connection = True
        self._record()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 (the names that http.server looks for)

    def _strike(self, fault: Fault) -> bool:
        """Make a fault; returns whether that was all there is to the answer."""
        if fault.kind == "drop":
            raise _CutError
        if fault.kind == "hang":
            self.local.closing.wait()
            raise _CutError
        if fault.kind == "slow":
            time.sleep(fault.seconds)
        if fault.kind == "status":
            headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            self._refuse(RefusedError(fault.status, f"told to answer {fault.status}"), headers)
        return fault.kind == "status"

    def _record(self) -> None:
        token = self._token()
        self.local.requests.append(Request(self.command, self.path, self.status, self.received, token))

    def _refuse(self, refused: RefusedError, headers: dict[str, str] | None = None) -> None:
        for _ in self._chunks():  # the connection is used again
            pass
        said = {"X-Error-Code": refused.code, "X-Error-Message": refused.words}
        self._json({"error": refused.words}, refused.status, said | (headers or {}))

    # --- bodies ---------------------------------------------------------------------------------------------------

    def _body_bytes(self) -> int | None:
        """How many bytes there are to read; None when they come in chunks."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            return None
        return int(self.headers.get("Content-Length") or 0)

    def _chunks(self) -> Iterator[bytes]:
        half = (self._left or 0) // 2
        while self._left is None or self._left > 0:
            if self._left is None:
                size = int(self.rfile.readline().split(b";")[0] or b"0", 16)
                data = self.rfile.read(size)
                self.rfile.readline()
                if size == 0:
                    self._left = 0
                    return
            else:
                data = self.rfile.read(min(_BLOCK, self._left))
                if not data:
                    raise _CutError
                self._left -= len(data)
            self.received += len(data)
            yield data
            if self._cut and self.received >= half:
                raise _CutError

    def _body(self) -> bytes:
        return b"".join(self._chunks())

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self._begin(status, {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {}))
        self._out = [data]

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.status, self._head, self._out = status, headers, []

    def _flush(self) -> None:
        """Send what was answered."""
        head, out = self.__dict__.pop("_head", None), self.__dict__.pop("_out", [])
        if head is None:
            return
        self.send_response(self.status)
        for name, value in head.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for data in out:
                self.wfile.write(data)
        self.wfile.flush()

    # --- who ------------------------------------------------------------------------------------------------------

    def _token(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if scheme == "Bearer" else None

    def _role(self) -> str | None:
        token = self._token()
        if token is None:
            return None
        if token not in self.local.tokens:
            raise RefusedError(401, "Invalid user token.")
        return self.local.tokens[token]

    def _may_read(self, name: str) -> None:
        role = self._role()
        if not self.local.repositories.exists(name) or (role is None and self.local.repositories.read(name)["private"]):
            raise RefusedError(401 if role is None else 404, "Repository not found", "RepoNotFound")

    def _may_write(self, name: str) -> None:
        role = self._role()
        if role is None:
            raise RefusedError(401, "Invalid username or password.")
        if role != "write" or not name.startswith(f"{USER}/"):
            raise RefusedError(403, "You don't have the rights to write to this repository")

    # --- routes ---------------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for expected, pattern, function in _ROUTES:
            if expected == method and (found := re.fullmatch(pattern, self.route)):
                function(self, **{key: unquote(value or "") for key, value in found.groupdict().items()})
                return
        raise RefusedError(404, f"nothing is here: {method} {self.route}", "EntryNotFound")

    def whoami(self) -> None:
        """The user of a token."""
        role = self._role()
        if role is None:
            raise RefusedError(401, "Invalid username or password.")
        self._json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create(self) -> None:
        """A new repository."""
        asked = json.loads(self._body())
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        self._may_write(name)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        made = {"url": f"{self.local.url}/{name}", "name": name, "id": name}
        if self.local.repositories.exists(name):
            self._json(made | {"error": "You already created this model repo"}, 409)
            return
        self.local.repositories.create(name, private=private)
        self._json(made)

    def validate(self) -> None:
        """The metadata of a README: anything is good."""
        self._body()
        self._json({"errors": [], "warnings": []})

    def info(self, name: str, revision: str = "main") -> None:
        """A repository."""
        self._may_read(name)
        oid, commit = self.local.repositories.resolve(name, revision or "main")
        files = [{"rfilename": path} for path in sorted(commit["files"])]
        private = self.local.repositories.read(name)["private"]
        self._json(
            {
                "_id": name,
                "id": name,
                "modelId": name,
                "author": name.partition("/")[0],
                "sha": oid,
                "private": private,
                "lastModified": commit["date"],
                "createdAt": commit["date"],
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": files,
            }
        )

    def _entry(self, path: str, file: dict[str, Any]) -> dict[str, Any]:
        faults = self.local.faults
        size = faults.lying_sizes.get(path, file["size"])
        entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": file["oid"]}
        if file["lfs"]:
            digest = faults.lying_digests.get(path, file["sha256"])
            entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
        elif path in faults.lying_digests:
            entry["oid"] = faults.lying_digests[path][:40]
        return entry

    def tree(self, name: str, revision: str, path: str = "") -> None:
        """The files of a revision, all or below a folder."""
        self._may_read(name)
        _, commit = self.local.repositories.resolve(name, revision)
        prefix = f"{path}/" if path else ""
        below = {file: entry for file, entry in commit["files"].items() if file.startswith(prefix)}
        if path and not below:
            raise RefusedError(404, f"{path} does not exist", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        folders = {
            "/".join(file.split("/")[: depth + 1])
            for file in below
            for depth in range(prefix.count("/"), file.count("/"))
        }
        if not recursive:
            folders = {folder for folder in folders if "/" not in folder[len(prefix) :]}
            below = {file: entry for file, entry in below.items() if "/" not in file[len(prefix) :]}
        entries = [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in sorted(folders)]
        self._json(entries + [self._entry(file, entry) for file, entry in sorted(below.items())])

    def paths(self, name: str, revision: str) -> None:
        """The files that are named in a form."""
        self._may_read(name)
        wanted = parse_qs(self._body().decode()).get("paths", [])
        _, commit = self.local.repositories.resolve(name, revision)
        known = [path for path in wanted if path in commit["files"] and path not in self.local.faults.unlisted]
        self._json([self._entry(path, commit["files"][path]) for path in known])

    def refs(self, name: str) -> None:
        """Branches and tags."""
        self._may_read(name)
        repository = self.local.repositories.read(name)
        found = {
            kind: [{"name": ref, "ref": f"refs/{where}/{ref}", "targetCommit": oid} for ref, oid in entries.items()]
            for kind, where, entries in (
                ("branches", "heads", repository["branches"]),
                ("tags", "tags", repository["tags"]),
            )
        }
        self._json(found | {"converts": []})

    def commits(self, name: str, revision: str) -> None:
        """The history of a revision."""
        self._may_read(name)
        self._json(
            [
                {
                    "id": commit["id"],
                    "title": commit["title"],
                    "message": commit["message"],
                    "authors": [{"user": USER}],
                    "date": commit["date"],
                }
                for commit in self.local.repositories.history(name, revision)
            ]
        )

    def make_ref(self, name: str, kind: str, ref: str) -> None:
        """A branch or a tag."""
        self._may_write(name)
        self._may_read(name)
        asked = json.loads(self._body() or b"{}")
        if kind == "tag":
            self.local.repositories.point(name, "tags", asked["tag"], ref)
        else:
            self.local.repositories.point(name, "branches", ref, asked.get("startingPoint"))
        self._json({})

    def remove_ref(self, name: str, kind: str, ref: str) -> None:
        """No branch or tag any more."""
        self._may_write(name)
        self._may_read(name)
        self.local.repositories.unpoint(name, "tags" if kind == "tag" else "branches", ref)
        self._json({})

    def preupload(self, name: str, revision: str) -> None:
        """How each file is to be sent."""
        self._may_write(name)
        self._may_read(name)
        asked = json.loads(self._body())
        _, commit = self.local.repositories.resolve(name, revision)
        files = []
        for file in asked["files"]:
            path = file["path"]
            there = commit["files"].get(path)
            oid = None if there is None else there["sha256" if there["lfs"] else "oid"]
            mode = "lfs" if self.local.repositories.is_large(path, file["size"]) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files, "commitOid": self.local.repositories.resolve(name, revision)[0]})

    def batch(self, name: str) -> None:
        """Where large files are to be sent; nowhere, those that are there."""
        self._may_write(name)
        self._may_read(name)
        objects = []
        for file in json.loads(self._body())["objects"]:
            oid, size = file["oid"], file["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if not self.local.repositories.holds(oid):
                upload = {"href": f"{self.local.url}/storage/{oid}?X-Amz-Signature=5ec2e7{oid[:10]}"}
                if size > self.local.part_bytes:
                    count = -(-size // self.local.part_bytes)
                    parts = {
                        str(n): f"{self.local.url}/storage/{oid}/{n}?X-Amz-Signature=5e" for n in range(1, count + 1)
                    }
                    upload = {
                        "href": f"{self.local.url}/storage/{oid}/join",
                        "header": {"chunk_size": str(self.local.part_bytes)} | parts,
                    }
                answer["actions"] = {
                    "upload": upload,
                    "verify": {"href": f"{self.local.url}/{name}.git/info/lfs/objects/verify"},
                }
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        """A large file in one piece."""
        self.local.repositories.receive(oid, self._chunks())
        self._json({})

    def store_part(self, oid: str, number: str) -> None:
        """One part of a large file."""
        tag = self.local.repositories.receive_part(oid, int(number), self._chunks())
        self._json({}, headers={"ETag": f'"{tag}"'})

    def join(self, oid: str) -> None:
        """All parts are there."""
        parts = json.loads(self._body())["parts"]
        self.local.repositories.join(oid, [part["partNumber"] for part in parts])
        self._json({})

    def verify(self, name: str) -> None:
        """Whether a large file has come as it was announced."""
        self._may_write(name)
        asked = json.loads(self._body())
        store = self.local.repositories
        if not store.holds(asked["oid"]) or store.size(asked["oid"]) != asked["size"]:
            raise RefusedError(422, "The large file is not what was announced")
        self._json({})

    def commit(self, name: str, revision: str) -> None:
        """All changes at once, one JSON object a line."""
        self._may_write(name)
        self._may_read(name)
        header, *operations = (json.loads(line) for line in self._body().splitlines() if line)
        value = header["value"]
        oid = self.local.repositories.commit(
            name,
            revision,
            operations,
            title=value["summary"],
            message=value.get("description", ""),
            parent=value.get("parentCommit"),
        )
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.local.url}/{name}/commit/{oid}"})

    def file(self, name: str, revision: str, path: str) -> None:
        """A file of a revision, or a range of it."""
        self._may_read(name)
        oid, commit = self.local.repositories.resolve(name, revision)
        entry = commit["files"].get(path)
        if entry is None:
            self._json(
                {"error": "Entry not found"},
                404,
                {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": oid},
            )
            return
        size = entry["size"]
        tag = entry["sha256"] if entry["lfs"] else entry["oid"]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        if entry["lfs"]:
            headers |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{tag}"'}
        start, end, status = 0, size, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            start, end, status = int(wanted[1]), min(size, int(wanted[2] or size - 1) + 1), 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        headers |= {"Content-Type": "application/octet-stream", "Content-Length": str(end - start)}
        self._begin(status, headers)
        if self.command == "HEAD":
            return
        with self.local.repositories.open(entry["sha256"]) as opened:
            opened.seek(start)
            self._flush_file(opened, end - start)

    def _flush_file(self, opened: Any, count: int) -> None:
        self._flush()
        while count > 0:
            data = opened.read(min(_BLOCK, count))
            self.wfile.write(data)
            count -= len(data)


_API = rf"/api/models/{_NAME}"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", _API, _Handler.info),
    ("GET", rf"{_API}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", _Handler.tree),
    ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", _Handler.paths),
    ("GET", rf"{_API}/refs", _Handler.refs),
    ("GET", rf"{_API}/commits/(?P<revision>[^/]+)", _Handler.commits),
    ("POST", rf"{_API}/(?P<kind>branch|tag)/(?P<ref>[^/]+)", _Handler.make_ref),
    ("DELETE", rf"{_API}/(?P<kind>branch|tag)/(?P<ref>[^/]+)", _Handler.remove_ref),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/verify", _Handler.verify),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", _Handler.store),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)", _Handler.store_part),
    ("POST", r"/storage/(?P<oid>[0-9a-f]{64})/join", _Handler.join),
    ("GET", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.file),
]
