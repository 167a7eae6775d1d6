"""What the homes in Llama's family share: config fields, and the names of embeddings, layers and heads."""

from __future__ import annotations

from typing import Any

from pretrain.models import LoomConfig

from .mapping import Rule, Task, fields_from_stock, fields_to_stock, linear, norm
from .rotary import rope_entry, rope_keys

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_act": "hidden_act",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
    "norm_eps": "rms_norm_eps",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
    "attention_bias": "attention_bias",
}


def to_fields(config: LoomConfig) -> dict[str, Any]:
    """Stock fields. These designs have one dropout, on attention; others are kept aside (`mapping.KEPT_ASIDE`)."""
    more = {"attention_dropout": config.attention_dropout, "rope_parameters": rope_entry(config)}
    return fields_to_stock(config, FIELDS) | more


def from_fields(stock: Any) -> dict[str, Any]:
    """Loom fields."""
    more = {"attention_dropout": stock.attention_dropout or 0.0, **rope_keys(stock.rope_parameters)}
    return fields_from_stock(stock, FIELDS) | more


def stack_rules(config: LoomConfig, ours: str, theirs: str) -> list[Rule]:
    """Embeddings, every layer, and the last norm."""
    rules = [
        Rule(f"{theirs}embed_tokens.weight", (f"{ours}embed_tokens.weight",)),
        *norm(f"{ours}norm", f"{theirs}norm", False),
    ]
    for layer in range(config.num_hidden_layers):
        mine, other = f"{ours}layers.{layer}", f"{theirs}layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            rules += linear(f"{mine}.self_attn.{name}", f"{other}.self_attn.{name}", config.attention_bias)
        if config.qk_norm != "none":
            for name in ("q_norm", "k_norm"):
                rules += norm(f"{mine}.self_attn.{name}", f"{other}.self_attn.{name}", False)
        for name in ("gate_proj", "up_proj", "down_proj"):
            rules += linear(f"{mine}.mlp.{name}", f"{other}.mlp.{name}", config.mlp_bias)
        rules += norm(f"{mine}.attention_norm", f"{other}.input_layernorm", False)
        rules += norm(f"{mine}.mlp_norm", f"{other}.post_attention_layernorm", False)
    return rules


def decoder_rules(config: LoomConfig, task: Task, prefix: str) -> list[Rule]:
    """The stack and the head of a decoder's class."""
    rules = stack_rules(config, "" if task == "base" else "model.", prefix)
    if task == "pretraining" and not config.tie_word_embeddings:
        rules.append(Rule("lm_head.weight", ("lm_head.weight",)))
    elif task == "classification":
        rules.append(Rule("score.weight", ("score.weight",)))
    elif task == "token_classification":
        rules += linear("classifier", "score", True)
    elif task == "question_answering":
        rules += linear("qa_outputs", "qa_outputs", True)
    return rules
