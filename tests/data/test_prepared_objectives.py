"""From text to the batch of a step, for each objective: what prepare stores for it, and a data plane that is exact."""

from __future__ import annotations

import numpy as np
import pytest
from objective_runs import OBJECTIVES, run_of, write_text
from rich.console import Console

from pretrain.config import config_from_dict, config_to_dict
from pretrain.config_objective import ObjectiveConfig
from pretrain.data.loader import DataPlane
from pretrain.data.objectives import IGNORE
from pretrain.data.shards import MARKS_SUFFIX
from pretrain.data.verification import verify_data
from pretrain.data_report import report_data
from pretrain.files import ArtifactError, read_manifest
from pretrain.inspect import inspect_step, show, write_page
from pretrain.prepare import is_prepared, prepare_data
from pretrain.ranks import Ranks
from pretrain.tokenizer import train_tokenizer
from pretrain.training.feed import Feed, counts_of, divisors, without_targets


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    write_text(directory)
    return directory


@pytest.fixture(scope="module")
def runs(text, tmp_path_factory):
    """A prepared run for each objective."""
    out = tmp_path_factory.mktemp("runs")
    made = {}
    for name in OBJECTIVES:
        made[name] = run_of(text, out, name)
        train_tokenizer(made[name], console=Console(quiet=True))
        prepare_data(made[name])
    return made


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_is_a_function_of_its_step(runs, name):
    config = runs[name]
    planes = [DataPlane.from_config(config) for _ in range(2)]
    for plane in planes:
        plane.for_run(10)
    assert planes[0].fingerprint == planes[1].fingerprint
    planes[1].batch(2)
    for step in (0, 7, 31):
        whole, again = planes[0].batch(step), planes[1].batch(step)
        parts = [planes[1].batch(step, rows) for rows in (slice(0, 1), slice(1, 6), slice(6, 8))]
        for key, array in whole.arrays.items():
            assert np.array_equal(array, again.arrays[key])
            assert np.array_equal(array, np.concatenate([part.arrays[key] for part in parts])), key
        assert whole.num_targets == sum(part.num_targets for part in parts) > 0
        assert (
            whole.num_tokens == sum(part.num_tokens for part in parts) == np.count_nonzero(whole.arrays["document_ids"])
        )
        for key, count in whole.item_counts.items():
            assert count == sum(part.item_counts[key] for part in parts)
    planes[0].check(planes[1].state(100))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_special_is_a_target_of_masks(runs, name):
    plane = DataPlane.from_config(runs[name])
    special = plane.splits[0].tokens.is_special
    for step in range(3):
        arrays = plane.batch(step).arrays
        labels = arrays["labels"][arrays["labels"] != IGNORE]
        if name in ("corruption", "translation"):
            tokens = plane.splits[0].tokens
            assert set(labels[special[labels]].tolist()) <= {tokens.eos, *tokens.sentinels}
        else:
            assert not special[labels].any()


def test_item_counts_are_those_of_the_second_terms(runs):
    for name, key, array, empty in (
        ("order", "pairs", "sentence_labels", IGNORE),
        ("rtd", "tokens", "document_ids", 0),
    ):
        batch = DataPlane.from_config(runs[name]).batch(0)
        assert batch.item_counts == {key: np.count_nonzero(batch.arrays[array] != empty)}
    for name in ("words", "spans", "corruption", "translation"):
        assert DataPlane.from_config(runs[name]).batch(0).item_counts == {}


def test_validation_masks_do_not_follow_the_training(runs):
    """Rate, words, spans and pairs of training change nothing: the rows of a pass are plain masked rows."""
    first = [next(iter(DataPlane.validation(runs[name]).batches())) for name in ("words", "spans", "order", "next")]
    for batch in first:
        assert sorted(batch.arrays) == ["document_ids", "input_ids", "labels", "position_ids"]
        for key, array in batch.arrays.items():
            assert np.array_equal(array, first[0].arrays[key])
    assert next(iter(DataPlane.validation(runs["rtd"]).batches())).item_counts


def test_marks_are_stored_where_they_are_wanted_and_verified(runs, text):
    for name, config in runs.items():
        marked = list((config.directory / "data").rglob(f"*{MARKS_SUFFIX}"))
        assert bool(marked) == (name in ("words", "order", "next"))
        assert is_prepared(config)
        verify_data(config.directory / "data", full=True)
    facts = read_manifest(runs["spans"].directory / "data", "data").facts["splits"]["train"]["shards"][0]
    assert "marks_digest" not in facts
    plain = run_of(text, runs["words"].out, "words", objective={"whole_words": False})
    assert is_prepared(plain)  # that more is known does no harm
    wanting = run_of(text, runs["spans"].out, "spans", objective={"whole_words": True})
    assert not is_prepared(wanting)
    with pytest.raises(ArtifactError, match=r"not say where words and sentences start.*objective\.whole_words: true"):
        DataPlane.from_config(wanting)


def test_altered_marks_are_found(text, tmp_path):
    config = run_of(text, tmp_path, "words")
    train_tokenizer(config, console=Console(quiet=True))
    prepare_data(config)
    path = next((config.directory / "data").rglob(f"*{MARKS_SUFFIX}"))
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"part-00000\.ds\.marks` was altered"):
        verify_data(config.directory / "data", full=True)
    path.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match="cut off or altered"):
        verify_data(config.directory / "data", full=False)


def test_deduplication_keeps_the_marks_of_what_stays(runs, text, tmp_path):
    (tmp_path / "text.jsonl").write_text((text / "text.jsonl").read_text() * 2)
    once = runs["words"]
    twice = run_of(text, tmp_path, "words", data={"train": [str(tmp_path / "text.jsonl")], "dedup": "exact"})
    taken = {"from": str(once.directory / "tokenizer")}
    twice = config_from_dict({**config_to_dict(twice), "tokenizer": taken})
    train_tokenizer(twice, console=Console(quiet=True))
    prepare_data(twice)
    found: list[set[tuple[bytes, bytes]]] = []
    for config in (once, twice):
        directory = config.directory / "data"
        documents = set()
        for shard in read_manifest(directory, "data").facts["splits"]["train"]["shards"]:
            ids = np.fromfile(directory / f"{shard['name']}.ds", dtype="<u2")
            marks = np.fromfile(directory / f"{shard['name']}{MARKS_SUFFIX}", dtype="u1")
            ends = np.fromfile(directory / f"{shard['name']}.ds.index", dtype="<u8").astype(int)
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                documents.add((ids[start:end].tobytes(), marks[start:end].tobytes()))
        found.append(documents)
    assert found[0] == found[1]


def test_pairs_are_counted_and_reported(runs, text):
    config = runs["translation"]
    facts = read_manifest(config.directory / "data", "data").facts
    assert facts["empty"] == 1
    splits = facts["splits"]
    assert splits["train"]["documents"] + splits["validation"]["documents"] == 151
    plane = DataPlane.from_config(config)
    validation = DataPlane.validation(config)
    assert plane.splits[0].plan.left_out + validation._split.plan.left_out == 1
    if plane.splits[0].plan.left_out:
        assert "1 of " in plane.for_run(10)[0]


def test_a_row_of_pairs_reads_as_the_text(runs, text):
    config = runs["translation"]
    inspected = inspect_step(config, 1)
    pairs = {tuple(line.split("\t")[::2]) for line in (text / "pairs.tsv").read_text().splitlines()}
    for number in inspected.rows:
        for piece in inspected.inspector.row(inspected.batch, number).pieces:
            both = [
                "".join(token.text for token in piece.tokens if (token.kind == "output") == side)
                for side in (False, True)
            ]
            assert tuple(one.removesuffix("</s>") for one in both) in pairs


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batches_and_data_can_be_looked_at(runs, name, tmp_path):
    config = runs[name]
    console = Console(record=True, width=120, file=(tmp_path / "out.txt").open("w"))
    for split in ("train", "validation"):
        inspected = inspect_step(config, 1, split=split)
        show(inspected, console, rows="0:2")
        assert write_page(inspected, tmp_path / "page.html") > 0
    said = console.export_text()
    assert ("pairs of segments" in said) == (name in ("order", "next"))
    assert ("written by the decoder" in said) == (name in ("corruption", "translation"))
    assert inspected.totals.targets == inspected.batch.num_targets
    report = report_data(config)
    assert report["splits"]["train"]["packing"]["rows"] > 0


@pytest.mark.parametrize("name", ["order", "rtd", "words", "translation"])
def test_ranks_agree_on_what_terms_are_divided_by(runs, name):
    """Three processes and 8 rows: the third one's last micro-batch is idle, and knows the same names."""
    data = DataPlane.from_config(runs[name])
    whole = counts_of(Feed(data, 8, 8, Ranks.alone()).micro_batches(0))
    split = [counts_of(Feed(data, 8, 2, Ranks(rank, 3)).micro_batches(0)) for rank in range(3)]
    assert {tuple(counts) for counts in split} == {tuple(whole)}
    assert {key: sum(counts[key] for counts in split) for key in whole} == whole
    given = divisors(whole)
    assert given["num_items_in_batch"] == whole["targets"]
    assert ("item_counts" in given) == (name in ("order", "rtd"))
    idle = without_targets(data.batch(0).arrays)
    assert all((array == IGNORE).all() for key, array in idle.items() if "labels" in key)


def test_sentinels_are_made_with_the_tokenizer(runs, text, tmp_path):
    tokens = DataPlane.from_config(runs["corruption"]).splits[0].tokens
    assert len(tokens.sentinels) == 100
    assert list(tokens.sentinels) == sorted(tokens.sentinels, reverse=True)  # the first has the highest, as T5's
    assert tokens.is_special[list(tokens.sentinels)].all()
    few = run_of(text, tmp_path, "corruption", objective={"span": 1.0, "rate": 0.3})
    few = config_from_dict(
        {**config_to_dict(few), "tokenizer": {"vocab_size": 512, "special_tokens": ["<extra_id_0>"]}}
    )
    train_tokenizer(few, console=Console(quiet=True))
    with pytest.raises(ValueError, match=r"up to \d+ spans of a row of 32, and the tokenizer has 1 sentinels"):
        prepare_data(few)


def test_the_place_in_the_run_decides_a_moving_rate(runs):
    short, long, unknown = (DataPlane.from_config(runs["words"]) for _ in range(3))
    short.for_run(10)
    long.for_run(1000)
    at_first = [plane.batch(9).num_targets for plane in (unknown, long, short)]
    assert at_first[0] <= at_first[1] < at_first[2] / 2
    long.check(short.state(80))  # another budget is for the configuration to refuse
    assert short.batch(500).num_targets > at_first[2] * 0.6  # beyond the end the rate stays


def test_another_objective_is_refused(runs, text):
    state = DataPlane.from_config(runs["spans"]).state(0)
    for changed in ({"span": 2.0}, {"rate": 0.2}, {"final_rate": 0.3}):
        other = run_of(text, runs["spans"].out, "spans", objective=changed)
        with pytest.raises(ValueError, match="objective was"):
            DataPlane.from_config(other).check(state)


def test_a_fingerprint_of_before_holds():
    """The keys that came later stand in no identity, unless they are given."""
    assert ObjectiveConfig(kind="mlm").effective() == {"kind": "mlm", "rate": 0.15, "random": 0.1, "keep": 0.1}
    assert ObjectiveConfig(kind="a:b").effective() == {"kind": "a:b", "rate": 0.15, "random": 0.1, "keep": 0.1}
    assert ObjectiveConfig(kind="causal").effective() == {"kind": "causal"}
    assert ObjectiveConfig(kind="rtd", span=2.0).effective() == {"kind": "rtd", "rate": 0.15, "span": 2.0}


def test_a_trial_cuts_no_pair(text, tmp_path):
    config = run_of(text, tmp_path, "translation")
    train_tokenizer(config, console=Console(quiet=True), max_bytes=3000)
    prepare_data(config, max_bytes=3000)
    manifest = read_manifest(config.directory / "data", "data")
    assert all(split["documents"] > 0 for split in manifest.facts["splits"].values())
    assert DataPlane.from_config(config).batch(0).num_targets > 0


def test_a_taken_tokenizer_has_what_the_objective_needs(runs, text, tmp_path):
    taken = {"tokenizer": {"from": str(runs["corruption"].directory / "tokenizer")}}
    config = config_from_dict(config_to_dict(run_of(text, tmp_path, "corruption")) | taken)
    train_tokenizer(config, console=Console(quiet=True))
    prepare_data(config)
    assert DataPlane.from_config(config).splits[0].tokens == DataPlane.from_config(runs["corruption"]).splits[0].tokens
    for name, other, lacks in (
        ("corruption", "translation", "no sentinels .*<extra_id_0>"),
        ("rtd", "translation", "no mask_token, which objective.kind: rtd needs"),
        ("translation", "words", "no eos_token and pad_token, which a seq2seq needs"),
    ):
        taken = {"tokenizer": {"from": str(runs[other].directory / "tokenizer")}}
        config = config_from_dict(config_to_dict(run_of(text, tmp_path / name, name)) | taken)
        with pytest.raises(ValueError, match=lacks):
            train_tokenizer(config, console=Console(quiet=True))


def test_rows_of_several_sources_meet_in_a_batch(text, tmp_path):
    """Pieces of each source stand in their own rows, whatever the batch is made of."""
    lines = (text / "text.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:80]))
    (tmp_path / "b.jsonl").write_text("".join(lines[80:]))
    sources = [
        {"name": name, "files": [str(tmp_path / f"{name}.jsonl")], "weight": weight}
        for name, weight in (("a", 0.7), ("b", 0.3))
    ]
    for name in ("next", "corruption"):
        config = run_of(text, tmp_path / "mixed", name, data={"train": sources, "workers": 1})
        train_tokenizer(config, console=Console(quiet=True))
        prepare_data(config)
        plane = DataPlane.from_config(config)
        plane.for_run(4)
        whole = plane.batch(1)
        assert len(set(whole.row_ids[:, 0].tolist())) == 2
        alone = [plane.batch(1, slice(row, row + 1)) for row in range(8)]
        for key, array in whole.arrays.items():
            assert np.array_equal(array, np.concatenate([one.arrays[key] for one in alone])), key
