"""Two segments a piece, and a label for how they belong together, beside masked language modelling.

What lives here: next-sentence prediction (Devlin et al. 2019, section 3.1) and sentence order (Lan et al. 2019, arXiv
1909.11942, section 3.1). What must not: which tokens are hidden (`masking`).

     [CLS] A [SEP] B [SEP]     token types 0 0 0 1 1

A piece is cut where a sentence starts, else where a word does: BERT's code warns that any other cut makes the task too
easy. The label is 0 where B follows A in the text. With probability 1/2 it is 1: `order` lets them change places;
`next` puts the text of another document in the place of B, no longer than it. A piece of one token is no pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from pretrain.data.objectives.inputs import IGNORE, Arrays, Bools, Layout, Pieces, Rows
from pretrain.data.objectives.masking import MaskedLanguageModelling
from pretrain.data.order import Draws, IntArray
from pretrain.data.shards import SENTENCE, WORD, run_indices
from pretrain.data.vocabulary import SpecialIds


@dataclass(frozen=True)
class SentencePairs:
    """Masked language modelling over pairs of segments, which are to be told apart.

    Beside the arrays of `masking` the batch has token_type_ids (B, L), and for each slot of a row sentence_positions
    (B, P), the place of its [CLS], and sentence_labels (B, P), -100 where there is no pair.
    """

    takes_pieces: ClassVar[bool] = True
    mode: Literal["next", "order"]
    masking: MaskedLanguageModelling

    def __call__(self, pieces: Pieces, draws: Draws, tokens: SpecialIds) -> Arrays:
        """Make pairs of the pieces, and hide tokens of them."""
        wide, places = pieces.places(draws)
        first = _cuts(pieces, wide, places)  # (P,) tokens of A; 0: no pair
        is_pair = first > 0
        changed = is_pair & (wide.bits_at("sentences: changed", places[pieces.starts]) >> np.uint64(63) == 1)
        if pieces.others is not None:
            changed &= pieces.others.lengths > 0
        ids, lengths, starts_word, types = self._segments(pieces, first, changed, tokens)
        _, length, _, most = pieces.shape
        layout = Layout.of(lengths, pieces, length)
        shape = layout.position_ids.shape
        rows = Rows(
            input_ids=layout.put(ids, tokens.pad if tokens.pad is not None else 0),
            position_ids=layout.position_ids,
            document_ids=layout.document_ids,
            next_ids=np.broadcast_to(np.int64(IGNORE), shape),
            word_starts=layout.put(starts_word, True, np.bool_),
            progress=pieces.progress,
        )
        positions = np.zeros((shape[0], most), dtype=np.int64)
        labels = np.full((shape[0], most), IGNORE, dtype=np.int64)
        slots = (pieces.rows, pieces.slots - 1)
        positions[slots] = layout.places[np.cumsum(lengths) - lengths] % length
        labels[slots] = np.where(is_pair, changed.astype(np.int64), IGNORE)
        return {
            "position_ids": rows.position_ids,
            "document_ids": rows.document_ids,
            **self.masking(rows, draws, tokens),
            "token_type_ids": layout.put(types, 0),
            "sentence_positions": positions,
            "sentence_labels": labels,
        }

    def _segments(
        self, pieces: Pieces, first: IntArray, changed: Bools, tokens: SpecialIds
    ) -> tuple[IntArray, IntArray, Bools, IntArray]:
        """Ids of all pieces with their special tokens, each piece's length, where words start, token types."""
        opening, closing = (tokens.need(role, "objective.sentences") for role in ("cls", "sep"))
        assert pieces.marks is not None
        pool, marks = [pieces.ids], [pieces.marks]
        starts, lengths = pieces.starts, pieces.lengths
        is_pair = first > 0
        a, b = np.where(is_pair, first, lengths), np.where(is_pair, lengths - first, 0)
        from_a, from_b = starts, starts + a
        if self.mode == "order":
            from_a, from_b = np.where(changed, from_b, from_a), np.where(changed, from_a, from_b)
            a, b = np.where(changed, b, a), np.where(changed, a, b)
        elif pieces.others is not None:
            others = pieces.others
            from_b = np.where(changed, len(pieces.ids) + np.cumsum(others.lengths) - others.lengths, from_b)
            b = np.where(changed, np.minimum(b, others.lengths), b)
            pool.append(others.ids)
            assert others.marks is not None
            marks.append(others.marks)
        size = sum(map(len, pool))
        pool.append(np.array([opening, closing]))
        marks.append(np.full(2, WORD, dtype=np.uint8))
        one = np.ones_like(a)
        at = np.stack([size * one, from_a, (size + 1) * one, from_b, (size + 1) * one], axis=1)  # (P, 5)
        long = np.stack([one, a, one, b, is_pair.astype(np.int64)], axis=1)
        taken = run_indices(at.reshape(-1), long.reshape(-1))
        starts_word = (np.concatenate(marks)[taken] & WORD) != 0
        begins = (np.cumsum(long.reshape(-1)) - long.reshape(-1))[long.reshape(-1) > 0]
        starts_word[begins] = True
        types = np.repeat(np.tile([0, 0, 0, 1, 1], len(a)), long.reshape(-1))
        return np.concatenate(pool)[taken], long.sum(axis=1), starts_word, types


def _cuts(pieces: Pieces, draws: Draws, places: IntArray) -> IntArray:
    """Where each piece is cut (P,), in tokens from its start: at a drawn start of a sentence, else of a word, else of a
    token; 0 where there is only one.
    """
    if pieces.marks is None:
        raise ValueError(
            "objective.sentences: the prepared data do not say where sentences start; prepare them again with it, "
            "under another name="
        )
    level = np.where(pieces.marks & SENTENCE, 3, np.where(pieces.marks & WORD, 2, 1)).astype(np.uint64)
    keys = (draws.bits_at("sentences: cut", places) >> np.uint64(2)) | (level << np.uint64(62))
    starts = pieces.starts
    keys[starts] = 0
    best = np.maximum.reduceat(keys, starts)
    found = np.flatnonzero(keys == np.repeat(best, pieces.lengths))
    owner = np.repeat(np.arange(len(starts)), pieces.lengths)[found]
    cuts = np.zeros(len(starts), dtype=np.int64)
    cuts[owner[::-1]] = (found - starts[owner])[::-1]  # of equals the first
    return cuts
