"""The unigram trainer: against brute force on words small enough to enumerate, and on what it learns."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from sample_texts import documents, trained

from pretrain.tokenization import unigram


def segmentations(word: str, pieces: dict[str, float]) -> list[list[str]]:
    found = []
    for cuts in itertools.product((False, True), repeat=len(word) - 1):
        borders = [0, *(at + 1 for at, is_cut in enumerate(cuts) if is_cut), len(word)]
        parts = [word[a:b] for a, b in itertools.pairwise(borders)]
        if all(part in pieces for part in parts):
            found.append(parts)
    return found


@pytest.fixture
def lattice() -> tuple[dict[str, int], dict[str, float], unigram._Text, unigram._Lattice]:
    words = {"abab": 3, "ba": 2, "aab": 5, "b": 1}
    pieces = {"a": -1.0, "b": -1.5, "ab": -1.2, "aba": -2.0, "ba": -2.2, "aab": -4.0}
    text = unigram._lay_out(words)
    return words, pieces, text, unigram._lattice(text, list(pieces))


def test_expected_counts_equal_enumeration(lattice: tuple) -> None:  # type: ignore[type-arg]
    words, pieces, text, edges = lattice
    expected = dict.fromkeys(pieces, 0.0)
    for word, count in words.items():
        ways = segmentations(word, pieces)
        weights = [math.exp(sum(pieces[part] for part in way)) for way in ways]
        for way, weight in zip(ways, weights, strict=True):
            for part in way:
                expected[part] += count * weight / sum(weights)
    got = unigram._expected_counts(text, edges, np.array(list(pieces.values())))
    np.testing.assert_allclose(got, list(expected.values()), rtol=1e-12)


def test_best_paths_equal_enumeration(lattice: tuple) -> None:  # type: ignore[type-arg]
    words, pieces, text, edges = lattice
    of, used = unigram._best_paths(text, edges, np.array(list(pieces.values())))
    names = list(pieces)
    for index, word in enumerate(words):
        best = max(segmentations(word, pieces), key=lambda way: sum(pieces[part] for part in way))
        assert sorted(names[piece] for piece in used[of == index]) == sorted(best)


def test_digamma() -> None:
    got = unigram._digamma(np.array([0.5, 1.0, 3.0, 100.0]))
    np.testing.assert_allclose(got, [-1.9635100260214235, -0.5772156649015329, 0.9227843350984671, 4.600161852738087])


def test_held_out_text_takes_no_more_tokens_than_bpe() -> None:
    held_out = documents(20, seed=9)
    tokens = {
        algorithm: sum(len(trained(algorithm, "gpt2").tokenizer.encode(text.text).ids) for text in held_out)
        for algorithm in ("unigram", "bpe")
    }
    assert tokens["unigram"] < tokens["bpe"]


def test_pieces_are_scored_in_order() -> None:
    words = {"walking": 9, "walked": 7, "walks": 5, "talking": 4, "talks": 3, "king": 2}
    alphabet = sorted({character for word in words for character in word})
    learnt = unigram.train_unigram(words, alphabet, len(alphabet) + 6)
    assert len(learnt) == len(dict(learnt)) == len(alphabet) + 6
    assert set(alphabet) <= set(dict(learnt))
    assert [score for _, score in learnt] == sorted((score for _, score in learnt), reverse=True)
    assert all(score < 0 for _, score in learnt)
    assert learnt == unigram.train_unigram(dict(reversed(words.items())), alphabet, len(alphabet) + 6)


def test_characters_outside_the_alphabet_part_words() -> None:
    learnt = dict(unigram.train_unigram({"aaxbb": 5, "aa": 5}, ["a", "b"], 10))
    assert not any("x" in piece for piece in learnt)
    assert "aa" in learnt


def test_long_words_are_cut_and_counts_kept() -> None:
    assert sum(len(word) * count for word, count in unigram._fragments({"ab" * 100: 2}, frozenset("ab")).items()) == 400
    assert max(map(len, unigram._fragments({"ab" * 100: 2}, frozenset("ab")))) <= unigram.MAX_WORD


def test_an_alphabet_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold an alphabet"):
        unigram.train_unigram({"ab": 1}, ["a", "b"], 1)
