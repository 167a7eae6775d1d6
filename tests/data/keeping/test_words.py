"""Words and the hashes of runs of them: what counts as the same run, and that hashes are the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.keeping.words import run_hashes, word_hashes, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The quick, brown FOX!\n(2024)", ["the", "quick", "brown", "fox", "2024"]),
        ("snake_case — naïve ﬁne", ["snake", "case", "naïve", "fine"]),
        ("宋朝的诗，GPT-2好", ["宋", "朝", "的", "诗", "gpt", "2", "好"]),
        ("ＦＵＬＬ width", ["full", "width"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("かなカナ", ["か", "な", "カ", "ナ"]),
        (" \n!?", []),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


def test_the_ascii_path_is_the_same_as_the_general_one():
    text = "Mixed CASE, digits 1234 and under_scores; tabs\tand \x00 control."
    assert words_of(text) == words_of(text + "é")[:-1]


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=40), st.integers(1, 6))
def test_runs_have_equal_hashes_exactly_when_their_words_are_equal(words, length):
    hashes = run_hashes(word_hashes(words), length).tolist()
    runs = [tuple(words[place : place + length]) for place in range(len(words) - length + 1)]
    assert len(hashes) == len(runs)
    assert len(set(zip(hashes, runs, strict=True))) == len(set(hashes)) == len(set(runs))


def test_hashes_do_not_depend_on_the_process():
    """Python's own hash of a text does."""
    assert run_hashes(word_hashes(["the", "quick", "brown"]), 2).tolist() == [
        10017872266219146776,
        9139860771648150126,
    ]
    assert run_hashes(np.empty(0, dtype=np.uint64), 3).dtype == np.uint64
