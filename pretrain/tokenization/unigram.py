"""Training of a unigram language model over pieces of words, by expectation maximization and pruning.

What lives here: counted words in, scored pieces out, in numpy. What must not: reading text, tokenizers, files.

Source: Kudo 2018, "Subword Regularization" (arXiv:1804.10959), section 3.2, as SentencePiece does it: seed pieces are
the frequent substrings of words; each round runs two EM steps and then drops the pieces whose loss to the likelihood
is least, until few more than wanted remain. The library's own trainer walks hash maps in an order that differs with
every process, and adds floating point numbers in it, so two runs give two vocabularies; here every sum has one order.

Layout: all words lie one after another in one array of characters, each followed by a separator. Node `i` is the
place before character `i`; an edge `start -> end` is a piece that spells the characters between. The paths through a
word are its segmentations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

MAX_PIECE = 16  # characters
MAX_WORD = 64  # characters; longer words (text without spaces) are cut
_SEED_PIECES = 1_000_000
_KEEP_EACH_ROUND = 0.75
_EM_STEPS = 2
_LEAST_COUNT = 0.5  # expected occurrences, in the whole corpus
_BASE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class _Text:
    """Words in one array: `characters` (N,), word `w` at `first[w]`, `length[w]` characters, seen `count[w]` times."""

    characters: Ints
    first: Ints
    length: Ints
    count: Floats

    @property
    def nodes(self) -> int:
        return len(self.characters)


@dataclass(frozen=True)
class _Lattice:
    """Edges of all words (E,), in an order for each direction, and where that order's steps begin."""

    start: Ints
    end: Ints
    piece: Ints
    forward: list[Ints]
    backward: list[Ints]


def train_unigram(words: Mapping[str, int], alphabet: Sequence[str], num_pieces: int) -> list[tuple[str, float]]:
    """Learn `num_pieces` pieces (fewer when the words have no more); all of `alphabet` is among them.

    `words` maps words to counts; characters outside `alphabet` part a word in two. Returns (piece, log probability),
    most probable first, ties by piece.

    Raises:
        ValueError: when `num_pieces` cannot hold the alphabet.
    """
    if num_pieces < len(alphabet):
        raise ValueError(f"{num_pieces} unigram pieces cannot hold an alphabet of {len(alphabet)} characters")
    text = _lay_out(_fragments(words, frozenset(alphabet)))
    pieces, counts = _seed_pieces(text, sorted(alphabet), max(100_000, 10 * num_pieces))
    num_single = len(alphabet)  # the single characters come first in `pieces`, always
    lattice = _lattice(text, pieces)
    scores = np.log(counts / counts.sum())
    wanted = max(int(num_pieces * 1.1), num_single)
    while True:
        for _ in range(_EM_STEPS):
            expected = _expected_counts(text, lattice, scores)
            keep = expected >= _LEAST_COUNT
            keep[:num_single] = True
            pieces, lattice = _select(pieces, lattice, keep)
            kept = np.maximum(expected[keep], _LEAST_COUNT)
            scores = _digamma(kept) - _digamma(np.array([kept.sum()]))  # the sparse prior of Kudo's implementation
        if len(pieces) <= wanted:
            break
        target = max(wanted, int(len(pieces) * _KEEP_EACH_ROUND))
        keep = _prune(text, lattice, pieces, scores, num_single, target)
        pieces, lattice = _select(pieces, lattice, keep)
        scores = scores[keep]
    return _finish(pieces, scores, num_single, num_pieces)


def _digamma(value: Floats) -> Floats:
    """The logarithmic derivative of the gamma function, for positive values (recurrence, then asymptotic series)."""
    result = np.zeros_like(value)
    for _ in range(6):
        small = value < 6
        result = result - np.where(small, 1 / value, 0.0)
        value = np.where(small, value + 1, value)
    square = 1 / (value * value)
    series = square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square / 240)))
    return result + np.log(value) - 0.5 / value - series


def _finish(pieces: list[str], scores: Floats, num_single: int, num_pieces: int) -> list[tuple[str, float]]:
    longer = sorted(range(num_single, len(pieces)), key=lambda index: (-scores[index], pieces[index]))
    chosen = [*range(num_single), *longer[: num_pieces - num_single]]
    scored = [(pieces[index], round(float(scores[index]), 6)) for index in chosen]
    return sorted(scored, key=lambda item: (-item[1], item[0]))


def _fragments(words: Mapping[str, int], alphabet: frozenset[str]) -> dict[str, int]:
    """Words cut at characters outside the alphabet and at 64 characters, counted, in sorted order."""
    counts: dict[str, int] = {}
    for word, count in words.items():
        known = word if alphabet.issuperset(word) else "".join(c if c in alphabet else "\0" for c in word)
        for part in known.split("\0"):
            for start in range(0, len(part), MAX_WORD):
                fragment = part[start : start + MAX_WORD]
                counts[fragment] = counts.get(fragment, 0) + count
    return dict(sorted(counts.items()))


def _lay_out(words: Mapping[str, int]) -> _Text:
    flat = "".join(word + "\0" for word in words)
    length = np.fromiter((len(word) for word in words), dtype=np.int64, count=len(words))
    first = np.concatenate(([0], np.cumsum(length + 1)[:-1])).astype(np.int64)
    count = np.fromiter(words.values(), dtype=np.float64, count=len(words))
    characters = np.frombuffer(flat.encode("utf-32-le"), dtype=np.uint32).astype(np.int64)
    return _Text(characters, first, length, count)


def _window_hashes(text: _Text, longest: int) -> list[tuple[Ints, Hashes]]:
    """For each length 1.. `longest`: the starts of all substrings within words, and their 64-bit hashes."""
    starts = np.arange(text.nodes)
    room = np.repeat(text.first + text.length, text.length + 1) - starts  # characters from here to the word's end
    result: list[tuple[Ints, Hashes]] = []
    alive = starts
    hashes = np.zeros(text.nodes, dtype=np.uint64)
    for size in range(1, longest + 1):
        inside = room[alive] >= size
        alive, hashes = alive[inside], hashes[inside]
        if not len(alive):
            break
        character = text.characters[alive + size - 1].astype(np.uint64)
        hashes = _mix(hashes ^ _mix(character + np.uint64(size * _BASE % 2**64)))
        result.append((alive, hashes))
    return result


def _mix(value: Hashes) -> Hashes:
    """The finalizer of SplitMix64 (Steele et al. 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _seed_pieces(text: _Text, alphabet: list[str], most: int) -> tuple[list[str], Floats]:
    """The alphabet, then the substrings of highest count x length that occur twice or more."""
    most = min(most, _SEED_PIECES)
    weight = np.repeat(text.count, text.length + 1)
    totals = np.bincount(text.characters, weights=weight, minlength=1)
    single = np.array([totals[ord(c)] if ord(c) < len(totals) else 0.0 for c in alphabet])
    found: list[tuple[Ints, Ints, Floats]] = []  # starts, lengths, counts
    for size, (starts, hashes) in enumerate(_window_hashes(text, MAX_PIECE), start=1):
        if size == 1:
            continue
        _, where, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        counts: Floats = np.bincount(inverse.ravel(), weights=weight[starts]).astype(np.float64)
        frequent = np.flatnonzero(counts >= 2)
        frequent = frequent[np.argsort(-counts[frequent], kind="stable")[:most]]
        found.append((starts[where[frequent]], np.full(len(frequent), size), counts[frequent]))
    pieces = list(alphabet)
    if not found:
        return pieces, np.maximum(single, 1.0)
    first, length, count = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((first, length, -count * length))[:most]
    pieces += [_spell(text, int(first[i]), int(length[i])) for i in order]
    return pieces, np.concatenate((np.maximum(single, 1.0), count[order] * length[order]))


def _spell(text: _Text, first: int, length: int) -> str:
    return "".join(map(chr, text.characters[first : first + length]))


# --- lattices -------------------------------------------------------------------------------------------------------


def _hash_pieces(pieces: Sequence[str]) -> Hashes:
    """The hash of each piece as a whole, in the same way as its windows in the text."""
    text = _lay_out_sequence(pieces)
    longest = int(text.length.max(initial=1))
    result = np.zeros(len(pieces), dtype=np.uint64)
    word_of = np.repeat(np.arange(len(pieces)), text.length + 1)
    for size, (starts, hashes) in enumerate(_window_hashes(text, longest), start=1):
        whole = (starts == text.first[word_of[starts]]) & (text.length[word_of[starts]] == size)
        result[word_of[starts[whole]]] = hashes[whole]
    return result


def _lay_out_sequence(pieces: Sequence[str]) -> _Text:
    return _lay_out(dict.fromkeys(pieces, 1))


def _lattice(text: _Text, pieces: list[str]) -> _Lattice:
    """All edges: every place where a piece stands within a word."""
    known = _hash_pieces(pieces)
    order = np.argsort(known, kind="stable")
    known = known[order]
    starts: list[Ints] = []
    sizes: list[Ints] = []
    found: list[Ints] = []
    for size, (at, hashes) in enumerate(_window_hashes(text, MAX_PIECE), start=1):
        index = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        hit = known[index] == hashes
        starts.append(at[hit])
        sizes.append(np.full(int(hit.sum()), size))
        found.append(order[index[hit]])
    start, size_of, piece = (np.concatenate(parts) for parts in (starts, sizes, found))
    return _ordered(text, start, start + size_of, piece)


def _ordered(text: _Text, start: Ints, end: Ints, piece: Ints) -> _Lattice:
    """Group the edges by how far from their word's beginning they end, and by how far from its end they start."""
    word_first = np.repeat(text.first, text.length + 1)
    word_last = np.repeat(text.first + text.length, text.length + 1)
    return _Lattice(
        start,
        end,
        piece,
        _steps(end - word_first[start], end),
        _steps(word_last[start] - start, start),
    )


def _steps(distance: Ints, node: Ints) -> list[Ints]:
    """Indices of edges, one array a distance, nearest first, each sorted by node."""
    order = np.lexsort((node, distance))
    borders = np.flatnonzero(np.diff(distance[order])) + 1
    return np.split(order, borders) if len(order) else []


def _select(pieces: list[str], lattice: _Lattice, keep: NDArray[np.bool_]) -> tuple[list[str], _Lattice]:
    """Drop pieces and their edges."""
    if keep.all():
        return pieces, lattice
    number = np.cumsum(keep) - 1
    edge = keep[lattice.piece]
    position = np.cumsum(edge) - 1
    kept = _Lattice(
        lattice.start[edge],
        lattice.end[edge],
        number[lattice.piece[edge]],
        [position[step[edge[step]]] for step in lattice.forward],
        [position[step[edge[step]]] for step in lattice.backward],
    )
    return [piece for piece, keeps in zip(pieces, keep, strict=True) if keeps], kept


def _groups(nodes: Ints) -> Ints:
    """Where runs of equal nodes begin."""
    return np.flatnonzero(np.concatenate(([True], nodes[1:] != nodes[:-1])))


def _sweep(steps: list[Ints], source: Ints, target: Ints, weight: Floats, initial: Floats) -> Floats:
    """Log of the summed probability of all paths into each node; `initial` (N,) is changed and returned."""
    for step in steps:
        if not len(step):
            continue
        nodes = target[step]
        into = initial[source[step]] + weight[step]
        groups = _groups(nodes)
        highest = np.maximum.reduceat(into, groups)
        spread = np.diff(np.append(groups, len(step)))
        total = np.add.reduceat(np.exp(into - np.repeat(highest, spread)), groups)
        initial[nodes[groups]] = highest + np.log(total)
    return initial


def _expected_counts(text: _Text, lattice: _Lattice, scores: Floats) -> Floats:
    """The E step: how often each piece is expected, over all segmentations, by their probability."""
    weight = scores[lattice.piece]
    last = text.first + text.length
    before = np.full(text.nodes, -np.inf)
    before[text.first] = 0.0
    before = _sweep(lattice.forward, lattice.start, lattice.end, weight, before)
    after = np.full(text.nodes, -np.inf)
    after[last] = 0.0
    after = _sweep(lattice.backward, lattice.end, lattice.start, weight, after)
    words = np.repeat(np.arange(len(text.first)), text.length + 1)[lattice.start]
    share = np.exp(before[lattice.start] + weight + after[lattice.end] - before[last[words]])
    return np.bincount(lattice.piece, weights=share * text.count[words], minlength=len(scores)).astype(np.float64)


def _best_paths(text: _Text, lattice: _Lattice, scores: Floats) -> tuple[Ints, Ints]:
    """Viterbi: (word, piece) of every piece on the most probable segmentation of each word, ties to the lower edge."""
    weight = scores[lattice.piece]
    best = np.full(text.nodes, -np.inf)
    best[text.first] = 0.0
    into_edge = np.full(text.nodes, -1, dtype=np.int64)
    for step in lattice.forward:
        if not len(step):
            continue
        nodes = lattice.end[step]
        into = best[lattice.start[step]] + weight[step]
        groups = _groups(nodes)
        highest = np.maximum.reduceat(into, groups)
        spread = np.diff(np.append(groups, len(step)))
        edges = np.where(into == np.repeat(highest, spread), step, len(weight))
        best[nodes[groups]] = highest
        into_edge[nodes[groups]] = np.minimum.reduceat(edges, groups)
    node = text.first + text.length
    word = np.arange(len(text.first))
    words: list[Ints] = []
    pieces: list[Ints] = []
    while True:
        edge = into_edge[node]
        alive = edge >= 0
        if not alive.any():
            break
        word, edge = word[alive], edge[alive]
        words.append(word)
        pieces.append(lattice.piece[edge])
        node = lattice.start[edge]
    empty = np.zeros(0, dtype=np.int64)
    return (np.concatenate(words), np.concatenate(pieces)) if words else (empty, empty)


def _prune(
    text: _Text, lattice: _Lattice, pieces: list[str], scores: Floats, num_single: int, target: int
) -> NDArray[np.bool_]:
    """Which pieces stay: single characters, and those whose loss to the likelihood would be greatest."""
    words, used = _best_paths(text, lattice, scores)
    frequency = np.bincount(used, weights=text.count[words], minlength=len(pieces))
    total = frequency.sum()
    # The best way to spell each piece by other pieces: its own lattice without the edge that is the piece itself.
    spelled = _lay_out_sequence(pieces)
    own = _lattice(spelled, pieces)
    other = own.piece != np.repeat(np.arange(len(pieces)), spelled.length + 1)[own.start]
    own = _ordered(spelled, own.start[other], own.end[other], own.piece[other])
    of, alternative = _best_paths(spelled, own, scores)
    parts = np.bincount(of, minlength=len(pieces))
    spelled_score = np.bincount(of, weights=scores[alternative], minlength=len(pieces))
    # A piece that loses to its own spelling is never used.
    useful = (frequency > 0) & (scores >= spelled_score)
    log_frequency = np.log(np.maximum(frequency, 1e-300))
    log_total = np.log(total + frequency * np.maximum(parts - 1, 0))
    gained = np.log(np.maximum(frequency[alternative] + frequency[of], 1e-300)) - log_total[of]
    replaced = np.bincount(of, weights=gained, minlength=len(pieces))
    loss = frequency / text.count.sum() * (log_frequency - np.log(total) - replaced)
    candidates = np.flatnonzero(useful & (np.arange(len(pieces)) >= num_single))
    order = candidates[np.argsort(-loss[candidates], kind="stable")]
    keep = np.zeros(len(pieces), dtype=bool)
    keep[:num_single] = True
    keep[order[: max(target - num_single, 0)]] = True
    return keep
