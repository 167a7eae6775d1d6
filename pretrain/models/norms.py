"""Norms and activations: the small functions between matrix products."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_loom import LoomConfig


class LoomRMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        # Autocast leaves states and weight in two dtypes, for which there is no fused kernel.
        return functional.rms_norm(hidden_states.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


def make_norm(config: LoomConfig, width: int | None = None) -> nn.Module:
    """The norm that the config asks for, over `width` channels (None: hidden_size)."""
    width = config.hidden_size if width is None else width
    if config.norm_kind == "rms_norm":
        return LoomRMSNorm(width, config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.norm_bias)


def activate(name: str, states: Tensor) -> Tensor:
    """The activation by its Hugging Face name, as one kernel; relu2 is relu(x)^2 (So et al. 2021, arXiv 2109.08668)."""
    if name == "gelu":
        return functional.gelu(states)
    if name in ("gelu_new", "gelu_pytorch_tanh"):
        return functional.gelu(states, approximate="tanh")
    if name == "silu":
        return functional.silu(states)
    if name == "relu2":
        return functional.relu(states).square()
    return functional.relu(states)
