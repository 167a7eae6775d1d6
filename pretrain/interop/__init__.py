"""Exact conversion between Loom models and the stock architectures of transformers that hold the same shape.

`to_stock` and `from_stock` map a config and a state dict, `stock_config` and `from_stock_config` a config alone;
`config_json` gives a config.json that transformers 5 and 4.57 read alike. Each architecture is one file; `mapping.py`
holds what they share. A shape is accepted when its config survives the way there and back, so nothing is lost in
silence.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig

from pretrain.models import LoomConfig, model_class

from .bert import BERT
from .gpt2 import GPT2
from .llama import LLAMA
from .mapping import (
    COMMON_KEYS,
    EXTRA_KEY,
    KEPT_ASIDE,
    Home,
    NoStockHome,
    Rule,
    Task,
    check_names,
    convert_from_stock,
    convert_to_stock,
    differing,
    own_fields,
    without_copies,
)
from .modernbert import LOCAL, MODERNBERT

__all__ = [
    "HOMES",
    "NoStockHome",
    "Rule",
    "config_json",
    "from_stock",
    "from_stock_config",
    "rules_from_stock",
    "rules_to_stock",
    "stock_config",
    "to_stock",
]

HOMES: dict[str, Home] = {home.name: home for home in (BERT, MODERNBERT, GPT2, LLAMA)}


def stock_config(config: LoomConfig, task: Task = "pretraining") -> PreTrainedConfig:
    """The stock config that holds this Loom config, its own architecture's before others of its kind.

    Values that only steer training and have no stock field are kept in an extra entry named "loom".
    Raises NoStockHome that names the keys in the way.
    """
    return _find_home(config, task)[1]


def to_stock(config: LoomConfig, state: Mapping[str, Tensor]) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """A Loom config and state dict -> the stock config and state dict, exact; copies that tying makes stand once.

    Takes the state of a base model, one with a language-model head, or a classifier.
    Raises NoStockHome that names the keys in the way, ValueError that names tensors missing or left over.
    """
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    state = without_copies(state, copies)
    stock, rules = rules_to_stock(config, state)
    return stock, convert_to_stock(rules, state)


def rules_to_stock(config: LoomConfig, names: Iterable[str]) -> tuple[PreTrainedConfig, list[Rule]]:
    """How `to_stock` makes each stock tensor, for Loom tensors of these names (a tied one once); no tensor is touched.

    Raises NoStockHome that names the keys in the way, ValueError that names tensors missing or left over.
    """
    known = set(names)
    task = _task(known, head="model.", classifier=("classifier.weight", "score.weight"))
    home, stock = _find_home(config, task)
    rules = home.rules(config, task, "" if task == "base" else home.prefix)
    check_names({name for rule in rules for name in rule.loom}, known, "Loom")
    return stock, rules


def from_stock(stock: PreTrainedConfig, state: Mapping[str, Tensor]) -> tuple[LoomConfig, dict[str, Tensor]]:
    """A stock config and the state dict of its class -> Loom config and state dict, exact; the inverse of `to_stock`.

    Raises ValueError that names an architecture or key that Loom has no switch for, or tensors missing or left over.
    """
    home = _home_of(stock)
    copies = home.duplicates if getattr(stock, "tie_word_embeddings", True) else {}
    state = without_copies(state, copies)
    config, rules = rules_from_stock(stock, state)
    return config, convert_from_stock(rules, state)


def rules_from_stock(stock: PreTrainedConfig, names: Iterable[str]) -> tuple[LoomConfig, list[Rule]]:
    """How `from_stock` makes each Loom tensor, for stock tensors of these names (a copy not); no tensor is touched.

    Raises ValueError that names an architecture or key that Loom has no switch for, or tensors missing or left over.
    """
    known, home = set(names), _home_of(stock)
    task = _task(known, head=home.prefix, classifier=(home.classifier,))
    config = from_stock_config(stock, task)
    rules = home.rules(config, task, "" if task == "base" else home.prefix)
    check_names({rule.stock for rule in rules}, known, "stock")
    return config, rules


def from_stock_config(stock: PreTrainedConfig, task: Task = "pretraining") -> LoomConfig:
    """The Loom config of a stock config; the inverse of `stock_config`.

    Raises ValueError that names an architecture or key that Loom has no switch for.
    """
    home = _home_of(stock)
    config = home.from_config(stock)
    for key, value in getattr(stock, EXTRA_KEY, {}).items():
        setattr(config, key, value)
    _copy_common(stock, config)
    config.architectures = [model_class(config, task).__name__]
    _refuse_differences(home, stock, home.to_config(config))
    return config


def config_json(stock: PreTrainedConfig) -> dict[str, Any]:
    """What config.json must hold so that transformers 5 and 4.57 build the same model.

    Version 4 does not know `rope_parameters`: it reads the rotary base from the top level (and without it takes its
    default in silence), and ModernBERT's two bases and layer pattern from keys of their own.
    """
    entries: dict[str, Any] = json.loads(stock.to_json_string(use_diff=True))
    rope: Any = getattr(stock, "rope_parameters", None)
    if stock.model_type == "modernbert":
        full, local = rope["full_attention"], rope.get(LOCAL) or rope["full_attention"]
        entries["global_rope_theta"] = full["rope_theta"]
        entries["local_rope_theta"] = local["rope_theta"]
        entries["global_attn_every_n_layers"] = MODERNBERT.from_config(stock).global_attention_every
    elif isinstance(rope, dict) and "rope_theta" in rope:
        entries["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            entries["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return entries


def _home_of(stock: PreTrainedConfig) -> Home:
    home = HOMES.get(stock.model_type)
    if home is None:
        raise ValueError(f"model_type {stock.model_type!r} is not one that Loom holds: {', '.join(HOMES)}")
    return home


def _task(names: Collection[str], head: str, classifier: tuple[str, ...]) -> Task:
    if any(name in names for name in classifier):
        return "classification"
    return "pretraining" if any(name.startswith(head) for name in names) else "base"


def _find_home(config: LoomConfig, task: Task) -> tuple[Home, PreTrainedConfig]:
    own = HOMES.get(config.architecture)
    others = [home for home in HOMES.values() if home.kind == config.kind and home is not own]
    homes = [own, *others] if own is not None else others
    reasons: list[str] = []
    keys: tuple[str, ...] = ()
    for home in homes:
        in_the_way = {"position_kind": (config.position_kind, home.position_kind)}
        if config.position_kind == home.position_kind:
            try:
                stock = home.to_config(config)
            except StrictDataclassError as error:
                reasons.append(f"{home.name} refuses it: {error}")
                continue
            in_the_way = _carry(home, config, stock)
            if not in_the_way:
                stock.architectures = [home.classes[task]]
                return home, stock
        keys = keys or tuple(in_the_way)
        wants = ", ".join(f"{key} {theirs!r} (here {ours!r})" for key, (ours, theirs) in in_the_way.items())
        reasons.append(f"{home.name} would need {wants}")
    why = "; ".join(reasons)
    raise NoStockHome(f"no stock architecture holds this model: {why}. Change these, or save it with its code", keys)


def _carry(home: Home, config: LoomConfig, stock: PreTrainedConfig) -> dict[str, tuple[Any, Any]]:
    """Copy onto the stock config what has no field there; return the keys that it cannot hold."""
    _copy_common(config, stock)
    lost = differing(own_fields(config), own_fields(home.from_config(stock)))
    aside = {key: ours for key, (ours, _) in lost.items() if key in KEPT_ASIDE}
    if aside:
        setattr(stock, EXTRA_KEY, aside)
    return {key: values for key, values in lost.items() if key not in KEPT_ASIDE}


def _copy_common(source: PreTrainedConfig, target: PreTrainedConfig) -> None:
    for key in COMMON_KEYS:
        setattr(target, key, getattr(source, key))


def _refuse_differences(home: Home, stock: PreTrainedConfig, back: PreTrainedConfig) -> None:
    """Refuse a stock config with a value that Loom has no switch for: it would not come back."""
    given, returned = (
        home.normal({key: value for key, value in own_fields(config).items() if key not in home.unread})
        for config in (stock, back)
    )
    lost = differing(given, returned)
    if lost:
        wants = ", ".join(f"{key} {theirs!r} (Loom can hold {ours!r})" for key, (theirs, ours) in lost.items())
        raise ValueError(f"this {home.name} model has values that Loom has no switch for: {wants}")
