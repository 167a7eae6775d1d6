"""Texts that are longer than an input: cut into windows that overlap, each framed as the whole would be.

What lives here: where windows begin and end, and the special tokens around them. What must not: tags, answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_NO_OFFSETS = "its tokenizer cannot say which token stands for which part of a text; give a model with a tokenizer.json"


@dataclass(frozen=True)
class Framed:
    """Inputs of a model by name, cut in three: what stands before a text, the text, and what stands after it.

    Attributes:
        before: (n,) each: special tokens, and the first text of a pair.
        body: (n,) each: the text.
        after: (n,) each: special tokens.
    """

    before: Mapping[str, np.ndarray]
    body: Mapping[str, np.ndarray]
    after: Mapping[str, np.ndarray]

    @property
    def around(self) -> int:
        """Tokens that every window has beside those of the text."""
        return len(self.before["input_ids"]) + len(self.after["input_ids"])

    def window(self, chosen: np.ndarray | slice) -> dict[str, np.ndarray]:
        """The inputs of a window with the chosen tokens of the text."""
        return {
            name: np.concatenate([self.before[name], self.body[name][chosen], self.after[name]]) for name in self.body
        }


def framed(made: Any, number: int, body: np.ndarray, *, without: np.ndarray | None = None) -> Framed:
    """One text, or pair, out of what a tokenizer made of several.

    Args:
        made: the tokenizer's answer.
        number: of the text.
        body: (tokens,) booleans: which are the text's that windows are cut of; they stand side by side.
        without: (tokens,) booleans: those before it that are left out.
    """
    places = np.flatnonzero(body)
    before = np.arange(len(body)) < places[0]
    after = np.arange(len(body)) > places[-1]
    if without is not None:
        before &= ~without
    names = [name for name in made if name not in ("offset_mapping", "special_tokens_mask")]
    inputs = {name: np.array(made[name][number], dtype=np.int64) for name in names}
    parts = [{name: array[mask] for name, array in inputs.items()} for mask in (before, body, after)]
    return Framed(*parts)


def check_offsets(made: Any) -> None:
    """Refuse a tokenizer that does not say where its tokens stand.

    Raises:
        ValueError: names the remedy.
    """
    if not made.is_fast:
        raise ValueError(f"this task needs to know where tokens stand, and {_NO_OFFSETS}")


def windows(sizes: Sequence[int], room: int, shared: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of the pieces of each window. Every piece is in one at least, and none is parted.

    Args:
        sizes: tokens of each piece; one that is larger than the room counts as the room.
        room: tokens of a window.
        shared: tokens that neighbouring windows have in common, at most.
    """
    sizes = [min(size, room) for size in sizes]
    first = last = 0
    while last < len(sizes):
        used = sum(sizes[first:last])
        while last < len(sizes) and used + sizes[last] <= room:
            used += sizes[last]
            last += 1
        yield first, last
        if last < len(sizes):
            free = min(shared, room - sizes[last])  # the next piece must fit beside what is repeated
            first = last
            while first > 0 and sizes[first - 1] <= free:
                first -= 1
                free -= sizes[first]


def best_windows(sizes: Sequence[int], cut: Sequence[tuple[int, int]], *, causal: bool) -> list[int]:
    """Of each piece the number of the window that shows most around it: of a decoder, before it.

    Args:
        sizes: tokens of each piece.
        cut: (first, last + 1) of the pieces of each window.
        causal: whether what stands after a piece is not seen.
    """
    ends = np.concatenate([[0], np.cumsum(sizes)])
    best, most = [0] * len(sizes), [-1] * len(sizes)
    for number, (first, last) in enumerate(cut):
        for piece in range(first, last):
            left, right = int(ends[piece] - ends[first]), int(ends[last] - ends[piece + 1])
            seen = left if causal else min(left, right)
            if seen > most[piece]:
                best[piece], most[piece] = number, seen
    return best
