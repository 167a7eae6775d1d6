"""BERT: post-norm encoder with learned positions and token types (transformers' BertForMaskedLM and its kin)."""

from __future__ import annotations

from typing import Any

from transformers import BertConfig

from pretrain.models import LoomEncoderConfig

from .bert_like import classifier_dropout, embedding_rules, from_fields, layer_rules, normal, to_fields
from .mapping import Home, Rule, Task, linear, norm, per_token_rules


def _to_config(config: LoomEncoderConfig) -> BertConfig:
    return BertConfig(**to_fields(config), classifier_dropout=config.classifier_dropout, tie_word_embeddings=True)


def _from_config(stock: Any) -> LoomEncoderConfig:
    keys = from_fields(stock) | {
        "classifier_dropout": classifier_dropout(stock.classifier_dropout, stock.hidden_dropout_prob),
        "type_vocab_size": max(1, stock.type_vocab_size),  # BERT always adds a token type, so 0 does not come back
    }
    return LoomEncoderConfig(architecture="bert", tie_word_embeddings=True, **keys)


def _rules(config: LoomEncoderConfig, task: Task, prefix: str) -> list[Rule]:
    loom = "" if task == "base" else "model."
    rules = [*embedding_rules(loom, prefix), *layer_rules(config, loom, prefix)]
    if task in ("pretraining", "sentence_pretraining"):
        rules += [
            *linear("head.dense", "cls.predictions.transform.dense", True),
            *norm("head.norm", "cls.predictions.transform.LayerNorm", True),
            Rule("cls.predictions.bias", ("lm_head.bias",)),
        ]
    if task in ("classification", "multiple_choice", "sentence_pretraining"):
        rules += linear("pooler.dense", f"{prefix}pooler.dense", True)
    if task in ("classification", "multiple_choice"):
        rules += linear("classifier", "classifier", True)
    elif task == "sentence_pretraining":
        rules += linear("seq_relationship", "cls.seq_relationship", True)
    return rules + per_token_rules(task)


BERT = Home(
    name="bert",
    kind="encoder",
    prefix="bert.",
    position_kind="learned",
    classes={
        "pretraining": "BertForMaskedLM",
        "classification": "BertForSequenceClassification",
        "multiple_choice": "BertForMultipleChoice",
        "token_classification": "BertForTokenClassification",
        "question_answering": "BertForQuestionAnswering",
        "sentence_pretraining": "BertForPreTraining",
        "base": "BertModel",
    },
    to_config=_to_config,
    from_config=_from_config,
    rules=_rules,
    duplicates={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    unread=("use_cache",),
    normal=normal,
    spare=(r"^bert\.pooler\.", r"^cls\.seq_relationship\."),  # the next-sentence objective's
)
