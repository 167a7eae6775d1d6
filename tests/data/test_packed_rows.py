"""Rows: what the model sees, against a plain reading of the rules, and each token a target once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.packing import CLOSED, FIRST, PackingSpec, plan_packing
from pretrain.data.rows import assemble_rows
from pretrain.data.shards import INDEX_SUFFIX, TOKENS_SUFFIX, ShardWriter, TokenStore
from pretrain.data.vocabulary import SpecialIds
from pretrain.files import ArtifactError

TOKENS = SpecialIds(100_000, (0, 1, 2, 3, 4), pad=0, cls=1, sep=2, bos=3, eos=4)
DOCUMENTS = st.lists(st.one_of(st.integers(0, 8), st.integers(0, 60)), min_size=1, max_size=25)


def store_of(directory, lengths, cuts=()):
    """Documents of distinct ids 1000, 1001, ... in as many shards as `cuts` makes."""
    ids = np.arange(1000, 1000 + sum(lengths))
    facts, done = [], 0
    for number, group in enumerate(np.split(np.array(lengths), sorted(cuts))):
        with ShardWriter(directory / f"part-{number}", f"part-{number}", TOKENS.vocab_size) as writer:
            writer.add(ids[done : done + group.sum()], group, 0)
        facts.append(writer.facts())
        done += int(group.sum())
    return TokenStore(directory, facts, TOKENS.vocab_size), ids


def expected_row(store_ids, plan, row, spec):
    """A row spelled out piece by piece."""
    out, positions, documents = [], [], []
    for number, piece in enumerate(plan.pieces[int(plan.rows[row]) : int(plan.rows[row + 1])], start=1):
        begin = int(piece["offset"])
        wire = store_ids[begin : begin + int(piece["length"])].tolist()
        encoder = spec.layout == "encoder"
        if spec.opening and (encoder or piece["flags"] & FIRST):
            wire = [1 if encoder else 3, *wire]
        if piece["flags"] & CLOSED:
            wire = [*wire, 2 if encoder else 4]
        out += wire
        positions += range(len(wire))
        documents += [number] * len(wire)
    padding = [0] * (spec.sequence_length - len(out))
    return out + padding, positions + padding, documents + padding


@settings(max_examples=120, deadline=None)
@given(
    lengths=DOCUMENTS,
    length=st.integers(3, 17),
    layout=st.sampled_from(["encoder", "decoder"]),
    cuts=st.lists(st.integers(0, 24), max_size=3),
)
def test_rows_are_what_the_plan_says(tmp_path_factory, lengths, length, layout, cuts):
    store, ids = store_of(tmp_path_factory.mktemp("shards"), lengths, [cut for cut in cuts if cut < len(lengths)])
    spec = PackingSpec(length, layout, 1, 1, 4)
    plan = plan_packing(store.document_lengths(), spec)
    assert store.document_lengths().tolist() == lengths
    order = np.random.default_rng(0).permutation(plan.num_rows)
    rows = assemble_rows(store, plan, order, TOKENS)
    assert rows.input_ids.dtype == rows.position_ids.dtype == rows.next_ids.dtype == np.int64
    assert rows.document_ids.dtype == np.int32
    for place, row in enumerate(order):
        expected, positions, documents = expected_row(ids, plan, row, spec)
        assert rows.input_ids[place].tolist() == expected
        assert rows.position_ids[place].tolist() == positions
        assert rows.document_ids[place].tolist() == documents


@settings(max_examples=150, deadline=None)
@given(lengths=DOCUMENTS, length=st.integers(3, 17), cuts=st.lists(st.integers(0, 24), max_size=2))
def test_each_token_is_a_causal_target_once(tmp_path_factory, lengths, length, cuts):
    store, ids = store_of(tmp_path_factory.mktemp("shards"), lengths, [cut for cut in cuts if cut < len(lengths)])
    plan = plan_packing(store.document_lengths(), PackingSpec(length, "decoder", 1, 1, 4))
    rows = assemble_rows(store, plan, np.arange(plan.num_rows), TOKENS)
    counted = Counter(rows.next_ids[rows.next_ids != -100].tolist())
    not_empty = sum(length > 0 for length in lengths)
    assert counted == Counter({**dict.fromkeys(ids.tolist(), 1), **({4: not_empty} if not_empty else {})})
    # The target follows its input in the document: ids are consecutive, BOS comes before a first, EOS after a last.
    starts = np.cumsum(lengths) - np.array(lengths) + 1000
    ends = np.cumsum(lengths) + 999
    for now, after in zip(rows.input_ids[rows.next_ids != -100], rows.next_ids[rows.next_ids != -100], strict=True):
        assert after == now + 1 or (now == 3 and after in starts) or (after == 4 and now in ends)


def test_a_tokenizer_without_bos_and_eos(tmp_path):
    store, ids = store_of(tmp_path, [5, 20])
    plan = plan_packing(store.document_lengths(), PackingSpec(8, "decoder", 0, 0, 4))
    bare = SpecialIds(100_000, (0,), pad=0)
    rows = assemble_rows(store, plan, np.arange(plan.num_rows), bare)
    assert sorted(rows.input_ids[rows.document_ids > 0].tolist()) == ids.tolist()
    targets = sorted(rows.next_ids[rows.next_ids != -100].tolist())
    assert targets == [token for token in ids.tolist() if token not in (1000, 1005)]


def test_the_width_of_ids_follows_the_vocabulary(tmp_path):
    for size, width in ((65_536, 2), (65_537, 4)):
        with ShardWriter(tmp_path / f"{size}", f"{size}", size) as writer:
            writer.add(np.array([size - 1, 0]), np.array([2]), 9)
        assert (tmp_path / f"{size}.ds").stat().st_size == 2 * width
        store = TokenStore(tmp_path, [writer.facts()], size)
        assert store.gather(np.array([0]), np.array([2])).tolist() == [size - 1, 0]
        with (
            pytest.raises(ValueError, match=f"id {size}, beyond its vocabulary of {size}"),
            ShardWriter(tmp_path / "bad", "bad", size) as writer,
        ):
            writer.add(np.array([size]), np.array([1]), 1)
    assert not list(tmp_path.glob("bad*"))


@pytest.mark.parametrize("suffix", [TOKENS_SUFFIX, INDEX_SUFFIX])
def test_a_cut_shard_is_refused(tmp_path, suffix):
    with ShardWriter(tmp_path / "part", "part", 500) as writer:
        writer.add(np.arange(10), np.array([4, 6]), 10)
    path = tmp_path / f"part{suffix}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=f"part{suffix}.*cut off"):
        TokenStore(tmp_path, [writer.facts()], 500)
    path.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        TokenStore(tmp_path, [writer.facts()], 500)
