"""How a stock architecture holds a Loom model: rules for tensors, a `Home` for each architecture, and their proofs.

Rules only rename, concatenate (or split) and transpose, so a conversion is exact both ways. Nothing here knows a
particular architecture: those are one file each beside this one.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pretrain.models import LoomConfig

Task = str  # as `pretrain.models.model_class` names them: "pretraining", "classification", "base", ...

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
    "generator_size",
    "generator",
    "rtd_weight",
    "rtd_sharing",
    "label_smoothing",
    "use_cache",
)
# Switches of heads that a bare stack and one that predicts tokens do not have; kept the same way for those.
CLASSIFIER_KEYS = ("classifier_head", "classifier_pooling")
COMMON_KEYS = ("id2label", "label2id", "problem_type", "dtype")
_INHERITED = {field.name for field in fields(PreTrainedConfig)}


class NoStockHome(ValueError):  # noqa: N818 (it is a fact about the model, and the name of the contract)
    """No stock architecture holds this model; `keys` are the config keys in the way."""

    def __init__(self, message: str, keys: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys


class Words(str):
    """Words in the place of a value: shown without quotes."""

    def __repr__(self) -> str:
        return str(self)


class NotHeld(ValueError):  # noqa: N818 (a fact about one value)
    """A value that the other side has no place for: its key, and what it would have to be."""

    def __init__(self, key: str, value: Any, wanted: str) -> None:
        super().__init__(f"{key} {value!r} cannot be held: it would have to be {wanted}")
        self.key, self.value, self.wanted = key, value, Words(wanted)


@dataclass(frozen=True)
class Rule:
    """One stock tensor: the Loom tensors joined along their first axis, then transposed if `transposed`.

    `rows` are the first-axis sizes of the Loom tensors, needed to split where there is more than one. `row`: the stock
    tensor is a matrix of one row, ours a vector. `summed`: the Loom tensors are added up, and other rules bring them
    back. `zeros`: no Loom tensor stands behind it, it is zeros of this shape.
    """

    stock: str
    loom: tuple[str, ...]
    rows: tuple[int, ...] = ()
    transposed: bool = False
    row: bool = False
    summed: bool = False
    zeros: tuple[int, ...] = ()

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Loom tensors -> the stock tensor, contiguous."""
        if self.zeros:
            return torch.zeros(self.zeros)
        if self.row:
            return tensors[0][None]
        if self.summed:
            first, second = tensors
            return first + second
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return joined.t().contiguous() if self.transposed else joined

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The stock tensor -> Loom tensors, contiguous."""
        if self.zeros:
            if tensor.any():
                raise ValueError(f"tensor {self.stock} is not zero, and the config knows no such parameter")
            return []
        if self.row:
            return [tensor[0]]
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
    kind: str  # "encoder", "decoder" or "seq2seq"
    prefix: str  # of the stack's tensors inside a class with a head
    position_kind: str  # the only one it has
    classes: Mapping[Task, str]  # stock class names
    to_config: Callable[[Any], PreTrainedConfig]
    from_config: Callable[[Any], LoomConfig]
    rules: Callable[[Any, Task, str], list[Rule]]  # (Loom config, task, stock prefix)
    duplicates: Mapping[str, str]  # stock tensors that tying makes copies: copy -> source
    unread: tuple[str, ...] = ()  # stock fields that do not change what we map
    read_by: Mapping[str, Collection[Task]] = field(default_factory=dict)  # stock fields that these tasks alone read
    normal: Callable[[dict[str, Any]], dict[str, Any]] = dict  # brings equal stock configs to one form
    spare: tuple[str, ...] = ()  # patterns of tensors in released checkpoints that no language model computes with
    prefixes: Mapping[Task, str] = field(default_factory=dict)  # where a class has another than `prefix`
    copies: Callable[[Any], Mapping[str, str]] | None = None  # `duplicates`, where the stock config says which
    computed: Callable[[Any], Mapping[str, Tensor]] | None = None  # stock tensors that its config alone determines

    def rules_of(self, config: LoomConfig, task: Task) -> list[Rule]:
        """How each tensor of the class for this task is made."""
        prefix = "" if task == "base" else self.prefixes.get(task, self.prefix)
        return self.rules(config, task, prefix)

    def own_tensors(self, stock: PreTrainedConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state without copies that tying makes and without tensors that follow from the config.

        Raises ValueError that names a copy, or a computed tensor, that has other values.
        """
        tied = getattr(stock, "tie_word_embeddings", True)
        copies = self.copies(stock) if self.copies is not None else self.duplicates if tied else {}
        kept = without_copies(state, copies)
        for name, expected in (self.computed(stock) if self.computed is not None else {}).items():
            if name not in kept:
                continue
            exact = kept[name].dtype in (torch.float32, torch.float64)
            if not torch.allclose(kept[name].cpu().float(), expected, atol=1e-5 if exact else 1e-2):
                raise ValueError(f"tensor {name} is not what a {self.name} model computes from its config")
            del kept[name]
        return kept

    def task_of(self, config: LoomConfig, names: Collection[str], named: str = "") -> Task:
        """The task whose class has stock tensors of these names; of several, the one whose class is `named`.

        Where none fits, the nearest, so that what is missing or left over can be told.
        """
        known = set(names)
        off = {task: len(known ^ {rule.stock for rule in self.rules_of(config, task)}) for task in self.classes}
        nearest = [task for task, count in off.items() if count == min(off.values())]
        return next((task for task in nearest if self.classes[task] == named), nearest[0])

    def compared(self, stock: PreTrainedConfig, task: Task) -> dict[str, Any]:
        """The fields of a stock config that decide what its class for this task computes, in one form."""
        unread = {*self.unread, *(name for name, tasks in self.read_by.items() if task not in tasks)}
        return self.normal({key: value for key, value in own_fields(stock).items() if key not in unread})


def own_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that a config's own class declares, with their values."""
    return {field.name: getattr(config, field.name) for field in fields(config) if field.name not in _INHERITED}


def fields_to_stock(config: LoomConfig, table: Mapping[str, str]) -> dict[str, Any]:
    """Stock fields from a table of Loom field -> stock field."""
    return {theirs: getattr(config, ours) for ours, theirs in table.items()}


def fields_from_stock(stock: Any, table: Mapping[str, str]) -> dict[str, Any]:
    """Loom fields from a table of Loom field -> stock field."""
    return {ours: getattr(stock, theirs) for ours, theirs in table.items()}


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


def per_token_rules(task: Task) -> list[Rule]:
    """Rules of the heads that say something of each token, where both sides have them under the same names."""
    heads = {"token_classification": "classifier", "question_answering": "qa_outputs"}
    return linear(heads[task], heads[task], True) if task in heads else []


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
        name: tensor
        for rule in rules
        if not rule.summed
        for name, tensor in zip(rule.loom, rule.split(state[rule.stock]), strict=True)
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
        lists = f"missing {_few(missing)}, left over {_few(left_over)}"
        raise ValueError(f"{side} tensors do not fit the config: {lists}")


def _few(names: list[str]) -> str:
    shown = str(names[:8] or "none")
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
