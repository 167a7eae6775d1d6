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

from pretrain.models import LoomConfig, LoomEncoderConfig, model_class

from .albert import ALBERT
from .bert import BERT
from .electra import ELECTRA
from .eurobert import EUROBERT
from .gpt2 import GPT2
from .llama import LLAMA
from .mapping import (
    CLASSIFIER_KEYS,
    COMMON_KEYS,
    EXTRA_KEY,
    KEPT_ASIDE,
    Home,
    NoStockHome,
    NotHeld,
    Rule,
    Task,
    Words,
    check_names,
    convert_from_stock,
    convert_to_stock,
    differing,
    own_fields,
    without_copies,
)
from .marian import MARIAN
from .modernbert import MODERNBERT
from .modernbert_decoder import MODERNBERT_DECODER
from .modernbert_like import LOCAL, pattern
from .qwen3 import QWEN3
from .roberta import ROBERTA
from .t5 import T5

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

HOMES: dict[str, Home] = {
    home.name: home
    for home in (
        *(BERT, ROBERTA, ELECTRA, ALBERT, MODERNBERT, EUROBERT),
        *(GPT2, LLAMA, QWEN3, MODERNBERT_DECODER),
        *(MARIAN, T5),
    )
}

# Names that tell the task of a Loom state dict; of several tasks with the same names, a caller says which.
_MARKS: tuple[tuple[str, Task], ...] = (
    ("rtd_head.dense.weight", "replaced_token_detection"),
    ("seq_relationship.weight", "sentence_pretraining"),
    ("qa_outputs.weight", "question_answering"),
    ("score.weight", "classification"),
)
# Tensors that train a detector of replaced tokens and are no part of it: they go beside it under their own names, which
# the stock class leaves out, so that a checkpoint is whole.
_BESIDE = ("generator.", "embedding_delta.")
_WITHOUT_CLASSIFIER = ("pretraining", "base", "sentence_pretraining", "replaced_token_detection")
_TWO_OUTPUTS = ("question_answering", "sentence_pretraining")  # whose stock heads are as wide as there are labels
_PATTERN_KEYS = ("attention_pattern", "global_attention_every")


def stock_config(config: LoomConfig, task: Task = "pretraining") -> PreTrainedConfig:
    """The stock config that holds this Loom config, its own architecture's before others of its kind.

    Values that only steer training and have no stock field are kept in an extra entry named "loom".
    Raises NoStockHome that names the keys in the way.
    """
    return _find_home(config, task)[1]


def to_stock(
    config: LoomConfig, state: Mapping[str, Tensor], task: Task | None = None
) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """A Loom config and state dict -> the stock config and state dict, exact; copies that tying makes stand once.

    Takes the state of a model with any head that the stock architecture has a class for. `task` says which where the
    names of the tensors do not: a classifier of rows, unless it is given.
    Raises NoStockHome that names the keys in the way, ValueError that names tensors missing or left over.
    """
    table = "model.encoder.embed_tokens.weight" if config.kind == "seq2seq" else "model.embed_tokens.weight"
    copies = {"lm_head.weight": table} if config.tie_word_embeddings else {}
    state = without_copies(state, copies)
    stock, rules = rules_to_stock(config, state, task)
    return stock, convert_to_stock(rules, state)


def rules_to_stock(
    config: LoomConfig, names: Iterable[str], task: Task | None = None
) -> tuple[PreTrainedConfig, list[Rule]]:
    """How `to_stock` makes each stock tensor, for Loom tensors of these names (a tied one once); no tensor is touched.

    Raises NoStockHome that names the keys in the way, ValueError that names tensors missing or left over.
    """
    known = set(names)
    task = _loom_task(known) if task is None else task
    home, stock = _find_home(config, task)
    rules = _whole_rules(home, config, task, known)
    check_names({name for rule in rules for name in rule.loom}, known, "Loom")
    return stock, rules


def from_stock(stock: PreTrainedConfig, state: Mapping[str, Tensor]) -> tuple[LoomConfig, dict[str, Tensor]]:
    """A stock config and the state dict of its class -> Loom config and state dict, exact; the inverse of `to_stock`.

    Raises ValueError that names an architecture or key that Loom has no switch for, or tensors missing or left over.
    """
    home = _home_of(stock)
    state = home.own_tensors(stock, state)
    config, rules = rules_from_stock(stock, state)
    return config, convert_from_stock(rules, state)


def rules_from_stock(stock: PreTrainedConfig, names: Iterable[str]) -> tuple[LoomConfig, list[Rule]]:
    """How `from_stock` makes each Loom tensor, for stock tensors of these names (a copy not); no tensor is touched.

    Where two classes have the same names, `stock.architectures` says which it is.
    Raises ValueError that names an architecture or key that Loom has no switch for, or tensors missing or left over.
    """
    known, home = set(names), _home_of(stock)
    own = {name for name in known if not name.startswith(_BESIDE)}
    task = home.task_of(home.from_config(stock), own, (stock.architectures or [""])[0])
    config = from_stock_config(stock, task)
    if isinstance(config, LoomEncoderConfig) and task == "replaced_token_detection" and own == known:
        config.generator_size, config.generator = None, None
    rules = _whole_rules(home, config, task, known)
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
    _refuse_differences(home, task, stock, home.to_config(config))
    return config


def config_json(stock: PreTrainedConfig) -> dict[str, Any]:
    """What config.json must hold so that transformers 5 and 4.57 build the same model.

    Version 4 does not know `rope_parameters`: it reads the rotary base from the top level (and without it takes its
    default in silence), and ModernBERT's two bases and layer pattern from keys of their own.
    """
    entries: dict[str, Any] = json.loads(stock.to_json_string(use_diff=True))
    rope: Any = getattr(stock, "rope_parameters", None)
    if stock.model_type in ("modernbert", "modernbert-decoder"):
        full = rope["full_attention"]["rope_theta"]
        local = (rope.get(LOCAL) or rope["full_attention"])["rope_theta"] if LOCAL in stock.layer_types else full
        entries["global_rope_theta"], entries["local_rope_theta"] = full, local
        # Version 4 knows no other pattern: 0 makes it stop rather than build another model.
        found = pattern(stock)
        entries["global_attn_every_n_layers"] = 0 if "attention_pattern" in found else found["global_attention_every"]
        if stock.model_type == "modernbert-decoder" and full != local:
            entries["global_rope_theta"] = None  # its version 4 turns all layers by this one base: it must stop
    elif stock.model_type == "t5":
        # Version 4 reads from this key whether the head is tied and its input scaled; version 5 holds it at true.
        entries["tie_word_embeddings"] = bool(getattr(stock, "scale_decoder_outputs", True))
    elif stock.model_type == "gpt2":
        entries["n_ctx"] = stock.n_positions  # transformers reads it no more; llama.cpp's converter reads nothing else
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


def _whole_rules(home: Home, config: LoomConfig, task: Task, names: Collection[str]) -> list[Rule]:
    """The rules of a class, and of what trains it and is among these names, of either side."""
    rules = home.rules_of(config, task)
    if "embedding_delta.weight" in names:  # its table is the generator's and its own part, added up
        parts = ("generator.model.embed_tokens.weight", "embedding_delta.weight")
        whole = ("model.embed_tokens.weight",)
        rules = [Rule(rule.stock, parts, summed=True) if rule.loom == whole else rule for rule in rules]
    return rules + [Rule(name, (name,)) for name in sorted(names) if name.startswith(_BESIDE)]


def _loom_task(names: Collection[str]) -> Task:
    for mark, task in _MARKS:
        if mark in names:
            return task
    if "classifier.weight" in names:
        transformed = "pooler.dense.weight" in names or "head.dense.weight" in names
        return "classification" if transformed else "token_classification"
    return "pretraining" if any(name.startswith("model.") for name in names) else "base"


def _find_home(config: LoomConfig, task: Task) -> tuple[Home, PreTrainedConfig]:
    own = HOMES.get(config.architecture)
    others = [home for home in HOMES.values() if home.kind == config.kind and home is not own]
    refusals: dict[str, dict[str, tuple[Any, Any]]] = {}
    for home in [own, *others] if own is not None else others:
        stock, in_the_way = _fit(home, config, task)
        if stock is not None:
            stock.architectures = [home.classes[task]]
            return home, stock
        refusals[home.name] = in_the_way
    # Tell what its own architecture would need, and the nearest of the others.
    ranked = sorted(refusals, key=lambda name: (own is None or name != own.name, len(refusals[name])))
    why = "; ".join(f"{name} would need {_needs(refusals[name])}" for name in ranked[:2])
    message = f"no stock architecture holds this model: {why or config.kind}. Change these, or save it with its code"
    raise NoStockHome(message, tuple(refusals[ranked[0]]) if ranked else ("architecture",))


def _needs(in_the_way: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} {theirs!r} (here {ours!r})" for key, (ours, theirs) in in_the_way.items())


def _fit(home: Home, config: LoomConfig, task: Task) -> tuple[PreTrainedConfig | None, dict[str, tuple[Any, Any]]]:
    """The stock config of this home, or None and the keys in the way, with our value and what it would have to be."""
    if config.position_kind != home.position_kind:
        return None, {"position_kind": (config.position_kind, home.position_kind)}
    if task not in home.classes:
        return None, {"task": (task, Words(f"one of {', '.join(home.classes)}"))}
    try:
        stock = home.to_config(config)
        in_the_way = _carry(home, config, stock, task)
    except NotHeld as error:
        return None, {error.key: (error.value, error.wanted)}
    except (StrictDataclassError, ValueError) as error:  # checks of the two config classes, which name a field
        text = str(error).lower()
        names = [name for name in own_fields(config) if name != "architecture"]
        key = next((name for name in names if name in text or name.replace("_", " ") in text), "architecture")
        return None, {key: (getattr(config, key), Words(f"another value: {error}"))}
    return (None, in_the_way) if in_the_way else (stock, {})


def _carry(home: Home, config: LoomConfig, stock: PreTrainedConfig, task: Task) -> dict[str, tuple[Any, Any]]:
    """Copy onto the stock config what has no field there; return the keys that it cannot hold."""
    _copy_common(config, stock)
    if task in _TWO_OUTPUTS and stock.num_labels != 2:
        stock.num_labels = 2
    back = home.from_config(stock)
    lost = differing(own_fields(config), own_fields(back))
    kept: set[str] = {*KEPT_ASIDE, *(CLASSIFIER_KEYS if task in _WITHOUT_CLASSIFIER else ())}
    if config.attention_kinds == back.attention_kinds:  # the same pattern, written in another way
        kept |= {*_PATTERN_KEYS}
    aside = {key: ours for key, (ours, _) in lost.items() if key in kept}
    if aside:
        setattr(stock, EXTRA_KEY, aside)
    return {key: values for key, values in lost.items() if key not in kept}


def _copy_common(source: PreTrainedConfig, target: PreTrainedConfig) -> None:
    for key in COMMON_KEYS:
        setattr(target, key, getattr(source, key))


def _refuse_differences(home: Home, task: Task, stock: PreTrainedConfig, back: PreTrainedConfig) -> None:
    """Refuse a stock config with a value that Loom has no switch for: it would not come back."""
    lost = differing(home.compared(stock, task), home.compared(back, task))
    if lost:
        wants = ", ".join(f"{key} {theirs!r} (Loom can hold {ours!r})" for key, (theirs, ours) in lost.items())
        raise ValueError(f"this {home.name} model has values that Loom has no switch for: {wants}")
