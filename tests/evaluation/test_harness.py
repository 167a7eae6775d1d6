"""Tasks of lm-eval: local files alone, the right beginning of texts, and no code that nobody allowed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import byte_tokenizer
from tokenizers import processors

from pretrain.evaluate import evaluate_model
from pretrain.evaluation.harness import load_tasks, run_tasks
from pretrain.evaluation.loading import LoadedModel, load_model
from pretrain.evaluation.passes import Passes
from pretrain.files import ArtifactError

pytest.importorskip("lm_eval")

CPU = torch.device("cpu")
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{begin}}"
doc_to_choice: "{{ends}}"
doc_to_target: "{{right}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
BITS = """
task: bits
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""
ROWS = [{"begin": "a cat", "ends": [" sat", " ran", " is"], "right": number % 3} for number in range(7)]
TEXTS = [{"text": "the cat sat on it"}, {"text": "  it was red, caf\u00e9\n"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "tasks"
    made.mkdir()
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (made / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    (made / "choices.yaml").write_text(CHOICES)
    (made / "bits.yaml").write_text(BITS)
    return made


def scored(directory: Path, names: list[str], tokenizer: Any = None, **options: Any) -> dict[str, dict[str, Any]]:
    model = load_model(directory, device="cpu")
    if tokenizer is not None:
        model = LoadedModel(model.model, tokenizer, model.kind, model.source, "", CPU)
    return run_tasks(model, load_tasks(names), Passes(CPU, batch_tokens=128), window=32, **options)


def test_a_folder_of_tasks_beside_its_data(directories: dict[str, Path], folder: Path) -> None:
    found = scored(directories["gpt2"], [str(folder)])
    assert set(found) == {"choices", "bits"}
    model = load_model(directories["gpt2"], device="cpu")
    right = []
    for row in ROWS:
        likelihoods = []
        for end in row["ends"]:  # type: ignore[attr-defined]
            begin, whole = (model.tokenizer(text)["input_ids"] for text in (row["begin"], f"{row['begin']}{end}"))
            with torch.no_grad():
                said = model.model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            likelihoods.append(sum(float(said[at - 1, whole[at]]) for at in range(len(begin), len(whole))))
        right.append(likelihoods.index(max(likelihoods)) == row["right"])
    assert found["choices"]["acc"] == pytest.approx(sum(right) / len(right))
    assert found["choices"]["examples"] == 7
    assert found["choices"]["acc_stderr"] > 0
    limited = scored(directories["gpt2"], [str(folder / "choices.yaml")], limit=3, num_fewshot=2)
    assert (limited["choices"]["examples"], limited["choices"]["num_fewshot"]) == (3, 2)


def test_bits_per_byte_are_those_of_text_whoever_adds_bos(directories: dict[str, Path], folder: Path) -> None:
    adds = byte_tokenizer()
    adds._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert adds("a")["input_ids"][0] == 0
    expected = evaluate_model(directories["gpt2"], [str(folder / "texts.jsonl")], device="cpu")["bits_per_byte"]
    for tokenizer in (None, adds):
        found = scored(directories["gpt2"], [str(folder / "bits.yaml")], tokenizer)
        assert found["bits"]["bits_per_byte"] == pytest.approx(expected, abs=1e-5)
        assert math.isfinite(expected)


def test_a_group_finds_its_members_beside_it(directories: dict[str, Path], folder: Path) -> None:
    (folder / "more.yaml").write_text("include: choices.yaml\ntask: more\nnum_fewshot: 1\n")
    (folder / "broken.yaml").write_text("task: [")
    (folder / "both.yaml").write_text(
        "group: both\ntask: [choices, more]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    found = scored(directories["gpt2"], [str(folder / "both.yaml")])
    assert set(found) == {"both", "choices", "more"}
    assert found["both"]["acc"] == pytest.approx((found["choices"]["acc"] + found["more"]["acc"]) / 2)
    assert (found["choices"]["num_fewshot"], found["more"]["num_fewshot"]) == (0, 1)


CODE = {
    "function": ("process_docs: !function tricks.run", "!function tricks.run runs Python code"),
    "quoted": ("process_docs: !<!function> tricks.run", "!function tricks.run runs Python code"),
    "class": ("class: !function tricks.run", "!function tricks.run runs Python code"),
    "object": ("metadata: !!python/object/apply:os.system [echo]", "python/object/apply:os.system is not plain YAML"),
    "unsafe": ("unsafe_code: true", "unsafe_code says"),
    "remote": ("dataset_kwargs: {data_files: x, trust_remote_code: true}", "asks to run the data set's code"),
    "hub": ("metric_list: [{metric: acc, hf_evaluate: true}]", "metric acc is Python code from the Hub"),
    "metric": ("metric_list: [{metric: ./tricks.py}]", "metric ./tricks.py is no metric of lm-eval"),
    "template": ("doc_to_text: \"{{ ''.__class__.__mro__ }}\"", "reaches for Python's insides"),
    "prompt": ("use_prompt: 'tricks.yaml:one'", "may hold code"),
}


@pytest.mark.parametrize("name", CODE)
def test_no_code_runs_that_nobody_allowed(name: str, folder: Path) -> None:
    (folder / "tricks.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n\ndef run(docs):\n    return docs\n")
    line, message = CODE[name]
    (folder / "trick.yaml").write_text(f"include: choices.yaml\ntask: trick\n{line}\n")
    (folder / "outer.yaml").write_text("include: trick.yaml\ntask: outer\n")
    for file in ("trick.yaml", "outer.yaml"):
        with pytest.raises(ArtifactError, match=message):
            load_tasks([str(folder / file)])
    assert not (folder / "ran").exists()


def test_code_runs_when_it_is_allowed(directories: dict[str, Path], folder: Path) -> None:
    (folder / "tricks.py").write_text("def first(docs):\n    return docs.select(range(2))\n")
    (folder / "trick.yaml").write_text("include: choices.yaml\ntask: trick\nprocess_docs: !function tricks.first\n")
    tasks = load_tasks([str(folder / "trick.yaml")], trust_code=True)
    found = run_tasks(load_model(directories["gpt2"], device="cpu"), tasks, Passes(CPU), window=32)
    assert found["trick"]["examples"] == 2


def test_what_cannot_be_had_is_named(directories: dict[str, Path], folder: Path) -> None:
    away = folder / "away.yaml"
    away.write_text(
        CHOICES.replace("dataset_path: json", "dataset_path: no-one/nothing").replace("dataset_kwargs", "#")
    )
    gone = folder / "gone.yaml"
    gone.write_text(CHOICES.replace("rows.jsonl", "gone.jsonl"))
    other = folder / "other.yaml"
    other.write_text(CHOICES.replace("{{begin}}", "{{start}}"))
    for name, message in (
        (str(away), "its data cannot be had from here; name local files"),
        (str(gone), "its data cannot be had from here"),
        (str(other), "check its YAML file against its data .*start"),
        (str(folder / "none.yaml"), "there is no such file"),
    ):
        with pytest.raises(ArtifactError, match=message):
            load_tasks([name])
    tasks = load_tasks([str(folder / "choices.yaml")])
    with pytest.raises(ValueError, match="are for decoders"):
        run_tasks(load_model(directories["bert"], device="cpu"), tasks, Passes(CPU), window=24)


@pytest.mark.slow
def test_a_name_of_lm_eval_that_is_nearly_right() -> None:
    """Slow: lm-eval reads thousands of YAML files to know its tasks."""
    with pytest.raises(ArtifactError, match="did you mean hellaswag"):
        load_tasks(["hellaswg"])
