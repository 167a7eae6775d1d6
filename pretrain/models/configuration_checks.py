"""Which values and combinations of a Loom configuration a model can be built from.

Lives here: the checks, each a ValueError that names the key, and the words that keys may have. The configurations are
in `configuration_loom.py`, which calls these. No tensors and no torch.
"""

import difflib
from typing import Any

from .architectures import ARCHITECTURES

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu", "relu2")
CHOICES: dict[str, tuple[str, ...]] = {
    "block_kind": ("sequential", "parallel", "parallel_shared_norm"),
    "hidden_act": ACTIVATIONS,
    "mixer": ("attention",),
    "mlp_kind": ("plain", "gated"),
    "position_kind": ("learned", "sinusoidal", "rotary", "alibi", "relative", "none"),
    "sinusoidal_layout": ("halves", "interleaved"),
    "norm_kind": ("layer_norm", "rms_norm"),
    "norm_placement": ("pre", "post"),
    "qk_norm": ("none", "per_head", "full_width"),
    "initializer": ("normal", "scaled_normal", "scaled_truncated_normal", "xavier_uniform", "t5"),
    "classifier_head": ("pooler", "transform", "gelu"),
    "classifier_pooling": ("cls", "mean", "late"),
    "rtd_sharing": ("tied", "gradient_disentangled", "none"),
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "embedding_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_hidden_groups",
    "num_decoder_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "global_attention_every",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)
SHARES = ("hidden_dropout", "attention_dropout", "embedding_dropout", "classifier_dropout", "label_smoothing")
ABOVE_ZERO = (
    "attention_scale",
    "attention_softcap",
    "embedding_scale",
    "local_rope_theta",
    "logit_softcap",
    "norm_eps",
    "output_scale",
    "residual_scale",
    "rope_theta",
)
ROPE_SCALING = {
    "linear": {"factor"},
    "ntk": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
}
"""What each kind of rotary scaling must be given."""
_YARN_MORE = {"attention_factor", "beta_fast", "beta_slow"}
INITIALIZER_RANGE = 0.02


def nearest(word: str, known: list[str]) -> str:
    """The end of a message about an unknown word: the known one that is probably meant, or all."""
    close = difflib.get_close_matches(word, known, n=1)
    hint = f": did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})" if not close else hint


def check_sizes(config: Any) -> None:
    """Sizes are whole numbers of at least 1."""
    for name in SIZES:
        value = getattr(config, name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_values(config: Any) -> None:
    """Each value alone: sizes are positive whole numbers, shares lie in [0, 1), words are known ones."""
    check_sizes(config)
    if config.local_window is not None and (isinstance(config.local_window, bool) or config.local_window < 1):
        raise ValueError(f"local_window must be a whole number of at least 1, got {config.local_window!r}")
    if isinstance(config.type_vocab_size, bool) or config.type_vocab_size < 0:
        raise ValueError(f"type_vocab_size must be 0 (no token types) or more, got {config.type_vocab_size!r}")
    if isinstance(config.position_offset, bool) or config.position_offset < 0:
        raise ValueError(f"position_offset must be 0 or more, got {config.position_offset!r}")
    for name in SHARES:
        value = getattr(config, name, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
    for name in ABOVE_ZERO:
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise ValueError(f"{name} must be a number above 0, got {value!r}")
    for name, words in CHOICES.items():
        value = getattr(config, name, words[0])
        if value is not None and value not in words:
            raise ValueError(f"{name} {value!r} is unknown{nearest(str(value), list(words))}")
    for name in ("pad", "bos", "eos", "cls", "sep", "decoder_start"):
        given = getattr(config, f"{name}_token_id", None)
        for token in given if isinstance(given, list) else [given]:
            if token is not None and not 0 <= token < config.vocab_size:
                raise ValueError(f"{name}_token_id {token} lies outside the vocabulary of {config.vocab_size} tokens")


def check_layers(config: Any) -> None:
    """Heads, norms and blocks that go together."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of num_key_value_heads "
            f"{config.num_key_value_heads}: query heads share key-value heads in equal groups"
        )
    if config.norm_kind == "rms_norm" and config.norm_bias:
        raise ValueError("norm_bias true needs norm_kind layer_norm: RMS norm has no bias")
    if config.norm_placement == "post" and not config.first_norm:
        raise ValueError("first_norm false needs norm_placement pre: a post-norm block needs each of its norms")
    if config.norm_placement == "post" and config.block_kind != "sequential":
        raise ValueError(f"block_kind {config.block_kind} needs norm_placement pre: both branches read one input")
    if config.block_kind == "parallel_shared_norm" and not config.first_norm:
        raise ValueError("first_norm false does not fit block_kind parallel_shared_norm: its MLP reads that norm too")
    if config.num_hidden_layers % config.num_hidden_groups:
        raise ValueError(
            f"num_hidden_layers {config.num_hidden_layers} is not a multiple of num_hidden_groups "
            f"{config.num_hidden_groups}: each group of weights serves equally many layers"
        )
    if config.num_hidden_groups != config.num_hidden_layers and not config.first_norm:
        raise ValueError("first_norm false does not fit num_hidden_groups: the first layer shares its norms")
    if config.tie_word_embeddings and config.embedding_size != config.hidden_size and not config.head_transform:
        raise ValueError(
            f"embedding_size {config.embedding_size} apart from hidden_size {config.hidden_size} with tied embeddings "
            "needs head_transform true, which brings hidden states to that size; or set tie_word_embeddings false"
        )


def check_positions(config: Any) -> None:
    """Positions and the keys that belong to one kind of them."""
    turned = config.head_dim * config.partial_rotary_factor
    if config.position_kind == "rotary" and (turned < 2 or turned % 2):
        raise ValueError(
            f"position_kind rotary turns an even number of channels, head_dim {config.head_dim} x "
            f"partial_rotary_factor {config.partial_rotary_factor} is {turned:g}"
        )
    only_rotary = {
        "rope_theta": config.rope_theta is not None,
        "local_rope_theta": config.local_rope_theta is not None,
        "rope_scaling": config.rope_scaling is not None,
        "partial_rotary_factor": config.partial_rotary_factor != 1.0,
    }
    if config.position_kind != "rotary" and (given := [key for key, is_given in only_rotary.items() if is_given]):
        raise ValueError(f"{given[0]} does nothing with position_kind {config.position_kind}: leave it out")
    if not 0 < config.partial_rotary_factor <= 1:
        raise ValueError(f"partial_rotary_factor must lie in (0, 1], got {config.partial_rotary_factor!r}")
    if config.position_offset and config.position_kind not in ("learned", "sinusoidal"):
        raise ValueError(f"position_offset does nothing with position_kind {config.position_kind}: leave it out")
    if config.position_kind == "sinusoidal" and config.embedding_size % 2:
        raise ValueError(f"position_kind sinusoidal needs an even embedding_size, this one is {config.embedding_size}")
    if config.position_kind != "sinusoidal" and config.sinusoidal_layout is not None:
        raise ValueError(f"sinusoidal_layout does nothing with position_kind {config.position_kind}: leave it out")
    buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
    if config.position_kind == "relative" and (buckets % 4 or distance <= buckets // 2):
        raise ValueError(
            f"relative_attention_num_buckets must be a multiple of 4, got {buckets}, and "
            f"relative_attention_max_distance more than half of it, got {distance}"
        )
    if config.rope_scaling is not None:
        check_rope_scaling(config.rope_scaling)


def check_rope_scaling(scaling: dict[str, Any]) -> None:
    """The keys of a stretched rotary, and their values."""
    if not isinstance(scaling, dict) or scaling.get("rope_type") not in ROPE_SCALING:
        raise ValueError(f"rope_scaling needs a rope_type of {', '.join(ROPE_SCALING)}, got {scaling!r}")
    kind = scaling["rope_type"]
    needed = ROPE_SCALING[kind]
    known = needed | (_YARN_MORE if kind == "yarn" else set())
    given = set(scaling) - {"rope_type"}
    if needed - given or given - known:
        raise ValueError(f"rope_scaling {kind} takes {', '.join(sorted(known))}, got {', '.join(sorted(given))}")
    for name in given:
        value = scaling[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"rope_scaling: {name} must be a number above 0, got {value!r}")
    if scaling["factor"] < 1:
        raise ValueError(f"rope_scaling: factor {scaling['factor']} is below 1, which would shorten the context")


def check_windows(config: Any) -> None:
    """Local layers and their keys."""
    if config.attention_pattern is not None:
        unknown = [kind for kind in config.attention_pattern if kind not in ("global", "local")]
        if unknown or not config.attention_pattern:
            raise ValueError(f"attention_pattern is a list of global and local, got {config.attention_pattern!r}")
        if config.global_attention_every != 1:
            raise ValueError("attention_pattern and global_attention_every say the same thing: leave one out")
    key = "attention_pattern" if config.attention_pattern is not None else "global_attention_every"
    if "local" in config.pattern and config.local_window is None:
        raise ValueError(f"{key} {getattr(config, key)!r} needs local_window: the width that local layers look at")
    if "local" not in config.pattern and (config.local_window is not None or config.local_rope_theta is not None):
        raise ValueError(
            f"local_window and local_rope_theta do nothing with {key} {getattr(config, key)!r} (every layer is "
            "global): leave them out, or set global_attention_every to 2 or more"
        )


def check_initial_weights(config: Any) -> None:
    """A width that nothing is drawn with."""
    usual = ARCHITECTURES[config.architecture].conventions.get("initializer_range", INITIALIZER_RANGE)
    if config.initializer == "xavier_uniform" and config.initializer_range != usual:
        raise ValueError(
            f"initializer_range {config.initializer_range} does nothing with initializer xavier_uniform, which draws "
            "by the sizes of each matrix: leave it out, or choose another initializer, such as normal"
        )
