"""Pairs of segments: packed, labelled, cut at sentences, and with every token where its label says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config_objective import ObjectiveConfig
from pretrain.data.objectives import IGNORE, make_objective
from pretrain.data.order import Draws
from pretrain.data.packing import PackingSpec, plan_packing
from pretrain.data.rows import assemble_pieces
from pretrain.data.shards import SENTENCE, WORD, ShardWriter, TokenStore
from pretrain.data.vocabulary import SpecialIds

TOKENS = SpecialIds(70_000, (0, 1, 2, 3), pad=0, cls=1, sep=2, mask=3)
LENGTH, MOST = 24, 5


def store_of(directory, lengths, every=3, sentence=6):
    """Documents of ids 10, 11, ...; a word starts at each `every`-th id, a sentence at each `sentence`-th."""
    ids = np.arange(10, 10 + sum(lengths))
    marks = np.where(ids % every == 0, WORD, 0) | np.where(ids % sentence == 0, WORD | SENTENCE, 0)
    with ShardWriter(directory / "part", "part", TOKENS.vocab_size, marked=True) as writer:
        writer.add(ids, np.array(lengths), 0, marks.astype(np.uint8))
    return TokenStore(directory, [writer.facts()], TOKENS.vocab_size)


def batch_of(store, mode, rows, seed=0, rate=0.15, **keys):
    plan = plan_packing(store.document_lengths(), PackingSpec(LENGTH, "encoder", 1, 2, MOST))
    rows = np.arange(plan.num_rows) if rows is None else rows
    draws = Draws(seed, np.zeros_like(rows), rows, LENGTH)
    pieces = assemble_pieces(store, plan, rows, draws, with_others=mode == "next")
    config = ObjectiveConfig(kind="mlm", sentences=mode, rate=rate, **keys)
    return plan, make_objective(config)(pieces, draws, TOKENS)


DOCUMENTS = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(lengths=DOCUMENTS, mode=st.sampled_from(["order", "next"]), seed=st.integers(0, 1000), words=st.booleans())
def test_pairs_are_what_their_labels_say(tmp_path_factory, lengths, mode, seed, words):
    store = store_of(tmp_path_factory.mktemp("shards"), lengths)
    plan, made = batch_of(store, mode, None, seed, whole_words=words)
    ids = np.where(made["labels"] != IGNORE, made["labels"], made["input_ids"])
    document = np.repeat(np.arange(len(lengths)), lengths)
    seen: list[int] = []
    for row in range(plan.num_rows):
        pieces = plan.pieces[int(plan.rows[row]) : int(plan.rows[row + 1])]
        for slot in range(MOST):
            places = np.flatnonzero(made["document_ids"][row] == slot + 1)
            label = made["sentence_labels"][row, slot]
            if slot >= len(pieces):
                assert not len(places)
                assert label == IGNORE
                continue
            assert made["sentence_positions"][row, slot] == places[0]
            assert made["position_ids"][row, places].tolist() == list(range(len(places)))
            piece = pieces[slot : slot + 1]
            own = store.gather(piece["offset"].astype(np.int64), piece["length"].astype(np.int64)).tolist()
            found, types = ids[row, places].tolist(), made["token_type_ids"][row, places].tolist()
            assert found[0] == 1
            assert found[-1] == 2
            if len(own) == 1:
                assert found == [1, *own, 2]
                assert label == IGNORE
                continue
            middle = found.index(2)
            a, b = found[1:middle], found[middle + 1 : -1]
            assert types == [0] * (middle + 1) + [1] * (len(b) + 1)
            assert a
            assert b
            if label == 0:
                assert a + b == own
            elif mode == "order":
                assert b + a == own
            else:
                assert a == own[: len(a)]
                assert len(a) + len(b) <= len(own)
                assert b == list(range(b[0], b[0] + len(b)))
                assert document[b[0] - 10] != document[own[0] - 10]
            seen.append(int(label))
            first = a if label == 0 or mode == "next" else b
            cut = own[len(first)]
            inner = [token for token in own[1:] if token % 6 == 0], [token for token in own[1:] if token % 3 == 0]
            assert cut in next((some for some in inner if some), own)
    padding = made["document_ids"] == 0
    assert not made["token_type_ids"][padding].any()
    assert (made["labels"][padding] == IGNORE).all()
    if len(lengths) == 1 and mode == "next":
        assert not any(seen)  # there is no other document


def test_half_of_the_pairs_are_changed_and_no_special_token_is_hidden(tmp_path):
    store = store_of(tmp_path, [40, 21, 17, 60] * 200)
    for mode in ("order", "next"):
        _, made = batch_of(store, mode, None, seed=3, rate=0.3)
        labels = made["sentence_labels"][made["sentence_labels"] != IGNORE]
        assert abs(labels.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(labels))
        hidden = made["labels"] != IGNORE
        assert not TOKENS.is_special[made["labels"][hidden]].any()
        payload = (made["document_ids"] > 0) & ~np.isin(made["input_ids"], (1, 2))
        assert abs(hidden.sum() / payload.sum() - 0.3) < 0.015


@pytest.mark.parametrize("mode", ["order", "next"])
def test_pairs_do_not_depend_on_the_batch(tmp_path, mode):
    store = store_of(tmp_path, [40, 9, 17, 60, 3, 1, 30] * 6)
    plan, whole = batch_of(store, mode, None, seed=5, whole_words=True, span=2.0)
    again = batch_of(store, mode, None, seed=5, whole_words=True, span=2.0)[1]
    parts = [
        batch_of(store, mode, np.array([row]), seed=5, whole_words=True, span=2.0)[1] for row in range(plan.num_rows)
    ]
    other = batch_of(store, mode, None, seed=6, whole_words=True, span=2.0)[1]
    for name, array in whole.items():
        assert np.array_equal(array, again[name])
        assert np.array_equal(array, np.concatenate([one[name] for one in parts])), name
    assert not np.array_equal(whole["sentence_labels"], other["sentence_labels"])


def test_segments_need_marks(tmp_path):
    with ShardWriter(tmp_path / "part", "part", 100) as writer:
        writer.add(np.arange(10, 30), np.array([20]), 0)
    store = TokenStore(tmp_path, [writer.facts()], 100)
    with pytest.raises(ValueError, match=r"objective\.sentences.*prepare them again"):
        batch_of(store, "order", None)
