"""Tiny encoder-decoders with every parameter drawn from a normal, and the batches that the tests feed them."""

from __future__ import annotations

from typing import Any

from loom_builders import randomize

from pretrain.models import LoomConfig, LoomSeq2SeqForConditionalGeneration, loom_config

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": ("transformer", {}),
    "transformer-interleaved-unscaled": (
        "transformer",
        {"sinusoidal_layout": "interleaved", "embedding_scale": 1.0, "num_decoder_layers": 3},
    ),
    "transformer-pre-norm-untied": ("transformer", {"norm_placement": "pre", "tie_word_embeddings": False}),
    "t5": ("t5", {}),
    "t5-1.1": (
        "t5",
        {
            "mlp_kind": "gated",
            "hidden_act": "gelu_new",
            "tie_word_embeddings": False,
            "output_scale": 1.0,
            "num_decoder_layers": 3,
        },
    ),
}


def seq2seq_config(variant: str = "transformer", **keys: Any) -> LoomConfig:
    architecture, more = VARIANTS[variant]
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    if architecture == "t5":
        sizes |= {"head_dim": 5, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 9}
    return loom_config(architecture, **(sizes | more | keys))


def seq2seq_model(
    variant: str = "transformer", *, seed: int = 0, attention: str = "sdpa", **keys: Any
) -> LoomSeq2SeqForConditionalGeneration:
    config = seq2seq_config(variant, **keys)
    config._attn_implementation = attention
    model = LoomSeq2SeqForConditionalGeneration(config)
    randomize(model, seed)
    return model.eval()
