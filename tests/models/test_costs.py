"""What a token costs, by the config alone, is what the matrix products of a training step add up to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loom_builders import tokens
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models import LoomConfig, flops_per_token, loom_config, model_from_config

ROWS, LENGTH = 2, 32
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def counted(config: LoomConfig, target_length: int) -> int:
    """Operations of one forward and backward pass over whole rows, as torch counts those of matrix products."""
    config._attn_implementation = "eager"
    model = model_from_config(config).train()
    batch: dict[str, Any] = {"input_ids": tokens(ROWS, LENGTH)}
    if config.kind == "seq2seq":
        batch["labels"] = tokens(ROWS, target_length)
    elif config.kind == "decoder":
        batch["shift_labels"] = tokens(ROWS, LENGTH)
    else:
        batch["labels"] = torch.full((ROWS, LENGTH), -100)
        batch["labels"][:, :target_length] = 7
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    ("architecture", "keys", "target_length"),
    [
        ("bert", {}, 8),
        ("electra", {"embedding_size": 16}, 8),
        ("albert", {"embedding_size": 16}, 32),
        ("modernbert", {}, 4),
        ("gpt2", {"num_hidden_groups": 2}, 32),
        ("gpt2", {"embedding_size": 16, "tie_word_embeddings": False}, 32),
        ("llama", {"num_key_value_heads": 2, "head_dim": 8}, 32),
        ("transformer", {}, 32),
        ("transformer", {"num_decoder_layers": 2}, 8),
        ("transformer", {"embedding_size": 16, "tie_word_embeddings": False}, 48),
        ("t5", {"mlp_kind": "gated", "num_key_value_heads": 2, "head_dim": 10}, 16),
    ],
)
def test_the_arithmetic_equals_the_count(architecture: str, keys: dict[str, Any], target_length: int) -> None:
    config = loom_config(architecture, **(SIZES | keys))
    share = 1.0 if config.kind == "decoder" else target_length / LENGTH
    assert flops_per_token(config, LENGTH, share) * ROWS * LENGTH == pytest.approx(counted(config, target_length))
