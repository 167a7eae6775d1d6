"""Rows of prepared splits under an objective: what a model is fed.

What lives here: a split under its packing plan, and the batch of given rows. What must not: which rows a step takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pretrain.config import RunConfig
from pretrain.config_objective import ObjectiveConfig
from pretrain.data.noise import most_spans, target_length_of
from pretrain.data.objectives import (
    BUILT_IN,
    IGNORE,
    Arrays,
    Objective,
    PieceObjective,
    Pieces,
    Rows,
    Texts,
    check_batch,
    corrupted_span,
    takes_pieces,
)
from pretrain.data.order import Draws, FloatArray, IntArray
from pretrain.data.packing import Layout, PackingPlan, PackingSpec, load_or_plan
from pretrain.data.rows import assemble_pieces, assemble_rows, special_pair
from pretrain.data.shards import ShardFacts, TokenStore
from pretrain.data.vocabulary import SpecialIds
from pretrain.files import ArtifactError, Manifest, read_manifest


@dataclass(frozen=True)
class Batch:
    """Rows for the model.

    `arrays` by Hugging Face's names, each (B, L): input_ids, position_ids, document_ids, and labels or shift_labels.
    Pairs of segments add token_type_ids (B, L), sentence_positions and sentence_labels (B, P). An encoder-decoder has
    those of its input (B, S), and decoder_input_ids, decoder_position_ids, decoder_document_ids and labels (B, T):
    piece n of the output belongs to piece n of the input. dropout_keys (B,) int64 only where the model takes them:
    random bits of each (row, epoch), for its dropout.

    `num_targets` counts targets that are not -100, `num_tokens` positions that are not padding (of the encoder).
    `row_ids` (B, 3) are (number of the source, epoch of that source, row of its packing plan). `item_counts` are the
    numbers that further terms of the loss are divided by: pairs of segments, tokens of replaced-token detection.
    """

    arrays: dict[str, npt.NDArray[Any]]
    num_targets: int
    num_tokens: int
    row_ids: IntArray
    item_counts: dict[str, int] = field(default_factory=dict)


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
        objective: ObjectiveConfig | None = None,
        target_length: int | None = None,
        keep_plan: bool = True,
    ) -> None:
        """Load it.

        Args:
            directory: what prepare made.
            split: its name.
            layout: where special tokens go.
            sequence_length: positions a row.
            max_documents_per_row: pieces of a row at most.
            objective: what the rows are made for; none is needed for plain rows of an encoder or a decoder.
            target_length: positions of the decoder's row; None: as many as the objective needs.
            keep_plan: write a new packing plan beside the shards.

        Raises:
            ArtifactError: when there is no such split, or its shards lack what the objective needs.
            ValueError: when the rows hold nothing, or the tokenizer lacks a token.
        """
        manifest = read_manifest(directory, "data")
        if split not in manifest.facts["splits"]:
            known = ", ".join(manifest.facts["splits"])
            raise ArtifactError(f"`{directory}` has no split `{split}`; it has {known}; prepare the data again")
        facts = manifest.facts["splits"][split]
        self.tokens = SpecialIds.from_facts(manifest.facts["tokenizer"])
        self.shards = [ShardFacts(**shard) for shard in facts["shards"]]
        self.num_bytes: int = facts["bytes"]
        self.store = TokenStore(directory, self.shards, self.tokens.vocab_size)
        self.name = f"{directory}/{split}"
        self.source = split.partition("-")[2]
        self.model_kind: Layout | None = None  # where the configuration says what the model is
        spec = _spec(layout, self.tokens, sequence_length, max_documents_per_row, objective, target_length)
        self._check(objective, spec)
        self.plan: PackingPlan = load_or_plan(
            directory / split, spec, self.store, keep=keep_plan, separator=self.tokens.eos
        )

    @classmethod
    def of(
        cls, config: RunConfig, split: str, *, objective: ObjectiveConfig | None = None, keep_plan: bool = True
    ) -> LoadedSplit:
        """A split of a run, packed for its objective or for another one."""
        objective = objective or config.objective
        loaded = cls(
            config.directory / "data",
            split,
            layout_of(objective, config.kind),
            config.data.sequence_length,
            config.data.max_documents_per_row,
            objective=objective,
            target_length=config.data.target_length,
            keep_plan=keep_plan,
        )
        loaded.model_kind = config.kind
        return loaded

    def _check(self, objective: ObjectiveConfig | None, spec: PackingSpec) -> None:
        """Refuse what the objective cannot be made of, before anything is packed for it."""
        if objective is not None and objective.needs_marks and not self.store.is_marked:
            key = "whole_words: true" if objective.whole_words else f"sentences: {objective.sentences}"
            raise ArtifactError(
                f"`{self.name}` does not say where words and sentences start, which objective.{key} needs; prepare the "
                "data again with it, under another name="
            )
        if spec.corruption_rate is not None and spec.corruption_span is not None:
            most = most_spans(spec.sequence_length, spec.target_length, spec.corruption_rate, spec.corruption_span)
            if most > len(self.tokens.sentinels):
                raise ValueError(
                    f"objective.kind: span-corruption hides up to {most} spans of a row of {spec.sequence_length}, "
                    f"and the tokenizer has {len(self.tokens.sentinels)} sentinels (<extra_id_0>, ...); train it for "
                    "this objective, add them with tokenizer.special_tokens, or lower data.sequence_length"
                )


def _spec(
    layout: Layout,
    tokens: SpecialIds,
    sequence_length: int,
    max_documents_per_row: int,
    objective: ObjectiveConfig | None,
    target_length: int | None,
) -> PackingSpec:
    opening, closing = special_pair(layout, tokens)
    marks = (int(opening is not None), int(closing is not None))
    if layout == "encoder" and objective is not None and objective.sentences != "none":
        marks = (1, 2)
    if layout != "seq2seq":
        return PackingSpec(sequence_length, layout, *marks, max_documents_per_row)
    if objective is None or objective.kind != "span-corruption":
        target_length = target_length or sequence_length
        return PackingSpec(sequence_length, layout, *marks, max_documents_per_row, target_length=target_length)
    rate, span = objective.rate, corrupted_span(objective)
    return PackingSpec(
        sequence_length,
        layout,
        *marks,
        max_documents_per_row,
        target_length=target_length or target_length_of(sequence_length, rate, span),
        corruption_rate=rate,
        corruption_span=span,
    )


def make_batch(
    splits: Sequence[LoadedSplit],
    objective: Objective | PieceObjective,
    config: ObjectiveConfig,
    *,
    sources: IntArray,
    epochs: IntArray,
    rows: IntArray,
    seeds: IntArray,
    progress: FloatArray | None = None,
    dropout_keys: bool = False,
) -> Batch:
    """The rows (B,) of the splits that `sources` (B,) names, under an objective, drawn by seeds and epochs (B,).

    `progress` (B,) is the share of the run before each row. `config` is the objective's configuration.
    """
    first = splits[0]
    draws = Draws(seeds, epochs, rows, first.plan.spec.sequence_length)
    if takes_pieces(objective):
        pieces = _assemble_pieces(splits, sources, rows, draws, with_others=config.sentences == "next")
        made: Any = cast(PieceObjective, objective)(replace(pieces, progress=progress), draws, first.tokens)
        arrays: Arrays = {**made}
    else:
        packed = replace(_assemble(splits, sources, rows, words=config.whole_words), progress=progress)
        made = cast(Objective, objective)(packed, draws, first.tokens)
        if config.kind not in BUILT_IN:
            made = check_batch(made, packed.input_ids.shape, config.kind, first.tokens.vocab_size, first.model_kind)
        own_rows = "decoder_input_ids" in made  # an encoder-decoder's rows are the function's own
        arrays = {} if own_rows else {"position_ids": packed.position_ids, "document_ids": packed.document_ids}
        arrays |= made
    if dropout_keys:
        arrays["dropout_keys"] = draws.row_keys("dropout")
    targets = arrays["labels"] if "labels" in arrays else arrays["shift_labels"]
    used = arrays["document_ids"] if "document_ids" in arrays else np.ones_like(arrays["input_ids"])
    num_tokens = int(np.count_nonzero(used))
    return Batch(
        arrays,
        num_targets=int(np.count_nonzero(targets != IGNORE)),
        num_tokens=num_tokens,
        row_ids=np.stack([sources, epochs, rows], axis=1),
        item_counts=_item_counts(config, arrays, num_tokens),
    )


def _item_counts(config: ObjectiveConfig, arrays: Arrays, num_tokens: int) -> dict[str, int]:
    if config.kind == "rtd":
        return {"tokens": num_tokens}
    if config.kind in BUILT_IN and "sentence_labels" in arrays:
        return {"pairs": int(np.count_nonzero(arrays["sentence_labels"] != IGNORE))}
    return {}


def _assemble(splits: Sequence[LoadedSplit], sources: IntArray, rows: IntArray, *, words: bool) -> Rows:
    """Rows (B, L) of several splits, each where its sample stands."""
    present = np.unique(sources).tolist()
    if len(present) == 1:
        split = splits[present[0]]
        return assemble_rows(split.store, split.plan, rows, split.tokens, words=words)
    places = [np.flatnonzero(sources == source) for source in present]
    parts = [
        assemble_rows(splits[source].store, splits[source].plan, rows[where], splits[source].tokens, words=words)
        for source, where in zip(present, places, strict=True)
    ]
    merged = {}
    for one in fields(Rows):
        arrays = [getattr(part, one.name) for part in parts]
        if any(array is None for array in arrays):
            continue
        merged[one.name] = np.empty((len(rows), arrays[0].shape[1]), dtype=arrays[0].dtype)
        for where, array in zip(places, arrays, strict=True):
            merged[one.name][where] = array
    return Rows(**merged)


def _assemble_pieces(
    splits: Sequence[LoadedSplit], sources: IntArray, rows: IntArray, draws: Draws, *, with_others: bool
) -> Pieces:
    """The pieces of rows (B,) of several splits, those of one split after another."""
    parts = []
    for source in np.unique(sources).tolist():
        where = np.flatnonzero(sources == source)
        split = splits[source]
        some = assemble_pieces(split.store, split.plan, rows[where], draws.of(where), with_others=with_others)
        parts.append(replace(some, rows=where[some.rows], shape=(len(rows), *some.shape[1:])))
    if len(parts) == 1:
        return parts[0]

    def joined(name: str, of: Sequence[Any] = parts) -> Any:
        arrays = [getattr(part, name) for part in of]
        return None if any(array is None for array in arrays) else np.concatenate(arrays)

    names = ("ids", "lengths", "rows", "slots", "sources", "marks")
    others = [part.others for part in parts if part.others is not None]
    return Pieces(
        **{name: joined(name) for name in names},
        shape=parts[0].shape,
        others=Texts(*(joined(name, others) for name in ("ids", "lengths", "marks"))) if others else None,
    )


def target_length_for(config: RunConfig) -> int:
    """Positions of the decoder's row of an encoder-decoder."""
    objective, length = config.objective, config.data.sequence_length
    if config.data.target_length is not None:
        return config.data.target_length
    if objective.kind != "span-corruption":
        return length
    return target_length_of(length, objective.rate, corrupted_span(objective))


def layout_of(objective: ObjectiveConfig, kind: Layout | None = None) -> Layout:
    """Where special tokens go: as the objective needs; one of one's own goes by the kind of model, where it is known.

    An encoder-decoder's own objective is given rows of a decoder.
    """
    if objective.model_kind is not None:
        return objective.model_kind
    return "encoder" if kind == "encoder" else "decoder"


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
