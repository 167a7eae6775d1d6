"""Llama: pre-norm decoder with RMS norm, rotary positions and a gated MLP (LlamaForCausalLM and its kin)."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from pretrain.models import LoomDecoderConfig

from .llama_like import decoder_rules, from_fields, to_fields
from .mapping import Home


def _to_config(config: LoomDecoderConfig) -> LlamaConfig:
    return LlamaConfig(**to_fields(config), mlp_bias=config.mlp_bias, use_cache=config.use_cache)


def _from_config(stock: Any) -> LoomDecoderConfig:
    keys = from_fields(stock)
    return LoomDecoderConfig(architecture="llama", **keys, mlp_bias=stock.mlp_bias, use_cache=stock.use_cache)


LLAMA = Home(
    name="llama",
    kind="decoder",
    prefix="model.",
    prefixes={"question_answering": "transformer."},
    position_kind="rotary",
    classes={
        "pretraining": "LlamaForCausalLM",
        "classification": "LlamaForSequenceClassification",
        "token_classification": "LlamaForTokenClassification",
        "question_answering": "LlamaForQuestionAnswering",
        "base": "LlamaModel",
    },
    to_config=_to_config,
    from_config=_from_config,
    rules=decoder_rules,
    duplicates={"lm_head.weight": "model.embed_tokens.weight"},
    unread=("pretraining_tp",),
    spare=(r"\.rotary_emb\.inv_freq$",),  # a table of angles, stored by early releases
)
