"""The section `data`: the text, what is kept of it, and how it becomes rows of tokens.

What lives here: the schema of that section. What must not: reading any data.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, StrictBool, model_serializer, model_validator

from pretrain.config_types import Amount, OpenShare, Place, Positive, Section, Share, redacted

Encoding = Literal["auto", "utf-8", "utf-16", "utf-32", "gb18030", "big5", "shift_jis", "euc-kr", "latin-1", "cp1252"]
_MOST_WEIGHT = 1 << 31


def integer_weights(weights: dict[str, float]) -> dict[str, int]:
    """Weights as integers in the same proportions: what the decimals say, without rounding.

    Raises:
        ValueError: when all are zero, or they have more digits than exact arithmetic on 64 bits allows.
    """
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    total = sum(exact.values())
    if total <= 0:
        raise ValueError("all weights are 0; give at least one source a weight above it")
    shares = {name: weight / total for name, weight in exact.items()}
    denominator = math.lcm(*(share.denominator for share in shares.values()))
    scaled = {name: int(share * denominator) for name, share in shares.items()}
    if denominator >= _MOST_WEIGHT:
        raise ValueError("the weights have too many digits; give them with four decimal places at most")
    return scaled


class Source(Section):
    """A named part of the data: files, globs, directories, URLs, hub:NAME, or the embedded corpus."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    files: tuple[Place, ...] = Field(min_length=1)
    weight: Annotated[float, Field(ge=0.0)] | None = Field(
        None, description="share of the rows, relative to the other sources; all have one, or none has"
    )
    max_epochs: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="at most this many passes over it; then the other sources share its weight"
    )
    encoding: Encoding | None = Field(None, description="of these files; default data.encoding")
    license: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 .,+()/-]*$", max_length=100)] | None = Field(
        None, description="of the text, for the model card: an SPDX or Hub identifier such as cc-by-sa-4.0"
    )

    @model_serializer(mode="wrap")
    def _license_if_given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As plain data, without a licence that is not given: what was made before there was the key stays the same."""
        plain: dict[str, Any] = serialize(self)
        return plain if self.license is not None else {key: plain[key] for key in plain if key != "license"}


class Phase(Section):
    """Weights of the sources in a part of the run, up to `until` (the last phase: to the end)."""

    until: Amount | None = Field(None, description="a share of the run, or a step; left out in the last phase alone")
    weights: dict[str, Annotated[float, Field(ge=0.0)]] = Field(
        min_length=1, description="by source; one that is left out gets no rows in this phase"
    )

    @model_validator(mode="after")
    def _weights_are_exact(self) -> Self:
        integer_weights(self.weights)
        return self


class FilterStep(Section):
    """One of datatrove's filters, by the name of its class, with the parameters of its constructor."""

    name: str = Field(pattern=r"^[A-Za-z]\w*$", description="for example GopherQualityFilter")
    parameters: dict[str, Any] = Field(default_factory=dict)


class Deduplication(Section):
    """Which documents count as repeated: those of the same text, or those whose MinHash signatures agree.

    minhash: documents whose sets of `ngrams`-word shingles agree in one of `buckets` bands of `hashes_per_bucket`
    hashes (Broder 1997; the defaults are FineWeb's, about 0.75 of Jaccard similarity).
    """

    kind: Literal["exact", "minhash"]
    ngrams: Positive = Field(5, description="minhash: words of a shingle")
    buckets: Positive = Field(14, description="minhash: bands")
    hashes_per_bucket: Positive = Field(8, description="minhash: hashes of a band")

    @model_validator(mode="after")
    def _keys_of_minhash(self) -> Self:
        given = [name for name in ("ngrams", "buckets", "hashes_per_bucket") if name in self.model_fields_set]
        changed = [name for name in given if getattr(self, name) != type(self).model_fields[name].default]
        if self.kind == "exact" and changed:
            raise ValueError(f"`{changed[0]}` belongs to minhash and has no effect with `kind: exact`; remove it")
        return self


class Decontamination(Section):
    """Training documents that share `ngrams` words in a row with a held-out text are left out."""

    ngrams: Annotated[int, Field(ge=5)] = 13
    files: tuple[Place, ...] = Field((), description="evaluation texts; the validation documents are always compared")


class Executor(Section):
    """Who does the work of prepare: this machine, or a cluster through datatrove's executors."""

    kind: Literal["local", "slurm", "ray"]
    options: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of datatrove's executor, such as time and partition"
    )


class DocumentStart(Section):
    """A line that matches `start` opens a new document."""

    start: str

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        try:
            re.compile(self.start)
        except re.error as error:
            raise ValueError(f"`{self.start}` is not a regular expression: {error}") from error
        return self


class ValidationSplit(Section):
    """Validation documents taken out of the training sources; exactly one of the two."""

    fraction: OpenShare | None = Field(None, description="share of documents, by a keyed hash of the text")
    tail: OpenShare | None = Field(None, description="the last share of each file")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.fraction is None) == (self.tail is None):
            raise ValueError("give exactly one of fraction and tail")
        return self


SHARDS_KEYS = frozenset(
    {"from_", "phases", "sequence_length", "target_length", "max_documents_per_row", "workers", "verify"}
)
"""Keys of `data` that mean something beside `from`."""


class DataConfig(Section):
    """The text and how it becomes rows of tokens."""

    train: tuple[Place | Source, ...] = Field(
        (),
        description="files, globs, directories, URLs, hub:NAME[/CONFIG], or an embedded corpus: python-stdlib, "
        "torch-headers",
    )
    from_: Place | None = Field(
        None, alias="from", description="prepared shards to use instead: a run's data directory, or the URL of one"
    )
    phases: tuple[Phase, ...] = Field((), description="other weights in other parts of the run")
    document: Literal["auto", "row", "file", "line", "paragraph"] | DocumentStart = "auto"
    text_field: str | tuple[str, str] = Field(
        "text", description="the column or key of the text; for translation [source, target] (jsonl, csv, tsv)"
    )
    ids_field: str | None = Field(None, description="the column or key of ready token ids, in place of text_field")
    encoding: Encoding = Field("auto", description="auto: UTF-8, or UTF-16 and UTF-32 by their byte order mark")
    on_error: Literal["keep-going", "stop"] = Field("keep-going", description="what a bad line or row does")
    max_bad_share: Share = Field(0.05, description="a larger share of bad lines or rows ends the preparation")
    filters: tuple[FilterStep, ...] = Field((), description="documents to keep, by datatrove's filters, in order")
    dedup: Literal["exact", "minhash"] | Deduplication | None = None
    decontaminate: StrictBool | Decontamination = False
    validation: ValidationSplit | tuple[Place | Source, ...] = Field(
        default_factory=lambda: ValidationSplit(fraction=0.02), validate_default=True
    )
    sequence_length: Annotated[int, Field(ge=8)] = 1024
    target_length: Annotated[int, Field(ge=4)] | None = Field(
        None,
        description="positions of the decoder; default: translation as many as the encoder's, span-corruption as many "
        "as a full row needs",
    )
    max_documents_per_row: Positive = 64
    part_bytes: Annotated[int, Field(ge=1_000_000)] = Field(
        64_000_000, description="input bytes a part, the unit of work and of restart; fixed by the manifest"
    )
    executor: Literal["local", "slurm", "ray"] | Executor = "local"
    workers: Positive | Literal["auto"] = "auto"
    verify: Literal["full", "size"] = Field(
        "full", description="what is compared of the shards before training: every byte's digest, or sizes alone"
    )

    @model_validator(mode="after")
    def _text_or_shards(self) -> Self:
        if self.from_ is None and not self.train:
            raise ValueError("give data.train (files, globs, URLs, hub:NAME) or data.from (prepared shards)")
        given = sorted(self.model_fields_set - SHARDS_KEYS)
        if self.from_ is not None and given:
            raise ValueError(f"`from` takes prepared shards as they are, so `{given[0]}` has no effect; remove one")
        return self

    @model_validator(mode="after")
    def _ready_ids_have_no_text(self) -> Self:
        if self.ids_field is not None and not isinstance(self.text_field, str):
            raise ValueError(f"`ids_field: {self.ids_field}` gives single documents, and `text_field` names pairs")
        needs_text = {"filters": self.filters, "dedup": self.dedup, "decontaminate": self.decontaminate}
        if self.ids_field is not None and (given := [key for key, value in needs_text.items() if value]):
            raise ValueError(f"`{given[0]}` works on text, and `ids_field: {self.ids_field}` gives none; remove one")
        return self

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        weighted = self.weights
        unweighted = [entry if isinstance(entry, str) else entry.name for entry in self.train]
        unweighted = [name for name in unweighted if name not in weighted]
        if (weighted or self.phases) and (bare := [entry for entry in self.train if isinstance(entry, str)]):
            shown = redacted(bare[0])
            raise ValueError(f"train: `{shown}` has no name and weight; write {{name: ..., files: [...], weight: 1}}")
        if weighted and unweighted:
            raise ValueError(f"train: `{unweighted[0]}` has no weight, `{next(iter(weighted))}` has; give all one")
        names = [entry.name for entry in self.train if isinstance(entry, Source)]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"train: two sources are called `{repeated[0]}`; put their files under one, or rename it")
        if weighted and self.phases:
            raise ValueError("train: the weights of `phases` replace those of the sources; remove one of them")
        capped = [entry.name for entry in self.train if isinstance(entry, Source) and entry.max_epochs is not None]
        if capped and not (weighted or self.phases):
            raise ValueError(f"train: max_epochs of `{capped[0]}` needs weights; give every source a weight")
        if weighted:
            integer_weights(weighted)
        for number, phase in enumerate(self.phases, start=1):
            if self.from_ is None and (unknown := sorted(set(phase.weights) - set(names))):
                raise ValueError(f"phases: `{unknown[0]}` is no source of train; they are {', '.join(names)}")
            if (phase.until is None) != (number == len(self.phases)):
                raise ValueError("phases: every phase but the last needs `until`, and the last has none")
        return self

    @model_validator(mode="after")
    def _validation_has_no_weights(self) -> Self:
        for entry in self.validation if isinstance(self.validation, tuple) else ():
            if isinstance(entry, Source) and (entry.weight, entry.max_epochs) != (None, None):
                raise ValueError(f"validation: weight and max_epochs of `{entry.name}` have no effect; remove them")
            if isinstance(entry, Source) and entry.license is not None:
                raise ValueError(
                    f"validation: license of `{entry.name}` has no effect, as nothing is trained on it; remove it"
                )
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Weights by source, as `train` gives them; empty when it gives none."""
        return {
            entry.name: entry.weight for entry in self.train if isinstance(entry, Source) and entry.weight is not None
        }

    @property
    def text_sources(self) -> list[str | dict[str, Any]]:
        """`train` as plain data that decides the text: without weight and `max_epochs`, which only share out rows.

        Nor with the licence, which is for people.
        """
        plain: list[str | dict[str, Any]] = self.model_dump(mode="json", include={"train"})["train"]
        return [
            entry
            if isinstance(entry, str)
            else {key: value for key, value in entry.items() if key not in ("weight", "max_epochs", "license")}
            for entry in plain
        ]

    @property
    def deduplication(self) -> Deduplication | None:
        """`dedup`, its short form spelled out."""
        return Deduplication(kind=self.dedup) if isinstance(self.dedup, str) else self.dedup

    @property
    def decontamination(self) -> Decontamination | None:
        """`decontaminate`, its short form spelled out."""
        if isinstance(self.decontaminate, bool):
            return Decontamination() if self.decontaminate else None
        return self.decontaminate
