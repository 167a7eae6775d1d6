"""Mixtures: exact shares at every point, phases, sources that run out; and coverage, counted token by token."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from data_builders import run_config, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import ObjectiveConfig, config_from_dict, config_to_dict
from pretrain.config_text import ConfigError
from pretrain.data.loader import DataPlane
from pretrain.data.mixture import Weights, count_of, plan_mixture, share_out
from pretrain.data.shards import ShardWriter
from pretrain.files import read_manifest, write_manifest
from pretrain.prepare import is_prepared, prepare_data

weights = st.lists(st.integers(0, 1000), min_size=1, max_size=9).filter(any)


@given(weights=weights, start=st.integers(0, 10**12))
def test_counts_never_leave_the_shares_by_two_samples(weights, start):
    total = sum(weights)
    for samples in (*range(40), start, start + 1):
        counts = [count_of(samples, tuple(weights), source) for source in range(len(weights))]
        assert sum(counts) == samples
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - Fraction(samples * weight, total)) < 2
            assert weight or not count


@given(weights=weights, start=st.integers(0, 10**12))
def test_access_at_any_sample_agrees_with_counting(weights, start):
    samples = np.arange(start, start + 50, dtype=np.int64)
    sources, numbers = share_out(samples, tuple(weights))
    counts = [count_of(start, tuple(weights), source) for source in range(len(weights))]
    for source, number in zip(sources.tolist(), numbers.tolist(), strict=True):
        assert number == counts[source]
        counts[source] += 1
    assert counts == [count_of(start + 50, tuple(weights), source) for source in range(len(weights))]


@settings(deadline=None)
@given(
    phases=st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=1, max_size=3),
    limits=st.lists(st.sampled_from([None, 0.5, 1.0, 2.5]), min_size=3, max_size=3),
)
def test_phases_and_limits_agree_with_a_sample_by_sample_walk(phases, limits):
    names, rows, batch = ("a", "b", "c"), (40, 7, 23), 4
    asked = tuple(
        (number * 10 if number < len(phases) else None, {name: float(w) for name, w in zip(names, row, strict=True)})
        for number, row in enumerate(phases, start=1)
    )
    most = {name: limit for name, limit in zip(names, limits, strict=True) if limit is not None}
    mixture = plan_mixture(names, rows, Weights(asked, most), rows_per_batch=batch, total_steps=60)
    end = mixture.end if mixture.end is not None else 240
    sources, numbers = mixture.locate(np.arange(end, dtype=np.int64))
    seen = [0, 0, 0]
    for sample, (source, number) in enumerate(zip(sources.tolist(), numbers.tolist(), strict=True)):
        assert number == seen[source], "a sample of a source is left out or comes twice"
        seen[source] += 1
        limit = limits[source]
        assert limit is None or seen[source] <= int(limit * rows[source])
        if sample % 29 == 0:
            assert tuple(seen) == mixture.counts(sample + 1)
    for stretch, after in zip(mixture.stretches, [*mixture.stretches[1:], None], strict=True):
        stop = after.start if after is not None else end
        for sample in range(stretch.start, stop, 7):
            counts = np.array(mixture.counts(sample)) - stretch.before
            due = (sample - stretch.start) * np.array(stretch.weights) / sum(stretch.weights)
            assert (np.abs(counts - due) < 2).all()
    if mixture.end is not None:
        assert all(limit is not None for limit in limits)
        with pytest.raises(ValueError, match="max_epochs"):
            mixture.locate(np.array([mixture.end]))


def test_phases_given_as_shares_follow_the_length_of_the_run():
    asked = Weights((("50%", {"a": 1.0}), (None, {"b": 1.0})), {})
    mixture = plan_mixture(("a", "b"), (9, 9), asked, rows_per_batch=2, total_steps=10)
    assert [stretch.start for stretch in mixture.stretches] == [0, 10]
    assert mixture.locate(np.arange(8, 12))[0].tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="not after the phase before"):
        plan_mixture(("a", "b"), (9, 9), asked, rows_per_batch=2, total_steps=0)


def test_a_limit_below_one_row_is_refused():
    asked = Weights(((None, {"a": 1.0, "b": 1.0}),), {"b": 0.01})
    with pytest.raises(ValueError, match="less than one of its 9 rows"):
        plan_mixture(("a", "b"), (9, 9), asked, rows_per_batch=2, total_steps=10)


# --- a prepared run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A run of three sources, web, code and law, with weights 6, 3 and 1."""
    root = tmp_path_factory.mktemp("mixed")
    for name, count in (("web", 300), ("code", 200), ("law", 60)):
        rows = [{"text": f"{name} {number} " + f"{name} words " * (number % 11)} for number in range(count)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [
        {"name": name, "files": [str(root / f"{name}.jsonl")], "weight": weight}
        for name, weight in (("web", 0.6), ("code", 0.3), ("law", 0.1))
    ]
    config = run_config(root, "gpt2", train=sources, validation={"fraction": 0.2}, workers=1)
    write_tokenizer(config.directory / "tokenizer", "gpt2")
    prepare_data(config)
    return config


def changed(config, **data):
    plain = config_to_dict(config)
    plain["data"] |= data
    return config_from_dict(plain)


def text_of(config, batch, row):
    ids = batch.arrays["input_ids"][row]
    return bytes(ids[ids > 2].astype(np.uint8))


def test_every_source_has_a_train_and_a_validation_split(mixed):
    splits = read_manifest(mixed.directory / "data", "data").facts["splits"]
    assert set(splits) == {f"{split}-{name}" for split in ("train", "validation") for name in ("web", "code", "law")}
    assert DataPlane.validation_splits(mixed) == ["validation-web", "validation-code", "validation-law"]
    assert is_prepared(changed(mixed, train=config_to_dict(mixed)["data"]["train"]))


def test_realised_shares_match_the_weights_at_every_step(mixed):
    data = DataPlane.from_config(mixed)
    assert data.sources == ("web", "code", "law")
    seen = np.zeros(3)
    for step in range(200):
        seen += np.bincount(data.batch(step).row_ids[:, 0], minlength=3)
        assert np.abs(seen - np.array([0.6, 0.3, 0.1]) * seen.sum()).max() < 2 <= data.rows_per_batch


def test_each_source_is_a_stream_with_epochs_of_its_own(mixed):
    data = DataPlane.from_config(mixed)
    ids = np.concatenate([data.batch(step).row_ids for step in range(600)])
    for source, rows in enumerate(data.rows):
        own = ids[ids[:, 0] == source]
        assert np.array_equal(own[:, 1], np.arange(len(own)) // rows)
        whole = own[: len(own) // rows * rows, 2].reshape(-1, rows)
        assert len(whole) >= 2
        assert all(sorted(epoch) == list(range(rows)) for epoch in whole.tolist())
        assert whole[0].tolist() != whole[1].tolist()


def test_a_source_is_the_same_stream_whatever_stands_beside_it(mixed):
    three = DataPlane.from_config(mixed)
    alone = changed(
        mixed, phases=[], train=[{**s, "weight": 0.0 if s["name"] != "code" else 1.0} for s in sources(mixed)]
    )
    one = DataPlane.from_config(alone)
    rows = [batch.row_ids for batch in (three.batch(step) for step in range(40))]
    codes = np.concatenate([ids[ids[:, 0] == 1] for ids in rows])
    assert np.array_equal(np.concatenate([one.batch(step).row_ids for step in range(12)])[: len(codes)], codes[:48])


def sources(config):
    return config_to_dict(config)["data"]["train"]


def test_weights_and_phases_do_not_touch_the_shards_but_the_fingerprint(mixed):
    other = changed(mixed, train=[{**source, "weight": 1.0} for source in sources(mixed)])
    assert is_prepared(other)
    phased = changed(
        mixed,
        train=[{**source, "weight": None} for source in sources(mixed)],
        phases=[{"until": "50%", "weights": {"web": 1.0}}, {"weights": {"web": 1.0, "law": 1.0}}],
    )
    assert is_prepared(phased)
    state = DataPlane.from_config(mixed).state(8)
    for config in (other, phased):
        with pytest.raises(ValueError, match="mixture was"):
            DataPlane.from_config(config).check(state)
    data = DataPlane.from_config(phased)
    data.for_run(20)
    assert set(np.concatenate([data.batch(step).row_ids[:, 0] for step in range(10)]).tolist()) == {0}
    assert np.bincount(np.concatenate([data.batch(step).row_ids[:, 0] for step in range(10, 20)])).tolist() == [
        20,
        0,
        20,
    ]


def test_repetition_is_told_and_limits_are_kept(mixed):
    data = DataPlane.from_config(mixed)
    assert data.for_run(1) == []
    law = data.rows[2]
    steps = 10 * 5 * law // data.rows_per_batch
    assert any("source law is read 5." in line for line in data.for_run(steps))
    capped = changed(mixed, train=[{**source, "max_epochs": 1.0} for source in sources(mixed)])
    plane = DataPlane.from_config(capped)
    total = plane.num_rows // plane.rows_per_batch
    assert plane.for_run(total) == []
    ids = [tuple(row) for step in range(total) for row in plane.batch(step).row_ids.tolist()]
    assert len(set(ids)) == len(ids) == total * plane.rows_per_batch
    with pytest.raises(ValueError, match=f"used up after step {plane.num_rows // plane.rows_per_batch}"):
        plane.for_run(total + 1)


def test_a_plain_list_is_drawn_as_one_set_and_names_only_part_the_validation(mixed):
    plain = changed(mixed, train=[{**source, "weight": None} for source in sources(mixed)])
    data = DataPlane.from_config(plain)
    assert data.mixture is None
    steps = -(-data.num_rows // data.rows_per_batch)
    ids = [tuple(row) for step in range(steps) for row in data.batch(step).row_ids.tolist()][: data.num_rows]
    assert len(set(ids)) == data.num_rows
    first = np.concatenate([data.batch(step).row_ids[:, 0] for step in range(steps // 2)])
    assert len(set(first.tolist())) == 3, "sources must be shuffled among each other"


def test_batches_of_a_mixture_do_not_depend_on_how_they_are_split(mixed):
    data = DataPlane.from_config(mixed)
    for step in (0, 7, 10**8):
        whole = data.batch(step)
        parts = [data.batch(step, slice(a, b)) for a, b in ((0, 1), (1, 3), (3, 4))]
        for name, array in whole.arrays.items():
            assert np.array_equal(np.concatenate([part.arrays[name] for part in parts]), array)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": ["a.txt", {"name": "b", "files": ["b.txt"], "weight": 1.0}]}, "no name and weight"),
        ({"train": [{"name": "b", "files": ["b"], "weight": 1.0}, {"name": "c", "files": ["c"]}]}, "has no weight"),
        ({"train": [{"name": "b", "files": ["b"], "weight": 0.0}]}, "all weights are 0"),
        ({"train": [{"name": "b", "files": ["b"], "weight": 1.0}] * 2}, "two sources are called"),
        ({"train": [{"name": "b", "files": ["b"], "max_epochs": 2.0}]}, "needs weights"),
        ({"train": [{"name": "b", "files": ["b"]}], "phases": [{"weights": {"x": 1.0}}]}, "no source of train"),
        ({"train": [{"name": "b", "files": ["b"]}], "phases": [{"until": 5, "weights": {"b": 1.0}}]}, "until"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(tmp_path, data, message):
    with pytest.raises(ConfigError, match=message):
        run_config(tmp_path, "gpt2", **data)


# --- coverage -------------------------------------------------------------------------------------------------------


def shards_of_unique_ids(directory: Path, files: int) -> int:
    """A prepared split of so many shards in which no id stands twice; returns the number of ids."""
    lengths = np.random.default_rng(files).integers(1, 90, 60 * files)
    vocabulary = 8 + int(lengths.sum())
    shards, first = [], 8
    for number, part in enumerate(np.array_split(lengths, files)):
        name = f"train/part-{number:05d}"
        with ShardWriter(directory / name, name, vocabulary) as writer:
            writer.add(np.arange(first, first + part.sum(), dtype=np.uint32), part, 1)
        first += int(part.sum())
        shards.append(asdict(writer.facts()))
    facts = {
        "tokenizer": {
            "vocab_size": vocabulary,
            "special_ids": {"bos": 0, "eos": 0, "pad": 1},
            "all_special_ids": [0, 1],
        },
        "splits": {"train": {"documents": len(lengths), "tokens": vocabulary - 8, "bytes": 1, "shards": shards}},
    }
    write_manifest(directory, kind="data", config={}, facts=facts)
    return vocabulary - 8


@pytest.mark.parametrize("files", [1, 4, 8, 12])
def test_every_payload_token_comes_exactly_once_an_epoch(tmp_path, files):
    tokens = shards_of_unique_ids(tmp_path, files)
    for ranks in (1, 2, 3, 8):
        for workers in (0, 2):
            data = DataPlane.from_directory(
                tmp_path, objective=ObjectiveConfig(kind="causal"), sequence_length=32, rows_per_batch=12
            )
            steps = -(-2 * data.num_rows // 12)
            shares = [slice(12 * rank // ranks, 12 * (rank + 1) // ranks) for rank in range(ranks)]
            jobs = [(step, share) for step in range(steps) for share in shares]
            if workers:
                with ThreadPoolExecutor(workers) as pool:
                    made = list(pool.map(data.batch, *zip(*jobs, strict=True)))
            else:
                made = [data.batch(*job) for job in jobs]
            epochs = np.concatenate([batch.row_ids[:, 1] for batch in made])
            ids = np.concatenate([batch.arrays["input_ids"] for batch in made])
            targets = np.concatenate([batch.arrays["shift_labels"] for batch in made])
            for epoch in (0, 1):
                for kind, array in (("input", ids), ("target", targets)):
                    counts = np.bincount(array[epochs == epoch][array[epochs == epoch] >= 8], minlength=tokens + 8)[8:]
                    assert (counts == 1).all(), (files, ranks, workers, kind)
