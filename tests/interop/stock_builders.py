"""Tiny Loom and stock models with every parameter drawn from a normal, paired through the conversion."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from pretrain.interop import from_stock, to_stock
from pretrain.models import LoomConfig, loom_config, model_class, model_from_config

ENCODERS = ["bert", "roberta", "electra", "albert", "modernbert", "eurobert"]
DECODERS = ["gpt2", "llama", "qwen3", "modernbert-decoder"]
ARCHITECTURE_NAMES = ENCODERS + DECODERS
TABLES_OF_THEIR_OWN = ["electra", "modernbert", "eurobert", *DECODERS]
"""Designs whose stock class holds a token head that is not tied."""

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_SIZES: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "modernbert": {"local_window": 10, "rope_theta": 3000.0, "local_rope_theta": 50.0},
    "modernbert-decoder": {"local_window": 7, "rope_theta": 3000.0, "local_rope_theta": 50.0},
    "eurobert": {"num_key_value_heads": 2, "head_dim": 8},
    "llama": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
}


def tiny_config(architecture: str, **keys: Any) -> LoomConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 67,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
    }
    return loom_config(architecture, **(sizes | _SIZES.get(architecture, {}) | keys))


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter, norms and biases too, each from a generator of its own."""
    with torch.no_grad():
        for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
            generator = torch.Generator().manual_seed(1000 * seed + index)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def loom_model(architecture: str, task: str = "pretraining", **keys: Any) -> Any:
    config = tiny_config(architecture, **keys)
    model = model_class(config, task)(config)
    randomize(model)
    return model.eval()


def kept_state(model: Any) -> dict[str, Tensor]:
    """The state dict in which tied tensors stand once, as it is saved."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def load_exactly(model: Any, state: dict[str, Tensor]) -> Any:
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= set(model.all_tied_weights_keys)
    model.tie_weights()
    return model.eval()


def as_stock(model: Any, task: str | None = None) -> Any:
    """The stock model with a Loom model's weights."""
    config, state = to_stock(model.config, kept_state(model), task)
    return load_exactly(getattr(transformers, config.architectures[0])(config), state)


def as_loom(model: Any) -> Any:
    """The Loom model with a stock model's weights."""
    config, state = from_stock(model.config, kept_state(model))
    return load_exactly(model_from_config(config), state)


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 67, (rows, length), generator=torch.Generator().manual_seed(seed))


def relative(first: Tensor, second: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((first - second).detach().abs().max() / second.detach().abs().max())


def assert_same_logits(loom: Any, stock: Any) -> None:
    """Without a mask and with padding, by the backends of both."""
    ids = tokens(3, 40)
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[1, 29:] = 0
    mask[2, 4:] = 0
    for backend in ("eager", "sdpa"):
        loom.set_attn_implementation(backend)
        stock.set_attn_implementation(backend)
        with torch.no_grad():
            assert relative(loom(input_ids=ids).logits, stock(input_ids=ids).logits) < 1e-5
            ours, theirs = (model(input_ids=ids, attention_mask=mask).logits for model in (loom, stock))
        assert relative(ours[mask == 1], theirs[mask == 1]) < 1e-5


def assert_configs_equal(first: Any, second: Any) -> None:
    """But for what names the class and how it is stored."""
    ignored = {"architectures", "_name_or_path", "loom", "dtype"}
    ours, theirs = (
        {key: value for key, value in config.to_dict().items() if key not in ignored} for config in (first, second)
    )
    assert ours == theirs
