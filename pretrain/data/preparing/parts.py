"""The plan of a preparation: which pieces of which files make which part.

What lives here: parts, fixed by the text and the configuration and never by the number of workers, and their digest.
What must not: doing the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pretrain.config_data import DataConfig, DocumentStart, Source, ValidationSplit
from pretrain.data.preparing.splits import TRIAL_TAIL, Split, by_fraction, by_tail, by_tail_of_text, entirely, of_source
from pretrain.data.reading.documents import byte_ranges, document_mode, input_digest, units
from pretrain.data.reading.lines import Policy
from pretrain.data.reading.pairs import TextField, check_pairs
from pretrain.data.reading.sources import (
    SourceFile,
    Told,
    digest_of_files,
    first_files,
    refuse_repeated,
    resolve_sources,
)
from pretrain.data.shards import TRAIN, VALIDATION
from pretrain.files import sha256_json

PLAN_VERSION = 1
_COMPRESSION = 4  # about what compression makes of text; it only decides how many small files share a part


@dataclass(frozen=True)
class Piece:
    """A range of a file (all of it when None). `length` is the whole file's, in units of positions, for tails."""

    file: int
    byte_range: tuple[int, int] | None
    length: int | None = None


@dataclass(frozen=True)
class Part:
    """A unit of work and of restart: its documents go to `split`, or where the plan's rule sends them."""

    split: str
    number: int
    pieces: tuple[Piece, ...]
    weight: int

    @property
    def name(self) -> str:
        """Unique in the plan."""
        return f"{self.split}-{self.number:05d}"


@dataclass(frozen=True)
class Plan:
    """All parts of a preparation and everything that decides their bytes. Plain data, kept beside the unfinished parts.

    `held_out` is the rule that splits the training files: {"fraction": x}, {"tail": x} or None.
    `max_bytes` bounds the text that is read of each split's files, for trials.
    `marks`: the shards say where words and sentences start.
    `steps` are what keeps documents out (`pretrain.data.keeping.sieve`), as plain data.
    """

    files: tuple[SourceFile, ...]
    digests: tuple[str, ...]
    parts: tuple[Part, ...]
    document: str | DocumentStart
    text_field: TextField
    ids_field: str | None
    held_out: dict[str, float] | None
    tokenizer: str
    tokenizer_digest: str
    vocab_size: int
    max_bytes: int | None
    steps: dict[str, Any] = field(default_factory=dict)
    on_error: Policy = "keep-going"
    max_bad_share: float = 1.0
    marks: bool = False
    version: int = PLAN_VERSION

    @cached_property
    def digest(self) -> str:
        """Equal for plans that give the same bytes."""
        return sha256_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        raw = {
            **vars(self),
            "files": [vars(file) for file in self.files],
            "parts": [{**vars(part), "pieces": [vars(piece) for piece in part.pieces]} for part in self.parts],
        }
        raw.pop("digest", None)  # where `cached_property` keeps it
        del raw["on_error"], raw["max_bad_share"]  # how it may end, not what it gives
        if not self.marks:
            del raw["marks"]  # as before there were any
        raw["document"] = self.document if isinstance(self.document, str) else self.document.model_dump()
        return raw

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Plan:
        """What `to_json` wrote."""
        parts = []
        for part in raw["parts"]:
            pieces = [
                Piece(piece["file"], tuple(piece["byte_range"]) if piece["byte_range"] else None, piece["length"])
                for piece in part["pieces"]
            ]
            parts.append(Part(part["split"], part["number"], tuple(pieces), part["weight"]))
        document, text_field = raw["document"], raw["text_field"]
        return cls(
            **{
                **raw,
                "files": tuple(SourceFile(**file) for file in raw["files"]),
                "digests": tuple(raw["digests"]),
                "parts": tuple(parts),
                "text_field": text_field if isinstance(text_field, str) else tuple(text_field),
                "document": document if isinstance(document, str) else DocumentStart(**document),
            }
        )

    def inputs(self) -> dict[str, str]:
        """A digest for each entry of the configuration: of the file, or of the listing of its files."""
        entries: dict[str, list[tuple[str, str]]] = {}
        for file, digest in zip(self.files, self.digests, strict=True):
            entries.setdefault(file.entry, []).append((file.name, digest))
        single = {entry: files[0][1] for entry, files in entries.items() if files[0][0] == entry}
        return {entry: single.get(entry) or digest_of_files(files) for entry, files in entries.items()}

    def split_of(self, part: Part, piece: Piece) -> Split:
        """The rule that sends a piece's documents to their splits."""
        if not is_training(part.split) or self.held_out is None:
            return entirely(part.split)
        if "fraction" in self.held_out:
            rule = by_fraction(self.held_out["fraction"])
        elif piece.length is None and not isinstance(self.text_field, str):
            rule = by_fraction(self.held_out["tail"])  # of a trial; a pair is not cut
        elif piece.length is None:
            rule = by_tail_of_text(self.held_out["tail"])
        else:
            rule = by_tail(self.held_out["tail"], piece.length)
        return of_source(rule, self.files[piece.file].source)

    def splits(self) -> list[str]:
        """The splits that there must be: those of files, and the one held out of each that is trained on."""
        own = list(dict.fromkeys(part.split for part in self.parts))
        if self.held_out is None:
            return own
        return own + [VALIDATION + split.removeprefix(TRAIN) for split in own if is_training(split)]


def is_training(split: str) -> bool:
    """Whether a split is trained on: `train`, or `train-NAME` of a named source."""
    return split.partition("-")[0] == TRAIN


def input_files(data: DataConfig, *, download: bool = True) -> dict[str, list[SourceFile]]:
    """The files of each split that has files of its own.

    They are `train` and `train-NAME` of each named source, and the validation splits that are given by name. Remote
    files are downloaded, unless `download` is false: then `fetch_files` must come before reading.

    Raises:
        ValueError: when an entry names nothing, or a file is named twice.
    """
    splits: dict[str, list[SourceFile]] = {}
    for file in resolve_sources(data.train, key="data.train", encoding=data.encoding, download=download):
        splits.setdefault(f"{TRAIN}-{file.source}" if file.source else TRAIN, []).append(file)
    if not isinstance(data.validation, ValidationSplit):
        for entry in data.validation:
            name = f"{VALIDATION}-{entry.name}" if isinstance(entry, Source) else VALIDATION
            files = resolve_sources([entry], key="data.validation", encoding=data.encoding, download=download)
            splits.setdefault(name, []).extend(files)
        refuse_repeated([file for group in splits.values() for file in group], "data.train and data.validation")
    return splits


def make_plan(
    data: DataConfig,
    splits: Mapping[str, list[SourceFile]],
    *,
    tokenizer: str,
    tokenizer_digest: str,
    vocab_size: int,
    max_bytes: int | None,
    marks: bool = False,
    told: Told | None = None,
) -> Plan:
    """Cut the text (as of `input_files`) into parts of about `data.part_bytes` and hash every input.

    With `marks` the shards will say where words start. With `max_bytes` no more than that is read of any file, and
    later files are left out; `told` is called with the bytes that were hashed, from time to time.

    Raises:
        ValueError: when `data.document` does not fit a file, or a share is to be held out of a single document.
    """
    files = [file for group in splits.values() for file in group]
    check_pairs(files, data.text_field)
    rule = data.validation.model_dump(exclude_none=True) if isinstance(data.validation, ValidationSplit) else None
    if rule is not None and "fraction" in rule:
        for split in filter(is_training, splits):
            _refuse_a_share_of_one(splits[split], data, rule["fraction"])
    if rule is not None and max_bytes is not None:
        rule = {"tail": TRIAL_TAIL}
    parts: list[Part] = []
    first = 0
    for split, group in splits.items():
        pieces: Iterable[tuple[list[Piece], int]]
        if max_bytes is None:
            tail = is_training(split) and rule is not None and "tail" in rule
            pieces = _pieces(group, first, data, needs_length=tail)
        else:
            pieces = _first_pieces(group, first, max_bytes)
        parts.extend(Part(split, number, tuple(some), weight) for number, (some, weight) in enumerate(pieces))
        first += len(group)
    used = {piece.file for part in parts for piece in part.pieces}
    digests = [
        input_digest(file, max_bytes, told) if max_bytes is None or number in used else ""
        for number, file in enumerate(files)
    ]
    return Plan(
        files=tuple(files),
        digests=tuple(digests),
        parts=tuple(parts),
        document=data.document,
        text_field=data.text_field,
        ids_field=data.ids_field,
        held_out=rule,
        tokenizer=tokenizer,
        tokenizer_digest=tokenizer_digest,
        vocab_size=vocab_size,
        max_bytes=max_bytes,
        on_error=data.on_error,
        max_bad_share=data.max_bad_share,
        marks=marks,
    )


def _pieces(
    files: Sequence[SourceFile], first: int, data: DataConfig, *, needs_length: bool
) -> Iterator[tuple[list[Piece], int]]:
    """Pieces grouped into parts with their weights: small neighbours share one, sources never do."""
    group: list[Piece] = []
    text = weight = 0
    source = None
    for number, file in enumerate(files, start=first):
        whole_text = document_mode(file, data.document) == "file"
        length = units(file) if needs_length and not whole_text else None
        for byte_range in byte_ranges(file, data.part_bytes, data.document):
            size = byte_range[1] - byte_range[0] if byte_range is not None else max(1, file.bytes)
            about = size * (_COMPRESSION if file.compression or file.format == "parquet" else 1)
            if group and (text + about > data.part_bytes or file.source != source):
                yield group, weight
                group, text, weight = [], 0, 0
            group.append(Piece(number, byte_range, length))
            text, weight, source = text + about, weight + size, file.source
    if group:
        yield group, weight


def _first_pieces(files: Sequence[SourceFile], first: int, max_bytes: int) -> list[tuple[list[Piece], int]]:
    """One part of the first files that together hold `max_bytes`: a trial asks no file for its borders or its end."""
    taken = first_files(files, max_bytes)
    pieces = [Piece(number, None) for number in range(first, first + len(taken))]
    return [(pieces, sum(min(max_bytes, file.bytes) for file in taken))]


def _refuse_a_share_of_one(files: Sequence[SourceFile], data: DataConfig, fraction: float) -> None:
    """Raise ValueError when the text is one document: whole documents are held out, so this holds out none, or all."""
    if len(files) == 1 and document_mode(files[0], data.document) == "file":
        raise ValueError(
            f"data.validation: a fraction of {fraction} cannot be held out of `{files[0].name}`, one document; "
            "use {tail: 0.1}, name validation files, or cut it into more documents with data.document"
        )
