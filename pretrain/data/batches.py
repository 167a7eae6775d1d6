"""Rows of prepared splits under an objective: what a model is fed.

What lives here: a split under its packing plan, and the batch of given rows. What must not: which rows a step takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.config import ObjectiveConfig
from pretrain.data.objectives import (
    BUILT_IN,
    IGNORE,
    Objective,
    Rows,
    check_batch,
)
from pretrain.data.order import Draws, IntArray
from pretrain.data.packing import Layout, PackingPlan, PackingSpec, load_or_plan
from pretrain.data.rows import assemble_rows, special_pair
from pretrain.data.shards import ShardFacts, TokenStore
from pretrain.data.vocabulary import SpecialIds
from pretrain.files import ArtifactError, Manifest, read_manifest


@dataclass(frozen=True)
class Batch:
    """Rows for the model.

    `arrays` by Hugging Face's names, each (B, L): input_ids, position_ids, document_ids, and labels or shift_labels.
    dropout_keys (B,) int64 only where the model takes them: random bits of each (row, epoch), for its dropout.
    `num_targets` counts targets that are not -100, `num_tokens` positions that are not padding. `row_ids` (B, 3) are
    (number of the source, epoch of that source, row of its packing plan).
    """

    arrays: dict[str, npt.NDArray[Any]]
    num_targets: int
    num_tokens: int
    row_ids: IntArray


class LoadedSplit:
    """One prepared split under a packing plan and an objective."""

    def __init__(
        self,
        directory: Path,
        split: str,
        layout: Layout,
        sequence_length: int,
        max_documents_per_row: int,
        *,
        keep_plan: bool = True,
    ) -> None:
        manifest = read_manifest(directory, "data")
        if split not in manifest.facts["splits"]:
            known = ", ".join(manifest.facts["splits"])
            raise ArtifactError(f"`{directory}` has no split `{split}`; it has {known}; prepare the data again")
        facts = manifest.facts["splits"][split]
        self.tokens = SpecialIds.from_facts(manifest.facts["tokenizer"])
        self.shards = [ShardFacts(**shard) for shard in facts["shards"]]
        self.num_bytes: int = facts["bytes"]
        self.store = TokenStore(directory, self.shards, self.tokens.vocab_size)
        opening, closing = special_pair(layout, self.tokens)
        spec = PackingSpec(
            sequence_length, layout, int(opening is not None), int(closing is not None), max_documents_per_row
        )
        self.plan: PackingPlan = load_or_plan(directory / split, spec, self.store, keep=keep_plan)
        self.name = f"{directory}/{split}"
        self.source = split.partition("-")[2]
        self.model_kind: Layout | None = None  # where the configuration says what the model is


def make_batch(
    splits: Sequence[LoadedSplit],
    objective: Objective,
    kind: str,
    *,
    sources: IntArray,
    epochs: IntArray,
    rows: IntArray,
    seeds: IntArray,
    dropout_keys: bool = False,
) -> Batch:
    """The rows (B,) of the splits that `sources` (B,) names, under an objective, drawn by seeds and epochs (B,)."""
    packed = _assemble(splits, sources, rows)
    first = splits[0]
    draws = Draws(seeds, epochs, rows, first.plan.spec.sequence_length)
    made = objective(packed, draws, first.tokens)
    if kind not in BUILT_IN:
        made = check_batch(made, packed.input_ids.shape, kind, first.tokens.vocab_size, first.model_kind)
    arrays: dict[str, npt.NDArray[Any]] = {
        "position_ids": packed.position_ids,
        "document_ids": packed.document_ids,
        **made,
    }
    if dropout_keys:
        arrays["dropout_keys"] = draws.row_keys("dropout")
    targets = arrays["labels"] if "labels" in arrays else arrays["shift_labels"]
    return Batch(
        arrays,
        num_targets=int(np.count_nonzero(targets != IGNORE)),
        num_tokens=int(np.count_nonzero(packed.document_ids)),
        row_ids=np.stack([sources, epochs, rows], axis=1),
    )


def _assemble(splits: Sequence[LoadedSplit], sources: IntArray, rows: IntArray) -> Rows:
    """Rows (B, L) of several splits, each where its sample stands."""
    present = np.unique(sources).tolist()
    if len(present) == 1:
        split = splits[present[0]]
        return assemble_rows(split.store, split.plan, rows, split.tokens)
    places = [np.flatnonzero(sources == source) for source in present]
    parts = [
        assemble_rows(splits[source].store, splits[source].plan, rows[where], splits[source].tokens)
        for source, where in zip(present, places, strict=True)
    ]
    merged = {}
    for field in fields(Rows):
        arrays = [getattr(part, field.name) for part in parts]
        merged[field.name] = np.empty((len(rows), arrays[0].shape[1]), dtype=arrays[0].dtype)
        for where, array in zip(places, arrays, strict=True):
            merged[field.name][where] = array
    return Rows(**merged)


def layout_of(objective: ObjectiveConfig) -> Layout:
    """Where special tokens go when no architecture says so."""
    return "encoder" if objective.kind == "mlm" else "decoder"


def check_tokenizer(data: Manifest, tokenizer_directory: Path, directory: Path) -> None:
    """Refuse data that another tokenizer made.

    Raises:
        ArtifactError: names both digests.
    """
    made_with, now = data.inputs["tokenizer"], read_manifest(tokenizer_directory, "tokenizer").digest
    if made_with != now:
        raise ArtifactError(
            f"`{directory}` was prepared with another tokenizer ({made_with[:12]}) than `{tokenizer_directory}` "
            f"({now[:12]}); prepare the data again, or put the tokenizer back"
        )
