"""Measures inside a training: at the chosen steps, of the live model, the same as of the exported one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from pretrain.config import RunConfig, config_from_dict, config_to_dict
from pretrain.config_text import ConfigError
from pretrain.evaluate import evaluate_model
from pretrain.evaluation.loading import LoadedModel, load_model
from pretrain.evaluation.minimal_pairs import log_likelihoods, pseudo_log_likelihoods_of
from pretrain.evaluation.passes import Passes
from pretrain.export import export_model
from pretrain.prepare import prepare_data
from pretrain.ranks import Ranks
from pretrain.tokenizer import train_tokenizer
from pretrain.train import build_evaluators, build_trainer
from pretrain.training.trainer import EvaluationStopped

CPU = torch.device("cpu")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seventeen", "birds", "sing"]
SENTENCES = [" ".join(WORDS[(3 * n + k) % len(WORDS)] for k in range(3 + n % 6)) for n in range(16)]
QUIET = Console(quiet=True)


def write_examples(folder: Path) -> dict[str, Any]:
    """One small file for each measure; the keys of `evaluate` that name them."""
    pairs = [{"sentence_good": text, "sentence_bad": " ".join(text.split()[::-1])} for text in SENTENCES]
    alike = [
        {"sentence1": text, "sentence2": SENTENCES[number - 3], "score": number % 5}
        for number, text in enumerate(SENTENCES)
    ]
    found = [{"query": text, "positive": text + " birds"} for text in SENTENCES]
    for name, rows in (("pairs", pairs), ("alike", alike), ("found", found)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(
        "task: order\ndataset_path: json\ndataset_kwargs: {data_files: {test: pairs.jsonl}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: ""\ndoc_to_choice: "{{[sentence_good, sentence_bad]}}"\n'
        'doc_to_target: 0\ntarget_delimiter: ""\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return {
        "minimal_pairs": [str(folder / "pairs.jsonl")],
        "similarity": [str(folder / "alike.jsonl")],
        "retrieval": [str(folder / "found.jsonl")],
    }


def make_run(folder: Path, architecture: str, **changes: Any) -> RunConfig:
    """A prepared run of six steps that is measured after its second and its last."""
    (folder / "text.txt").write_text("\n".join(SENTENCES * 20))
    measures = write_examples(folder)
    if architecture in ("gpt2", "llama"):
        measures["tasks"] = [str(folder / "task.yaml")]
    content: dict[str, Any] = {
        "name": architecture,
        "out": str(folder / "runs"),
        "tokenizer": {"algorithm": "wordpiece" if architecture == "bert" else "byte-bpe", "vocab_size": 300},
        "data": {
            "train": [str(folder / "text.txt")],
            "document": "line",
            "sequence_length": 64,
            "validation": {"fraction": 0.1},
        },
        "model": {"architecture": architecture, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        "objective": {"kind": "mlm" if architecture == "bert" else "causal"},
        "optimizer": {"lr": 1e-2},
        "train": {"steps": 6, "batch_tokens": 256, "precision": "fp32"},
        "evaluate": {"every": 4, "measure_at": [2, "100%"], **measures, **changes},
        "log": {"to": ["jsonl"]},
    }
    config = config_from_dict(content)
    train_tokenizer(config, console=QUIET)
    prepare_data(config)
    return config


def scores_by_step(config: RunConfig) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (config.directory / "train" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if any("/" in key for key in line)}


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_a_training_is_measured_as_its_exported_model_is(architecture: str, tmp_path: Path) -> None:
    config = make_run(tmp_path, architecture)
    trainer = build_trainer(config, console=QUIET)
    checkpoint = trainer.train().checkpoint
    found = scores_by_step(config)
    measured = {step for step, line in found.items() if "pairs-pairs/accuracy" in line}
    assert set(found) == {0, 2, 4, 6}
    assert measured == {2, 6}
    assert "validation/loss" in found[2]
    export_model(checkpoint, tmp_path / "exported")
    scores = evaluate_model(tmp_path / "exported", measures=config.evaluate, device="cpu")
    last = found[6]
    assert last["pairs-pairs/accuracy"] == scores["minimal_pairs"]["pairs"]["accuracy"]
    for name in ("spearman", "pearson"):
        assert last[f"similarity-alike/{name}"] == pytest.approx(scores["similarity"]["alike"][name], abs=1e-4)
    for name in ("recall_at_1", "recall_at_10", "mrr_at_10", "ndcg_at_10"):
        assert last[f"retrieval-found/{name}"] == pytest.approx(scores["retrieval"]["found"][name], abs=1e-6)
    assert ("tasks/order/acc" in last) is (architecture == "gpt2")
    if architecture == "gpt2":  # lm-eval looks at the same likelihoods, of the text that begins the same
        assert last["tasks/order/acc"] == scores["tasks"]["order"]["acc"]
        assert last["tasks/order/acc"] == pytest.approx(last["pairs-pairs/accuracy"], abs=2 / len(SENTENCES))

    # The class in training reads packed rows; a sentence alone has the likelihood that the published class gives it.
    stock = load_model(tmp_path / "exported", device="cpu")
    live = LoadedModel(trainer.engine.readable, stock.tokenizer, stock.kind, "", "", CPU)
    assert type(live.model) is not type(stock.model)
    likelihoods = []
    for model in (live, stock):
        passes = Passes(CPU, batch_tokens=128)
        likelihoods.append(
            log_likelihoods(model, SENTENCES, passes, window=64)
            if stock.kind == "causal"
            else pseudo_log_likelihoods_of(model, SENTENCES, passes, window=64, how="within-word")
        )
    assert np.abs(likelihoods[0] - likelihoods[1]).max() < 1e-3


def test_measures_stop_when_the_run_is_asked_to(tmp_path: Path) -> None:
    config = make_run(tmp_path, "llama")
    model = build_trainer(config, evaluators={}, console=QUIET).engine.readable
    evaluators = build_evaluators(config)
    labels = ["pairs-pairs", "similarity-alike", "retrieval-found", "tasks"]
    assert list(evaluators)[1:] == labels
    for label in labels:
        for step, stops, expected in ((6, True, None), (3, True, {}), (6, False, dict)):
            context: Any = SimpleNamespace(
                step=step, total_steps=6, device=CPU, stopping=lambda stops=stops: stops, ranks=Ranks.alone()
            )
            if expected is None:
                with torch.no_grad(), pytest.raises(EvaluationStopped):
                    evaluators[label](model, context)
                continue
            with torch.no_grad():
                scores = evaluators[label](model, context)
            assert bool(scores) is (expected is dict)


def test_when_measures_are_made() -> None:
    from pretrain.config_evaluate import MeasuresConfig

    def steps(measure_at: Any) -> list[int]:
        config = MeasuresConfig(minimal_pairs=("a",), measure_at=measure_at)
        return [step for step in range(11) if config.measures_at(step, 10)]

    assert steps("100%") == [10]
    assert steps("30%") == [3, 6, 9, 10]
    assert steps(4) == [4, 8, 10]
    assert steps((0, 3, "50%")) == [0, 3, 5]
    assert steps(()) == []


def test_what_a_run_cannot_be_measured_on_is_refused(tmp_path: Path) -> None:
    config = make_run(tmp_path, "bert")
    content = json.loads(json.dumps(config_to_dict(config)))
    content["evaluate"] |= {"tasks": ["hellaswag"]}
    with pytest.raises(ConfigError, match=r"evaluate\.tasks is for objective\.kind causal, not mlm"):
        config_from_dict(content)
    content["evaluate"] |= {"tasks": [], "minimal_pairs": [str(tmp_path / "none.jsonl")]}
    with pytest.raises(ValueError, match=r"there is no file"):
        build_evaluators(config_from_dict(content))
    content["evaluate"] |= {"measure_at": "0%"}
    with pytest.raises(ConfigError, match="measure_at"):
        config_from_dict(content)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_two_processes_measure_what_one_does(strategy: str, tmp_path: Path) -> None:
    """Slow: a job of two processes."""
    config = make_run(tmp_path, "gpt2", measure_at=[0])
    file = tmp_path / "run.json"
    content = json.loads(json.dumps(config_to_dict(config)))
    found = []
    for number, more in ((1, {}), (2, {"strategy": strategy})):
        content["train"] = {key: value for key, value in content["train"].items() if value is not None} | more
        file.write_text(json.dumps(content))
        words = ["-m", "pretrain", "train", str(file), "--processes", str(number), "train.steps=2"]
        done = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(scores_by_step(config)[0])
        (config.directory / "train").rename(config.directory / f"train-{number}")
    for name, value in found[0].items():
        if "/" in name:
            assert found[1][name] == pytest.approx(value, abs=2e-3), name
    assert "tasks/order/acc" in found[1]
