"""What an objective is given: rows of tokens, or the pieces that rows are yet to be made of.

What lives here: the two forms, and laying pieces out in rows. What must not: any objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from pretrain.data.order import Draws, IntArray
from pretrain.data.shards import run_indices
from pretrain.data.vocabulary import SpecialIds

IGNORE = -100
"""Target of a position that is not scored, as in `torch.nn.functional.cross_entropy`."""

Arrays = dict[str, npt.NDArray[Any]]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Rows:
    """A batch of packed rows.

    input_ids     (B, L) int64   pad where nothing lies
    position_ids  (B, L) int64   from 0 in each piece; 0 in padding
    document_ids  (B, L) int32   from 1, the piece's number in its row; 0 in padding
    next_ids      (B, L) int64   the token that follows each position in its document, though it lie in another row;
                                 -100 after a document's end and in padding
    word_starts   (B, L) bool    where a word of the tokenizer starts: special tokens, padding and the first token of
                                 a piece do; None where the shards do not say it
    progress      (B,) float64   share of the run that lies before each row; None where there is no run
    """

    input_ids: IntArray
    position_ids: IntArray
    document_ids: npt.NDArray[np.int32]
    next_ids: IntArray
    word_starts: Bools | None = None
    progress: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Texts:
    """Texts one after another: ids (N,), lengths (P,), marks (N,) uint8 where the shards have them."""

    ids: IntArray
    lengths: IntArray
    marks: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Pieces:
    """The pieces of a batch, without special tokens: N tokens of P pieces, one piece after another.

    ids      (N,) int64   those of a pair: source, separator, target
    lengths  (P,)         tokens of each piece
    rows     (P,)         the row of the batch that it goes to; pieces of a row stand together
    slots    (P,)         its number in that row, from 1
    sources  (P,)         tokens before the separator of a pair; else 0
    marks    (N,) uint8   WORD and SENTENCE, where the shards say it
    others   text of another document for each piece, as many tokens as the piece at most; none of them where there is
             no other document; None where the objective wants no such text
    shape    rows of the batch, positions of a row, positions of the decoder (0 without one), most pieces of a row
    """

    ids: IntArray
    lengths: IntArray
    rows: IntArray
    slots: IntArray
    sources: IntArray
    shape: tuple[int, int, int, int]
    marks: npt.NDArray[np.uint8] | None = None
    others: Texts | None = None
    progress: npt.NDArray[np.float64] | None = None

    @property
    def starts(self) -> IntArray:
        """Where each piece starts in `ids`: (P,)."""
        starts: IntArray = np.cumsum(self.lengths) - self.lengths
        return starts

    def places(self, draws: Draws) -> tuple[Draws, IntArray]:
        """Where the tokens lie for draws of their own: draws over rows of payload, and the place of each token (N,)."""
        starts = self.starts
        first = np.flatnonzero(self.slots == 1)
        before = starts - np.repeat(starts[first], np.diff(first, append=len(starts)))  # (P,) payload of the row before
        width = int((before + self.lengths).max())
        return draws.over(width), run_indices(self.rows * width + before, self.lengths)


Objective = Callable[[Rows, Draws, SpecialIds], Arrays]


class PieceObjective(Protocol):
    """An objective that makes the rows itself: it gives every array of the batch."""

    takes_pieces: ClassVar[bool]

    def __call__(self, pieces: Pieces, draws: Draws, tokens: SpecialIds) -> Arrays:
        """The arrays of a batch."""


@dataclass(frozen=True)
class Layout:
    """Where pieces of given lengths (P,) lie in rows (B, L), each behind the one before: the same for any values."""

    places: IntArray
    position_ids: IntArray
    document_ids: npt.NDArray[np.int32]

    @classmethod
    def of(cls, lengths: IntArray, pieces: Pieces, length: int) -> Layout:
        """Rows of `length` positions for the pieces of a batch, which have these lengths there."""
        shape = (pieces.shape[0], length)
        before = np.cumsum(lengths) - lengths
        first = np.flatnonzero(pieces.slots == 1)
        base = np.repeat(before[first], np.diff(first, append=len(lengths)))
        start = before - base
        assert len(lengths) == 0 or int((start + lengths).max()) <= length, "pieces are planned to fit their row"
        places = run_indices(pieces.rows * length + start, lengths)
        position_ids = np.zeros(shape, dtype=np.int64)
        position_ids.reshape(-1)[places] = run_indices(np.zeros_like(lengths), lengths)
        document_ids = np.zeros(shape, dtype=np.int32)
        document_ids.reshape(-1)[places] = np.repeat(pieces.slots, lengths)
        return cls(places, position_ids, document_ids)

    def put(self, values: npt.NDArray[Any], empty: int, dtype: Any = np.int64) -> npt.NDArray[Any]:
        """Values (N,), one for each position of all pieces in order, in rows (B, L), `empty` where none lies."""
        made = np.full(self.position_ids.shape, empty, dtype=dtype)
        made.reshape(-1)[self.places] = values
        return made
