"""Objectives: masks at the asked rate and split, never on or with special tokens, whatever the batch."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from pretrain.config import ObjectiveConfig
from pretrain.data.objectives import EVALUATION_MLM, MaskedLanguageModelling, Rows, check_batch, make_objective
from pretrain.data.order import Draws
from pretrain.data.vocabulary import SpecialIds

TOKENS = SpecialIds(50, (0, 1, 2, 3, 4, 48, 49), pad=0, unk=1, cls=2, sep=3, mask=4)


def rows(count: int = 400, length: int = 64) -> Rows:
    generator = np.random.default_rng(0)
    ids = generator.integers(5, 48, (count, length))
    ids[:, 0], ids[:, 40], ids[:, 41], ids[:, 50:] = 2, 1, 3, 0
    documents = np.ones((count, length), dtype=np.int32)
    documents[:, 50:] = 0
    return Rows(ids, np.zeros_like(ids), documents, np.full_like(ids, -100))


def draws(count: int, length: int = 64, first: int = 0) -> Draws:
    return Draws(1, np.zeros(count, dtype=np.int64), np.arange(first, first + count), length)


@pytest.mark.parametrize(("rate", "random", "keep"), [(0.15, 0.1, 0.1), (0.4, 0, 0), (0.3, 1.0, 0), (0.3, 0, 1.0)])
def test_masks_have_the_asked_rate_and_split(rate, random, keep):
    batch = rows()
    made = MaskedLanguageModelling(rate, random, keep)(batch, draws(400), TOKENS)
    chosen = made["labels"] != -100
    ordinary = ~TOKENS.is_special[batch.input_ids]
    assert not (chosen & ~ordinary).any()
    assert (made["labels"][chosen] == batch.input_ids[chosen]).all()
    assert (made["input_ids"][~chosen] == batch.input_ids[~chosen]).all()
    assert abs(chosen.sum() / ordinary.sum() - rate) < 0.015
    shown = made["input_ids"][chosen]
    is_mask, is_same = shown == 4, shown == batch.input_ids[chosen]
    # A random token is the right one once in 43 times.
    assert abs(is_mask.mean() - (1 - random - keep)) < 0.03
    assert abs(is_same.mean() - (keep + random / 43)) < 0.03
    assert not TOKENS.is_special[shown[~is_mask]].any()
    if random == 1.0:
        assert set(shown.tolist()) == set(range(5, 48))


def test_masks_do_not_depend_on_the_batch():
    batch = rows(40)
    objective = make_objective(EVALUATION_MLM)
    whole = objective(batch, draws(40), TOKENS)
    for start, stop in ((0, 1), (1, 20), (20, 40)):
        names = ("input_ids", "position_ids", "document_ids", "next_ids")
        part = Rows(*(getattr(batch, name)[start:stop] for name in names))
        made = objective(part, draws(stop - start, first=start), TOKENS)
        for name, array in made.items():
            assert np.array_equal(array, whole[name][start:stop])


def test_an_objective_of_ones_own(monkeypatch):
    module = types.ModuleType("my_objectives")
    module.copy = lambda rows, draws, tokens: {"input_ids": rows.input_ids, "labels": rows.input_ids}
    monkeypatch.setitem(sys.modules, "my_objectives", module)
    assert make_objective(ObjectiveConfig(kind="my_objectives:copy")) is module.copy
    with pytest.raises(ValueError, match=r"objective\.kind: `my_objectives:other`: the module .* has no 'other'"):
        make_objective(ObjectiveConfig(kind="my_objectives:other"))


def test_an_objective_in_the_working_directory_is_found(tmp_path, monkeypatch):
    """The installed script's path does not hold the working directory."""
    (tmp_path / "here.py").write_text("def fn(rows, draws, tokens):\n    return {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    assert make_objective(ObjectiveConfig(kind="here:fn")).__module__ == "here"


def test_keys_of_mlm_beside_ones_own_objective_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"rate.* has no effect with .*mine:fn"):
        make_objective(ObjectiveConfig(kind="mine:fn", rate=0.3))


IDS = np.zeros((2, 3), dtype=np.int64)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "returned a NoneType; return a dict"),
        ([IDS], "returned a list; return a dict"),
        ({"input_ids": IDS}, "needed are input_ids and one of labels, shift_labels"),
        ({"input_ids": IDS, "labels": IDS, "shift_labels": IDS}, "needed are input_ids and one of"),
        ({"input_ids": IDS, "labels": np.zeros(2)}, r"`labels` of shape \(2,\); rows are \(2, 3\)"),
        ({"input_ids": IDS, "labels": np.zeros((2, 3))}, "`labels` as float64 of shape"),
        ({"input_ids": IDS, "labels": [[0] * 3] * 2}, "`labels` as a list; return a numpy array"),
        ({"input_ids": IDS + 50, "labels": IDS}, "`input_ids` from 50 to 50; ids are 0 to 49"),
        ({"input_ids": IDS, "labels": IDS - 1}, "`labels` from -1 to -1; ids are 0 to 49, and -100"),
    ],
)
def test_what_is_no_batch_is_refused(made, message):
    with pytest.raises(ValueError, match=rf"objective\.kind: mine:fn .*{message}"):
        check_batch(made, (2, 3), "mine:fn", 50)


def test_a_batch_is_given_back_with_wide_ids():
    made = check_batch({"input_ids": IDS.astype(np.uint16), "labels": IDS - 100}, (2, 3), "mine:fn", 50, "encoder")
    assert {array.dtype for array in made.values()} == {np.dtype(np.int64)}
    with pytest.raises(ValueError, match="needed are input_ids and shift_labels for a decoder"):
        check_batch(made, (2, 3), "mine:fn", 50, "decoder")


def test_masking_needs_a_mask_token():
    with pytest.raises(ValueError, match=r"no mask_token, which objective\.kind: mlm needs"):
        make_objective(EVALUATION_MLM)(rows(2), draws(2), SpecialIds(50, (0,), pad=0))
