"""The known designs: the conventions of each, and the sizes of its published base model.

Lives here: `Architecture` and `ARCHITECTURES`. What must not: what a switch does (`configuration_loom.py`). No torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["encoder", "decoder", "seq2seq"]


@dataclass(frozen=True)
class Architecture:
    """One known design: which kind of model carries it, its conventions, the sizes of its published base model.

    `derived` are switches whose value follows from the sizes: from hidden_size alone.
    """

    kind: Kind
    conventions: dict[str, Any]
    sizes: dict[str, Any]
    intermediate: Callable[[int], int]  # hidden_size -> intermediate_size
    token_ids: dict[str, int]  # ids of the project's own tokenizers for this design
    derived: dict[str, Callable[[int], float]] = field(default_factory=dict)


def _four_times(hidden_size: int) -> int:
    return 4 * hidden_size


def _two_thirds_of_four_times(hidden_size: int) -> int:
    """A gated MLP as large as a plain one of four times the width, up to a multiple of 64 (Shazeer 2020)."""
    return -(-hidden_size * 8 // (3 * 64)) * 64


def _base(vocab_size: int, positions: int, hidden_size: int = 768, layers: int = 12, heads: int = 12) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
    }


_PLAIN: dict[str, Any] = {
    "attention_bias": True,
    "block_kind": "sequential",
    "embedding_norm": False,
    "embedding_scale": 1.0,
    "first_norm": True,
    "global_attention_every": 1,
    "mixer": "attention",
    "mlp_bias": True,
    "mlp_kind": "plain",
    "norm_bias": True,
    "norm_kind": "layer_norm",
    "norm_placement": "pre",
    "output_scale": 1.0,
    "position_kind": "learned",
    "position_offset": 0,
    "qk_norm": "none",
    "residual_scale": 1.0,
    "tie_word_embeddings": True,
    "type_vocab_size": 0,
}
_LEAN: dict[str, Any] = _PLAIN | {
    "attention_bias": False,
    "mlp_bias": False,
    "mlp_kind": "gated",
    "norm_bias": False,
    "position_kind": "rotary",
}
_PLAIN_HEAD: dict[str, Any] = {"head_transform": False, "head_bias": False, "head_dense_bias": False}
_TRANSFORM_HEAD: dict[str, Any] = {"head_transform": True, "head_bias": True, "head_dense_bias": True}

_BERT: dict[str, Any] = (
    _PLAIN
    | _TRANSFORM_HEAD
    | {
        "classifier_head": "pooler",
        "classifier_pooling": "cls",
        "embedding_norm": True,
        "hidden_act": "gelu",
        "initializer": "normal",
        "norm_eps": 1e-12,
        "norm_placement": "post",
        "type_vocab_size": 2,
    }
)
_LLAMA: dict[str, Any] = (
    _LEAN
    | _PLAIN_HEAD
    | {
        "hidden_act": "silu",
        "initializer": "normal",
        "norm_eps": 1e-5,
        "norm_kind": "rms_norm",
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    }
)
_MODERNBERT: dict[str, Any] = (
    _LEAN
    | _TRANSFORM_HEAD
    | {
        "embedding_norm": True,
        "first_norm": False,
        "global_attention_every": 3,
        "head_dense_bias": False,
        "hidden_act": "gelu",
        "initializer": "scaled_truncated_normal",
        "local_window": 128,
        "norm_eps": 1e-5,
        "rope_theta": 160_000.0,
    }
)
_MARKERS = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3}
_BOTH_MARKERS = _MARKERS | {"bos_token_id": 2, "eos_token_id": 3}
_PAIR = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
_DOCUMENT = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}

ARCHITECTURES: dict[str, Architecture] = {
    # Devlin et al. 2018 (arXiv 1810.04805); sizes of bert-base-uncased.
    "bert": Architecture("encoder", _BERT, _base(30_522, 512), _four_times, _MARKERS),
    # Liu et al. 2019 (arXiv 1907.11692); sizes of roberta-base. Positions count from behind the padding id, as
    # fairseq's do (2 where that is 1, or where there is none); one token type, which is a constant.
    "roberta": Architecture(
        "encoder",
        _BERT | {"norm_eps": 1e-5, "position_offset": 2, "type_vocab_size": 1},
        _base(50_265, 512),
        _four_times,
        _BOTH_MARKERS,
    ),
    # Clark et al. 2020 (arXiv 2003.10555); sizes of electra-base-discriminator, whose generator is a third as wide.
    "electra": Architecture("encoder", _BERT | {"classifier_head": "gelu"}, _base(30_522, 512), _four_times, _MARKERS),
    # Lan et al. 2019 (arXiv 1909.11942); sizes of albert-base-v2: one group of weights for all layers, embeddings of
    # 128 channels.
    "albert": Architecture(
        "encoder",
        _BERT | {"hidden_act": "gelu_new", "num_hidden_groups": 1},
        _base(30_000, 512) | {"embedding_size": 128},
        _four_times,
        _BOTH_MARKERS,
    ),
    # Warner et al. 2024 (arXiv 2412.13663); sizes of ModernBERT-base. local_window 128 shows |i - j| <= 64.
    "modernbert": Architecture(
        "encoder",
        _MODERNBERT | {"classifier_head": "transform", "classifier_pooling": "cls", "local_rope_theta": 10_000.0},
        _base(50_368, 8192, layers=22),
        lambda hidden_size: hidden_size * 3 // 2,
        _BOTH_MARKERS,
    ),
    # Boizard et al. 2025 (arXiv 2503.05500); sizes of EuroBERT-210m: Llama's block, bidirectional.
    "eurobert": Architecture(
        "encoder",
        _LLAMA | {"classifier_head": "gelu", "classifier_pooling": "late", "rope_theta": 250_000.0},
        _base(128_256, 8192),
        _four_times,
        _BOTH_MARKERS,
    ),
    # Radford et al. 2019; sizes of gpt2 (small).
    "gpt2": Architecture(
        "decoder",
        _PLAIN | _PLAIN_HEAD | {"hidden_act": "gelu_new", "initializer": "scaled_normal", "norm_eps": 1e-5},
        _base(50_257, 1024),
        _four_times,
        {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1},
    ),
    # Touvron et al. 2023 (arXiv 2302.13971), in a 350M-class shape: depth and width of GPT-3 Medium (24 x 1024, 16
    # heads) with untied embeddings of 32,000 tokens, 369,148,928 parameters.
    "llama": Architecture("decoder", _LLAMA, _base(32_000, 2048, 1024, 24, 16), _two_thirds_of_four_times, _DOCUMENT),
    # Yang et al. 2025 (arXiv 2505.09388); sizes of Qwen3-0.6B: norms on queries and keys, heads wider than their share.
    "qwen3": Architecture(
        "decoder",
        _LLAMA | {"norm_eps": 1e-6, "qk_norm": "per_head", "rope_theta": 1_000_000.0, "tie_word_embeddings": True},
        _base(151_936, 40_960, 1024, 28, 16) | {"num_key_value_heads": 8, "head_dim": 128},
        lambda hidden_size: 3 * hidden_size,
        _DOCUMENT,
    ),
    # Weller et al. 2025 (Ettin, arXiv 2507.11412): ModernBERT's recipe, causal; sizes of its 150M decoder. Its local
    # layers look back over half of what ModernBERT's see: 64 tokens, the own among them.
    "modernbert-decoder": Architecture(
        "decoder",
        _MODERNBERT | {"local_rope_theta": 10_000.0, "local_window": 64},
        _base(50_368, 8192, layers=22),
        lambda hidden_size: hidden_size * 3 // 2,
        _DOCUMENT,
    ),
    # Vaswani et al. 2017 (arXiv 1706.03762), the base model; its 37,000 shared pieces of English and German.
    "transformer": Architecture(
        "seq2seq",
        _PLAIN
        | _PLAIN_HEAD
        | {
            "hidden_act": "relu",
            "initializer": "xavier_uniform",
            "label_smoothing": 0.1,
            "norm_eps": 1e-5,
            "norm_placement": "post",
            "position_kind": "sinusoidal",
            "sinusoidal_layout": "halves",
        },
        _base(37_000, 512, 512, 6, 8),
        _four_times,
        _PAIR,
        {"embedding_scale": lambda hidden_size: hidden_size**0.5},
    ),
    # Raffel et al. 2019 (arXiv 1910.10683); sizes of t5-base.
    "t5": Architecture(
        "seq2seq",
        _LEAN
        | _PLAIN_HEAD
        | {
            "attention_scale": 1.0,
            "hidden_act": "relu",
            "initializer": "t5",
            "initializer_range": 1.0,
            "label_smoothing": 0.0,
            "mlp_kind": "plain",
            "norm_eps": 1e-6,
            "norm_kind": "rms_norm",
            "position_kind": "relative",
        },
        _base(32_128, 512) | {"head_dim": 64},
        _four_times,
        _PAIR,
        {"output_scale": lambda hidden_size: hidden_size**-0.5},
    ),
}
