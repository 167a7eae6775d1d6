"""What ModernBERT and its decoder share: config fields, patterns of local layers, and the names of tensors.

Their dropout inside the MLP (`mlp_dropout`) carries our `hidden_dropout`: the nearest place they have, read while
training alone.
"""

from __future__ import annotations

from typing import Any

from pretrain.models import LoomConfig

from .mapping import Rule, fields_from_stock, fields_to_stock, join_linear, linear, norm

LOCAL, GLOBAL = "sliding_attention", "full_attention"
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "hidden_act": "hidden_activation",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
    "norm_eps": "norm_eps",
    "norm_bias": "norm_bias",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "head_dense_bias": "classifier_bias",
    "head_bias": "decoder_bias",
    "attention_dropout": "attention_dropout",
    "embedding_dropout": "embedding_dropout",
    "hidden_dropout": "mlp_dropout",
    "classifier_dropout": "classifier_dropout",
    "tie_word_embeddings": "tie_word_embeddings",
}


def to_fields(config: LoomConfig) -> dict[str, Any]:
    """Stock fields, without the width of local layers, which the two count differently."""
    kinds = config.attention_kinds
    rope: dict[str, Any] = {GLOBAL: {"rope_type": "default", "rope_theta": config.rope_theta}}
    if "local" in kinds:
        rope[LOCAL] = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    keys: dict[str, Any] = {
        "classifier_activation": config.hidden_act,
        "rope_parameters": rope,
        "layer_types": [GLOBAL if kind == "global" else LOCAL for kind in kinds],
    }
    if config.attention_pattern is None:
        keys["global_attn_every_n_layers"] = config.global_attention_every
    return fields_to_stock(config, FIELDS) | keys


def from_fields(stock: Any) -> dict[str, Any]:
    """Loom fields, without the width of local layers."""
    keys = fields_from_stock(stock, FIELDS) | pattern(stock)
    keys["rope_theta"] = float(stock.rope_parameters[GLOBAL]["rope_theta"])
    if LOCAL in stock.layer_types:
        keys["local_rope_theta"] = float(stock.rope_parameters[LOCAL]["rope_theta"])
    return keys


def pattern(stock: Any) -> dict[str, Any]:
    """The Loom key of `layer_types`: the spacing of global layers, else the shortest list that repeats to them."""
    kinds = ["global" if kind == GLOBAL else "local" for kind in stock.layer_types]
    later = [index for index, kind in enumerate(kinds) if index and kind == "global"]
    stated = getattr(stock, "global_attn_every_n_layers", None)
    for every in (stated, later[0] if later else len(kinds)):
        if every and kinds == ["local" if index % every else "global" for index in range(len(kinds))]:
            return {"global_attention_every": every}
    lengths = range(1, len(kinds) + 1)
    period = next(n for n in lengths if all(kinds[index % n] == kind for index, kind in enumerate(kinds)))
    return {"attention_pattern": kinds[:period], "global_attention_every": 1}


def normal(stock: dict[str, Any]) -> dict[str, Any]:
    """Without the values that only local layers read, where there are none."""
    if LOCAL in stock["layer_types"]:
        return stock
    rope = {GLOBAL: stock["rope_parameters"][GLOBAL]}
    return {key: value for key, value in stock.items() if key != "local_attention"} | {"rope_parameters": rope}


def stack_rules(config: LoomConfig, ours: str, theirs: str, projections: list[list[Rule]]) -> list[Rule]:
    """Embeddings, every layer and the last norm; `projections` are the rules of each layer's queries, keys, values."""
    rules = [
        Rule(f"{theirs}embeddings.tok_embeddings.weight", (f"{ours}embed_tokens.weight",)),
        *norm(f"{ours}embed_norm", f"{theirs}embeddings.norm", config.norm_bias),
        *norm(f"{ours}norm", f"{theirs}final_norm", config.norm_bias),
    ]
    for layer in range(config.num_hidden_layers):
        mine, other = f"{ours}layers.{layer}", f"{theirs}layers.{layer}"
        gates = (f"{mine}.mlp.gate_proj", f"{mine}.mlp.up_proj")
        widths = (config.intermediate_size, config.intermediate_size)
        if layer:
            rules += norm(f"{mine}.attention_norm", f"{other}.attn_norm", config.norm_bias)
        rules += [
            *projections[layer],
            *linear(f"{mine}.self_attn.o_proj", f"{other}.attn.Wo", config.attention_bias),
            *norm(f"{mine}.mlp_norm", f"{other}.mlp_norm", config.norm_bias),
            *join_linear(gates, f"{other}.mlp.Wi", config.mlp_bias, widths),
            *linear(f"{mine}.mlp.down_proj", f"{other}.mlp.Wo", config.mlp_bias),
        ]
    return rules


def transform_rules(config: LoomConfig, stock: str) -> list[Rule]:
    """The dense layer and norm before a head, by its stock name."""
    return [
        *linear("head.dense", f"{stock}.dense", config.head_dense_bias),
        *norm("head.norm", f"{stock}.norm", config.norm_bias),
    ]


def token_head_rules(config: LoomConfig) -> list[Rule]:
    """The projection onto the vocabulary."""
    rules = [Rule("decoder.bias", ("lm_head.bias",))] if config.head_bias else []
    return rules if config.tie_word_embeddings else [*rules, Rule("decoder.weight", ("lm_head.weight",))]
