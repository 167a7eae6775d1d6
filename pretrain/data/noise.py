"""How many tokens span corruption hides in a piece, and in how many spans: a function of the piece's length alone.

What lives here: the two numbers, which packing and the objective share. What must not: where the spans lie.

After T5's code (`random_spans_noise_mask`; Raffel et al. 2019, arXiv 1910.10683, section 3.1.4): of n tokens
round(n rate) are hidden, at least one and not all, in round(hidden / mean) spans, at least one, with something left
between them. A piece of one token is hidden whole.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def noise_counts(lengths: npt.NDArray[np.integer], rate: float, mean: float) -> tuple[IntArray, IntArray]:
    """Hidden tokens and spans of pieces of `lengths` (P,) tokens, each at least 1: (P,) and (P,)."""
    sizes = lengths.astype(np.int64)
    hidden = np.clip(np.rint(sizes * rate).astype(np.int64), 1, np.maximum(1, sizes - 1))
    spans = np.maximum(1, np.minimum(np.rint(hidden / mean).astype(np.int64), sizes - hidden))
    return hidden, spans


def corrupted_lengths(lengths: npt.NDArray[np.integer], rate: float, mean: float) -> tuple[IntArray, IntArray]:
    """Positions of pieces in the encoder's and the decoder's row: a sentinel for each span, and EOS, in both."""
    hidden, spans = noise_counts(lengths, rate, mean)
    return lengths.astype(np.int64) - hidden + spans + 1, hidden + spans + 1


def longest_piece(length: int, target_length: int, rate: float, mean: float) -> int:
    """The most tokens whose corruption fits an encoder's row of `length` and a decoder's of `target_length`; 0: none.

    Both lengths grow with the piece's, so there is one.
    """
    sizes = np.arange(1, int(length / (1.0 - rate)) + 8)
    encoder, decoder = corrupted_lengths(sizes, rate, mean)
    return int(np.count_nonzero((encoder <= length) & (decoder <= target_length)))


def target_length_of(length: int, rate: float, mean: float) -> int:
    """Positions that the decoder's row needs for the longest piece that an encoder's row of `length` holds.

    T5: 114 for 512. At least what the shortest piece needs.
    """
    longest = max(1, longest_piece(length, 1 << 62, rate, mean))
    return int(corrupted_lengths(np.array([longest]), rate, mean)[1][0])


def most_spans(length: int, target_length: int | None, rate: float, mean: float) -> int:
    """Spans of the longest piece of a row, and so the sentinels that rows of this shape need."""
    target_length = target_length or target_length_of(length, rate, mean)
    longest = max(1, longest_piece(length, target_length, rate, mean))
    return int(noise_counts(np.array([longest]), rate, mean)[1][0])
