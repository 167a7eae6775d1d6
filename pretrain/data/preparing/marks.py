"""Where words and sentences start among a text's tokens.

What lives here: the marks of each token, by the tokenizer's own account of its words. What must not: reading, writing.

A word is what the tokenizer's pre-tokenizer makes one, so this holds for any fast tokenizer: which id starts a word is
no function of the id alone (a byte-level "s" starts one behind a digit and none behind a letter). Where a tokenizer
cuts texts into no words at all, one starts with each token that begins with the mark of a space (▁ or Ġ).

A sentence starts where a word does, behind a token that ends with a full stop, a question or exclamation mark (with
quotes and brackets that close behind it) or holds a newline. It is a guess (abbreviations end sentences too), and
nothing but where a piece is cut in two depends on it.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from pretrain.data.shards import SENTENCE, WORD

_SHIFT = 30
_IDS = (1 << _SHIFT) - 1
_ENDS = re.compile("[.!?。！？…][\"'”’»)\\]」』）]*$")
_CLOSING = re.compile("[\"'”’»)\\]」』）.!?。！？…,;:，；：、]+$")
_PROBE = "one two three"
_SPACES = ("▁", "Ġ")
_CONTINUATION = "##"


class Marker:
    """Marks the tokens of encodings. A mark stands in the two highest bits of its id, until `split` parts them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        size = tokenizer.get_vocab_size()
        names = [tokenizer.id_to_token(token) or "" for token in range(size)]
        surfaces = [
            name.removeprefix(_CONTINUATION) if name.startswith(_CONTINUATION) else tokenizer.decode([token])
            for token, name in enumerate(names)
        ]
        self._ends = np.array([bool(_ENDS.search(text.rstrip())) or "\n" in text for text in surfaces])
        self._closes = np.array([bool(_CLOSING.match(text.strip())) for text in surfaces])
        self._opens = np.zeros(size, dtype=np.bool_)
        if len(set(tokenizer.encode(_PROBE, add_special_tokens=False).word_ids)) < 2:
            self._opens = np.array([name.startswith(_SPACES) for name in names])

    def encode(self, tokenizer: Tokenizer, texts: list[str], *, are_starts: bool = True) -> Iterator[array[int]]:
        """Marked ids of each text, without special tokens."""
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):  # the fast way tells no words
            yield self.mark(encoding, is_start=are_starts)

    def mark(self, encoding: Encoding, *, is_start: bool = True) -> array[int]:
        """The ids of a text with their marks; `is_start`: it is the beginning of its document."""
        ids = np.array(encoding.ids, dtype=np.uint32)
        made = array("I")
        if len(ids):
            words = np.array(encoding.word_ids)
            starts = np.ones(len(ids), dtype=np.bool_)
            starts[1:] = (words[1:] != words[:-1]) | self._opens[ids[1:]]
            sentences = np.zeros(len(ids), dtype=np.bool_)
            sentences[0] = is_start
            sentences[1:] = starts[1:] & self._ends[ids[:-1]] & ~self._closes[ids[1:]]
            marks = WORD * starts.astype(np.uint32) | SENTENCE * sentences.astype(np.uint32)
            made.frombytes((ids | marks << np.uint32(_SHIFT)).tobytes())
        return made


def split(marked: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """Ids and marks (N,) of marked ids (N,)."""
    return marked & np.uint32(_IDS), (marked >> np.uint32(_SHIFT)).astype(np.uint8)


@lru_cache(maxsize=1)
def marker_of(directory: str, digest: str) -> Marker:
    """The marker of the tokenizer in a directory; made once a process."""
    return Marker(Tokenizer.from_file(f"{directory}/tokenizer.json"))
