"""What the homes in BERT's family share: config fields, marker ids, and the names of embeddings, layers and heads."""

from __future__ import annotations

from typing import Any

from pretrain.models import LoomConfig

from .mapping import Rule, fields_from_stock, fields_to_stock, linear, norm

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "hidden_act": "hidden_act",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "max_position_embeddings": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "initializer_range": "initializer_range",
    "norm_eps": "layer_norm_eps",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}

# Not fields of these stock configs: carried as plain extra entries, as many published configs do.
MARKER_IDS = ("cls_token_id", "sep_token_id")


def to_fields(config: LoomConfig) -> dict[str, Any]:
    """Stock fields, and the marker ids that are set."""
    ids = {name: getattr(config, name) for name in MARKER_IDS if getattr(config, name) is not None}
    return fields_to_stock(config, FIELDS) | ids


def from_fields(stock: Any) -> dict[str, Any]:
    """Loom fields. Dropout of the embeddings is that of the layers here."""
    ids = {name: getattr(stock, name, None) for name in MARKER_IDS}
    return fields_from_stock(stock, FIELDS) | ids | {"embedding_dropout": stock.hidden_dropout_prob}


def classifier_dropout(given: float | None, hidden: float) -> float:
    """The dropout of a classifier, which None leaves at that of the layers."""
    return hidden if given is None else given


def normal(stock: dict[str, Any]) -> dict[str, Any]:
    """A classifier's dropout that was left out, filled in."""
    return stock | {"classifier_dropout": classifier_dropout(stock["classifier_dropout"], stock["hidden_dropout_prob"])}


def embedding_rules(ours: str, theirs: str) -> list[Rule]:
    """The three tables and their norm."""
    return [
        Rule(f"{theirs}embeddings.word_embeddings.weight", (f"{ours}embed_tokens.weight",)),
        Rule(f"{theirs}embeddings.position_embeddings.weight", (f"{ours}embed_positions.weight",)),
        Rule(f"{theirs}embeddings.token_type_embeddings.weight", (f"{ours}embed_token_types.weight",)),
        *norm(f"{ours}embed_norm", f"{theirs}embeddings.LayerNorm", True),
    ]


def layer_rules(config: LoomConfig, ours: str, theirs: str) -> list[Rule]:
    """Every layer of the stack."""
    rules: list[Rule] = []
    for layer in range(config.num_hidden_layers):
        mine, other = f"{ours}layers.{layer}", f"{theirs}encoder.layer.{layer}"
        rules += [
            *linear(f"{mine}.self_attn.q_proj", f"{other}.attention.self.query", True),
            *linear(f"{mine}.self_attn.k_proj", f"{other}.attention.self.key", True),
            *linear(f"{mine}.self_attn.v_proj", f"{other}.attention.self.value", True),
            *linear(f"{mine}.self_attn.o_proj", f"{other}.attention.output.dense", True),
            *norm(f"{mine}.attention_norm", f"{other}.attention.output.LayerNorm", True),
            *linear(f"{mine}.mlp.up_proj", f"{other}.intermediate.dense", True),
            *linear(f"{mine}.mlp.down_proj", f"{other}.output.dense", True),
            *norm(f"{mine}.mlp_norm", f"{other}.output.LayerNorm", True),
        ]
    return rules
