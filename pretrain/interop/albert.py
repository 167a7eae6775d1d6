"""ALBERT: one group of weights for many layers, small embeddings (AlbertForMaskedLM and its kin).

The stock stack always projects its embeddings, ours where `embedding_size` differs from `hidden_size`: equal sizes are
refused, as a projection between them would have no place. Layers without dropout inside the MLP are the stock one's.
"""

from __future__ import annotations

from typing import Any

from transformers import AlbertConfig

from pretrain.models import LoomEncoderConfig

from .bert_like import embedding_rules, from_fields, to_fields
from .mapping import Home, NotHeld, Rule, Task, linear, norm, per_token_rules


def _to_config(config: LoomEncoderConfig) -> AlbertConfig:
    _check_sizes(config.embedding_size, config.hidden_size)
    return AlbertConfig(
        **to_fields(config),
        embedding_size=config.embedding_size,
        num_hidden_groups=config.num_hidden_groups,
        classifier_dropout_prob=config.classifier_dropout,
        tie_word_embeddings=True,
    )


def _from_config(stock: Any) -> LoomEncoderConfig:
    _check_sizes(stock.embedding_size, stock.hidden_size)
    return LoomEncoderConfig(
        architecture="albert",
        **from_fields(stock) | {"type_vocab_size": max(1, stock.type_vocab_size)},
        embedding_size=stock.embedding_size,
        num_hidden_groups=stock.num_hidden_groups,
        classifier_dropout=stock.classifier_dropout_prob,
        tie_word_embeddings=True,
    )


def _check_sizes(embedding_size: int, hidden_size: int) -> None:
    if embedding_size == hidden_size:
        raise NotHeld("embedding_size", embedding_size, f"another size than hidden_size {hidden_size}")


def _rules(config: LoomEncoderConfig, task: Task, prefix: str) -> list[Rule]:
    loom = "" if task == "base" else "model."
    rules = embedding_rules(loom, prefix)
    rules += linear(f"{loom}embed_project", f"{prefix}encoder.embedding_hidden_mapping_in", True)
    for group in range(config.num_hidden_groups):
        ours, theirs = f"{loom}layers.{group}", f"{prefix}encoder.albert_layer_groups.{group}.albert_layers.0"
        rules += [
            *linear(f"{ours}.self_attn.q_proj", f"{theirs}.attention.query", True),
            *linear(f"{ours}.self_attn.k_proj", f"{theirs}.attention.key", True),
            *linear(f"{ours}.self_attn.v_proj", f"{theirs}.attention.value", True),
            *linear(f"{ours}.self_attn.o_proj", f"{theirs}.attention.dense", True),
            *norm(f"{ours}.attention_norm", f"{theirs}.attention.LayerNorm", True),
            *linear(f"{ours}.mlp.up_proj", f"{theirs}.ffn", True),
            *linear(f"{ours}.mlp.down_proj", f"{theirs}.ffn_output", True),
            *norm(f"{ours}.mlp_norm", f"{theirs}.full_layer_layer_norm", True),
        ]
    if task in ("pretraining", "sentence_pretraining"):
        rules += linear("head.dense", "predictions.dense", True)
        rules += norm("head.norm", "predictions.LayerNorm", True)
        rules.append(Rule("predictions.bias", ("lm_head.bias",)))
    if task in ("classification", "multiple_choice", "sentence_pretraining"):
        rules += linear("pooler.dense", f"{prefix}pooler", True)
    if task in ("classification", "multiple_choice"):
        rules += linear("classifier", "classifier", True)
    elif task == "sentence_pretraining":
        rules += linear("seq_relationship", "sop_classifier.classifier", True)
    return rules + per_token_rules(task)


ALBERT = Home(
    name="albert",
    kind="encoder",
    prefix="albert.",
    position_kind="learned",
    classes={
        "pretraining": "AlbertForMaskedLM",
        "classification": "AlbertForSequenceClassification",
        "multiple_choice": "AlbertForMultipleChoice",
        "token_classification": "AlbertForTokenClassification",
        "question_answering": "AlbertForQuestionAnswering",
        "sentence_pretraining": "AlbertForPreTraining",
        "base": "AlbertModel",
    },
    to_config=_to_config,
    from_config=_from_config,
    rules=_rules,
    duplicates={
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    },
    spare=(r"^albert\.pooler\.", r"^sop_classifier\.", r"\.position_ids$"),
)
