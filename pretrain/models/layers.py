"""The one Transformer block and what stands at its ends: mixer, MLP, the block itself, and the token head.

Every variant is a switch of the config, never a subclass. Names follow Llama where Llama has the part (self_attn,
q_proj, gate_proj, ...). Models assemble these parts in `modeling_loom.py`.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"
# (transformers' base class and the call of an nn.Module are untyped)

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_loom import LoomConfig
from .dropout import CROSS_SITES, DECODER_SITES, branch_sites, dropout
from .losses import linear_cross_entropy, softcap_logits, token_cross_entropy_sum
from .masks import AttentionMask
from .mixers import LoomCrossAttention, make_mixer, project_together
from .norms import activate, make_norm


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
        self.down_proj.loom_role = "residual"  # type: ignore[assignment]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, hidden) -> (B, L, hidden)."""
        if not self.gated:
            return self.down_proj(activate(self.config.hidden_act, self.up_proj(hidden_states)))
        gate, up = project_together(hidden_states, [self.gate_proj, self.up_proj])
        return self.down_proj(activate(self.config.hidden_act, gate) * up)


class LoomLayer(GradientCheckpointingLayer):
    """One block: mixer, attention to an encoder where there is one, and MLP, each a branch with a residual.

    Pre-norm: x + branch(norm(x)). Post-norm: norm(x + branch(x)). Parallel: x + mixer(norm(x)) + mlp(norm'(x)).
    """

    def __init__(
        self, config: LoomConfig, layer_idx: int, *, causal: bool | None = None, cross_attention: bool = False
    ) -> None:
        super().__init__()
        causal = config.kind == "decoder" if causal is None else causal
        self.layer_idx = layer_idx
        self.pre_norm = config.norm_placement == "pre"
        self.parallel = config.block_kind != "sequential"
        self.hidden_dropout = config.hidden_dropout
        self.residual_scale = config.residual_scale
        self.first_site = DECODER_SITES if cross_attention else 0
        self.self_attn = make_mixer(config, layer_idx, causal=causal)
        self.mlp = LoomMLP(config)
        has_attention_norm = config.first_norm or layer_idx > 0
        self.attention_norm = make_norm(config) if has_attention_norm else nn.Identity()
        if cross_attention:
            self.cross_attn = LoomCrossAttention(config, layer_idx, causal=False)
            self.cross_attention_norm = make_norm(config)
        if config.block_kind != "parallel_shared_norm":
            self.mlp_norm = make_norm(config)

    def forward(
        self,
        hidden_states: Tensor,
        memory: Tensor | None = None,
        shared: Tensor | None = None,
        *,
        mixer_input: Any,
        past_key_values: Cache | None = None,
        need_weights: bool = False,
        dropout_keys: Tensor | None = None,
        layer_idx: int | None = None,
        memory_mask: AttentionMask | None = None,
    ) -> Tensor:
        """(B, L, hidden) -> (B, L, hidden); dropout_keys: (B,) int64, see `dropout`.

        layer_idx: the place in the stack, where one block has several. memory (B, S, hidden): an encoder's output.
        shared: that of `mixer_input`. What other modules learn from comes by place: layers that are computed anew
        inside a backward pass of their own (`use_reentrant`) hand a gradient back to such inputs alone.
        """
        mixer_input = mixer_input.with_shared(shared)
        place = self.layer_idx if layer_idx is None else layer_idx
        attention_site, mlp_site = (self.first_site + site for site in branch_sites(place))
        normed = self.attention_norm(hidden_states) if self.pre_norm else hidden_states
        own_cache = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            own_cache = past_key_values.self_attention_cache
        branch, _ = self.self_attn(normed, mixer_input, own_cache, need_weights, place)
        if self.parallel:
            mlp = self.mlp(self.mlp_norm(hidden_states) if hasattr(self, "mlp_norm") else normed)
            hidden_states = self._add(hidden_states, branch, dropout_keys, attention_site)
            return self._add(hidden_states, mlp, dropout_keys, mlp_site)
        hidden_states = self._add(hidden_states, branch, dropout_keys, attention_site)
        if not self.pre_norm:
            hidden_states = self.attention_norm(hidden_states)
        if memory is not None:
            assert memory_mask is not None
            normed = self.cross_attention_norm(hidden_states) if self.pre_norm else hidden_states
            branch, _ = self.cross_attn(normed, memory, memory_mask, past_key_values, need_weights, place)
            hidden_states = self._add(hidden_states, branch, dropout_keys, CROSS_SITES + place)
            if not self.pre_norm:
                hidden_states = self.cross_attention_norm(hidden_states)
        branch = self.mlp(self.mlp_norm(hidden_states) if self.pre_norm else hidden_states)
        hidden_states = self._add(hidden_states, branch, dropout_keys, mlp_site)
        return hidden_states if self.pre_norm else self.mlp_norm(hidden_states)

    def _add(self, residual: Tensor, branch: Tensor, keys: Tensor | None, site: int) -> Tensor:
        if self.residual_scale != 1.0:
            branch = branch * self.residual_scale
        if self.training and self.hidden_dropout > 0.0:
            branch = dropout(branch, self.hidden_dropout, keys, site)
        return residual + branch


class LoomPredictionHead(nn.Module):
    """The transform before a token head or classifier: norm(act(dense(x))), to `width` channels (None: hidden_size)."""

    def __init__(self, config: LoomConfig, width: int | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size if width is None else width
        self.dense = nn.Linear(config.hidden_size, width, bias=config.head_dense_bias)
        self.dense.loom_role = "head"  # type: ignore[assignment]
        self.norm = make_norm(config, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden) -> (..., width)."""
        return self.norm(activate(self.config.hidden_act, self.dense(hidden_states)))


class LoomTokenHead(nn.Linear):
    """Hidden states to vocabulary logits; with targets, straight to the summed loss without keeping logits.

    The loss runs inside this module's call, so engines that gather weights when a module is called see the call.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.loom_role = "head"

    def forward(
        self,
        hidden_states: Tensor,
        targets: Tensor | None = None,
        softcap: float | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """(..., hidden) -> (..., vocabulary); with targets of shape (...), the summed loss as a float32 scalar."""
        if targets is None:
            return super().forward(hidden_states)
        return linear_cross_entropy(
            hidden_states, self.weight, targets, bias=self.bias, softcap=softcap, label_smoothing=label_smoothing
        )


def token_loss_sum(
    head: nn.Module,
    hidden_states: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Summed cross-entropy of the head at the targets, whatever stands in its place.

    A resize puts a plain `nn.Linear` there. What adapters put around it has more than one weight: its logits are made.
    """
    if isinstance(head, LoomTokenHead):
        return head(hidden_states, targets, softcap, label_smoothing)
    if not isinstance(head, nn.Linear):
        logits = softcap_logits(head(hidden_states), softcap)
        return token_cross_entropy_sum(logits, targets, label_smoothing=label_smoothing)
    return linear_cross_entropy(
        hidden_states, head.weight, targets, bias=head.bias, softcap=softcap, label_smoothing=label_smoothing
    )
