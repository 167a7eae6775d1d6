"""The words of a text, and 64-bit hashes of runs of them: what is compared to find texts that share some.

What lives here: how a text is cut into words, and the hashes. What must not: which documents are compared.

A word is a run of letters, digits and the marks that go with them, in lower case and Unicode's form NFKC: letter case,
punctuation, white space and full-width forms do not count. In scripts without spaces between words (Chinese, Japanese,
Thai, Lao, Tibetan, Burmese, Khmer) each character is a word.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from functools import lru_cache

import numpy as np

from pretrain.data.order import U64, mix

_SINGLE = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Tibetan, Burmese, Khmer
    "\u3041-\u30ff\u31f0-\u31ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Han
)
_MARKS = "\u0300-\u036f\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0dff"  # no letters to `re`
_WORD = re.compile(rf"[{_SINGLE}]|(?:[^\W_{_SINGLE}]|[{_MARKS}])+")
_ASCII_WORD = re.compile(r"[a-z0-9]+")
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)  # odd, so that no word's hash is lost in a run
_KNOWN_WORDS = 1 << 17


def words_of(text: str) -> list[str]:
    """The words of a text, in order."""
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


@lru_cache(maxsize=_KNOWN_WORDS)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def word_hashes(words: list[str]) -> U64:
    """A hash of each word: (W,). The same on every machine and in every process."""
    return np.fromiter(map(_word_hash, words), dtype=np.uint64, count=len(words))


def run_hashes(hashes: U64, length: int) -> U64:
    """A hash of each run of `length` words, given the words' hashes (W,): (W - length + 1,), or none."""
    count = len(hashes) - length + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    total = hashes[:count].copy()
    for step in range(1, length):
        total *= _MULTIPLIER
        total += hashes[step : step + count]
    return mix(total)
