"""Tiny Loom models with every parameter drawn from a normal, and the batches that the tests feed them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.models import CAPABILITIES, LoomConfig, LoomPreTrainedModel, loom_config, model_class

ENCODERS = ["bert", "roberta", "electra", "albert", "modernbert", "eurobert"]
DECODERS = ["gpt2", "llama", "qwen3", "modernbert-decoder"]
ARCHITECTURE_NAMES = ENCODERS + DECODERS
SEQ2SEQ = ["transformer", "t5"]
HERE = [name for name, can in CAPABILITIES.items() if can.devices is None]
"""The attention backends that run, forward and backward, wherever the tests do."""
_SIZES: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 12},
    "eurobert": {"num_key_value_heads": 2},
    "llama": {"num_key_value_heads": 2},
    "modernbert": {"local_window": 8},
    "modernbert-decoder": {"local_window": 8},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "t5": {"head_dim": 8},
}


def tiny_config(architecture: str, **keys: Any) -> LoomConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    return loom_config(architecture, **(sizes | _SIZES.get(architecture, {}) | keys))


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter, norms and biases too: initial values are mostly 0 or 1, where swapped tensors pass."""
    with torch.no_grad():
        for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
            generator = torch.Generator().manual_seed(1000 * seed + index)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def tiny_model(
    architecture: str, *, task: str = "pretraining", seed: int = 0, attention: str = "sdpa", **keys: Any
) -> LoomPreTrainedModel:
    config = tiny_config(architecture, **keys)
    config._attn_implementation = attention
    model = model_class(config, task)(config)
    randomize(model, seed)
    return model.eval()


def tokens(rows: int, length: int, *, seed: int = 0, vocabulary: int = 61) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, vocabulary, (rows, length), generator=generator)


def documents(*rows: list[int]) -> Tensor:
    """Document ids from piece lengths: documents([3, 2, -1]) is [[1, 1, 1, 2, 2, 0]]; a negative length is padding."""
    made = []
    for pieces in rows:
        row: list[int] = []
        for number, length in enumerate(pieces, start=1):
            row += [0 if length < 0 else number] * abs(length)
        made.append(row)
    return torch.tensor(made, dtype=torch.int32)


def relative(first: Tensor, second: Tensor) -> float:
    """Largest difference over the largest value."""
    first, second = first.detach(), second.detach()
    return float((first - second).abs().max() / second.abs().max())
