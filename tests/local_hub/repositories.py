"""The repositories of the local Hub, in a folder that outlives the server.

What lives here: commits, branches, tags, file contents by digest. What must not: HTTP.

    FOLDER/objects/<sha256>          the bytes of every file
    FOLDER/repos/OWNER/NAME.json     visibility, branches, tags, and every commit with all of its files

A commit is one replacement of the JSON file: it is there whole, or not at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
_LARGE = (".safetensors", ".bin", ".pt", ".onnx", ".gguf", ".arrow", ".parquet", ".zip", ".model")


class RefusedError(Exception):
    """A request that cannot be carried out: an HTTP status, the Hub's code for it, and words."""

    def __init__(self, status: int, words: str, code: str = "") -> None:
        super().__init__(words)
        self.status, self.words, self.code = status, words, code


class Repositories:
    """All that the local Hub holds.

    Args:
        folder: made when it is missing.
        large_bytes: files of this size and more are stored as large files (LFS), as are those with a known suffix.
    """

    def __init__(self, folder: Path, large_bytes: int = 10_000_000) -> None:
        self.folder = folder
        self.large_bytes = large_bytes
        self.lock = threading.RLock()
        self.objects.mkdir(parents=True, exist_ok=True)

    @property
    def objects(self) -> Path:
        """Where the bytes lie."""
        return self.folder / "objects"

    # --- repositories -------------------------------------------------------------------------------------------------

    def _file(self, name: str) -> Path:
        owner, _, repository = name.partition("/")
        if not repository or any(part in ("", ".", "..") or "/" in part for part in (owner, repository)):
            raise RefusedError(400, f"{name} is no repository name")
        return self.folder / "repos" / owner / f"{repository}.json"

    def exists(self, name: str) -> bool:
        """Whether there is such a repository."""
        return self._file(name).is_file()

    def read(self, name: str) -> dict[str, Any]:
        """What is known of a repository."""
        try:
            found: dict[str, Any] = json.loads(self._file(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RefusedError(404, "Repository not found", "RepoNotFound") from None
        return found

    def _write(self, name: str, repository: Mapping[str, Any]) -> None:
        path = self._file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex[:8]}")
        temporary.write_text(json.dumps(repository, indent=1), encoding="utf-8")
        os.replace(temporary, path)

    def create(self, name: str, *, private: bool) -> None:
        """Make a repository with a first commit, as the Hub does."""
        with self.lock:
            if self.exists(name):
                raise RefusedError(409, "You already created this model repo")
            repository: dict[str, Any] = {"private": private, "branches": {}, "tags": {}, "commits": {}}
            files = {".gitattributes": self.small(ATTRIBUTES)}
            repository["branches"]["main"] = _commit(repository, None, files, "initial commit", "")
            self._write(name, repository)

    def resolve(self, name: str, revision: str) -> tuple[str, dict[str, Any]]:
        """The commit that a branch, a tag or a commit's id names, and what is in it."""
        repository = self.read(name)
        revision = revision.removeprefix("refs/heads/")
        for oid in (repository["branches"].get(revision), repository["tags"].get(revision), revision):
            if oid in repository["commits"]:
                return oid, repository["commits"][oid]
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, name: str, revision: str) -> list[dict[str, Any]]:
        """The commits up to a revision, the newest first, each with its `id`."""
        oid, _ = self.resolve(name, revision)
        commits = self.read(name)["commits"]
        found: list[dict[str, Any]] = []
        at: str | None = oid
        while at is not None:
            found.append({"id": at} | commits[at])
            at = commits[at]["parent"]
        return found

    def point(self, name: str, kind: str, ref: str, revision: str | None) -> None:
        """Make a branch (`branches`) or a tag (`tags`)."""
        with self.lock:
            repository = self.read(name)
            if ref in repository[kind]:
                raise RefusedError(409, f"Reference {ref} already exists")
            repository[kind][ref] = self.resolve(name, revision or "main")[0]
            self._write(name, repository)

    def unpoint(self, name: str, kind: str, ref: str) -> None:
        """Remove a branch or a tag."""
        with self.lock:
            repository = self.read(name)
            if repository[kind].pop(ref, None) is None:
                raise RefusedError(404, f"Reference {ref} does not exist", "RevisionNotFound")
            self._write(name, repository)

    def commit(
        self, name: str, branch: str, operations: Iterable[Mapping[str, Any]], *, title: str, message: str, parent: Any
    ) -> str:
        """Apply the operations of one commit, all of them or none; returns its id.

        Args:
            name: of the repository.
            branch: that it goes to.
            operations: `{"key": file | lfsFile | deletedFile | deletedFolder, "value": {...}}`.
            title: its first line.
            message: the rest.
            parent: the commit that the branch must stand at, or None.
        """
        with self.lock:
            repository = self.read(name)
            head = repository["branches"].get(branch)
            if head is None:
                raise RefusedError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            if parent is not None and parent != head:
                raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repository["commits"][head]["files"])
            for operation in operations:
                _apply(self, files, operation["key"], operation["value"])
            oid = _commit(repository, head, files, title, message)
            repository["branches"][branch] = oid
            self._write(name, repository)
            return oid

    # --- contents -------------------------------------------------------------------------------------------------

    def is_large(self, path: str, size: int) -> bool:
        """Whether a file is stored as a large one."""
        return size > 0 and (size >= self.large_bytes or path.endswith(_LARGE))

    def holds(self, digest: str) -> bool:
        """Whether these bytes are there."""
        return (self.objects / digest).is_file()

    def size(self, digest: str) -> int:
        """How many bytes there are."""
        return (self.objects / digest).stat().st_size

    def small(self, data: bytes) -> dict[str, Any]:
        """Store a small file; returns its entry."""
        digest = hashlib.sha256(data).hexdigest()
        self._publish(digest, data)
        return {"size": len(data), "oid": blob_id(data), "lfs": False, "sha256": digest}

    def _publish(self, digest: str, data: bytes) -> None:
        temporary = self.objects / f".tmp-{uuid.uuid4().hex}"
        temporary.write_bytes(data)
        os.replace(temporary, self.objects / digest)

    def receive(self, digest: str, chunks: Iterable[bytes]) -> None:
        """Store a large file, unless what comes is something else."""
        temporary = self.objects / f".tmp-{uuid.uuid4().hex}"
        seen = hashlib.sha256()
        try:
            with temporary.open("wb") as file:
                for chunk in chunks:
                    seen.update(chunk)
                    file.write(chunk)
            if seen.hexdigest() != digest:
                raise RefusedError(400, "The bytes do not have the SHA-256 that they were announced with")
            os.replace(temporary, self.objects / digest)
        finally:
            temporary.unlink(missing_ok=True)

    def receive_part(self, digest: str, number: int, chunks: Iterable[bytes]) -> str:
        """Store one part of a large file; returns its tag."""
        folder = self.folder / "parts" / digest
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".tmp-{uuid.uuid4().hex}"
        seen = hashlib.sha256()
        with temporary.open("wb") as file:
            for chunk in chunks:
                seen.update(chunk)
                file.write(chunk)
        os.replace(temporary, folder / str(number))
        return seen.hexdigest()

    def join(self, digest: str, numbers: Iterable[int]) -> None:
        """Make a large file of its parts, unless it is there."""
        if self.holds(digest):
            return
        folder = self.folder / "parts" / digest

        def chunks() -> Iterable[bytes]:
            for number in numbers:
                try:
                    yield (folder / str(number)).read_bytes()
                except FileNotFoundError:
                    raise RefusedError(400, f"Part {number} is missing") from None

        self.receive(digest, chunks())
        shutil.rmtree(folder)

    def open(self, digest: str) -> IO[bytes]:
        """The bytes of a file."""
        return (self.objects / digest).open("rb")


def blob_id(data: bytes) -> str:
    """Git's name for these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _apply(store: Repositories, files: dict[str, Any], key: str, value: Mapping[str, Any]) -> None:
    path = str(value["path"])
    if path.startswith("/") or any(part in ("", ".", "..") for part in path.rstrip("/").split("/")):
        raise RefusedError(400, f"{path} is no path in a repository")
    if key == "file":
        files[path] = store.small(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        digest, size = value["oid"], value.get("size")
        if not store.holds(digest):
            raise RefusedError(400, f"{path} points at a large file that was not uploaded")
        if size is not None and store.size(digest) != size:
            raise RefusedError(400, f"{path} is announced with {size} bytes and has {store.size(digest)}")
        files[path] = {"size": store.size(digest), "oid": _pointer_id(store, digest), "lfs": True, "sha256": digest}
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
    elif key == "deletedFolder":
        for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
            del files[name]
    else:
        raise RefusedError(400, f"{key} is no operation")


def _pointer_id(store: Repositories, digest: str) -> str:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {store.size(digest)}\n"
    return blob_id(pointer.encode())


def _commit(repository: dict[str, Any], parent: str | None, files: dict[str, Any], title: str, message: str) -> str:
    content = {
        "parent": parent,
        "title": title,
        "message": message,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        "files": files,
    }
    oid = hashlib.sha1(json.dumps([content, uuid.uuid4().hex], sort_keys=True).encode()).hexdigest()
    repository["commits"][oid] = content
    return oid
