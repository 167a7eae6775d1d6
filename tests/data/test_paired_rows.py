"""Rows of an encoder-decoder: packed in both rows at once, nothing lost, and the text can be rebuilt from them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config_objective import ObjectiveConfig
from pretrain.data.noise import corrupted_lengths, longest_piece, most_spans, noise_counts, target_length_of
from pretrain.data.objectives import IGNORE, make_objective
from pretrain.data.order import Draws
from pretrain.data.packing import FIRST, LAST, PackingSpec, load_or_plan, plan_packing, source_lengths
from pretrain.data.rows import assemble_pieces
from pretrain.data.shards import ShardWriter, TokenStore
from pretrain.data.vocabulary import SpecialIds
from pretrain.files import ArtifactError

PAD, EOS = 0, 1
SENTINELS = tuple(range(149, 99, -1))
TOKENS = SpecialIds(70_000, (0, 1, 2, *SENTINELS), pad=PAD, eos=EOS, unk=2, sentinels=SENTINELS)


def store_of(directory, documents, shards=1):
    facts = []
    for number, some in enumerate(np.array_split(np.arange(len(documents)), shards)):
        with ShardWriter(directory / f"part-{number}", f"part-{number}", TOKENS.vocab_size) as writer:
            ids = [token for document in some for token in documents[document]]
            writer.add(np.array(ids, dtype=np.int64), np.array([len(documents[at]) for at in some], dtype=np.int64), 0)
        facts.append(writer.facts())
    return TokenStore(directory, facts, TOKENS.vocab_size)


def batch_of(store, plan, config, rows=None, seed=0):
    rows = np.arange(plan.num_rows) if rows is None else rows
    draws = Draws(seed, np.zeros_like(rows), rows, plan.spec.sequence_length)
    return make_objective(config)(assemble_pieces(store, plan, rows, draws), draws, TOKENS)


def texts_of(made, plan):
    """(input, target) of each piece of each row, with what packing promises of both rows checked on the way."""
    found = []
    for row in range(plan.num_rows):
        count = int(plan.rows[row + 1] - plan.rows[row])
        assert 0 < count <= plan.spec.max_documents_per_row
        for prefix in ("", "decoder_"):
            documents = made[f"{prefix}document_ids"][row]
            assert documents.max() == count
            used = documents[: np.count_nonzero(documents)]
            assert (used > 0).all()
            assert (np.diff(used) >= 0).all()  # piece after piece, padding behind them
            assert (made[f"{prefix}input_ids"][row][documents == 0] == PAD).all()
            assert not made[f"{prefix}position_ids"][row][documents == 0].any()
        assert (made["labels"][row][made["decoder_document_ids"][row] == 0] == IGNORE).all()
        for slot in range(1, count + 1):
            reads = made["document_ids"][row] == slot
            writes = made["decoder_document_ids"][row] == slot
            assert made["position_ids"][row][reads].tolist() == list(range(reads.sum()))
            assert made["decoder_position_ids"][row][writes].tolist() == list(range(writes.sum()))
            target = made["labels"][row][writes].tolist()
            assert made["decoder_input_ids"][row][writes].tolist() == [PAD, *target[:-1]]
            found.append((made["input_ids"][row][reads].tolist(), target))
    return found


# --- span corruption ------------------------------------------------------------------------------------------------


def filled(text, target):
    """The text before corruption, its hidden spans put back."""
    assert text.pop() == EOS
    assert target.pop() == EOS
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in SENTINELS:
            last = spans.setdefault(token, [])
        else:
            last.append(token)
    assert list(spans) == list(SENTINELS[: len(spans)])
    assert [token for token in text if token in SENTINELS] == list(spans)
    assert all(spans.values())
    return [other for token in text for other in spans.get(token, [token])], [len(span) for span in spans.values()]


RATES = st.sampled_from([(0.15, 3.0), (0.5, 2.0), (0.3, 1.0), (0.8, 8.0), (0.05, 3.0)])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=12).filter(any),
    length=st.integers(6, 40),
    noise=RATES,
    seed=st.integers(0, 1000),
)
def test_corrupted_text_can_be_rebuilt(tmp_path_factory, lengths, length, noise, seed):
    rate, span = noise
    ends = np.cumsum(lengths)
    documents = [list(range(1000 + end - size, 1000 + end)) for size, end in zip(lengths, ends, strict=True)]
    store = store_of(tmp_path_factory.mktemp("shards"), documents)
    target_length = target_length_of(length, rate, span)
    spec = PackingSpec(length, "seq2seq", 0, 1, 5, 1, target_length, rate, span)
    plan = plan_packing(store.document_lengths(), spec)
    made = batch_of(store, plan, ObjectiveConfig(kind="span-corruption", rate=rate, span=span), seed=seed)
    assert made["input_ids"].shape == (plan.num_rows, length)
    assert made["labels"].shape == (plan.num_rows, target_length)
    seen: Counter[int] = Counter()
    for text, target in texts_of(made, plan):
        whole, spans = filled(text, target)
        assert whole == list(range(whole[0], whole[0] + len(whole)))
        hidden, number = noise_counts(np.array([len(whole)]), rate, span)
        assert (sum(spans), len(spans)) == (hidden[0], number[0])
        seen.update(whole)
    assert seen == Counter(range(1000, 1000 + sum(lengths)))  # every token once


def test_lengths_are_those_of_t5():
    """Its paper: rows of 512, 15% in spans of 3; its code then takes 568 tokens a row and gives targets of 114."""
    assert longest_piece(512, 114, 0.15, 3.0) == 568
    assert target_length_of(512, 0.15, 3.0) == 114
    assert most_spans(512, None, 0.15, 3.0) == 28
    sizes = np.arange(1, 3000)
    for rate, span in ((0.15, 3.0), (0.5, 3.0), (0.9, 1.5), (0.15, 1.0)):
        hidden, spans = noise_counts(sizes, rate, span)
        assert (hidden >= 1).all()
        assert (spans >= 1).all()
        assert (spans <= hidden).all()
        assert (hidden[1:] < sizes[1:]).all()
        for one in corrupted_lengths(sizes, rate, span):
            assert (np.diff(one) >= 0).all()


def test_every_place_may_be_hidden_and_spans_are_drawn_anew(tmp_path):
    documents = [list(range(1000, 1040))] * 800
    store = store_of(tmp_path, documents, shards=3)
    spec = PackingSpec(40, "seq2seq", 0, 1, 4, 1, 12, 0.15, 3.0)
    plan = plan_packing(store.document_lengths(), spec)
    config = ObjectiveConfig(kind="span-corruption")
    made = batch_of(store, plan, config, seed=1)
    counts = Counter(token for _, target in texts_of(made, plan) for token in target if token >= 1000)
    share = np.array([counts[token] for token in range(1000, 1040)]) / 800
    assert abs(share.mean() - 6 / 40) < 1e-9  # round(40 * 0.15), in each piece
    assert (share[1:] > 0.01).all()
    assert share[0] == 0.0  # T5's code begins a piece with what stays, and ends it with a span
    assert share[39] == 1.0
    other = batch_of(store, plan, config, seed=2)
    assert not np.array_equal(made["input_ids"], other["input_ids"])


def test_too_few_sentinels_are_refused(tmp_path):
    store = store_of(tmp_path, [list(range(1000, 1060))])
    plan = plan_packing(store.document_lengths(), PackingSpec(64, "seq2seq", 0, 1, 4, 1, 60, 0.5, 1.0))
    few = SpecialIds(70_000, (0, 1, 100), pad=0, eos=1, sentinels=(100,))
    draws = Draws(0, np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), 64)
    objective = make_objective(ObjectiveConfig(kind="span-corruption", rate=0.5, span=1.0))
    with pytest.raises(ValueError, match=r"needs 29 sentinels, .*<extra_id_28>.* has 1; train it"):
        objective(assemble_pieces(store, plan, np.array([0]), draws), draws, few)


# --- pairs ----------------------------------------------------------------------------------------------------------

PAIRS = st.lists(st.tuples(st.integers(1, 14), st.integers(1, 14)), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(pairs=PAIRS, length=st.integers(4, 24), target_length=st.integers(4, 24), most=st.integers(1, 5))
def test_pairs_are_whole_and_those_that_fit_are_there_once(tmp_path_factory, pairs, length, target_length, most):
    documents = [
        [*range(1000 + 100 * at, 1000 + 100 * at + s), EOS, *range(1050 + 100 * at, 1050 + 100 * at + t)]
        for at, (s, t) in enumerate(pairs)
    ]
    store = store_of(tmp_path_factory.mktemp("shards"), documents, shards=min(2, len(documents)))
    assert store.source_lengths(EOS).tolist() == [s for s, _ in pairs]
    spec = PackingSpec(length, "seq2seq", 0, 1, most, 1, target_length)
    plan = plan_packing(store.document_lengths(), spec, store.source_lengths(EOS))
    fits = [at for at, (s, t) in enumerate(pairs) if s < length and t < target_length]
    assert plan.left_out == len(pairs) - len(fits)
    assert len(plan.pieces) == len(fits)
    if not fits:
        assert plan.num_rows == 0
        return
    made = batch_of(store, plan, ObjectiveConfig(kind="translation"))
    wanted = Counter()
    for at in fits:
        cut = documents[at].index(EOS)
        wanted[tuple(documents[at][: cut + 1]), (*documents[at][cut + 1 :], EOS)] += 1
    assert Counter((tuple(text), tuple(target)) for text, target in texts_of(made, plan)) == wanted
    assert plan.num_positions == int(np.count_nonzero(made["document_ids"]))
    alone = [
        batch_of(store, plan, ObjectiveConfig(kind="translation"), np.array([row])) for row in range(plan.num_rows)
    ]
    for name, array in made.items():
        assert np.array_equal(array, np.concatenate([one[name] for one in alone]))


def test_rows_of_pairs_are_well_filled():
    generator = np.random.default_rng(0)
    sources = generator.geometric(1 / 9, 20_000)
    targets = np.maximum(1, (sources * generator.uniform(0.6, 1.6, 20_000)).astype(np.int64))
    spec = PackingSpec(128, "seq2seq", 0, 1, 64, 1, 128)
    plan = plan_packing(sources + targets + 1, spec, sources)
    used = np.stack([source_lengths(plan.pieces) + 1, plan.pieces["length"] - source_lengths(plan.pieces)])
    fullest = used.sum(axis=1).max() / (plan.num_rows * 128)  # of the two rows the one that is filled more
    assert fullest > 0.93
    assert (plan.pieces["flags"] & (FIRST | LAST) == FIRST | LAST).all()


def test_a_plan_of_pairs_reads_back_with_what_it_left_out(tmp_path):
    store = store_of(tmp_path, [[5, EOS, 6], [7] * 30 + [EOS, 8]])
    (tmp_path / "train").mkdir()
    spec = PackingSpec(16, "seq2seq", 0, 1, 4, 1, 16)
    for _ in range(2):
        plan = load_or_plan(tmp_path / "train", spec, store, separator=EOS)
        assert (plan.left_out, plan.num_rows) == (1, 1)


@pytest.mark.parametrize("document", [[5, 6], [5, EOS, 6, EOS, 7]])
def test_documents_that_are_no_pairs_are_refused(tmp_path, document):
    store = store_of(tmp_path, [[5, EOS, 6], document])
    with pytest.raises(ArtifactError, match=r"holds no pairs.*data\.text_field: \[source, target\]"):
        store.source_lengths(EOS)


def test_facts_of_other_layouts_are_as_they_were():
    """Plans lie under a name made of their facts: those that are on the disk are found again."""
    assert PackingSpec(512, "encoder", 1, 1, 64).facts() == {
        "sequence_length": 512,
        "layout": "encoder",
        "opening": 1,
        "closing": 1,
        "max_documents_per_row": 64,
        "version": 1,
    }
    with pytest.raises(ValueError, match="holds no text"):
        PackingSpec(16, "seq2seq", 0, 1, 4, 1, 1, 0.15, 3.0)
