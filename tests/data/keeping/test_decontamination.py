"""Shared runs of words: planted ones are found whatever their case and punctuation, clean documents are left alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config_data import Decontamination
from pretrain.data.keeping.decontamination import KnownRuns, evaluation_files, evaluation_runs, known_runs
from pretrain.data.keeping.words import words_of

WORDS = [f"word{number}" for number in range(500)]


def searcher(*texts: str, ngrams: int = 13) -> KnownRuns:
    return KnownRuns(ngrams, {"a validation text": known_runs(texts, ngrams)})


def test_a_planted_answer_is_found_and_named():
    draws = random.Random(0)
    answer = draws.choices(WORDS, k=13)
    known = searcher("Question? " + " ".join(answer))
    around = " ".join(draws.choices(WORDS, k=300))
    for planted in (" ".join(answer), " - ".join(answer).upper() + "!", "\n".join(answer)):
        assert known.find(f"{around} {planted} {around}") == ("a validation text", " ".join(answer))
    assert known.find(f"{around} {' '.join(answer[:12])} {around}") is None
    assert known.find(" ".join(answer[:12])) is None
    assert known.find("") is None


def test_chinese_counts_characters():
    poem = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
    known = searcher(poem)
    found = known.find("他念道：床前明月光疑是地上霜举头望，然后停了下来。")
    assert found is not None
    assert known.find("床前明月光，疑是地上霜。") is None  # ten characters


texts = st.lists(st.sampled_from(["a", "b", "c", "D,"]), max_size=30).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(texts, max_size=4), texts, st.integers(1, 6))
def test_found_exactly_when_a_run_is_shared(held_out, document, ngrams):
    def runs(text):
        words = words_of(text)
        return {tuple(words[place : place + ngrams]) for place in range(len(words) - ngrams + 1)}

    shared = runs(document) & set().union(*map(runs, held_out))
    found = searcher(*held_out, ngrams=ngrams).find(document)
    assert (found is not None) == bool(shared)
    if found is not None:
        assert tuple(found[1].split()) in shared


def test_many_texts_are_merged_as_they_come(monkeypatch):
    texts = [" ".join(WORDS[start : start + 40]) for start in range(0, 400, 7)]
    whole = known_runs(texts, 13)
    monkeypatch.setattr("pretrain.data.keeping.decontamination._MERGED_AT", 50)
    assert known_runs(iter(texts), 13).tolist() == whole.tolist() == sorted(set(whole.tolist()))


def evaluation(tmp_path: Path, name: str, text: str, ngrams: int = 5):
    (tmp_path / name).write_text(text, encoding="utf-8")
    files = evaluation_files(Decontamination(ngrams=ngrams, files=(str(tmp_path / name),)))
    return KnownRuns(ngrams, {"an evaluation text": evaluation_runs(files, ngrams, "text")})


def test_all_texts_of_an_evaluation_file_are_looked_for(tmp_path):
    row = {"question": "what is the name of it", "choices": ["one two three four five", "宋朝的诗人是"], "answer": 1}
    known = evaluation(tmp_path, "a.jsonl", json.dumps(row) + "\n")
    for text in ("What is the name of -- IT", "one, two, three, four, five", "宋朝的诗人"):
        assert known.find(text) is not None, text
    assert known.find("of it one two three") is None  # not across two strings
    assert evaluation(tmp_path, "b.csv", "q,a\n1,what is the name of it\n").find("what is the name of") is not None
    assert evaluation(tmp_path, "c.txt", "what is\nthe name of it\n").find("what is the name of") is not None
    pretty = json.dumps([row], indent=1)
    assert evaluation(tmp_path, "d.json", pretty).find("what is the name of") is not None


def test_an_evaluation_file_that_says_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no text of `.*short\.txt` has 13 words.*data\.decontaminate\.ngrams"):
        evaluation(tmp_path, "short.txt", "too short", ngrams=13)
    with pytest.raises(ValueError, match=r"data\.decontaminate\.files: `nothing\.txt` names no file"):
        evaluation_files(Decontamination(files=("nothing.txt",)))
