"""Masks by token, word and span: the asked share exactly, whole units, never over the border of a piece."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config_objective import LONGEST_SPAN, ObjectiveConfig
from pretrain.data.objectives import IGNORE, MaskedLanguageModelling, Rows, make_objective
from pretrain.data.objectives.spans import cover, run_starts, span_lengths
from pretrain.data.order import Draws
from pretrain.data.vocabulary import SpecialIds

TOKENS = SpecialIds(60, (0, 1, 2, 3, 4), pad=0, unk=1, cls=2, sep=3, mask=4)
LENGTH = 48


def packed(pieces: list[list[tuple[int, int]]]) -> Rows:
    """Rows of encoder pieces; `pieces` are rows of (payload, longest word) each. Word lengths go 1, 2, ... longest."""
    shape = (len(pieces), LENGTH)
    rows = Rows(*(np.zeros(shape, dtype=np.int64) for _ in range(4)), word_starts=np.ones(shape, dtype=np.bool_))
    rows = replace(rows, document_ids=np.zeros(shape, dtype=np.int32))
    for row, parts in enumerate(pieces):
        place = 0
        for slot, (payload, longest) in enumerate(parts, start=1):
            end = min(place + payload + 2, LENGTH)
            if end - place < 3:
                break
            here = slice(place, end)
            rows.input_ids[row, here] = 5 + (np.arange(end - place) * 7 + row * 3 + slot) % 55
            rows.input_ids[row, place], rows.input_ids[row, end - 1] = 2, 3
            if payload > 4 and end - place > 4:
                rows.input_ids[row, place + 3] = 1  # an unknown token
            rows.position_ids[row, here] = np.arange(end - place)
            rows.document_ids[row, here] = slot
            word, left = 0, 0
            for at in range(place + 1, end - 1):
                rows.word_starts[row, at] = left == 0 or at == place + 1
                if left == 0:
                    word = word % longest + 1
                    left = word
                left -= 1
            place = end
    return rows


def draws(count: int, seed: int = 1, first: int = 0) -> Draws:
    return Draws(seed, np.zeros(count, dtype=np.int64), np.arange(first, first + count), LENGTH)


def part(rows: Rows, where: slice) -> Rows:
    names = [name for name in Rows.__dataclass_fields__ if getattr(rows, name) is not None]
    return Rows(**{name: getattr(rows, name)[where] for name in names})


ROWS = st.lists(
    st.lists(st.tuples(st.integers(1, 46), st.integers(1, 4)), min_size=1, max_size=6), min_size=1, max_size=5
)
OBJECTIVES = st.builds(
    ObjectiveConfig,
    kind=st.sampled_from(["mlm", "rtd"]),
    rate=st.floats(0.05, 0.9),
    whole_words=st.booleans(),
    span=st.none() | st.floats(1.0, 5.0),
    final_rate=st.none() | st.floats(0.05, 0.9),
)


@settings(max_examples=60, deadline=None)
@given(pieces=ROWS, config=OBJECTIVES, seed=st.integers(0, 2**31))
def test_masks_hide_ordinary_tokens_and_the_row_can_be_rebuilt(pieces, config, seed):
    rows = replace(packed(pieces), progress=np.linspace(0, 1, len(pieces)))
    objective = make_objective(config)
    made = objective(rows, draws(len(pieces), seed), TOKENS)
    labels, shown = made["labels"], made["input_ids"]
    hidden = labels != IGNORE
    assert not (hidden & (TOKENS.is_special[rows.input_ids] | (rows.document_ids == 0))).any()
    assert np.array_equal(np.where(hidden, labels, shown), rows.input_ids)
    replaced = hidden & (shown != 4)
    assert not TOKENS.is_special[shown[replaced]].any()
    assert config.kind == "mlm" or not replaced.any()
    if config.whole_words:
        words = np.cumsum(rows.word_starts) - 1
        ordinary = ~TOKENS.is_special[rows.input_ids].reshape(-1)
        for word in np.unique(words):
            inside = hidden.reshape(-1)[(words == word) & ordinary]
            assert inside.all() or not inside.any()
    again = objective(rows, draws(len(pieces), seed), TOKENS)
    halves = [objective(part(rows, slice(at, at + 1)), draws(1, seed, at), TOKENS) for at in range(len(pieces))]
    for name, array in made.items():
        assert np.array_equal(array, again[name])
        assert np.array_equal(array, np.concatenate([half[name] for half in halves]))


@pytest.mark.parametrize("keys", [{"whole_words": True}, {"span": 3.8}, {"span": 2.0, "whole_words": True}])
@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_units_are_hidden_at_the_asked_rate_wherever_they_stand(keys, rate):
    """The first and last tokens of a piece, short pieces and long ones: each as often as any other."""
    number = 3000
    rows = packed([[(4, 2), (12, 3), (22, 3)]] * number)
    hidden = MaskedLanguageModelling(rate, 0.1, 0.1, **keys)(rows, draws(number), TOKENS)["labels"] != IGNORE
    ordinary = ~TOKENS.is_special[rows.input_ids[0]]
    share = hidden.mean(axis=0)[ordinary]
    assert np.abs(share - rate).max() < 5 * np.sqrt(rate * (1 - rate) / number)
    assert abs(share.mean() - rate) < 0.015


def test_the_rate_moves_in_a_line_over_the_run():
    number = 2000
    rows = replace(packed([[(46, 1)]] * number), progress=np.repeat([0.0, 0.5, 1.0], [1000, 500, 500]))
    objective = make_objective(ObjectiveConfig(kind="mlm", rate=0.4, final_rate=0.1))
    hidden = objective(rows, draws(number), TOKENS)["labels"] != IGNORE
    for where, rate in ((slice(0, 1000), 0.4), (slice(1000, 1500), 0.25), (slice(1500, 2000), 0.1)):
        ordinary = ~TOKENS.is_special[rows.input_ids[where]]
        assert abs(hidden[where].sum() / ordinary.sum() - rate) < 0.012
    still = objective(replace(rows, progress=None), draws(number), TOKENS)  # where there is no run yet
    assert abs((still["labels"] != IGNORE).sum() / (~TOKENS.is_special[rows.input_ids]).sum() - 0.4) < 0.012


@pytest.mark.parametrize("mean", [1.0, 2.5, 3.8, 5.0])
def test_lengths_of_spans_have_the_asked_mean(mean):
    lengths = span_lengths(mean)
    sizes = np.arange(1, LONGEST_SPAN + 1)
    assert len(lengths) == LONGEST_SPAN
    assert abs(lengths.sum() - 1) < 1e-12
    assert abs((lengths * sizes).sum() - mean) < 1e-9
    if mean > 1.0:
        ratios = lengths[1:] / lengths[:-1]
        assert np.allclose(ratios, ratios[0])  # geometric


def test_spans_are_those_of_spanbert():
    """p = 0.2 cut off at 10 has the mean 3.8 (section 3.1)."""
    sizes = np.arange(1, 11)
    geometric = 0.2 * 0.8 ** (sizes - 1)
    mean = (geometric * sizes).sum() / geometric.sum()
    assert abs(mean - 3.8) < 0.01
    assert np.allclose(span_lengths(mean), geometric / geometric.sum())


@settings(max_examples=60, deadline=None)
@given(
    starts=st.lists(st.booleans(), min_size=2 * LENGTH, max_size=2 * LENGTH),
    borders=st.sets(st.integers(0, 2 * LENGTH - 1)),
    mean=st.floats(1.0, 5.0),
    seed=st.integers(0, 1000),
)
def test_what_spans_cover_is_whole_units_and_runs_begin_in_their_piece(starts, borders, mean, seed):
    piece_starts = np.zeros(2 * LENGTH, dtype=np.bool_)
    piece_starts[[0, LENGTH, *borders]] = True
    unit_starts = np.array(starts) | piece_starts
    covered = cover(unit_starts, piece_starts, np.array([0.3, 0.6]), mean, draws(2, seed))
    units, pieces = np.cumsum(unit_starts), np.cumsum(piece_starts)
    for unit in np.unique(units):
        inside = covered[units == unit]
        assert inside.all() or not inside.any()
    firsts = run_starts(covered, piece_starts)
    places = np.flatnonzero(covered)
    assert (pieces[firsts] == pieces[places]).all()
    for first, place in zip(firsts, places, strict=True):
        assert covered[first : place + 1].all()
        assert first == 0 or piece_starts[first] or not covered[first - 1]


def test_what_becomes_of_a_span_is_one_draw_and_of_a_words_tokens_are_several():
    number = 400
    rows = packed([[(46, 4)]] * number)
    for keys, together in (({"span": 4.0}, True), ({"whole_words": True}, False)):
        made = MaskedLanguageModelling(0.3, 0.0, 0.5, **keys)(rows, draws(number), TOKENS)
        hidden, masked = made["labels"] != IGNORE, made["input_ids"] == 4
        neighbours = hidden[:, 1:] & hidden[:, :-1] & ~rows.word_starts[:, 1:]
        same = (masked[:, 1:] == masked[:, :-1])[neighbours].mean()
        assert same == 1.0 if together else 0.4 < same < 0.6


def test_spans_of_one_token_are_the_tokens_themselves():
    number = 1500
    rows = packed([[(46, 1)]] * number)
    hidden = MaskedLanguageModelling(0.2, 0, 0, span=1.0)(rows, draws(number), TOKENS)["labels"] != IGNORE
    both = (hidden[:, 10] & hidden[:, 11]).mean()
    assert abs(both - 0.04) < 0.02  # independent


def test_whole_words_need_marks():
    rows = replace(packed([[(5, 1)]]), word_starts=None)
    with pytest.raises(ValueError, match=r"objective\.whole_words.*prepare them again"):
        MaskedLanguageModelling(0.2, 0, 0, whole_words=True)(rows, draws(1), TOKENS)
