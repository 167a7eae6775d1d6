"""BERT: post-norm encoder with learned positions and token types (transformers' BertForMaskedLM and its kin)."""

from __future__ import annotations

from typing import Any

from transformers import BertConfig

from pretrain.models import LoomEncoderConfig

from .mapping import Home, Rule, Task, linear, norm

# Not fields of BertConfig: carried as plain extra entries, as many published BERT configs do.
MARKER_IDS = ("cls_token_id", "sep_token_id")


def _to_config(config: LoomEncoderConfig) -> BertConfig:
    ids = {name: getattr(config, name) for name in MARKER_IDS if getattr(config, name) is not None}
    return BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        hidden_act=config.hidden_act,
        hidden_dropout_prob=config.hidden_dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        classifier_dropout=config.classifier_dropout,
        max_position_embeddings=config.max_position_embeddings,
        type_vocab_size=config.type_vocab_size,
        initializer_range=config.initializer_range,
        layer_norm_eps=config.norm_eps,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        tie_word_embeddings=True,
        **ids,
    )


def _from_config(stock: Any) -> LoomEncoderConfig:
    ids: dict[str, Any] = {name: getattr(stock, name, None) for name in MARKER_IDS}
    return LoomEncoderConfig(
        architecture="bert",
        vocab_size=stock.vocab_size,
        hidden_size=stock.hidden_size,
        intermediate_size=stock.intermediate_size,
        num_hidden_layers=stock.num_hidden_layers,
        num_attention_heads=stock.num_attention_heads,
        hidden_act=stock.hidden_act,
        hidden_dropout=stock.hidden_dropout_prob,
        embedding_dropout=stock.hidden_dropout_prob,
        attention_dropout=stock.attention_probs_dropout_prob,
        classifier_dropout=_classifier_dropout(stock.classifier_dropout, stock.hidden_dropout_prob),
        max_position_embeddings=stock.max_position_embeddings,
        type_vocab_size=max(1, stock.type_vocab_size),  # BERT always adds a token type, so 0 does not come back
        initializer_range=stock.initializer_range,
        norm_eps=stock.layer_norm_eps,
        pad_token_id=stock.pad_token_id,
        bos_token_id=stock.bos_token_id,
        eos_token_id=stock.eos_token_id,
        tie_word_embeddings=True,
        **ids,
    )


def _classifier_dropout(given: float | None, hidden: float) -> float:
    return hidden if given is None else given


def _normal(stock: dict[str, Any]) -> dict[str, Any]:
    dropout = _classifier_dropout(stock["classifier_dropout"], stock["hidden_dropout_prob"])
    return stock | {"classifier_dropout": dropout}


def _rules(config: LoomEncoderConfig, task: Task, prefix: str) -> list[Rule]:
    loom = "" if task == "base" else "model."
    rules = [
        Rule(f"{prefix}embeddings.word_embeddings.weight", (f"{loom}embed_tokens.weight",)),
        Rule(f"{prefix}embeddings.position_embeddings.weight", (f"{loom}embed_positions.weight",)),
        Rule(f"{prefix}embeddings.token_type_embeddings.weight", (f"{loom}embed_token_types.weight",)),
        *norm(f"{loom}embed_norm", f"{prefix}embeddings.LayerNorm", True),
    ]
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"{loom}layers.{layer}", f"{prefix}encoder.layer.{layer}"
        rules += [
            *linear(f"{ours}.self_attn.q_proj", f"{theirs}.attention.self.query", True),
            *linear(f"{ours}.self_attn.k_proj", f"{theirs}.attention.self.key", True),
            *linear(f"{ours}.self_attn.v_proj", f"{theirs}.attention.self.value", True),
            *linear(f"{ours}.self_attn.o_proj", f"{theirs}.attention.output.dense", True),
            *norm(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm", True),
            *linear(f"{ours}.mlp.up_proj", f"{theirs}.intermediate.dense", True),
            *linear(f"{ours}.mlp.down_proj", f"{theirs}.output.dense", True),
            *norm(f"{ours}.mlp_norm", f"{theirs}.output.LayerNorm", True),
        ]
    if task == "pretraining":
        rules += [
            *linear("head.dense", "cls.predictions.transform.dense", True),
            *norm("head.norm", "cls.predictions.transform.LayerNorm", True),
            Rule("cls.predictions.bias", ("lm_head.bias",)),
        ]
    elif task == "classification":
        rules += [*linear("pooler.dense", f"{prefix}pooler.dense", True), *linear("classifier", "classifier", True)]
    return rules


BERT = Home(
    name="bert",
    kind="encoder",
    prefix="bert.",
    position_kind="learned",
    classes={
        "pretraining": "BertForMaskedLM",
        "classification": "BertForSequenceClassification",
        "base": "BertModel",
    },
    config_type=BertConfig,
    to_config=_to_config,
    from_config=_from_config,
    rules=_rules,
    classifier="classifier.weight",
    duplicates={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    unread=("use_cache",),
    normal=_normal,
    spare=(r"^bert\.pooler\.", r"^cls\.seq_relationship\."),  # the next-sentence objective's
)
