"""Rows of text: every token once, masks that depend on the text alone, a stable sample of sentences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import byte_tokenizer, word_tokenizer

from pretrain.data.objectives import IGNORE
from pretrain.evaluation.text import (
    SentenceSample,
    TextTally,
    causal_rows,
    encode,
    hidden_token_rows,
    make_template,
    mask_tokens,
    masked_rows,
    prefix_id,
    take_texts,
)


@settings(max_examples=200, deadline=None)
@given(length=st.integers(0, 60), window=st.integers(1, 12), data=st.data())
def test_causal_rows_score_every_token_once_in_order(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    ids = np.arange(100, 100 + length, dtype=np.int32)
    scored = []
    for row in causal_rows(ids, 7, window, stride):
        assert 1 <= len(row.input_ids) <= window
        assert len(row.targets) == len(row.input_ids)
        counted = np.flatnonzero(row.targets != IGNORE)
        for place in counted:  # the target is what comes next, and its context what came before, without a gap
            target = int(row.targets[place])
            before = 7 if target == 100 else target - 1
            assert row.input_ids[place] == before
            assert place + 1 >= min(window - stride + 1, target - 100 + 1)
        scored += row.targets[counted].tolist()
    assert scored == ids.tolist()


def test_causal_windows_share_one_token_by_default() -> None:
    rows = list(causal_rows(np.arange(1, 8, dtype=np.int32), 0, 3, 3))
    assert [row.input_ids.tolist() for row in rows] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [row.targets.tolist() for row in rows] == [[1, 2, 3], [4, 5, 6], [7]]


def test_sliding_windows_look_back() -> None:
    rows = list(causal_rows(np.arange(1, 8, dtype=np.int32), 0, 4, 2))
    assert [row.input_ids.tolist() for row in rows] == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6]]
    assert [row.targets.tolist() for row in rows] == [[1, 2, 3, 4], [-100, -100, 5, 6], [-100, -100, 7]]


def test_template_is_read_off_the_tokenizer() -> None:
    template = make_template(word_tokenizer())
    assert template.before.tolist() == [2]
    assert template.after.tolist() == [3]
    assert template.mask == 4
    assert not set(template.ordinary.tolist()) & {0, 1, 2, 3, 4}
    with pytest.raises(ValueError, match="mask_token"):
        make_template(byte_tokenizer())


def test_masks_are_15_percent_and_80_10_10() -> None:
    template = make_template(word_tokenizer())
    ids = np.resize(template.ordinary, 200_000)
    selected, replaced = mask_tokens(ids, 12345, template)
    assert abs(selected.mean() - 0.15) < 0.004
    assert (replaced[~selected] == ids[~selected]).all()
    masked = (replaced[selected] == template.mask).mean()
    kept = (replaced[selected] == ids[selected]).mean()
    assert abs(masked - 0.8) < 0.01
    # A random token hits the one that stands there once in as many times as there are ordinary tokens.
    assert abs(kept - (0.1 + 0.1 / len(template.ordinary))) < 0.01
    drawn = replaced[selected & (replaced != template.mask) & (replaced != ids)]
    assert set(drawn.tolist()) == set(template.ordinary.tolist())


def test_masks_depend_on_the_text_alone() -> None:
    tokenizer = word_tokenizer()
    template = make_template(tokenizer)

    def rows(text: str, window: int) -> tuple[list[int], list[int]]:
        (_, ids), *_ = encode(tokenizer, [text])
        made = list(masked_rows(text, ids, template, window))
        inputs = np.concatenate([row.input_ids[1:-1] for row in made])
        return inputs.tolist(), np.concatenate([row.targets[1:-1] for row in made]).tolist()

    text = "the cat sat on the mat and then it ran under a big red tree . " * 12
    inputs, targets = rows(text, 400)
    assert rows(text, 400) == (inputs, targets)
    narrow_inputs, narrow_targets = rows(text, 52)  # pieces without a target are left out; none is here
    assert (narrow_inputs, narrow_targets) == (inputs, targets)
    assert rows(text + "cat", 400)[1][:-1] != targets


def test_special_names_in_the_text_are_text() -> None:
    ((_, ids),) = encode(word_tokenizer(), ["cat [MASK] dog"])
    assert 4 not in ids.tolist()


def test_hidden_token_rows_hide_each_token_once() -> None:
    rows = list(hidden_token_rows(np.asarray([5, 6, 7], np.int32), make_template(word_tokenizer())))
    assert [row.input_ids.tolist() for row in rows] == [[2, 4, 6, 7, 3], [2, 5, 4, 7, 3], [2, 5, 6, 4, 3]]
    assert [row.targets.tolist() for row in rows] == [
        [-100, 5, -100, -100, -100],
        [-100, -100, 6, -100, -100],
        [-100, -100, -100, 7, -100],
    ]


def test_the_sample_does_not_depend_on_order() -> None:
    lines = [f"sentence number {number} of the text" for number in range(200)]
    one, two = SentenceSample(10, 5), SentenceSample(10, 5)
    one.add("\n".join(lines))
    for line in reversed(lines):
        two.add(line)
    two.add("tiny")
    assert one.sentences() == two.sentences()
    assert len(set(one.sentences())) == 10
    assert one.seen == two.seen == 200
    repeated = SentenceSample(10, 5)
    repeated.add("\n".join([*lines[:3], *lines[:3]]))
    assert sorted(repeated.sentences()) == sorted(lines[:3])
    assert SentenceSample(0, 5).sentences() == []


def test_the_tally_counts_bytes_and_tells_texts_apart() -> None:
    first, second = TextTally(), TextTally()
    assert list(take_texts(["héllo", "", "there"], first)) == ["héllo", "there"]
    list(take_texts(["héllot", "here"], second))
    assert (first.documents, first.bytes) == (2, 11)
    assert first.sha256 != second.sha256
    limited = TextTally()
    assert list(take_texts(["abc", "defg", "h"], limited, max_bytes=4)) == ["abc", "defg"]


def test_prefix_is_bos_then_eos() -> None:
    assert prefix_id(byte_tokenizer()) == 0
    with pytest.raises(ValueError, match="bos_token"):
        prefix_id(word_tokenizer())
