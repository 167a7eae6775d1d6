"""The rows of a step for this process: its share of the global batch, cut into micro-batches, one step ahead.

What lives here: which rows a rank takes, the look-ahead, and the way to the device. What must not: what is in a row.

Rank r of W takes the rows from B r / W to B (r + 1) / W of a global batch of B rows. Every rank makes equally many
micro-batches, because sharded engines meet in each of them: a rank that has run out of rows makes one without targets,
which adds nothing to the gradient.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pretrain.ranks import Ranks

IGNORED = -100
TARGETS = ("labels", "shift_labels", "sentence_labels")


class Batch(Protocol):
    """Rows of tokens, as a data plane makes them: numpy arrays by Hugging Face's names, each (rows, length)."""

    arrays: Mapping[str, np.ndarray]
    num_targets: int
    num_tokens: int
    row_ids: np.ndarray
    item_counts: Mapping[str, int]
    """What further terms of the loss are divided by, each by its name; empty where the targets are all."""


class Data(Protocol):
    """A data plane: the batch at a step is a pure function of (data, seed, step)."""

    @property
    def num_rows(self) -> int:
        """Rows an epoch."""

    def batch(self, step: int, rows: slice | None = None) -> Any:
        """The global batch of `step`, or the given rows of it."""

    def for_run(self, total_steps: int) -> Sequence[str]:
        """Fix what depends on the length of the run; return what a person should know, a line each."""

    def state(self, samples_seen: int) -> dict[str, Any]:
        """What a checkpoint must hold of the data, as plain data."""

    def check(self, state: dict[str, Any]) -> None:
        """Raise ValueError with the difference when `state` was made by other data."""


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a step; `idle` ones have no targets and count nothing."""

    arrays: Mapping[str, np.ndarray]
    num_targets: int = 0
    num_tokens: int = 0
    row_ids: np.ndarray = field(default_factory=lambda: np.empty((0, 3), dtype=np.int64))
    item_counts: Mapping[str, int] = field(default_factory=dict)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """The arrays on the device that computes."""
        made = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        if device.type == "cuda":
            return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in made.items()}
        return made


@dataclass(frozen=True)
class Feed:
    """The micro-batches of one rank.

    Attributes:
        data: the data plane.
        rows: of the global batch.
        micro_batch: rows of a forward pass, at most.
        ranks: the processes of the job.
    """

    data: Data
    rows: int
    micro_batch: int
    ranks: Ranks

    def slices(self) -> list[slice]:
        """The rows of each micro-batch of a step; an empty slice is an idle one."""
        rank, world = self.ranks.rank, self.ranks.world
        first, end = self.rows * rank // world, self.rows * (rank + 1) // world
        count = -(-largest_share(self.rows, world) // self.micro_batch)
        starts = [first + number * self.micro_batch for number in range(count)]
        return [slice(min(start, end), min(start + self.micro_batch, end)) for start in starts]

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """What this rank sees in a step."""
        return [self._make(step, rows) for rows in self.slices()]

    def _make(self, step: int, rows: slice) -> MicroBatch:
        if rows.start == rows.stop:
            batch = self.data.batch(step, slice(0, 1))
            counts = dict.fromkeys(item_counts_of(batch), 0)
            return MicroBatch(without_targets(batch.arrays, tokens="tokens" in counts), item_counts=counts)
        batch = self.data.batch(step, rows)
        return MicroBatch(batch.arrays, batch.num_targets, batch.num_tokens, batch.row_ids, item_counts_of(batch))

    def ahead(self, first: int, end: int) -> Iterator[tuple[list[MicroBatch], float]]:
        """The micro-batches of the steps from `first` to `end`, and the seconds waited for them."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as pool:
            coming: Future[list[MicroBatch]] = pool.submit(self.micro_batches, first)
            for step in range(first, end):
                started = time.perf_counter()
                current = coming.result()
                waited = time.perf_counter() - started
                if step + 1 < end:
                    coming = pool.submit(self.micro_batches, step + 1)
                yield current, waited


def largest_share(rows: int, world: int) -> int:
    """Rows of the global batch that the busiest of `world` processes takes."""
    return -(-rows // world)


def item_counts_of(batch: Any) -> Mapping[str, int]:
    """The item counts of a batch; a data plane of one's own may not know of them."""
    counts: Mapping[str, int] = getattr(batch, "item_counts", {})
    return counts


def counts_of(micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
    """What a loss over these micro-batches is divided by, of this rank: `targets`, and the item counts.

    Every rank has the same names, as idle micro-batches have them too.
    """
    counts = {"targets": sum(batch.num_targets for batch in micro_batches)}
    for batch in micro_batches:
        for name, count in batch.item_counts.items():
            counts[name] = counts.get(name, 0) + count
    return counts


def divisors(counts: Mapping[str, float]) -> dict[str, Any]:
    """What a model is given to divide the terms of its loss by, from the sums of `counts_of` over all ranks."""
    items = {name: max(1, int(count)) for name, count in counts.items() if name != "targets"}
    return {"num_items_in_batch": max(1, int(counts["targets"])), **({"item_counts": items} if items else {})}


def without_targets(arrays: Mapping[str, np.ndarray], *, tokens: bool = False) -> dict[str, np.ndarray]:
    """The same arrays with every target ignored; with `tokens`, for a loss that counts each of them, all as padding.

    Targets that are no whole numbers, of which -100 may be one, are ignored as NaN.
    """
    empty = {
        name: np.full_like(array, np.nan if array.dtype.kind == "f" else IGNORED) if name in TARGETS else array
        for name, array in arrays.items()
    }
    return empty | ({"document_ids": np.zeros_like(arrays["input_ids"])} if tokens else {})
