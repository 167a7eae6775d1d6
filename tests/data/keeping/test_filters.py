"""Filters by name: what is refused before any work, and what they do to a document."""

from __future__ import annotations

import pytest

from pretrain.config_data import FilterStep
from pretrain.data.keeping.filters import Judge, check_filters, filter_labels, known_filters

PROSE = """A boat came up the river in the first week of spring, and most of the town went down to look at it.
It carried salt, cloth and two letters, one of which had been written more than a year before.
The miller read them aloud because he was the only man there who could, with a break after every page.
Children listened from the wall; their mothers asked what the handwriting was like, and whether it shook.
Nobody could say when the next one would come, so that evening everyone began to write an answer.
"""


def step(name: str, **parameters) -> FilterStep:
    return FilterStep(name=name, parameters=parameters)


def test_datatroves_filters_are_known():
    assert {"GopherQualityFilter", "FineWebQualityFilter", "C4QualityFilter", "RegexFilter"} <= set(known_filters())
    assert "BaseFilter" not in known_filters()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (step("GoferQualityFilter"), "no filter `GoferQualityFilter`; the nearest is GopherQualityFilter of C4Bad"),
        (step("GopherQualityFilter", min_doc_word=3), r"no parameter `min_doc_word`; did you mean min_doc_words\?"),
        (step("GopherQualityFilter", min_doc_words="many"), r"parameters\.min_doc_words: 'many' does not fit int"),
        (step("GopherRepetitionFilter", top_n_grams=3), r"parameters\.top_n_grams: 3 does not fit tuple"),
        (step("SamplerFilter", rate="0.5"), r"parameters\.rate: '0\.5' does not fit float"),
        (step("RegexFilter"), "`regex_exp` is missing; RegexFilter needs it"),
        (step("RegexFilter", regex_exp="("), r"data\.filters\[0\] \(RegexFilter\)\.parameters: missing \)"),
        (step("RegexFilter", regex_exp="x", exclusion_writer=1), "no parameter `exclusion_writer`"),
        (step("LambdaFilter", filter_function="numpy:isnan"), "cannot judge a document of plain text"),
        (step("LambdaFilter", filter_function="numpy:nothing"), "the module 'numpy' has no 'nothing'"),
    ],
)
def test_what_cannot_work_is_refused_with_its_key(wanted, message):
    with pytest.raises(ValueError, match=message):
        check_filters([wanted])


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr("datatrove.utils._import_utils._is_package_available", lambda name: False)
    with pytest.raises(ValueError, match=r"\(LanguageFilter\) needs a package that is not installed: .*pip install"):
        check_filters([step("LanguageFilter", languages=["en"])])


def test_a_package_that_a_filter_needs_only_for_a_document_is_missed_too(monkeypatch):
    """The words of English come from spaCy, which is asked for when the first document is judged."""

    def missing(language):
        raise ImportError("Please install `spacy` to use en word tokenizer (`pip install spacy`).")

    monkeypatch.setattr("datatrove.utils.word_tokenizers.load_word_tokenizer", missing)
    for name in ("GopherQualityFilter", "GopherRepetitionFilter", "FineWebQualityFilter"):
        with pytest.raises(ValueError, match=rf"{name}\) needs a package .*pip install spacy"):
            check_filters([step(name)])


def test_a_download_that_fails_is_said(monkeypatch):
    def refused(*arguments):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlretrieve", refused)
    monkeypatch.setattr("os.path.isfile", lambda path: False)
    with pytest.raises(ValueError, match="needs a download that failed: no route to host"):
        check_filters([step("UnigramLogProbFilter")])


def test_filters_judge_in_order_and_give_reasons(monkeypatch):
    class Spaces:
        def word_tokenize(self, text):
            return text.split()

    monkeypatch.setattr("datatrove.utils.word_tokenizers.load_word_tokenizer", lambda language: Spaces())
    judge = Judge([step("RegexFilter", regex_exp="secret"), step("GopherQualityFilter", min_doc_words=5)])
    good = "the cat and the dog walked to the village that morning"
    assert judge.judge(good, "f:0") == (good, ["RegexFilter", "GopherQualityFilter"], "")
    assert judge.judge("a secret", "f:1") == (None, [], "no reason given")
    assert judge.judge("the cat and", "f:2") == (None, ["RegexFilter"], "gopher_short_doc")


@pytest.mark.parametrize(
    ("name", "bad", "reason"),
    [
        ("GopherQualityFilter", "Wolves hunt deer across snowy plains. " * 10, "gopher_enough_stop_words"),
        ("GopherRepetitionFilter", "You should buy this very good lamp today and save. " * 10, "top_3_gram"),
        ("FineWebQualityFilter", "\n".join(f"{place:x>34}." for place in "abcdefghijkl"), "list_ratio"),
    ],
)
def test_filters_that_count_words_keep_prose_and_name_what_is_wrong(name, bad, reason):
    """With the words of spaCy: each of the bad texts fails by a count of words."""
    pytest.importorskip("spacy", reason="spacy is missing: install the extra `filters`")
    check_filters([step(name)])
    judge = Judge([step(name)])
    assert judge.judge(PROSE, "f:0") == (PROSE, [name], "")
    assert judge.judge(bad, "f:1") == (None, [], reason)


def test_a_filter_may_change_the_text_it_keeps():
    judge = Judge([step("C4QualityFilter", min_num_sentences=-1)])
    assert judge.judge("A line that ends well.\nno end here\nAnother one with words.", "f:0")[0] == (
        "A line that ends well.\nAnother one with words."
    )
    assert judge.judge("no end here\nnor here", "f:1") == (None, [], "no text is left")


def test_a_filter_that_fails_on_a_document_leaves_it_out():
    judge = Judge([step("LambdaFilter", filter_function="tests.data.keeping.test_filters:divides")])
    text, passed, reason = judge.judge("x", "f:0")
    assert (text, passed) == (None, [])
    assert reason == "the filter fails with ZeroDivisionError: division by zero"


def divides(document) -> bool:
    return bool(1 / (len(document.text) - 1))


def test_a_filter_that_draws_at_random_judges_alike_in_every_process():
    texts = [f"text {number}" for number in range(200)]
    judges = Judge([step("SamplerFilter", rate=0.5)]), Judge([step("SamplerFilter", rate=0.5, seed=None)])
    once, again = ([text for text in texts if judge.judge(text, "")[0]] for judge in judges)
    assert once == again
    assert 60 < len(once) < 140


def test_a_filter_that_comes_twice_is_counted_twice():
    assert filter_labels([step("RegexFilter"), step("SamplerFilter"), step("RegexFilter")]) == [
        "RegexFilter",
        "SamplerFilter",
        "RegexFilter (2)",
    ]
