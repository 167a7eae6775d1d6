"""The data plane: the batch of a step depends on data, seed and step alone; each row once an epoch."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import pairwise

import numpy as np
import pytest
from data_builders import run_config, write_tokenizer

from pretrain.config import ObjectiveConfig
from pretrain.data.loader import DataPlane
from pretrain.data.validation import VALIDATION_BATCH_TOKENS, ValidationData
from pretrain.files import ArtifactError, read_manifest
from pretrain.prepare import prepare_data

CAUSAL, MLM = ObjectiveConfig(kind="causal"), ObjectiveConfig(kind="mlm", rate=0.4)
KEYS = {"sequence_length": 16, "rows_per_batch": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """architecture -> a prepared run."""
    root = tmp_path_factory.mktemp("loader")
    texts = [f"text {number} " + "abc def " * (number % 13) for number in range(300)]
    (root / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = {}
    for architecture in ("gpt2", "bert"):
        made[architecture] = run_config(
            root, architecture, architecture, train=[str(root / "a.jsonl")], validation={"fraction": 0.1}, workers=1
        )
        write_tokenizer(made[architecture].directory / "tokenizer", architecture)
        prepare_data(made[architecture])
    return made


def plane(config, objective, split="train", **keys):
    return DataPlane.from_directory(config.directory / "data", split, objective=objective, **{**KEYS, **keys})


@pytest.mark.parametrize(("architecture", "objective"), [("gpt2", CAUSAL), ("bert", MLM)])
def test_a_batch_is_the_same_however_it_is_split(runs, architecture, objective):
    whole = plane(runs[architecture], objective).batch(5)
    again = plane(runs[architecture], objective)
    for sizes in ([8], [1] * 8, [3, 5]):
        bounds = np.cumsum([0, *sizes])
        parts = [again.batch(5, slice(a, b)) for a, b in pairwise(bounds.tolist())]
        for name, array in whole.arrays.items():
            assert np.array_equal(np.concatenate([part.arrays[name] for part in parts]), array)
        assert sum(part.num_targets for part in parts) == whole.num_targets
        assert sum(part.num_tokens for part in parts) == whole.num_tokens
        assert np.array_equal(np.concatenate([part.row_ids for part in parts]), whole.row_ids)
    wanted = {"input_ids", "position_ids", "document_ids", "labels" if objective is MLM else "shift_labels"}
    assert set(whole.arrays) == wanted


@pytest.mark.parametrize(("rows_per_batch", "processes"), [(8, 1), (7, 2), (9, 3), (64, 8)])
def test_each_row_comes_once_an_epoch_for_any_number_of_processes(runs, rows_per_batch, processes):
    data = plane(runs["gpt2"], CAUSAL, rows_per_batch=rows_per_batch)
    steps = -(-3 * data.num_rows // rows_per_batch)
    seen = []
    for step in range(steps):
        for process in range(processes):
            share = slice(rows_per_batch * process // processes, rows_per_batch * (process + 1) // processes)
            seen += data.batch(step, share).row_ids.tolist()
    in_epochs = [row for row in seen if row[1] < 3]
    assert len(in_epochs) == len({tuple(row) for row in in_epochs}) == 3 * data.num_rows


def test_masks_change_with_the_epoch_and_the_seed(runs):
    data, other = plane(runs["bert"], MLM), plane(runs["bert"], MLM, seed=1)
    by_row = {}
    for step in range(2 * data.num_rows // 8):
        batch = data.batch(step)
        for (_, _, row), labels in zip(batch.row_ids.tolist(), batch.arrays["labels"], strict=True):
            by_row.setdefault(row, []).append(labels)
    twice = [labels for labels in by_row.values() if len(labels) == 2]
    assert np.mean([np.array_equal(*labels) for labels in twice]) < 0.2
    assert data.batch(0).row_ids.tolist() != other.batch(0).row_ids.tolist()


def test_targets_that_the_model_does_not_take_are_refused(runs, tmp_path, monkeypatch):
    """An own objective of the other kind, or one that returns nothing, is told apart from a fault of the model."""
    (tmp_path / "kinds.py").write_text(
        "def next_token(rows, draws, tokens):\n"
        "    return {'input_ids': rows.input_ids, 'shift_labels': rows.next_ids.astype('int32')}\n"
        "def nothing(rows, draws, tokens):\n"
        "    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    own, nothing = (ObjectiveConfig(kind=f"kinds:{name}") for name in ("next_token", "nothing"))
    batch = plane(runs["gpt2"], own, layout="decoder").batch(0)
    assert batch.arrays["shift_labels"].dtype == np.int64
    assert batch.num_targets == plane(runs["gpt2"], CAUSAL).batch(0).num_targets
    with pytest.raises(ValueError, match="needed are input_ids and labels for an encoder"):
        plane(runs["bert"], own, layout="encoder").batch(0)
    with pytest.raises(ValueError, match="kinds:nothing returned a NoneType; return a dict"):
        plane(runs["gpt2"], nothing).batch(0)


def test_the_first_batch_far_out_needs_no_walk(runs):
    data = plane(runs["gpt2"], CAUSAL)
    assert data.batch(10**9).arrays["input_ids"].shape == (8, 16)


def test_a_state_of_other_data_is_refused_with_the_difference(runs):
    config = runs["bert"]
    data = plane(config, MLM)
    state = json.loads(json.dumps(data.state(80)))
    assert (state["fingerprint"], state["seed"], state["samples_seen"]) == (data.fingerprint, 0, 80)
    plane(config, MLM).check(state)
    for other, said in [
        (plane(config, MLM, sequence_length=24), "packing was .*16.* is .*24"),
        (plane(config, MLM, max_documents_per_row=3), "packing was"),
        (plane(config, ObjectiveConfig(kind="mlm", rate=0.3)), "objective was .*0.4.* is .*0.3"),
        (plane(config, MLM, seed=5), "seed was 0, is 5"),
        (plane(config, MLM, split="validation"), "shards was"),
    ]:
        with pytest.raises(ValueError, match=f"the checkpoint saw other data: {said}"):
            other.check(state)


def test_validation_rows_come_once_with_masks_of_their_own(runs):
    config = runs["bert"]
    keys = {"objective": MLM, "sequence_length": 16, "batch_tokens": 8 * 16}
    data = ValidationData.from_directory(config.directory / "data", **keys)
    batches = list(data.batches())
    ids = np.concatenate([batch.row_ids for batch in batches])
    assert ids[:, 2].tolist() == list(range(data.num_rows))
    facts = read_manifest(config.directory / "data", "data").facts["splits"]["validation"]
    assert data.batches().num_bytes == facts["bytes"]
    payload = facts["tokens"]
    assert abs(sum(batch.num_targets for batch in batches) / payload - 0.15) < 0.04
    keys |= {"objective": ObjectiveConfig(kind="mlm", rate=0.8, random=1.0, keep=0.0), "batch_tokens": 3 * 16 + 5}
    again = list(ValidationData.from_directory(config.directory / "data", **keys).batches())
    for name in ("input_ids", "labels"):
        assert np.array_equal(
            np.concatenate([batch.arrays[name] for batch in batches]),
            np.concatenate([batch.arrays[name] for batch in again]),
        )


def test_validation_batches_have_a_size_of_their_own(runs):
    """An optimizer step may be far larger than what one forward pass holds in memory."""
    config = runs["gpt2"]
    large = config.model_copy(update={"train": config.train.model_copy(update={"batch_tokens": 1 << 20})})
    data = DataPlane.validation(large)
    assert data.rows_per_batch * large.data.sequence_length == VALIDATION_BATCH_TOKENS == 8192
    keys = {"objective": CAUSAL, "sequence_length": 16}
    assert ValidationData.from_directory(config.directory / "data", **keys, batch_tokens=3).rows_per_batch == 1


def test_validation_scores_every_token_and_can_be_cut_short(runs):
    config = runs["gpt2"]
    data = DataPlane.validation(config)
    facts = read_manifest(config.directory / "data", "data").facts["splits"]["validation"]
    assert sum(batch.num_targets for batch in data.batches()) == facts["tokens"] + facts["documents"]
    part = data.batches(max_tokens=3 * 32 + 5)
    assert part.num_rows == 3
    assert sum(len(batch.row_ids) for batch in part) == 3
    assert 0 < part.num_bytes < data.num_bytes
    assert [b.row_ids.tolist() for b in part] == [b.row_ids.tolist() for b in data.batches(max_tokens=3 * 32)]


def test_another_tokenizer_than_the_datas_is_refused(runs, tmp_path):
    config = runs["gpt2"]
    DataPlane.from_config(config)
    write_tokenizer(tmp_path / "tokenizer", "gpt2", "other text " * 9)
    with pytest.raises(ArtifactError, match="was prepared with another tokenizer"):
        plane(config, CAUSAL, tokenizer_directory=tmp_path / "tokenizer")


def test_a_directory_that_cannot_be_written_is_planned_in_memory(runs, tmp_path, monkeypatch):
    shutil.copytree(runs["gpt2"].directory / "data", tmp_path / "data")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    keys = {"objective": CAUSAL, "sequence_length": 20, "rows_per_batch": 2}
    before = set((tmp_path / "data").rglob("*"))
    DataPlane.from_directory(tmp_path / "data", **keys).batch(0)
    assert set((tmp_path / "data").rglob("*")) == before
    with pytest.raises(ArtifactError, match="has no split `validation-x`; it has train, validation"):
        DataPlane.from_directory(tmp_path / "data", "validation-x", **keys)
