"""The order is a permutation, known in O(1), and draws depend on nothing but their counters."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import Draws, below, hash_counters, integers, permute, rows_of_samples


@settings(max_examples=120, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
def test_permute_is_a_permutation(size, seed, epoch):
    out = permute(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(out), np.arange(size))


def test_permute_is_the_same_one_index_at_a_time_and_far_out():
    size = 10**9 + 7
    indices = np.array([0, 1, 17, 10**9, size - 1])
    together = permute(indices, size, 3, 5)
    alone = [int(permute(indices[i : i + 1], size, 3, 5)[0]) for i in range(len(indices))]
    assert together.tolist() == alone
    assert ((together >= 0) & (together < size)).all()
    assert together.tolist() != permute(indices, size, 3, 6).tolist()
    assert together.tolist() != permute(indices, size, 4, 5).tolist()


def test_permutations_look_random():
    size = 1000
    table = np.stack([permute(np.arange(size), size, seed, 0) for seed in range(200)])  # (200, size)
    assert abs(table.mean(axis=0) - (size - 1) / 2).max() < 5 * size / np.sqrt(12 * 200)
    neighbours = np.abs(np.diff(table, axis=1)) == 1  # 2 in `size` by chance
    assert 0.5 < neighbours.mean() * size / 2 < 1.6
    assert 0.3 < (table == np.arange(size)).mean() * size < 2.0


def test_samples_go_on_across_epochs():
    samples = np.arange(25)
    epochs, rows = rows_of_samples(samples, 10, seed=1)
    assert epochs.tolist() == [0] * 10 + [1] * 10 + [2] * 5
    assert sorted(rows[:10].tolist()) == sorted(rows[10:20].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:20].tolist()
    again = [rows_of_samples(samples[start : start + 7], 10, seed=1)[1] for start in range(0, 25, 7)]
    assert np.array_equal(np.concatenate(again), rows)


def test_draws_depend_on_seed_epoch_row_position_and_purpose_alone():
    epochs, rows = np.array([0, 0, 1, 2]), np.array([5, 6, 5, 9])
    draws = Draws(7, epochs, rows, 16)
    table = draws.bits("a")
    for start in range(4):
        part = Draws(7, epochs[start:], rows[start:], 16)
        assert np.array_equal(part.bits("a"), table[start:])
    places = np.array([0, 17, 63])
    assert np.array_equal(draws.bits_at("a", places), table.reshape(-1)[places])
    different = [table, draws.bits("b"), Draws(8, epochs, rows, 16).bits("a")]
    assert len(np.unique(np.concatenate([part.reshape(-1) for part in different]))) == 3 * 64


def test_draws_are_uniform_and_independent():
    draws = Draws(0, np.zeros(512, dtype=np.int64), np.arange(512), 512)
    bits = draws.bits("a")
    share = below(bits, 0.15)
    assert abs(share.mean() - 0.15) < 0.003
    assert np.abs(share.mean(axis=0) - 0.15).max() < 0.08  # by position
    assert abs(np.mean(share[:, 1:] & share[:, :-1]) - 0.15**2) < 0.002
    assert abs(np.mean(share[1:] & share[:-1]) - 0.15**2) < 0.002
    assert abs(np.mean(share & below(draws.bits("b"), 0.15)) - 0.15**2) < 0.002
    counts = np.bincount(integers(bits.reshape(-1), 10), minlength=10)
    assert abs(counts / bits.size - 0.1).max() < 0.004
    assert below(bits, 1.0).all()
    assert not below(bits, 0.0).any()


def test_hash_tells_the_order_of_counters():
    assert len({int(hash_counters(*pair)[0]) for pair in [(0, 1), (1, 0), (0, 0), (1, 1), (0,), (1,)]}) == 6
    assert int(hash_counters(1, 2, 3)[0]) == 2794788227269299530  # changing the hash would change every run
