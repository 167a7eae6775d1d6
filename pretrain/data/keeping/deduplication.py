"""Repeated documents: which of all training documents are copies of an earlier one.

What lives here: fingerprints of documents, and the choice of those that go. What must not: rewriting shards.

One choice is made over all parts of all sources, so that every worker's documents meet. Of documents that repeat each
other the first is kept: first by source, file and position, as the plan has them, with the held-out documents before
all others, so that a training document that repeats a held-out one goes. Documents that a share or a tail holds out
repeat each other no more than training documents do; those of named validation files all stay.

`exact`: the same text, after the filters, by a hash of 128 bits. `minhash`: texts whose sets of `ngrams`-word runs are
much alike (Broder 1997). The smallest value of each of `buckets` x `hashes_per_bucket` hash functions over a document's
runs is taken; documents that agree in all hashes of one bucket are copies, and so are copies of copies. Two texts of
Jaccard similarity s are found with probability 1 - (1 - s^hashes)^buckets: with 14 buckets of 8, 92% at s = 0.8, 5% at
0.5. Texts shorter than a run count as one run; texts without words are compared as they are. Words are those of
`pretrain.data.keeping.words`, the same for all languages.

datatrove's own steps are not used: they need spaCy for English words, keep any document of a group and not the first,
and drop by its place in a reader that must be run a second time. Here documents are read, filtered and tokenised once;
what is dropped is cut out of the shards.

The choice depends on the fingerprints alone, not on who made them. Fingerprints lie on the disk: 38 bytes a document
(exact), or 22 + 8 x buckets. Memory of the choice: about 17 bytes a document and half a gigabyte, as the hashes are
compared in rounds of 2^23 documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.config_data import Deduplication
from pretrain.data.keeping.words import run_hashes, word_hashes, words_of
from pretrain.data.order import U64, mix

Numbers = npt.NDArray[Any]  # of documents: uint32, or uint64 where there are more than 2^32
_ROUND = 1 << 23
_CHUNK = 256
_SEED = 0x5DEECE66D


def fingerprint_dtype(wanted: Deduplication) -> np.dtype[Any]:
    """What is noted of a document: where it is, its UTF-8 bytes, and its hashes."""
    columns = 2 if wanted.kind == "exact" else wanted.buckets
    return np.dtype(
        [
            ("held_out", "?"),
            ("stays", "?"),
            ("file", "<u4"),
            ("position", "<i8"),
            ("bytes", "<u8"),
            ("hashes", "<u8", (columns,)),
        ]
    )


def hashes_of(text: str, wanted: Deduplication) -> U64:
    """The hashes by which a document is compared: (2,) for exact, (buckets,) for minhash."""
    if wanted.kind == "exact":
        return np.frombuffer(_digest(text), dtype="<u8")
    words = words_of(text)
    if words:
        runs = run_hashes(word_hashes(words), min(wanted.ngrams, len(words)))
    else:
        runs = np.frombuffer(_digest(text), dtype="<u8")[:1]
    multipliers, addends = _functions(wanted.buckets * wanted.hashes_per_bucket)
    smallest = np.full((len(multipliers), 1), np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(runs), _CHUNK):
        values = multipliers * runs[start : start + _CHUNK]  # (hashes, runs)
        values += addends
        np.minimum(smallest, values.min(axis=1, keepdims=True), out=smallest)
    by_bucket = mix(smallest.reshape(wanted.buckets, wanted.hashes_per_bucket))
    total = by_bucket[:, 0].copy()
    for column in by_bucket.T[1:]:
        total = mix(total + column)
    return total


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


@lru_cache(maxsize=4)
def _functions(count: int) -> tuple[U64, U64]:
    """Multipliers (odd) and addends of `count` hash functions (a x + b) mod 2^64: (count, 1) each."""
    numbers = mix(np.arange(2 * count, dtype=np.uint64) + np.uint64(_SEED))[:, None]
    return numbers[:count] | np.uint64(1), numbers[count:]


class Fingerprints:
    """Notes the fingerprints of a part's documents, in order."""

    def __init__(self, wanted: Deduplication) -> None:
        self._wanted, self._dtype = wanted, fingerprint_dtype(wanted)
        self._blocks: list[npt.NDArray[Any]] = []
        self._rows: list[tuple[Any, ...]] = []

    def add(self, text: str, *, held_out: bool, stays: bool, file: int, position: int) -> None:
        """Note a document; one that `stays` is never dropped."""
        hashes = hashes_of(text, self._wanted)
        self._rows.append((held_out, stays, file, position, len(text.encode()), hashes))
        if len(self._rows) >= _CHUNK:
            self._pack()

    def _pack(self) -> None:
        self._blocks.append(np.array(self._rows, dtype=self._dtype))
        self._rows = []

    def array(self) -> npt.NDArray[Any]:
        """All of them: (N,) of `fingerprint_dtype`."""
        self._pack()
        return np.concatenate(self._blocks)


@dataclass(frozen=True)
class Choice:
    """Documents that go, and what each repeats; documents are numbered through all parts, in the plan's order.

    `goes` is (N,); `repeats` (D,) holds the number of the document that stays in the place of each that goes, in order,
    and whether it is held out.
    """

    goes: npt.NDArray[np.bool_]
    repeats: npt.NDArray[Any]


def choose(parts: Sequence[npt.NDArray[Any]], kind: str, round_size: int = _ROUND) -> Choice:
    """Choose the documents that go, given the fingerprints of each part (mapped from the disk, in the plan's order)."""
    held_out = _column(parts, "held_out")
    order = np.concatenate([np.flatnonzero(held_out), np.flatnonzero(~held_out)])  # rank -> document
    dtype = np.uint32 if len(order) < 1 << 32 else np.uint64
    order = order.astype(dtype)
    rank = np.empty(len(order), dtype=dtype)
    rank[order] = np.arange(len(order), dtype=dtype)
    first = np.arange(len(order), dtype=dtype)  # by rank: the first of the copies known so far
    columns: list[tuple[int, ...]] = [(0, 1)]
    if kind == "minhash":
        columns = [(column,) for column in range(parts[0]["hashes"].shape[1])] if parts else []
    for some in columns:
        for earlier, later in _pairs(parts, some, rank, round_size):
            _join(first, earlier, later)
    goes_by_rank = first != np.arange(len(first), dtype=dtype)
    goes = goes_by_rank[rank]
    goes &= ~_column(parts, "stays")
    repeats = np.empty(int(goes.sum()), dtype=[("document", "<i8"), ("held_out", "?")])
    repeats["document"] = order[first[rank[goes]]]
    repeats["held_out"] = held_out[repeats["document"]]
    return Choice(goes, repeats)


def _column(parts: Sequence[npt.NDArray[Any]], name: str) -> npt.NDArray[np.bool_]:
    return np.concatenate([np.empty(0, dtype=np.bool_), *(part[name] for part in parts)])


def _pairs(
    parts: Sequence[npt.NDArray[Any]], columns: tuple[int, ...], rank: Numbers, round_size: int
) -> Iterator[tuple[Numbers, Numbers]]:
    """Pairs of ranks that agree in all the columns, each document with the first that it agrees with."""
    rounds = np.uint64(-(-len(rank) // round_size) or 1)
    for number in range(int(rounds)):
        keys: list[list[U64]] = [[] for _ in columns]
        ranks: list[Numbers] = []
        start = 0
        for part in parts:
            hashes = part["hashes"]
            chosen = np.flatnonzero(hashes[:, columns[0]] % rounds == number)
            ranks.append(rank[start + chosen])
            for place, column in zip(keys, columns, strict=True):
                place.append(hashes[chosen, column])
            start += len(part)
        ranks_of_all = np.concatenate(ranks) if ranks else rank[:0]
        values = [np.concatenate([np.empty(0, dtype=np.uint64), *key]) for key in keys]
        places = np.lexsort((ranks_of_all, *values))
        ranks_of_all = ranks_of_all[places]
        same = np.ones(max(0, len(places) - 1), dtype=np.bool_)
        for value in values:
            ordered = value[places]
            same &= ordered[1:] == ordered[:-1]
        repeats = np.flatnonzero(same) + 1
        starts = np.arange(len(places))
        starts[repeats] = 0
        starts = np.maximum.accumulate(starts)  # where each run of equal ones starts
        yield ranks_of_all[starts[repeats]], ranks_of_all[repeats]


def _join(first: Numbers, earlier: Numbers, later: Numbers) -> None:
    """Make the pairs members of one group each: `first` then holds the smallest rank of each one's group."""
    while True:
        left, right = first[earlier], first[later]
        apart = left != right
        if not apart.any():
            return
        earlier, later = earlier[apart], later[apart]
        left, right = left[apart], right[apart]
        smaller = np.minimum(left, right)
        np.minimum.at(first, left, smaller)
        np.minimum.at(first, right, smaller)
        while True:
            further = first[first]
            if np.array_equal(further, first):
                break
            first[:] = further
