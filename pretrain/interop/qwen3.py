"""Qwen3: Llama with an RMS norm on the queries and keys of each head (Qwen3ForCausalLM and its kin).

Its windows over the later layers alone are refused: no released model uses them.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen3Config

from pretrain.models import LoomDecoderConfig

from .llama_like import decoder_rules, from_fields, to_fields
from .mapping import Home


def _to_config(config: LoomDecoderConfig) -> Qwen3Config:
    return Qwen3Config(**to_fields(config), use_cache=config.use_cache)


def _from_config(stock: Any) -> LoomDecoderConfig:
    return LoomDecoderConfig(architecture="qwen3", **from_fields(stock), use_cache=stock.use_cache)


QWEN3 = Home(
    name="qwen3",
    kind="decoder",
    prefix="model.",
    prefixes={"question_answering": "transformer."},
    position_kind="rotary",
    classes={
        "pretraining": "Qwen3ForCausalLM",
        "classification": "Qwen3ForSequenceClassification",
        "token_classification": "Qwen3ForTokenClassification",
        "question_answering": "Qwen3ForQuestionAnswering",
        "base": "Qwen3Model",
    },
    to_config=_to_config,
    from_config=_from_config,
    rules=decoder_rules,
    duplicates={"lm_head.weight": "model.embed_tokens.weight"},
    unread=("max_window_layers",),
)
