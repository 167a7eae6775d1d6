"""Counts over prepared shards, in one pass of bounded memory: lengths, tokens, repeated documents, packing.

What lives here: counting on arrays of ids. What must not: text, or how the numbers are shown.

Ids are read in blocks. Lengths are counted exactly up to a length that only giants pass; those are kept as they are. A
repeated document is found by a 64-bit hash of its ids, 8 bytes a document; past `MOST_DOCUMENTS` a share of the hashes,
chosen by their value so that all copies of a text are in it or none, stands for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.order import U64, IntArray, mix
from pretrain.data.packing import FIRST, LAST, PackingPlan, wire_lengths
from pretrain.data.shards import TokenStore

MOST_DOCUMENTS = 50_000_000
"""More documents than this are looked at for repetition by a share of their hashes."""
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)

_BLOCK_TOKENS = 1 << 22
_BLOCK_PIECES = 1 << 22
_COUNTED_LENGTHS = 1 << 20
_BASE = 0xD6E8FEB86659FD93  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)
_WORD = (1 << 64) - 1

Told = Callable[[int], object]
"""Called with the number of tokens that were read since it was called last."""


@dataclass
class Lengths:
    """Tokens a document, counted."""

    counted: IntArray = field(default_factory=lambda: np.zeros(_COUNTED_LENGTHS, dtype=np.int64))
    giants: list[int] = field(default_factory=list)

    def add(self, lengths: IntArray) -> None:
        """Count documents of these lengths, (D,)."""
        small = lengths[lengths < _COUNTED_LENGTHS]
        self.counted += np.bincount(small, minlength=_COUNTED_LENGTHS)
        self.giants.extend(lengths[lengths >= _COUNTED_LENGTHS].tolist())

    @property
    def documents(self) -> int:
        """How many were counted."""
        return int(self.counted.sum()) + len(self.giants)

    @property
    def empty(self) -> int:
        """Documents without a token."""
        return int(self.counted[0])

    def quantiles(self) -> dict[str, int]:
        """The shortest length that a share of the documents does not pass, by share as a percentage."""
        if not self.documents:
            return {}
        below, giants = np.cumsum(self.counted), sorted(self.giants)
        found = {}
        for share in QUANTILES:
            rank = max(1, int(np.ceil(share * self.documents)))  # from 1
            place = int(np.searchsorted(below, rank))
            found[f"{share:.0%}"] = place if place < _COUNTED_LENGTHS else giants[rank - int(below[-1]) - 1]
        return found

    def histogram(self) -> list[dict[str, int]]:
        """Documents and tokens by length, in doublings: [1, 1], [2, 3], [4, 7], ...; empty ones left out."""
        bins: list[dict[str, int]] = []
        sizes = np.arange(_COUNTED_LENGTHS, dtype=np.int64)
        low = 1
        longest = max(self.giants, default=int(np.flatnonzero(self.counted)[-1]) if self.counted.any() else 0)
        while low <= longest:
            high = 2 * low - 1
            part = slice(low, high + 1)
            giants = [length for length in self.giants if low <= length <= high]
            documents = int(self.counted[part].sum()) + len(giants)
            tokens = int((self.counted[part] * sizes[part]).sum()) + sum(giants)
            bins.append({"from": low, "to": high, "documents": documents, "tokens": tokens})
            low = high + 1
        return bins


@dataclass
class SplitCounts:
    """What a pass over the ids of a split gave.

    `hashes` (D,) are of the documents with tokens, in order, and `numbers` (D,) say the how-manieth of these each is.
    """

    lengths: Lengths
    token_counts: IntArray
    hashes: U64
    numbers: IntArray


def count_split(store: TokenStore, vocab_size: int, *, share: float = 1.0, told: Told | None = None) -> SplitCounts:
    """Read all ids of a split once.

    Args:
        store: the split's shards.
        vocab_size: ids are below it.
        share: of the hashes to keep; a text is kept with all its copies, or not at all.
        told: called with the tokens that were read.
    """
    lengths = Lengths()
    token_counts = np.zeros(vocab_size, dtype=np.int64)
    hashed: list[U64] = []
    numbers: list[IntArray] = []
    before = 0
    for number in range(len(store.shards)):
        ids, ends = store.shard(number)
        of_documents = _lengths_of(ends)
        lengths.add(of_documents)
        some = _hashes(ids, of_documents, token_counts, told)
        kept = np.arange(len(some)) if share >= 1.0 else np.flatnonzero(some < np.uint64(int(share * 2**64)))
        hashed.append(some[kept])
        numbers.append(kept + before)
        before += len(some)
    if not hashed:
        return SplitCounts(lengths, token_counts, np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64))
    return SplitCounts(lengths, token_counts, np.concatenate(hashed), np.concatenate(numbers))


def _lengths_of(ends: npt.NDArray[Any]) -> IntArray:
    """Tokens of each document of a shard, from where the documents end: (D,)."""
    lengths: npt.NDArray[Any] = np.diff(ends.astype(np.int64), prepend=0)
    return lengths


def _blocks(ids: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    for start in range(0, len(ids), _BLOCK_TOKENS):
        yield np.asarray(ids[start : start + _BLOCK_TOKENS])


def _count(block: npt.NDArray[Any], token_counts: IntArray, told: Told | None) -> None:
    token_counts += np.bincount(block, minlength=len(token_counts))
    if told is not None:
        told(len(block))


def _hashes(ids: npt.NDArray[Any], lengths: IntArray, token_counts: IntArray, told: Told | None) -> U64:
    """A hash of each document's ids, documents without any left out; tokens are counted on the way.

    The hash is the polynomial sum of (id + 1) * base^place modulo 2^64, scrambled together with the length: base^place
    runs over a block, and each document's sum is divided by the power at which it starts.
    """
    lengths = lengths[lengths > 0]
    starts = np.cumsum(lengths) - lengths
    sums = np.zeros(len(lengths), dtype=np.uint64)
    powers, inverses = _powers(_BASE), _powers(_INVERSE)
    for number, block in enumerate(_blocks(ids)):
        _count(block, token_counts, told)
        begin = number * _BLOCK_TOKENS
        terms = (block.astype(np.uint64) + np.uint64(1)) * powers[: len(block)]
        first = int(np.searchsorted(starts, begin, side="right")) - 1  # the document that the block starts in
        end = int(np.searchsorted(starts, begin + len(block), side="left"))
        inside = starts[first:end] - begin
        parts = np.add.reduceat(terms, np.maximum(inside, 0))
        parts[1:] *= inverses[inside[1:]]
        behind = pow(_BASE, -int(inside[0]), 1 << 64) if inside[0] < 0 else int(inverses[inside[0]])
        parts[:1] *= np.uint64(behind & _WORD)
        sums[first:end] += parts
    return mix(sums ^ mix(lengths.astype(np.uint64)))


@cache
def _powers(base: int) -> U64:
    """base^0, base^1, ... modulo 2^64, one for each place of a block."""
    powers = np.ones(_BLOCK_TOKENS, dtype=np.uint64)
    done = 1
    while done < _BLOCK_TOKENS:
        more = min(done, _BLOCK_TOKENS - done)
        powers[done : done + more] = powers[:more] * np.uint64(pow(base, done, 1 << 64))
        done *= 2
    return powers


# --- repetition -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repeated:
    """How often documents repeat each other, empty ones left out.

    Attributes:
        documents: how many there are.
        copies: how many have the ids of an earlier one: what exact deduplication would leave out.
        groups: (copies in all, hash) of the texts that stand most often, the most frequent first.
    """

    documents: int
    copies: int
    groups: tuple[tuple[int, int], ...]


def find_repeated(hashes: Sequence[U64], *, share: float = 1.0, groups: int = 5) -> Repeated:
    """Count repeated documents over several splits together; `share` of their hashes are given, and stand for all."""
    chosen = np.concatenate([np.empty(0, dtype=np.uint64), *hashes])
    chosen.sort()
    starts = np.flatnonzero(np.concatenate([[True], chosen[1:] != chosen[:-1]])) if len(chosen) else np.empty(0, int)
    counts = np.diff(starts, append=len(chosen))
    biggest = np.argsort(-counts, kind="stable")[:groups]
    return Repeated(
        documents=round(len(chosen) / share),
        copies=round((len(chosen) - len(starts)) / share),
        groups=tuple((int(counts[at]), int(chosen[starts[at]])) for at in biggest if counts[at] > 1),
    )


def count_shared(hashes: U64, others: Sequence[U64], *, share: float = 1.0) -> int:
    """How many documents of one split have the ids of one in `others`; `share` of the hashes are given."""
    found = np.zeros(len(hashes), dtype=np.bool_)
    for some in others:
        found |= np.isin(hashes, some)
    return round(int(found.sum()) / share)


def first_of(store: TokenStore, counts: SplitCounts, wanted: int) -> npt.NDArray[Any] | None:
    """The ids of the first document of a split that has the hash; None when it has none."""
    places = np.flatnonzero(counts.hashes == np.uint64(wanted))
    if not len(places):
        return None
    left = int(counts.numbers[places[0]])
    for number in range(len(store.shards)):
        ids, ends = store.shard(number)
        lengths = _lengths_of(ends)
        full = np.flatnonzero(lengths > 0)
        if left < len(full):
            document = int(full[left])
            return np.asarray(ids[int(ends[document]) - int(lengths[document]) : int(ends[document])])
        left -= len(full)
    return None


# --- packing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackingCounts:
    """What packing makes of a split's documents."""

    rows: int
    utilisation: float
    pieces: int
    most_pieces: int
    full_rows: int
    documents: int
    cut_documents: int


def count_packing(plan: PackingPlan) -> PackingCounts:
    """Rows, pieces and cut documents of a plan; `full_rows` have as many pieces as a row may have."""
    most = full = 0
    for start in range(0, plan.num_rows, _BLOCK_PIECES):
        in_rows = np.diff(plan.rows[start : start + _BLOCK_PIECES + 1].astype(np.int64))
        most = max(most, int(in_rows.max()))
        full += int(np.count_nonzero(in_rows >= plan.spec.max_documents_per_row))
    documents = cut = positions = 0
    for start in range(0, len(plan.pieces), _BLOCK_PIECES):
        pieces = plan.pieces[start : start + _BLOCK_PIECES]
        flags = pieces["flags"]
        positions += int(wire_lengths(plan.spec, pieces["length"], flags).sum())
        opens = (flags & FIRST) != 0
        documents += int(np.count_nonzero(opens))
        cut += int(np.count_nonzero(opens & ((flags & LAST) == 0)))
    utilisation = positions / max(1, plan.num_rows * plan.spec.sequence_length)
    return PackingCounts(plan.num_rows, utilisation, len(plan.pieces), most, full, documents, cut)
