"""The verb `prepare`: the same bytes whatever the workers and however often it was stopped; splits; refusals."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from data_builders import documents, run_config, write_tokenizer
from rich.console import Console

from pretrain import prepare
from pretrain.data.loader import DataPlane
from pretrain.data.preparing import pipeline
from pretrain.data.preparing.parts import input_files
from pretrain.files import ArtifactError, read_manifest, sha256_file, verify_manifest
from pretrain.prepare import is_prepared, prepare_data

TEXT_FILE = "One file,\r\nkept byte for byte: é宋.\n" * 40
TEXTS = [f"document {number}: " + "the quick brown fox " * (number % 17 + 1) for number in range(400)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.txt").write_text(TEXT_FILE, newline="")
    return tmp_path


@pytest.fixture
def small_parts(monkeypatch):
    """Parts far below the configuration's least size, so that little text makes many."""
    made = prepare.make_plan

    def make_plan(data, splits, **keys):
        return made(data.model_copy(update={"part_bytes": 4000}), splits, **keys)

    monkeypatch.setattr(prepare, "make_plan", make_plan)


def prepared(tmp_path, name="run", architecture="gpt2", **data):
    config = run_config(tmp_path, architecture, name, **data)
    if not (config.directory / "tokenizer").exists():
        write_tokenizer(config.directory / "tokenizer", architecture, " ".join(TEXTS[:50]))
    return config, prepare_data(config)


def files_of(directory: Path) -> dict[str, str]:
    return read_manifest(directory, "data").files


def test_every_document_lies_in_one_split_byte_for_byte(corpus, small_parts):
    config, directory = prepared(corpus, train=[str(corpus / "a.jsonl"), str(corpus / "b.txt")], workers=1)
    train, validation = documents(directory, "train"), documents(directory, "validation")
    assert sorted(train + validation) == sorted([*TEXTS, (corpus / "b.txt").read_bytes().decode()])
    assert 1 <= len(validation) <= 30
    manifest = read_manifest(directory, "data")
    verify_manifest(directory, manifest)
    assert manifest.facts["parts"] > 5
    assert manifest.inputs["tokenizer"] == read_manifest(config.directory / "tokenizer", "tokenizer").digest
    for split, texts in (("train", train), ("validation", validation)):
        facts = manifest.facts["splits"][split]
        assert facts["documents"] == len(texts)
        assert facts["bytes"] == sum(len(text.encode()) for text in texts)
    lines = [json.loads(line) for line in (directory / "files.jsonl").read_text().splitlines()]
    assert sum(line["splits"]["train"]["documents"] for line in lines if "train" in line["splits"]) == len(train)
    assert not (config.directory / "data.unfinished").exists()


def test_workers_and_restarts_do_not_change_a_byte(corpus, small_parts, monkeypatch):
    sources = {"train": [str(corpus / "a.jsonl"), str(corpus / "b.txt")]}
    _, one = prepared(corpus, "one", workers=1, **sources)
    _, two = prepared(corpus, "two", workers=2, **sources)
    assert files_of(one) == files_of(two)

    written = []
    whole = pipeline.replace_file

    def fails_at_the_fourth(path, data):
        if path.parent.name == "parts":
            written.append(path.name)
            if len(written) == 4:
                raise OSError("no space left on device")
        whole(path, data)

    monkeypatch.setattr(pipeline, "replace_file", fails_at_the_fourth)
    with pytest.raises(OSError, match="no space"):
        prepared(corpus, "stopped", workers=1, **sources)
    monkeypatch.setattr(pipeline, "replace_file", whole)
    work = corpus / "runs" / "stopped" / "data.unfinished"
    finished = {path.name: path.stat().st_mtime_ns for path in (work / "parts").iterdir()}
    assert len(finished) == 3
    damaged = next((work / "data" / "train").glob("part-00001.ds"))
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"\x00\x00")

    seen = {}
    finish = prepare.finish

    def look(work, *rest, **keys):
        seen.update({path.name: path.stat().st_mtime_ns for path in (work / "parts").iterdir()})
        return finish(work, *rest, **keys)

    monkeypatch.setattr(prepare, "finish", look)
    _, again = prepared(corpus, "stopped", workers=2, **sources)
    assert files_of(again) == files_of(one)
    kept = [name for name, time in finished.items() if seen[name] == time]
    assert len(kept) == 2  # the damaged part was made again, the two whole ones were not


def test_what_is_made_is_kept_and_what_changed_is_refused(corpus):
    config, directory = prepared(corpus, train=[str(corpus / "a.jsonl")])
    before = (directory / "manifest.json").stat().st_mtime_ns
    assert is_prepared(config)
    assert prepare_data(config) == directory
    assert (directory / "manifest.json").stat().st_mtime_ns == before
    longer = run_config(corpus, train=[str(corpus / "a.jsonl")], sequence_length=64)
    assert is_prepared(longer)  # rows are planned anew, shards are not

    text = (corpus / "a.jsonl").read_text()
    (corpus / "a.jsonl").write_text(text)  # same bytes, another time
    assert is_prepared(config)
    (corpus / "a.jsonl").write_text(text + '{"text": "more"}\n')
    assert not is_prepared(config)
    with pytest.raises(ArtifactError, match="another configuration, text or tokenizer; give another name="):
        prepare_data(config)
    (corpus / "a.jsonl").write_text(text)
    assert not is_prepared(run_config(corpus, train=[str(corpus / "a.jsonl")], validation={"fraction": 0.5}))


def test_tail_of_one_text_is_cut_at_its_bytes(corpus):
    text = "ab宋c\n" * 1000
    (corpus / "c.txt").write_text(text)
    _, directory = prepared(corpus, train=[str(corpus / "c.txt")], validation={"tail": 0.1})
    (train,), (validation,) = documents(directory, "train"), documents(directory, "validation")
    assert train + validation == text
    assert 0 <= len(text.encode()) * 0.9 - len(train.encode()) < 3


def test_tail_of_many_documents_goes_by_where_they_start(corpus, small_parts):
    _, directory = prepared(corpus, train=[str(corpus / "a.jsonl")], validation={"tail": 0.25})
    train, validation = documents(directory, "train"), documents(directory, "validation")
    assert train + validation == TEXTS
    share = sum(map(len, validation)) / sum(map(len, TEXTS))
    assert 0.2 < share < 0.27


def test_named_validation_sets(corpus):
    validation = [str(corpus / "b.txt"), {"name": "more", "files": [str(corpus / "c.txt")]}]
    (corpus / "c.txt").write_text("held out\n")
    config, directory = prepared(corpus, train=[str(corpus / "a.jsonl")], validation=validation)
    assert documents(directory, "train") == TEXTS
    assert documents(directory, "validation-more") == ["held out\n"]
    assert DataPlane.validation_splits(config) == ["validation", "validation-more"]
    both = [str(corpus / "a.jsonl")]
    with pytest.raises(ValueError, match="comes twice"):
        prepared(corpus, "leak", train=both, validation=both)


def test_a_text_that_spells_a_special_token_does_not_make_one(corpus):
    (corpus / "c.txt").write_text("end <|endoftext|> of text\n" * 20)
    _, directory = prepared(corpus, train=[str(corpus / "c.txt")], validation=[str(corpus / "b.txt")])
    manifest = read_manifest(directory, "data")
    ids = np.fromfile(directory / "train" / "part-00000.ds", dtype="<u2")
    assert not set(ids.tolist()) & set(manifest.facts["tokenizer"]["all_special_ids"])
    assert documents(directory, "train") == [(corpus / "c.txt").read_text()]


def test_bad_lines_are_skipped_counted_and_named(corpus):
    good = (corpus / "a.jsonl").read_bytes()
    (corpus / "c.jsonl").write_bytes(good + b"{broken\n" + b'{"text": ""}\n')
    _, directory = prepared(corpus, train=[str(corpus / "c.jsonl")])
    facts = read_manifest(directory, "data").facts
    name = str(corpus / "c.jsonl")
    assert facts["bad"]["count"] == 1
    assert facts["bad"]["named"] == [f"{name}:401: not a JSON object"]
    assert (facts["bad"]["by_kind"], facts["bad"]["by_file"]) == ({"json": 1}, {name: 1})
    assert facts["empty"] == 1
    assert sum(split["documents"] for split in facts["splits"].values()) == 400


@pytest.mark.parametrize(
    ("text", "validation", "message"),
    [
        ('{"text": "only one"}\n', {"fraction": 0.01}, "data.validation: split `validation` is empty"),
        ('{"text": "only one"}\n', {"fraction": 0.999999999}, "data.validation: nothing is left to train on"),
        ("{broken\n", {"fraction": 0.5}, "gave no tokens at all; the first problem: .*c.jsonl:1: not a JSON object"),
        ('{"body": "x"}\n', {"fraction": 0.5}, "data.text_field.* the fields are: body"),
    ],
)
def test_empty_splits_and_missing_fields_are_errors(corpus, text, validation, message):
    (corpus / "c.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        prepared(corpus, train=[str(corpus / "c.jsonl")], validation=validation)


def test_the_tokenizer_must_be_there_and_whole(corpus):
    config = run_config(corpus, train=[str(corpus / "a.jsonl")])
    with pytest.raises(ArtifactError, match="holds no tokenizer"):
        prepare_data(config)
    write_tokenizer(config.directory / "tokenizer", "gpt2")
    path = config.directory / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ArtifactError, match="was altered"):
        prepare_data(config)


def test_a_trial_reads_the_first_bytes_and_has_both_splits(corpus):
    config = run_config(corpus, train=[str(corpus / "a.jsonl")], validation={"fraction": 0.001})
    write_tokenizer(config.directory / "tokenizer", "gpt2", "the quick brown fox")
    directory = prepare_data(config, max_bytes=5000)
    splits = read_manifest(directory, "data").facts["splits"]
    assert 4000 < splits["train"]["bytes"] + splits["validation"]["bytes"] < 6000
    assert splits["validation"]["documents"] > 1
    assert not is_prepared(config)


def bytes_read() -> int:
    """What this process has asked the system to read so far."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="needs Linux's counters")
@pytest.mark.parametrize(
    ("name", "validation"),
    [
        ("c.txt", {"tail": 0.1}),
        ("c.jsonl", {"tail": 0.1}),
        ("c.jsonl", {"fraction": 0.001}),
        ("c.csv", {"fraction": 0.02}),
    ],
)
def test_a_trial_reads_no_more_of_a_large_file(corpus, name, validation):
    path = corpus / name
    path.write_text("text\n" + "".join(f"{text}\n" for text in TEXTS))
    if name == "c.jsonl":
        path.write_bytes((corpus / "a.jsonl").read_bytes())
    os.truncate(path, 400_000_000)  # zeros that take no room on the disk
    config = run_config(corpus, train=[str(path), str(corpus / "b.txt")], validation=validation, workers=1)
    write_tokenizer(config.directory / "tokenizer", "gpt2")
    before = bytes_read()
    directory = prepare_data(config, max_bytes=5000)
    assert bytes_read() - before < 40_000_000
    facts = read_manifest(directory, "data").facts
    splits = facts["splits"]
    assert 4000 < splits["train"]["bytes"] + splits["validation"]["bytes"] < 6000
    assert 0.2 < splits["validation"]["bytes"] / splits["train"]["bytes"] < 0.4
    assert facts["bad"]["count"] == 0
    assert (directory / "files.jsonl").read_text().count('"sha256": ""') == 1  # the second file was not needed


def test_a_trial_does_not_ask_for_the_size_of_compressed_text(corpus, monkeypatch):
    (corpus / "c.jsonl.gz").write_bytes(gzip.compress((corpus / "a.jsonl").read_bytes()))
    config = run_config(corpus, train=[str(corpus / "c.jsonl.gz")], validation={"tail": 0.1}, workers=1)
    write_tokenizer(config.directory / "tokenizer", "gpt2")
    monkeypatch.setattr("pretrain.data.preparing.parts.units", lambda file: pytest.fail("a pass over the whole text"))
    splits = read_manifest(prepare_data(config, max_bytes=5000), "data").facts["splits"]
    assert 4000 < splits["train"]["bytes"] + splits["validation"]["bytes"] < 6000


def test_a_trial_of_one_text_has_both_splits(corpus):
    config = run_config(corpus, train=[str(corpus / "b.txt")], validation={"tail": 0.1})
    write_tokenizer(config.directory / "tokenizer", "gpt2")
    directory = prepare_data(config, max_bytes=1_000_000)
    assert documents(directory, "train")[0] + documents(directory, "validation")[0] == TEXT_FILE


def test_a_share_of_one_document_is_refused_at_once(corpus):
    with pytest.raises(ValueError, match=r"0\.02 cannot be held out of `.*b\.txt`, one document; use \{tail"):
        prepared(corpus, train=[str(corpus / "b.txt")], validation={"fraction": 0.02})


def test_hashing_is_shown(corpus):
    config, _ = prepared(corpus, train=[str(corpus / "a.jsonl"), str(corpus / "b.txt")])
    (corpus / "a.jsonl").touch()  # another time, so all is hashed again
    sink = io.StringIO()
    assert is_prepared(config, console=Console(file=sink, force_terminal=True, width=120))
    assert "hashing the text" in sink.getvalue()
    size = sum((corpus / name).stat().st_size for name in ("a.jsonl", "b.txt"))
    told = []
    plan = prepare.make_plan(
        config.data,
        input_files(config.data),
        tokenizer="",
        tokenizer_digest="",
        vocab_size=0,
        max_bytes=None,
        told=told.append,
    )
    assert sum(told) == size
    assert plan.digests[1] == sha256_file(corpus / "b.txt")


def test_progress_is_reported(corpus, small_parts):
    config = run_config(corpus, train=[str(corpus / "a.jsonl")])
    write_tokenizer(config.directory / "tokenizer", "gpt2")
    told = []
    prepare_data(config, report=lambda done, total: told.append((done, total)))
    size = (corpus / "a.jsonl").stat().st_size
    assert told[-1] == (size, size)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
