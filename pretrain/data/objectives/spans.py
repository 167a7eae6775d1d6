"""Which runs of tokens, or of words, are hidden together: spans of random length, at an exact rate.

What lives here: the distribution of spans, and what they cover. What must not: what becomes of what is covered.

Each token (or word) of a piece begins a span with the same probability, of a length that is geometric up to
`LONGEST_SPAN` (SpanBERT, Joshi et al. 2019, arXiv 1907.10529, section 3.1). Spans that overlap or touch become one, as
in its code. A span ends with its piece, and those that would have begun before it reach into it: so every place is
covered with the same probability, and that is the asked rate, exactly. No draw depends on another.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pretrain.config_objective import LONGEST_SPAN
from pretrain.data.objectives.inputs import Bools
from pretrain.data.order import Draws, below

Floats = npt.NDArray[np.float64]
_HALVINGS = 64


@lru_cache(maxsize=8)
def _lengths(mean: float) -> tuple[float, ...]:
    """Probabilities of the lengths 1 to LONGEST_SPAN: geometric, cut off there, of the given mean."""
    sizes = np.arange(1, LONGEST_SPAN + 1)
    low, high = 0.0, 1.0  # chance that a span ends at each step: a higher one gives a lower mean
    for _ in range(_HALVINGS):
        ends = (low + high) / 2
        weights = (1.0 - ends) ** (sizes - 1)
        if (weights * sizes).sum() / weights.sum() > mean:
            low = ends
        else:
            high = ends
    weights = (1.0 - high) ** (sizes - 1)
    return tuple((weights / weights.sum()).tolist())


def span_lengths(mean: float) -> Floats:
    """Probabilities (LONGEST_SPAN,) of the lengths 1, 2, ... whose mean is `mean`."""
    return np.array(_lengths(float(mean)))


def beginning_rates(rates: Floats, mean: float) -> Floats:
    """The probability (B,) that a place begins a span, so that one is covered with probability `rates` (B,).

    A place is not covered when none of the LONGEST_SPAN places up to it begins a span that reaches it, so that
    1 - rate = product over j of (1 - q P(length > j)), which falls as q rises.
    """
    reach = _reach(mean)
    low, high = np.zeros_like(rates), np.ones_like(rates)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        is_low = 1.0 - np.prod(1.0 - middle[:, None] * reach, axis=1) < rates
        low, high = np.where(is_low, middle, low), np.where(is_low, high, middle)
    return high


def _reach(mean: float) -> Floats:
    """P(length > j) for j = 0, 1, ... LONGEST_SPAN - 1."""
    return np.cumsum(span_lengths(mean)[::-1])[::-1]


def _from_before(begins: Floats, mean: float) -> Floats:
    """P(spans that began before a piece cover r of its places at most), r = 0 ... LONGEST_SPAN - 2: (B, r)."""
    reach = np.append(_reach(mean), np.zeros(LONGEST_SPAN))
    most = np.arange(LONGEST_SPAN - 1)
    back = np.arange(1, LONGEST_SPAN)  # places before the piece
    chances = reach[back[None, :] + most[:, None]]  # (r, back): P(length > back + r)
    covers: Floats = np.prod(1.0 - begins[:, None, None] * chances, axis=2)
    return covers


def cover(unit_starts: Bools, piece_starts: Bools, rates: Floats, mean: float, draws: Draws) -> Bools:
    """What spans cover of flat rows (B * L,).

    Args:
        unit_starts: (B * L,) where a token or word starts, of which lengths are counted.
        piece_starts: (B * L,) where a piece starts, which no span crosses; a unit starts there too.
        rates: (B,) share of each row to cover.
        mean: mean length of a span.
        draws: of the rows.
    """
    firsts = np.flatnonzero(unit_starts)  # (U,)
    opens = piece_starts[firsts]
    heads = np.flatnonzero(opens)  # (Q,) first unit of each piece
    ends = np.append(heads[1:], len(firsts))[np.cumsum(opens) - 1]  # (U,) where the piece of each unit ends
    rows = firsts // draws.sequence_length
    begins = beginning_rates(rates, mean)
    chosen = np.flatnonzero(below(draws.bits_at("mlm: span begins", firsts), begins[rows]))
    limits = np.cumsum(span_lengths(mean))[:-1]
    lengths = 1 + np.searchsorted(limits, _fraction(draws, "mlm: span length", firsts[chosen]), side="right")
    inside = _from_before(begins, mean)[rows[heads]]  # (Q, r)
    drawn = _fraction(draws, "mlm: span from before", firsts[heads])
    reaching = (drawn[:, None] >= inside).sum(axis=1)
    change = np.zeros(len(firsts) + 1, dtype=np.int64)
    np.add.at(change, chosen, 1)
    np.add.at(change, np.minimum(chosen + lengths, ends[chosen]), -1)
    np.add.at(change, heads, 1)
    np.add.at(change, np.minimum(heads + reaching, ends[heads]), -1)
    covered: Bools = (np.cumsum(change[:-1]) > 0)[np.cumsum(unit_starts) - 1]
    return covered


def run_starts(covered: Bools, piece_starts: Bools) -> npt.NDArray[np.int64]:
    """For each covered place, in order, the first place of the run that it is in."""
    before = np.concatenate([[False], covered[:-1]]) & ~piece_starts
    first = np.where(covered & ~before, np.arange(len(covered)), 0)
    starts: npt.NDArray[np.int64] = np.maximum.accumulate(first)[covered]
    return starts


def _fraction(draws: Draws, purpose: str, places: npt.NDArray[np.int64]) -> Floats:
    """Uniform in [0, 1), 53 bits of it, at flat places."""
    drawn: Floats = (draws.bits_at(purpose, places) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return drawn
