"""How a stock architecture holds a Loom model: rules for tensors, a `Home` for each architecture, and their proofs.

Rules only rename, concatenate (or split) and transpose, so a conversion is exact both ways. Nothing here knows a
particular architecture: those are one file each beside this one.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pretrain.models import LoomConfig

Task = str  # "pretraining", "classification" or "base"

# Config fields that say how a model is trained or used, not what it computes. Where the stock config has no place for
# one, its value is kept under this extra key, which transformers carries along without reading it.
EXTRA_KEY = "loom"
KEPT_ASIDE = (
    "architecture",
    "initializer",
    "initializer_range",
    "hidden_dropout",
    "attention_dropout",
    "embedding_dropout",
    "classifier_dropout",
    "label_smoothing",
    "use_cache",
)
COMMON_KEYS = ("id2label", "label2id", "problem_type", "dtype")
_INHERITED = {field.name for field in fields(PreTrainedConfig)}


class NoStockHome(ValueError):  # noqa: N818 (it is a fact about the model, and the name of the contract)
    """No stock architecture holds this model; `keys` are the config keys in the way."""

    def __init__(self, message: str, keys: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys


@dataclass(frozen=True)
class Rule:
    """One stock tensor: the Loom tensors joined along their first axis, then transposed if `transposed`.

    `rows` are the first-axis sizes of the Loom tensors, needed to split where there is more than one.
    """

    stock: str
    loom: tuple[str, ...]
    rows: tuple[int, ...] = ()
    transposed: bool = False

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Loom tensors -> the stock tensor, contiguous."""
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return joined.t().contiguous() if self.transposed else joined

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The stock tensor -> Loom tensors, contiguous."""
        plain = tensor.t().contiguous() if self.transposed else tensor
        if len(self.loom) == 1:
            return [plain]
        if plain.shape[0] != sum(self.rows):
            raise ValueError(f"tensor {self.stock} has {plain.shape[0]} rows, the config asks for {sum(self.rows)}")
        return [part.contiguous() for part in plain.split(list(self.rows))]


@dataclass(frozen=True)
class Home:
    """One stock architecture."""

    name: str
    kind: str  # "encoder" or "decoder"
    prefix: str  # of the stack's tensors inside a class with a head
    position_kind: str  # the only one it has
    classes: Mapping[Task, str]  # stock class names
    config_type: type[PreTrainedConfig]
    to_config: Callable[[Any], PreTrainedConfig]
    from_config: Callable[[Any], LoomConfig]
    rules: Callable[[Any, Task, str], list[Rule]]  # (Loom config, task, stock prefix)
    classifier: str  # the stock tensor that only a classifier has
    duplicates: Mapping[str, str]  # stock tensors that tying makes copies: copy -> source
    unread: tuple[str, ...] = ()  # stock fields that do not change what we map
    normal: Callable[[dict[str, Any]], dict[str, Any]] = dict  # brings equal stock configs to one form
    spare: tuple[str, ...] = ()  # patterns of tensors in released checkpoints that no language model computes with


def own_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that a config's own class declares, with their values."""
    return {field.name: getattr(config, field.name) for field in fields(config) if field.name not in _INHERITED}


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ -> (first value, second value)."""
    names = sorted(first.keys() | second.keys())
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def linear(loom: str, stock: str, bias: bool, *, transposed: bool = False) -> list[Rule]:
    """Rules of one dense layer."""
    return join_linear((loom,), stock, bias, (), transposed=transposed)


def join_linear(
    loom: tuple[str, ...], stock: str, bias: bool, rows: tuple[int, ...], *, transposed: bool = False
) -> list[Rule]:
    """Rules of several Loom dense layers that the stock class holds as one; `rows` are their output widths."""
    rules = [Rule(f"{stock}.weight", tuple(f"{name}.weight" for name in loom), rows, transposed)]
    if bias:
        rules.append(Rule(f"{stock}.bias", tuple(f"{name}.bias" for name in loom), rows))
    return rules


def norm(loom: str, stock: str, bias: bool) -> list[Rule]:
    """Rules of one norm."""
    return linear(loom, stock, bias)


def attention_rows(config: LoomConfig) -> tuple[int, int, int]:
    """Output widths of the query, key and value projections."""
    keys = config.num_key_value_heads * config.head_dim
    return config.num_attention_heads * config.head_dim, keys, keys


def convert_to_stock(rules: list[Rule], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Loom tensors -> stock tensors. Raises ValueError that names tensors missing or left over."""
    check_names({name for rule in rules for name in rule.loom}, set(state), "Loom")
    return {rule.stock: rule.join([state[name] for name in rule.loom]) for rule in rules}


def convert_from_stock(rules: list[Rule], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stock tensors -> Loom tensors. Raises ValueError that names tensors missing or left over."""
    check_names({rule.stock for rule in rules}, set(state), "stock")
    return {
        name: tensor for rule in rules for name, tensor in zip(rule.loom, rule.split(state[rule.stock]), strict=True)
    }


def without_copies(state: Mapping[str, Tensor], copies: Mapping[str, str]) -> dict[str, Tensor]:
    """The state without tensors that tying makes copies of others; a copy that differs is refused."""
    kept = dict(state)
    for copy, source in copies.items():
        if copy not in kept or source not in kept:
            continue
        if not torch.equal(kept[copy], kept[source]):
            raise ValueError(f"tensor {copy} differs from {source}, to which it is tied: set tie_word_embeddings false")
        del kept[copy]
    return kept


def check_names(wanted: set[str], given: set[str], side: str) -> None:
    """Raises ValueError that names tensors missing or left over."""
    missing, left_over = sorted(wanted - given), sorted(given - wanted)
    if missing or left_over:
        lists = f"missing {missing or 'none'}, left over {left_over or 'none'}"
        raise ValueError(f"{side} tensors do not fit the config: {lists}")
