"""Span corruption: spans of the text are cut out, and the decoder writes them (T5, Raffel et al. 2019).

What lives here: where the spans lie, what encoder and decoder are given. What must not: how many there are (`noise`).

     text     Thank you for inviting me to your party last week
     input    Thank you <extra_id_0> me to your party <extra_id_1> week EOS
     target   <extra_id_0> for inviting <extra_id_1> last EOS

As in T5's code (arXiv 1910.10683, section 3.1.4): hidden and other tokens are both cut into as many random parts, which
take turns, the others first; so a piece ends with a hidden span, and no sentinel stands behind the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pretrain.data.noise import noise_counts
from pretrain.data.objectives.inputs import IGNORE, Arrays, Bools, Layout, Pieces
from pretrain.data.order import Draws, IntArray
from pretrain.data.shards import run_indices
from pretrain.data.vocabulary import SpecialIds


@dataclass(frozen=True)
class SpanCorruption:
    """Hide `rate` of each piece in spans of `span` tokens on average.

    How many tokens and spans depends on the piece's length alone, so that rows can be packed before anything is drawn.
    Unknown tokens may be hidden, as the text that they stand for may be.
    """

    takes_pieces: ClassVar[bool] = True
    rate: float
    span: float

    def __call__(self, pieces: Pieces, draws: Draws, tokens: SpecialIds) -> Arrays:
        """Cut spans out of the pieces."""
        start, end = decoder_start(tokens, "span-corruption"), tokens.need("eos", "objective.kind: span-corruption")
        hidden, opens, numbers = self._hide(pieces, draws)
        sentinels = sentinels_for(tokens, int(numbers.max()) + 1)[numbers]  # (K,) of each span
        kept = pieces.ids.copy()
        kept[opens] = sentinels
        owner = np.repeat(np.arange(len(pieces.lengths)), pieces.lengths)  # (N,)
        stays = ~hidden
        stays[opens] = True
        inputs, input_lengths = _closed(kept[stays], owner[stays], len(pieces.lengths), end)
        before = np.cumsum(hidden) - 1  # number of each hidden token among the hidden
        at = before[opens]
        written = np.insert(pieces.ids[hidden], at, sentinels)
        targets, target_lengths = _closed(written, np.insert(owner[hidden], at, owner[opens]), len(pieces.lengths), end)
        return paired_arrays(pieces, (inputs, input_lengths), (targets, target_lengths), start, tokens)

    def _hide(self, pieces: Pieces, draws: Draws) -> tuple[Bools, IntArray, IntArray]:
        """Which tokens are hidden (N,), where the spans start (K,), and each span's number in its piece (K,)."""
        wide, places = pieces.places(draws)
        hidden, spans = noise_counts(pieces.lengths, self.rate, self.span)
        others = pieces.lengths - hidden
        firsts = places[pieces.starts]
        dark = _parts(hidden, spans, firsts, wide, "span corruption: hidden")
        light = np.zeros_like(dark)
        two = others > 0  # a piece of one token has nothing else
        light[np.repeat(two, spans)] = _parts(others[two], spans[two], firsts[two], wide, "span corruption: others")
        turns = np.stack([light, dark], axis=1).reshape(-1)  # (2 K,)
        is_hidden = np.repeat(np.tile([False, True], len(dark)), turns)
        opens = (np.cumsum(turns) - turns)[1::2]
        return is_hidden, opens, run_indices(np.zeros_like(spans), spans)


def _parts(items: IntArray, counts: IntArray, firsts: IntArray, draws: Draws, purpose: str) -> IntArray:
    """Cut runs of `items` (P,) things into `counts` (P,) parts of at least one, all ways alike: lengths (sum counts,).

    A run's draws lie at the places from `firsts` on. Of the borders within a run, those with the lowest draws are cut.
    """
    starts = np.cumsum(items) - items
    owner = np.repeat(np.arange(len(items)), items)
    bits = draws.bits_at(purpose, run_indices(firsts, items)) >> np.uint64(1)
    bits[starts] = 0  # the first part starts here, whatever is drawn
    rank = np.empty(len(owner), dtype=np.int64)  # of each border in its run
    rank[np.lexsort((bits, owner))] = run_indices(np.zeros_like(items), items)
    rank[starts] = 0
    cut = rank < np.repeat(counts, items)
    parts: IntArray = np.diff(np.flatnonzero(cut), append=len(owner))
    return parts


def _closed(ids: IntArray, owner: IntArray, pieces: int, end: int) -> tuple[IntArray, IntArray]:
    """Ids of pieces, `owner` saying whose each is, with `end` behind each piece, and the lengths so (P,)."""
    lengths = np.bincount(owner, minlength=pieces)
    return np.insert(ids, np.cumsum(lengths), end), lengths + 1


def decoder_start(tokens: SpecialIds, kind: str) -> int:
    """What the decoder begins with: padding, as in T5 and Marian."""
    return tokens.need("pad", f"objective.kind: {kind}")


def sentinels_for(tokens: SpecialIds, number: int) -> IntArray:
    """The first `number` sentinels.

    Raises:
        ValueError: when the tokenizer has fewer.
    """
    if len(tokens.sentinels) < number:
        raise ValueError(
            f"objective.kind: span-corruption needs {number} sentinels, <extra_id_0> to <extra_id_{number - 1}>, and "
            f"the tokenizer has {len(tokens.sentinels)}; train it for this objective, or shorten data.sequence_length"
        )
    return np.array(tokens.sentinels[:number], dtype=np.int64)


def paired_arrays(
    pieces: Pieces,
    inputs: tuple[IntArray, IntArray],
    targets: tuple[IntArray, IntArray],
    start: int,
    tokens: SpecialIds,
) -> Arrays:
    """The arrays of an encoder-decoder: piece n of the output belongs to piece n of the input.

    Args:
        pieces: of the batch.
        inputs: ids of all pieces one after another, and how many each has (P,).
        targets: the same, of what the decoder is to write.
        start: what the decoder begins each piece with.
        tokens: of the tokenizer.
    """
    _, length, target_length, _ = pieces.shape
    pad = tokens.need("pad", "an encoder-decoder")
    reads, writes = Layout.of(inputs[1], pieces, length), Layout.of(targets[1], pieces, target_length)
    given = np.roll(targets[0], 1)
    given[np.cumsum(targets[1]) - targets[1]] = start
    return {
        "input_ids": reads.put(inputs[0], pad),
        "position_ids": reads.position_ids,
        "document_ids": reads.document_ids,
        "decoder_input_ids": writes.put(given, pad),
        "decoder_position_ids": writes.position_ids,
        "decoder_document_ids": writes.document_ids,
        "labels": writes.put(targets[0], IGNORE),
    }
