"""The parts of the one Transformer block: norms, self-attention, MLP, the block itself, and the token head.

Every variant is a switch of the config, never a subclass. Names follow Llama where Llama has the part (self_attn,
q_proj, gate_proj, ...). Models assemble these parts in `modeling_loom.py`.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"
# (transformers' base class and the call of an nn.Module are untyped)

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import BACKENDS, RotaryTables, apply_rotary
from .configuration_loom import LoomConfig
from .dropout import branch_sites, dropout
from .losses import linear_cross_entropy
from .masks import AttentionMask

# Projections of the same input are joined into one matrix product from this many rows on: below (decoding), copying
# the weights side by side costs more than it saves.
FUSED_ROWS = 256


class LoomRMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


def make_norm(config: LoomConfig) -> nn.Module:
    """The norm that the config asks for, over hidden_size."""
    if config.norm_kind == "rms_norm":
        return LoomRMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


def activate(name: str, states: Tensor) -> Tensor:
    """The activation by its Hugging Face name, as one kernel."""
    if name == "gelu":
        return functional.gelu(states)
    if name in ("gelu_new", "gelu_pytorch_tanh"):
        return functional.gelu(states, approximate="tanh")
    if name == "silu":
        return functional.silu(states)
    return functional.relu(states)


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


class LoomAttention(nn.Module):
    """Self-attention with grouped key-value heads, optional rotary positions and a key-value cache."""

    def __init__(self, config: LoomConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = config.kind == "decoder"
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: Tensor,
        mask: AttentionMask,
        rotary: RotaryTables | None = None,
        past_key_values: Cache | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, hidden) -> (B, L, hidden) and the probabilities (B, heads, L, K), or None if not asked for."""
        batch, length, _ = hidden_states.shape
        joined = project_together(hidden_states, [self.q_proj, self.k_proj, self.v_proj])
        query, key, value = (states.view(batch, length, -1, self.head_dim) for states in joined)
        if rotary is not None:
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        backend = BACKENDS["eager" if need_weights else str(self.config._attn_implementation)]
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, weights = backend(query, key, value, mask, scale=self.scaling, dropout=dropout)
        return self.o_proj(mixed.reshape(batch, length, -1)), weights


class LoomMLP(nn.Module):
    """Plain: down(act(up(x))). Gated (Shazeer 2020, arXiv 2002.05202): down(act(gate(x)) * up(x))."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__()
        self.config = config
        self.gated = config.mlp_kind == "gated"
        if self.gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, hidden) -> (B, L, hidden)."""
        if not self.gated:
            return self.down_proj(activate(self.config.hidden_act, self.up_proj(hidden_states)))
        gate, up = project_together(hidden_states, [self.gate_proj, self.up_proj])
        return self.down_proj(activate(self.config.hidden_act, gate) * up)


class LoomLayer(GradientCheckpointingLayer):
    """One block: attention and MLP, each with a residual; the norm before the branch (pre) or after the sum (post)."""

    def __init__(self, config: LoomConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_kind = config.attention_kinds[layer_idx]
        self.pre_norm = config.norm_placement == "pre"
        self.hidden_dropout = config.hidden_dropout
        self.dropout_sites = branch_sites(layer_idx)
        self.self_attn = LoomAttention(config, layer_idx)
        self.mlp = LoomMLP(config)
        has_attention_norm = config.first_norm or layer_idx > 0
        self.attention_norm = make_norm(config) if has_attention_norm else nn.Identity()
        self.mlp_norm = make_norm(config)

    def forward(
        self,
        hidden_states: Tensor,
        mask: AttentionMask,
        rotary: RotaryTables | None = None,
        past_key_values: Cache | None = None,
        need_weights: bool = False,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """(B, L, hidden) -> (B, L, hidden); dropout_keys: (B,) int64, see `dropout`."""
        attention_site, mlp_site = self.dropout_sites
        branch = self.attention_norm(hidden_states) if self.pre_norm else hidden_states
        branch, _ = self.self_attn(branch, mask, rotary, past_key_values, need_weights)
        hidden_states = hidden_states + self._dropout(branch, dropout_keys, attention_site)
        if not self.pre_norm:
            hidden_states = self.attention_norm(hidden_states)
        branch = self.mlp(self.mlp_norm(hidden_states) if self.pre_norm else hidden_states)
        hidden_states = hidden_states + self._dropout(branch, dropout_keys, mlp_site)
        return hidden_states if self.pre_norm else self.mlp_norm(hidden_states)

    def _dropout(self, states: Tensor, keys: Tensor | None, site: int) -> Tensor:
        if not self.training or self.hidden_dropout == 0.0:
            return states
        return dropout(states, self.hidden_dropout, keys, site)


class LoomPredictionHead(nn.Module):
    """The transform before an encoder's token head or classifier: norm(act(dense(x)))."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.head_dense_bias)
        self.norm = make_norm(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)."""
        return self.norm(activate(self.config.hidden_act, self.dense(hidden_states)))


class LoomTokenHead(nn.Linear):
    """Hidden states to vocabulary logits; with targets, straight to the summed loss without keeping logits.

    The loss runs inside this module's call, so engines that gather weights when a module is called see the call.
    """

    def forward(self, hidden_states: Tensor, targets: Tensor | None = None) -> Tensor:
        """(..., hidden) -> (..., vocabulary); with targets of shape (...), the summed loss as a float32 scalar."""
        if targets is None:
            return super().forward(hidden_states)
        return linear_cross_entropy(hidden_states, self.weight, targets, bias=self.bias)


def token_loss_sum(head: nn.Module, hidden_states: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of the head at the targets, also for a plain `nn.Linear` that a resize put in its place."""
    if isinstance(head, LoomTokenHead):
        return head(hidden_states, targets)
    assert isinstance(head, nn.Linear)
    return linear_cross_entropy(hidden_states, head.weight, targets, bias=head.bias)
