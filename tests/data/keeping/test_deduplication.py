"""Which documents are copies: the same as a slow reference, however the text is cut into parts."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config_data import Deduplication
from pretrain.data.keeping.deduplication import Choice, Fingerprints, choose, hashes_of

EXACT, MINHASH = Deduplication(kind="exact"), Deduplication(kind="minhash")
WORDS = [f"word{number}" for number in range(3000)]


def fingerprints(documents: list[tuple[str, bool, bool]], wanted: Deduplication, cuts: list[int]):
    """Parts cut at the given places; a document is (text, held out, stays)."""
    bounds = [0, *sorted(min(cut, len(documents)) for cut in cuts), len(documents)]
    parts = []
    for start, end in pairwise(bounds):
        notes = Fingerprints(wanted)
        for number, (text, held_out, stays) in enumerate(documents[start:end], start):
            notes.add(text, held_out=held_out, stays=stays, file=0, position=number)
        parts.append(notes.array())
    return parts


def reference(documents: list[tuple[str, bool, bool]]) -> list[int | None]:
    """What each document repeats, by comparing all with all."""
    held_first = sorted(range(len(documents)), key=lambda number: (not documents[number][1], number))
    first: dict[str, int] = {}
    for number in held_first:
        first.setdefault(documents[number][0], number)
    return [
        None if first[text] == number or stays else first[text] for number, (text, _, stays) in enumerate(documents)
    ]


def as_list(choice: Choice) -> list[int | None]:
    repeats = iter(choice.repeats["document"].tolist())
    return [next(repeats) if goes else None for goes in choice.goes]


documents_of_any_kind = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c d", "c  d", "É", ""]), st.booleans(), st.booleans()).map(
        lambda one: (one[0], one[1], one[1] and one[2])
    ),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(documents_of_any_kind, st.lists(st.integers(0, 40), max_size=5), st.sampled_from([1, 3, 1 << 20]))
def test_exact_is_what_comparing_all_with_all_gives(documents, cuts, round_size):
    choice = choose(fingerprints(documents, EXACT, cuts), "exact", round_size)
    assert as_list(choice) == reference(documents)
    held_out = [documents[number][1] for number in choice.repeats["document"]]
    assert choice.repeats["held_out"].tolist() == held_out


def joined(parts, buckets: int) -> list[int]:
    """Groups by agreement in any bucket, found one pair after another."""
    hashes = np.concatenate([part["hashes"] for part in parts])
    group = list(range(len(hashes)))
    for one in range(len(hashes)):
        for other in range(one):
            if (hashes[one] == hashes[other]).any() and group[one] != group[other]:
                low, high = sorted((group[one], group[other]))
                group = [low if number == high else number for number in group]
    return group


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 30), max_size=4), st.sampled_from([2, 1 << 20]))
def test_minhash_groups_are_those_of_comparing_all_pairs(seed, cuts, round_size):
    """Few words and small buckets, so that chains of copies of copies arise."""
    draws = random.Random(seed)
    wanted = Deduplication(kind="minhash", ngrams=1, buckets=3, hashes_per_bucket=2)
    texts = [" ".join(draws.choices("abcdefghij", k=draws.randint(0, 6))) for _ in range(30)]
    parts = fingerprints([(text, False, False) for text in texts], wanted, cuts)
    group = joined(parts, 3)
    expected = [None if group[number] == number else group[number] for number in range(len(texts))]
    assert as_list(choose(parts, "minhash", round_size)) == expected


def changed(words: list[str], count: int, draws: random.Random) -> list[str]:
    words = list(words)
    for place in draws.sample(range(len(words)), count):
        words[place] = f"new{draws.random()}"
    return words


def test_near_copies_are_found_as_often_as_the_formula_says():
    draws = random.Random(0)
    for count, least, most in ((0, 100, 100), (1, 99, 100), (8, 25, 75), (40, 0, 3)):
        found = 0
        for _ in range(100):
            words = draws.choices(WORDS, k=200)
            other = " ".join(changed(words, count, draws))
            found += bool((hashes_of(" ".join(words), MINHASH) == hashes_of(other, MINHASH)).any())
        assert least <= found <= most, f"{count} of 200 words changed"


def test_minhash_counts_neither_case_nor_punctuation_and_holds_for_short_and_chinese_texts():
    def alike(one: str, other: str) -> bool:
        return bool((hashes_of(one, MINHASH) == hashes_of(other, MINHASH)).any())

    assert alike("Good morning, Vietnam!", "good  morning vietnam")
    assert not alike("good morning", "good evening")
    assert alike("!!!", "!!!")
    assert not alike("!!!", "???")
    assert alike("床前明月光，疑是地上霜。", "床前明月光疑是地上霜")
    assert not alike("床前明月光，疑是地上霜。", "举头望明月，低头思故乡。")


def test_a_held_out_document_comes_before_all_and_copies_of_copies_go():
    draws = random.Random(1)
    first = draws.choices(WORDS, k=200)
    second = changed(first, 1, draws)
    texts = [(" ".join(first), False, False), (" ".join(draws.choices(WORDS, k=200)), False, False)]
    texts.append((" ".join(second), True, False))
    choice = choose(fingerprints(texts, MINHASH, [1]), "minhash")
    assert as_list(choice) == [2, None, None]
    assert choice.repeats["held_out"].tolist() == [True]


def test_nothing_is_no_trouble():
    for wanted in (EXACT, MINHASH):
        assert len(choose(fingerprints([], wanted, [0]), wanted.kind).goes) == 0


@pytest.mark.parametrize("wanted", [EXACT, MINHASH])
def test_a_fingerprint_has_the_stated_size(wanted):
    size = fingerprints([("a", False, False)], wanted, [])[0].itemsize
    assert size == (38 if wanted.kind == "exact" else 22 + 8 * 14)
