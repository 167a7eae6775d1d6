"""Whole runs that detect replaced tokens: both losses are logged, a run goes on exactly, both parts are published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_runs import prepared, run_of, write_text
from rich.console import Console
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining

from pretrain.building import build_model, planned_model_config
from pretrain.config import RunConfig
from pretrain.config_model import ModelConfig
from pretrain.model_reading import read_detector, read_stock
from pretrain.run import run
from pretrain.train import train

IDS = torch.arange(5, 29).view(2, 12)
OF_THE_CLOCK = ("seconds", "tokens_per_second", "data_wait", "memory_gib")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    directory = tmp_path_factory.mktemp("detectors")
    write_text(directory)
    return prepared(run_of(directory, directory / "runs", "rtd"))


def changed(config: RunConfig, **sections: Any) -> RunConfig:
    """The run with other keys; `out` is a place of its own, where it finds tokenizer and data if they are the same."""
    sections["train"] = {"micro_batch": 8, "steps": 4, "precision": "fp32"} | sections.get("train", {})
    sections["evaluate"] = {"every": 4}
    out = sections.pop("out")
    update = {name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()}
    found = config.model_copy(update=update | {"out": str(out)})
    if found.model.architecture == config.model.architecture:
        found.directory.mkdir(parents=True)
        for name in ("tokenizer", "data"):
            (found.directory / name).symlink_to((config.directory / name).resolve())
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def steps_of(config: RunConfig) -> list[dict[str, float]]:
    """What was logged of each step, but for what the clock says."""
    lines = (config.directory / "train" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    return [{key: value for key, value in line.items() if key not in OF_THE_CLOCK} for line in steps]


def quietly(verb: Any, config: RunConfig) -> None:
    assert verb(config, console=Console(quiet=True)) == 0


@pytest.mark.parametrize("sharing", ["tied", "gradient_disentangled"])
def test_a_run_goes_on_exactly_and_logs_both_losses(made: RunConfig, sharing: str, tmp_path: Path) -> None:
    """Weights, moments and numbers of steps 3 and 4 after a stop at 2; the numbers are those of the whole batch."""
    sections: dict[str, Any] = {"model": {"rtd_sharing": sharing}, "log": {"every": 1, "to": ("jsonl",)}}
    config = changed(made, out=tmp_path / "a", checkpoint={"every": 2}, **sections)
    last = config.directory / "train" / "checkpoints" / "step-00000004"
    outcomes = []
    for _ in range(2):
        quietly(train, config)
        files = {str(path.relative_to(last)): path.read_bytes() for path in last.rglob("*.safetensors")}
        outcomes.append((files, steps_of(config)))
        shutil.rmtree(last)
    (whole, steps), (again, steps_again) = outcomes
    assert len(whole) > 1
    assert again == whole
    assert steps_again == steps
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert line["loss"] == pytest.approx(line["generator_loss"] + 50 * line["discriminator_loss"], rel=1e-6)
        assert 0.05 < line["replaced"] < 0.25
        assert 0 <= line["detection_recall"] <= 1 >= line["accuracy"] > 0
    other = changed(made, out=tmp_path / "b", **sections | {"train": {"micro_batch": 3}})
    quietly(train, other)
    for line, wanted in zip(steps_of(other), steps, strict=True):
        assert line == pytest.approx(wanted, rel=1e-4)


def test_one_command_makes_scores_and_publishes_both_parts(made: RunConfig, tmp_path: Path) -> None:
    """In a shape that transformers' ELECTRA holds: both load there, and say what ours say."""
    config = changed(made, out=tmp_path, log={"every": 4, "to": ("jsonl",)})
    quietly(run, config)
    assert [line["step"] for line in steps_of(config)] == [4]
    result = json.loads((config.directory / "train" / "result.json").read_text())
    scores = json.loads((config.directory / "report" / "scores.json").read_text())["validation"]
    for name in ("loss", "generator_loss", "discriminator_loss", "accuracy", "detection_recall", "replaced"):
        assert scores[name] == pytest.approx(result["scores"][f"validation/{name}"], rel=1e-6)
    ours: Any = read_detector(config.directory / "train" / "checkpoints" / "step-00000004" / "model")
    for auto, folder, model in (
        (AutoModelForPreTraining, "", ours),
        (AutoModelForMaskedLM, "generator", ours.generator),
    ):
        stock, report = auto.from_pretrained(config.directory / "export" / folder, output_loading_info=True)
        assert type(stock).__module__ == "transformers.models.electra.modeling_electra"
        assert not report["missing_keys"] | report["unexpected_keys"]
        expected = logits(model)
        assert float((expected - logits(stock)).abs().max()) <= 1e-5 * float(expected.abs().max())
    with torch.no_grad():
        stack = AutoModel.from_pretrained(config.directory / "export").eval()(input_ids=IDS).last_hidden_state
        assert torch.allclose(stack, ours.model(input_ids=IDS).last_hidden_state, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "sharing"),
    [("modernbert", "gradient_disentangled"), pytest.param("albert", "tied", marks=pytest.mark.slow)],
)
def test_a_shape_without_a_stock_home_is_published_with_its_code(
    made: RunConfig, architecture: str, sharing: str, tmp_path: Path
) -> None:
    sizes = {"architecture": architecture, "embedding_size": 8, "rtd_sharing": sharing, "generator_size": 0.5}
    config = changed(made, out=tmp_path, model=sizes, export={"to": "code"}, train={"steps": 2})
    quietly(run, config)
    ours: Any = read_detector(config.directory / "train" / "checkpoints" / "step-00000002" / "model")
    export = config.directory / "export"
    assert (export / "modeling_loom_rtd.py").is_file()
    assert torch.allclose(logits(AutoModelForPreTraining.from_pretrained(export)), logits(ours), atol=1e-5)
    assert torch.allclose(logits(read_stock(export / "generator")), logits(ours.generator), atol=1e-5)

    model = ModelConfig.model_validate({"from": str(export), "rtd_weight": 7.0})
    went_on: Any = build_model(config.model_copy(update={"model": model}))
    assert torch.allclose(logits(went_on), logits(ours), atol=1e-5)
    assert (went_on.config.rtd_weight, went_on.config.rtd_sharing) == (7.0, sharing)
    planned: Any = planned_model_config(config.model_copy(update={"model": model}))
    assert planned.generator_config().to_dict() == went_on.config.generator_config().to_dict()
    for first, second in zip(went_on.generator.parameters(), ours.generator.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_generator_that_cannot_be_published_is_refused_before_anything_is_made(
    made: RunConfig, tmp_path: Path
) -> None:
    config = changed(made, out=tmp_path, model={"generator": {"norm_placement": "pre"}})
    with pytest.raises(ValueError, match=r"norm_placement 'post' \(here 'pre'\).*export\.to: code"):
        run(config, console=Console(quiet=True))
