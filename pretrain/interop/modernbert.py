"""ModernBERT: pre-norm encoder, rotary positions, alternating local attention (ModernBertForMaskedLM and its kin).

Its dropout inside the MLP (`mlp_dropout`) carries our `hidden_dropout`: the nearest place it has, read while training
alone. The ids of [CLS] and [SEP] have fields of their own.
"""

from __future__ import annotations

from typing import Any

from transformers import ModernBertConfig

from pretrain.models import LoomEncoderConfig

from .mapping import Home, Rule, Task, attention_rows, join_linear, linear, norm

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def _to_config(config: LoomEncoderConfig) -> ModernBertConfig:
    rope: dict[str, Any] = {GLOBAL: {"rope_type": "default", "rope_theta": config.rope_theta}}
    keys: dict[str, Any] = {
        "classifier_pooling": config.classifier_pooling,
        "global_attn_every_n_layers": config.global_attention_every,
        "rope_parameters": rope,
    }
    if config.global_attention_every > 1:
        rope[LOCAL] = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        keys["local_attention"] = config.local_window
    return ModernBertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        hidden_activation=config.hidden_act,
        classifier_activation=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.initializer_range,
        norm_eps=config.norm_eps,
        norm_bias=config.norm_bias,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        cls_token_id=config.cls_token_id,
        sep_token_id=config.sep_token_id,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        classifier_bias=config.head_dense_bias,
        attention_dropout=config.attention_dropout,
        embedding_dropout=config.embedding_dropout,
        mlp_dropout=config.hidden_dropout,
        classifier_dropout=config.classifier_dropout,
        decoder_bias=True,
        tie_word_embeddings=config.tie_word_embeddings,
        **keys,
    )


def _from_config(stock: Any) -> LoomEncoderConfig:
    every = _global_every(stock)
    local: dict[str, Any] = {}
    if every > 1:
        local = {
            "local_window": stock.local_attention,
            "local_rope_theta": float(stock.rope_parameters[LOCAL]["rope_theta"]),
        }
    return LoomEncoderConfig(
        architecture="modernbert",
        vocab_size=stock.vocab_size,
        hidden_size=stock.hidden_size,
        intermediate_size=stock.intermediate_size,
        num_hidden_layers=stock.num_hidden_layers,
        num_attention_heads=stock.num_attention_heads,
        hidden_act=stock.hidden_activation,
        max_position_embeddings=stock.max_position_embeddings,
        initializer_range=stock.initializer_range,
        norm_eps=stock.norm_eps,
        norm_bias=stock.norm_bias,
        pad_token_id=stock.pad_token_id,
        bos_token_id=stock.bos_token_id,
        eos_token_id=stock.eos_token_id,
        cls_token_id=stock.cls_token_id,
        sep_token_id=stock.sep_token_id,
        attention_bias=stock.attention_bias,
        mlp_bias=stock.mlp_bias,
        head_dense_bias=stock.classifier_bias,
        classifier_pooling=stock.classifier_pooling,
        attention_dropout=stock.attention_dropout,
        embedding_dropout=stock.embedding_dropout,
        hidden_dropout=stock.mlp_dropout,
        classifier_dropout=stock.classifier_dropout,
        rope_theta=float(stock.rope_parameters[GLOBAL]["rope_theta"]),
        global_attention_every=every,
        tie_word_embeddings=stock.tie_word_embeddings,
        **local,
    )


def _global_every(stock: Any) -> int:
    """The spacing of global layers; another pattern of `layer_types` shows as a difference on the way back."""
    if LOCAL not in stock.layer_types:
        return 1
    later = [index for index, kind in enumerate(stock.layer_types) if index and kind == GLOBAL]
    stated: int | None = getattr(stock, "global_attn_every_n_layers", None)
    if later:
        return later[0]
    return stated if stated is not None and stated >= stock.num_hidden_layers else stock.num_hidden_layers


def _normal(stock: dict[str, Any]) -> dict[str, Any]:
    if LOCAL in stock["layer_types"]:
        return stock
    rope = {GLOBAL: stock["rope_parameters"][GLOBAL]}  # nothing reads the local values
    return {key: value for key, value in stock.items() if key != "local_attention"} | {"rope_parameters": rope}


def _rules(config: LoomEncoderConfig, task: Task, prefix: str) -> list[Rule]:
    loom = "" if task == "base" else "model."
    rules = [
        Rule(f"{prefix}embeddings.tok_embeddings.weight", (f"{loom}embed_tokens.weight",)),
        *norm(f"{loom}embed_norm", f"{prefix}embeddings.norm", config.norm_bias),
        *norm(f"{loom}norm", f"{prefix}final_norm", config.norm_bias),
    ]
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"{loom}layers.{layer}", f"{prefix}layers.{layer}"
        projections = tuple(f"{ours}.self_attn.{name}_proj" for name in "qkv")
        gates = (f"{ours}.mlp.gate_proj", f"{ours}.mlp.up_proj")
        widths = (config.intermediate_size, config.intermediate_size)
        if layer:
            rules += norm(f"{ours}.attention_norm", f"{theirs}.attn_norm", config.norm_bias)
        rules += [
            *join_linear(projections, f"{theirs}.attn.Wqkv", config.attention_bias, attention_rows(config)),
            *linear(f"{ours}.self_attn.o_proj", f"{theirs}.attn.Wo", config.attention_bias),
            *norm(f"{ours}.mlp_norm", f"{theirs}.mlp_norm", config.norm_bias),
            *join_linear(gates, f"{theirs}.mlp.Wi", config.mlp_bias, widths),
            *linear(f"{ours}.mlp.down_proj", f"{theirs}.mlp.Wo", config.mlp_bias),
        ]
    if task != "base":
        rules += linear("head.dense", "head.dense", config.head_dense_bias)
        rules += norm("head.norm", "head.norm", config.norm_bias)
    if task == "pretraining":
        rules.append(Rule("decoder.bias", ("lm_head.bias",)))
        if not config.tie_word_embeddings:
            rules.append(Rule("decoder.weight", ("lm_head.weight",)))
    elif task == "classification":
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
        "base": "ModernBertModel",
    },
    config_type=ModernBertConfig,
    to_config=_to_config,
    from_config=_from_config,
    rules=_rules,
    classifier="classifier.weight",
    duplicates={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    unread=(
        "initializer_cutoff_factor",
        "deterministic_flash_attn",
        "sparse_prediction",
        "sparse_pred_ignore_index",
    ),
    normal=_normal,
)
