"""EuroBERT: Llama's block, bidirectional, with a plain token head (EuroBertForMaskedLM and its kin).

`mlp_bias` there decides over the bias of the token head too. The id of its mask token, which no class reads, goes with
a model that was read; else it is the id of padding.
"""

from __future__ import annotations

from typing import Any

from transformers import EuroBertConfig

from pretrain.models import LoomEncoderConfig

from .bert_like import MARKER_IDS
from .llama_like import from_fields, stack_rules, to_fields
from .mapping import Home, NotHeld, Rule, Task, linear

_FIRST = {"cls": "bos"}  # pooling of the first token has another name there; mean and late are the same


def _to_config(config: LoomEncoderConfig) -> EuroBertConfig:
    if config.mlp_bias != config.head_bias:
        key, other = ("mlp_bias", "head_bias") if config.mlp_bias else ("head_bias", "mlp_bias")
        raise NotHeld(key, True, f"False, or {other} True: one key there decides over both")
    mask: int | None = getattr(config, "mask_token_id", config.pad_token_id)
    ids = {name: getattr(config, name) for name in MARKER_IDS if getattr(config, name) is not None}
    return EuroBertConfig(
        **to_fields(config),
        **ids,
        mask_token_id=mask or 0,
        mlp_bias=config.mlp_bias,
        classifier_pooling=_FIRST.get(config.classifier_pooling, config.classifier_pooling),
    )


def _from_config(stock: Any) -> LoomEncoderConfig:
    ids: dict[str, Any] = {name: getattr(stock, name, None) for name in MARKER_IDS}
    if stock.mask_token_id != (stock.pad_token_id or 0):
        ids["mask_token_id"] = stock.mask_token_id
    return LoomEncoderConfig(
        architecture="eurobert",
        **from_fields(stock),
        **ids,
        mlp_bias=stock.mlp_bias,
        head_bias=stock.mlp_bias,
        classifier_pooling="cls" if stock.classifier_pooling == "bos" else stock.classifier_pooling,
    )


def _rules(config: LoomEncoderConfig, task: Task, prefix: str) -> list[Rule]:
    rules = stack_rules(config, "" if task == "base" else "model.", prefix)
    if task == "pretraining":
        if not config.tie_word_embeddings:
            rules.append(Rule("lm_head.weight", ("lm_head.weight",)))
        if config.head_bias:
            rules.append(Rule("lm_head.bias", ("lm_head.bias",)))
    elif task == "classification":
        rules += linear("pooler.dense", "dense", True)
    if task in ("classification", "token_classification"):
        rules += linear("classifier", "classifier", True)
    return rules


EUROBERT = Home(
    name="eurobert",
    kind="encoder",
    prefix="model.",
    position_kind="rotary",
    classes={
        "pretraining": "EuroBertForMaskedLM",
        "classification": "EuroBertForSequenceClassification",
        "token_classification": "EuroBertForTokenClassification",
        "base": "EuroBertModel",
    },
    to_config=_to_config,
    from_config=_from_config,
    rules=_rules,
    duplicates={"lm_head.weight": "model.embed_tokens.weight"},
    unread=("pretraining_tp", "use_cache"),
)
