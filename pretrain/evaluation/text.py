"""From documents to rows that a model can score: windows, masked pieces, sentences with one token hidden.

What lives here: numpy and the tokenizer; which token is scored in which row, and which positions are masked. What must
not: torch, or the model. Nothing here depends on the batch size or on the order of the documents.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pretrain.data.objectives import IGNORE
from pretrain.data.order import below, hash_counters, integers

MASK_RATE, RANDOM_SHARE, KEEP_SHARE = 0.15, 0.10, 0.10
"""Devlin et al. 2018 (arXiv 1810.04805), section 3.1: 15% of tokens; of those 80% [MASK], 10% random, 10% kept."""

UNSPACED = re.compile(
    r"[\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""A letter of a script without spaces: Thai to Khmer, kana, Han."""

_TOKENIZE_AT_ONCE = 1_000  # documents
_SELECT, _REPLACE, _DRAW, _SAMPLE = range(4)  # purposes of a hash


@dataclass(frozen=True)
class Row:
    """One forward pass's worth: the input and, for each position, the id to predict there or `IGNORE`."""

    input_ids: np.ndarray  # (n,) int32
    targets: np.ndarray  # (n,) int32


@dataclass
class TextTally:
    """Which text was scored: counts, and a SHA-256 over the documents in order (each led by its length in bytes)."""

    documents: int = 0
    bytes: int = 0
    _hash: Any = field(default_factory=hashlib.sha256, repr=False)

    def add(self, text: str) -> None:
        """Count one document."""
        encoded = text.encode()
        self.documents += 1
        self.bytes += len(encoded)
        self._hash.update(len(encoded).to_bytes(8, "little"))
        self._hash.update(encoded)

    @property
    def sha256(self) -> str:
        """The hash so far, in hexadecimal."""
        return str(self._hash.hexdigest())


def take_texts(texts: Iterable[str], tally: TextTally, max_bytes: int | None = None) -> Iterator[str]:
    """Pass whole documents on, tallied, until `max_bytes` of UTF-8 are reached; empty documents are left out."""
    for text in texts:
        if max_bytes is not None and tally.bytes >= max_bytes:
            return
        if text:
            tally.add(text)
            yield text


def encode(tokenizer: Any, texts: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Each text with its ids, (n,) int32, without special tokens; their names in the text are text."""
    texts = iter(texts)
    while chunk := [text for text, _ in zip(texts, range(_TOKENIZE_AT_ONCE), strict=False)]:
        encoded = tokenizer(
            chunk, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True, verbose=False
        )
        for text, ids in zip(chunk, encoded["input_ids"], strict=True):
            yield text, np.asarray(ids, dtype=np.int32)


def prefix_id(tokenizer: Any) -> int:
    """The token that stands before a document's first: BOS, or EOS where there is no BOS.

    Raises:
        ValueError: when the tokenizer has neither, so that nothing could predict the first token.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has no bos_token and no eos_token; set bos_token in tokenizer_config.json")


def causal_rows(ids: np.ndarray, prefix: int, window: int, stride: int) -> Iterator[Row]:
    """Windows over one document in which every token is a target exactly once.

    The first window scores its `window` tokens, each later one the `stride` tokens that follow; its input reaches
    `window` tokens back from the last of them. With `stride == window` the inputs share one token with the window
    before: the one that predicts their first target.

    Args:
        ids: (n,) tokens of the document.
        prefix: the id that predicts the first token.
        window: positions of input, at most.
        stride: new tokens scored by each window, 1 to `window`.
    """
    full = np.concatenate([np.asarray([prefix], dtype=np.int32), ids])
    scored = 0
    while scored < len(ids):
        reach = window if scored == 0 else scored + stride
        begin, end = max(0, reach - window), min(reach, len(ids))
        targets = full[begin + 1 : end + 1].copy()
        targets[: scored - begin] = IGNORE
        yield Row(full[begin:end], targets)
        scored = end


# --- masked language models ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """What a masked language model sees around a piece of text, the mask, and the ids a random token is drawn from."""

    before: np.ndarray
    after: np.ndarray
    mask: int
    ordinary: np.ndarray  # every id that is no special token

    @property
    def length(self) -> int:
        """Special tokens around a piece."""
        return len(self.before) + len(self.after)

    def wrap(self, ids: np.ndarray, fill: int | None = None) -> np.ndarray:
        """A piece between its special tokens (or between `fill`, for targets)."""
        before, after = self.before, self.after
        if fill is not None:
            before, after = np.full_like(before, fill), np.full_like(after, fill)
        return np.concatenate([before, ids, after]).astype(np.int32)


def make_template(tokenizer: Any) -> Template:
    """Read off the tokenizer what it puts around a text.

    Raises:
        ValueError: when it has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask_token, so its model fills no masks; give a masked language model")
    probe = tokenizer("a", return_special_tokens_mask=True)
    special = np.asarray(probe["special_tokens_mask"], dtype=bool)
    ids = np.asarray(probe["input_ids"], dtype=np.int32)
    payload = np.flatnonzero(~special)
    first, last = (int(payload[0]), int(payload[-1]) + 1) if len(payload) else (0, 0)
    ordinary = np.setdiff1d(np.arange(len(tokenizer), dtype=np.int32), np.asarray(tokenizer.all_special_ids))
    return Template(ids[:first], ids[last:], int(tokenizer.mask_token_id), ordinary.astype(np.int32))


def masked_rows(text: str, ids: np.ndarray, template: Template, window: int) -> Iterator[Row]:
    """Pieces of at most `window` positions, special tokens included, masked at 15% (80/10/10).

    The masks are a function of the text alone: a keyed hash of its bytes and of each token's place in it.
    """
    selected, replaced = mask_tokens(ids, _text_key(text), template)
    payload = window - template.length
    for begin in range(0, len(ids), payload):
        piece = slice(begin, begin + payload)
        targets = np.where(selected[piece], ids[piece], IGNORE)
        if selected[piece].any():
            yield Row(template.wrap(replaced[piece]), template.wrap(targets, IGNORE))


def mask_tokens(ids: np.ndarray, key: int, template: Template) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens are to be predicted, (n,) bool, and what stands in the input, (n,) int32.

    As in training, an id that stands for no text ([UNK], say) is never masked and never drawn.
    """
    places = np.arange(len(ids))
    selected = below(_bits(key, places, _SELECT), MASK_RATE) & np.isin(ids, template.ordinary)
    how = _bits(key, places, _REPLACE)
    is_random = below(how, RANDOM_SHARE)
    is_kept = below(how, RANDOM_SHARE + KEEP_SHARE) & ~is_random
    drawn = template.ordinary[integers(_bits(key, places, _DRAW), len(template.ordinary))]
    shown = np.where(is_random, drawn, np.where(is_kept, ids, template.mask))
    return selected, np.where(selected, shown, ids).astype(np.int32)


def hidden_token_rows(ids: np.ndarray, template: Template) -> Iterator[Row]:
    """One row a token, in which that token is masked and is the only target (Salazar et al. 2020, arXiv 1910.14659)."""
    for place in range(len(ids)):
        hidden = ids.copy()
        hidden[place] = template.mask
        targets = np.full_like(ids, IGNORE)
        targets[place] = ids[place]
        yield Row(template.wrap(hidden), template.wrap(targets, IGNORE))


def hidden_word_rows(ids: np.ndarray, words: Sequence[int], template: Template) -> Iterator[Row]:
    """One row a token, which is masked together with the rest of its word; it is the only target.

    Tokens that follow in a word give away what it begins with, so that plain masking finds long rare words likely.
    Source: Kauf and Ivanova 2023 (arXiv 2305.10588), PLL-word-l2r.

    Args:
        ids: (n,) tokens.
        words: (n,) the number of the word that each token belongs to.
        template: what stands around them, and the mask.
    """
    numbers = np.asarray(words)
    for place in range(len(ids)):
        later = (numbers == numbers[place]) & (np.arange(len(ids)) >= place)
        targets = np.full_like(ids, IGNORE)
        targets[place] = ids[place]
        yield Row(template.wrap(np.where(later, template.mask, ids)), template.wrap(targets, IGNORE))


def encode_words(tokenizer: Any, text: str) -> tuple[np.ndarray, list[int]]:
    """Ids of a text, (n,) int32, and the number of the word that each belongs to.

    Words are what the tokenizer splits a text into before it looks for pieces; in scripts without spaces each
    character is one.

    Raises:
        ValueError: when the tokenizer knows no words (a slow one).
    """
    if not tokenizer.is_fast:
        raise ValueError(
            "this tokenizer does not say which tokens make up a word; save it with a tokenizer.json, or mask one "
            "token at a time (--pseudo-likelihood original)"
        )
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        split_special_tokens=True,
        verbose=False,
    )
    words: list[int] = []
    before: tuple[int | None, int] | None = None
    for word, (begin, end) in zip(encoded.word_ids(), encoded["offset_mapping"], strict=True):
        # Bytes of one character share its place; a piece may begin with the space before its word.
        letter = text[begin:end].lstrip()[:1] or text[begin : begin + 1]
        here = (word, begin if UNSPACED.match(letter) else -1)
        words.append((words[-1] if words else 0) + int(before is not None and here != before))
        before = here
    return np.asarray(encoded["input_ids"], dtype=np.int32), words


class SentenceSample:
    """A sample of `size` distinct lines: those with the smallest keyed hash, whatever order the text comes in."""

    def __init__(self, size: int, min_characters: int) -> None:
        self.seen = 0
        self._size = size
        self._min_characters = min_characters
        self._heap: list[tuple[int, str]] = []
        self._held: set[str] = set()

    def add(self, text: str) -> None:
        """Offer every line of `text` that is long enough."""
        for line in text.splitlines():
            sentence = line.strip()
            if len(sentence) < self._min_characters:
                continue
            self.seen += 1
            if sentence in self._held or self._size < 1:
                continue
            entry = (-_text_key(sentence, _SAMPLE), sentence)
            self._held.add(sentence)
            if len(self._heap) < self._size:
                heapq.heappush(self._heap, entry)
            else:
                self._held.discard(heapq.heappushpop(self._heap, entry)[1])

    def sentences(self) -> Sequence[str]:
        """The sample, in the order of its hashes."""
        return [sentence for _, sentence in sorted(self._heap, reverse=True)]


def _text_key(text: str, purpose: int = _SELECT) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, salt=bytes([purpose])).digest(), "little")


def _bits(key: int, places: np.ndarray, purpose: int) -> np.ndarray:
    """64 random bits for each place in the text."""
    return hash_counters(np.uint64(key), places, purpose)  # type: ignore[arg-type]
