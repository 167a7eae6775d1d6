"""A model whose vocabulary was extended since, scored in the pieces that it knew: what it was before it went on.

What lives here: held-out documents in old pieces, and their bits per byte. What must not: reading models, or how a
vocabulary is extended.

Bits per byte compare over tokenizers, but the first score of a run with more pieces is not that of the model it goes on
from: new rows of the head take their share of each probability before anything is learnt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import nn

from pretrain.data.batches import LoadedSplit
from pretrain.evaluation.passes import Passes, score_rows
from pretrain.evaluation.text import Row, causal_rows


def bits_per_byte_in_old_pieces(
    model: nn.Module, split: LoadedSplit, made_of: Mapping[int, Sequence[int]], passes: Passes, *, window: int
) -> float | None:
    """Bits per byte of a causal model on every document of a split and its end; None where bytes are not known.

    A document longer than `window` is cut into windows that share one token, from its start on.

    Args:
        model: from before the vocabulary was extended.
        split: encoded with the extended tokenizer.
        made_of: new id -> the old ids that its piece is made of.
        passes: how forward passes are run.
        window: positions of input a forward pass.
    """
    if not split.num_bytes:
        return None
    ends, starts = split.tokens.eos, split.tokens.bos
    assert ends is not None
    rows: list[Row] = []
    for document in _documents(split):
        ids = np.append(_old(document, made_of), np.int32(ends))
        if starts is None:  # nothing predicts the first token then, as in the rows of a run
            rows += causal_rows(ids[1:], int(ids[0]), window, window)
        else:
            rows += causal_rows(ids, starts, window, window)
    losses, _ = score_rows(model, rows, passes, pad_id=split.tokens.pad or 0, needs_mask=True, stage="before")
    return float(losses.sum()) / math.log(2) / split.num_bytes


def _documents(split: LoadedSplit) -> Iterator[npt.NDArray[np.int32]]:
    """The ids of each document, without special tokens."""
    for number in range(len(split.shards)):
        ids, ends = split.store.shard(number)
        begin = 0
        for end in map(int, ends):
            yield ids[begin:end].astype(np.int32)
            begin = end


def _old(ids: npt.NDArray[np.int32], made_of: Mapping[int, Sequence[int]]) -> npt.NDArray[np.int32]:
    """The same text in old pieces."""
    return np.asarray([old for token in ids.tolist() for old in made_of.get(token, (token,))], dtype=np.int32)
