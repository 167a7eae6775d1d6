"""The pipeline of a part: read, keep, encode, write. Steps in datatrove's form, so that its executors run them.

What lives here: what a worker does with one part of the plan. What must not: who does the work (`executors`), how text
is read, cut or packed, or the artifact at the end.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document as PipelineDocument
from datatrove.pipeline.base import PipelineStep
from tokenizers import Tokenizer

from pretrain.config_data import Deduplication
from pretrain.data.keeping.decontamination import KnownRuns, known_runs
from pretrain.data.keeping.deduplication import Fingerprints
from pretrain.data.keeping.sieve import DECONTAMINATE, DEDUP, Sieve
from pretrain.data.preparing.long_texts import UncutTextError, encode_texts
from pretrain.data.preparing.marks import Marker, marker_of
from pretrain.data.preparing.marks import split as split_marks
from pretrain.data.preparing.parts import Part, Piece, Plan, is_training
from pretrain.data.preparing.unfinished import (
    NAMED_PROBLEMS,
    RUNS,
    fingerprints_of,
    held_out_runs_of,
    load_array,
    marker,
    open_progress,
    save_array,
    shards_folder,
)
from pretrain.data.reading.documents import ReadReport, read_documents
from pretrain.data.reading.lines import Policy
from pretrain.data.reading.pairs import sides
from pretrain.data.reading.problems import add_problems, counts_of, no_problems
from pretrain.data.shards import ShardWriter
from pretrain.data.vocabulary import ReadyIds, read_vocabulary
from pretrain.files import replace_file

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 8192


@lru_cache(maxsize=1)
def _read_plan(path: str, digest: str) -> Plan:
    return Plan.from_json(json.loads(Path(path).read_text(encoding="utf-8")))


@lru_cache(maxsize=1)
def _ready_ids(directory: str, digest: str, ids_field: str | None) -> ReadyIds:
    return ReadyIds.of(Path(directory), ids_field)


@lru_cache(maxsize=1)
def _separator(directory: str, digest: str) -> int:
    """The id that parts a stored pair: EOS, which no text gives."""
    return read_vocabulary(Path(directory)).need("eos", "objective.kind: translation")


@lru_cache(maxsize=1)
def load_tokenizer(directory: str, digest: str) -> Tokenizer:
    """The tokenizer of a plan, set to encode whole texts and nothing but text."""
    tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A text that spells a special token gets the ids of its characters, not the special id.
    tokenizer.encode_special_tokens = True
    return tokenizer


class PartStep(PipelineStep):  # type: ignore[misc]
    """A step that finds its part in the plan on the disk: rank r works on part r. Small, as it travels to workers."""

    def __init__(self, work: Path, plan: Plan) -> None:
        super().__init__()
        self.work, self.digest = str(work), plan.digest
        self.on_error = plan.on_error  # not in the plan on the disk: another policy gives the same bytes

    def plan_and_part(self, rank: int) -> tuple[Plan, Part]:
        plan = _read_plan(str(Path(self.work) / "plan.json"), self.digest)
        return plan, plan.parts[rank]


class ReadPart(PartStep):
    """Yields the documents of a part that are kept, each with the split it goes to and its file."""

    name = "read"
    type = "reader"

    def __init__(self, work: Path, plan: Plan, *, held_out_only: bool = False) -> None:
        super().__init__(work, plan)
        self.held_out_only = held_out_only

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[PipelineDocument]:
        """Read the part's pieces in order."""
        plan, part = self.plan_and_part(rank)
        progress = open_progress(Path(self.work))
        sieve = self._sieve(plan, part) if plan.steps else None
        done = size = 0
        for piece in part.pieces:
            if plan.max_bytes is not None and size >= plan.max_bytes:
                break
            file = plan.files[piece.file]
            read = ReadReport(on_error=self.on_error)
            split_of = plan.split_of(part, piece)
            documents = read_documents(
                file,
                document=plan.document,
                text_field=plan.text_field,
                byte_range=piece.byte_range,
                report=read,
                max_bytes=None if plan.max_bytes is None else plan.max_bytes - size,
                ready=_ready_ids(plan.tokenizer, plan.tokenizer_digest, plan.ids_field),
            )
            for whole in documents:
                for split, document in split_of(whole) if sieve is None else sieve.sides(whole, split_of, piece.file):
                    metadata = {"split": split, "file": piece.file, "ids": document.ids}
                    yield PipelineDocument(document.text, f"{file.name}:{document.position}", metadata=metadata)
                progress[rank] = done + read.consumed
                size += whole.size if plan.max_bytes is not None else 0
            done += _weight(plan, piece)
            progress[rank] = done
            yield PipelineDocument("", "", metadata={"read": read, "file": piece.file})
        if sieve is not None:
            yield PipelineDocument("", "", metadata={"kept_out": sieve.tally.to_json()})

    def _sieve(self, plan: Plan, part: Part) -> Sieve:
        known = None if self.held_out_only else _known_runs(self.work, self.digest)
        return Sieve(plan, part.split, known, held_out_only=self.held_out_only)


@lru_cache(maxsize=1)
def _known_runs(work: str, digest: str) -> KnownRuns | None:
    """What decontamination looks for, mapped from the disk; None when it is not asked for."""
    plan = _read_plan(str(Path(work) / "plan.json"), digest)
    if DECONTAMINATE not in plan.steps:
        return None
    runs = {name: load_array(Path(work) / file) for name, file in RUNS.items()}
    return KnownRuns(plan.steps[DECONTAMINATE]["ngrams"], runs)


class NoteHeldOut(PartStep):
    """Notes the runs of words of a part's held-out documents, before any part is written."""

    name = "note held-out text"
    type = "writer"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[PipelineDocument]:
        """Write the runs of the part. Yields nothing."""
        plan, part = self.plan_and_part(rank)
        texts: Iterator[str] = (document.text for document in data if "split" in document.metadata)
        runs = known_runs(texts, plan.steps[DECONTAMINATE]["ngrams"])
        save_array(held_out_runs_of(Path(self.work), part), runs)
        yield from ()


def _weight(plan: Plan, piece: Piece) -> int:
    if piece.byte_range is not None:
        return piece.byte_range[1] - piece.byte_range[0]
    size = plan.files[piece.file].bytes
    return size if plan.max_bytes is None else min(size, plan.max_bytes)


class WriteShards(PartStep):
    """Encodes documents in batches, without special tokens, and writes one shard a split; then marks the part."""

    name = "tokenise and write"
    type = "writer"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[PipelineDocument]:
        """Write the part, and mark it as finished. Yields nothing."""
        plan, part = self.plan_and_part(rank)
        tokenizer = load_tokenizer(plan.tokenizer, plan.tokenizer_digest)
        work = Path(self.work)
        counts = _Counts(plan)
        notes = Fingerprints(Deduplication(**plan.steps[DEDUP])) if DEDUP in plan.steps else None
        words = marker_of(plan.tokenizer, plan.tokenizer_digest) if plan.marks else None
        separator = None if isinstance(plan.text_field, str) else _separator(plan.tokenizer, plan.tokenizer_digest)
        encoder = _Encoder(tokenizer, counts, self.on_error, words, separator)
        writers: dict[str, ShardWriter] = {}
        without_text: set[str] = set()
        with ExitStack() as stack:
            for batch in _batches(data, counts):
                for split, encoded in encoder.encode(batch).items():
                    if split not in writers:
                        name = f"{split}/part-{part.number:05d}"
                        stem = shards_folder(work, plan) / name
                        writer = ShardWriter(stem, name, plan.vocab_size, marked=plan.marks)
                        writers[split] = stack.enter_context(writer)
                    ids = np.frombuffer(encoded.ids, dtype=np.uint32)
                    ids, marks = split_marks(ids) if plan.marks else (ids, None)
                    writers[split].add(ids, np.array(encoded.lengths, dtype=np.int64), encoded.bytes, marks)
                    without_text |= {split} if encoded.without_text else set()
                if notes is not None:
                    _note(notes, batch, is_training(part.split))
        shards = [
            {**writer.facts().to_json(), **({"bytes": 0} if split in without_text else {})}  # not known of ready ids
            for split, writer in writers.items()
        ]
        mark = {"shards": shards, "files": counts.files, "bad": counts.named, **counts.kept_out}
        if notes is not None:
            mark["fingerprints"] = save_array(fingerprints_of(work, part), notes.array())
        replace_file(marker(work, part), json.dumps(mark).encode())
        yield from ()


@dataclass
class _Encoded:
    """Documents of a split: their ids one after another, how many each has, and their UTF-8 bytes."""

    ids: array[int] = field(default_factory=lambda: array("I"))
    lengths: list[int] = field(default_factory=list)
    bytes: int = 0
    without_text: bool = False


@dataclass(frozen=True)
class _Encoder:
    """Documents to ids by split; with `marker` they are marked, with `separator` each is a pair that it parts."""

    tokenizer: Tokenizer
    counts: _Counts
    on_error: Policy
    marker: Marker | None
    separator: int | None

    def encode(self, batch: list[PipelineDocument]) -> dict[str, _Encoded]:
        """What a batch gives; bad documents are noted, and marked so."""
        texts: Iterator[str] = (document.text for document in batch if document.metadata["ids"] is None)
        texts = texts if self.separator is None else self._sides(texts)
        encoded_texts = encode_texts(self.tokenizer, texts, self.marker)
        splits: dict[str, _Encoded] = {}
        for document in batch:
            split, ready = document.metadata["split"], document.metadata["ids"]
            if ready is not None:
                self._add_ready(splits.setdefault(split, _Encoded()), document, ready)
                continue
            ids: array[int] | UncutTextError | str = next(encoded_texts)
            if self.separator is not None:
                ids = self._pair(ids, next(encoded_texts))
            if not isinstance(ids, array):
                problem = ReadReport(on_error=self.on_error)
                problem.note_bad(document.id, str(ids), "too long" if isinstance(ids, UncutTextError) else "field")
                document.metadata["is_bad"] = True
                self.counts.note(document.metadata["file"], problem)
                continue
            text = document.text
            size = len(text) if text.isascii() else len(text.encode("utf-8"))
            size -= self.separator is not None
            encoded = splits.setdefault(split, _Encoded())
            if encoded.ids:
                encoded.ids.extend(ids)
            else:
                encoded.ids = ids  # a long one is not copied
            encoded.lengths.append(len(ids))
            encoded.bytes += size
            self.counts.add(document.metadata["file"], split, len(ids), size)
        return splits

    def _add_ready(self, encoded: _Encoded, document: PipelineDocument, ready: bytes) -> None:
        if self.marker is not None:
            raise ValueError(
                f"`{document.id}` is ready ids, which do not say where words start; objective.whole_words and "
                "objective.sentences need text"
            )
        encoded.ids.frombytes(ready)
        encoded.lengths.append(len(ready) // 4)
        encoded.without_text = True
        self.counts.add(document.metadata["file"], document.metadata["split"], len(ready) // 4, 0)

    def _sides(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            yield from sides(text)

    def _pair(
        self, source: array[int] | UncutTextError | str, target: array[int] | UncutTextError
    ) -> array[int] | UncutTextError | str:
        """The ids of a pair, or what is wrong with it."""
        assert self.separator is not None
        if not isinstance(source, array) or not isinstance(target, array):
            return target if isinstance(source, array) else source
        if not source or not target:
            return "a side of the pair has no tokens"
        return source + array("I", [self.separator]) + target


def _note(notes: Fingerprints, batch: list[PipelineDocument], from_training: bool) -> None:
    """Fingerprint documents; those of files that are named for validation stay, whatever they repeat."""
    for document in batch:
        if "is_bad" in document.metadata:
            continue  # it is in no shard
        notes.add(
            document.text,
            held_out=not is_training(document.metadata["split"]),
            stays=not from_training,
            file=document.metadata["file"],
            position=int(document.id.rpartition(":")[2]),
        )


class _Counts:
    """Documents, tokens, bytes, and what was bad, by file of a part."""

    def __init__(self, plan: Plan) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self.named: list[str] = []
        self.kept_out: dict[str, Any] = {}
        self._plan = plan

    def _of(self, file: int) -> dict[str, Any]:
        return self.files.setdefault(self._plan.files[file].name, {**no_problems(), "splits": {}})

    def add(self, file: int, split: str, tokens: int, size: int) -> None:
        counts = self._of(file)["splits"].setdefault(split, {"documents": 0, "tokens": 0, "bytes": 0})
        counts["documents"] += 1
        counts["tokens"] += tokens
        counts["bytes"] += size

    def note(self, file: int, read: ReadReport) -> None:
        counts = self._of(file)
        add_problems(counts, counts_of(read))
        self.named.extend(read.named[: NAMED_PROBLEMS - len(self.named)])


def _batches(documents: Iterator[PipelineDocument], counts: _Counts) -> Iterator[list[PipelineDocument]]:
    """Documents in lists that keep the tokenizer's threads busy; the reports between them go to `counts`."""
    batch: list[PipelineDocument] = []
    size = 0
    for document in documents:
        if "read" in document.metadata:
            counts.note(document.metadata["file"], document.metadata["read"])
            continue
        if "kept_out" in document.metadata:
            counts.kept_out = document.metadata
            continue
        batch.append(document)
        size += len(document.text) + len(document.metadata["ids"] or b"")
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
