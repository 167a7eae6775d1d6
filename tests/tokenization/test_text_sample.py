"""The sample: bounded, independent of order, close to the size asked for, and exact when everything fits."""

from __future__ import annotations

import random

import pytest
from sample_texts import Text, documents

from pretrain.tokenization import draw_sample
from pretrain.tokenization.sample import PIECE_CHARACTERS, cut


def many(count: int = 2000) -> list[Text]:
    draw = random.Random(5)
    return [Text("x" * draw.randrange(1, 400) + "é", f"{number % 7}.txt", number) for number in range(count)]


def test_everything_when_it_fits() -> None:
    with draw_sample(documents(), 10**9) as sample:
        assert sample.complete
        assert [piece.text for piece in sample] == [document.text for document in documents()]
        assert sample.sample_bytes == sample.corpus_bytes == sum(len(d.text.encode()) for d in documents())
        assert [piece.text for piece in sample] == list(sample.texts()), "it can be read again"


@pytest.mark.parametrize("budget", [3_000, 50_000, 200_000])
def test_size_and_order(budget: int) -> None:
    chosen = []
    for order in range(3):
        texts = many()
        random.Random(order).shuffle(texts)
        with draw_sample(texts, budget, seed=3) as sample:
            pieces = sorted((piece.file, piece.position) for piece in sample)
            assert sample.sample_bytes == sum(file.sample for file in sample.files.values())
            assert budget - 800 < sample.sample_bytes <= budget
            assert not sample.complete
            chosen.append((pieces, sample.digest))
    assert chosen[0] == chosen[1] == chosen[2]


def test_seeds_differ_and_files_are_sampled_alike() -> None:
    with draw_sample(many(), 50_000, seed=0) as first, draw_sample(many(), 50_000, seed=1) as second:
        assert [p.position for p in first] != [p.position for p in second]
        shares = [file.sample / file.corpus for file in first.files.values()]
        assert min(shares) > 0.5 * max(shares)


def test_a_larger_budget_holds_the_smaller_sample() -> None:
    with draw_sample(many(), 20_000) as small, draw_sample(many(), 100_000) as large:
        assert {p.position for p in small} < {p.position for p in large}


def test_the_disk_holds_little_more_than_twice_the_budget() -> None:
    with draw_sample(many(20_000), 30_000) as sample:
        assert sample._spooled <= 2.5 * 30_000


def test_long_documents_are_cut() -> None:
    lines = "line of words\n" * 20_000
    pieces = list(cut(lines))
    assert "".join(pieces) == lines
    assert len(pieces) > 3
    assert all(len(piece) <= PIECE_CHARACTERS and piece.endswith("\n") for piece in pieces)
    assert "".join(cut("x" * 200_000)) == "x" * 200_000
    with draw_sample([Text(lines)], 100_000) as sample:
        assert 0 < sample.sample_bytes <= 100_000


def test_digest_tells_corpora_apart() -> None:
    digests = set()
    for texts in ([Text("a")], [Text("b")], [Text("a", "b.txt")], [Text("a", position=1)], [Text("a"), Text("b")]):
        with draw_sample(texts, 100) as sample:
            digests.add(sample.digest)
    assert len(digests) == 5


def test_no_text_and_too_small_a_budget_are_refused() -> None:
    with pytest.raises(ValueError, match="no text"):
        draw_sample([], 100)
    with pytest.raises(ValueError, match=r"tokenizer\.max_bytes: 10 is too little"):
        draw_sample(many(), 10)


def test_lone_surrogates_do_not_stop_it() -> None:
    with draw_sample([Text("a\ud800b")], 100) as sample:
        assert list(sample.texts()) == ["a?b"]
