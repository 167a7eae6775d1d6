"""Marian: the Transformer of Vaswani et al. 2017 (MarianMTModel and its kin), with one table of tokens.

Its tables of positions are computed, and no checkpoint holds them. Its logits have a bias, which is our `head_bias`;
without one it holds zeros, and the key `head_bias` in its config says that they are no parameter of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import MarianConfig

from pretrain.models import LoomSeq2SeqConfig
from pretrain.models.positions import sinusoids

from .mapping import Home, NotHeld, Rule, Task, linear, norm

_NORM_EPS = 1e-5  # torch's default, which the class takes
_STACKS = ("encoder", "decoder")


def _to_config(config: LoomSeq2SeqConfig) -> MarianConfig:
    full = config.hidden_size**0.5
    if config.embedding_scale not in (1.0, full):
        raise NotHeld("embedding_scale", config.embedding_scale, f"1.0 or hidden_size ** 0.5 = {full}")
    if config.decoder_start_token_id is None:
        raise NotHeld("decoder_start_token_id", None, "the token that an output begins with")
    keys: dict[str, Any] = {} if config.head_bias else {"head_bias": False}
    return MarianConfig(
        vocab_size=config.vocab_size,
        decoder_vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        encoder_layers=config.num_hidden_layers,
        decoder_layers=config.num_decoder_layers,
        encoder_attention_heads=config.num_attention_heads,
        decoder_attention_heads=config.num_attention_heads,
        encoder_ffn_dim=config.intermediate_size,
        decoder_ffn_dim=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        activation_function=config.hidden_act,
        dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        init_std=config.initializer_range,
        scale_embedding=config.embedding_scale != 1.0,
        share_encoder_decoder_embeddings=True,
        tie_word_embeddings=True,
        use_cache=config.use_cache,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        forced_eos_token_id=None,
        **keys,
    )


def _from_config(stock: Any) -> LoomSeq2SeqConfig:
    return LoomSeq2SeqConfig(
        architecture="transformer",
        vocab_size=stock.vocab_size,
        hidden_size=stock.d_model,
        num_hidden_layers=stock.encoder_layers,
        num_decoder_layers=stock.decoder_layers,
        num_attention_heads=stock.encoder_attention_heads,
        intermediate_size=stock.encoder_ffn_dim,
        max_position_embeddings=stock.max_position_embeddings,
        hidden_act=_activation(stock.activation_function),
        hidden_dropout=stock.dropout,
        embedding_dropout=stock.dropout,
        attention_dropout=stock.attention_dropout,
        initializer="normal",
        initializer_range=stock.init_std,
        embedding_scale=stock.d_model**0.5 if stock.scale_embedding else 1.0,
        head_bias=getattr(stock, "head_bias", True),
        norm_eps=_NORM_EPS,
        use_cache=stock.use_cache,
        pad_token_id=stock.pad_token_id,
        bos_token_id=stock.bos_token_id,
        eos_token_id=stock.eos_token_id,
        decoder_start_token_id=stock.decoder_start_token_id,
    )


def _activation(name: str) -> str:
    return "silu" if name == "swish" else name


def _normal(stock: dict[str, Any]) -> dict[str, Any]:
    return stock | {"activation_function": _activation(stock["activation_function"])}


def _rules(config: LoomSeq2SeqConfig, task: Task, prefix: str) -> list[Rule]:
    loom = "" if task == "base" else "model."
    rules = [Rule(f"{prefix}shared.weight", (f"{loom}encoder.embed_tokens.weight",))]
    for stack, layers in zip(_STACKS, (config.num_hidden_layers, config.num_decoder_layers), strict=True):
        for layer in range(layers):
            ours, theirs = f"{loom}{stack}.layers.{layer}", f"{prefix}{stack}.layers.{layer}"
            rules += _attention_rules(f"{ours}.self_attn", f"{theirs}.self_attn")
            rules += norm(f"{ours}.attention_norm", f"{theirs}.self_attn_layer_norm", True)
            if stack == "decoder":
                rules += _attention_rules(f"{ours}.cross_attn", f"{theirs}.encoder_attn")
                rules += norm(f"{ours}.cross_attention_norm", f"{theirs}.encoder_attn_layer_norm", True)
            rules += linear(f"{ours}.mlp.up_proj", f"{theirs}.fc1", True)
            rules += linear(f"{ours}.mlp.down_proj", f"{theirs}.fc2", True)
            rules += norm(f"{ours}.mlp_norm", f"{theirs}.final_layer_norm", True)
    if task == "pretraining" and config.head_bias:
        rules.append(Rule("final_logits_bias", ("lm_head.bias",), row=True))
    elif task == "pretraining":
        rules.append(Rule("final_logits_bias", (), zeros=(1, config.vocab_size)))
    return rules


def _attention_rules(ours: str, theirs: str) -> list[Rule]:
    rules = [
        rule for name in ("q_proj", "k_proj", "v_proj") for rule in linear(f"{ours}.{name}", f"{theirs}.{name}", True)
    ]
    return rules + linear(f"{ours}.o_proj", f"{theirs}.out_proj", True)


def _computed(stock: Any) -> dict[str, Tensor]:
    """The tables of positions of both stacks, by their names in both classes."""
    table = sinusoids(torch.arange(stock.max_position_embeddings)[None], stock.d_model, "halves")[0].float()
    return {f"{prefix}{stack}.embed_positions.weight": table for prefix in ("", "model.") for stack in _STACKS}


def _copies(stock: Any) -> dict[str, str]:
    """Every table of tokens is the shared one; a config that ties less than that is refused by its keys."""
    if not (stock.tie_word_embeddings and stock.share_encoder_decoder_embeddings):
        return {}
    tables = {
        f"{prefix}{stack}.embed_tokens.weight": f"{prefix}shared.weight"
        for prefix in ("", "model.")
        for stack in _STACKS
    }
    return tables | {"lm_head.weight": "model.shared.weight"}


MARIAN = Home(
    name="marian",
    kind="seq2seq",
    prefix="model.",
    position_kind="sinusoidal",
    classes={"pretraining": "MarianMTModel", "base": "MarianModel"},
    to_config=_to_config,
    from_config=_from_config,
    rules=_rules,
    duplicates={},
    copies=_copies,
    computed=_computed,
    unread=("forced_eos_token_id",),  # of generation
    normal=_normal,
)
