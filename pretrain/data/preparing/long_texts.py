"""Ids of documents of any length: a long one is cut where the tokenizer's own words end, encoded piece by piece.

What lives here: where a text can be cut so that the pieces' ids are the whole text's. What must not: reading, writing.

The library needs some 150 bytes a character while it encodes; a document of 200 MB would need 30 GB. Normalizers and
pre-tokenizers look at the text around a place and no further, and models encode each word by itself. So a place is
taken when, in the text around it, a word ends there by the tokenizer's own account, that word and the next lie within
that text, and both halves together have the ids of the whole.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice

from tokenizers import Tokenizer

from pretrain.data.preparing.marks import Marker

PIECE = 1 << 18
"""Characters of a piece, about; up to four times as many are encoded as they are."""
LARGEST_PIECE = 1 << 24
"""Characters that are encoded at once at most; a document that cannot be cut into such pieces is bad."""
_GROUP = 4
_AROUND = 1024
_STRIDE = 1 << 14
_SPACE = re.compile(r"(?<=\S)(?=\s\S)")
_SPACES_TRIED, _OTHERS_TRIED = 16, 8


class UncutTextError(ValueError):
    """A document that is too long to be encoded at once, and has no place to be cut at."""


def encode_texts(
    tokenizer: Tokenizer, texts: Iterable[str], marker: Marker | None = None
) -> Iterator[array[int] | UncutTextError]:
    """Ids of each text, without special tokens, or why it has none; with `marker` they are marked.

    Short ones that follow each other are encoded together, so that all of the library's threads work.
    """
    short: list[str] = []
    for text in texts:
        if len(text) <= 4 * PIECE:
            short.append(text)
            continue
        yield from _encode_all(tokenizer, short, marker)
        short = []
        try:
            yield _encode_long(tokenizer, text, marker)
        except UncutTextError as error:
            yield error
    yield from _encode_all(tokenizer, short, marker)


def _encode_all(
    tokenizer: Tokenizer, texts: list[str], marker: Marker | None, *, are_starts: bool = True
) -> Iterator[array[int]]:
    if marker is not None:
        yield from marker.encode(tokenizer, texts, are_starts=are_starts) if texts else ()
        return
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False) if texts else ():
        yield array("I", encoding.ids)


def _encode_long(tokenizer: Tokenizer, text: str, marker: Marker | None) -> array[int]:
    ids = array("I")
    pieces = cut_text(tokenizer, text)
    ids.extend(next(_encode_all(tokenizer, [next(pieces)], marker)))
    while group := list(islice(pieces, _GROUP)):
        for more in _encode_all(tokenizer, group, marker, are_starts=False):
            ids.extend(more)
    return ids


def cut_text(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """Pieces of a text, in order, whose ids one after another are the text's.

    Raises:
        UncutTextError: when a stretch of more than `LARGEST_PIECE` characters has no place to be cut at.
    """
    start = 0
    while len(text) - start > 2 * PIECE:
        end = next((at for at in _places(text, start + PIECE) if _is_border(tokenizer, text, at)), len(text))
        if end - start > LARGEST_PIECE:
            break
        yield text[start:end]
        start = end
    if len(text) - start > LARGEST_PIECE:
        raise UncutTextError(
            f"a document of {len(text):,} characters has a stretch of more than {LARGEST_PIECE:,} in which no word of "
            "the tokenizer ends; cut it into shorter ones with data.document"
        )
    if start < len(text):
        yield text[start:]


def _places(text: str, start: int) -> Iterator[int]:
    """Where a word may end, from `start` on, not much further than a piece may reach."""
    for begin in range(start, min(start + LARGEST_PIECE, len(text) - 2 * _AROUND), _STRIDE):
        spaces = _SPACE.finditer(text, begin, begin + _STRIDE)
        yield from (match.start() for match in islice(spaces, _SPACES_TRIED))
        yield from range(begin, begin + _OTHERS_TRIED)


def _is_border(tokenizer: Tokenizer, text: str, at: int) -> bool:
    left, right = text[at - _AROUND : at], text[at : at + _AROUND]
    whole = tokenizer.encode(left + right, add_special_tokens=False)
    first = tokenizer.encode(left, add_special_tokens=False).ids
    if not 0 < len(first) < len(whole.ids):
        return False
    words = whole.word_ids
    before, after = words[len(first) - 1], words[len(first)]
    if before == after or before == words[0] or after == words[-1]:
        return False
    return bool(whole.ids == first + tokenizer.encode(right, add_special_tokens=False).ids)
