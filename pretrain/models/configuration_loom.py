"""Configurations of the Loom models: switches of the one Transformer block, presets of known designs, cost arithmetic.

Lives here: `LoomConfig` and its encoder and decoder forms, `ARCHITECTURES`, `loom_config`, and the pure functions that
count multiplied parameters and operations. No tensors and no torch: everything follows from the numbers in a config.
"""

# mypy: disable-error-code="no-untyped-call, unreachable"
# (transformers' base class is untyped; a field left out holds None until the architecture fills it)

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from transformers import PreTrainedConfig

# A field that the user leaves at None takes the convention or size of `architecture` (see `ARCHITECTURES`).
FROM_ARCHITECTURE: Any = None

AttentionKind = Literal["global", "local"]

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu")
CHOICES: dict[str, tuple[str, ...]] = {
    "hidden_act": ACTIVATIONS,
    "mlp_kind": ("plain", "gated"),
    "position_kind": ("learned", "rotary", "none"),
    "norm_kind": ("layer_norm", "rms_norm"),
    "norm_placement": ("pre", "post"),
    "initializer": ("normal", "scaled_normal", "scaled_truncated_normal"),
    "classifier_head": ("pooler", "transform"),
    "classifier_pooling": ("cls", "mean"),
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "global_attention_every",
)
DROPOUTS = ("hidden_dropout", "attention_dropout", "embedding_dropout", "classifier_dropout")


@dataclass(frozen=True)
class Architecture:
    """One known design: which model kind carries it, its conventions, the sizes of its published base model."""

    kind: Literal["encoder", "decoder"]
    conventions: dict[str, Any]
    sizes: dict[str, Any]
    intermediate: Callable[[int], int]  # hidden_size -> intermediate_size
    token_ids: dict[str, int]  # ids of the project's own tokenizers for this design


_PLAIN: dict[str, Any] = {
    "attention_bias": True,
    "embedding_norm": False,
    "first_norm": True,
    "global_attention_every": 1,
    "mlp_bias": True,
    "mlp_kind": "plain",
    "norm_bias": True,
    "norm_kind": "layer_norm",
    "norm_placement": "pre",
    "position_kind": "learned",
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

ARCHITECTURES: dict[str, Architecture] = {
    # Devlin et al. 2018 (arXiv 1810.04805); sizes of bert-base-uncased.
    "bert": Architecture(
        kind="encoder",
        conventions=_PLAIN
        | {
            "classifier_head": "pooler",
            "embedding_norm": True,
            "head_dense_bias": True,
            "hidden_act": "gelu",
            "initializer": "normal",
            "norm_eps": 1e-12,
            "norm_placement": "post",
            "type_vocab_size": 2,
        },
        sizes={
            "vocab_size": 30_522,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
        },
        intermediate=lambda hidden_size: 4 * hidden_size,
        token_ids={"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3},
    ),
    # Warner et al. 2024 (arXiv 2412.13663); sizes of ModernBERT-base. local_window 128 shows |i - j| <= 64.
    "modernbert": Architecture(
        kind="encoder",
        conventions=_LEAN
        | {
            "classifier_head": "transform",
            "embedding_norm": True,
            "first_norm": False,
            "global_attention_every": 3,
            "head_dense_bias": False,
            "hidden_act": "gelu",
            "initializer": "scaled_truncated_normal",
            "local_rope_theta": 10_000.0,
            "local_window": 128,
            "norm_eps": 1e-5,
            "rope_theta": 160_000.0,
        },
        sizes={
            "vocab_size": 50_368,
            "hidden_size": 768,
            "num_hidden_layers": 22,
            "num_attention_heads": 12,
            "max_position_embeddings": 8192,
        },
        intermediate=lambda hidden_size: hidden_size * 3 // 2,
        token_ids={"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    ),
    # Radford et al. 2019; sizes of gpt2 (small).
    "gpt2": Architecture(
        kind="decoder",
        conventions=_PLAIN | {"hidden_act": "gelu_new", "initializer": "scaled_normal", "norm_eps": 1e-5},
        sizes={
            "vocab_size": 50_257,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 1024,
        },
        intermediate=lambda hidden_size: 4 * hidden_size,
        token_ids={"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1},
    ),
    # Touvron et al. 2023 (arXiv 2302.13971), in a 350M-class shape: depth and width of GPT-3 Medium (24 x 1024, 16
    # heads) with untied embeddings of 32,000 tokens, 369,148,928 parameters.
    "llama": Architecture(
        kind="decoder",
        conventions=_LEAN
        | {
            "hidden_act": "silu",
            "initializer": "normal",
            "norm_eps": 1e-5,
            "norm_kind": "rms_norm",
            "rope_theta": 10_000.0,
            "tie_word_embeddings": False,
        },
        sizes={
            "vocab_size": 32_000,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "max_position_embeddings": 2048,
        },
        intermediate=lambda hidden_size: -(-hidden_size * 8 // (3 * 64)) * 64,
        token_ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
    ),
}


class LoomConfig(PreTrainedConfig):
    """Switches that the encoder and the decoder share.

    Every field left out takes the value of `architecture` (conventions, and the sizes of its published base model).
    `attention_scale` None means head_dim ** -0.5. Layers i with i % global_attention_every == 0 attend globally, the
    others within `local_window`: encoders |i - j| <= local_window // 2, decoders 0 <= i - j < local_window.
    Raises ValueError for values that no model can be built from.
    """

    kind: ClassVar[str] = "encoder"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    architecture: str = "bert"
    vocab_size: int = FROM_ARCHITECTURE
    hidden_size: int = FROM_ARCHITECTURE
    intermediate_size: int = FROM_ARCHITECTURE
    num_hidden_layers: int = FROM_ARCHITECTURE
    num_attention_heads: int = FROM_ARCHITECTURE
    num_key_value_heads: int = FROM_ARCHITECTURE
    head_dim: int = FROM_ARCHITECTURE
    max_position_embeddings: int = FROM_ARCHITECTURE
    type_vocab_size: int = FROM_ARCHITECTURE
    position_kind: str = FROM_ARCHITECTURE
    rope_theta: float | None = None
    local_rope_theta: float | None = None
    local_window: int | None = None
    global_attention_every: int = FROM_ARCHITECTURE
    attention_bias: bool = FROM_ARCHITECTURE
    attention_scale: float | None = None
    mlp_kind: str = FROM_ARCHITECTURE
    mlp_bias: bool = FROM_ARCHITECTURE
    hidden_act: str = FROM_ARCHITECTURE
    norm_kind: str = FROM_ARCHITECTURE
    norm_bias: bool = FROM_ARCHITECTURE
    norm_eps: float = FROM_ARCHITECTURE
    norm_placement: str = FROM_ARCHITECTURE
    first_norm: bool = FROM_ARCHITECTURE
    embedding_norm: bool = FROM_ARCHITECTURE
    tie_word_embeddings: bool = FROM_ARCHITECTURE
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0
    classifier_dropout: float = 0.0
    initializer: str = FROM_ARCHITECTURE
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        design = _design(self.architecture, self.kind)
        for name, value in (design.conventions | design.sizes).items():
            if name not in _TIED_TO_ANOTHER_SWITCH and getattr(self, name) is None:
                setattr(self, name, value)
        _check_sizes(self)
        if self.position_kind == "rotary" and self.rope_theta is None:
            self.rope_theta = design.conventions.get("rope_theta", 10_000.0)
        if self.global_attention_every != 1:
            if self.local_window is None:
                self.local_window = design.conventions.get("local_window")
            if self.local_rope_theta is None and self.position_kind == "rotary":
                self.local_rope_theta = design.conventions.get("local_rope_theta", self.rope_theta)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = design.intermediate(self.hidden_size)
        if self.head_dim is None and self.num_attention_heads:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}: change one of them, or set head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        self.validate_architecture()

    @property
    def attention_kinds(self) -> list[AttentionKind]:
        """The attention of each layer, first to last: "global" or "local"."""
        return [
            "global" if layer % self.global_attention_every == 0 else "local" for layer in range(self.num_hidden_layers)
        ]

    def validate_architecture(self) -> None:
        """Refuse values and combinations that no model can be built from, with a ValueError that names the key."""
        _check_values(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}: query heads share key-value heads in equal groups"
            )
        if self.norm_kind == "rms_norm" and self.norm_bias:
            raise ValueError("norm_bias true needs norm_kind layer_norm: RMS norm has no bias")
        if self.norm_placement == "post" and not self.first_norm:
            raise ValueError("first_norm false needs norm_placement pre: a post-norm block needs each of its norms")
        if self.position_kind == "rotary" and self.head_dim % 2:
            raise ValueError(f"position_kind rotary needs an even head_dim, this one is {self.head_dim}")
        if self.position_kind != "rotary" and (self.rope_theta is not None or self.local_rope_theta is not None):
            raise ValueError(f"rope_theta does nothing with position_kind {self.position_kind}: leave it out")
        if self.global_attention_every != 1 and self.local_window is None:
            raise ValueError("global_attention_every above 1 needs local_window: the width the other layers look at")
        if self.global_attention_every == 1 and (self.local_window is not None or self.local_rope_theta is not None):
            raise ValueError(
                "local_window and local_rope_theta do nothing with global_attention_every 1 (every layer is global): "
                "leave them out, or set global_attention_every to 2 or more"
            )


# Switches that mean something only beside another one; `__post_init__` fills them when that one is on.
_TIED_TO_ANOTHER_SWITCH = ("rope_theta", "local_rope_theta", "local_window")

# Roles that no model config holds. An encoder also has cls and sep, which a decoder leaves to its tokenizer.
TOKENIZER_ONLY_IDS = ("unk_token_id", "mask_token_id", "cls_token_id", "sep_token_id")


class LoomEncoderConfig(LoomConfig):
    """A bidirectional model: adds the masked-language-model head and the pooling of the classifier."""

    model_type = "loom_encoder"
    kind: ClassVar[str] = "encoder"

    architecture: str = "bert"
    head_dense_bias: bool = FROM_ARCHITECTURE
    classifier_head: str = FROM_ARCHITECTURE
    classifier_pooling: str = "cls"
    cls_token_id: int | None = None
    sep_token_id: int | None = None


class LoomDecoderConfig(LoomConfig):
    """A causal model with a key-value cache."""

    model_type = "loom_decoder"
    kind: ClassVar[str] = "decoder"

    architecture: str = "gpt2"
    use_cache: bool = True


CONFIG_CLASSES: dict[str, type[LoomConfig]] = {"encoder": LoomEncoderConfig, "decoder": LoomDecoderConfig}


def config_keys(architecture: str) -> list[str]:
    """The keys `loom_config` takes for this architecture, sorted. Raises ValueError for an unknown architecture."""
    config_class = CONFIG_CLASSES[_design(architecture).kind]
    inherited = {field.name for field in fields(PreTrainedConfig)}
    return sorted({field.name for field in fields(config_class)} - inherited - {"architecture"})


def loom_config(architecture: str, **keys: Any) -> LoomConfig:
    """Build the config of a known design, with the given keys in place of its published base model's.

    Without any token id among the keys, the ids are those of the project's own tokenizers for this design. With one,
    the keys speak for a tokenizer, and a role that is left out is a role it does not have: None. Ids of roles that
    belong to the tokenizer alone (`TOKENIZER_ONLY_IDS`) may be among the keys, so that all of its ids can be passed.
    Raises ValueError for an unknown architecture or key (naming the nearest known one) and for impossible values.
    """
    design = _design(architecture)
    known = config_keys(architecture)
    token_ids = {} if any(key.endswith("_token_id") for key in keys) else design.token_ids
    keys = {key: value for key, value in keys.items() if key in known or key not in TOKENIZER_ONLY_IDS}
    for key in keys:
        if key not in known:
            raise ValueError(f"unknown model key {key!r} for architecture {architecture}{_nearest(key, known)}")
    return CONFIG_CLASSES[design.kind](architecture=architecture, **(token_ids | keys))


def num_multiplied_parameters(config: LoomConfig, target_fraction: float = 1.0) -> float:
    """Parameters that take part in a matrix product per token; looked-up embeddings, norms and biases do not count.

    `target_fraction` is the share of positions that pass the language-model head: 1 for causal models, about the
    masking rate for MLM, whose head sees target positions alone. The head counts whether it is tied or not.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    attention = 2 * hidden * heads + 2 * hidden * config.num_key_value_heads * config.head_dim
    matrices = 3 if config.mlp_kind == "gated" else 2
    block = attention + matrices * hidden * config.intermediate_size
    head = hidden * config.vocab_size + (hidden * hidden if config.kind == "encoder" else 0)
    return config.num_hidden_layers * block + target_fraction * head


def flops_per_token(config: LoomConfig, sequence_length: int, target_fraction: float = 1.0) -> float:
    """Floating-point operations per token of one training step, forward and backward, for a row of `sequence_length`.

    6 x multiplied parameters + 12 x keys x width for each layer (PaLM, arXiv 2204.02311, appendix B): causal layers
    count the whole square, local layers the keys in their window.
    """
    width = config.num_attention_heads * config.head_dim
    keys = 0
    for kind in config.attention_kinds:
        window = config.local_window if kind == "local" else None
        keys += sequence_length if window is None else min(sequence_length, window)
    return 6 * num_multiplied_parameters(config, target_fraction) + 12 * keys * width


def _design(architecture: str, kind: str | None = None) -> Architecture:
    design = ARCHITECTURES.get(architecture)
    if design is None:
        raise ValueError(f"unknown architecture {architecture!r}{_nearest(str(architecture), list(ARCHITECTURES))}")
    if kind is not None and design.kind != kind:
        raise ValueError(f"architecture {architecture} is a {design.kind}: it does not fit a {kind} config")
    return design


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    hint = f": did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})" if not close else hint


def _check_sizes(config: LoomConfig) -> None:
    for name in SIZES:
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _check_values(config: LoomConfig) -> None:
    """Each value alone: sizes are positive whole numbers, shares lie in [0, 1), words are known ones."""
    _check_sizes(config)
    if config.local_window is not None and (isinstance(config.local_window, bool) or config.local_window < 1):
        raise ValueError(f"local_window must be a whole number of at least 1, got {config.local_window!r}")
    if isinstance(config.type_vocab_size, bool) or config.type_vocab_size < 0:
        raise ValueError(f"type_vocab_size must be 0 (no token types) or more, got {config.type_vocab_size!r}")
    for name in DROPOUTS:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
    for name, words in CHOICES.items():
        value = getattr(config, name, words[0])
        if value not in words:
            raise ValueError(f"{name} {value!r} is unknown{_nearest(str(value), list(words))}")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        given = getattr(config, name, None)
        for token in given if isinstance(given, list) else [given]:
            if token is not None and not 0 <= token < config.vocab_size:
                raise ValueError(f"{name} {token} lies outside the vocabulary of {config.vocab_size} tokens")
