"""Where the checkpoints of a run lie: a store behind a URL, which no process needs to share a disk for.

What lives here: uploads in an order that a kill cannot hurt, the pointers, rotation, and copies of what is there. What
must not: how a store is spoken to (`pretrain.stores`), what is in a checkpoint, what a run does when a save fails.

    <checkpoint.to>/<run>/
        step-00001000/...                 the files of a checkpoint, as they would lie on a disk
        step-00001000/manifest.json       written last, removed first: without it there is no checkpoint
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
from typing import Any

from pretrain.config import RunConfig
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

_STEP_NAME = re.compile(r"step-(\d{8,})")


def open_place(config: RunConfig, directory: Path) -> Place:
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
        return f"{self.name}/{_step_name(step)}"

    def check(self, ranks: Ranks) -> None:
        """See that every rank can write, read and remove."""
        together(ranks, self.store.probe)

    # --- writing ----------------------------------------------------------------------------------------------------

    def write(self, content: Content, ranks: Ranks, report: Report) -> str:
        """Upload every rank's share, and the manifest last; one of the same step is removed first."""
        step = checkpoint.checkpoint_path(self.directory, content.step).name
        together(ranks, (lambda: self._remove(step)) if ranks.main else _nothing)
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

    def settle(self, content: Content, *, best: bool, keep: int) -> None:
        """Move the pointers, then remove what is no longer kept, and what a killed process left."""
        record = {"to": self.url, "run": self.name, "step": content.step}
        update_file(self.directory / RECORD, (json.dumps(record) + "\n").encode())
        step, run = checkpoint.checkpoint_path(self.directory, content.step).name, content.run_id
        if self.store.read(SAVED_MARK) is None:
            self.store.put_bytes(SAVED_MARK, (json.dumps({"run_id": run}) + "\n").encode())
        pointer = {"checkpoint": step, "step": content.step, "run_id": run}
        self.store.put_bytes("latest.json", checkpoint.pointer_bytes(pointer))
        if best:
            self.store.put_bytes("best.json", checkpoint.pointer_bytes(pointer))
        names = self.store.list()
        own = [number for number in self._whole(names, run) if number <= content.step]
        pointed = self._pointer("best").get("step")
        for number in own[: max(0, len(own) - keep)]:
            if number not in (pointed, content.step):
                self._remove(_step_name(number), names)
        for left in sorted({name.partition("/")[0] for name in names if _STEP_NAME.match(name)}):
            if f"{left}/{MANIFEST}" not in names and left != step:
                self._remove(left, names)

    def make_room(self, run_id: str) -> list[str]:
        """A store has room, or its owner makes some."""
        return []

    def _remove(self, step: str, names: Sequence[str] | None = None) -> None:
        """The marker first: a removal that is cut short leaves no half checkpoint."""
        found = [name for name in (self.store.list() if names is None else names) if name.startswith(f"{step}/")]
        for name in sorted(found, key=lambda name: name != f"{step}/{MANIFEST}"):
            self.store.delete(name)

    # --- looking ----------------------------------------------------------------------------------------------------

    def steps(self, run_id: str | None = None) -> list[int]:
        """Steps of the run's complete checkpoints; none while the store does not answer."""
        try:
            return self._whole(self.store.list(), run_id)
        except StoreError:
            return []

    def _whole(self, names: Sequence[str], run_id: str | None) -> list[int]:
        there, found = set(names), []
        for name in names:
            step, _, file = name.partition("/")
            match = _STEP_NAME.fullmatch(step)
            if match is None or file != MANIFEST:
                continue
            manifest = self._manifest(step)
            whole = manifest is not None and all(f"{step}/{file}" in there for file in manifest.files)
            if manifest is not None and whole and run_id in (None, manifest.facts.get("run_id")):
                found.append(int(match[1]))
        return sorted(found)

    def _manifest(self, step: str) -> Manifest | None:
        """The manifest of a step; None when there is none, or half of one."""
        data = self.store.read(f"{step}/{MANIFEST}")
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
        step = ranks.on_main(lambda: self._fetch_newest(cache, report))
        if step is None or step == "":
            return Shared(self.directory).newest(ranks, report) if step == "" else None
        brings = ranks.local_rank == 0 and not ranks.main
        together(ranks, (lambda: self._fetch(step, cache)) if brings else _nothing)
        return cache / "checkpoints" / str(step)

    def _fetch_newest(self, cache: Path, report: Report) -> str | None:
        """The step that was fetched; None when nothing was ever saved, empty when the local directory is ahead."""
        remove_leftovers(self.directory)
        names, owner = self.store.list(), self._pointer("latest").get("run_id")
        marked = sorted({name.partition("/")[0] for name in names if name.endswith(f"/{MANIFEST}")}, reverse=True)
        marked = [step for step in marked if _STEP_NAME.fullmatch(step)]
        if self._is_behind(marked):
            report(f"`{self.directory}` holds newer checkpoints than `{self.name}`: the run goes on from there")
            return ""
        if owner is None and len({self._facts(step).get("run_id") for step in marked}) > 1:
            raise ArtifactError(
                f"`{self.name}` holds checkpoints of several runs, and no pointer says which one is to go on; remove "
                "those of the others"
            )
        for step in marked:
            try:
                run = self._fetch(step, cache)
            except (ArtifactError, OSError) as error:
                report(f"checkpoint {step} is not used: {error}")
                shutil.rmtree(cache, ignore_errors=True)
                continue
            if owner in (None, run):
                return step
            report(f"checkpoint {step} is not used: it is of run {run}, this is run {owner}")
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

    def _is_behind(self, marked: Sequence[str]) -> bool:
        local = checkpoint.list_checkpoints(self.directory)
        return bool(local) and (not marked or marked[0] < local[-1].name)

    def _facts(self, step: str) -> Mapping[str, Any]:
        manifest = self._manifest(step)
        return {} if manifest is None else manifest.facts

    def _fetch(self, step: str, cache: Path) -> str:
        """Bring a checkpoint and compare every digest; returns its run."""
        place = cache / "checkpoints" / step
        self._bring(step, place, "")
        return checkpoint.load_checkpoint(place).run_id

    def _bring(self, step: str, place: Path, prefix: str) -> Manifest:
        """Copy the manifest and the files whose names begin with `prefix`."""
        shutil.rmtree(place, ignore_errors=True)
        self.store.get(f"{step}/{MANIFEST}", place / MANIFEST)
        manifest = read_manifest(place, KIND)
        for name in manifest.files:
            if name.startswith((prefix, "trainer.json")):
                self.store.get(f"{step}/{name}", place / name)
        return manifest

    def repair(self, wanted: Mapping[checkpoint.Pointer, int], report: Report) -> None:
        """Let the pointers name these steps."""
        with suppress(StoreError):  # the next save tries again
            known = set(self.steps())
            for name, step in wanted.items():
                run = self._facts(_step_name(step)).get("run_id") if step in known else None
                if run is not None and self._pointer(name).get("step") != step:
                    pointer = {"checkpoint": _step_name(step), "step": step, "run_id": run}
                    self.store.put_bytes(f"{name}.json", checkpoint.pointer_bytes(pointer))

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
        step = step or self._pointer("latest").get("checkpoint")
        data = self.store.read(f"{step}/{MANIFEST}") if step else None
        if step is None or data is None:
            return None
        place = self.directory / "fetched" / step
        if not ((place / MANIFEST).is_file() and (place / MANIFEST).read_bytes() == data):
            partial = self.directory / f"{TEMPORARY_PREFIX}fetched-{uuid.uuid4().hex[:8]}" / step
            manifest = self._bring(step, partial, "model/")
            own = {name: digest for name, digest in manifest.files.items() if (partial / name).is_file()}
            verify_manifest(partial, Manifest(manifest.kind, {}, files=own))
            shutil.rmtree(place, ignore_errors=True)
            make_directories(place.parent)
            partial.rename(place)
            partial.parent.rmdir()
        return place


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


def _step_name(step: int) -> str:
    return checkpoint.checkpoint_path(Path(), step).name


def _nothing() -> None:
    """What the other ranks do while one works."""
