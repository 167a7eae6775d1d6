"""RoBERTa: BERT whose positions count from behind the padding id (RobertaForMaskedLM and its kin).

The stock class gives token n of a row position pad_token_id + n, and padding position pad_token_id, so it holds our
models whose `position_offset` is pad_token_id + 1. Its head always uses the exact GELU.
"""

from __future__ import annotations

from typing import Any

from transformers import RobertaConfig

from pretrain.models import LoomEncoderConfig

from .bert_like import classifier_dropout, embedding_rules, from_fields, layer_rules, normal, to_fields
from .mapping import Home, NotHeld, Rule, Task, linear, norm, per_token_rules


def _to_config(config: LoomEncoderConfig) -> RobertaConfig:
    if config.pad_token_id is None:
        raise NotHeld("pad_token_id", None, "the id before position_offset")
    keys = to_fields(config) | {"max_position_embeddings": config.max_position_embeddings + config.pad_token_id + 1}
    return RobertaConfig(**keys, classifier_dropout=config.classifier_dropout, tie_word_embeddings=True)


def _from_config(stock: Any) -> LoomEncoderConfig:
    if stock.pad_token_id is None:
        raise NotHeld("pad_token_id", None, "an id: positions count from behind it")
    offset = stock.pad_token_id + 1
    keys = from_fields(stock) | {
        "classifier_dropout": classifier_dropout(stock.classifier_dropout, stock.hidden_dropout_prob),
        "hidden_act": "gelu",
        "max_position_embeddings": stock.max_position_embeddings - offset,
        "position_offset": offset,
        "type_vocab_size": max(1, stock.type_vocab_size),
    }
    return LoomEncoderConfig(architecture="roberta", tie_word_embeddings=True, **keys)


def _rules(config: LoomEncoderConfig, task: Task, prefix: str) -> list[Rule]:
    loom = "" if task == "base" else "model."
    rules = [*embedding_rules(loom, prefix), *layer_rules(config, loom, prefix)]
    if task == "pretraining":
        rules += linear("head.dense", "lm_head.dense", True)
        rules += norm("head.norm", "lm_head.layer_norm", True)
        rules.append(Rule("lm_head.bias", ("lm_head.bias",)))
    elif task == "classification":
        rules += linear("pooler.dense", "classifier.dense", True)
        rules += linear("classifier", "classifier.out_proj", True)
    elif task == "multiple_choice":
        rules += linear("pooler.dense", f"{prefix}pooler.dense", True)
        rules += linear("classifier", "classifier", True)
    return rules + per_token_rules(task)


ROBERTA = Home(
    name="roberta",
    kind="encoder",
    prefix="roberta.",
    position_kind="learned",
    classes={
        "pretraining": "RobertaForMaskedLM",
        "classification": "RobertaForSequenceClassification",
        "multiple_choice": "RobertaForMultipleChoice",
        "token_classification": "RobertaForTokenClassification",
        "question_answering": "RobertaForQuestionAnswering",
        "base": "RobertaModel",
    },
    to_config=_to_config,
    from_config=_from_config,
    rules=_rules,
    duplicates={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    unread=("use_cache",),
    normal=normal,
    spare=(r"^roberta\.pooler\.", r"\.position_ids$"),
)
