"""Which source each sample comes from: exact shares at every point of the stream, with nothing to carry along.

What lives here: weights, phases, sources that run out. What must not: rows, ids, or the order within a source.

The stream is cut into stretches of constant weights: where a phase begins, and where a source has been read as often as
it may be. Within a stretch a tree of two-way splits says where sample g goes: a node that hands the share a / (a + b)
to the left has sent round(g a / (a + b)) of its first g samples there, so that counts are functions of g and each
node is less than one sample off its share. The tree is Huffman's, so heavy sources lie near its root and the
errors on the way to a leaf add up to fewer than two samples a stretch, however many sources there are.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np

from pretrain.config_data import DataConfig, Source, integer_weights
from pretrain.config_types import amount_in_steps
from pretrain.data.order import IntArray

MANY_EPOCHS = 4.0
"""Up to about this many passes repeated data are worth nearly as much as new ones (Muennighoff et al. 2023)."""

_LAST_SAMPLE = 1 << 62


@dataclass(frozen=True)
class Weights:
    """What `data.train` and `data.phases` ask for: phases as (until, weights by source), the last without `until`."""

    phases: tuple[tuple[str | int | None, dict[str, float]], ...]
    max_epochs: Mapping[str, float]

    @classmethod
    def of(cls, data: DataConfig) -> Weights | None:
        """The weights of a configuration; None when it gives none."""
        sources = [entry for entry in data.train if isinstance(entry, Source)]
        limits = {source.name: source.max_epochs for source in sources if source.max_epochs is not None}
        if data.phases:
            return cls(tuple((phase.until, dict(phase.weights)) for phase in data.phases), limits)
        return cls(((None, data.weights),), limits) if data.weights else None


@dataclass(frozen=True)
class Stretch:
    """Samples from `start` on that share constant weights. `before` counts the samples of each source up to there."""

    start: int
    weights: tuple[int, ...]
    before: tuple[int, ...]


@dataclass(frozen=True)
class Mixture:
    """Sources and the stretches of the stream. `end`: the first sample that no source is left for, None if never."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    stretches: tuple[Stretch, ...]
    end: int | None

    @cached_property
    def _starts(self) -> IntArray:
        return np.array([stretch.start for stretch in self.stretches], dtype=np.int64)

    def locate(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        """(source, number of the sample within its source) of each sample, (S,) each.

        Raises:
            ValueError: for a sample beyond the end of the data.
        """
        if self.end is not None and len(samples) and int(samples.max()) >= self.end:
            raise ValueError(
                f"sample {int(samples.max())} is beyond the end of the data: with max_epochs every source of "
                f"data.train is used up after {self.end} rows; train less, or raise max_epochs"
            )
        sources, numbers = np.empty_like(samples), np.empty_like(samples)
        which = np.searchsorted(self._starts, samples, side="right") - 1
        for number in np.unique(which):
            stretch, chosen = self.stretches[number], which == number
            source, local = share_out(samples[chosen] - stretch.start, stretch.weights)
            sources[chosen], numbers[chosen] = source, local + np.array(stretch.before, dtype=np.int64)[source]
        return sources, numbers

    def counts(self, samples: int) -> tuple[int, ...]:
        """How many of the first `samples` samples come from each source."""
        stretch = self.stretches[bisect_left(self._starts.tolist(), samples + 1) - 1]
        return tuple(
            before + count_of(samples - stretch.start, stretch.weights, source)
            for source, before in enumerate(stretch.before)
        )

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source is read by the first `samples` samples."""
        counts = zip(self.names, self.counts(samples), self.rows, strict=True)
        return {name: count / rows for name, count, rows in counts if rows}

    def facts(self) -> list[dict[str, Any]]:
        """Plain data: where each stretch starts, and its weights by source."""
        return [
            {"from sample": stretch.start, "weights": dict(zip(self.names, stretch.weights, strict=True))}
            for stretch in self.stretches
        ]


def plan_mixture(
    names: Sequence[str], rows: Sequence[int], weights: Weights, *, rows_per_batch: int, total_steps: int | None
) -> Mixture:
    """The stretches of a stream.

    Args:
        names: the sources.
        rows: rows of each.
        weights: what the configuration asks for.
        rows_per_batch: rows a step.
        total_steps: of the run, which phases given as shares need; without it the first such phase has no end.

    Raises:
        ValueError: when phases do not follow each other, or a source with a weight is not there or has no rows.
    """
    for name, limit in weights.max_epochs.items():
        if name in names and rows[names.index(name)] and int(limit * rows[names.index(name)]) == 0:
            raise ValueError(
                f"data.train: max_epochs {limit:g} of source `{name}` is less than one of its "
                f"{rows[names.index(name)]:,} rows; raise it, or leave the source out"
            )
    limits = [
        int(weights.max_epochs[name] * count) if name in weights.max_epochs else None
        for name, count in zip(names, rows, strict=True)
    ]
    stretches: list[Stretch] = []
    counts, end = [0] * len(names), None
    for (start, until), wanted in zip(
        pairwise(_bounds(weights, rows_per_batch, total_steps)), weights.phases, strict=False
    ):
        shares = _by_source(names, rows, wanted[1])
        while start < until and end is None:
            left = [limit - count if limit is not None else None for limit, count in zip(limits, counts, strict=True)]
            shares = [0 if rest == 0 else share for share, rest in zip(shares, left, strict=True)]
            if not any(shares):
                end = start
                break
            stretches.append(Stretch(start, tuple(shares), tuple(counts)))
            length = min([until - start, *_until_used_up(tuple(shares), left, until - start)])
            counts = [count + count_of(length, tuple(shares), source) for source, count in enumerate(counts)]
            start += length
    return Mixture(tuple(names), tuple(rows), tuple(stretches), end)


def _bounds(weights: Weights, rows_per_batch: int, total_steps: int | None) -> list[int]:
    """First samples of the phases, and the last sample there can be."""
    bounds = [0]
    for until, _ in weights.phases[:-1]:
        assert until is not None
        if isinstance(until, str) and total_steps is None:
            break
        bounds.append(amount_in_steps(until, total_steps or 0) * rows_per_batch)
        if bounds[-1] <= bounds[-2]:
            raise ValueError(f"data.phases: `until: {until}` is not after the phase before; put them in order")
    return [*bounds, _LAST_SAMPLE]


def _by_source(names: Sequence[str], rows: Sequence[int], weights: Mapping[str, float]) -> list[int]:
    integers = integer_weights(dict(weights))
    for name, weight in integers.items():
        if weight and (name not in names or not rows[names.index(name)]):
            raise ValueError(f"data.train: source `{name}` has a weight and no rows; prepare the data again")
    return [integers.get(name, 0) for name in names]


def _until_used_up(weights: tuple[int, ...], left: Sequence[int | None], most: int) -> list[int]:
    """After how many samples each limited source is used up, where that is within `most`."""
    lengths = []
    for source, (weight, rest) in enumerate(zip(weights, left, strict=True)):
        if not weight or rest is None:
            continue
        high = min(most, (rest + 4) * sum(weights) // weight + 1)
        length = bisect_left(range(high), rest, key=partial(count_of, weights=weights, source=source))
        if count_of(length, weights, source) == rest:
            lengths.append(length)
    return lengths


# --- sharing out ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Node:
    """A leaf holds a source; an inner node sends `left.weight / weight` of what reaches it to `left`."""

    weight: int
    source: int = -1
    left: _Node | None = None
    right: _Node | None = None


@lru_cache(maxsize=64)
def _tree(weights: tuple[int, ...]) -> _Node:
    """Huffman's tree over the sources that have a weight."""
    heap = [(weight, source, _Node(weight, source)) for source, weight in enumerate(weights) if weight]
    heapq.heapify(heap)
    number = len(weights)
    while len(heap) > 1:
        light, heavy = heapq.heappop(heap), heapq.heappop(heap)
        total = light[0] + heavy[0]
        heapq.heappush(heap, (total, number, _Node(total, left=light[2], right=heavy[2])))
        number += 1
    return heap[0][2]


def _sent_left(samples: Any, part: int, whole: int) -> Any:
    """round(samples * part / whole), in integers below 2^63 as `whole` is below 2^31."""
    full, rest = samples // whole, samples % whole
    return full * part + (rest * part + whole // 2) // whole


def share_out(samples: IntArray, weights: tuple[int, ...]) -> tuple[IntArray, IntArray]:
    """(source, number within the source) of samples of a stretch, numbered from 0, under integer weights: (S,) each."""
    sources, numbers = np.empty_like(samples), np.empty_like(samples)
    waiting = [(_tree(weights), np.arange(len(samples)), samples)]
    while waiting:
        node, places, local = waiting.pop()
        if node.left is None or node.right is None:
            sources[places], numbers[places] = node.source, local
            continue
        before = _sent_left(local, node.left.weight, node.weight)
        is_left = _sent_left(local + 1, node.left.weight, node.weight) > before
        waiting.append((node.left, places[is_left], before[is_left]))
        waiting.append((node.right, places[~is_left], (local - before)[~is_left]))
    return sources, numbers


def count_of(samples: int, weights: tuple[int, ...], source: int) -> int:
    """How many of the first `samples` samples of a stretch come from `source`."""
    waiting = [(_tree(weights), samples)]
    while waiting:
        node, count = waiting.pop()
        if node.left is None or node.right is None:
            if node.source == source:
                return count
            continue
        left = _sent_left(count, node.left.weight, node.weight)
        waiting += [(node.left, left), (node.right, count - left)]
    return 0
