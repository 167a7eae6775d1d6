"""The verb: seeds, stopping and going on, early stopping, what it leaves, what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import BertForMaskedLM

from pretrain.changes import ChangedConfigError
from pretrain.config_task import TuningConfig, load_tuning
from pretrain.files import sha256_file
from pretrain.finetune import finetune
from pretrain.runtime import EXIT_STOPPED
from pretrain.tasks.sentences import Classification
from tests.tasks.small_tokenizers import config_of, wordpiece

GOOD, BAD = ["the cat sat on the mat", "cats jumping and running"], ["who published the table", "after the war"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    keys = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = config_of("bert")
    for key, value in keys.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(directory)
    wordpiece().save_pretrained(directory)
    return directory


@pytest.fixture
def tuning(tmp_path: Path) -> Callable[..., TuningConfig]:
    lines = ["text\tlabel", *(f"{text}\t{label}" for label, texts in ((1, GOOD), (0, BAD)) for text in texts * 6)]
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "task.yaml").write_text(
        "name: tune\n"
        "task: {kind: classification, train: [train.tsv], validation: [dev.tsv], test: [test.tsv], max_length: 16}\n"
        "optimizer: {name: adamw, lr: 1e-2}\n"
        "train: {steps: 8, batch_size: 6, precision: fp32, seeds: [0]}\n"
        "evaluate: {every: 2}\n"
        "log: {to: [jsonl]}\n"
    )

    def make(*overrides: str) -> TuningConfig:
        return load_tuning(tmp_path / "task.yaml", [f"out={tmp_path}/runs", f"task.root={tmp_path}", *overrides])

    return make


def quiet() -> Console:
    return Console(quiet=True)


def result_of(config: TuningConfig) -> dict[str, Any]:
    return json.loads((config.directory / "result.json").read_text())


def test_seeds_a_summary_and_a_model_that_plain_transformers_loads(
    model: Path, tuning: Callable[..., TuningConfig]
) -> None:
    config = tuning("train.seeds=[0,1,2]", "train.steps=24", "evaluate.every=8")
    assert finetune(model, config, console=quiet()) == 0
    result = result_of(config)
    values = result["summary"]["test/accuracy"]["values"]
    assert len(values) == 3
    assert result["summary"]["test/accuracy"]["median"] == sorted(values)[1]
    assert result["summary"]["validation/accuracy"]["max"] == 1.0  # four sentences are learnt by heart
    assert result["notes"] == ["24 of 24 test rows stand among the training rows too"]
    said = (config.directory / "seed-0" / "predictions-test.jsonl").read_text().splitlines()
    lines = list(map(json.loads, said))
    assert [line["row"] for line in lines] == list(range(24))
    assert lines[5]["where"] == f"{config.task.root}/test.tsv:7"
    assert {line["prediction"] for line in lines} <= {"0", "1"}
    right = [line["label"] == line["prediction"] for line in lines]
    assert sum(right) / 24 == values[0]
    code = (
        "import sys, transformers\n"
        f"answer = transformers.pipeline('text-classification', {str(config.directory / 'model')!r})({GOOD[0]!r})\n"
        "assert answer[0]['label'] in ('0', '1'), answer\n"
        "assert not any(name.split('.')[0] == 'pretrain' for name in sys.modules)\n"
        "print(answer[0]['label'])\n"
    )
    done = subprocess.run([sys.executable, "-Pc", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == "1"


def test_a_stopped_run_goes_on_bit_for_bit(
    model: Path, tuning: Callable[..., TuningConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second seed, with dropout: the same weights and scores as a run that nobody stopped."""
    whole = tuning("name=whole", "train.seeds=[0,1]")
    assert finetune(model, whole, console=quiet()) == 0
    cut = tuning("name=cut", "train.seeds=[0,1]")
    calls = 0
    evaluate = Classification.evaluate

    def stopping(self: Any, *given: Any, **keys: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 10:  # five validations and two scores of the first seed, then the third validation of the second
            signal.raise_signal(signal.SIGTERM)
        return evaluate(self, *given, **keys)

    monkeypatch.setattr(Classification, "evaluate", stopping)
    assert finetune(model, cut, console=quiet()) == EXIT_STOPPED
    assert not (cut.directory / "result.json").exists()
    first = sha256_file(cut.directory / "seed-0" / "result.json")
    assert finetune(model, cut, console=quiet()) == 0
    assert sha256_file(cut.directory / "seed-0" / "result.json") == first
    for seed in (0, 1):
        ours, theirs = (
            sha256_file(directory / f"seed-{seed}" / "train/checkpoints/step-00000008/model/model.safetensors")
            for directory in (cut.directory, whole.directory)
        )
        assert ours == theirs
    assert result_of(cut)["summary"] == result_of(whole)["summary"]


def test_the_test_rows_are_looked_at_once(
    model: Path, tuning: Callable[..., TuningConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running the same command again scores nothing, and says the same."""
    config = tuning("train.steps=2")
    assert finetune(model, config, console=quiet()) == 0
    before = result_of(config)
    monkeypatch.setattr(Classification, "evaluate", None)
    assert finetune(model, config, console=quiet()) == 0
    again = result_of(config)
    assert {**again, "finished": ""} == {**before, "finished": ""}


def test_patience(model: Path, tuning: Callable[..., TuningConfig]) -> None:
    """A rate at which nothing is learnt: the first evaluation is the best one, and the run ends two later."""
    config = tuning("evaluate.patience=2", "train.steps=40", "optimizer.lr=1e-12", "evaluate.every=2")
    assert finetune(model, config, console=quiet()) == 0
    seed = result_of(config)["seeds"][0]
    assert seed["best"] == {"step": 2, "of": 6}


def test_new_weights_are_those_of_the_shape_alone(model: Path, tuning: Callable[..., TuningConfig]) -> None:
    config = tuning("model.weights=random", "train.steps=1")
    assert finetune(model, config, console=quiet()) == 0
    from safetensors.torch import load_file

    started = load_file(model / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    found = load_file(config.directory / "model" / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert started.shape == found.shape
    assert float(torch.nn.functional.cosine_similarity(started.flatten(), found.flatten(), dim=0).abs()) < 0.1
    assert float(found.std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task.max_length=999"], "task.max_length: 999 is longer than the 128 positions"),
        (["task.metric=f2"], "there is no score `f2`; there are"),
        (["task.label=nothing"], "there is no column `nothing`"),
        (["model.classifier_pooling=mean"], "model.classifier_pooling: bert"),
        (["train.attention=flex"], "train.attention: "),
        (["task.text_pair=label2"], "there is no column `label2`"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: Path, tuning: Callable[..., TuningConfig], overrides: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        finetune(model, tuning(*overrides), console=quiet())


def test_another_task_under_the_same_name_is_refused(model: Path, tuning: Callable[..., TuningConfig]) -> None:
    config = tuning("train.steps=2")
    assert finetune(model, config, console=quiet()) == 0
    with pytest.raises(ChangedConfigError, match=r"train\.batch_size: 6 -> 3"):
        finetune(model, tuning("train.steps=2", "train.batch_size=3"), console=quiet())
    with pytest.raises(ChangedConfigError, match=r"task\.max_length"):
        finetune(model, tuning("train.steps=2", "task.max_length=8"), console=quiet())
    with pytest.raises(ValueError, match="--resume never"):
        finetune(model, config, resume="never", console=quiet())
    with pytest.raises(ValueError, match="looked at once"):
        finetune(model, tuning("train.steps=4"), allow_changes=["train.steps"], console=quiet())
    with pytest.raises(ValueError, match="give the baseline a name of its own"):
        finetune("bag-of-words", config, console=quiet())


def test_a_model_that_is_none(tmp_path: Path, tuning: Callable[..., TuningConfig]) -> None:
    with pytest.raises(ValueError, match="no run, checkpoint or model directory"):
        finetune(tmp_path, tuning(), console=quiet())
    with pytest.raises(ValueError, match="there is no directory"):
        finetune("./nowhere", tuning(), console=quiet())


def test_the_baseline_by_name(tuning: Callable[..., TuningConfig]) -> None:
    config = tuning()
    assert finetune("bag-of-words", config, console=quiet()) == 0
    assert result_of(config)["summary"]["test/accuracy"]["median"] == 1.0


@pytest.mark.slow
def test_two_processes_learn_the_same(model: Path, tuning: Callable[..., TuningConfig], tmp_path: Path) -> None:
    """Without dropout, on two processes as on one: the same scores."""
    import os

    from transformers import AutoModelForMaskedLM

    still = tmp_path / "still"
    loaded = AutoModelForMaskedLM.from_pretrained(model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    loaded.save_pretrained(still)
    wordpiece().save_pretrained(still)
    results = []
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc_per_node", "2"])):
        config = tuning(f"name={name}")
        words = ["-m", "pretrain", "finetune", str(still), str(tmp_path / "task.yaml"), f"name={name}"]
        command = [sys.executable, *launcher, *words, f"out={tmp_path}/runs", f"task.root={tmp_path}"]
        subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        results.append(result_of(config)["summary"])
    for score, spread in results[0].items():
        assert results[1][score]["median"] == pytest.approx(spread["median"], abs=1e-4), score
