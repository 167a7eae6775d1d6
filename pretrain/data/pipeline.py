"""The pipeline of a part: read, keep, encode, write. Steps in datatrove's form, so that its executors run them.

What lives here: what a worker does with one part of the plan. What must not: who does the work (`executors`), how text
is read, cut or packed, or the artifact at the end.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document as PipelineDocument
from datatrove.pipeline.base import PipelineStep
from tokenizers import Tokenizer

from pretrain.data.documents import ReadReport, read_documents
from pretrain.data.parts import Part, Piece, Plan
from pretrain.data.shards import ShardWriter
from pretrain.data.unfinished import NAMED_PROBLEMS, marker, open_progress
from pretrain.files import replace_file

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 8192


@lru_cache(maxsize=1)
def _read_plan(path: str, digest: str) -> Plan:
    return Plan.from_json(json.loads(Path(path).read_text(encoding="utf-8")))


@lru_cache(maxsize=1)
def _load_tokenizer(directory: str, digest: str) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A text that spells a special token gets the ids of its characters, not the special id.
    tokenizer.encode_special_tokens = True
    return tokenizer


class _PartStep(PipelineStep):  # type: ignore[misc]
    """A step that finds its part in the plan on the disk: rank r works on part r. Small, as it travels to workers."""

    def __init__(self, work: Path, plan: Plan) -> None:
        super().__init__()
        self.work, self.digest = str(work), plan.digest

    def plan_and_part(self, rank: int) -> tuple[Plan, Part]:
        plan = _read_plan(str(Path(self.work) / "plan.json"), self.digest)
        return plan, plan.parts[rank]


class ReadPart(_PartStep):
    """Yields the documents of a part, each with the split it goes to and its file."""

    name = "read"
    type = "reader"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[PipelineDocument]:
        """Read the part's pieces in order."""
        plan, part = self.plan_and_part(rank)
        progress = open_progress(Path(self.work))
        done = size = 0
        for piece in part.pieces:
            if plan.max_bytes is not None and size >= plan.max_bytes:
                break
            file = plan.files[piece.file]
            read = ReadReport()
            split_of = plan.split_of(part, piece)
            documents = read_documents(
                file,
                document=plan.document,
                text_field=plan.text_field,
                byte_range=piece.byte_range,
                report=read,
                max_bytes=None if plan.max_bytes is None else plan.max_bytes - size,
            )
            for whole in documents:
                for split, document in split_of(whole):
                    metadata = {"split": split, "file": piece.file}
                    yield PipelineDocument(document.text, f"{file.name}:{document.position}", metadata=metadata)
                progress[rank] = done + read.consumed
                size += len(whole.text.encode()) if plan.max_bytes is not None else 0
            done += _weight(plan, piece)
            progress[rank] = done
            yield PipelineDocument("", "", metadata={"read": read, "file": piece.file})


def _weight(plan: Plan, piece: Piece) -> int:
    if piece.byte_range is not None:
        return piece.byte_range[1] - piece.byte_range[0]
    size = plan.files[piece.file].bytes
    return size if plan.max_bytes is None else min(size, plan.max_bytes)


class WriteShards(_PartStep):
    """Encodes documents in batches, without special tokens, and writes one shard a split; then marks the part."""

    name = "tokenise and write"
    type = "writer"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[PipelineDocument]:
        """Write the part, and mark it as finished. Yields nothing."""
        plan, part = self.plan_and_part(rank)
        tokenizer = _load_tokenizer(plan.tokenizer, plan.tokenizer_digest)
        work = Path(self.work)
        counts = _Counts(plan)
        writers: dict[str, ShardWriter] = {}
        with ExitStack() as stack:
            for batch in _batches(data, counts):
                for split, encoded in _encode(tokenizer, batch, counts).items():
                    if split not in writers:
                        name = f"{split}/part-{part.number:05d}"
                        writer = ShardWriter(work / "data" / name, name, plan.vocab_size)
                        writers[split] = stack.enter_context(writer)
                    ids = np.frombuffer(encoded.ids, dtype=np.uint32)
                    writers[split].add(ids, np.array(encoded.lengths, dtype=np.int64), encoded.bytes)
        shards = [asdict(writer.facts()) for writer in writers.values()]
        mark = {"shards": shards, "files": counts.files, "bad": counts.named}
        replace_file(marker(work, part), json.dumps(mark).encode())
        yield from ()


@dataclass
class _Encoded:
    """Documents of a split: their ids one after another, how many each has, and their UTF-8 bytes."""

    ids: array[int] = field(default_factory=lambda: array("I"))
    lengths: list[int] = field(default_factory=list)
    bytes: int = 0


def _encode(tokenizer: Tokenizer, batch: list[PipelineDocument], counts: _Counts) -> dict[str, _Encoded]:
    encodings = tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
    splits: dict[str, _Encoded] = {}
    for document, encoding in zip(batch, encodings, strict=True):
        split, ids = document.metadata["split"], encoding.ids
        text = document.text
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
        encoded = splits.setdefault(split, _Encoded())
        encoded.ids.fromlist(ids)
        encoded.lengths.append(len(ids))
        encoded.bytes += size
        counts.add(document.metadata["file"], split, len(ids), size)
    return splits


class _Counts:
    """Documents, tokens, bytes, and what was bad, by file of a part."""

    def __init__(self, plan: Plan) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self.named: list[str] = []
        self._plan = plan

    def _of(self, file: int) -> dict[str, Any]:
        return self.files.setdefault(self._plan.files[file].name, {"bad": 0, "empty": 0, "splits": {}})

    def add(self, file: int, split: str, tokens: int, size: int) -> None:
        counts = self._of(file)["splits"].setdefault(split, {"documents": 0, "tokens": 0, "bytes": 0})
        counts["documents"] += 1
        counts["tokens"] += tokens
        counts["bytes"] += size

    def note(self, file: int, read: ReadReport) -> None:
        counts = self._of(file)
        counts["bad"] += read.bad
        counts["empty"] += read.empty
        self.named.extend(read.named[: NAMED_PROBLEMS - len(self.named)])


def _batches(documents: Iterator[PipelineDocument], counts: _Counts) -> Iterator[list[PipelineDocument]]:
    """Documents in lists that keep the tokenizer's threads busy; the reports between them go to `counts`."""
    batch: list[PipelineDocument] = []
    size = 0
    for document in documents:
        if "read" in document.metadata:
            counts.note(document.metadata["file"], document.metadata["read"])
            continue
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
