"""Masked language modelling: which tokens are hidden, and what is shown in their place.

What lives here: tokens, whole words or spans of them, at a rate that may change over the run. What must not: models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pretrain.data.objectives.inputs import IGNORE, Arrays, Bools, Rows
from pretrain.data.objectives.spans import cover, run_starts
from pretrain.data.order import Draws, IntArray, below, integers
from pretrain.data.vocabulary import SpecialIds


@dataclass(frozen=True)
class MaskedLanguageModelling:
    """Predict hidden tokens (Devlin et al. 2019, section 3.1), with any rate and split.

    Each position that is no special token is a target with probability `rate`, on its own: a row has `rate` of its
    positions as targets on average, and a very short one may have none. Of the targets the share `random` gets a
    random token that is no special one, `keep` stays, the rest becomes [MASK].

    With `final_rate` the rate moves in a line from `rate` to it over the run, by each sample's place in the run.

    With `whole_words` each word of the tokenizer is drawn as one, with the same probability, so that the expected share
    of tokens stays `rate`. What becomes of each token of a word is a draw of its own, as in the whole-word option of
    Google's BERT code (create_pretraining_data.py). A word that reaches into another piece is drawn in each on its own.

    With `span` runs of tokens (or of words) of that mean length are hidden, and what becomes of a run is one draw, as
    in SpanBERT (section 3.1).
    """

    rate: float
    random: float
    keep: float
    final_rate: float | None = None
    whole_words: bool = False
    span: float | None = None
    kind: str = "mlm"

    def __call__(self, rows: Rows, draws: Draws, tokens: SpecialIds) -> Arrays:
        """Hide tokens of `rows`."""
        mask = tokens.need("mask", f"objective.kind: {self.kind}")
        ids = rows.input_ids.reshape(-1)  # (B * L,)
        places, decided_at = self._places(rows, draws)
        can = ~tokens.is_special[ids[places]] & (rows.document_ids.reshape(-1)[places] > 0)
        places, decided_at = places[can], decided_at[can]
        labels = np.full(ids.shape, IGNORE, dtype=np.int64)
        labels[places] = ids[places]
        how = draws.bits_at("mlm: how", decided_at)
        is_kept = below(how, self.keep)
        is_random = below(how, self.keep + self.random) & ~is_kept
        shown = np.full(places.shape, mask, dtype=np.int64)
        shown[is_kept] = ids[places[is_kept]]
        which = integers(draws.bits_at("mlm: replacement", places[is_random]), len(tokens.replaceable))
        shown[is_random] = tokens.replaceable[which]
        inputs = ids.copy()
        inputs[places] = shown
        shape = rows.input_ids.shape
        return {"input_ids": inputs.reshape(shape), "labels": labels.reshape(shape)}

    def rates(self, rows: Rows) -> npt.NDArray[np.float64]:
        """The rate of each row, (B,)."""
        number = len(rows.input_ids)
        if self.final_rate is None or rows.progress is None:
            return np.full(number, self.rate)
        return self.rate + (self.final_rate - self.rate) * rows.progress

    def _places(self, rows: Rows, draws: Draws) -> tuple[IntArray, IntArray]:
        """Flat places that are chosen, and for each the place whose draw decides what becomes of it."""
        varies = self.final_rate is not None and rows.progress is not None
        rates = self.rates(rows) if varies else self.rate
        if self.span is None and not self.whole_words:
            places = np.flatnonzero(draws.below("mlm: is target", rates).reshape(-1))
            return places, places
        starts = self._word_starts(rows) if self.whole_words else np.ones(rows.input_ids.size, dtype=np.bool_)
        if self.span is None:
            firsts = np.flatnonzero(starts)
            share = self.rates(rows)[firsts // draws.sequence_length]
            chosen = below(draws.bits_at("mlm: is target", firsts), share)
            places = np.flatnonzero(chosen[np.cumsum(starts) - 1])
            return places, places
        piece_starts = rows.position_ids.reshape(-1) == 0  # each place of padding counts as a piece, and is passed over
        covered = cover(starts, piece_starts, self.rates(rows), self.span, draws)
        return np.flatnonzero(covered), run_starts(covered, piece_starts)

    @staticmethod
    def _word_starts(rows: Rows) -> Bools:
        if rows.word_starts is None:
            raise ValueError(
                "objective.whole_words: the prepared data do not say where words start; prepare them again with it, "
                "under another name="
            )
        return rows.word_starts.reshape(-1)
