"""The section `model`: a known design, its sizes, and the switches of its block.

What lives here: the schema of that section. What must not: torch, or what a switch does (`models/`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, StrictBool, model_validator

from pretrain.config_types import OpenShare, Positive, Section, Share

ENCODERS = ("bert", "roberta", "electra", "albert", "modernbert", "eurobert")
DECODERS = ("gpt2", "llama", "qwen3", "modernbert-decoder")
SEQ2SEQ = ("transformer", "t5")
KINDS: dict[str, Literal["encoder", "decoder", "seq2seq"]] = {
    **dict.fromkeys(ENCODERS, "encoder"),
    **dict.fromkeys(DECODERS, "decoder"),
    **dict.fromkeys(SEQ2SEQ, "seq2seq"),
}
"""What each architecture is."""

StockHome = Literal[
    "bert", "roberta", "electra", "albert", "modernbert", "eurobert",
    "gpt2", "llama", "qwen3", "modernbert-decoder", "marian", "t5",
]  # fmt: skip
"""Stock architectures that hold our models, by their model_type in transformers."""
HOME_KINDS: dict[str, Literal["encoder", "decoder", "seq2seq"]] = {
    home: KINDS["transformer" if home == "marian" else home] for home in get_args(StockHome)
}
"""What each of them is."""

AboveZero = Annotated[float, Field(gt=0.0)]

_BESIDE_FROM = {"from_", "class_", "grow", "optimizer_state"}
GENERATOR_KEYS = ("generator_size", "generator", "rtd_weight", "rtd_sharing")
"""Keys of objective.kind: rtd; beside `from` too, which may have no generator yet."""


class RopeScaling(Section):
    """Rotary positions of global layers stretched over a longer context (linear, ntk, yarn)."""

    rope_type: Literal["linear", "ntk", "yarn"]
    factor: Annotated[float, Field(ge=1.0)]
    original_max_position_embeddings: Positive | None = Field(None, description="yarn: the context it was trained on")
    attention_factor: AboveZero | None = Field(None, description="yarn: default 0.1 ln(factor) + 1")
    beta_fast: AboveZero | None = Field(None, description="yarn: default 32")
    beta_slow: AboveZero | None = Field(None, description="yarn: default 1")

    @model_validator(mode="after")
    def _keys_of_yarn(self) -> Self:
        given = self.model_fields_set - {"rope_type", "factor"}
        if self.rope_type != "yarn" and given:
            raise ValueError(f"`{min(given)}` belongs to yarn and has no effect with `rope_type: {self.rope_type}`")
        if self.rope_type == "yarn" and self.original_max_position_embeddings is None:
            raise ValueError("yarn needs `original_max_position_embeddings`, the context the model was trained on")
        return self


class Grow(Section):
    """The sizes of a larger model whose weights are tiled from `from`'s; those left out follow, or stay."""

    num_hidden_layers: Positive | None = None
    hidden_size: Positive | None = Field(None, description="brings heads and MLP in proportion; heads keep their width")
    num_attention_heads: Positive | None = None
    num_key_value_heads: Positive | None = None
    intermediate_size: Positive | None = None


class ModelConfig(Section):
    """The model: a known design's conventions, and sizes beside it. A size left out is the published base model's."""

    architecture: (
        Literal[
            "bert", "roberta", "electra", "albert", "modernbert", "eurobert",
            "gpt2", "llama", "qwen3", "modernbert-decoder", "transformer", "t5",
        ]
        | None
    ) = None  # fmt: skip
    from_: str | None = Field(None, alias="from", description="start from this model: a Hub name or a directory")
    class_: Literal["loom", "stock"] = Field(
        "loom", alias="class", description="of `from`: ours, or transformers' own, whatever its architecture"
    )
    grow: Grow | None = Field(None, description="start from a larger model that is tiled from `from`")
    optimizer_state: StrictBool | None = Field(
        None, description="start with the optimizer's moments beside `from`, the model of a run's checkpoint"
    )
    hidden_size: Positive | None = None
    embedding_size: Positive | None = Field(None, description="of the tables, projected up to hidden_size (ALBERT)")
    num_hidden_layers: Positive | None = Field(None, description="of an encoder-decoder: the encoder's")
    num_decoder_layers: Positive | None = Field(None, description="encoder-decoder; default num_hidden_layers")
    num_hidden_groups: Positive | None = Field(None, description="sets of weights that the layers share (ALBERT: 1)")
    num_attention_heads: Positive | None = None
    num_key_value_heads: Positive | None = Field(None, description="fewer than heads: grouped; 1: multi-query")
    head_dim: Positive | None = None
    intermediate_size: Positive | None = None
    max_position_embeddings: Positive | None = Field(None, description="default: data.sequence_length, if larger")
    type_vocab_size: Annotated[int, Field(ge=0)] | None = None
    embedding_scale: AboveZero | None = Field(None, description="what is looked up is multiplied by it")
    embedding_norm: StrictBool | None = None
    position_kind: Literal["learned", "sinusoidal", "rotary", "alibi", "relative", "none"] | None = None
    position_offset: Annotated[int, Field(ge=0)] | None = Field(None, description="positions count from it")
    sinusoidal_layout: Literal["halves", "interleaved"] | None = None
    rope_theta: AboveZero | None = None
    local_rope_theta: AboveZero | None = None
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="share of each head that turns"
    )
    relative_attention_num_buckets: Positive | None = None
    relative_attention_max_distance: Positive | None = None
    mixer: Literal["attention"] | None = None
    local_window: Positive | None = None
    global_attention_every: Positive | None = None
    attention_pattern: tuple[Literal["global", "local"], ...] | None = Field(
        None, description="of the layers, repeated; in place of global_attention_every"
    )
    attention_bias: StrictBool | None = None
    attention_scale: AboveZero | None = Field(None, description="default head_dim ** -0.5")
    attention_softcap: AboveZero | None = Field(None, description="scores s become c tanh(s / c)")
    qk_norm: Literal["none", "per_head", "full_width"] | None = None
    block_kind: Literal["sequential", "parallel", "parallel_shared_norm"] | None = None
    mlp_kind: Literal["plain", "gated"] | None = None
    mlp_bias: StrictBool | None = None
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu", "relu2"] | None = None
    norm_kind: Literal["layer_norm", "rms_norm"] | None = None
    norm_bias: StrictBool | None = None
    norm_eps: AboveZero | None = None
    norm_placement: Literal["pre", "post"] | None = None
    first_norm: StrictBool | None = None
    residual_scale: AboveZero | None = Field(None, description="of each branch")
    output_scale: AboveZero | None = Field(None, description="of what reaches the head")
    logit_softcap: AboveZero | None = None
    tie_word_embeddings: StrictBool | None = None
    head_transform: StrictBool | None = Field(None, description="a dense layer, activation and norm before the head")
    head_dense_bias: StrictBool | None = None
    head_bias: StrictBool | None = None
    hidden_dropout: Share | None = None
    attention_dropout: Share | None = None
    embedding_dropout: Share | None = None
    generator_size: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="rtd: the generator's share of width, heads and intermediate size"
    )
    generator: dict[str, Any] | None = Field(None, description="rtd: keys in which the generator differs beside that")
    rtd_weight: AboveZero | None = Field(None, description="rtd: weight of the detection's loss, default 50")
    rtd_sharing: Literal["tied", "gradient_disentangled", "none"] | None = Field(
        None, description="rtd: embeddings of generator and discriminator, default tied"
    )
    label_smoothing: OpenShare | Literal[0] | None = Field(None, description="encoder-decoder, while training")
    initializer: Literal["normal", "scaled_normal", "scaled_truncated_normal", "xavier_uniform", "t5"] | None = None
    initializer_range: AboveZero | None = None

    @model_validator(mode="after")
    def _architecture_or_from(self) -> Self:
        if self.architecture is None and self.from_ is None:
            raise ValueError(f"give `architecture` (one of {', '.join(KINDS)}) or `from`")
        if self.class_ == "stock" and self.from_ is None:
            raise ValueError("`class: stock` trains an existing model as transformers has it; name it with `from`")
        if self.grow is not None and (self.from_ is None or self.class_ == "stock"):
            raise ValueError("`grow` tiles a larger model of ours from `from`; name that, without `class: stock`")
        if self.optimizer_state and (self.from_ is None or self.grow is not None):
            raise ValueError(
                "`optimizer_state` takes moments of the model that `from` names, weight by weight; name a checkpoint's "
                "model there, without `grow`"
            )
        if self.from_ is not None and (given := sorted(self.model_fields_set - _BESIDE_FROM - set(GENERATOR_KEYS))):
            raise ValueError(f"`from` takes a model as it is, so `{given[0]}` has no effect; remove one of them")
        return self

    def sizes(self) -> dict[str, Any]:
        """The keys that were given, for the model configuration."""
        keys = self.model_dump(exclude={"architecture", *_BESIDE_FROM}, exclude_none=True)
        if "attention_pattern" in keys:
            keys["attention_pattern"] = list(keys["attention_pattern"])
        return keys
