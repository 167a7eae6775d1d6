"""Mixers: what lets the positions of a row exchange information. The block takes its mixer by name (`MIXERS`).

A mixer is two modules. Its inputs are made once per forward and kind of layer, from what is known of the rows
(`Geometry`); its layer maps hidden states (B, L, hidden) to the same shape with such an input. Nothing else in the
model knows what is in an input, or which mixer it has. Here is softmax attention, and the attention of a decoder to an
encoder's output, which is no mixer of a row.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"
# (transformers' base class and the call of an nn.Module are untyped)

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache, EncoderDecoderCache

from .attention import BACKENDS, apply_rotary
from .configuration_loom import LoomConfig
from .masks import AttentionMask, build_masks, indices
from .norms import make_norm
from .positions import RotaryTables, alibi_slopes, relative_buckets, rotary_tables

# Projections of the same input are joined into one matrix product from this many rows on: below (decoding), copying
# the weights side by side costs more than it saves.
FUSED_ROWS = 256


@dataclass(frozen=True)
class Geometry:
    """What is known of the rows of a forward pass, whatever mixes them.

    position_ids (B or 1, L); `length` positions after `past_length` cached ones, `key_length` in all; attention_mask
    and document_ids as the model was given them.
    """

    position_ids: Tensor
    length: int
    past_length: int | Tensor
    key_length: int
    attention_mask: Tensor | None = None
    document_ids: Tensor | None = None
    dtype: torch.dtype = torch.float32  # of what is computed from positions: float64 in a float64 model


@dataclass(frozen=True)
class AttentionInput:
    """What one kind of attention layer gets beside its hidden states."""

    mask: AttentionMask
    rotary: RotaryTables | None = None

    @property
    def shared(self) -> Tensor | None:
        """What all layers read and a gradient may flow into."""
        return self.mask.position_bias

    def with_shared(self, shared: Tensor | None) -> "AttentionInput":
        """The same with that tensor in its place."""
        if shared is None or shared is self.mask.position_bias:
            return self  # its mask is made once for all layers
        return AttentionInput(self.mask.with_position_bias(shared), self.rotary)


class AttentionInputs(nn.Module):
    """Masks, rotary angles and position biases of a stack, one `AttentionInput` for each kind of its layers."""

    def __init__(self, config: LoomConfig, kinds: Sequence[str], *, causal: bool) -> None:
        super().__init__()
        self.config = config
        self.kinds = sorted(set(kinds))
        self.causal = causal
        if config.position_kind == "relative":
            self.relative_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_attention_heads)

    def forward(self, geometry: Geometry) -> dict[str, AttentionInput]:
        """One input for each kind of layer."""
        device = geometry.position_ids.device
        masks = build_masks(
            self.config,
            causal=self.causal,
            length=geometry.length,
            past_length=geometry.past_length,
            key_length=geometry.key_length,
            device=device,
            attention_mask=geometry.attention_mask,
            document_ids=geometry.document_ids,
            kinds=self.kinds,
        )
        bias = self._position_bias(geometry, device)
        if bias is not None:
            masks = {kind: mask.with_position_bias(bias) for kind, mask in masks.items()}
        return {kind: AttentionInput(mask, self._rotary(geometry, kind)) for kind, mask in masks.items()}

    def _rotary(self, geometry: Geometry, kind: str) -> RotaryTables | None:
        config = self.config
        if config.position_kind != "rotary":
            return None
        width = int(config.head_dim * config.partial_rotary_factor)
        theta, scaling = config.rope_theta, config.rope_scaling
        if kind == "local":
            theta, scaling = config.local_rope_theta, None
        assert theta is not None
        return rotary_tables(geometry.position_ids, width, theta, scaling, geometry.dtype)

    def _position_bias(self, geometry: Geometry, device: torch.device) -> Tensor | None:
        """(1, heads, Q, K) by distance in the row, which within a piece is distance in the piece."""
        if self.config.position_kind not in ("alibi", "relative"):
            return None
        queries, keys = indices(geometry.length, geometry.past_length, geometry.key_length, device)
        distances = keys - queries  # (Q, K)
        if self.config.position_kind == "alibi":
            slopes = torch.tensor(alibi_slopes(self.config.num_attention_heads), device=device, dtype=geometry.dtype)
            return -slopes[None, :, None, None] * distances.abs()
        buckets = relative_buckets(
            distances,
            both_sides=not self.causal,
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        return self.relative_bias(buckets).permute(2, 0, 1)[None]


def project_together(states: Tensor, projections: Sequence[nn.Linear]) -> list[Tensor]:
    """Apply several projections to one input, as a single matrix product where that is faster and safe.

    Safe means plain `nn.Linear` without hooks: adapters, quantised layers and engines that gather a module's weights
    when it is called must have each module called.
    """
    rows = states.numel() // states.shape[-1]
    plain = all(type(p) is nn.Linear and not p._forward_hooks and not p._forward_pre_hooks for p in projections)
    if not plain or rows < FUSED_ROWS or states.device.type != "cpu":
        return [projection(states) for projection in projections]
    weights: list[Tensor] = [projection.weight for projection in projections]
    biases: list[Tensor] = [projection.bias for projection in projections if projection.bias is not None]
    weight, bias = torch.cat(weights), torch.cat(biases) if biases else None
    sizes = [projection.out_features for projection in projections]
    return list(torch.split(functional.linear(states, weight, bias), sizes, dim=-1))


class _Projections(nn.Module):
    """Queries, keys, values and what becomes of the mixed values; the same in every attention."""

    def __init__(self, config: LoomConfig, layer_idx: int, *, causal: bool) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = causal
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)
        self.q_proj.loom_role, self.o_proj.loom_role = "query", "residual"  # type: ignore[assignment]
        if config.qk_norm != "none":
            whole = config.qk_norm == "full_width"
            self.q_norm = make_norm(config, queries if whole else config.head_dim)
            self.k_norm = make_norm(config, keys if whole else config.head_dim)

    def heads(self, states: Tensor, norm: str | None = None) -> Tensor:
        """(B, L, heads x head_dim) -> (B, L, heads, head_dim) of that dtype, normed where the config asks for it."""
        if norm is None or self.config.qk_norm == "none":
            return states.view(*states.shape[:2], -1, self.head_dim)
        if self.config.qk_norm == "per_head":
            states = states.view(*states.shape[:2], -1, self.head_dim)
        normed: Tensor = getattr(self, norm)(states).to(states.dtype)
        return normed.view(*states.shape[:2], -1, self.head_dim)

    def mix(
        self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of (B, heads, Q, head_dim) to (B, heads, K, head_dim) -> (B, Q, hidden), and the probabilities."""
        backend = BACKENDS["eager" if need_weights else str(self.config._attn_implementation)]
        dropout = self.config.attention_dropout if self.training else 0.0
        softcap = self.config.attention_softcap
        mixed, weights = backend(query, key, value, mask, scale=self.scaling, dropout=dropout, softcap=softcap)
        return self.o_proj(mixed.reshape(*mixed.shape[:2], -1)), weights


class LoomAttention(_Projections):
    """Self-attention with grouped key-value heads, optional rotary positions and a key-value cache."""

    def forward(
        self,
        hidden_states: Tensor,
        mixer_input: AttentionInput,
        past_key_values: Cache | None = None,
        need_weights: bool = False,
        layer_idx: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, hidden) -> (B, L, hidden) and the probabilities (B, heads, L, K), or None if not asked for."""
        joined = project_together(hidden_states, [self.q_proj, self.k_proj, self.v_proj])
        query, key, value = (
            self.heads(states, norm) for states, norm in zip(joined, ("q_norm", "k_norm", None), strict=True)
        )
        if mixer_input.rotary is not None:
            query, key = apply_rotary(query, mixer_input.rotary), apply_rotary(key, mixer_input.rotary)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx if layer_idx is None else layer_idx)
        return self.mix(query, key, value, mixer_input.mask, need_weights)


class LoomCrossAttention(_Projections):
    """Attention of a decoder to an encoder's output, whose keys and values are cached once."""

    def forward(
        self,
        hidden_states: Tensor,
        memory: Tensor,
        mask: AttentionMask,
        past_key_values: EncoderDecoderCache | None = None,
        need_weights: bool = False,
        layer_idx: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, hidden) and memory (B, S, hidden) -> (B, T, hidden) and the probabilities (B, heads, T, S) or None."""
        layer = self.layer_idx if layer_idx is None else layer_idx
        query = self.heads(self.q_proj(hidden_states), "q_norm").transpose(1, 2)
        if past_key_values is not None and past_key_values.is_updated.get(layer):
            cached: Any = past_key_values.cross_attention_cache.layers[layer]
            return self.mix(query, cached.keys, cached.values, mask, need_weights)
        joined = project_together(memory, [self.k_proj, self.v_proj])
        key, value = self.heads(joined[0], "k_norm").transpose(1, 2), self.heads(joined[1]).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.cross_attention_cache.update(key, value, layer)
            past_key_values.is_updated[layer] = True
        return self.mix(query, key, value, mask, need_weights)


@dataclass(frozen=True)
class Mixer:
    """One way to mix the positions of a row.

    `layer(config, layer_idx, causal=...)` maps (hidden states, input, cache, need_weights, layer_idx) to (hidden
    states, probabilities or None); `inputs(config, kinds, causal=...)` maps a `Geometry` to the input of each kind. An
    input tells the tensor that layers share and learn by `shared`, and takes another in its place by `with_shared`.
    """

    layer: type[nn.Module]
    inputs: type[nn.Module]


MIXERS: dict[str, Mixer] = {"attention": Mixer(LoomAttention, AttentionInputs)}


def make_mixer(config: LoomConfig, layer_idx: int, *, causal: bool) -> Any:
    """The mixer of one layer, by `config.mixer`."""
    return MIXERS[config.mixer].layer(config, layer_idx, causal=causal)


def make_mixer_inputs(config: LoomConfig, kinds: Sequence[str], *, causal: bool) -> Any:
    """What makes the inputs of a stack's mixers, by `config.mixer`."""
    return MIXERS[config.mixer].inputs(config, kinds, causal=causal)
