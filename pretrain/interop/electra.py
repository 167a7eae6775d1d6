"""ELECTRA: BERT with embeddings of a size of their own (ElectraForMaskedLM, which is its generator, and its kin).

Its token head and its classifiers always use the exact GELU. What the classifier of a choice looks at is a field of
its own there; we hold the published one, the first position through a dense layer.
"""

from __future__ import annotations

from typing import Any

from transformers import ElectraConfig

from pretrain.models import LoomEncoderConfig

from .bert_like import classifier_dropout, embedding_rules, from_fields, layer_rules, normal, to_fields
from .mapping import Home, Rule, Task, linear, norm, per_token_rules


def _to_config(config: LoomEncoderConfig) -> ElectraConfig:
    return ElectraConfig(
        **to_fields(config),
        embedding_size=config.embedding_size,
        classifier_dropout=config.classifier_dropout,
        summary_last_dropout=config.classifier_dropout,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def _from_config(stock: Any) -> LoomEncoderConfig:
    keys = from_fields(stock) | {
        "classifier_dropout": classifier_dropout(stock.classifier_dropout, stock.hidden_dropout_prob),
        "embedding_size": stock.embedding_size,
        "hidden_act": "gelu",
        "tie_word_embeddings": stock.tie_word_embeddings,
        "type_vocab_size": max(1, stock.type_vocab_size),
    }
    return LoomEncoderConfig(architecture="electra", **keys)


def _rules(config: LoomEncoderConfig, task: Task, prefix: str) -> list[Rule]:
    loom = "" if task == "base" else "model."
    rules = [*embedding_rules(loom, prefix), *layer_rules(config, loom, prefix)]
    if config.embedding_size != config.hidden_size:
        rules += linear(f"{loom}embed_project", f"{prefix}embeddings_project", True)
    if task == "pretraining":
        rules += linear("head.dense", "generator_predictions.dense", True)
        rules += norm("head.norm", "generator_predictions.LayerNorm", True)
        rules.append(Rule("generator_lm_head.bias", ("lm_head.bias",)))
        if not config.tie_word_embeddings:
            rules.append(Rule("generator_lm_head.weight", ("lm_head.weight",)))
    elif task == "replaced_token_detection":
        rules += linear("rtd_head.dense", "discriminator_predictions.dense", True)
        rules += linear("rtd_head.out", "discriminator_predictions.dense_prediction", True)
    elif task == "classification":
        rules += linear("pooler.dense", "classifier.dense", True)
        rules += linear("classifier", "classifier.out_proj", True)
    elif task == "multiple_choice":
        rules += linear("pooler.dense", "sequence_summary.summary", True)
        rules += linear("classifier", "classifier", True)
    return rules + per_token_rules(task)


ELECTRA = Home(
    name="electra",
    kind="encoder",
    prefix="electra.",
    position_kind="learned",
    classes={
        "pretraining": "ElectraForMaskedLM",
        "replaced_token_detection": "ElectraForPreTraining",
        "classification": "ElectraForSequenceClassification",
        "multiple_choice": "ElectraForMultipleChoice",
        "token_classification": "ElectraForTokenClassification",
        "question_answering": "ElectraForQuestionAnswering",
        "base": "ElectraModel",
    },
    to_config=_to_config,
    from_config=_from_config,
    rules=_rules,
    duplicates={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    unread=("use_cache", "summary_last_dropout"),
    read_by=dict.fromkeys(("summary_type", "summary_use_proj", "summary_activation"), ("multiple_choice",)),
    normal=normal,
    spare=(r"^discriminator_predictions\.", r"\.position_ids$"),
)
