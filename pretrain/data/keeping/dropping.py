"""Shards without the documents that repeat others: what deduplication chose is cut out of the candidates.

What lives here: the last pass over a part. What must not: the choice (`deduplication`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datatrove.data import Document as PipelineDocument

from pretrain.data.keeping.deduplication import choose
from pretrain.data.keeping.kept_out import SAMPLE_CHARACTERS, SAMPLES, Tally, sample_of
from pretrain.data.keeping.sieve import DEDUP, source_of
from pretrain.data.preparing.parts import Plan, is_training
from pretrain.data.preparing.pipeline import PartStep, load_tokenizer
from pretrain.data.preparing.unfinished import (
    fingerprints_of,
    load_array,
    marker,
    open_progress,
    save_array,
    shards_folder,
)
from pretrain.data.shards import ShardFacts, ShardWriter, TokenStore
from pretrain.files import replace_file

_BATCH = 8192
_GOES, _REPEATS = "goes.npy", "repeats.npy"
_HELD_OUT, _TRAINED_ON = "repeats a validation document", "repeats a training document"


def choose_among_all(work: Path, plan: Plan) -> None:
    """Choose the documents that go, once all parts are read, unless an earlier call has done so."""
    if (work / _GOES).is_file():
        return
    parts = [load_array(fingerprints_of(work, part)) for part in plan.parts]
    choice = choose(parts, plan.steps[DEDUP]["kind"])
    save_array(work / _REPEATS, choice.repeats)
    save_array(work / _GOES, choice.goes)  # last: its presence is the mark


class DropRepeated(PartStep):
    """Writes a part's shards again without the documents that go, and marks it."""

    name = "drop repeated documents"
    type = "writer"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[PipelineDocument]:
        """Write the part. Yields nothing."""
        plan, part = self.plan_and_part(rank)
        work = Path(self.work)
        mark = json.loads(marker(work, part).read_text(encoding="utf-8"))
        rewriting = _Rewriting(work, plan, rank)
        rewritten = [rewriting.without_repeated(ShardFacts(**shard), mark["files"]) for shard in mark["shards"]]
        mark["shards"] = [shard for shard in rewritten if shard is not None]
        rewriting.count()
        mark["kept_out"]["steps"] |= rewriting.tally.steps
        mark["kept_out"]["samples"] |= rewriting.tally.samples
        replace_file(marker(work, part, kept=True), json.dumps(mark).encode())
        open_progress(work)[rank] = part.weight
        yield from ()


class _Rewriting:
    """A part's documents, which of them go, and what they are copies of."""

    def __init__(self, work: Path, plan: Plan, rank: int) -> None:
        self.work, self.plan, self.part = work, plan, plan.parts[rank]
        self.tally = Tally([DEDUP])
        start = sum(len(load_array(fingerprints_of(work, part))) for part in plan.parts[:rank])
        self.documents = load_array(fingerprints_of(work, self.part))  # (N,)
        goes = load_array(work / _GOES)
        self.goes = np.array(goes[start : start + len(self.documents)])  # (N,)
        before = int(np.count_nonzero(goes[:start]))
        self.repeats = load_array(work / _REPEATS)[before : before + int(self.goes.sum())]  # of those that go

    def without_repeated(self, shard: ShardFacts, files: dict[str, Any]) -> dict[str, Any] | None:
        """Write a shard anew; None when nothing is left of it. What goes is taken off the counts of its file."""
        split = shard.name.partition("/")[0]
        here = np.flatnonzero(self.documents["held_out"] != is_training(split))
        goes = self.goes[here]
        store = TokenStore(shards_folder(self.work, self.plan), [shard], self.plan.vocab_size)
        lengths = store.document_lengths()
        starts = np.cumsum(lengths) - lengths
        assert len(lengths) == len(here), "fingerprints and shards come from the same pass"
        self._take_off(files, split, here[goes], lengths[goes])
        self._show(store, here[goes], starts[goes], lengths[goes])
        if goes.all():
            return None
        sizes = self.documents["bytes"][here]
        marked = shard.marks_digest is not None
        with ShardWriter(self.work / "data" / shard.name, shard.name, self.plan.vocab_size, marked=marked) as writer:
            for first in range(0, len(here), _BATCH):
                stays = np.flatnonzero(~goes[first : first + _BATCH]) + first
                runs = (starts[stays], lengths[stays])
                marks = store.gather_marks(*runs) if marked else None
                writer.add(store.gather(*runs), lengths[stays], int(sizes[stays].sum()), marks)
        return writer.facts().to_json()

    def _take_off(
        self, files: dict[str, Any], split: str, gone: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
    ) -> None:
        rows = self.documents[gone]
        for number in np.unique(rows["file"]):
            chosen = rows["file"] == number
            splits = files[self.plan.files[number].name]["splits"]
            counts = splits[split]
            counts["documents"] -= int(chosen.sum())
            counts["tokens"] -= int(lengths[chosen].sum())
            counts["bytes"] -= int(rows["bytes"][chosen].sum())
            if not counts["documents"]:
                del splits[split]

    def count(self) -> None:
        """Count what goes and what stays, by source and by what it repeats."""
        held_out = np.zeros(len(self.goes), dtype=np.bool_)
        held_out[self.goes] = self.repeats["held_out"]
        for number in np.unique(self.documents["file"]):
            here = self.documents["file"] == number
            source = source_of(self.plan, int(number))
            for reason, chosen in ((_HELD_OUT, held_out), (_TRAINED_ON, self.goes & ~held_out)):
                if (some := here & chosen).any():
                    size = int(self.documents["bytes"][some].sum())
                    self.tally.remove(DEDUP, source, size, reason, documents=int(some.sum()))
            if (some := here & ~self.goes).any():
                self.tally.keep(DEDUP, source, int(self.documents["bytes"][some].sum()), documents=int(some.sum()))

    def _show(
        self,
        store: TokenStore,
        gone: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
    ) -> None:
        """Keep the first documents that go to look at: the text as the tokens spell it, and where the other one is."""
        tokenizer = load_tokenizer(self.plan.tokenizer, self.plan.tokenizer_digest)
        numbers = np.cumsum(self.goes) - 1  # of a document among those that go
        for row, start, length in zip(gone[:SAMPLES], starts, lengths, strict=False):
            other = self.repeats[numbers[row]]
            ids = store.gather(np.array([start]), np.array([min(length, 4 * SAMPLE_CHARACTERS)]))
            text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            repeats = self._place_in_all(int(other["document"]))
            sample = sample_of(self._place(self.documents[row]), text, repeats=repeats)
            self.tally.show(DEDUP, _HELD_OUT if other["held_out"] else _TRAINED_ON, sample)

    def _place(self, document: Any) -> str:
        return f"{self.plan.files[document['file']].name}:{document['position']}"

    def _place_in_all(self, number: int) -> str:
        """Where a document of any part is, given its number through all of them."""
        for part in self.plan.parts:
            documents = load_array(fingerprints_of(self.work, part))
            if number < len(documents):
                return self._place(documents[number])
            number -= len(documents)
        raise AssertionError("a document beyond the last part")
