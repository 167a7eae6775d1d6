"""Rotary positions as stock configs write them: an entry with base, type and scaling; and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.models import LoomConfig

_SCALINGS: dict[str, set[str]] = {
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"},
}
"""Kinds of scaling that compute alike on both sides, and the keys that both know."""


def rope_entry(config: LoomConfig) -> dict[str, Any]:
    """The stock entry of a model's rotary positions (of its global layers, where it has local ones)."""
    scaling = config.rope_scaling or {"rope_type": "default"}
    return {**scaling, "rope_theta": config.rope_theta}


def rope_keys(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The Loom keys of a stock entry. A scaling that Loom does not have is left out, which shows as a difference."""
    keys: dict[str, Any] = {"rope_theta": float(entry["rope_theta"])}
    kind = str(entry.get("rope_type", "default"))
    scaling = {key: value for key, value in entry.items() if key not in ("rope_theta", "type") and value is not None}
    if kind in _SCALINGS and set(scaling) - {"rope_type"} <= _SCALINGS[kind]:
        keys["rope_scaling"] = scaling
    return keys
