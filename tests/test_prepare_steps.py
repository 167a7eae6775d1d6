"""Preparing with filters, deduplication and decontamination: what is kept, what is said of the rest, restarts."""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path

import pytest
from data_builders import documents, run_config, write_tokenizer
from rich.console import Console

from pretrain import prepare
from pretrain.data.keeping import dropping
from pretrain.data.preparing import pipeline
from pretrain.data.preparing.splits import is_held_out
from pretrain.files import read_manifest, verify_manifest
from pretrain.prepare import check_data, is_prepared, prepare_data

WORDS = [first + last for first in ("ba", "ke", "li", "mo", "nu", "pra", "sto", "tri") for last in ("da", "fe", "lor")]
NO_DIGITS = {"name": "RegexFilter", "parameters": {"regex_exp": "[0-9]"}}


def sentence(draws: random.Random, words: int) -> str:
    return " ".join(draws.choices(WORDS, k=words))


def rows(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


class Corpus:
    """Two sources with documents that each step is to leave out, and some that it is not."""

    def __init__(self, folder: Path) -> None:
        draws = random.Random(0)
        self.plain = [sentence(draws, draws.randint(20, 60)) for _ in range(120)]
        self.held_out = sentence(draws, 10)  # too short for decontamination
        self.evaluation = sentence(draws, 25)
        self.near = " ".join([*self.plain[2].split()[:-1], "otherwise"])
        self.contaminated = f"Before, {self.evaluation.upper().replace(' ', ', ')} after."
        self.copy_of_held_out = self.held_out.title() + "!"
        self.first, self.second = self.plain[:60], self.plain[60:]
        copies = [self.plain[1], self.near, "with a digit 1", self.copy_of_held_out]
        self.a = rows(folder / "a.jsonl", [*self.first, *copies])
        self.b = rows(folder / "b.jsonl", [self.plain[0], *self.second, self.contaminated, "another 2"])
        self.validation = rows(folder / "v.jsonl", [self.held_out, self.held_out, "a digit 3 in a named list"])
        (folder / "eval.jsonl").write_text(json.dumps({"question": self.evaluation}) + "\n")
        self.sources = [{"name": "a", "files": [self.a]}, {"name": "b", "files": [self.b]}]
        self.all_steps = {
            "train": self.sources,
            "validation": [self.validation],
            "filters": [NO_DIGITS],
            "dedup": "minhash",
            "decontaminate": {"files": [str(folder / "eval.jsonl")]},
        }


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


@pytest.fixture
def small_parts(monkeypatch):
    made = prepare.make_plan

    def make_plan(data, splits, **keys):
        return made(data.model_copy(update={"part_bytes": 4000}), splits, **keys)

    monkeypatch.setattr(prepare, "make_plan", make_plan)


def prepared(tmp_path: Path, name: str = "run", console: Console | None = None, **data):
    data.setdefault("workers", 1)
    config = run_config(tmp_path, name=name, **data)
    if not (config.directory / "tokenizer").exists():
        write_tokenizer(config.directory / "tokenizer", "gpt2", " ".join(WORDS) * 20)
    return config, prepare_data(config, console=console)


def facts_of(directory: Path) -> dict[str, dict]:
    return {step["step"]: step for step in read_manifest(directory, "data").facts["kept_out"]}


def samples_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "removed.jsonl").read_text(encoding="utf-8").splitlines()]


def test_each_step_leaves_out_what_it_should_and_nothing_else(tmp_path, corpus, small_parts):
    sink = io.StringIO()
    _, directory = prepared(tmp_path, console=Console(file=sink, width=400), **corpus.all_steps)
    assert documents(directory, "train-a") == corpus.first
    assert documents(directory, "train-b") == corpus.second
    assert documents(directory, "validation") == [corpus.held_out, corpus.held_out, "a digit 3 in a named list"]

    manifest = read_manifest(directory, "data")
    verify_manifest(directory, manifest)
    assert "removed.jsonl" in manifest.files
    facts = facts_of(directory)
    assert list(facts) == ["RegexFilter", "decontaminate", "dedup"]
    assert [facts[step]["documents"] for step in facts] == [2, 1, 4]
    assert facts["RegexFilter"]["sources"]["a"]["documents"] == 1
    assert facts["RegexFilter"]["kept_documents"] == 127 - 2
    assert facts["decontaminate"]["sources"]["b"]["bytes"] == len(corpus.contaminated)
    reasons = {reason: counts["documents"] for reason, counts in facts["dedup"]["reasons"].items()}
    assert reasons == {"repeats a training document": 3, "repeats a validation document": 1}
    assert facts["dedup"]["kept_documents"] == 120 + 3
    for split in ("train-a", "train-b"):
        texts = documents(directory, split)
        counts = manifest.facts["splits"][split]
        assert (counts["documents"], counts["bytes"]) == (len(texts), sum(len(text.encode()) for text in texts))
    lines = [json.loads(line) for line in (directory / "files.jsonl").read_text().splitlines()]
    assert sum(counts["documents"] for line in lines for counts in line["splits"].values()) == 123
    assert sum(counts["tokens"] for line in lines for counts in line["splits"].values()) == sum(
        split["tokens"] for split in manifest.facts["splits"].values()
    )
    said = sink.getvalue()
    assert "dedup: left out 4 of 127 documents" in said
    assert "most often: repeats a training document (3)" in said


def test_samples_say_where_why_and_what_is_repeated(tmp_path, corpus, small_parts):
    _, directory = prepared(tmp_path, **corpus.all_steps)
    samples = {sample["text"]: sample for sample in samples_of(directory)}
    assert len(samples) == 7
    assert samples["with a digit 1"]["step"] == "RegexFilter"
    found = samples[corpus.contaminated]
    assert found["reason"] == "shares words with an evaluation text"
    assert found["repeats"] == " ".join(corpus.evaluation.split()[:13])
    near = samples[corpus.near]
    offset = Path(corpus.a).read_text().index(corpus.plain[2]) - len('{"text": "')
    assert near["repeats"] == f"{corpus.a}:{offset}"
    name, _, position = near["where"].rpartition(":")
    assert Path(name).read_text()[int(position) :].startswith(json.dumps({"text": corpus.near}))
    assert samples[corpus.copy_of_held_out]["reason"] == "repeats a validation document"
    assert samples[corpus.copy_of_held_out]["repeats"] == f"{corpus.validation}:0"


def test_samples_are_few_and_short(tmp_path):
    draws = random.Random(3)
    long = sentence(draws, 400)
    a = rows(
        tmp_path / "a.jsonl", [*(f"{number} {long}" for number in range(50)), *["clean words"] * 30, "other words"]
    )
    validation = [rows(tmp_path / "v.jsonl", ["held out"])]
    _, directory = prepared(tmp_path, train=[a], filters=[NO_DIGITS], dedup="exact", validation=validation)
    samples = samples_of(directory)
    assert [sample["step"] for sample in samples] == ["RegexFilter"] * 20 + ["dedup"] * 20
    assert {len(sample["text"]) for sample in samples[:20]} == {500}
    assert facts_of(directory)["dedup"]["documents"] == 29
    assert documents(directory, "train") == ["clean words", "other words"]


@pytest.mark.parametrize("rule", [{"fraction": 0.2}, {"tail": 0.2}])
def test_held_out_documents_are_filtered_deduplicated_and_never_trained_on(tmp_path, corpus, small_parts, rule):
    train = [corpus.a, corpus.b]
    data = {"train": train, "validation": rule, "filters": [NO_DIGITS], "dedup": "minhash"}
    _, directory = prepared(tmp_path, **data)
    trained, held_out = documents(directory, "train"), documents(directory, "validation")
    both = trained + held_out
    assert len(both) == len(set(both)) == 122  # also the copy of what is held out elsewhere, and the contaminated one
    assert not any(digit in text for text in both for digit in "123")
    assert held_out
    if "fraction" in rule:
        _, plain = prepared(tmp_path, "plain", train=train, validation=rule)
        expected = [text for text in dict.fromkeys(documents(plain, "validation")) if text in set(both)]
        assert held_out == expected  # the same documents are held out, whatever the filters


def test_training_text_with_words_of_what_is_held_out_goes(tmp_path, small_parts):
    draws = random.Random(4)
    texts = [sentence(draws, 30) for _ in range(150)]
    a = rows(tmp_path / "a.jsonl", texts)
    rule = {"fraction": 0.2}
    _, plain = prepared(tmp_path, "plain", train=[a], validation=rule)
    held_out = documents(plain, "validation")
    leaks = (f"cited as {number}: " + " ".join(held_out[3].split()[5:18]) for number in range(99))
    leak = next(text for text in leaks if not is_held_out(text, 0.2))
    b = rows(tmp_path / "b.jsonl", [*texts, leak, "nothing of the sort"])
    _, directory = prepared(tmp_path, train=[b], validation=rule, decontaminate=True)
    kept = documents(directory, "train") + documents(directory, "validation")
    assert leak not in kept
    assert set(texts) <= set(kept)
    assert facts_of(directory)["decontaminate"]["reasons"] == {
        "shares words with a validation text": {"documents": 1, "bytes": len(leak)}
    }


def files_of(directory: Path) -> dict[str, str]:
    return read_manifest(directory, "data").files


def test_workers_and_stops_do_not_change_a_byte(tmp_path, corpus, small_parts, monkeypatch):
    data = {**corpus.all_steps, "validation": {"fraction": 0.1}}
    _, one = prepared(tmp_path, "one", **data)
    _, two = prepared(tmp_path, "two", **{**data, "workers": 2})
    assert files_of(one) == files_of(two)
    assert facts_of(one) == facts_of(two)
    assert read_manifest(one, "data").facts["parts"] > 4

    writes = 0

    class StoppedError(Exception):
        pass

    def stops_after(module):
        whole = module.replace_file

        def replace_file(path, data):
            nonlocal writes
            writes -= 1
            if writes < 0:
                raise StoppedError
            whole(path, data)

        monkeypatch.setattr(module, "replace_file", replace_file)

    for module in (pipeline, dropping, sys.modules["pretrain.data.preparing.unfinished"]):
        stops_after(module)
    stops = 0
    for tries in range(200):
        writes = 8 + tries % 5  # a few more files each time, so that every kind is the one that fails
        try:
            _, again = prepared(tmp_path, "stopped", **data)
        except StoppedError:
            stops += 1
            continue
        break
    assert stops > 3
    monkeypatch.undo()
    assert files_of(again) == files_of(one)
    assert facts_of(again) == facts_of(one)


def test_dedup_gives_the_same_for_any_cut_into_parts(tmp_path, monkeypatch):
    draws = random.Random(5)
    texts = [draws.choice("abcdefgh") * draws.randint(1, 3) for _ in range(300)]
    a = rows(tmp_path / "a.jsonl", texts)
    validation = [rows(tmp_path / "v.jsonl", ["aa", "held out"])]
    made = prepare.make_plan
    for size in (300, 2000, 10**6):
        monkeypatch.setattr(
            prepare,
            "make_plan",
            lambda data, splits, size=size, **keys: made(data.model_copy(update={"part_bytes": size}), splits, **keys),
        )
        _, directory = prepared(tmp_path, f"run{size}", train=[a], dedup="exact", validation=validation)
        assert documents(directory, "train") == list(dict.fromkeys(text for text in texts if text != "aa"))


def test_a_part_of_which_nothing_is_left_has_no_shard(tmp_path, small_parts):
    texts = [f"text {'x' * (number % 50)}" for number in range(50)]
    a = rows(tmp_path / "a.jsonl", texts * 4)
    validation = [rows(tmp_path / "v.jsonl", ["held out"])]
    _, directory = prepared(tmp_path, train=[a], dedup={"kind": "exact"}, validation=validation)
    manifest = read_manifest(directory, "data")
    assert manifest.facts["parts"] > len(manifest.facts["splits"]["train"]["shards"]) + 1
    assert documents(directory, "train") == texts


def test_the_keys_decide_the_data_and_evaluation_files_are_inputs(tmp_path, corpus):
    config, directory = prepared(tmp_path, **corpus.all_steps)
    assert is_prepared(config)
    spelled_out = {**corpus.all_steps, "dedup": {"kind": "minhash"}, "executor": "local", "workers": 2}
    assert is_prepared(run_config(tmp_path, **spelled_out))
    for changed in (
        {"filters": []},
        {"dedup": "exact"},
        {"dedup": {"kind": "minhash", "buckets": 20}},
        {"decontaminate": True},
    ):
        assert not is_prepared(run_config(tmp_path, **{**corpus.all_steps, **changed})), changed
    evaluation = tmp_path / "eval.jsonl"
    text = evaluation.read_text()
    evaluation.write_text(text)  # the same bytes, another time
    assert is_prepared(config)
    evaluation.write_text(text + json.dumps({"question": sentence(random.Random(9), 20)}) + "\n")
    assert not is_prepared(config)
    assert any(name.startswith("decontaminate: ") for name in read_manifest(directory, "data").inputs)


def test_without_steps_nothing_is_said_or_written_of_them(tmp_path, corpus):
    _, directory = prepared(tmp_path, train=[corpus.a])
    assert read_manifest(directory, "data").facts["kept_out"] == []
    assert not (directory / "removed.jsonl").exists()


def test_when_nothing_is_left_the_step_to_blame_is_named(tmp_path, corpus):
    every = {"name": "RegexFilter", "parameters": {"regex_exp": "[a-z]"}}
    data = {"train": [corpus.a], "filters": [NO_DIGITS, every], "validation": [corpus.validation]}
    with pytest.raises(ValueError, match=r"nothing is left of `train`; RegexFilter \(2\): left out 63 of 63") as error:
        prepared(tmp_path, **data)
    assert "removed.jsonl" in str(error.value)
    shown = tmp_path / "runs" / "run" / "data.unfinished" / "data" / "removed.jsonl"
    assert len(shown.read_text().splitlines()) == 21
    with pytest.raises(ValueError, match=r"gave no tokens at all; RegexFilter \(2\): left out 63"):
        prepared(tmp_path, "other", **{**data, "validation": {"fraction": 0.1}})


def test_what_cannot_work_is_refused_before_any_text_is_read(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(prepare, "input_files", lambda data: pytest.fail("the text was looked at"))
    with pytest.raises(ValueError, match="no filter `NoSuchFilter`"):
        prepared(tmp_path, train=[corpus.a], filters=[{"name": "NoSuchFilter"}])
    with pytest.raises(ValueError, match=r"data\.decontaminate\.files: `missing\.jsonl` names no file"):
        check_data(run_config(tmp_path, train=[corpus.a], decontaminate={"files": ["missing.jsonl"]}))


def test_a_trial_goes_through_all_steps(tmp_path, corpus):
    config = run_config(tmp_path, workers=1, **{**corpus.all_steps, "validation": {"fraction": 0.01}})
    write_tokenizer(config.directory / "tokenizer", "gpt2", " ".join(WORDS) * 20)
    directory = prepare_data(config, max_bytes=3000)
    assert documents(directory, "validation-a")
    assert documents(directory, "train-b")
