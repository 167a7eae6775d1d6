"""The formula of speed: published training speeds come out, and its parts move as they should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pretrain.models import flops_per_token, loom_config, model_class, model_from_config
from pretrain.planning.activations import Pass
from pretrain.planning.assumptions import assumptions_for
from pretrain.planning.facts import ModelFacts, model_facts
from pretrain.planning.gpus import find_gpu
from pretrain.planning.memory import Layout
from pretrain.planning.speed import StepTime, links_of, rates_of, step_time
from tests.planning.published import POINTS, Published, predicted_mfu


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point.shape}, {point.gpus} {point.gpu}")
def test_published_speeds_come_out(point: Published) -> None:
    assert predicted_mfu(point) == pytest.approx(point.mfu, rel=0.15)


def _facts(architecture: str = "llama", **keys: Any) -> ModelFacts:
    with torch.device("meta"):
        return model_facts(model_from_config(loom_config(architecture, **keys)))


def _time(facts: ModelFacts, layout: Layout, *, per_node: int = 8, rows: int = 8, **keys: Any) -> StepTime:
    gpu = find_gpu("h100")
    assumed = assumptions_for(gpu)
    rates = rates_of(gpu, "bf16", assumed, compiled=keys.pop("compiled", False))
    links = replace(links_of(gpu, per_node, assumed), **keys.pop("link", {}))
    step = Pass(rows, 2048, 2, checkpointing=keys.pop("checkpointing", False))
    return step_time(facts, step, layout, rates, links=links, **keys)


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("bert", {}),
        ("modernbert", {}),
        ("albert", {"num_hidden_groups": 2}),
        ("electra", {"embedding_size": 64, "generator_size": 0.25}),
        ("gpt2", {}),
        ("llama", {}),
        ("transformer", {"num_decoder_layers": 2}),
        ("t5", {"embedding_size": 64, "tie_word_embeddings": False, "num_key_value_heads": 3}),
    ],
)
def test_flops_are_those_of_mfu(architecture: str, keys: dict[str, Any]) -> None:
    config = loom_config(architecture, **keys)
    share = {"encoder": 0.15, "decoder": 1.0, "seq2seq": 0.25}[config.kind]
    task = "replaced_token_detection" if "generator_size" in keys else "pretraining"
    with torch.device("meta"):
        facts = model_facts(model_class(config, task)(config), target_length=128)
    gpu = find_gpu("h100")
    rates = rates_of(gpu, "bf16", assumptions_for(gpu), compiled=False)
    time = step_time(facts, Pass(4, 512, 2, target_share=share), Layout(), rates, micro_steps=3)
    assert time.flops == pytest.approx(3 * 4 * 512 * flops_per_token(config, 512, share))


def test_slow_links_cost_and_accumulation_pays_for_replicas() -> None:
    facts = _facts()
    slow = {"inside": 1e9, "between": 1e9}
    fast, held_up = _time(facts, Layout("ddp", 8)), _time(facts, Layout("ddp", 8), link=slow)
    assert fast.communication == 0.0 < held_up.communication
    assert _time(facts, Layout("ddp", 8), link=slow, micro_steps=8).seconds < 8 * held_up.seconds
    sharded = _time(facts, Layout("fsdp2", 8, 8), link=slow, micro_steps=8)
    assert sharded.communication > 3 * held_up.communication


def test_hybrid_sharding_spares_the_network() -> None:
    facts = _facts()
    network = {"between": 1e8}
    assert (
        _time(facts, Layout("fsdp2", 64, 8), link=network).communication
        < 0.3 * _time(facts, Layout("fsdp2", 64, 64), link=network).communication
    )


def test_more_gpus_lose_two_percent_a_doubling() -> None:
    facts = _facts()
    assert _time(facts, Layout("ddp", 64)).scaling == pytest.approx(0.98**-3)
    assert _time(facts, Layout("ddp", 4)).scaling == 1.0


def test_small_models_wait_for_the_host() -> None:
    small = _time(_facts("gpt2", hidden_size=64, num_attention_heads=4), Layout(), rows=1)
    assert small.host > small.device
    compiled = _time(_facts("gpt2", hidden_size=64, num_attention_heads=4), Layout(), rows=1, compiled=True)
    assert compiled.seconds < small.seconds


def test_recomputing_offloading_and_muon_take_time() -> None:
    facts = _facts()
    plain = _time(facts, Layout())
    assert 1.15 < _time(facts, Layout(), checkpointing=True).device / plain.device < 1.4
    assert _time(facts, Layout("zero1", 1, 1, "optimizer")).seconds > plain.seconds
    muon = _time(facts, Layout("ddp", 8), optimizer="muon")
    assert muon.update > 2 * plain.update
    assert _time(facts, Layout("zero1", 8, 8), optimizer="muon").update < muon.update / 4
