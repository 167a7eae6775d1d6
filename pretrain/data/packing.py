"""Packing: which piece of which document lies in which row. Planned once, from the documents' lengths alone.

What lives here: chunking, best-fit, the plan on the disk. What must not: ids, or the order in which rows are drawn.

A document longer than a row becomes pieces that fill rows, and a rest. Pieces and short documents are placed by
best-fit decreasing over the histogram of their lengths: work grows with the number of distinct lengths, so that 10^8
documents take seconds. Nothing is dropped and nothing stands twice. A row has at most `max_documents_per_row` pieces.

    encoder piece   [CLS] payload [SEP]                     each piece
    decoder piece   [BOS] payload ... payload [EOS]         BOS before a document's first payload, EOS after its last

When BOS and payload end exactly with a row, EOS has no place of its own: it is the target of the last position alone.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

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

PIECE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("flags", "<u4")])
"""A piece: position of its first payload token in the store, number of payload tokens, flags."""

IntArray = npt.NDArray[np.int64]
Layout = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class PackingSpec:
    """What decides a plan, together with the documents' lengths.

    `opening` and `closing` are the special tokens before and after: of each piece for an encoder ([CLS], [SEP]), of
    each document for a decoder (BOS, EOS; 0 where the tokenizer has none).
    """

    sequence_length: int
    layout: Layout
    opening: int
    closing: int
    max_documents_per_row: int
    version: int = PACKING_VERSION

    def __post_init__(self) -> None:
        if self.sequence_length <= self.opening + self.closing:
            raise ValueError(
                f"data.sequence_length: {self.sequence_length} holds the special tokens alone "
                f"({self.opening + self.closing}); raise it"
            )


@dataclass(frozen=True)
class PackingPlan:
    """Rows of pieces. `rows` (R + 1,) are bounds in `pieces` (P,): row r holds pieces[rows[r]:rows[r + 1]]."""

    spec: PackingSpec
    rows: npt.NDArray[Any]
    pieces: npt.NDArray[Any]

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
    """Positions that pieces take in a row: payload and special tokens."""
    opened = spec.opening if spec.layout == "encoder" else spec.opening * ((flags & FIRST) != 0)
    total: IntArray = lengths.astype(np.int64) + opened + spec.closing * ((flags & CLOSED) != 0)
    return total


def plan_packing(document_lengths: IntArray, spec: PackingSpec) -> PackingPlan:
    """Place documents of the given lengths (in tokens, (D,)) into rows. Deterministic.

    Empty documents take no place; every other one does, cut where it must be.
    """
    pieces = _cut(document_lengths, spec)
    # Radix sort needs 16 bits; longer rows take the slower merge sort. Stable, so documents keep their order.
    narrow = np.dtype(np.uint16 if spec.sequence_length < 65_536 else np.uint32)
    wire = np.empty(len(pieces), dtype=narrow)
    for block in _blocks(len(pieces)):
        wire[block] = wire_lengths(spec, pieces["length"][block], pieces["flags"][block])
    histogram = np.bincount(wire, minlength=spec.sequence_length + 1)
    longest_first = _order(wire, histogram)
    del wire
    groups = _best_fit(histogram, spec.sequence_length, spec.max_documents_per_row)
    rows, placed = _lay_out(groups, histogram, longest_first, pieces)
    return PackingPlan(spec, rows, placed)


def _blocks(total: int) -> Iterator[slice]:
    """Slices that bound the memory of temporary arrays."""
    for start in range(0, total, _BLOCK):
        yield slice(start, min(start + _BLOCK, total))


# --- cutting --------------------------------------------------------------------------------------------------------


def _cut(document_lengths: IntArray, spec: PackingSpec) -> npt.NDArray[Any]:
    """Pieces of all documents, in order: full ones, then the rest."""
    # `lead` is what BOS takes from the room of a document's first piece.
    lead = 0 if spec.layout == "encoder" else spec.opening
    room = spec.sequence_length - (spec.opening + spec.closing if spec.layout == "encoder" else 0)
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
    if spec.layout == "encoder":
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


@dataclass
class _Group:
    """`count` rows of one make: `items` are (length, how many of it) in the order they were placed."""

    count: int
    documents: int
    items: tuple[tuple[int, int], ...]


def _best_fit(histogram: npt.NDArray[Any], capacity: int, cap: int) -> list[_Group]:
    """Best-fit decreasing over a histogram: each length goes where the least room is left that still holds it.

    Rows of one make are handled together, so the work does not grow with the number of documents.
    """
    done: list[_Group] = []
    open_rows: dict[int, list[_Group]] = {}  # by room left
    rooms: list[int] = []  # the keys of open_rows, sorted

    def put(group: _Group, room: int) -> None:
        if room == 0 or group.documents >= cap:
            done.append(group)
            return
        if room not in open_rows:
            open_rows[room] = []
            insort(rooms, room)
        open_rows[room].append(group)

    for length in range(capacity, 0, -1):
        left = int(histogram[length])
        while left:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                fill = min(capacity // length, cap, left)
                put(_Group(left // fill, fill, ((length, fill),)), capacity - fill * length)
                left %= fill
                continue
            room = rooms[at]
            group = open_rows[room][-1]
            fill = min(room // length, cap - group.documents, left)
            count = min(group.count, left // fill)
            left -= count * fill
            group.count -= count
            if group.count == 0:
                open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room]
                rooms.pop(at)
            put(_Group(count, group.documents + fill, (*group.items, (length, fill))), room - fill * length)
    return done + [group for room in rooms for group in open_rows[room]]


def _lay_out(
    groups: list[_Group], histogram: npt.NDArray[Any], longest_first: npt.NDArray[Any], pieces: npt.NDArray[Any]
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
    key = sha256_json({"spec": asdict(spec), "shards": list(shard_digests)})
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
            config=asdict(plan.spec),
            inputs={f"shard {number}": digest for number, digest in enumerate(shard_digests)},
            files=digests,
            facts={
                "rows": plan.num_rows,
                "pieces": len(plan.pieces),
                "positions": plan.num_positions,
                "utilisation": round(plan.utilisation, 6),
            },
        )


def load_or_plan(split_directory: Path, spec: PackingSpec, store: TokenStore, *, keep: bool = True) -> PackingPlan:
    """The plan of a split: mapped from the disk, or made and, with `keep` and where that can be, put there."""
    digests = [shard.index_digest for shard in store.shards]
    directory = plan_directory(split_directory, spec, digests)
    if not directory.is_dir():
        plan = plan_packing(store.document_lengths(), spec)
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
    rows = np.load(directory / "rows.npy", mmap_mode="r").view(np.ndarray)
    pieces = np.load(directory / "pieces.npy", mmap_mode="r").view(np.ndarray)
    if len(rows) - 1 != manifest.facts["rows"] or len(pieces) != manifest.facts["pieces"]:
        raise ArtifactError(f"`{directory}` does not fit its manifest; remove it, and it is planned again")
    return PackingPlan(spec, rows, pieces)


def _write_npy(path: Path, array: npt.NDArray[Any]) -> str:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    with HashingWriter(path) as writer:
        writer.write(header.getvalue())
        writer.write(np.ascontiguousarray(array).view(np.uint8).data)
    return writer.digest
