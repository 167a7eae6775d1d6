"""Packing: which piece of which document lies in which row. Planned once, from the documents' lengths alone.

What lives here: chunking, best-fit, the plan on the disk. What must not: ids, or the order in which rows are drawn.

A document longer than a row becomes pieces that fill rows, and a rest. Pieces and short documents are placed by
best-fit decreasing over the histogram of their lengths: work grows with the number of distinct lengths, so that 10^8
documents take seconds. Nothing is dropped and nothing stands twice. A row has at most `max_documents_per_row` pieces.

    encoder piece   [CLS] payload [SEP]                     each piece
    decoder piece   [BOS] payload ... payload [EOS]         BOS before a document's first payload, EOS after its last
    seq2seq piece   input EOS | target EOS                  in the encoder's and the decoder's row, which are filled
                                                            together; of a pair, or of a text that is to be corrupted

When BOS and payload end exactly with a row, EOS has no place of its own: it is the target of the last position alone.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pretrain.data.fitting import Group, best_fit, best_fit_pairs
from pretrain.data.noise import corrupted_lengths, longest_piece
from pretrain.data.shards import TokenStore
from pretrain.files import (
    ArtifactError,
    HashingWriter,
    commit_directory,
    read_manifest,
    sha256_json,
    write_manifest,
)

PACKING_VERSION = 1
_BLOCK = 1 << 22
FIRST, LAST, CLOSED = 1, 2, 4
"""Flags of a piece: it opens its document; it closes its document; an EOS (or SEP) stands behind its payload."""
_SOURCE_SHIFT = 3  # above the flags of a pair stand the tokens of its source

PIECE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("flags", "<u4")])
"""A piece: position of its first payload token in the store, number of payload tokens, flags."""

IntArray = npt.NDArray[np.int64]
Layout = Literal["encoder", "decoder", "seq2seq"]


@dataclass(frozen=True)
class PackingSpec:
    """What decides a plan, together with the documents' lengths.

    `opening` and `closing` are the special tokens before and after: of each piece for an encoder ([CLS], [SEP]), of
    each document for a decoder (BOS, EOS; 0 where the tokenizer has none). An encoder's pieces that become two segments
    have two closing ones.

    Of an encoder-decoder, `target_length` are the positions of the decoder's row, and `corruption_rate` and
    `corruption_span` say how long a text is in both rows; None for pairs.
    """

    sequence_length: int
    layout: Layout
    opening: int
    closing: int
    max_documents_per_row: int
    version: int = PACKING_VERSION
    target_length: int | None = None
    corruption_rate: float | None = None
    corruption_span: float | None = None

    def facts(self) -> dict[str, Any]:
        """Plain data; what an encoder or a decoder alone does not have is left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def is_paired(self) -> bool:
        """Whether its documents are pairs of a source and a target."""
        return self.layout == "seq2seq" and self.corruption_rate is None

    @property
    def room(self) -> int:
        """The most payload of a piece."""
        if self.layout == "decoder":
            return self.sequence_length
        if self.layout == "encoder" or self.target_length is None:
            return self.sequence_length - self.opening - self.closing
        if self.corruption_rate is None or self.corruption_span is None:
            return self.sequence_length + self.target_length - 1  # a pair, its separator, without its last EOS
        return longest_piece(self.sequence_length, self.target_length, self.corruption_rate, self.corruption_span)

    def __post_init__(self) -> None:
        if self.layout == "seq2seq" and self.room < 1:
            raise ValueError(
                f"data.sequence_length: {self.sequence_length} with data.target_length: {self.target_length} holds no "
                "text; raise them"
            )
        if self.sequence_length <= self.opening + self.closing:
            raise ValueError(
                f"data.sequence_length: {self.sequence_length} holds the special tokens alone "
                f"({self.opening + self.closing}); raise it"
            )


@dataclass(frozen=True)
class PackingPlan:
    """Rows of pieces. `rows` (R + 1,) are bounds in `pieces` (P,): row r holds pieces[rows[r]:rows[r + 1]].

    `left_out` counts pairs that are too long for a row, and so in none.
    """

    spec: PackingSpec
    rows: npt.NDArray[Any]
    pieces: npt.NDArray[Any]
    left_out: int = 0

    @property
    def num_rows(self) -> int:
        """Rows an epoch."""
        return len(self.rows) - 1

    @property
    def num_positions(self) -> int:
        """Token positions that are not padding, special tokens included."""
        pieces = self.pieces
        parts = (wire_lengths(self.spec, pieces["length"][at], pieces["flags"][at]) for at in _blocks(len(pieces)))
        return sum(int(part.sum()) for part in parts)

    @property
    def utilisation(self) -> float:
        """Share of all positions that is not padding."""
        return self.num_positions / max(1, self.num_rows * self.spec.sequence_length)


def wire_lengths(spec: PackingSpec, lengths: npt.NDArray[Any], flags: npt.NDArray[Any]) -> IntArray:
    """Positions that pieces take in a row (of an encoder-decoder: the encoder's): payload and special tokens."""
    if spec.layout == "seq2seq":
        return _paired_lengths(spec, lengths, flags)[0]
    opened = spec.opening if spec.layout == "encoder" else spec.opening * ((flags & FIRST) != 0)
    total: IntArray = lengths.astype(np.int64) + opened + spec.closing * ((flags & CLOSED) != 0)
    return total


def source_lengths(pieces: npt.NDArray[Any]) -> IntArray:
    """Tokens before the separator of pieces that are pairs; 0 of others."""
    sources: IntArray = (pieces["flags"] >> _SOURCE_SHIFT).astype(np.int64)
    return sources


def _paired_lengths(spec: PackingSpec, lengths: npt.NDArray[Any], flags: npt.NDArray[Any]) -> tuple[IntArray, IntArray]:
    """Positions that pieces take in the encoder's row and in the decoder's, EOS included."""
    if spec.corruption_rate is None or spec.corruption_span is None:
        sources = (flags >> _SOURCE_SHIFT).astype(np.int64)
        return sources + 1, lengths.astype(np.int64) - sources  # the separator becomes one EOS, another closes
    return corrupted_lengths(lengths, spec.corruption_rate, spec.corruption_span)


def plan_packing(document_lengths: IntArray, spec: PackingSpec, sources: IntArray | None = None) -> PackingPlan:
    """Place documents of the given lengths (in tokens, (D,)) into rows. Deterministic.

    Empty documents take no place; every other one does, cut where it must be. Pairs, of which `sources` (D,) are the
    tokens before the separator, are never cut: those that are too long for a row are left out and counted.
    """
    pieces = _cut(document_lengths, spec) if sources is None else _pairs(document_lengths, sources)
    if spec.layout == "seq2seq":
        return _plan_pairs(pieces, spec)
    # Radix sort needs 16 bits; longer rows take the slower merge sort. Stable, so documents keep their order.
    narrow = np.dtype(np.uint16 if spec.sequence_length < 65_536 else np.uint32)
    wire = np.empty(len(pieces), dtype=narrow)
    for block in _blocks(len(pieces)):
        wire[block] = wire_lengths(spec, pieces["length"][block], pieces["flags"][block])
    histogram = np.bincount(wire, minlength=spec.sequence_length + 1)
    longest_first = _order(wire, histogram)
    del wire
    groups = best_fit(histogram, spec.sequence_length, spec.max_documents_per_row)
    rows, placed = _lay_out(groups, histogram, longest_first, pieces)
    return PackingPlan(spec, rows, placed)


def _plan_pairs(pieces: npt.NDArray[Any], spec: PackingSpec) -> PackingPlan:
    """Place pieces into the encoder's and the decoder's rows together; those that fit no row are left out."""
    assert spec.target_length is not None
    reads, writes = _paired_lengths(spec, pieces["length"], pieces["flags"])
    fits = (reads <= spec.sequence_length) & (writes <= spec.target_length)
    left_out = len(pieces) - int(np.count_nonzero(fits))
    pieces, reads, writes = pieces[fits], reads[fits], writes[fits]
    keys, numbers, counts = np.unique(reads << 32 | writes, return_inverse=True, return_counts=True)
    sizes = np.stack([keys >> 32, keys & ((1 << 32) - 1)], axis=1)
    capacity = (spec.sequence_length, spec.target_length)
    order = np.argsort((sizes / np.array(capacity)).max(axis=1), kind="stable")  # the largest are placed first
    sizes, counts = sizes[order], counts[order]
    rank = np.empty(len(order), dtype=np.uint32)
    rank[order] = np.arange(len(order), dtype=np.uint32)
    groups = best_fit_pairs(sizes, counts, capacity, spec.max_documents_per_row)
    rows, placed = _lay_out(groups, counts, _order(rank[numbers], counts), pieces)
    return PackingPlan(spec, rows, placed, left_out)


def _pairs(document_lengths: IntArray, sources: IntArray) -> npt.NDArray[Any]:
    """A piece for each pair."""
    pieces = np.empty(len(document_lengths), dtype=PIECE)
    pieces["offset"] = np.cumsum(document_lengths) - document_lengths
    pieces["length"] = document_lengths
    pieces["flags"] = (FIRST | LAST | CLOSED) + (sources << _SOURCE_SHIFT)
    return pieces


def _blocks(total: int) -> Iterator[slice]:
    """Slices that bound the memory of temporary arrays."""
    for start in range(0, total, _BLOCK):
        yield slice(start, min(start + _BLOCK, total))


# --- cutting --------------------------------------------------------------------------------------------------------


def _cut(document_lengths: IntArray, spec: PackingSpec) -> npt.NDArray[Any]:
    """Pieces of all documents, in order: full ones, then the rest."""
    # `lead` is what BOS takes from the room of a document's first piece.
    lead = spec.opening if spec.layout == "decoder" else 0
    room = spec.room
    counts = [_piece_counts(document_lengths[block], lead, room) for block in _blocks(len(document_lengths))]
    pieces = np.empty(sum(int(count.sum()) for count in counts), dtype=PIECE)
    done, offset = 0, 0
    for block, count in zip(_blocks(len(document_lengths)), counts, strict=True):
        lengths = document_lengths[block]
        total = int(count.sum())
        _cut_block(pieces[done : done + total], offset, lengths, count, spec, lead, room)
        done += total
        offset += int(lengths.sum())
    return pieces


def _piece_counts(lengths: IntArray, lead: int, room: int) -> npt.NDArray[Any]:
    return np.where(lengths > 0, -(-(lengths + lead) // room), 0).astype(np.int32)


def _cut_block(
    pieces: npt.NDArray[Any],
    offset: int,
    lengths: IntArray,
    counts: npt.NDArray[Any],
    spec: PackingSpec,
    lead: int,
    room: int,
) -> None:
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = np.maximum(number * room - lead, 0)
    end = np.minimum((number + 1) * room - lead, lengths[document])
    pieces["offset"] = (offset + np.cumsum(lengths) - lengths)[document] + begin
    pieces["length"] = end - begin
    is_last = number == counts[document] - 1
    if spec.layout != "decoder":
        is_closed = np.full(len(pieces), spec.closing > 0)
    else:
        is_closed = is_last & (end + lead - number * room + spec.closing <= room) & (spec.closing > 0)
    pieces["flags"] = FIRST * (number == 0) + LAST * is_last + CLOSED * is_closed


def _order(wire: npt.NDArray[Any], histogram: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Indices of the pieces, longest first and otherwise in their order: a stable sort by counting, block by block."""
    longest = len(histogram) - 1
    order = np.empty(len(wire), dtype=np.uint32 if len(wire) < 1 << 32 else np.uint64)
    cursor = _starts(histogram)  # where the next piece of each length goes
    for block in _blocks(len(wire)):
        within = np.argsort(wire.dtype.type(longest) - wire[block], kind="stable")
        counts = np.bincount(wire[block], minlength=longest + 1)
        # In the sorted block the pieces of a length are neighbours; they keep their distance, and move together.
        shift = np.repeat((cursor - _starts(counts))[::-1], counts[::-1])
        order[np.arange(len(within)) + shift] = within + block.start
        cursor += counts
    return order


def _starts(histogram: npt.NDArray[Any]) -> IntArray:
    """Where each length begins among pieces that stand longest first."""
    starts: IntArray = np.cumsum(histogram[::-1])[::-1] - histogram
    return starts


# --- placing --------------------------------------------------------------------------------------------------------


def _lay_out(
    groups: list[Group], histogram: npt.NDArray[Any], longest_first: npt.NDArray[Any], pieces: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Hand the pieces out to the groups' rows: bounds (R + 1,) and pieces in row order (P,)."""
    cursor = _starts(histogram).tolist()  # where the next piece of each length stands in `longest_first`
    placed = np.empty_like(pieces)
    # The 16 bytes of a piece as one value of a plain type: numpy copies those ten times faster than records.
    whole, source = placed.view(np.complex128), pieces.view(np.complex128)
    sizes = np.repeat([group.documents for group in groups], [group.count for group in groups])
    base = 0
    for group in groups:
        slot = 0
        for length, number in group.items:
            # The group's rows as a table (count, documents): `number` neighbours in each row, from `slot` on.
            table = whole[base : base + group.count * group.documents].reshape(group.count, group.documents)
            for part in _blocks(group.count):
                some = table[part, slot : slot + number]
                which = longest_first[cursor[length] : cursor[length] + some.size]
                some[:] = source[which].reshape(some.shape)
                cursor[length] += some.size
            slot += number
        base += group.count * group.documents
    bounds = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype("<u8")
    return bounds, placed


# --- on the disk ----------------------------------------------------------------------------------------------------


def plan_directory(split_directory: Path, spec: PackingSpec, shard_digests: Sequence[str]) -> Path:
    """Where the plan for these shards and parameters lies: beside the shards, under a name made of both."""
    key = sha256_json({"spec": spec.facts(), "shards": list(shard_digests)})
    return split_directory / f"packing-{spec.layout}-{spec.sequence_length}-{key[:12]}"


def write_plan(directory: Path, plan: PackingPlan, shard_digests: Sequence[str], *, replace: bool = True) -> None:
    """Write a plan as an artifact of its own: rows.npy, pieces.npy, manifest.json."""
    with commit_directory(directory, replace=replace) as temporary:
        digests = {
            name: _write_npy(temporary / name, array)
            for name, array in (("rows.npy", plan.rows), ("pieces.npy", plan.pieces))
        }
        write_manifest(
            temporary,
            kind="packing",
            config=plan.spec.facts(),
            inputs={f"shard {number}": digest for number, digest in enumerate(shard_digests)},
            files=digests,
            facts={
                "rows": plan.num_rows,
                "pieces": len(plan.pieces),
                "positions": plan.num_positions,
                "utilisation": round(plan.utilisation, 6),
                **({"left_out": plan.left_out} if plan.spec.is_paired else {}),
            },
        )


def load_or_plan(
    split_directory: Path, spec: PackingSpec, store: TokenStore, *, keep: bool = True, separator: int | None = None
) -> PackingPlan:
    """The plan of a split: mapped from the disk, or made and, with `keep` and where that can be, put there.

    Pairs are parted by `separator`.
    """
    digests = [shard.index_digest for shard in store.shards]
    directory = plan_directory(split_directory, spec, digests)
    if not directory.is_dir():
        assert separator is not None or not spec.is_paired
        sources = store.source_lengths(separator) if separator is not None and spec.is_paired else None
        plan = plan_packing(store.document_lengths(), spec, sources)
        if not keep or not os.access(split_directory, os.W_OK):
            return plan
        try:
            write_plan(directory, plan, digests, replace=False)
        except (ArtifactError, OSError):
            if not directory.is_dir():  # else another process of the job has made the same plan meanwhile
                raise
    return read_plan(directory, spec)


def read_plan(directory: Path, spec: PackingSpec) -> PackingPlan:
    """Map a plan that `write_plan` wrote.

    Raises:
        ArtifactError: when it is missing or incomplete.
    """
    manifest = read_manifest(directory, "packing")
    rows = np.load(directory / "rows.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)
    pieces = np.load(directory / "pieces.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)
    if len(rows) - 1 != manifest.facts["rows"] or len(pieces) != manifest.facts["pieces"]:
        raise ArtifactError(f"`{directory}` does not fit its manifest; remove it, and it is planned again")
    return PackingPlan(spec, rows, pieces, manifest.facts.get("left_out", 0))


def _write_npy(path: Path, array: npt.NDArray[Any]) -> str:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    with HashingWriter(path) as writer:
        writer.write(header.getvalue())
        writer.write(np.ascontiguousarray(array).view(np.uint8).data)
    return writer.digest
