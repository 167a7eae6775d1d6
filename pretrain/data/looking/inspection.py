"""A batch taken apart: rows, the documents in them, what each token is and what is predicted at it.

What lives here: plain values made of a batch and its packing plan. What must not: colours, layout, or another way to
make a batch than the trainer's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pretrain.data.batches import Batch, LoadedSplit
from pretrain.data.looking.spelling import Spelling, visible
from pretrain.data.objectives import IGNORE
from pretrain.data.order import IntArray
from pretrain.data.shards import TokenStore
from pretrain.data.vocabulary import SpecialIds

Kind = Literal["plain", "masked", "random", "kept", "ahead", "none", "output"]
"""What is predicted at a place.

    plain   causal: the next place's token; masked, or read by an encoder: nothing
    masked  the token itself, hidden behind [MASK]
    random  the token itself, replaced by another
    kept    the token itself, left as it is
    ahead   causal: a token that does not stand at the next place, as a piece or a row ends here
    none    causal: nothing, as the document ends here
    output  no place of the input: what the decoder is to write for the piece, behind the piece's own tokens
"""


@dataclass(frozen=True)
class Token:
    """One place of a row. `text` is the original's where one is hidden, `shown` what the model sees at `random`."""

    id: int
    text: str
    is_special: bool
    position: int
    kind: Kind
    target: int | None
    target_text: str
    shown: str = ""


@dataclass(frozen=True)
class Origin:
    """Where a piece comes from. `document` counts in the shard, `document_in_file` in what the split has of the file.

    `file` is None where the data do not say it for sure. `first` and `end` bound the piece in its document's tokens.
    """

    shard: str
    document: int
    file: str | None
    document_in_file: int | None
    documents_of_file: int | None
    first: int
    end: int
    tokens: int

    @property
    def is_whole(self) -> bool:
        """Whether the piece is all of its document."""
        return self.first == 0 and self.end == self.tokens


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one, in a row. `pair` is the label of its two segments: 0 where the second follows."""

    origin: Origin
    tokens: tuple[Token, ...]
    pair: int | None = None


@dataclass(frozen=True)
class Row:
    """A row of a batch; `plan_row` is its number in the packing plan of its source."""

    number: int
    split: str
    source: str
    epoch: int
    plan_row: int
    pieces: tuple[Piece, ...]
    targets: int
    tokens: int
    padding: int


@dataclass(frozen=True)
class Totals:
    """Counts over all rows of a batch. `kinds` counts places by what is predicted at them, padding left out.

    `pairs` counts pairs of segments by their label.
    """

    rows: int
    length: int
    tokens: int
    targets: int
    pieces: int
    sources: dict[str, int]
    kinds: dict[Kind, int]
    pairs: dict[int, int] = field(default_factory=dict)

    @property
    def utilisation(self) -> float:
        """Share of the places that is not padding."""
        return self.tokens / max(1, self.rows * self.length)


class Inspector:
    """Takes batches of given splits apart."""

    def __init__(self, directory: Path, splits: Sequence[LoadedSplit], spelling: Spelling) -> None:
        """`directory` is the data directory that the splits lie in."""
        self._splits = list(splits)
        self._spelling = spelling
        files = _files(directory)
        self._files = [FileNames(split.store, files) for split in splits]

    def totals(self, batch: Batch) -> Totals:
        """Counts over the whole batch."""
        places = batch.arrays["document_ids"] > 0
        counted = Counter(_kinds(batch, self._splits[0].tokens)[places].tolist())
        if _is_paired(batch):
            counted[_KINDS.index("output")] = batch.num_targets
        labels = batch.arrays.get("sentence_labels", np.empty(0, dtype=np.int64))
        names = Counter(self._splits[source].source for source in batch.row_ids[:, 0].tolist())
        rows, length = batch.arrays["input_ids"].shape
        return Totals(
            rows=rows,
            length=length,
            tokens=batch.num_tokens,
            targets=batch.num_targets,
            pieces=int(batch.arrays["document_ids"].max(axis=1).sum()),
            sources=dict(sorted(names.items())),
            kinds={kind: counted[number] for number, kind in enumerate(_KINDS) if counted[number]},
            pairs=dict(sorted(Counter(labels[labels != IGNORE].tolist()).items())),
        )

    def row(self, batch: Batch, number: int) -> Row:
        """Row `number` of the batch, from 0."""
        source, epoch, plan_row = batch.row_ids[number].tolist()
        one = slice(number, number + 1)
        alone = Batch({name: array[one] for name, array in batch.arrays.items()}, 0, 0, batch.row_ids[one])
        targets, _ = _targets(alone)
        split = self._splits[source]
        numbers = alone.arrays["document_ids"][0]  # (L,)
        bounds = split.plan.rows[plan_row : plan_row + 2].astype(np.int64)
        pieces = split.plan.pieces[bounds[0] : bounds[1]]
        kinds = _kinds(alone, split.tokens)[0]
        labels = alone.arrays["sentence_labels"][0] if "sentence_labels" in alone.arrays else None
        made = []
        for slot, piece in enumerate(pieces, start=1):
            places = np.flatnonzero(numbers == slot)
            origin = self._files[source].origin(int(piece["offset"]), int(piece["length"]))
            ids = alone.arrays["input_ids"][0, places]
            none = np.full(len(places), IGNORE)
            tokens = self._tokens(ids, none if _is_paired(alone) else targets[0, places], kinds[places], places)
            if _is_paired(alone):
                tokens += self._output(alone, slot)
            pair = int(labels[slot - 1]) if labels is not None and labels[slot - 1] != IGNORE else None
            made.append(Piece(origin, tokens, pair))
        used = int(np.count_nonzero(numbers))
        return Row(
            number,
            split=split.shards[0].name.partition("/")[0],
            source=split.source,
            epoch=epoch,
            plan_row=plan_row,
            pieces=tuple(made),
            targets=int(np.count_nonzero(targets != IGNORE)),
            tokens=used,
            padding=len(numbers) - used,
        )

    def _output(self, alone: Batch, slot: int) -> tuple[Token, ...]:
        """What the decoder is to write for a piece of a row, the places counted in the decoder's row."""
        places = np.flatnonzero(alone.arrays["decoder_document_ids"][0] == slot)
        targets = alone.arrays["labels"][0, places]
        return self._tokens(targets, targets, np.full(len(places), _KINDS.index("output")), places)

    def _tokens(self, ids: IntArray, targets: IntArray, kinds: Any, places: IntArray) -> tuple[Token, ...]:
        """The tokens at the places of one piece; all arrays are (n,)."""
        hidden = np.isin(kinds, [_KINDS.index(kind) for kind in ("masked", "random")])
        original = np.where(hidden, targets, ids).tolist()
        texts = self._spelling.spell(original)
        tokens = []
        for token, read, text, target, number, place in zip(
            ids.tolist(), original, texts, targets.tolist(), kinds.tolist(), places.tolist(), strict=True
        ):
            kind = _KINDS[number]
            tokens.append(
                Token(
                    id=token,
                    text=text,
                    is_special=self._spelling.is_special(read),
                    position=place,
                    kind=kind,
                    target=None if target == IGNORE else target,
                    target_text="" if target == IGNORE else self._spelling.alone(target),
                    shown=self._spelling.alone(token) if kind == "random" else "",
                )
            )
        return tuple(tokens)


_KINDS: tuple[Kind, ...] = ("plain", "masked", "random", "kept", "ahead", "none", "output")


def _is_paired(batch: Batch) -> bool:
    """Whether it is an encoder-decoder's."""
    return "decoder_input_ids" in batch.arrays


def _targets(batch: Batch) -> tuple[IntArray, bool]:
    """Targets (B, L), and whether each stands at its own place (a masked model's)."""
    own = "labels" in batch.arrays
    return batch.arrays["labels" if own else "shift_labels"], own


def _kinds(batch: Batch, special: SpecialIds) -> Any:
    """What is predicted at each place, as numbers into `_KINDS`: (B, L) int8. Padding is `plain`."""
    targets, own = _targets(batch)
    ids, numbers = batch.arrays["input_ids"], batch.arrays["document_ids"]
    kinds = np.zeros(ids.shape, dtype=np.int8)
    if _is_paired(batch):
        return kinds
    scored = targets != IGNORE
    if own:
        kinds[scored] = _KINDS.index("random")
        kinds[scored & (ids == targets)] = _KINDS.index("kept")
        if special.mask is not None:
            kinds[scored & (ids == special.mask)] = _KINDS.index("masked")
        return kinds
    follows = np.zeros(ids.shape, dtype=np.bool_)
    follows[:, :-1] = (numbers[:, 1:] == numbers[:, :-1]) & (targets[:, :-1] == ids[:, 1:])
    kinds[scored & ~follows] = _KINDS.index("ahead")
    kinds[~scored & (numbers > 0)] = _KINDS.index("none")
    return kinds


class FileNames:
    """Where a token of a split comes from: shard, document, and the input file where the data say it for sure.

    Documents lie in the order of the input files, and `files.jsonl` counts documents and tokens of each. A file is
    named only where both counts fit the shards at its two ends.
    """

    def __init__(self, store: TokenStore, files: Mapping[str, Sequence[tuple[str, int, int]]]) -> None:
        self._store = store
        self._documents: IntArray = np.cumsum([0, *(shard.documents for shard in store.shards)], dtype=np.int64)
        split = store.shards[0].name.partition("/")[0] if store.shards else ""
        self._names: list[str] = []
        counts: list[tuple[int, int]] = []
        for name, documents, tokens in files.get(split, ()):
            self._names.append(name)
            counts.append((documents, tokens))
        bounds = np.cumsum([(0, 0), *counts], axis=0, dtype=np.int64)
        self._file_documents, self._file_tokens = bounds[:, 0], bounds[:, 1]
        self._holds = bool(counts) and self._file_documents[-1] == self._documents[-1]

    def origin(self, offset: int, length: int) -> Origin:
        """Of a piece that starts at token `offset` of the split and has `length` tokens."""
        shard = int(np.searchsorted(self._store.starts, offset, side="right")) - 1
        ends = self._store.shard(shard)[1]
        inside = offset - int(self._store.starts[shard])
        document = int(np.searchsorted(ends, inside, side="right"))
        begin = int(ends[document - 1]) if document else 0
        name, number, of = self._file(int(self._documents[shard]) + document)
        return Origin(
            shard=self._store.shards[shard].name,
            document=document,
            file=name,
            document_in_file=number,
            documents_of_file=of,
            first=inside - begin,
            end=inside - begin + length,
            tokens=int(ends[document]) - begin,
        )

    def _file(self, document: int) -> tuple[str | None, int | None, int | None]:
        """(file, number of the document in it, documents of it) for a document of the split, numbers from 0."""
        if not self._holds:
            return None, None, None
        file = int(np.searchsorted(self._file_documents, document, side="right")) - 1
        first, end = int(self._file_documents[file]), int(self._file_documents[file + 1])
        fits = [self._tokens_before(bound) for bound in (first, end)] == self._file_tokens[file : file + 2].tolist()
        return (visible(self._names[file]), document - first, end - first) if fits else (None, None, None)

    def _tokens_before(self, document: int) -> int:
        """Tokens of all documents before a document of the split."""
        shard = min(int(np.searchsorted(self._documents, document, side="right")) - 1, len(self._store.shards) - 1)
        inside = document - int(self._documents[shard])
        return int(self._store.starts[shard]) + (int(self._store.shard(shard)[1][inside - 1]) if inside else 0)


def _files(directory: Path) -> dict[str, list[tuple[str, int, int]]]:
    """(file, documents, tokens) of each split in the order of `files.jsonl`; empty where there is none."""
    splits: dict[str, list[tuple[str, int, int]]] = {}
    path = directory / "files.jsonl"
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            file = json.loads(line)
            for split, counts in file["splits"].items():
                splits.setdefault(split, []).append((file["name"], counts["documents"], counts["tokens"]))
    return splits
