"""Which stock architectures hold a variant of the model: asked of the conversion, never written down.

Lives here: the question, and its answer in the words of docs/family.md. What must not: errors of a variant
(`variants.py`), or the page.
"""

from __future__ import annotations

from collections.abc import Iterator

from variants import DESIGNS, SIZES, Variant

from pretrain.interop import HOMES, NoStockHome, stock_config
from pretrain.models import LoomConfig, loom_config, model_class

WITH_CODE = "exported with code"


def native_homes(variant: Variant) -> str:
    """The stock architectures that hold the variant's switches on some design, or the keys in the way on the nearest.

    Nothing is asked of a design that cannot have these switches.
    """
    found: set[str] = set()
    in_the_way: list[tuple[str, ...]] = []
    for config in _on_each_design(variant):
        try:
            found.add(stock_config(config).model_type)
        except NoStockHome as refusal:
            in_the_way.append(refusal.keys)
    return _homes(found) if found else _none(min(in_the_way, key=lambda keys: _distance(keys, variant)))


def class_name(kind: str, task: str) -> str:
    """Our class for a task."""
    design = next(design for design in DESIGNS if design.kinds == (kind,))
    return model_class(design.config(kind), task).__name__


def homes_of_task(kind: str, task: str) -> str:
    """The stock architectures of this kind of model that have a class for a task of ours."""
    found = {home.name for home in HOMES.values() if home.kind == kind and task in home.classes}
    return _homes(found) if found else _none(("task",))


def _homes(found: set[str]) -> str:
    return ", ".join(name for name in HOMES if name in found)


def _none(keys: tuple[str, ...]) -> str:
    return f"none: {', '.join(f'`{key}`' for key in keys)}; {WITH_CODE}"


def _distance(keys: tuple[str, ...], variant: Variant) -> tuple[bool, bool, int]:
    """What is asked last of all: the position scheme hides what else is in the way, and other keys are the design's."""
    return "position_kind" in keys, not set(keys) <= set(variant.keys), len(keys)


def _on_each_design(variant: Variant) -> Iterator[LoomConfig]:
    keys = dict(variant.keys)
    if keys.get("position_kind") == "learned" and "position_offset" in keys:
        keys["pad_token_id"] = keys["position_offset"] - 1  # RoBERTa counts from behind its padding
    for design in DESIGNS:
        assert design.architecture is not None
        if set(design.kinds) <= set(variant.kinds) and variant.architecture in (None, design.architecture):
            try:
                yield loom_config(design.architecture, **(SIZES | design.keys | keys))
            except ValueError:  # a switch of the design does not go with these
                continue
