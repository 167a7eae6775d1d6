"""Fine-tuning on two processes by every engine: what one process makes, and outputs that are written on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import BertForMaskedLM

from pretrain.config_task import load_tuning
from pretrain.finetune import finetune
from pretrain.runtime import EXIT_STOPPED
from tests.tasks.small_tokenizers import config_of, wordpiece
from tests.tasks.tuning_job import Leg, on_two_processes
from tests.tasks.writing_models import model_directory, tuning, write_jsonl

SHARDED = ("fsdp2", "zero2", "zero3")


def losses_of(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "seed-0/train/metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
def test_a_classifier_on_sharded_engines_is_that_of_one_process(tmp_path: Path) -> None:
    """Losses, scores, which checkpoint is best; stopped on the way and gone on too."""
    torch.manual_seed(0)
    model = tmp_path / "model"
    BertForMaskedLM(config_of("bert", num_hidden_layers=2)).save_pretrained(model)
    wordpiece().save_pretrained(model)
    texts = {1: ["the cat sat on the mat", "cats jumping and running"], 0: ["who published the table", "after the war"]}
    lines = [f"{text} {end}\t{label}" for label, some in texts.items() for text in some for end in ("tree", "1869", "")]
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    file = tmp_path / "task.yaml"
    file.write_text(
        f"task: {{kind: classification, root: {tmp_path}, train: [train.tsv], validation: [dev.tsv], test: [test.tsv], "
        "max_length: 16}\n"
        f"name: one\nout: {tmp_path}/runs\noptimizer: {{name: adamw, lr: 5e-3}}\n"
        # 5 rows over two processes, two at a time: one of them has an idle micro-batch.
        "train: {steps: 12, batch_size: 5, micro_batch: 2, precision: fp32, ddp_timeout: 180}\n"
        "evaluate: {every: 3}\nlog: {to: [jsonl]}\n"
    )
    assert finetune(model, load_tuning(file), console=Console(quiet=True)) == 0
    legs = []
    for strategy in SHARDED:
        given = (f"name={strategy}", f"train.strategy={strategy}")
        legs += [Leg(str(model), str(file), given, stop_after=7), Leg(str(model), str(file), given)]
    assert on_two_processes(legs, tmp_path / "job") == [EXIT_STOPPED, 0] * len(SHARDED)
    one = tmp_path / "runs" / "one"
    expected: dict[str, Any] = json.loads((one / "result.json").read_text())
    for strategy in SHARDED:
        run = tmp_path / "runs" / strategy
        losses = losses_of(run)
        assert sorted(losses) == list(range(1, 13))
        assert losses == pytest.approx(losses_of(one), abs=1e-5), strategy
        result = json.loads((run / "result.json").read_text())
        assert result["seeds"][0]["best"] == expected["seeds"][0]["best"], strategy
        for score, spread in expected["summary"].items():
            assert result["summary"][score]["median"] == pytest.approx(spread["median"], abs=1e-4), (strategy, score)
        assert (run / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_outputs_that_are_written_on_the_way(tmp_path: Path) -> None:
    """Five inputs of five lengths over two processes: unequal batches, and outputs that end at unequal lengths."""
    words = ["un", "deux", "trois pommes"]
    rows = [{"source": f"say {word} " + "please " * number, "target": word} for word in words for number in range(4)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(tmp_path / "dev.jsonl", rows[::2][:5])
    task = {"kind": "text-to-text", "train": ["rows.jsonl"], "validation": ["dev.jsonl"], "metric": "exact_match"}
    task |= {"max_length": 48, "max_target_length": 12, "scores": ["chrf"]}
    legs, runs = [], []
    for architecture, beams, strategies in (
        ("llama", 1, ("ddp", "fsdp2", "zero3")),
        ("marian", 2, ("fsdp2", "zero3")),
    ):
        model = model_directory(tmp_path, architecture, drawn=None)
        train = {"steps": 16, "batch_size": 6, "precision": "fp32", "ddp_timeout": 180}
        given = {"name": f"{architecture}-one", "train": train, "evaluate": {"every": "100%"}}
        tuning(tmp_path, task | {"num_beams": beams}, **given)
        file = (tmp_path / "tuning.yaml").rename(tmp_path / f"{architecture}.yaml")
        assert finetune(model, load_tuning(file), console=Console(quiet=True)) == 0
        for strategy in strategies:
            overrides = (f"name={architecture}-{strategy}", f"train.strategy={strategy}")
            legs.append(Leg(str(model), str(file), overrides))
            runs.append((tmp_path / "out" / f"{architecture}-{strategy}", tmp_path / "out" / f"{architecture}-one"))
    assert on_two_processes(legs, tmp_path / "job") == [0] * len(legs)
    for run, one in runs:
        ours, theirs = (scores_of(directory) for directory in (run, one))
        assert [line["step"] for line in ours] == [0, 16]
        assert ours == [pytest.approx(line, abs=1e-4) for line in theirs], run.name
        assert (run / "result.json").is_file()


def scores_of(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "seed-0/train/metrics.jsonl").read_text().splitlines())
    wanted = ("step", "validation/loss", "validation/exact_match", "validation/chrf")
    return [{name: line[name] for name in wanted} for line in lines if "validation/loss" in line]
