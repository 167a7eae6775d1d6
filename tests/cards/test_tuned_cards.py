"""The card of a fine-tuned model says what its result says, and its lines load the model without this package."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_rules import problems
from huggingface_hub import ModelCard
from rich.console import Console
from transformers import BertForMaskedLM
from typer.testing import CliRunner

from pretrain.card import CARD, write_card
from pretrain.cards.places import public
from pretrain.cards.tuned import read_tuning
from pretrain.cards.words import number
from pretrain.cli import app
from pretrain.config_task import TuningConfig, load_tuning
from pretrain.files import ArtifactError
from pretrain.finetune import finetune
from pretrain.publishing import origins
from tests.tasks.small_tokenizers import config_of, wordpiece

GOOD, BAD = ["the cat sat on the mat", "cats jumping and running"], ["who published the table", "after the war"]
TAGGED = [("cats running", "NOUN VERB"), ("the war", "DET NOUN")]
# Every piece of code runs in names of its own, and says what it printed.
RUNNER = """
import contextlib, io, json, sys
sys.modules["pretrain"] = None  # an import of it fails
said = {}
for name, code in json.load(open("cases.json")).items():
    out, names = io.StringIO(), {}
    with contextlib.redirect_stdout(out):
        exec(compile(code, name, "exec"), names)
    said[name] = [type(names["model"]).__name__, out.getvalue().strip()]
json.dump(said, open("said.json", "w"))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs/labels` of two seeds and `runs/tags` of one in it: fine-tunings of a tiny model."""
    place = tmp_path_factory.mktemp("secretive")
    torch.manual_seed(0)
    BertForMaskedLM(config_of("bert")).save_pretrained(place / "base" / "export")
    wordpiece().save_pretrained(place / "base" / "export")
    lines = ["text\tlabel", *(f"{text}\t{label}" for label, texts in ((1, GOOD), (0, BAD)) for text in texts * 2)]
    (place / "rows.tsv").write_text("\n".join(lines) + "\n")
    tagged = [json.dumps({"tokens": words.split(), "tags": tags.split()}) for words, tags in TAGGED * 2]
    (place / "tags.jsonl").write_text("\n".join(tagged) + "\n")
    for name, kind, rows, more in (
        ("labels", "classification", "rows.tsv", ["train.seeds=[0,1]", "task.test=[rows.tsv]"]),
        ("tags", "token-classification", "tags.jsonl", []),
    ):
        config = _config(place, name, kind, rows, more)
        assert finetune(place / "base" / "export", config, console=Console(quiet=True)) == 0
    return place


def _config(place: Path, name: str, kind: str, rows: str, more: list[str]) -> TuningConfig:
    (place / f"{name}.yaml").write_text(
        f"name: {name}\nout: {place}/runs\n"
        f"task: {{kind: {kind}, root: {place}, train: [{rows}], validation: [{rows}], max_length: 16}}\n"
        "optimizer: {name: adamw, lr: 1e-2}\n"
        "train: {steps: 2, batch_size: 4, precision: fp32}\n"
        "evaluate: {every: 1}\n"
        "log: {to: []}\n"
    )
    return load_tuning(place / f"{name}.yaml", more)


def _card(place: Path, name: str = "labels") -> str:
    return (place / "runs" / name / "model" / CARD).read_text()


def _result(place: Path, name: str = "labels") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "runs" / name / "result.json").read_text())
    return found


def _changed(place: Path, at: Path, **changes: Any) -> Path:
    """A copy of the fine-tuning whose result says something else: its sections are replaced."""
    shutil.copytree(place / "runs" / "labels", at)
    (at / "result.json").write_text(json.dumps(_result(place) | changes))
    return at


def _metadata(path: Path) -> Any:
    assert problems(path.read_text()) == []
    return ModelCard.load(path).data


# --- what it says ---------------------------------------------------------------------------------------------------


def test_every_score_is_that_of_the_result(place: Path) -> None:
    card, result = _card(place), _result(place)
    best = result["best_seed"]
    (own,) = [seed for seed in result["seeds"] if seed["seed"] == best]
    assert f"this model (seed {best}) |" in card
    rows = [
        line.strip("| ").split(" | ")
        for line in card.splitlines()
        if re.match(r"\| (test|validation) \| .*\d \|$", line)
    ]
    told = {(row[0], *row[2:]) for row in rows if len(row) == 6}
    wanted = set()
    for name, spread in result["summary"].items():
        part, _, metric = name.partition("/")
        wanted.add((part, *(number(spread[key]) for key in ("median", "min", "max")), number(own[part][metric])))
    assert told == wanted
    assert result["rows_sha256"] in card
    assert "8 of 8 test rows stand among the training rows too" in card
    assert "| train | `rows.tsv` | 8 |" in card
    assert "| labels | 2: `0`, `1` |" in card
    assert "| columns | text `text`, label `label` |" in card
    assert "| optimizer | adamw (lr 0.01, " in card
    assert "| budget | 2 steps |" in card
    assert f"| machine | {result['machine']}" in card.replace("\\", "")
    assert result["versions"]["pretrain"] in card
    assert "secretive" not in card  # nothing says where this machine keeps things
    assert "from `base`" in card


def test_the_hubs_client_reads_the_metadata(place: Path) -> None:
    result = _result(place)
    data = _metadata(place / "runs" / "labels" / "model" / CARD)
    assert (data.pipeline_tag, data.library_name) == ("text-classification", "transformers")
    assert data.get("base_model") is None  # a directory
    (own,) = [seed["test"] for seed in result["seeds"] if seed["seed"] == result["best_seed"]]
    told = {(found.metric_type, found.metric_name): found.metric_value for found in data.eval_results}
    assert told["accuracy", "accuracy"] == float(f"{own['accuracy']:.6g}")
    assert told["f1", "F1, macro"] == float(f"{own['f1_macro']:.6g}")
    assert len(told) == len(own)
    assert {found.dataset_split for found in data.eval_results} == {"test"}
    tags = _metadata(place / "runs" / "tags" / "model" / CARD)
    assert tags.pipeline_tag == "token-classification"
    assert {found.dataset_split for found in tags.eval_results} == {"validation"}
    assert "It was not scored on test rows" in _card(place, "tags")


def test_a_base_and_rows_of_the_hub_are_named(place: Path, tmp_path: Path) -> None:
    result = _result(place)
    task = result["task"] | {
        "train": ["hub:me/rows/plain"],
        "test": ["hub:me/rows/plain:validation"],
        "validation": {"fraction": 0.1},
    }
    model = result["model"] | {"from": "me/base", "lora": 4}
    run = _changed(place, tmp_path / "mine", task=task, model=model, base_is_local=False)
    path = write_card(run / "model", run, repository="me/it", license="mit", languages=["en"], overwrite=True)
    data = _metadata(path)
    assert (data.base_model, data.get("base_model_relation")) == ("me/base", "finetune")
    assert (data.datasets, data.license, data.language) == (["me/rows"], "mit", ["en"])
    first = data.eval_results[0]
    assert (first.dataset_type, first.dataset_config, first.dataset_split) == ("me/rows", "plain", "validation")
    card = path.read_text()
    assert card.count('place = "me/it"\n') == 2  # merged, and the adapters alone
    assert 'base = "me/base"\n' in card
    assert "0.1 of the training rows, by a hash of each" in card
    model["weights"] = "random"
    (run / "result.json").write_text(json.dumps(_result(place) | {"model": model, "base_is_local": False}))
    path = write_card(run / "model", run, overwrite=True)
    assert _metadata(path).get("base_model") is None
    assert "from random weights, in the shape of `me/base`" in path.read_text()


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("/home/me/runs/mine/export", "mine"),
        ("runs/mine/train/checkpoints/step-00000600/model", "mine/step-00000600"),
        ("C:\\models\\mine", "mine"),
        ("/", "a model without a name"),
    ],
)
def test_a_base_in_a_directory_goes_by_the_part_that_says_which(place: Path, source: str, told: str) -> None:
    tuning = read_tuning(place, _result(place) | {"model": {"from": source}, "base_is_local": True})
    assert tuning is not None
    assert tuning.base == told == public(told)


@pytest.mark.parametrize(
    ("scores", "pipeline"),
    [(["bleu", "chrf"], "translation"), (["rouge", "bleu"], "summarization"), (["exact_match"], "text-generation")],
)
def test_what_text_to_text_is_called(place: Path, scores: list[str], pipeline: str) -> None:
    tuning = read_tuning(place, _result(place) | {"task": {"kind": "text-to-text", "scores": scores}})
    assert tuning is not None
    assert tuning.of_hub[0] == pipeline


# --- what it is for -------------------------------------------------------------------------------------------------


def test_the_lines_run_as_they_stand(place: Path) -> None:
    cases = {}
    for name in ("labels", "tags"):
        (cases[name],) = re.findall(r"```python\n(.*?)\n```", _card(place, name), re.DOTALL)
    root = place / "runs"
    (root / "cases.json").write_text(json.dumps(cases))
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-P", "-c", RUNNER]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=root, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MISSING" not in done.stderr, done.stderr[-3000:]  # weights that transformers had to draw
    said = json.loads((root / "said.json").read_text())
    assert said["labels"][0] == "BertForSequenceClassification"
    assert re.fullmatch(r"\{'0': 0\.\d+, '1': 0\.\d+\}", said["labels"][1])
    assert said["tags"][0] == "BertForTokenClassification"
    assert re.search(r"'(NOUN|VERB|DET)'\)\]$", said["tags"][1])


def test_the_command_makes_the_same_card_again(place: Path) -> None:
    run, before = place / "runs" / "labels", _card(place)
    for more in (["--run", str(run)], []):
        done = CliRunner().invoke(app, ["card", str(run / "model"), *more, "--overwrite"])
        assert done.exit_code == 0, done.output
        assert _card(place) == before


def test_a_model_of_another_seed_is_refused(place: Path, tmp_path: Path) -> None:
    run, result = place / "runs" / "labels", _result(place)
    (other,) = [seed for seed in result["seeds"] if seed["seed"] != result["best_seed"]]
    directory = Path(shutil.copytree(run / f"seed-{other['seed']}" / other["checkpoint"] / "model", tmp_path / "model"))
    with pytest.raises(ArtifactError, match="is not the model of"):
        write_card(directory, run)
    with pytest.raises(ArtifactError, match="is one seed of a fine-tuning"):
        write_card(directory, run / f"seed-{other['seed']}")
    copied = Path(shutil.copytree(run / "model", tmp_path / "copied"))
    assert 'place = "copied"\n' in write_card(copied, run, overwrite=True).read_text()
    with pytest.raises(ArtifactError, match="no whole result"):
        write_card(directory, _changed(place, tmp_path / "torn", best_seed=7))


def test_publish_takes_the_directory_of_a_fine_tuning(place: Path) -> None:
    """Up to what is asked of the Hub."""
    from pretrain import publish

    run = place / "runs" / "labels"
    source = origins.of_directory(run / "model")
    assert source.directory == run / "model"
    assert source.origin.step == _result(place)["seeds"][_result(place)["best_seed"]]["best"]["step"]
    console = Console(file=io.StringIO())
    with publish._releases(run, publish.Wanted("me/it"), console) as releases:
        (release,) = releases
    pieces = {piece.name: piece for piece in release.contents.pieces}
    assert set(pieces) == {CARD, "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert b'place = "me/it"\n' in (pieces[CARD].data or b"")
    with (
        pytest.raises(ArtifactError, match="is one seed of a fine-tuning"),
        publish._releases(run / "seed-0", publish.Wanted("me/it"), console),
    ):
        pass
    (run / "model" / CARD).unlink()
    with publish._releases(run, publish.Wanted("me/it"), console) as releases:
        assert CARD in {piece.name for piece in releases[0].contents.pieces}
