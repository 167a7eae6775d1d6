"""Passes over a validation split: each row once, with fixed masks.

What lives here: the rows of a pass and the bytes of text that they hold. What must not: scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.config_objective import ObjectiveConfig
from pretrain.data.batches import Batch, LoadedSplit, layout_of, make_batch
from pretrain.data.objectives import evaluation_objective, make_objective
from pretrain.data.order import IntArray, rows_of_samples
from pretrain.data.packing import Layout
from pretrain.data.shards import VALIDATION

VALIDATION_BATCH_TOKENS = 8192
"""Token positions a forward pass of an evaluation, whatever an optimizer step takes in its micro-batches."""
_VALIDATION_SEED = 0


@dataclass(frozen=True)
class ValidationPass:
    """Batches of one pass, and the UTF-8 bytes of the text that their rows hold."""

    data: ValidationData
    num_rows: int
    num_bytes: int

    def __iter__(self) -> Iterator[Batch]:
        return self.data.iterate(self.num_rows)


class ValidationData:
    """A validation split: each row once, in a fixed order, with masks that are the same in every run.

    Masked models are scored at a rate of 15% (80% [MASK], 10% random, 10% kept), token by token and without pairs of
    segments, however they train.
    A batch has `batch_tokens` positions at most (one row at least), so that scoring needs no more memory than training
    did; the rows and their masks do not depend on it.
    """

    def __init__(
        self, split: LoadedSplit, objective: ObjectiveConfig, *, batch_tokens: int = VALIDATION_BATCH_TOKENS
    ) -> None:
        self.rows_per_batch = max(1, batch_tokens // split.plan.spec.sequence_length)
        self._split = split
        self._config = evaluation_objective(objective)
        self._objective = make_objective(self._config)
        self.num_rows = split.plan.num_rows

    @classmethod
    def from_directory(
        cls,
        directory: Path,
        split: str = VALIDATION,
        *,
        objective: ObjectiveConfig,
        sequence_length: int,
        batch_tokens: int = VALIDATION_BATCH_TOKENS,
        layout: Layout | None = None,
        max_documents_per_row: int = 64,
        target_length: int | None = None,
    ) -> ValidationData:
        """The validation data of `directory`/`split`; arguments and errors as of `DataPlane.from_directory`."""
        scored_by = evaluation_objective(objective)
        loaded = LoadedSplit(
            directory,
            split,
            layout_of(scored_by, layout),
            sequence_length,
            max_documents_per_row,
            objective=scored_by,
            target_length=target_length,
        )
        loaded.model_kind = layout
        return cls(loaded, objective, batch_tokens=batch_tokens)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the split's text: bits per byte = sum of losses in nats / ln 2 / num_bytes."""
        return self._split.num_bytes

    def batches(self, max_tokens: int | None = None) -> ValidationPass:
        """One pass over all rows, or over the first of a fixed shuffle that have at most `max_tokens` positions.

        The last batch may have fewer rows. `num_bytes` of a part of the rows is its share of the tokens.
        """
        length = self._split.plan.spec.sequence_length
        rows = self.num_rows if max_tokens is None else max(1, min(self.num_rows, max_tokens // length))
        if rows == self.num_rows:
            return ValidationPass(self, rows, self.num_bytes)
        bounds, pieces = self._split.plan.rows, self._split.plan.pieces["length"]
        tokens = sum(int(pieces[bounds[row] : bounds[row + 1]].sum()) for row in self._rows(rows))
        share = tokens / max(1, self._split.store.num_tokens)
        return ValidationPass(self, rows, round(self.num_bytes * share))

    def iterate(self, num_rows: int) -> Iterator[Batch]:
        """Batches of the first `num_rows` rows."""
        rows = self._rows(num_rows)
        for start in range(0, len(rows), self.rows_per_batch):
            part = rows[start : start + self.rows_per_batch]
            none = np.zeros_like(part)
            yield make_batch(
                [self._split],
                self._objective,
                self._config,
                sources=none,
                epochs=none,
                rows=part,
                seeds=np.full_like(part, _VALIDATION_SEED),
            )

    def _rows(self, num_rows: int) -> IntArray:
        # The plan sorts rows by make (full pieces first), so the first rows of it are no fair part of the text.
        rows = np.arange(self.num_rows, dtype=np.int64)
        if num_rows == self.num_rows:
            return rows
        _, shuffled = rows_of_samples(rows[:num_rows], self.num_rows, _VALIDATION_SEED)
        return np.sort(shuffled)
