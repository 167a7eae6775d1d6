"""Attention: turning by rotary angles, the backends by name, and the table of what each backend can hold.

A backend takes queries, keys and values of shape (B, heads, length, head_dim) and one `AttentionMask`, and returns the
mixed values (B, Q, heads, head_dim) with the probabilities or None. Masks are built in `masks.py`, angles in
`positions.py`, projections live in `mixers.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .configuration_loom import LoomConfig
from .cpu_kernels import cpu_attention, cpu_rotary, fits_cpu_attention
from .cuda_kernels import flex, varlen
from .masks import AttentionMask
from .positions import RotaryTables


def apply_rotary(states: Tensor, tables: RotaryTables) -> Tensor:
    """Turn (B, L, heads, head_dim) states by their positions; computed in float32, returned in the states' dtype.

    Tables of fewer channels turn the first ones of each head and leave the others.
    """
    cosine, sine = tables
    turning = 2 * cosine.shape[-1]
    if turning < states.shape[-1]:
        turned = apply_rotary(states[..., :turning].contiguous(), tables)
        return torch.cat((turned, states[..., turning:]), dim=-1)
    if states.device.type == "cpu" and not torch.compiler.is_compiling() and states.shape[1] >= 16:
        return cpu_rotary(states, cosine, sine)
    first, second = states.to(torch.promote_types(states.dtype, torch.float32)).chunk(2, dim=-1)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return turned.to(states.dtype)


def repeat_key_values(states: Tensor, groups: int) -> Tensor:
    """Give each query head its own copy: (B, key-value heads, L, D) -> (B, key-value heads * groups, L, D)."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    dropout: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The reference: softmax(q k^T scale + mask) v, with the probabilities (B, heads, Q, K).

    `softcap` c turns the scores s into c tanh(s / c) before the mask is added.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_key_values(key, groups), repeat_key_values(value, groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    additive = mask.additive(scores.dtype)
    if additive is not None:
        scores = scores + additive
    elif mask.causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = functional.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    weights = functional.dropout(weights, p=dropout, training=dropout > 0.0)
    return torch.matmul(weights, value).transpose(1, 2), weights


def sdpa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    dropout: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """PyTorch's fused kernels; on a CPU, for rows they serve badly, our own matrix products (`cpu_attention`).

    Scores with a `softcap` have no fused kernel: they take the reference.
    """
    if softcap is not None:
        return eager_attention(query, key, value, mask, scale=scale, dropout=dropout, softcap=softcap)[0], None
    groups = query.shape[1] // key.shape[1]
    if query.device.type == "cpu" and groups > 1:  # the CPU kernels have no grouped form
        key, value, groups = repeat_key_values(key, groups), repeat_key_values(value, groups), 1
    if fits_cpu_attention(query, key, mask, dropout):
        return cpu_attention(query, key, value, mask, scale).transpose(1, 2), None
    added = mask.bias is not None or mask.position_bias is not None
    allowed = mask.additive(query.dtype) if added else mask.allowed
    mixed = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=allowed,
        dropout_p=dropout,
        is_causal=mask.causal and allowed is None,
        scale=scale,
        enable_gqa=groups > 1,
    )
    return mixed.transpose(1, 2), None


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    dropout: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """PyTorch's block-sparse attention, compiled; skips what documents, windows and the diagonal close.

    Calls that it is not for take `sdpa_attention`: a filled cache, a caller's own 4D mask, a look at an encoder.
    """
    if not _in_whole_rows(mask):
        return sdpa_attention(query, key, value, mask, scale=scale, dropout=dropout, softcap=softcap)
    if dropout > 0.0:
        raise ValueError("attention backend flex has no attention_dropout: take sdpa")
    return flex(query, key, value, mask, scale, softcap).transpose(1, 2), None


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    dropout: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """PyTorch's flash attention over the borders of pieces: no work is spent between documents.

    Calls that it is not for take `sdpa_attention`: a filled cache, a caller's own 4D mask, a look at an encoder, and
    float32, which the kernel does not compute in.
    """
    if query.device.type != "cuda":
        raise ValueError(f"attention backend varlen needs a CUDA device, this is {query.device.type}: take sdpa")
    if not _in_whole_rows(mask) or query.dtype not in (torch.bfloat16, torch.float16):
        return sdpa_attention(query, key, value, mask, scale=scale, dropout=dropout, softcap=softcap)
    if dropout > 0.0 or softcap is not None or mask.position_bias is not None:
        raise ValueError("attention backend varlen has no dropout, softcap or position bias: take sdpa or flex")
    return varlen(query, key, value, mask, scale), None


def _in_whole_rows(mask: AttentionMask) -> bool:
    return mask.bias is None and mask.visibility is not None and mask.visibility.whole_rows


BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "eager": eager_attention,
    "sdpa": sdpa_attention,
    "flex": flex_attention,
    "varlen": varlen_attention,
}


@dataclass(frozen=True)
class Capability:
    """What a backend can hold. Every entry is backed by a test."""

    devices: tuple[str, ...] | None  # None = any
    weights: bool  # returns the attention probabilities
    dropout: bool
    packed: bool  # documents of one row isolated
    padded: bool
    additive: bool  # a caller's own 4D additive mask; where not, `sdpa` takes the call
    local_window: bool
    grouped_heads: bool
    position_bias: bool  # ALiBi, T5
    softcap: bool
    speed: int  # the highest that fits is taken; below sdpa's: when asked for by name
    head_dims: range | None = None  # None = any


CAPABILITIES: dict[str, Capability] = {
    "eager": Capability(None, True, True, True, True, True, True, True, True, True, speed=0),
    "sdpa": Capability(None, False, True, True, True, True, True, True, True, True, speed=3),
    "flex": Capability(
        ("cuda",), False, False, True, True, False, True, True, True, True, speed=1, head_dims=range(16, 257)
    ),
    "varlen": Capability(
        ("cuda",), False, False, True, True, False, True, True, False, False, speed=2, head_dims=range(8, 257, 8)
    ),
}


def missing_abilities(name: str, config: LoomConfig, *, need_weights: bool = False) -> list[str]:
    """What a config needs that this backend does not have, on any device, as keys with their values."""
    can = CAPABILITIES[name]
    position_bias = config.position_kind in ("alibi", "relative")
    needs = {
        "attention weights asked for": can.weights or not need_weights,
        f"attention_dropout {config.attention_dropout}": can.dropout or config.attention_dropout == 0,
        f"local_window {config.local_window}": can.local_window or config.local_window is None,
        f"num_key_value_heads {config.num_key_value_heads}": can.grouped_heads
        or config.num_key_value_heads == config.num_attention_heads,
        f"position_kind {config.position_kind}": can.position_bias or not position_bias,
        f"attention_softcap {config.attention_softcap}": can.softcap or config.attention_softcap is None,
        f"head_dim {config.head_dim}": can.head_dims is None or config.head_dim in can.head_dims,
    }
    return [need for need, held in needs.items() if not held]


def refuse_backend(name: str, config: LoomConfig) -> None:
    """Raise ValueError for a name that is no backend, or one that cannot hold the config on any device."""
    if name not in CAPABILITIES:
        known = ", ".join(CAPABILITIES)
        # Begins as transformers' own refusal does, for who catches that.
        asked = f'Specified `attn_implementation="{name}"` is not supported'
        raise ValueError(f"{asked} by Loom models: take one of {known}")
    if missing := missing_abilities(name, config):
        holding = [other for other in CAPABILITIES if not missing_abilities(other, config)]
        raise ValueError(
            f"attention backend {name} cannot hold {', '.join(missing)}: take one of {', '.join(holding)}, or auto"
        )


def refuse_device(name: str, device: torch.device | str) -> None:
    """Raise ValueError for a backend that cannot run on this device."""
    kind, devices = torch.device(device).type, CAPABILITIES[name].devices
    if devices is not None and kind not in devices:
        raise ValueError(f"attention backend {name} runs on {', '.join(devices)}, this is {kind}: take sdpa, or auto")


def pick_backend(config: LoomConfig, device: torch.device | str, *, need_weights: bool = False) -> tuple[str, str]:
    """The fastest backend that holds this config on this device, with the reason in words for the log.

    `need_weights` asks for the attention probabilities, which only some backends return.
    """
    kind = torch.device(device).type
    reasons: list[str] = []
    for name, can in sorted(CAPABILITIES.items(), key=lambda item: -item[1].speed):
        lacks = missing_abilities(name, config, need_weights=need_weights)
        if can.devices is not None and kind not in can.devices:
            lacks.append(f"device {kind}")
        if not lacks:
            chosen = f"fastest backend that holds this model on {kind}"
            return name, "; ".join([*reasons, chosen])
        reasons.append(f"{name} cannot hold: {', '.join(lacks)}")
    raise ValueError("no attention backend holds this model: " + "; ".join(reasons))
