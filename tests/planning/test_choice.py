"""The micro-batch and the strategy that are chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pretrain.config import RunConfig, config_from_dict
from pretrain.models import loom_config, model_from_config
from pretrain.planning.activations import Pass
from pretrain.planning.assumptions import assumptions_for
from pretrain.planning.choice import Margins, Option, best, evaluate, even_rows, layouts, planned_micro_batch
from pretrain.planning.facts import ModelFacts, model_facts
from pretrain.planning.gpus import GIB, find_gpu
from pretrain.planning.memory import Layout, memory
from pretrain.planning.speed import links_of, rates_of


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    with torch.device("meta"):
        return model_facts(model_from_config(loom_config("llama")))


def _config(**train: Any) -> RunConfig:
    return config_from_dict(
        {
            "name": "planned",
            "data": {"train": ["x"], "sequence_length": 2048},
            "model": {"architecture": "llama"},
            "objective": {"kind": "causal"},
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "train": {"steps": 10, "batch_tokens": 96 * 2048, **train},
        }
    )


def test_the_planned_micro_batch_fits_and_one_more_part_would_not(facts: ModelFacts) -> None:
    config = _config()
    memory_bytes = 40 * GIB
    rows = planned_micro_batch(config, facts, memory_bytes, "single", 1)
    assert 96 % rows == 0 or rows > 1
    step = Pass(rows, 2048, 2)
    assert memory(facts, step, accumulating=True).total < memory_bytes
    bigger = even_rows(96, 96)  # all rows at once
    assert memory(facts, replace(step, rows=bigger)).total > memory_bytes


def test_more_memory_more_ranks_and_checkpointing_take_more_rows(facts: ModelFacts) -> None:
    def rows(gib: float, strategy: str = "single", world: int = 1, **train: Any) -> int:
        return planned_micro_batch(_config(**train), facts, int(gib * GIB), strategy, world)

    assert rows(24) < rows(80) <= 96
    assert rows(24) < rows(24, gradient_checkpointing=True)
    assert rows(10**6) == 96
    assert rows(10**6, "ddp", 8) == 12
    assert rows(12, "ddp", 4) <= rows(12, "fsdp2", 4)
    assert rows(1) == 1  # the trainer finds out that nothing fits
    assert rows(6, "zero3", 8) <= rows(6, "zero3", 8, offload="all")


def test_fp32_takes_fewer_rows(facts: ModelFacts) -> None:
    wide = planned_micro_batch(_config(), facts, 40 * GIB, "single", 1, compute_bytes=4)
    assert wide < planned_micro_batch(_config(), facts, 40 * GIB, "single", 1)


def test_an_unknown_strategy_is_named(facts: ModelFacts) -> None:
    with pytest.raises(ValueError, match=r"train\.strategy: zero4"):
        planned_micro_batch(_config(), facts, GIB, "zero4", 1)


def test_parts_are_even() -> None:
    assert [even_rows(96, most) for most in (96, 95, 50, 40, 7, 1)] == [96, 48, 48, 32, 7, 1]


def _evaluated(facts: ModelFacts, gib: float, gpus: int = 8, micro_batch: int | None = None) -> list[Option]:
    gpu = find_gpu("h100")
    assumed = assumptions_for(gpu)
    return [
        evaluate(
            facts,
            Pass(1, 2048, 2),
            layout,
            rows=12,
            micro_batch=micro_batch,
            device_memory=gib * GIB,
            optimizer="adamw",
            margins=Margins(),
            rates=rates_of(gpu, "bf16", assumed, compiled=False),
            links=links_of(gpu, 8, assumed),
        )
        for layout in layouts(gpus, 8, shard_size=None)
    ]


def test_the_simplest_that_fits_is_taken(facts: ModelFacts) -> None:
    roomy = best(_evaluated(facts, 80))
    assert roomy is not None
    assert roomy.layout.strategy == "ddp"
    tight = best(_evaluated(facts, 8))
    assert tight is not None
    assert tight.layout.strategy != "ddp"
    assert best(_evaluated(facts, 3)) is None


def test_a_given_micro_batch_is_kept_or_does_not_fit(facts: ModelFacts) -> None:
    assert {option.micro_batch for option in _evaluated(facts, 80, micro_batch=5)} == {5}
    assert all(option.time is None for option in _evaluated(facts, 8, micro_batch=12))


def test_layouts_of_several_nodes_have_hybrid_sharding() -> None:
    names = [layout.name for layout in layouts(64, 8, shard_size=None)]
    assert names[0] == "ddp"
    assert "hybrid fsdp2" in names
    assert "hybrid fsdp2" not in [layout.name for layout in layouts(8, 8, shard_size=None)]
    assert [layout.shard for layout in layouts(64, 8, shard_size=16) if layout.name == "hybrid fsdp2"] == [16]
    assert layouts(1, 1, shard_size=None)[0] == Layout()
