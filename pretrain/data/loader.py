"""The batch of a step, a pure function of (data, seed, step).

What lives here: the data plane of a run, validation passes, fingerprints. What must not: torch, or reading text.

State is three values: a fingerprint of all that decides the batches, the seed, and how many samples were seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config import RunConfig
from pretrain.config_objective import ObjectiveConfig
from pretrain.data.batches import Batch, LoadedSplit, check_tokenizer, layout_of, make_batch
from pretrain.data.mixture import MANY_EPOCHS, Mixture, Weights, plan_mixture
from pretrain.data.objectives import (
    make_objective,
    objective_identity,
)
from pretrain.data.order import IntArray, rows_of_samples, source_seed
from pretrain.data.packing import Layout
from pretrain.data.rows import special_pair
from pretrain.data.shards import TRAIN, VALIDATION
from pretrain.data.validation import ValidationData
from pretrain.files import ArtifactError, read_manifest, sha256_json


class DataPlane:
    """The endless stream of training batches of a prepared split, or of one split a source.

    Without weights the rows of all sources are drawn as one set, each once an epoch. With weights each source is a
    stream with epochs of its own, and `Mixture` says which one a sample comes from.

    Attributes:
        dropout_keys: whether batches hold a key of each row, for a model that draws its dropout by it. Set it before
            the first batch; it decides nothing else of a batch.
    """

    def __init__(
        self,
        splits: Sequence[LoadedSplit],
        objective: ObjectiveConfig,
        *,
        seed: int,
        rows_per_batch: int,
        weights: Weights | None = None,
    ) -> None:
        self.seed = seed
        self.rows_per_batch = rows_per_batch
        self.dropout_keys = False
        self.sources = tuple(split.source for split in splits)
        self.rows = tuple(split.plan.num_rows for split in splits)
        if sum(self.rows) == 0:
            raise ArtifactError(f"`{splits[0].name}` holds no tokens; check the text and prepare it again")
        self.splits = tuple(splits)
        self._objective_config = objective
        self._samples: int | None = None  # of the whole run, once it is known
        self._objective = make_objective(objective)
        self._seeds = np.array([source_seed(seed, name) for name in self.sources], dtype=np.int64)
        self._bounds: IntArray = np.cumsum([0, *self.rows], dtype=np.int64)
        self._weights = weights
        self.mixture: Mixture | None = None
        self._mix(None)

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
        target_length: int | None = None,
        tokenizer_directory: Path | None = None,
        weights: Weights | None = None,
        keep_plan: bool = True,
    ) -> DataPlane:
        """The data plane of `directory`/`split`, packed anew when these parameters were not planned for yet.

        Args:
            directory: what `prepare_data` wrote.
            split: train (all of its sources), or one split by its full name.
            objective: what the model learns to predict.
            sequence_length: positions a row.
            rows_per_batch: rows a step, over all processes.
            seed: of the order and of every draw.
            layout: the kind of model, where it is known: an objective of one's own has rows of that kind.
            max_documents_per_row: at most this many pieces a row.
            target_length: positions of an encoder-decoder's output; by default as many as the objective needs.
            tokenizer_directory: when given, must be the tokenizer that the data was prepared with.
            weights: of the sources, where rows are not to be drawn alike.
            keep_plan: write a new packing plan beside the shards; False writes nothing.

        Raises:
            ArtifactError: when the split is missing, cut off, or of another tokenizer.
            ValueError: when the weights do not fit the sources.
        """
        manifest = read_manifest(directory, "data")
        if tokenizer_directory is not None:
            check_tokenizer(manifest, tokenizer_directory, directory)
        names = [name for name in manifest.facts["splits"] if name.startswith(f"{split}-")] if split == TRAIN else []
        names = [split, *names] if split in manifest.facts["splits"] or not names else names
        loaded = [
            LoadedSplit(
                directory,
                name,
                layout_of(objective, layout),
                sequence_length,
                max_documents_per_row,
                objective=objective,
                target_length=target_length,
                keep_plan=keep_plan,
            )
            for name in names
        ]
        for part in loaded:
            part.model_kind = layout
        return cls(loaded, objective, seed=seed, rows_per_batch=rows_per_batch, weights=weights)

    @classmethod
    def from_config(cls, config: RunConfig, split: str = TRAIN, *, keep_plan: bool = True) -> DataPlane:
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
            target_length=config.data.target_length,
            tokenizer_directory=config.directory / "tokenizer",
            weights=Weights.of(config.data) if split == TRAIN else None,
            keep_plan=keep_plan,
        )

    def for_run(self, total_steps: int) -> list[str]:
        """Fix what depends on the length of the run; return what a person should know about it, a line each.

        Raises:
            ValueError: when phases do not fit the run, or every source is used up before its end.
        """
        self._mix(total_steps)
        self._samples = samples = total_steps * self.rows_per_batch
        if self.mixture is None:
            epochs = {"": samples / self.num_rows}
        else:
            if self.mixture.end is not None and self.mixture.end < samples:
                raise ValueError(
                    f"data.train: with max_epochs every source is used up after step "
                    f"{self.mixture.end // self.rows_per_batch:,} of {total_steps:,}; train less, raise max_epochs, "
                    "or add text"
                )
            epochs = self.mixture.epochs(samples)
        lines = self._left_out()
        if self.mixture is not None and self.mixture.stretches[-1].start >= samples:
            lines.append(
                f"data.phases: the run ends after {total_steps:,} steps, before the last phase or the end of a source "
                f"at step {self.mixture.stretches[-1].start // self.rows_per_batch:,}"
            )
        return lines + [
            f"{f'source {name}' if name else 'the training text'} is read {count:.1f} times in this run; past about "
            f"{MANY_EPOCHS:g} repeated text teaches little: add text" + (", or lower its weight" if name else "")
            for name, count in epochs.items()
            if count > MANY_EPOCHS
        ]

    def _left_out(self) -> list[str]:
        """What a person should know about pairs that are in no row."""
        return [
            f"{split.name}: {split.plan.left_out:,} of {len(split.plan.pieces) + split.plan.left_out:,} pairs are "
            "longer than data.sequence_length or data.target_length, and left out"
            for split in self.splits
            if split.plan.left_out
        ]

    def _mix(self, total_steps: int | None) -> None:
        if self._weights is not None:
            self.mixture = plan_mixture(
                self.sources,
                self.rows,
                self._weights,
                rows_per_batch=self.rows_per_batch,
                total_steps=total_steps,
            )
        self.made_of = self._made_of()
        self.fingerprint = sha256_json(self.made_of)

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
            target_length=config.data.target_length,
        )

    @property
    def num_rows(self) -> int:
        """Rows an epoch."""
        return int(self._bounds[-1])

    @property
    def utilisation(self) -> float:
        """Share of the positions of an epoch that is not padding."""
        positions = sum(split.plan.num_positions for split in self.splits)
        return positions / (self.num_rows * self.splits[0].plan.spec.sequence_length)

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The global batch of `step` (from 0), or the given rows of it. Safe to call from several threads."""
        first = step * self.rows_per_batch
        samples = np.arange(first, first + self.rows_per_batch, dtype=np.int64)[rows or slice(None)]
        sources, epochs, plan_rows = self.locate(samples)
        return make_batch(
            self.splits,
            self._objective,
            self._objective_config,
            sources=sources,
            epochs=epochs,
            rows=plan_rows,
            seeds=self._seeds[sources],
            progress=np.minimum(samples / self._samples, 1.0) if self._samples else None,
            dropout_keys=self.dropout_keys,
        )

    def locate(self, samples: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """(source, epoch, row of that source's plan) of samples of the stream, (S,) each."""
        if self.mixture is None:
            epochs, rows = rows_of_samples(samples, self.num_rows, self.seed)
            sources = np.searchsorted(self._bounds, rows, side="right") - 1
            return sources, epochs, rows - self._bounds[sources]
        sources, numbers = self.mixture.locate(samples)
        epochs, rows = np.empty_like(samples), np.empty_like(samples)
        for source in np.unique(sources):
            chosen = sources == source
            epochs[chosen], rows[chosen] = rows_of_samples(numbers[chosen], self.rows[source], int(self._seeds[source]))
        return sources, epochs, rows

    def _made_of(self) -> dict[str, Any]:
        """All that decides the batches but the seed, by name, so that a difference can be told."""
        first = self.splits[0]
        opening, closing = special_pair(first.plan.spec.layout, first.tokens)
        marked = self._objective_config.needs_marks
        shards = {}
        for split in self.splits:
            digests = [[shard.digest, shard.index_digest, shard.marks_digest] for shard in split.shards]
            shards[split.source] = sha256_json(digests if marked else [two[:2] for two in digests])
        special = {"opening": opening, "closing": closing, **first.tokens.facts()["special_ids"]}
        if first.plan.spec.corruption_rate is not None:
            special["sentinels"] = list(first.tokens.sentinels)
        return {
            "shards": shards,
            "packing": first.plan.spec.facts(),
            "special ids": special,
            "objective": objective_identity(self._objective_config, self._objective),
            "mixture": self.mixture.facts() if self.mixture is not None else None,
        }

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
        for made_of in (was, now):  # what is still to come may change; whether it does is for the configuration to say
            if made_of.get("mixture"):
                made_of["mixture"] = [
                    part for part in made_of["mixture"] if part["from sample"] < state["samples_seen"]
                ]
        different = [key for key in sorted({*was, *now}) if was.get(key) != now.get(key)]
        if not different:
            return
        lines = "; ".join(f"{key} was {was.get(key)}, is {now.get(key)}" for key in different)
        shares = self._weights is not None and any(isinstance(until, str) for until, _ in self._weights.phases)
        hint = " (phases given as shares move with the budget: give `until` in steps)" if shares else ""
        raise ValueError(
            f"the checkpoint saw other data: {lines}; put it back as it was{hint}, or start a run under another name="
        )
