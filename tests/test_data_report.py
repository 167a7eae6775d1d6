"""`pretrain data`: its counts are those of a slow reference, and what is planted is found."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from data_builders import run_config, write_tokenizer
from test_inspect import check_page

from pretrain.cli import app
from pretrain.config import dump_config
from pretrain.data.loader import DataPlane
from pretrain.data.looking import statistics
from pretrain.data.looking.statistics import QUANTILES, Lengths, count_shared, count_split, find_repeated, first_of
from pretrain.data.preparing.splits import is_held_out
from pretrain.data.shards import ShardFacts, ShardWriter, TokenStore
from pretrain.data_report import report_data, show, write_page
from pretrain.prepare import prepare_data

PLANTED = "a planted text, \x1b[31mred\x1b[0m & <script>alert(1)</script>, that comes again and again"
TEXTS = [f"document {number} says " + f"word{number % 13} " * (number % 29 + 1) for number in range(200)]
CORPUS = [*TEXTS[:70], PLANTED, *TEXTS[70:], PLANTED, TEXTS[3], PLANTED]
HELD_OUT = ["only here", PLANTED, "and here", "and here"]


def written(directory: Path, documents: list[list[int]], *, shards: int = 1, vocab_size: int = 500) -> TokenStore:
    """Documents of ids in shards of about equal numbers of documents."""
    (directory / "train").mkdir(parents=True)
    facts: list[ShardFacts] = []
    for number in range(shards):
        part = documents[number * len(documents) // shards : (number + 1) * len(documents) // shards]
        name = f"train/part-{number:05d}"
        with ShardWriter(directory / name, name, vocab_size) as writer:
            ids = np.array([token for document in part for token in document], dtype=np.uint32)
            writer.add(ids, np.array([len(document) for document in part], dtype=np.int64), 0)
        facts.append(writer.facts())
    return TokenStore(directory, facts, vocab_size)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    lines = [json.dumps({"text": text}) for text in CORPUS]
    lines[10:10] = ["{broken", '{"text": ""}']
    (root / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (root / "v.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in HELD_OUT), encoding="utf-8")
    config = run_config(
        root, "gpt2", train=[str(root / "a.jsonl")], validation=[str(root / "v.jsonl")], workers=1, max_bad_share=0.5
    )
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 2000})})
    write_tokenizer(config.directory / "tokenizer", "gpt2", " ".join(TEXTS), vocab_size=300)
    prepare_data(config)
    return config, report_data(config)


def test_counts_are_those_of_a_slow_reference(run):
    config, report = run
    tokenizer = Tokenizer.from_file(str(config.directory / "tokenizer" / "tokenizer.json"))
    documents = [tokenizer.encode(text, add_special_tokens=False).ids for text in CORPUS]
    split = report["splits"]["train"]
    assert split["documents"] == len(CORPUS)
    assert split["tokens"] == sum(map(len, documents))
    assert split["bytes"] == sum(len(text.encode()) for text in CORPUS)
    assert split["bytes_per_token"] == pytest.approx(split["bytes"] / split["tokens"], abs=1e-4)
    lengths = sorted(map(len, documents))
    quantiles = split["tokens_a_document"]["quantiles"]
    for share in QUANTILES:
        assert quantiles[f"{share:.0%}"] == lengths[max(0, int(np.ceil(share * len(lengths))) - 1)]
    for one in split["tokens_a_document"]["histogram"]:
        inside = [length for length in lengths if one["from"] <= length <= one["to"]]
        assert (one["documents"], one["tokens"]) == (len(inside), sum(inside))
    assert sum(one["documents"] for one in split["tokens_a_document"]["histogram"]) == len(CORPUS)

    counted = Counter(token for document in documents for token in document)
    top = report["vocabulary"]["top"]
    assert [one["count"] for one in top] == [count for _, count in counted.most_common(20)]
    assert all(counted[one["id"]] == one["count"] for one in top)
    assert report["vocabulary"]["unused"] == tokenizer.get_vocab_size() - 2 - len(counted)
    assert report["vocabulary"]["unknown"] == 0


def test_packing_and_epochs_are_those_of_the_plan(run):
    config, report = run
    data = DataPlane.from_config(config)
    packing = report["splits"]["train"]["packing"]
    assert packing["rows"] == data.num_rows
    assert packing["utilisation"] == pytest.approx(data.utilisation, abs=1e-6)
    pieces_a_row, places = [], Counter()
    for start in range(0, data.num_rows, 4):
        batch = data.batch(start // 4)
        for number, row in enumerate(batch.row_ids[:, 2].tolist()):
            if start + number < data.num_rows:
                pieces_a_row.append(int(batch.arrays["document_ids"][number].max()))
                bounds = data.splits[0].plan.rows[row : row + 2].astype(int)
                for piece in data.splits[0].plan.pieces[bounds[0] : bounds[1]]:
                    places[int(np.searchsorted(data.splits[0].store.shard(0)[1], piece["offset"], side="right"))] += 1
    assert packing["pieces_a_row"] == pytest.approx(np.mean(pieces_a_row), abs=1e-3)
    assert packing["most_pieces"] == max(pieces_a_row)
    assert packing["documents"] == len(places) == len(CORPUS)
    assert packing["cut_documents"] == sum(count > 1 for count in places.values())
    source = report["run"]["sources"][0]
    assert source["epochs"] == pytest.approx(2000 * 4 / data.num_rows, abs=1e-3)
    assert any("is read" in line and "times in this run" in line for line in report["warnings"])


def test_a_planted_duplicate_is_found(run):
    _, report = run
    repeated = report["repetition"]
    assert (repeated["documents"], repeated["copies"]) == (len(CORPUS), 3)
    assert [(group["copies"], group["text"]) for group in repeated["groups"]] == [(3, PLANTED), (2, TEXTS[3])]
    assert repeated["held_out"] == {"validation": {"documents": 4, "copies": 1, "in_training": 1}}
    assert any("1 of 4 documents of validation stand in the training data" in line for line in report["warnings"])


def test_what_was_left_out_is_told(run):
    _, report = run
    assert report["bad"]["count"] == 1
    assert sum(report["bad"]["by_file"].values()) == 1
    assert "a.jsonl:11" in report["bad"]["named"][0]
    assert report["empty"] == 1
    assert report["files"] == 2


def test_samples_of_what_was_removed_are_shown(run, tmp_path):
    config, _ = run
    report = report_data(config)
    report["kept_out"] = [
        {
            "step": "filter: Length",
            "documents": 3,
            "bytes": 90,
            "kept_documents": 7,
            "kept_bytes": 10,
            "reasons": {"too short": {"documents": 2, "bytes": 9}, "too long": {"documents": 1, "bytes": 81}},
            "samples": [{"reason": "too short", "where": "a.jsonl:9", "text": "\x1b]0;evil\x07<b>"}],
        }
    ]
    text = printed(report)
    assert "left out by filter: Length" in text
    assert "3 of 10 documents (30.00%)" in text
    assert "too short · a.jsonl:9" in text
    assert "␛]0;evil␇<b>" in text
    write_page(report, tmp_path / "not" / "there" / "page.html")
    assert "␛]0;evil␇<b>" in check_page((tmp_path / "not" / "there" / "page.html").read_text(encoding="utf-8"))


def printed(report) -> str:
    console = Console(file=StringIO(), width=80, force_terminal=False, color_system=None)
    show(report, console)
    return console.file.getvalue()


def test_nothing_of_the_text_steers_the_terminal_or_the_browser(run, tmp_path):
    _, report = run
    text = printed(report)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert max(map(len, text.splitlines())) <= 80
    assert "␛[31mred␛[0m & <script>alert(1)</script>" in " ".join(text.split())
    write_page(report, tmp_path / "page.html")
    assert "<script>alert(1)</script>" in check_page((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_the_command_and_its_json(run, tmp_path):
    config, report = run
    (tmp_path / "run.yaml").write_text(dump_config(config))
    before = sorted(config.directory.rglob("*"))
    done = CliRunner().invoke(app, ["data", str(tmp_path / "run.yaml"), "--json"])
    assert done.exit_code == 0, done.output
    assert {**json.loads(done.stdout), "scan": None} == {**json.loads(json.dumps(report)), "scan": None}
    assert "\x1b" not in done.stdout
    assert CliRunner().invoke(app, ["data", str(tmp_path / "run.yaml"), "train.steps=1"]).exit_code == 0
    assert sorted(config.directory.rglob("*")) == before


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 22])
@pytest.mark.parametrize("shards", [1, 3])
def test_hashes_do_not_depend_on_blocks_or_shards(tmp_path, monkeypatch, block, shards):
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 3, generator.integers(0, 6)).tolist() for _ in range(300)]
    documents += [[0] * 40, [0] * 41, [1] + [0] * 40, [0] * 40, []]
    store = written(tmp_path, documents, shards=shards)
    monkeypatch.setattr(statistics, "_BLOCK_TOKENS", block)
    statistics._powers.cache_clear()
    read = []
    counts = count_split(store, 500, told=read.append)
    monkeypatch.undo()
    statistics._powers.cache_clear()
    assert sum(read) == store.num_tokens
    assert counts.token_counts[:3].tolist() == [
        sum(document.count(token) for document in documents) for token in range(3)
    ]
    full = [tuple(document) for document in documents if document]
    assert counts.lengths.empty == len(documents) - len(full)
    assert len(counts.hashes) == len(full)
    assert len(set(counts.hashes.tolist())) == len(set(full))
    by_hash = dict(zip(counts.hashes.tolist(), full, strict=True))
    assert all(by_hash[value] == text for value, text in zip(counts.hashes.tolist(), full, strict=True))
    whole = count_split(store, 500)
    np.testing.assert_array_equal(counts.hashes, whole.hashes)
    wanted = counts.hashes[full.index((0,) * 40)]
    assert first_of(store, counts, int(wanted)).tolist() == [0] * 40
    assert first_of(store, counts, 12345) is None


def test_a_share_of_the_hashes_stands_for_all(tmp_path):
    documents = [[number % 4000 % 500, number % 4000 // 500 + 1] for number in range(6000)]  # 2,000 of 6,000 repeat
    store = written(tmp_path, documents)
    counts = count_split(store, 500, share=0.3)
    found = find_repeated([counts.hashes], share=0.3)
    assert found.documents == pytest.approx(6000, rel=0.1)
    assert found.copies == pytest.approx(2000, rel=0.1)
    assert found.groups[0][0] == 2
    assert first_of(store, counts, found.groups[0][1]).tolist() in documents
    assert count_shared(counts.hashes, [counts.hashes], share=0.3) == found.documents
    assert find_repeated([np.empty(0, dtype=np.uint64)]).copies == 0


def test_lengths_beyond_what_is_counted(monkeypatch):
    monkeypatch.setattr(statistics, "_COUNTED_LENGTHS", 8)
    lengths = Lengths(counted=np.zeros(8, dtype=np.int64))
    values = [0, 1, 1, 5, 7, 8, 9, 100, 1000]
    lengths.add(np.array(values))
    assert lengths.documents == 9
    assert lengths.quantiles()["50%"] == 7
    assert lengths.quantiles()["75%"] == 9
    assert lengths.quantiles()["100%"] == 1000
    assert sum(one["documents"] for one in lengths.histogram()) == 8
    assert sum(one["tokens"] for one in lengths.histogram()) == sum(values)


def test_a_budget_of_time_that_was_not_measured(run):
    config, _ = run
    timed = config.model_copy(update={"train": config.train.model_copy(update={"steps": None, "minutes": 5.0})})
    report = report_data(timed)
    assert report["run"]["steps"] is None
    assert report["run"]["sources"][0]["epochs"] is None
    assert "known once training has measured its pace" in " ".join(printed(report).split())


def test_texts_are_what_they_are_taken_for():
    assert not any(is_held_out(text, 0.0) for text in CORPUS)
    assert len(set(CORPUS)) == len(CORPUS) - 3
