"""The batch of a step, a pure function of (data, seed, step).

What lives here: the data plane of a run, validation passes, fingerprints. What must not: torch, or reading text.

State is three values: a fingerprint of all that decides the batches, the seed, and how many samples were seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.config import ObjectiveConfig, RunConfig
from pretrain.data.objectives import (
    BUILT_IN,
    EVALUATION_MLM,
    IGNORE,
    Objective,
    check_batch,
    make_objective,
    objective_identity,
)
from pretrain.data.order import Draws, IntArray, rows_of_samples
from pretrain.data.packing import Layout, PackingPlan, PackingSpec, load_or_plan
from pretrain.data.rows import assemble_rows, special_pair
from pretrain.data.shards import TRAIN, VALIDATION, ShardFacts, TokenStore
from pretrain.data.vocabulary import SpecialIds
from pretrain.files import ArtifactError, Manifest, read_manifest, sha256_json

VALIDATION_BATCH_TOKENS = 8192
"""Token positions a forward pass of an evaluation, whatever an optimizer step takes in its micro-batches."""
_VALIDATION_SEED = 0


@dataclass(frozen=True)
class Batch:
    """Rows for the model.

    `arrays` by Hugging Face's names, each (B, L): input_ids, position_ids, document_ids, and labels or shift_labels.
    `num_targets` counts targets that are not -100, `num_tokens` positions that are not padding. `row_ids` (B, 2) are
    (epoch, row of the packing plan).
    """

    arrays: dict[str, npt.NDArray[Any]]
    num_targets: int
    num_tokens: int
    row_ids: IntArray


class LoadedSplit:
    """One prepared split under a packing plan and an objective."""

    def __init__(
        self, directory: Path, split: str, layout: Layout, sequence_length: int, max_documents_per_row: int
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
        self.plan: PackingPlan = load_or_plan(directory / split, spec, self.store)
        self.name = f"{directory}/{split}"
        self.model_kind: Layout | None = None  # where the configuration says what the model is

    def batch(self, objective: Objective, seed: int, epochs: IntArray, rows: IntArray, kind: str) -> Batch:
        packed = assemble_rows(self.store, self.plan, rows, self.tokens)
        draws = Draws(seed, epochs, rows, self.plan.spec.sequence_length)
        made = objective(packed, draws, self.tokens)
        if kind not in BUILT_IN:
            made = check_batch(made, packed.input_ids.shape, kind, self.tokens.vocab_size, self.model_kind)
        arrays: dict[str, npt.NDArray[Any]] = {
            "position_ids": packed.position_ids,
            "document_ids": packed.document_ids,
            **made,
        }
        targets = arrays["labels"] if "labels" in arrays else arrays["shift_labels"]
        return Batch(
            arrays,
            num_targets=int(np.count_nonzero(targets != IGNORE)),
            num_tokens=int(np.count_nonzero(packed.document_ids)),
            row_ids=np.stack([epochs, rows], axis=1),
        )


class DataPlane:
    """The endless stream of training batches of a prepared split."""

    def __init__(self, split: LoadedSplit, objective: ObjectiveConfig, *, seed: int, rows_per_batch: int) -> None:
        self.seed = seed
        self.rows_per_batch = rows_per_batch
        self._split = split
        self._kind = objective.kind
        self._objective = make_objective(objective)
        self.made_of = _made_of(split, objective, self._objective)
        self.fingerprint = sha256_json(self.made_of)
        if split.plan.num_rows == 0:
            raise ArtifactError(f"`{split.name}` holds no tokens; check the text and prepare it again")

    @classmethod
    def from_directory(
        cls,
        directory: Path,
        split: str = TRAIN,
        *,
        objective: ObjectiveConfig,
        sequence_length: int,
        rows_per_batch: int,
        seed: int = 0,
        layout: Layout | None = None,
        max_documents_per_row: int = 64,
        tokenizer_directory: Path | None = None,
    ) -> DataPlane:
        """The data plane of `directory`/`split`, packed anew when these parameters were not planned for yet.

        Args:
            directory: what `prepare_data` wrote.
            split: train, or a validation split.
            objective: what the model learns to predict.
            sequence_length: positions a row.
            rows_per_batch: rows a step, over all processes.
            seed: of the order and of every draw.
            layout: where special tokens go; by default that of the objective (mlm: encoder, else decoder).
            max_documents_per_row: at most this many pieces a row.
            tokenizer_directory: when given, must be the tokenizer that the data was prepared with.

        Raises:
            ArtifactError: when the split is missing, cut off, or of another tokenizer.
        """
        if tokenizer_directory is not None:
            check_tokenizer(read_manifest(directory, "data"), tokenizer_directory, directory)
        chosen = layout or layout_of(objective)
        loaded = LoadedSplit(directory, split, chosen, sequence_length, max_documents_per_row)
        loaded.model_kind = layout
        return cls(loaded, objective, seed=seed, rows_per_batch=rows_per_batch)

    @classmethod
    def from_config(cls, config: RunConfig, split: str = TRAIN) -> DataPlane:
        """The data plane of a run's prepared split."""
        return cls.from_directory(
            config.directory / "data",
            split,
            objective=config.objective,
            sequence_length=config.data.sequence_length,
            rows_per_batch=config.rows_per_batch,
            seed=config.train.seed,
            layout=config.kind,
            max_documents_per_row=config.data.max_documents_per_row,
            tokenizer_directory=config.directory / "tokenizer",
        )

    @staticmethod
    def validation_splits(config: RunConfig) -> list[str]:
        """The validation splits of a run: `validation`, and `validation-NAME` for each named list."""
        splits = read_manifest(config.directory / "data", "data").facts["splits"]
        return [name for name in splits if name.split("-")[0] == VALIDATION]

    @staticmethod
    def validation(config: RunConfig, split: str = VALIDATION) -> ValidationData:
        """A validation split of a run."""
        return ValidationData.from_directory(
            config.directory / "data",
            split,
            objective=config.objective,
            sequence_length=config.data.sequence_length,
            layout=config.kind,
            max_documents_per_row=config.data.max_documents_per_row,
        )

    @property
    def num_rows(self) -> int:
        """Rows an epoch."""
        return self._split.plan.num_rows

    @property
    def utilisation(self) -> float:
        """Share of the positions of an epoch that is not padding."""
        return self._split.plan.utilisation

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The global batch of `step` (from 0), or the given rows of it. Safe to call from several threads."""
        first = step * self.rows_per_batch
        samples = np.arange(first, first + self.rows_per_batch, dtype=np.int64)[rows or slice(None)]
        epochs, plan_rows = rows_of_samples(samples, self.num_rows, self.seed)
        return self._split.batch(self._objective, self.seed, epochs, plan_rows, self._kind)

    def state(self, samples_seen: int) -> dict[str, Any]:
        """What a checkpoint must hold of the data; `made_of` is what the fingerprint is the hash of."""
        return {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "samples_seen": samples_seen,
            "made_of": self.made_of,
        }

    def check(self, state: dict[str, Any]) -> None:
        """Refuse a state that other data, another order or another objective made.

        Raises:
            ValueError: lists each difference.
        """
        was, now = {**state["made_of"], "seed": state["seed"]}, {**self.made_of, "seed": self.seed}
        if state["fingerprint"] == self.fingerprint and was["seed"] == now["seed"]:
            return
        different = [key for key in sorted({*was, *now}) if was.get(key) != now.get(key)]
        lines = "; ".join(f"{key} was {was.get(key)}, is {now.get(key)}" for key in different)
        raise ValueError(
            f"the checkpoint saw other data: {lines}; put it back as it was, or start a run under another name="
        )


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

    Masked models are scored at a rate of 15% (80% [MASK], 10% random, 10% kept), whatever the training rate.
    A batch has `batch_tokens` positions at most (one row at least), so that scoring needs no more memory than training
    did; the rows and their masks do not depend on it.
    """

    def __init__(
        self, split: LoadedSplit, objective: ObjectiveConfig, *, batch_tokens: int = VALIDATION_BATCH_TOKENS
    ) -> None:
        self.rows_per_batch = max(1, batch_tokens // split.plan.spec.sequence_length)
        self._split = split
        self._kind = objective.kind
        self._objective = make_objective(EVALUATION_MLM if objective.kind == "mlm" else objective)
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
    ) -> ValidationData:
        """The validation data of `directory`/`split`; arguments and errors as of `DataPlane.from_directory`."""
        loaded = LoadedSplit(directory, split, layout or layout_of(objective), sequence_length, max_documents_per_row)
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
            yield self._split.batch(self._objective, _VALIDATION_SEED, np.zeros_like(part), part, self._kind)

    def _rows(self, num_rows: int) -> IntArray:
        # The plan sorts rows by make (full pieces first), so the first rows of it are no fair part of the text.
        rows = np.arange(self.num_rows, dtype=np.int64)
        if num_rows == self.num_rows:
            return rows
        _, shuffled = rows_of_samples(rows[:num_rows], self.num_rows, _VALIDATION_SEED)
        return np.sort(shuffled)


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


def _made_of(split: LoadedSplit, objective: ObjectiveConfig, function: Objective) -> dict[str, Any]:
    """All that decides the batches but the seed, by name, so that a difference can be told."""
    opening, closing = special_pair(split.plan.spec.layout, split.tokens)
    return {
        "shards": sha256_json([[shard.digest, shard.index_digest] for shard in split.shards]),
        "packing": asdict(split.plan.spec),
        "special ids": {"opening": opening, "closing": closing, **split.tokens.facts()["special_ids"]},
        "objective": objective_identity(objective, function),
    }
