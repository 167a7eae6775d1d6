"""Facts of a model: exact counts, from a model without memory as from a real one."""

from __future__ import annotations

import pytest
import torch

from pretrain.models import loom_config, model_from_config
from pretrain.planning.facts import ParameterFact, model_facts
from pretrain.training.optim import MUON, name_groups

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "gpt2", "llama"])
def test_counts_are_those_of_the_model(architecture: str) -> None:
    config = loom_config(architecture, max_position_embeddings=32, **SMALL)
    model = model_from_config(config)
    facts = model_facts(model)
    assert facts.size == sum(parameter.numel() for parameter in model.parameters())
    assert facts.size == sum(facts.layer_sizes) + facts.outside
    assert facts.layer_sizes == tuple(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    parameters = dict(model.named_parameters())
    muon = sum(parameters[name].numel() for name in name_groups(model, matrices=True)[MUON])
    assert sum(facts.layer_matrices) == muon
    with torch.device("meta"):
        assert model_facts(model_from_config(config)) == facts


def test_frozen_parameters_are_no_trained_ones() -> None:
    model = model_from_config(loom_config("gpt2", max_position_embeddings=32, **SMALL))
    model.model.embed_positions.weight.requires_grad_(False)
    facts = model_facts(model)
    assert facts.size - facts.trainable == 32 * 64


def test_a_shard_is_the_largest_part_of_the_first_axis() -> None:
    assert ParameterFact("w", (10, 3), None).shard(4) == 9
    assert ParameterFact("w", (10, 3), None).shard(1) == 30
    assert ParameterFact("b", (2,), 0).shard(64) == 1
