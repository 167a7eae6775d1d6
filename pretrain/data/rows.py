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

_BLOCK_POSITIONS = 1 << 16  # positions that are made at a time: their temporaries stay in a core's cache


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
    shape = (len(rows), plan.spec.sequence_length)
    made = Rows(
        input_ids=np.empty(shape, dtype=np.int64),
        position_ids=np.empty(shape, dtype=np.int64),
        document_ids=np.empty(shape, dtype=np.int32),
        next_ids=np.empty(shape, dtype=np.int64),
    )
    step = max(1, _BLOCK_POSITIONS // shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        views = (made.input_ids[part], made.position_ids[part], made.document_ids[part], made.next_ids[part])
        _fill(Rows(*views), store, plan, rows[part], tokens)
    return made


def _fill(made: Rows, store: TokenStore, plan: PackingPlan, rows: IntArray, tokens: SpecialIds) -> None:
    """Write rows (B,) of the plan into arrays (B, L)."""
    spec = plan.spec
    size = len(rows) * spec.sequence_length
    first_piece = plan.rows[rows].astype(np.int64)
    counts = plan.rows[rows + 1].astype(np.int64) - first_piece  # (B,) pieces in each row
    pieces = plan.pieces[run_indices(first_piece, counts)]  # (P,)
    payload, flags = pieces["length"].astype(np.int64), pieces["flags"]
    offsets = pieces["offset"].astype(np.int64)
    wire = wire_lengths(spec, payload, flags)  # (P,) with special tokens
    slot = run_indices(np.ones_like(counts), counts)  # (P,) 1, 2, ... in each row
    before = np.cumsum(wire) - wire  # wire positions before the piece, over all rows
    row_base = np.repeat(np.arange(len(rows)) * spec.sequence_length - before[np.cumsum(counts) - counts], counts)
    start = before + row_base  # (P,) flat place b * L + t of each piece
    span = np.diff(start, append=size)  # (P,) places up to the next piece: those of a row's last reach to its end
    padding = run_indices(start + wire, span - wire)
    flat = made.input_ids.reshape(-1)

    position_ids = made.position_ids.reshape(-1)
    np.subtract(np.arange(size), np.repeat(start, span), out=position_ids)
    position_ids[padding] = 0
    document_ids = made.document_ids.reshape(-1)
    document_ids[:] = np.repeat(slot.astype(np.int32), span)
    document_ids[padding] = 0

    opening, closing = special_pair(spec.layout, tokens)
    opened = np.full(len(pieces), spec.opening > 0)
    if spec.layout == "decoder":
        opened &= (flags & FIRST) != 0
    flat[run_indices(start + opened, payload)] = store.gather(offsets, payload)
    if opening is not None:
        flat[start[opened]] = opening
    closed = (flags & CLOSED) != 0
    ends = start + wire - 1  # (P,) last place of each piece
    if closing is not None:
        flat[ends[closed]] = closing
    flat[padding] = tokens.pad if tokens.pad is not None else 0

    made.next_ids[:, :-1] = made.input_ids[:, 1:]
    next_ids = made.next_ids.reshape(-1)
    next_ids[padding] = IGNORE
    next_ids[ends] = _after(store, offsets + payload, flags, closed, closing)


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
