"""Rows of ids out of shards and a packing plan, vectorised: no Python work per token or per document.

What lives here: gathering, special tokens, positions, borders, next tokens. What must not: order, objectives.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pretrain.data.objectives import IGNORE, Rows
from pretrain.data.order import IntArray
from pretrain.data.packing import CLOSED, FIRST, LAST, PackingPlan, wire_lengths
from pretrain.data.shards import TokenStore, run_indices
from pretrain.data.vocabulary import SpecialIds


def special_pair(layout: str, tokens: SpecialIds) -> tuple[int | None, int | None]:
    """The ids before and after: [CLS] and [SEP] of each piece, or BOS and EOS of each document.

    Raises:
        ValueError: when an encoder's tokenizer lacks [CLS] or [SEP].
    """
    if layout == "encoder":
        return tokens.need("cls", "an encoder"), tokens.need("sep", "an encoder")
    return tokens.bos, tokens.eos


def assemble_rows(store: TokenStore, plan: PackingPlan, rows: IntArray, tokens: SpecialIds) -> Rows:
    """Make rows (B,) of the plan: arrays (B, L)."""
    spec = plan.spec
    length = spec.sequence_length
    shape = (len(rows), length)
    first_piece = plan.rows[rows].astype(np.int64)
    counts = plan.rows[rows + 1].astype(np.int64) - first_piece  # (B,) pieces in each row
    pieces = plan.pieces[run_indices(first_piece, counts)]  # (P,)
    payload, flags = pieces["length"].astype(np.int64), pieces["flags"]
    wire = wire_lengths(spec, payload, flags)  # (P,) with special tokens
    slot = run_indices(np.ones_like(counts), counts)  # (P,) 1, 2, ... in each row
    before = np.cumsum(wire) - wire  # wire positions before the piece, over all rows
    row_base = np.repeat(np.arange(len(rows)) * length - before[np.cumsum(counts) - counts], counts)
    start = before + row_base  # (P,) flat place b * L + t of each piece
    opened = np.full(len(pieces), spec.opening > 0)
    if spec.layout == "decoder":
        opened &= (flags & FIRST) != 0
    payload_start = start + opened
    places = run_indices(payload_start, payload)

    opening, closing = special_pair(spec.layout, tokens)
    offsets = pieces["offset"].astype(np.int64)
    input_ids = np.full(shape, tokens.pad if tokens.pad is not None else 0, dtype=np.int64)
    flat = input_ids.reshape(-1)
    flat[places] = store.gather(offsets, payload)
    if opening is not None:
        flat[start[opened]] = opening
    closed = (flags & CLOSED) != 0
    ends = start + wire - 1  # (P,) last place of each piece
    if closing is not None:
        flat[ends[closed]] = closing

    position_ids = np.zeros(shape, dtype=np.int64)
    document_ids = np.zeros(shape, dtype=np.int32)
    all_places = run_indices(start, wire)
    position_ids.reshape(-1)[all_places] = run_indices(np.zeros_like(wire), wire)
    document_ids.reshape(-1)[all_places] = np.repeat(slot.astype(np.int32), wire)

    next_ids = np.full(shape, IGNORE, dtype=np.int64)
    next_ids[:, :-1] = input_ids[:, 1:]
    next_ids[document_ids == 0] = IGNORE
    next_ids.reshape(-1)[ends] = _after(store, offsets + payload, flags, closed, closing)
    return Rows(input_ids, position_ids, document_ids, next_ids)


def _after(
    store: TokenStore,
    following: IntArray,
    flags: npt.NDArray[np.uint32],
    closed: npt.NDArray[np.bool_],
    closing: int | None,
) -> IntArray:
    """What follows the last position of each piece in its document: a payload token, EOS, or nothing."""
    last = (flags & LAST) != 0
    after = np.full(len(flags), IGNORE, dtype=np.int64)
    goes_on = ~last
    after[goes_on] = store.gather(following[goes_on], np.ones(int(goes_on.sum()), dtype=np.int64))
    if closing is not None:
        after[last & ~closed] = closing
    return after
