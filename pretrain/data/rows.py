"""Rows of ids, or pieces for rows, out of shards and a packing plan: no Python work per token or per document.

What lives here: gathering, special tokens, positions, borders, next tokens, marks. What must not: order, objectives.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pretrain.data.objectives import IGNORE, Pieces, Rows, Texts
from pretrain.data.order import Draws, IntArray, integers
from pretrain.data.packing import CLOSED, FIRST, LAST, PackingPlan, source_lengths, wire_lengths
from pretrain.data.shards import WORD, TokenStore, run_indices
from pretrain.data.vocabulary import SpecialIds

_BLOCK_POSITIONS = 1 << 16  # positions that are made at a time: their temporaries stay in a core's cache


def special_pair(layout: str, tokens: SpecialIds) -> tuple[int | None, int | None]:
    """The ids before and after: [CLS] and [SEP] of each piece, or BOS and EOS of each document; of a pair EOS alone.

    Raises:
        ValueError: when an encoder's tokenizer lacks [CLS] or [SEP], or an encoder-decoder's EOS.
    """
    if layout == "seq2seq":
        return None, tokens.need("eos", "an encoder-decoder")
    if layout == "encoder":
        return tokens.need("cls", "an encoder"), tokens.need("sep", "an encoder")
    return tokens.bos, tokens.eos


def assemble_rows(
    store: TokenStore, plan: PackingPlan, rows: IntArray, tokens: SpecialIds, *, words: bool = False
) -> Rows:
    """Make rows (B,) of the plan: arrays (B, L); with `words` they say where words start, if the shards do."""
    shape = (len(rows), plan.spec.sequence_length)
    made = Rows(
        input_ids=np.empty(shape, dtype=np.int64),
        position_ids=np.empty(shape, dtype=np.int64),
        document_ids=np.empty(shape, dtype=np.int32),
        next_ids=np.empty(shape, dtype=np.int64),
        word_starts=np.ones(shape, dtype=np.bool_) if words and store.is_marked else None,
    )
    step = max(1, _BLOCK_POSITIONS // shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        views = (made.input_ids[part], made.position_ids[part], made.document_ids[part], made.next_ids[part])
        starts = made.word_starts[part] if made.word_starts is not None else None
        _fill(Rows(*views, word_starts=starts), store, plan, rows[part], tokens)
    return made


def assemble_pieces(
    store: TokenStore, plan: PackingPlan, rows: IntArray, draws: Draws, *, with_others: bool = False
) -> Pieces:
    """The pieces of rows (B,) of the plan; with `others` the text of another document for each, by `draws` of the rows.

    The other text is a drawn piece of the plan; where that is of the same document, there is none.
    """
    spec = plan.spec
    first_piece = plan.rows[rows].astype(np.int64)
    counts = plan.rows[rows + 1].astype(np.int64) - first_piece  # (B,)
    pieces = plan.pieces[run_indices(first_piece, counts)]  # (P,)
    lengths, offsets = pieces["length"].astype(np.int64), pieces["offset"].astype(np.int64)
    slots = run_indices(np.ones_like(counts), counts)
    made = Pieces(
        ids=store.gather(offsets, lengths).astype(np.int64, copy=False),
        lengths=lengths,
        rows=np.repeat(np.arange(len(rows)), counts),
        slots=slots,
        sources=source_lengths(pieces),
        shape=(len(rows), spec.sequence_length, spec.target_length or 0, spec.max_documents_per_row),
        marks=store.gather_marks(offsets, lengths) if store.is_marked else None,
    )
    if not with_others:
        return made
    wide = draws.over(spec.max_documents_per_row)
    drawn = wide.bits_at("sentences: other", made.rows * spec.max_documents_per_row + slots - 1)
    others = plan.pieces[integers(drawn, len(plan.pieces))]
    other_offsets = others["offset"].astype(np.int64)
    taken = np.minimum(others["length"].astype(np.int64), lengths)
    taken[store.documents_at(offsets) == store.documents_at(other_offsets)] = 0
    text = store.gather(other_offsets, taken).astype(np.int64, copy=False)
    marks = store.gather_marks(other_offsets, taken) if store.is_marked else None
    return replace(made, others=Texts(text, taken, marks))


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
        for back in range(spec.closing):
            flat[ends[closed] - back] = closing
    if made.word_starts is not None:
        places = run_indices(start + opened, payload)
        made.word_starts.reshape(-1)[places] = (store.gather_marks(offsets, payload) & WORD) != 0
        made.word_starts.reshape(-1)[start + opened] = True
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
