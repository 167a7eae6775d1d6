"""Packing: every payload token once, in order, within the row and the cap; the same plan every time; little waste."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.packing import (
    CLOSED,
    FIRST,
    LAST,
    PackingSpec,
    plan_directory,
    plan_packing,
    read_plan,
    wire_lengths,
    write_plan,
)
from pretrain.files import ArtifactError

LENGTHS = st.lists(st.one_of(st.integers(0, 12), st.integers(0, 100)), max_size=60)
SPECS = st.builds(
    PackingSpec,
    sequence_length=st.integers(3, 20),
    layout=st.sampled_from(["encoder", "decoder"]),
    opening=st.integers(0, 1),
    closing=st.integers(0, 1),
    max_documents_per_row=st.integers(1, 5),
)


@settings(max_examples=400, deadline=None)
@given(lengths=LENGTHS, spec=SPECS)
def test_every_payload_token_lies_in_one_place(lengths, spec):
    lengths = np.array(lengths, dtype=np.int64)
    plan = plan_packing(lengths, spec)
    seen = np.zeros(int(lengths.sum()), dtype=np.int64)
    starts, ends = np.cumsum(lengths) - lengths, np.cumsum(lengths)
    firsts, lasts = [], []
    for piece in plan.pieces:
        begin, end = int(piece["offset"]), int(piece["offset"] + piece["length"])
        assert end > begin
        seen[begin:end] += 1
        document = int(np.searchsorted(ends, begin, side="right"))
        assert end <= ends[document]  # a piece is of one document
        assert bool(piece["flags"] & FIRST) == (begin == starts[document])
        assert bool(piece["flags"] & LAST) == (end == ends[document])
        firsts += [document] if piece["flags"] & FIRST else []
        lasts += [document] if piece["flags"] & LAST else []
        if spec.layout == "encoder":
            assert bool(piece["flags"] & CLOSED) == bool(spec.closing)
        elif not piece["flags"] & LAST:
            assert not piece["flags"] & CLOSED
    assert (seen == 1).all()
    assert sorted(firsts) == sorted(lasts) == np.flatnonzero(lengths).tolist()

    wire = wire_lengths(spec, plan.pieces["length"], plan.pieces["flags"])
    sizes = np.diff(plan.rows.astype(np.int64))
    assert plan.rows[0] == 0
    assert plan.rows[-1] == len(plan.pieces)
    if len(sizes):
        assert sizes.min() >= 1
        assert sizes.max() <= spec.max_documents_per_row
        assert np.add.reduceat(wire, plan.rows[:-1].astype(np.int64)).max() <= spec.sequence_length
    assert plan.num_positions == wire.sum()


def test_a_closing_token_without_place_is_left_out_only_at_the_end_of_a_full_row():
    spec = PackingSpec(8, "decoder", 1, 1, 4)
    for length in range(1, 40):
        pieces = plan_packing(np.array([length]), spec).pieces
        (last,) = pieces[(pieces["flags"] & LAST) != 0]
        used = last["length"] + (1 if last["flags"] & FIRST else 0)
        assert bool(last["flags"] & CLOSED) == (used < 8)


def test_little_is_wasted_and_the_plan_is_the_same_each_time():
    lengths = np.exp(np.random.default_rng(0).normal(5.5, 1.0, 40_000)).astype(np.int64) + 1
    spec = PackingSpec(512, "encoder", 1, 1, 64)
    plan, again = plan_packing(lengths, spec), plan_packing(lengths, spec)
    assert plan.utilisation > 0.999
    assert np.array_equal(plan.rows, again.rows)
    assert np.array_equal(plan.pieces, again.pieces)


def test_blocks_do_not_show(monkeypatch):
    lengths = np.random.default_rng(1).integers(0, 50, 500)
    spec = PackingSpec(16, "decoder", 1, 1, 8)
    plan = plan_packing(lengths, spec)
    monkeypatch.setattr("pretrain.data.packing._BLOCK", 7)
    small = plan_packing(lengths, spec)
    assert np.array_equal(plan.pieces, small.pieces)


def test_rows_longer_than_16_bits():
    lengths = np.array([200_000, 5, 60_000, 3])
    plan = plan_packing(lengths, PackingSpec(100_000, "decoder", 1, 1, 8))
    assert plan.pieces["length"].sum() == lengths.sum()
    assert plan.num_rows == 3


def test_a_plan_is_kept_on_the_disk_under_its_parameters(tmp_path):
    spec = PackingSpec(16, "decoder", 1, 1, 8)
    plan = plan_packing(np.array([3, 50, 0, 7]), spec)
    directory = plan_directory(tmp_path, spec, ["a", "b"])
    write_plan(directory, plan, ["a", "b"])
    again = read_plan(directory, spec)
    assert np.array_equal(again.rows, plan.rows)
    assert np.array_equal(again.pieces, plan.pieces)
    others = [
        plan_directory(tmp_path, PackingSpec(16, "decoder", 1, 0, 8), ["a", "b"]),
        plan_directory(tmp_path, PackingSpec(16, "decoder", 1, 1, 9), ["a", "b"]),
        plan_directory(tmp_path, spec, ["b", "a"]),
    ]
    assert len({directory, *others}) == 4
    np.save(directory / "rows.npy", plan.rows[:-1])
    with pytest.raises(ArtifactError, match="does not fit its manifest"):
        read_plan(directory, spec)


def test_a_row_of_special_tokens_alone_is_refused():
    with pytest.raises(ValueError, match=r"data\.sequence_length: 2"):
        PackingSpec(2, "encoder", 1, 1, 4)
