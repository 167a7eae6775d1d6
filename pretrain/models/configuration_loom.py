"""Configurations of the Loom models: switches of the one Transformer block.

Lives here: `LoomConfig` with its encoder, decoder and encoder-decoder forms, `loom_config`. What they may hold is
in `configuration_checks.py`, presets are in `architectures.py`, cost arithmetic in `costs.py`. No tensors and no torch.
"""

# mypy: disable-error-code="no-untyped-call, unreachable"
# (transformers' base class is untyped; a field left out holds None until the architecture fills it)

import copy
from dataclasses import fields
from typing import Any, ClassVar, Literal

from transformers import PreTrainedConfig

from .architectures import ARCHITECTURES, Architecture
from .configuration_checks import (
    INITIALIZER_RANGE,
    check_initial_weights,
    check_layers,
    check_positions,
    check_rope_scaling,
    check_sizes,
    check_values,
    check_windows,
    nearest,
)

# A field that the user leaves at None takes the convention or size of `architecture` (see `ARCHITECTURES`).
FROM_ARCHITECTURE: Any = None

AttentionKind = Literal["global", "local"]

# Switches that mean something only beside another one; `__post_init__` fills them when that one is on.
_TIED_TO_ANOTHER_SWITCH = ("rope_theta", "local_rope_theta", "local_window", "position_offset", "sinusoidal_layout")

DETECTION_KEYS = ("generator_size", "generator", "rtd_weight", "rtd_sharing")
"""Keys that say how a generator goes with a model, and so have no place in the generator's own config."""

# Roles that no model config holds. An encoder also has cls and sep, which a decoder leaves to its tokenizer.
TOKENIZER_ONLY_IDS = ("unk_token_id", "mask_token_id", "cls_token_id", "sep_token_id")


class LoomConfig(PreTrainedConfig):
    """Switches that all kinds of model share.

    Every field left out takes the value of `architecture` (conventions, and the sizes of its published base model).

    Embeddings: `embedding_size` apart from hidden_size is projected up (ALBERT); what is looked up is multiplied by
    `embedding_scale`. Positions count from `position_offset` (RoBERTa: pad_token_id + 1) in a learned or sinusoidal
    table. `partial_rotary_factor` is the share of each head that turns. `rope_scaling` holds `rope_type` (linear, ntk
    or yarn), `factor`, and for yarn `original_max_position_embeddings`; it stretches the positions of global layers.
    ntk is a larger base, and becomes one here.

    Attention: `attention_scale` None means head_dim ** -0.5; `attention_softcap` c turns scores s into c tanh(s / c).
    Layer i attends as `attention_pattern[i % len]` says ("global" or "local"); without a pattern, globally where
    i % global_attention_every == 0. Local layers look within `local_window`: encoders |i - j| <= local_window // 2,
    decoders 0 <= i - j < local_window. `qk_norm` norms queries and keys, each head or all heads together.

    Layers: `num_hidden_groups` sets of weights serve all layers (ALBERT); each branch is multiplied by
    `residual_scale`, what reaches the head by `output_scale`; `logit_softcap` as above. `block_kind` parallel adds
    attention and MLP of the same input, with a norm each, or one for both.

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
    embedding_size: int = FROM_ARCHITECTURE
    intermediate_size: int = FROM_ARCHITECTURE
    num_hidden_layers: int = FROM_ARCHITECTURE
    num_hidden_groups: int = FROM_ARCHITECTURE
    num_attention_heads: int = FROM_ARCHITECTURE
    num_key_value_heads: int = FROM_ARCHITECTURE
    head_dim: int = FROM_ARCHITECTURE
    max_position_embeddings: int = FROM_ARCHITECTURE
    type_vocab_size: int = FROM_ARCHITECTURE
    embedding_scale: float = FROM_ARCHITECTURE
    embedding_norm: bool = FROM_ARCHITECTURE
    position_kind: str = FROM_ARCHITECTURE
    position_offset: int = FROM_ARCHITECTURE
    sinusoidal_layout: str | None = None
    rope_theta: float | None = None
    local_rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    mixer: str = FROM_ARCHITECTURE
    local_window: int | None = None
    global_attention_every: int = FROM_ARCHITECTURE
    attention_pattern: list[str] | None = None
    attention_bias: bool = FROM_ARCHITECTURE
    attention_scale: float | None = None
    attention_softcap: float | None = None
    qk_norm: str = FROM_ARCHITECTURE
    block_kind: str = FROM_ARCHITECTURE
    mlp_kind: str = FROM_ARCHITECTURE
    mlp_bias: bool = FROM_ARCHITECTURE
    hidden_act: str = FROM_ARCHITECTURE
    norm_kind: str = FROM_ARCHITECTURE
    norm_bias: bool = FROM_ARCHITECTURE
    norm_eps: float = FROM_ARCHITECTURE
    norm_placement: str = FROM_ARCHITECTURE
    first_norm: bool = FROM_ARCHITECTURE
    residual_scale: float = FROM_ARCHITECTURE
    output_scale: float = FROM_ARCHITECTURE
    logit_softcap: float | None = None
    tie_word_embeddings: bool = FROM_ARCHITECTURE
    head_transform: bool = FROM_ARCHITECTURE
    head_dense_bias: bool = FROM_ARCHITECTURE
    head_bias: bool = FROM_ARCHITECTURE
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0
    classifier_dropout: float = 0.0
    initializer: str = FROM_ARCHITECTURE
    initializer_range: float = FROM_ARCHITECTURE
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        design = _design(self.architecture, self.kind)
        for name, value in (design.conventions | design.sizes).items():
            if name not in (*_TIED_TO_ANOTHER_SWITCH, *design.derived) and getattr(self, name) is None:
                setattr(self, name, value)
        if self.initializer_range is None:
            self.initializer_range = INITIALIZER_RANGE
        check_sizes(self)
        self._fill_sizes(design)
        self._fill_positions(design)
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def _fill_sizes(self, design: Architecture) -> None:
        """Sizes and scales that follow from others."""
        for name, derive in design.derived.items():
            if getattr(self, name) is None:
                setattr(self, name, derive(self.hidden_size))
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.num_hidden_groups is None:
            self.num_hidden_groups = self.num_hidden_layers
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

    def _fill_positions(self, design: Architecture) -> None:
        """Switches that mean something only beside another one."""
        if self.position_offset is None:
            usual = design.conventions["position_offset"] if self.position_kind in ("learned", "sinusoidal") else 0
            self.position_offset = self.pad_token_id + 1 if usual and self.pad_token_id is not None else usual
        if self.position_kind == "sinusoidal" and self.sinusoidal_layout is None:
            self.sinusoidal_layout = "halves"
        if self.position_kind == "rotary" and self.rope_theta is None:
            self.rope_theta = design.conventions.get("rope_theta", 10_000.0)
        if "local" in self.pattern:
            if self.local_window is None:
                self.local_window = design.conventions.get("local_window")
            if self.local_rope_theta is None and self.position_kind == "rotary":
                self.local_rope_theta = design.conventions.get("local_rope_theta", self.rope_theta)
        scaling = self.rope_scaling  # of global layers alone
        if isinstance(scaling, dict) and scaling.get("rope_type") == "ntk" and self.rope_theta is not None:
            check_rope_scaling(scaling)
            width = int(self.head_dim * self.partial_rotary_factor)
            self.rope_theta, self.rope_scaling = _ntk_theta(self.rope_theta, scaling["factor"], width), None

    @property
    def pattern(self) -> list[str]:
        """The attention of the first layers, repeated over all of them."""
        if self.attention_pattern is not None:
            return self.attention_pattern
        return ["global"] + ["local"] * (self.global_attention_every - 1)

    @property
    def attention_kinds(self) -> list[AttentionKind]:
        """The attention of each layer, first to last: "global" or "local"."""
        return self.attention_kinds_of(self.num_hidden_layers)

    def attention_kinds_of(self, num_layers: int) -> list[AttentionKind]:
        """The attention of each of so many layers."""
        pattern = self.pattern
        return ["global" if pattern[layer % len(pattern)] == "global" else "local" for layer in range(num_layers)]

    def validate_architecture(self) -> None:
        """Refuse values and combinations that no model can be built from, with a ValueError that names the key."""
        check_values(self)
        check_layers(self)
        check_positions(self)
        check_windows(self)
        check_initial_weights(self)


class LoomEncoderConfig(LoomConfig):
    """A bidirectional model: adds its pretraining heads and what stands before a classifier.

    `classifier_head`: a dense layer with tanh (pooler) or gelu before the classifier of a row, or the transform of the
    token head before every classifier. `classifier_pooling`: what is said of a row is said of its first token (cls),
    of the mean over its tokens (mean), or is the mean of what is said of each (late: EuroBERT).

    Detection of replaced tokens (Clark et al. 2020): `generator_size` is the generator's share of this model's width,
    heads and intermediate size (None: no generator), `generator` holds what else differs in it; `rtd_weight` weighs
    the detection's loss. `rtd_sharing`: the generator's embeddings are this model's (tied), the base that this model
    adds its own part to without moving it (gradient_disentangled: He et al. 2021, section 3.2), or its own (none).
    """

    model_type = "loom_encoder"
    kind: ClassVar[str] = "encoder"

    architecture: str = "bert"
    classifier_head: str = FROM_ARCHITECTURE
    classifier_pooling: str = FROM_ARCHITECTURE
    generator_size: float | None = None
    generator: dict[str, Any] | None = None
    rtd_weight: float = 50.0
    rtd_sharing: str = "tied"
    cls_token_id: int | None = None
    sep_token_id: int | None = None

    def validate_architecture(self) -> None:
        """Refuse values and combinations that no model can be built from, with a ValueError that names the key."""
        super().validate_architecture()
        if isinstance(self.rtd_weight, bool) or not isinstance(self.rtd_weight, int | float) or self.rtd_weight <= 0:
            raise ValueError(f"rtd_weight must be a number above 0, got {self.rtd_weight!r}")
        size = self.generator_size
        if size is None:
            if self.generator is not None:
                raise ValueError("generator says how a generator differs: set generator_size, or leave generator out")
            return
        if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size <= 1:
            raise ValueError(f"generator_size must lie in (0, 1], got {size!r}")
        self.generator_config()

    def generator_config(self) -> "LoomEncoderConfig":
        """The config of the generator: this one with `generator_size` of its width, and the keys of `generator`.

        Raises ValueError where no model can be built from it.
        """
        size, given = self.generator_size, dict(self.generator or {})
        assert size is not None
        shared = {"vocab_size"} if self.rtd_sharing == "none" else {"vocab_size", "embedding_size"}
        known = set(config_keys(self.architecture)) - shared - set(DETECTION_KEYS)
        if unknown := sorted(set(given) - known):
            raise ValueError(f"generator: {unknown[0]} is no key of its own{nearest(unknown[0], sorted(known))}")

        def part(whole: int) -> int:
            return max(1, round(whole * size))

        keys = {name: getattr(self, name) for name in config_keys(self.architecture) if name not in DETECTION_KEYS}
        heads, width = part(self.num_attention_heads), given.get("hidden_size", part(self.hidden_size))
        if self.head_dim * self.num_attention_heads == self.hidden_size:  # so it stays, as stock architectures want it
            heads = next(count for count in range(heads, 0, -1) if width % count == 0)
            keys["head_dim"] = None
        keys |= {
            "hidden_size": part(self.hidden_size),
            "intermediate_size": part(self.intermediate_size),
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads * self.num_key_value_heads // self.num_attention_heads),
        }
        # What follows from another key is left to follow from it.
        if self.num_hidden_groups == self.num_hidden_layers:
            keys["num_hidden_groups"] = None
        if self.rtd_sharing == "none" and self.embedding_size == self.hidden_size:
            keys["embedding_size"] = None
        if "num_attention_heads" in given:
            keys |= {"num_key_value_heads": None, "head_dim": None}
        try:
            return LoomEncoderConfig(architecture=self.architecture, **(keys | given))
        except ValueError as error:
            raise ValueError(f"the generator: {error}") from error


class LoomDecoderConfig(LoomConfig):
    """A causal model with a key-value cache."""

    model_type = "loom_decoder"
    kind: ClassVar[str] = "decoder"
    # The names under which libraries that make the logits themselves (TRL, vLLM) look for these two.
    attribute_map: ClassVar[dict[str, str]] = {
        "final_logit_softcapping": "logit_softcap",
        "logit_scale": "output_scale",
    }

    architecture: str = "gpt2"
    use_cache: bool = True


class LoomSeq2SeqConfig(LoomConfig):
    """An encoder and a decoder that looks at it; one vocabulary and one table of embeddings for both.

    `num_hidden_layers` are the encoder's, `num_decoder_layers` the decoder's (None: as many). `label_smoothing` is the
    share of each target that is spread evenly over the vocabulary while training (Vaswani et al. 2017, section 5.4).
    """

    model_type = "loom_seq2seq"
    kind: ClassVar[str] = "seq2seq"

    architecture: str = "transformer"
    num_decoder_layers: int = FROM_ARCHITECTURE
    label_smoothing: float = FROM_ARCHITECTURE
    decoder_start_token_id: int | None = None
    is_encoder_decoder: bool = True
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_hidden_layers or _design(self.architecture).sizes["num_hidden_layers"]
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuse values and combinations that no model can be built from, with a ValueError that names the key."""
        super().validate_architecture()
        if self.num_hidden_groups != self.num_hidden_layers:
            raise ValueError("num_hidden_groups is for an encoder or a decoder alone: leave it out")
        if self.block_kind != "sequential":
            raise ValueError(f"block_kind {self.block_kind} has no place for attention to an encoder: use sequential")
        if not self.first_norm:
            raise ValueError("first_norm false is for an encoder or a decoder alone: leave it out")
        if self.type_vocab_size:
            raise ValueError("type_vocab_size is for an encoder or a decoder alone: leave it out")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """This config; for the decoder alone a copy with its number of layers, by which `generate` makes caches."""
        if not decoder or encoder:
            return self
        config = copy.deepcopy(self)
        config.num_hidden_layers = config.num_decoder_layers
        return config


CONFIG_CLASSES: dict[str, type[LoomConfig]] = {
    "encoder": LoomEncoderConfig,
    "decoder": LoomDecoderConfig,
    "seq2seq": LoomSeq2SeqConfig,
}


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
            raise ValueError(f"unknown model key {key!r} for architecture {architecture}{nearest(key, known)}")
    return CONFIG_CLASSES[design.kind](architecture=architecture, **(token_ids | keys))


def _design(architecture: str, kind: str | None = None) -> Architecture:
    design = ARCHITECTURES.get(architecture)
    if design is None:
        raise ValueError(f"unknown architecture {architecture!r}{nearest(str(architecture), list(ARCHITECTURES))}")
    if kind is not None and design.kind != kind:
        raise ValueError(f"architecture {architecture} is a {design.kind}: it does not fit a {kind} config")
    return design


def _ntk_theta(theta: float, factor: float, width: int) -> float:
    """The base with which the slowest of `width` / 2 frequencies is `factor` times slower and the fastest unchanged."""
    if width < 4:
        raise ValueError(f"rope_scaling ntk needs at least 4 channels of a head that turn, these are {width}")
    return float(theta * factor ** (width / (width - 2)))
