"""Whole runs of each objective: what a step learns does not depend on its micro-batches, and a run goes on exactly."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import elastic
import pytest
import tiny
import torch
from objective_runs import OBJECTIVES, prepared, run_of, write_text
from rich.console import Console

from pretrain.building import build_model, check_attention
from pretrain.config import RunConfig, dump_config
from pretrain.data.batches import target_length_for
from pretrain.data.loader import DataPlane
from pretrain.evaluation.likelihood import evaluate_batches
from pretrain.plan import planned_facts
from pretrain.planning.facts import model_facts
from pretrain.train import build_trainer, target_share, train
from pretrain.training.feed import counts_of

SETTINGS: dict[str, Any] = {"micro_batch": 8, "steps": 4, "precision": "fp32"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    directory = tmp_path_factory.mktemp("objectives")
    write_text(directory)
    return {name: prepared(run_of(directory, directory / "runs", name)) for name in OBJECTIVES if name != "spans"}


def changed(config: RunConfig, **settings: Any) -> RunConfig:
    """The run with other settings of its training."""
    return config.model_copy(update={"train": config.train.model_copy(update=SETTINGS | settings)})


@pytest.mark.parametrize("name", ["order", "corruption", "translation", "words", "rtd"])
def test_a_step_does_not_depend_on_its_micro_batches(runs: dict[str, RunConfig], name: str) -> None:
    """The pairs and targets of a micro-batch are divided by those of the whole batch; in float64, to its rounding."""
    found = []
    for micro_batch in (8, 3):
        trainer = build_trainer(changed(runs[name], micro_batch=micro_batch), console=Console(quiet=True))
        trainer.engine.bare.double()
        micro_batches = trainer.feed.micro_batches(0)
        assert len(micro_batches) == math.ceil(8 / micro_batch)
        loss = trainer._backward(micro_batches, counts_of(micro_batches))
        gradients = {key: one.grad for key, one in trainer.engine.bare.named_parameters() if one.grad is not None}
        found.append((float(loss), gradients))
    (loss, gradients), (other, others) = found
    assert loss == pytest.approx(other, rel=1e-6)  # shares are summed in float32
    assert gradients.keys() == others.keys()
    largest = max(float(one.abs().max()) for one in gradients.values())
    for key, one in gradients.items():
        assert torch.allclose(one, others[key], rtol=0, atol=1e-13 * largest), key


@pytest.mark.slow
def test_every_engine_makes_the_same_run(runs: dict[str, RunConfig], tmp_path: Path) -> None:
    """Pairs and tokens that further terms are divided by are counted over both processes."""
    states = [elastic.STATES[0], *(elastic.State(strategy, 2) for strategy in ("ddp", "fsdp2", "zero2"))]
    legs = []
    for name in (names := ("corruption", "translation", "order", "rtd")):
        config = changed(runs[name], micro_batch=3)
        (tmp_path / f"{name}.yaml").write_text(dump_config(config))
        base = tiny.Run(tmp_path / f"{name}.yaml", config.directory)
        legs += [(state, elastic.leg(tiny.copy(base, tmp_path / name / state.folder), state)) for state in states]
    found = iter(elastic.race(legs, tmp_path / "job"))
    for name in names:
        straight, *others = (next(found) for _ in states)
        for state, other in zip(states[1:], others, strict=True):
            _, problem = elastic.judge(other, straight, first=1, state=state)
            assert not problem, f"{name}, {state}: {problem}"


def test_a_plan_counts_the_model_that_the_run_builds(runs: dict[str, RunConfig]) -> None:
    for name, config in runs.items():
        model, facts = build_model(config), planned_facts(config)
        built = {key: tuple(one.shape) for key, one in model.named_parameters()}
        assert {one.name: one.shape for one in facts.parameters} == built, name
        assert model_facts(model, target_length=target_length_for(config)) == facts
        assert sum(facts.layer_sizes) + facts.outside == sum(one.numel() for one in model.parameters())


def test_an_attention_backend_that_cannot_run_is_refused_before_a_step(runs: dict[str, RunConfig]) -> None:
    for backend in ("flex", "varlen"):
        config = changed(runs["words"], attention=backend)
        with pytest.raises(ValueError, match=rf"train\.attention: .*{backend} runs on cuda, this is cpu: take sdpa"):
            check_attention(config, "cpu")
        check_attention(config, "cuda")
    stock = config.model_copy(update={"model": config.model.model_copy(update={"class_": "stock"})})
    with pytest.raises(ValueError, match=r"train\.attention: varlen .*model\.class is stock; take eager, sdpa or auto"):
        check_attention(stock, "cuda")


@pytest.mark.parametrize(("name", "of"), [("order", "ForPreTraining"), ("rtd", "ForReplacedTokenDetection")])
def test_the_model_has_the_heads_that_its_objective_needs(runs: dict[str, RunConfig], name: str, of: str) -> None:
    model = build_model(runs[name])
    assert type(model).__name__.endswith(of)
    scores = evaluate_batches(model, DataPlane.validation(runs[name]).batches(), device="cpu")
    if name == "order":  # the tokens alone, as of any masked model
        assert scores["loss"] == pytest.approx(math.log(model.config.vocab_size), abs=0.3)
        return
    assert scores["generator_loss"] == pytest.approx(math.log(model.config.vocab_size), abs=0.3)
    assert scores["discriminator_loss"] == pytest.approx(math.log(2), abs=0.2)
    weighed = scores["generator_loss"] + model.config.rtd_weight * scores["discriminator_loss"]
    assert scores["loss"] == pytest.approx(weighed, rel=1e-6)


@pytest.mark.parametrize("name", ["corruption", "translation"])
def test_an_encoder_decoder_is_scored_target_by_target(runs: dict[str, RunConfig], name: str) -> None:
    """Against each pair alone, without rows, padding or smoothing."""
    model = build_model(runs[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    total, count = 0.0, 0
    for batch in DataPlane.validation(runs[name]).batches(max_tokens=5 * 32):
        arrays = {key: torch.from_numpy(array) for key, array in batch.arrays.items()}
        for row in range(len(arrays["input_ids"])):
            for piece in range(1, int(arrays["document_ids"][row].max()) + 1):
                reads = arrays["document_ids"][row] == piece
                writes = arrays["decoder_document_ids"][row] == piece
                with torch.no_grad():
                    logits = model(
                        input_ids=arrays["input_ids"][row, reads][None],
                        decoder_input_ids=arrays["decoder_input_ids"][row, writes][None],
                    ).logits[0]
                targets = arrays["labels"][row, writes]
                total += float(torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum"))
                count += len(targets)
    rows = DataPlane.validation(runs[name]).batches(max_tokens=5 * 32)
    scores = evaluate_batches(model, rows, device="cpu")
    assert scores == {"loss": pytest.approx(total / count, rel=1e-5), "num_targets": count}


@pytest.mark.parametrize("name", ["rtd", "corruption"])
def test_a_run_goes_to_its_end_and_is_scored(runs: dict[str, RunConfig], name: str) -> None:
    config = changed(runs[name])
    assert train(config, console=Console(quiet=True)) == 0
    result = json.loads((config.directory / "train" / "result.json").read_text())
    assert result["step"] == 4
    assert math.isfinite(result["scores"]["validation/loss"])


def test_a_moving_rate_goes_on_exactly(runs: dict[str, RunConfig]) -> None:
    config = changed(runs["words"])
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": 2})})
    assert train(config, console=Console(quiet=True)) == 0
    directory = config.directory / "train"
    last = directory / "checkpoints" / "step-00000004" / "model" / "model.safetensors"
    whole = last.read_bytes()
    shutil.rmtree(last.parent.parent)
    assert train(config, console=Console(quiet=True)) == 0
    assert last.read_bytes() == whole


def test_the_share_of_positions_that_pass_the_head(runs: dict[str, RunConfig]) -> None:
    shares = {name: target_share(config) for name, config in runs.items()}
    assert shares["words"] == pytest.approx(0.3)  # from 0.1 to 0.5
    assert shares["rtd"] == shares["order"] == 0.15
    assert shares["translation"] == 1.0
    assert shares["corruption"] == 8 / 32


def test_segments_need_token_types(runs: dict[str, RunConfig], tmp_path: Path) -> None:
    config = runs["order"]
    plain = config.model_copy(update={"model": config.model.model_copy(update={"type_vocab_size": 0})})
    with pytest.raises(ValueError, match=r"objective\.sentences: order.*set model\.type_vocab_size: 2"):
        build_model(plain)
