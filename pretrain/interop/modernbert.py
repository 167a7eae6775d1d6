"""ModernBERT: pre-norm encoder, rotary positions, alternating local attention (ModernBertForMaskedLM and its kin).

The ids of [CLS] and [SEP] have fields of their own.
"""

from __future__ import annotations

from typing import Any

from transformers import ModernBertConfig

from pretrain.models import LoomEncoderConfig

from .mapping import Home, Rule, Task, attention_rows, fields_from_stock, fields_to_stock, join_linear, linear
from .modernbert_like import LOCAL, from_fields, normal, stack_rules, to_fields, token_head_rules, transform_rules

_OWN_FIELDS = {name: name for name in ("classifier_pooling", "cls_token_id", "sep_token_id")}


def _to_config(config: LoomEncoderConfig) -> ModernBertConfig:
    window: dict[str, Any] = {} if config.local_window is None else {"local_attention": config.local_window}
    return ModernBertConfig(**to_fields(config), **fields_to_stock(config, _OWN_FIELDS), **window)


def _from_config(stock: Any) -> LoomEncoderConfig:
    window = {"local_window": stock.local_attention} if LOCAL in stock.layer_types else {}
    keys = from_fields(stock) | fields_from_stock(stock, _OWN_FIELDS) | window
    return LoomEncoderConfig(architecture="modernbert", **keys)


def _rules(config: LoomEncoderConfig, task: Task, prefix: str) -> list[Rule]:
    loom = "" if task == "base" else "model."
    projections: list[list[Rule]] = []
    for layer in range(config.num_hidden_layers):
        ours = tuple(f"{loom}layers.{layer}.self_attn.{name}_proj" for name in "qkv")
        theirs = f"{prefix}layers.{layer}.attn.Wqkv"
        projections.append(join_linear(ours, theirs, config.attention_bias, attention_rows(config)))
    rules = stack_rules(config, loom, prefix, projections)
    if task != "base":
        rules += transform_rules(config, "head")
    if task == "pretraining":
        rules += token_head_rules(config)
    elif task == "question_answering":
        rules += linear("qa_outputs", "classifier", True)
    elif task != "base":
        rules += linear("classifier", "classifier", True)
    return rules


MODERNBERT = Home(
    name="modernbert",
    kind="encoder",
    prefix="model.",
    position_kind="rotary",
    classes={
        "pretraining": "ModernBertForMaskedLM",
        "classification": "ModernBertForSequenceClassification",
        "multiple_choice": "ModernBertForMultipleChoice",
        "token_classification": "ModernBertForTokenClassification",
        "question_answering": "ModernBertForQuestionAnswering",
        "base": "ModernBertModel",
    },
    to_config=_to_config,
    from_config=_from_config,
    rules=_rules,
    duplicates={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    unread=(
        "initializer_cutoff_factor",
        "deterministic_flash_attn",
        "sparse_prediction",
        "sparse_pred_ignore_index",
    ),
    normal=normal,
)
