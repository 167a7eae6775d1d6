"""Rows, masks and draws are the very same arrays from version to version: a run goes on with them after an update."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import ObjectiveConfig
from pretrain.data.objectives import make_objective
from pretrain.data.order import Draws, below, hash_counters, integers, permute, rows_of_samples
from pretrain.data.packing import PackingSpec, plan_packing
from pretrain.data.rows import assemble_rows
from pretrain.data.shards import ShardWriter, TokenStore
from pretrain.data.vocabulary import SpecialIds

# (vocabulary, shards, sequence length, layout, tokenizer's bos and eos) -> digest of rows and of both objectives
CASES = {
    "narrow-decoder": (700, 1, 64, "decoder", True),
    "narrow-encoder": (700, 1, 64, "encoder", True),
    "wide-decoder": (70_000, 3, 33, "decoder", True),
    "wide-encoder": (70_000, 3, 33, "encoder", True),
    "bare-decoder": (700, 2, 48, "decoder", False),
    "long-decoder": (700, 1, 1024, "decoder", True),
    "long-encoder": (700, 1, 1024, "encoder", True),
}
DIGESTS = {
    "narrow-decoder": "4ae98dda466e5831",
    "narrow-encoder": "2e4f5d28226aef7e",
    "wide-decoder": "c5d60357727e1154",
    "wide-encoder": "dc0aace80fb6af19",
    "bare-decoder": "aba34b8e8d8b6459",
    "long-decoder": "4459ee078785983b",
    "long-encoder": "d6718883c98ede71",
}


def digest(*arrays: np.ndarray) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]


def made(name: str, directory: Path) -> str:
    vocabulary, shards, length, layout, marked = CASES[name]
    specials = {"pad": 0, "cls": 1, "sep": 2, "mask": 3} | ({"bos": 4, "eos": 5} if marked else {})
    tokens = SpecialIds(vocabulary, (0, 1, 2, 3, 4, 5), **specials)
    facts = []
    for shard in range(shards):
        lengths = (hash_counters(1, shard, np.arange(90)) % np.uint64(2 * length)).astype(np.int64)
        lengths[::3] = lengths[::3] % 9
        ids = (hash_counters(2, shard, np.arange(lengths.sum())) % np.uint64(vocabulary)).astype(np.int64)
        with ShardWriter(directory / f"part-{shard}", f"part-{shard}", vocabulary) as writer:
            writer.add(ids, lengths, 0)
        facts.append(writer.facts())
    store = TokenStore(directory, facts, vocabulary)
    spec = PackingSpec(length, layout, int(marked or layout == "encoder"), int(marked or layout == "encoder"), 6)
    plan = plan_packing(store.document_lengths(), spec)
    epochs, rows = rows_of_samples(np.arange(7, 7 + 2 * plan.num_rows), plan.num_rows, 3)
    packed = assemble_rows(store, plan, rows, tokens)
    draws = Draws(11, epochs, rows, length)
    arrays = [plan.rows, plan.pieces, epochs, rows]
    arrays += [packed.input_ids, packed.position_ids, packed.document_ids, packed.next_ids]
    for objective in (ObjectiveConfig(kind="mlm"), ObjectiveConfig(kind="mlm", rate=0.6, random=0.5, keep=0.5)):
        out = make_objective(objective)(packed, draws, tokens)
        arrays += [out["input_ids"], out["labels"]]
    bits = draws.bits("a")
    arrays += [bits, draws.bits_at("b", np.array([0, length, 2 * length - 1])), below(bits, 0.3), integers(bits, 77)]
    return digest(*arrays)


@pytest.mark.parametrize("name", CASES)
def test_batches_are_those_of_every_version(name, tmp_path):
    assert made(name, tmp_path) == DIGESTS[name]


@pytest.mark.parametrize("num_rows", [1, 3, 1000, 5000, 10**9 + 7])
def test_rows_are_the_same_in_whatever_stretches_they_are_asked_for(num_rows):
    """Some are worked out 4096 samples at a time and kept; a batch that lies in two stretches, and one alone, agree."""
    samples = np.arange(4096 - 20, 4096 + 20)
    whole = rows_of_samples(samples, num_rows, 5)
    assert np.array_equal(whole[0] * num_rows + permuted_back(whole, num_rows), samples)
    for start in range(0, 40, 8):
        part = rows_of_samples(samples[start : start + 8], num_rows, 5)
        assert all(np.array_equal(mine[start : start + 8], theirs) for mine, theirs in zip(whole, part, strict=True))
    scattered = rows_of_samples(samples[[39, 0, 7]], num_rows, 5)
    assert all(np.array_equal(mine[[39, 0, 7]], theirs) for mine, theirs in zip(whole, scattered, strict=True))
    part[1][:] = -1  # what is kept is not what is given out
    assert np.array_equal(rows_of_samples(samples[32:], num_rows, 5)[1], whole[1][32:])
    assert all(array.shape == (0,) for array in rows_of_samples(samples[:0], num_rows, 5))


def permuted_back(rows: tuple[np.ndarray, np.ndarray], num_rows: int) -> np.ndarray:
    """The index in its epoch of each sample, found by going through the permutation near it."""
    near = np.arange(4096 - 20, 4096 + 20)
    places = np.empty_like(near)
    for place, (epoch, row) in enumerate(zip(*rows, strict=True)):
        candidates = near[near // num_rows == epoch] % num_rows
        places[place] = candidates[permute(candidates, num_rows, 5, int(epoch)) == row][0]
    return places


def test_a_share_of_bits_is_the_same_by_blocks():
    draws = Draws(np.arange(100), np.zeros(100, dtype=np.int64), np.arange(100), 1000)
    assert np.array_equal(draws.below("x", 0.15), below(draws.bits("x"), 0.15))
    assert draws.below("x", 1.0).all()
