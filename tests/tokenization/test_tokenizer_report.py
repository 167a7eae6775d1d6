"""The report: rates against counting by hand."""

from __future__ import annotations

import json

import pytest
from sample_texts import Text, documents, trained

from pretrain.tokenization import draw_sample, measure_tokenizer


def test_rates_of_bytes() -> None:
    made = trained("bytes", "gpt2")
    with draw_sample([Text("two words\nüber 世界", "a"), Text("one", "b")], 100) as sample:
        report = measure_tokenizer("bytes", made, sample)
    assert report.files["a"].words == 5, "each Chinese character is a word"
    assert report.files["a"].bytes == report.files["a"].tokens == len("two words\nüber 世界".encode())
    assert report.total.bytes_per_token == 1.0
    assert report.total.fertility == report.total.tokens / 6
    assert report.total.exact_share == 1.0
    assert report.total.unknown == 0


def test_unknown_words_and_inexact_lines_are_counted() -> None:
    made = trained("wordpiece", "bert")
    with draw_sample([Text("walk Ω walk\nwalk\nwalk  walk\n")], 100) as sample:
        report = measure_tokenizer("wordpiece", made, sample)
    assert report.total.unknown == 1
    assert report.total.unknown_rate == pytest.approx(1 / report.total.tokens)
    assert (report.total.lines, report.total.exact_lines) == (3, 1)


def test_shown_and_saved() -> None:
    made = trained("byte-bpe", "gpt2")
    with draw_sample(documents(), 10**6) as sample:
        report = measure_tokenizer("byte-bpe", made, sample)
    report.seconds, report.peak_rss_bytes = 1.5, 200_000_000
    shown = report.as_markdown()
    assert "| a.txt |" in shown
    assert "| b.txt |" in shown
    assert "200 MB" in shown
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["corpus_digest"] == report.corpus_digest
    assert plain["total"]["bytes_per_token"] == round(report.total.bytes_per_token, 6)
    assert set(plain["files"]) == {"a.txt", "b.txt"}


def test_a_bounded_part_is_measured() -> None:
    texts = [Text(f"walking {number} talking " * 50, "a.txt", number) for number in range(500)]
    made = trained("byte-bpe", "gpt2")
    with draw_sample(texts, 10**7) as sample:
        report = measure_tokenizer("byte-bpe", made, sample, max_bytes=100_000)
    assert 50_000 < report.total.bytes < 200_000
