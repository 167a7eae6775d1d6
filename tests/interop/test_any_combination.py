"""Any combination of switches has a stock model with the same logits, or is refused by keys that truly differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stock_builders import DECODERS, ENCODERS, as_loom, as_stock, kept_state, randomize, relative, tokens

from pretrain.interop import NoStockHome, stock_config
from pretrain.interop.mapping import own_fields
from pretrain.models import LoomConfig, loom_config, model_class

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
}
BASE: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 8},
    "modernbert": {"local_window": 6},
    "modernbert-decoder": {"local_window": 5},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 6},
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 10}
SWITCHES: dict[str, list[Any]] = {
    "attention_bias": [True, False],
    "attention_pattern": [["local", "global"], ["global", "local", "local"]],
    "attention_scale": [0.3],
    "attention_softcap": [4.0],
    "block_kind": ["parallel"],
    "embedding_norm": [True, False],
    "embedding_scale": [2.0],
    "embedding_size": [8, 16],
    "first_norm": [True, False],
    "global_attention_every": [1, 2, 3],
    "head_bias": [True, False],
    "head_dense_bias": [True, False],
    "head_dim": [2, 8],
    "head_transform": [True, False],
    "hidden_act": ["gelu", "gelu_new", "silu", "relu", "relu2"],
    "local_rope_theta": [50.0],
    "local_window": [4, 7],
    "logit_softcap": [3.0],
    "mlp_bias": [True, False],
    "mlp_kind": ["plain", "gated"],
    "norm_bias": [True, False],
    "norm_kind": ["layer_norm", "rms_norm"],
    "norm_placement": ["pre", "post"],
    "num_hidden_groups": [1, 2, 4],
    "num_key_value_heads": [1, 2, 4],
    "output_scale": [0.5],
    "partial_rotary_factor": [0.5],
    "position_kind": ["learned", "rotary", "alibi", "none", "sinusoidal", "relative"],
    "position_offset": [0, 1, 4],
    "qk_norm": ["none", "per_head", "full_width"],
    "residual_scale": [0.5],
    "rope_scaling": [{"rope_type": "linear", "factor": 2.0}, YARN],
    "rope_theta": [300.0],
    "tie_word_embeddings": [True, False],
    "type_vocab_size": [0, 1, 2],
}


def built(architecture: str, keys: dict[str, Any]) -> LoomConfig | None:
    """The tiny config, None where no model can be built from it."""
    try:
        return loom_config(architecture, **(SIZES | BASE.get(architecture, {}) | keys))
    except ValueError:
        return None


@st.composite
def combinations(draw: st.DrawFn, architectures: list[str]) -> tuple[str, dict[str, Any]]:
    architecture = draw(st.sampled_from(architectures))
    names = draw(st.lists(st.sampled_from(sorted(SWITCHES)), min_size=1, max_size=4, unique=True))
    return architecture, {name: draw(st.sampled_from(SWITCHES[name])) for name in names}


@pytest.mark.parametrize("architectures", [ENCODERS, DECODERS], ids=["encoders", "decoders"])
def test_a_combination_is_held_exactly_or_refused_by_keys_that_differ(architectures: list[str]) -> None:
    held, refused = [], []

    @settings(max_examples=50, deadline=None, derandomize=True, database=None)
    @given(combinations(architectures))
    def check(drawn: tuple[str, dict[str, Any]]) -> None:
        architecture, keys = drawn
        config = built(architecture, keys)
        assume(config is not None)
        try:
            stock_config(config)
        except NoStockHome as refusal:
            refused.append(drawn)
            assert_what_is_refused_is_in_the_way(refusal, architecture, keys)
        else:
            held.append(drawn)
            assert_held(config)

    check()
    assert len(held) > 10
    assert len(refused) > 10


def assert_held(config: LoomConfig) -> None:
    loom = model_class(config)(config)
    randomize(loom)
    loom.eval()
    stock = as_stock(loom)
    assert type(stock).__module__.startswith(transformers.__name__)
    ids, mask = tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:] = 0
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids, attention_mask=mask).logits[mask == 1] for model in (loom, stock))
    assert relative(ours, theirs) < 1e-5
    back = as_loom(stock)
    assert own_fields(back.config) == own_fields(config)
    state, again = kept_state(loom), kept_state(back)
    assert state.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


def assert_what_is_refused_is_in_the_way(refusal: NoStockHome, architecture: str, keys: dict[str, Any]) -> None:
    """Each refusal names a key that was changed; who changes back what is named comes to a model that is held."""
    keys = dict(keys)
    plain = own_fields(built(architecture, {}))
    while True:
        config = built(architecture, keys)
        if config is None:  # what is left does not fit each other: not a matter of homes
            return
        ours = own_fields(config)
        assert refusal.keys
        assert all(key in str(refusal) for key in refusal.keys)
        named = [key for key in refusal.keys if ours[key] != plain[key]]
        assert named, refusal
        changed = [key for key in named if key in keys]
        if not changed:  # what is named follows from a key that was given
            return
        for key in changed:
            del keys[key]
        config = built(architecture, keys)
        if config is None:
            return
        try:
            stock_config(config)
        except NoStockHome as next_refusal:
            refusal = next_refusal
        else:
            return
