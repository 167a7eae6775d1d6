"""Teaching an existing tokenizer new pieces: pairs of its pieces that are frequent in new text become pieces.

What lives here: the search for pairs, and how each kind of model takes a new piece. What must not: reading text, or
what becomes of a model's embeddings.

Every word of the new text is split as the tokenizer splits it; then the most frequent pair of neighbours is joined,
over and over, as byte-pair encoding does (Sennrich et al. 2016, algorithm 1). The result is the same training going on
for BPE. A WordPiece model finds a joined piece because it takes the longest that fits. For a Unigram model a joined
piece gets the sum of its parts' scores and a little more, so that it wins over them and nothing else changes.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from pretrain.tokenization.train import word_counts

EXTENDED = "extended.json"
"""Beside an extended tokenizer: new id -> the old ids that its piece is made of."""

_LITTLE_MORE = 1e-3  # nats
_NEVER = -1e4  # the score of what only fills a place


@dataclass(frozen=True)
class Extension:
    """A tokenizer with more pieces; `made_of` gives each new id the old ids that it stands for, in the order of ids."""

    tokenizer: Tokenizer
    made_of: dict[int, list[int]]


def extend_tokenizer(tokenizer: Tokenizer, texts: Iterable[str], pieces: int, min_frequency: int = 2) -> Extension:
    """A copy with up to `pieces` more pieces, learnt from `texts`; ids that exist keep their meaning.

    Raises:
        ValueError: when the tokenizer's model is none of BPE, WordPiece and Unigram, or the text has no pair of pieces
            that stands `min_frequency` times.
    """
    plain: dict[str, Any] = json.loads(tokenizer.to_str())
    kind = plain["model"]["type"]
    if kind not in ("BPE", "WordPiece", "Unigram"):
        raise ValueError(f"tokenizer.extend: a {kind} tokenizer cannot be taught pieces; BPE, WordPiece, Unigram can")
    first = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    spelling = {token_id: piece for piece, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
    specials = {token["id"] for token in plain["added_tokens"]}
    words = {
        tuple(token.id for token in tokenizer.model.tokenize(word)): count
        for word, count in sorted(word_counts(tokenizer, texts).items())
    }
    prefix = plain["model"].get("continuing_subword_prefix") or ""
    joined = _join(words, spelling, specials | _unknown(plain, tokenizer), prefix, first, pieces, min_frequency)
    if not joined:
        raise ValueError(
            f"tokenizer.extend: no two pieces stand side by side {min_frequency} times in the new text; give more "
            "text, or leave it out"
        )
    _add(plain, joined, spelling)
    made_of: dict[int, list[int]] = {}
    for new, (left, right) in joined.items():
        made_of[new] = [*made_of.get(left, [left]), *made_of.get(right, [right])]
    return Extension(Tokenizer.from_str(json.dumps(plain)), made_of)


def _unknown(plain: Mapping[str, Any], tokenizer: Tokenizer) -> set[int]:
    model = plain["model"]
    if model["type"] == "Unigram":
        return set() if model.get("unk_id") is None else {model["unk_id"]}
    token_id = tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None
    return set() if token_id is None else {token_id}


def _join(
    words: Mapping[tuple[int, ...], int],
    spelling: dict[int, str],
    shut: set[int],
    prefix: str,
    first: int,
    pieces: int,
    min_frequency: int,
) -> dict[int, tuple[int, int]]:
    """New id -> the pair that it joins, the most frequent pair first; `spelling` learns the new pieces."""
    texts = [list(word) for word in words]
    counts = list(words.values())
    known = set(spelling.values())
    frequency: Counter[tuple[int, int]] = Counter()
    where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for number, text in enumerate(texts):
        for pair in pairwise(text):
            frequency[pair] += counts[number]
            where[pair].add(number)
    joined: dict[int, tuple[int, int]] = {}
    ranked = [(-count, pair) for pair, count in frequency.items()]  # with counts of long ago among them
    heapq.heapify(ranked)
    while ranked and len(joined) < pieces:
        count, pair = heapq.heappop(ranked)
        if -count != frequency[pair]:
            continue  # another entry has its count of now
        if -count < min_frequency:
            break
        piece = spelling[pair[0]] + spelling[pair[1]].removeprefix(prefix)
        if shut & set(pair) or piece in known:
            continue
        new = first + len(joined)
        joined[new], spelling[new] = pair, piece
        known.add(piece)
        changed: set[tuple[int, int]] = set()
        for number in where.pop(pair):
            before, after = texts[number], _replace(texts[number], pair, new)
            for old in pairwise(before):
                frequency[old] -= counts[number]
            for one in pairwise(after):
                frequency[one] += counts[number]
                where[one].add(number)
            changed.update(pairwise(before), pairwise(after))
            texts[number] = after
        for one in changed:
            heapq.heappush(ranked, (-frequency[one], one))
    return joined


def _replace(text: list[int], pair: tuple[int, int], new: int) -> list[int]:
    made: list[int] = []
    place = 0
    while place < len(text):
        if place + 1 < len(text) and (text[place], text[place + 1]) == pair:
            made.append(new)
            place += 2
        else:
            made.append(text[place])
            place += 1
    return made


def _add(plain: dict[str, Any], joined: Mapping[int, tuple[int, int]], spelling: Mapping[int, str]) -> None:
    """Write the new pieces into the tokenizer's JSON."""
    model = plain["model"]
    if model["type"] == "Unigram":
        entries: list[list[Any]] = model["vocab"]
        entries += [[spelling[place], _NEVER] for place in range(len(entries), min(joined))]  # added tokens' places
        for new, (left, right) in joined.items():
            entries.append([spelling[new], entries[left][1] + entries[right][1] + _LITTLE_MORE])
        return
    # An added token keeps its id at loading only if the model knows it, or no id comes after it.
    model["vocab"] |= {token["content"]: token["id"] for token in plain["added_tokens"]}
    model["vocab"] |= {spelling[new]: new for new in joined}
    if model["type"] == "BPE":
        listed = not model["merges"] or isinstance(model["merges"][0], list)
        for left, right in joined.values():
            pair = [spelling[left], spelling[right]]
            model["merges"].append(pair if listed else " ".join(pair))
