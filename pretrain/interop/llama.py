"""Llama: pre-norm decoder with RMS norm, rotary positions and a gated MLP (LlamaForCausalLM and its kin).

It has one dropout, on attention; others are kept aside (see `mapping.KEPT_ASIDE`).
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from pretrain.models import LoomDecoderConfig

from .mapping import Home, Rule, Task, linear, norm


def _to_config(config: LoomDecoderConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        hidden_act=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.initializer_range,
        rms_norm_eps=config.norm_eps,
        use_cache=config.use_cache,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attention_bias=config.attention_bias,
        attention_dropout=config.attention_dropout,
        mlp_bias=config.mlp_bias,
    )


def _from_config(stock: Any) -> LoomDecoderConfig:
    return LoomDecoderConfig(
        architecture="llama",
        vocab_size=stock.vocab_size,
        hidden_size=stock.hidden_size,
        intermediate_size=stock.intermediate_size,
        num_hidden_layers=stock.num_hidden_layers,
        num_attention_heads=stock.num_attention_heads,
        num_key_value_heads=stock.num_key_value_heads,
        head_dim=stock.head_dim,
        hidden_act=stock.hidden_act,
        max_position_embeddings=stock.max_position_embeddings,
        initializer_range=stock.initializer_range,
        norm_eps=stock.rms_norm_eps,
        use_cache=stock.use_cache,
        pad_token_id=stock.pad_token_id,
        bos_token_id=stock.bos_token_id,
        eos_token_id=stock.eos_token_id,
        tie_word_embeddings=stock.tie_word_embeddings,
        rope_theta=float(stock.rope_parameters["rope_theta"]),
        attention_bias=stock.attention_bias,
        attention_dropout=stock.attention_dropout or 0.0,
        mlp_bias=stock.mlp_bias,
    )


def _rules(config: LoomDecoderConfig, task: Task, prefix: str) -> list[Rule]:
    loom = "" if task == "base" else "model."
    rules = [
        Rule(f"{prefix}embed_tokens.weight", (f"{loom}embed_tokens.weight",)),
        *norm(f"{loom}norm", f"{prefix}norm", False),
    ]
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"{loom}layers.{layer}", f"{prefix}layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            rules += linear(f"{ours}.self_attn.{name}", f"{theirs}.self_attn.{name}", config.attention_bias)
        for name in ("gate_proj", "up_proj", "down_proj"):
            rules += linear(f"{ours}.mlp.{name}", f"{theirs}.mlp.{name}", config.mlp_bias)
        rules += norm(f"{ours}.attention_norm", f"{theirs}.input_layernorm", False)
        rules += norm(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", False)
    if task == "pretraining" and not config.tie_word_embeddings:
        rules.append(Rule("lm_head.weight", ("lm_head.weight",)))
    elif task == "classification":
        rules.append(Rule("score.weight", ("score.weight",)))
    return rules


LLAMA = Home(
    name="llama",
    kind="decoder",
    prefix="model.",
    position_kind="rotary",
    classes={
        "pretraining": "LlamaForCausalLM",
        "classification": "LlamaForSequenceClassification",
        "base": "LlamaModel",
    },
    config_type=LlamaConfig,
    to_config=_to_config,
    from_config=_from_config,
    rules=_rules,
    classifier="score.weight",
    duplicates={"lm_head.weight": "model.embed_tokens.weight"},
    unread=("pretraining_tp",),
)
