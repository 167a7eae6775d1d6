"""Translation: the encoder reads the source, the decoder writes the target (Vaswani et al. 2017, arXiv 1706.03762).

What lives here: where a stored pair is cut, and its special tokens. What must not: reading pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pretrain.data.objectives.corruption import decoder_start, paired_arrays
from pretrain.data.objectives.inputs import Arrays, Pieces
from pretrain.data.order import Draws
from pretrain.data.vocabulary import SpecialIds


@dataclass(frozen=True)
class Translation:
    """Source and EOS for the encoder; for the decoder padding and target, to write target and EOS.

    The EOS of a source is the separator that the pair is stored with.
    """

    takes_pieces: ClassVar[bool] = True

    def __call__(self, pieces: Pieces, draws: Draws, tokens: SpecialIds) -> Arrays:
        """Give both sides of the pairs. Nothing is drawn."""
        start, end = decoder_start(tokens, "translation"), tokens.need("eos", "objective.kind: translation")
        reads = pieces.sources + 1
        number = np.arange(len(pieces.ids)) - np.repeat(pieces.starts, pieces.lengths)
        is_source = number < np.repeat(reads, pieces.lengths)
        written = pieces.lengths - reads
        targets = np.insert(pieces.ids[~is_source], np.cumsum(written), end)
        return paired_arrays(pieces, (pieces.ids[is_source], reads), (targets, written + 1), start, tokens)
