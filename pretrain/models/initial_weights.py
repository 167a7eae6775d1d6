"""Initial weights: how each matrix is drawn, by `config.initializer` and the role it plays.

Modules mark their matrices with `loom_role`: query, residual (writes into the residual stream), head, classifier.
"""

# mypy: disable-error-code="no-untyped-call"

import math

from torch import Tensor, nn
from transformers import initialization as init

from .configuration_loom import LoomConfig
from .norms import LoomRMSNorm


def initialize(module: nn.Module, config: LoomConfig) -> None:
    """Draw the weights of one module, without its children; biases 0, norms 1.

    normal: every matrix from N(0, initializer_range). scaled_normal (GPT-2): what writes into the residual stream
    divided by sqrt(2 layers). scaled_truncated_normal (Megatron's scheme as ModernBERT uses it): the same, cut at two
    standard deviations; the head's transform and an untied token head take the divided width, the classifier
    hidden_size ** -0.5. xavier_uniform (Vaswani et al. 2017, by its authors' code): matrices uniform over their fan-in
    and fan-out, embeddings N(0, hidden_size ** -0.5). t5 (Raffel et al. 2019, by its authors' code): N(0, fan-in **
    -0.5) times initializer_range, queries divided by the root of head_dim too, embeddings and head N(0,
    initializer_range).
    """
    if isinstance(module, nn.LayerNorm | LoomRMSNorm):
        init.ones_(module.weight)
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        _draw(module.weight, _embedding_width(module, config), config)
    elif isinstance(module, nn.Linear):
        if config.initializer == "xavier_uniform":
            init.xavier_uniform_(module.weight)
        else:
            _draw(module.weight, _matrix_width(module, config), config)
        if module.bias is not None:
            init.zeros_(module.bias)


def _embedding_width(module: nn.Embedding, config: LoomConfig) -> float:
    if config.initializer == "xavier_uniform":
        return float(config.hidden_size**-0.5)
    if config.initializer == "t5" and module.embedding_dim == config.num_attention_heads:  # the relative bias
        return float(config.initializer_range * config.hidden_size**-0.5)
    return config.initializer_range


def _matrix_width(module: nn.Linear, config: LoomConfig) -> float:
    """The standard deviation of one matrix."""
    width, role = config.initializer_range, getattr(module, "loom_role", None)
    if config.initializer == "t5":
        if role == "head":
            return width
        fan_in = module.in_features * (config.head_dim if role == "query" else 1)
        return float(width * fan_in**-0.5)
    if config.initializer == "normal" or role in (None, "query"):
        return width
    divided = width / math.sqrt(2 * config.num_hidden_layers)
    if role == "residual":
        return divided
    if config.initializer == "scaled_truncated_normal":
        return divided if role == "head" else float(config.hidden_size**-0.5)
    return width


def _draw(weight: Tensor, width: float, config: LoomConfig) -> None:
    if config.initializer == "scaled_truncated_normal":
        init.trunc_normal_(weight, mean=0.0, std=width, a=-2 * width, b=2 * width)
    else:
        init.normal_(weight, mean=0.0, std=width)
