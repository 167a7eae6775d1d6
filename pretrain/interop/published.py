"""The published form of a model: the stock architecture that holds it, or our own names with our code.

What lives here: which configuration and which tensors are published, and how each is made of the model's own. What must
not: how a conversion works (beside this file), or how a directory is written (`pretrain.model_dir`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from pretrain import models
from pretrain.interop import NoStockHome, rules_to_stock, stock_config
from pretrain.interop.mapping import Rule
from pretrain.models import LoomConfig, auto_map_of, task_of

CODE = "code"
"""The published form that is our own: any shape has it."""


def published_rules(model: PreTrainedModel, names: Iterable[str], *, code: bool = False) -> tuple[Any, list[Rule]]:
    """The published configuration of this model, and how each published tensor is made of the model's own.

    Args:
        model: ours or stock; a stock one stays as it is.
        names: of the model's tensors; tied ones once.
        code: ours in its own form, with an `auto_map` to the code that goes beside it.

    Raises:
        NoStockHome: when no stock architecture holds the model, and it is not asked for in its own form.
    """
    config: Any = model.config
    if isinstance(config, LoomConfig):
        if not code:
            return rules_to_stock(config, names, task_of(model))
        config = copy.deepcopy(config)
        config.architectures, config.auto_map = [type(model).__name__], auto_map_of(model)
    return config, [Rule(name, (name,)) for name in names]


def code_files(config: LoomConfig) -> list[Path]:
    """The files of `pretrain.models` that a config's `auto_map` needs, by name; none without one."""
    folder = Path(inspect.getfile(models)).parent
    named = {value.split(".")[0] for value in (getattr(config, "auto_map", None) or {}).values()}
    found = {folder / f"{name}.py" for name in named}
    found |= {Path(needed) for file in tuple(found) for needed in get_relative_import_files(file)}
    return sorted(found)


def joined_names(model: PreTrainedModel, names: Iterable[str], *, code: bool = False) -> list[list[str]]:
    """The model's tensors by what the published form joins: those of one list must be written together."""
    _, rules = published_rules(model, names, code=code)
    home: dict[str, list[str]] = {}
    for rule in rules:
        together = list(dict.fromkeys(name for own in rule.loom for name in home.get(own, [own])))
        home |= dict.fromkeys(together, together)
    return list({id(together): together for together in home.values()}.values())


def check_published(config: Any, task: str, to: str) -> None:
    """Refuse a model that its published form does not hold.

    Args:
        config: the model's.
        task: of its class.
        to: "auto", the name of a stock architecture, or "code".

    Raises:
        NoStockHome: names the keys in the way, and the remedy.
        ValueError: when another stock architecture holds it than `to`.
    """
    if to == CODE:
        return
    try:
        home = stock_config(config, task).model_type
        if task == "replaced_token_detection" and config.generator_size is not None:
            stock_config(config.generator_config())  # it is published beside
    except NoStockHome as refusal:
        raise NoStockHome(f"{refusal}: export.to: {CODE}", refusal.keys) from None
    if to not in ("auto", home):
        raise ValueError(f"export.to: {to} does not hold this model, {home} does; use auto")
