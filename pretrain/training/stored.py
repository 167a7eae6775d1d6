"""Where the checkpoints of a run lie: a store behind a URL, which no process needs to share a disk for.

What lives here: uploads in an order that a kill cannot hurt, the pointers, rotation, and copies of what is there. What
must not: how a store is spoken to (`pretrain.stores`), what is in a checkpoint, what a run does when a save fails.

    <checkpoint.to>/<run>/
        step-00001000/...                 the files of a checkpoint, as they would lie on a disk
        step-00001000/manifest.json       written last, removed first: without it there is no checkpoint
        step-00001000.2/...               where one of that step is whole already: nothing is written over
        latest.json best.json run.json    as on a disk

Each rank writes its share to its own disk, hashing the memory that is written, uploads it and removes it. Going on, one
rank of each machine fetches what it needs, and every digest is compared.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pretrain.config_loop import LoopConfig
from pretrain.config_types import redacted
from pretrain.files import (
    MANIFEST,
    TEMPORARY_PREFIX,
    ArtifactError,
    Manifest,
    make_directories,
    read_manifest,
    remove_leftovers,
    update_file,
    verify_manifest,
)
from pretrain.ranks import Ranks
from pretrain.stores import Store, StoreError
from pretrain.training import checkpoint
from pretrain.training.checkpoint_files import KIND, Content, together, write_head, write_share
from pretrain.training.places import RECORD, SAVED_MARK, Place, Report, Shared, recorded_store
from pretrain.training.progress import Progress

_FOLDER = re.compile(r"step-(\d{8,})(?:\.([1-9]\d*))?")


@dataclass(frozen=True, order=True)
class Folder:
    """Where a checkpoint lies in a store.

    Attributes:
        step: of the checkpoint.
        number: 1, or more where another one of that step was whole when this one was begun.
    """

    step: int
    number: int = 1

    @classmethod
    def of(cls, name: str) -> Self | None:
        """The folder of a file, or of a folder's name; None when it belongs to no checkpoint."""
        match = _FOLDER.fullmatch(name.partition("/")[0])
        return cls(int(match[1]), int(match[2] or 1)) if match else None

    @property
    def plain(self) -> str:
        """As a checkpoint of the step is called on a disk."""
        return checkpoint.checkpoint_path(Path(), self.step).name

    @property
    def name(self) -> str:
        """As it is called in the store."""
        return self.plain if self.number == 1 else f"{self.plain}.{self.number}"

    @property
    def manifest(self) -> str:
        """The file that is written last and removed first."""
        return f"{self.name}/{MANIFEST}"


def open_place(config: LoopConfig, directory: Path) -> Place:
    """Where the checkpoints of a run lie, by `checkpoint.to`.

    Raises:
        ValueError: when the URL is none that can be written.
    """
    if config.checkpoint.to is None:
        return Shared(directory)
    return Stored(Store.at(config.checkpoint.to).below(config.name), directory, config.checkpoint.to)


@dataclass(frozen=True)
class Stored:
    """A store that holds the checkpoints of one run.

    Attributes:
        store: at the run's own name.
        directory: the training directory: what is uploaded, or was fetched, lies there for a while.
        url: `checkpoint.to`, for the record.
    """

    store: Store
    directory: Path
    url: str

    @property
    def name(self) -> str:
        """The store's URL."""
        return self.store.name

    def where(self, step: int) -> str:
        """The checkpoint's URL."""
        return f"{self.name}/{Folder(step).name}"

    def check(self, ranks: Ranks) -> None:
        """See that every rank can write, read and remove."""
        together(ranks, self.store.probe)

    # --- writing ----------------------------------------------------------------------------------------------------

    def write(self, content: Content, ranks: Ranks, report: Report) -> str:
        """Upload every rank's share, and the manifest last; a whole one of the same step stays until this one is."""
        step = together(ranks, (lambda: self._make_way(content, report)) if ranks.main else _nothing)[0]
        with self._staging(f"upload-{ranks.rank}") as staging:

            def share() -> dict[str, str]:
                files = write_share(staging, content, ranks.rank)
                for name in files:
                    self.store.put(f"{step}/{name}", staging / name)
                return files

            shares = together(ranks, share)

            def publish() -> None:
                write_head(staging, content, shares)
                for name in ("trainer.json", MANIFEST):
                    self.store.put(f"{step}/{name}", staging / name)

            together(ranks, publish if ranks.main else _nothing)
        return f"{self.name}/{step}"

    def _make_way(self, content: Content, report: Report) -> str:
        """A folder for a checkpoint in which nothing lies; what was begun of its step and is not whole goes."""
        names = self.store.list()
        of_step = {folder for folder in _folders(names) if folder.step == content.step}
        whole = {folder for folder in of_step if folder.manifest in names}
        for folder in sorted(of_step - whole):
            self._remove(folder, names)
        made = Folder(content.step, 1 + max((folder.number for folder in whole), default=0))
        if any(self._run_of(folder) != content.run_id for folder in whole):
            report(f"another run's checkpoint of step {content.step:,} lies in {self.name}; this one is {made.name}")
        return made.name

    @contextmanager
    def _staging(self, name: str) -> Iterator[Path]:
        """An empty directory, removed in the end; what a killed process left of that name goes first."""
        staging = self.directory / f"{TEMPORARY_PREFIX}{name}"
        shutil.rmtree(staging, ignore_errors=True)
        make_directories(staging)
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def settle(self, content: Content, *, best: int | None, keep: int) -> None:
        """Move the pointers, then remove what is no longer kept, and what a killed process left."""
        record = {"to": self.url, "run": self.name, "step": content.step}
        update_file(self.directory / RECORD, (json.dumps(record) + "\n").encode())
        if self.store.read(SAVED_MARK) is None:
            self.store.put_bytes(SAVED_MARK, (json.dumps({"run_id": content.run_id}) + "\n").encode())
        names = self.store.list()
        own = [folder for folder in self._whole(names, content.run_id) if folder.step <= content.step]
        newest = {folder.step: folder for folder in own}  # of each step the one that was begun last
        self._point("latest", newest.get(content.step, Folder(content.step)), content.run_id)
        if best is not None and best in newest:
            self._point("best", newest[best], content.run_id)
        stay = {*sorted(newest)[-keep:], content.step, best, self._pointer("best").get("step")}
        for folder in own:
            if folder.step not in stay or folder != newest[folder.step]:
                self._remove(folder, names)
        for folder in sorted(_folders(names) - {Folder(content.step)}):
            if folder.manifest not in names:
                self._remove(folder, names)

    def make_room(self, run_id: str, best: int | None) -> list[str]:
        """A store has room, or its owner makes some."""
        return []

    def _remove(self, folder: Folder, names: Sequence[str]) -> None:
        """The marker first: a removal that is cut short leaves no half checkpoint."""
        found = [name for name in names if name.startswith(f"{folder.name}/")]
        for name in sorted(found, key=lambda name: name != folder.manifest):
            self.store.delete(name)

    def _point(self, name: checkpoint.Pointer, folder: Folder, run_id: str) -> None:
        """Let a pointer name a checkpoint, unless it does."""
        pointer = {"checkpoint": folder.name, "step": folder.step, "run_id": run_id}
        if self._pointer(name) != pointer:
            self.store.put_bytes(f"{name}.json", checkpoint.pointer_bytes(pointer))

    # --- looking ----------------------------------------------------------------------------------------------------

    def steps(self, run_id: str | None = None) -> list[int]:
        """Steps of the run's complete checkpoints.

        Raises:
            StoreError: when the store does not answer: then nobody knows.
        """
        return sorted({folder.step for folder in self._whole(self.store.list(), run_id)})

    def _whole(self, names: Sequence[str], run_id: str | None) -> list[Folder]:
        """The complete checkpoints, in order: of the run, or of all."""
        there, found = set(names), []
        for folder in _marked(names):
            manifest = self._manifest(folder)
            if manifest is None or run_id not in (None, manifest.facts.get("run_id")):
                continue
            if all(f"{folder.name}/{file}" in there for file in manifest.files):
                found.append(folder)
        return found

    def _manifest(self, folder: Folder) -> Manifest | None:
        """The manifest of a checkpoint; None when there is none, or half of one."""
        data = self.store.read(folder.manifest)
        if data is None:
            return None
        with self._staging(f"manifest-{uuid.uuid4().hex[:8]}") as staging, suppress(ArtifactError):
            (staging / MANIFEST).write_bytes(data)
            return read_manifest(staging, KIND)
        return None

    def _pointer(self, name: checkpoint.Pointer) -> dict[str, Any]:
        """What a pointer says; empty when there is none, or an altered one."""
        data = self.store.read(f"{name}.json")
        with suppress(ValueError):
            pointer = json.loads(data or b"{}")
            if isinstance(pointer, dict):
                pointer.pop("sha256", None)
                if checkpoint.pointer_bytes(pointer) == data:
                    return pointer
        return {}

    def free_bytes(self) -> None:
        """Nobody knows."""
        return

    def check_space(self, progress: Progress, *, one: int, keep: int, save_every: int, judged: bool) -> None:
        """A store says nothing of its room. Each rank's share lies on its own disk while it is uploaded."""

    # --- going on ---------------------------------------------------------------------------------------------------

    def find(self, ranks: Ranks, report: Report) -> Path | None:
        """Fetch the newest whole checkpoint, once a machine, and compare every digest.

        A run whose checkpoints lay in its directory before goes on from there when they are newer.
        """
        leader = ranks.rank - ranks.local_rank
        cache = self.directory / f"{TEMPORARY_PREFIX}fetched-{leader}"
        name = ranks.on_main(lambda: self._fetch_newest(cache, report))
        folder = Folder.of(name or "")
        if folder is None:
            return None if name is None else Shared(self.directory).newest(ranks, report)
        brings = ranks.local_rank == 0 and not ranks.main
        together(ranks, (lambda: self._fetch(folder, cache)) if brings else _nothing)
        return cache / "checkpoints" / folder.plain

    def _fetch_newest(self, cache: Path, report: Report) -> str | None:
        """What was fetched; None when nothing was ever saved, empty when the local directory is ahead."""
        remove_leftovers(self.directory)
        names, owner = self.store.list(), self._pointer("latest").get("run_id")
        marked = _marked(names)[::-1]
        if owner is None:
            runs = {run for folder in marked if (run := self._run_of(folder)) is not None}
            if len(runs) > 1:
                raise ArtifactError(
                    f"`{self.name}` holds checkpoints of several runs, and no pointer says which one is to go on; "
                    "remove those of the others"
                )
            owner = next(iter(runs), None)
        if self._is_behind(marked, owner):
            report(f"`{self.directory}` holds newer checkpoints than `{self.name}`: the run goes on from there")
            return ""
        for folder in marked:
            try:
                run = self._fetch(folder, cache)
            except (ArtifactError, OSError) as error:
                report(f"checkpoint {folder.name} is not used: {error}")
                shutil.rmtree(cache, ignore_errors=True)
                continue
            if owner in (None, run):
                return folder.name
            report(f"checkpoint {folder.name} is not used: it is of run {run}, this is run {owner}")
            shutil.rmtree(cache, ignore_errors=True)
        other = None if marked else recorded_store(self.directory)
        if other is not None and other["run"] != self.name:
            raise ArtifactError(
                f"the newest checkpoints of `{self.directory}` lie in {other['run']}; give "
                f"checkpoint.to={redacted(other['to'])} again, or copy them to {self.name}"
            )
        if marked or SAVED_MARK in names:
            raise ArtifactError(
                f"`{self.name}` holds no checkpoint that can be used; put back a whole one, give another name=, or "
                "remove all of it to start anew"
            )
        return None

    def _is_behind(self, marked: Sequence[Folder], owner: str | None) -> bool:
        """Whether the training directory holds newer checkpoints of the run than the store.

        Raises:
            ArtifactError: when all that it holds are of another run.
        """
        local = Shared(self.directory)
        if not marked or not local.steps():
            return bool(local.steps())
        own = local.steps(owner)
        if not own:
            raise ArtifactError(
                f"`{self.directory}` holds checkpoints of another run than `{self.name}`, which holds those of run "
                f"{owner}; give another name=, or move away those that are not meant"
            )
        newest = next((folder.step for folder in marked if owner in (None, self._run_of(folder))), 0)
        return newest < own[-1]

    def _run_of(self, folder: Folder) -> str | None:
        """Whose checkpoint it is; None where its manifest does not tell."""
        manifest = self._manifest(folder)
        return None if manifest is None else manifest.facts.get("run_id")

    def _fetch(self, folder: Folder, cache: Path) -> str:
        """Bring a checkpoint and compare every digest; returns its run."""
        place = cache / "checkpoints" / folder.plain
        self._bring(folder, place, "")
        return checkpoint.load_checkpoint(place).run_id

    def _bring(self, folder: Folder, place: Path, prefix: str) -> Manifest:
        """Copy the manifest and the files whose names begin with `prefix`."""
        shutil.rmtree(place, ignore_errors=True)
        self.store.get(folder.manifest, place / MANIFEST)
        manifest = read_manifest(place, KIND)
        for name in manifest.files:
            if name.startswith((prefix, "trainer.json")):
                self.store.get(f"{folder.name}/{name}", place / name)
        return manifest

    def repair(self, wanted: Mapping[checkpoint.Pointer, int], run_id: str, report: Report) -> None:
        """Let the pointers name these steps."""
        with suppress(StoreError):  # the next save tries again
            newest = {folder.step: folder for folder in self._whole(self.store.list(), run_id)}
            for name, step in wanted.items():
                if step in newest:
                    self._point(name, newest[step], run_id)

    def done(self, found: Path) -> None:
        """Every rank has read it: what was fetched goes; what lies in the run's own directory stays."""
        cache = found.parent.parent
        if cache.name.startswith(TEMPORARY_PREFIX):
            shutil.rmtree(cache, ignore_errors=True)

    # --- for others -------------------------------------------------------------------------------------------------

    def model(self, step: str | None = None) -> Path | None:
        """A copy of a checkpoint's model (not of its optimizer) in the training directory; None when there is none.

        Args:
            step: `step-00001000`; None for what `latest` names.

        Raises:
            ArtifactError: when a digest is not the manifest's.
            StoreError: when the store does not answer.
        """
        folder = self._named(step)
        data = None if folder is None else self.store.read(folder.manifest)
        if folder is None or data is None:
            return None
        place = self.directory / "fetched" / folder.plain
        if not ((place / MANIFEST).is_file() and (place / MANIFEST).read_bytes() == data):
            partial = self.directory / f"{TEMPORARY_PREFIX}fetched-{uuid.uuid4().hex[:8]}" / folder.plain
            manifest = self._bring(folder, partial, "model/")
            own = {name: digest for name, digest in manifest.files.items() if (partial / name).is_file()}
            verify_manifest(partial, Manifest(manifest.kind, {}, files=own))
            shutil.rmtree(place, ignore_errors=True)
            make_directories(place.parent)
            partial.rename(place)
            partial.parent.rmdir()
        return place

    def _named(self, step: str | None) -> Folder | None:
        """Where the checkpoint of a step lies, of the run that `latest` names, or what that names itself."""
        latest = self._pointer("latest")
        named, wanted = Folder.of(str(latest.get("checkpoint"))), Folder.of(step or "")
        if step is None or wanted is None:
            return named if step is None else None
        if named is not None and named.step == wanted.step:
            return named
        owner, of_step = latest.get("run_id"), [one for one in _marked(self.store.list()) if one.step == wanted.step]
        return next((one for one in reversed(of_step) if owner in (None, self._run_of(one))), None)


def stored_model(directory: Path, step: str | None = None) -> Path | None:
    """A local copy of a checkpoint that a run keeps in a store, model alone; None when it keeps none there.

    Args:
        directory: the training directory (`<run>/train`).
        step: `step-00001000`; None for what `latest` names.

    Raises:
        ValueError: when the store cannot be read; names it.
    """
    record = recorded_store(directory)
    if record is None:
        return None
    url = record["to"]
    name = directory.resolve().parent.name
    try:
        return Stored(Store.at(url).below(name), directory, url).model(step)
    except StoreError as error:
        raise ArtifactError(f"the checkpoints of `{directory}` lie in a store that cannot be read: {error}") from error


def _marked(names: Sequence[str]) -> list[Folder]:
    """The folders that have a manifest, in order."""
    return sorted(folder for folder in _folders(names) if folder.manifest in names)


def _folders(names: Sequence[str]) -> set[Folder]:
    """The folders in which something lies, of a checkpoint that is whole or not."""
    return {folder for name in names if (folder := Folder.of(name))}


def _nothing() -> None:
    """What the other ranks do while one works."""
