"""Objectives: rows of tokens to inputs and targets.

What lives here: `mlm` and `causal`, and the door to others by import path. What must not: models, or where rows come
from.

An objective is a function `fn(rows: Rows, draws: Draws, tokens: SpecialIds) -> dict[str, numpy.ndarray]`, named in the
configuration as `objective.kind: my_module:fn`. It returns what the model's `forward` takes beside `position_ids` and
`document_ids`: `input_ids` and either `labels` (targets at their own positions, for a masked model) or `shift_labels`
(the target of each position, already shifted, for a causal one), each (B, L) int64 with -100 where there is no target.
It draws from `draws` alone, so that the batch stays a pure function of (data, seed, step).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.config import ObjectiveConfig
from pretrain.data.order import Draws, IntArray, below, integers
from pretrain.data.vocabulary import SpecialIds

IGNORE = -100
EVALUATION_MLM = ObjectiveConfig(kind="mlm", rate=0.15, random=0.1, keep=0.1)
"""Validation masks, whatever the training rate, so that losses of different runs compare (Devlin et al. 2019)."""


@dataclass(frozen=True)
class Rows:
    """A batch of packed rows.

    input_ids     (B, L) int64   pad where nothing lies
    position_ids  (B, L) int64   from 0 in each piece; 0 in padding
    document_ids  (B, L) int32   from 1, the piece's number in its row; 0 in padding
    next_ids      (B, L) int64   the token that follows each position in its document, though it lie in another row;
                                 -100 after a document's end and in padding
    """

    input_ids: IntArray
    position_ids: IntArray
    document_ids: npt.NDArray[np.int32]
    next_ids: IntArray


Objective = Callable[[Rows, Draws, SpecialIds], dict[str, npt.NDArray[Any]]]


def causal(rows: Rows, draws: Draws, tokens: SpecialIds) -> dict[str, npt.NDArray[Any]]:
    """Predict the next token: each payload token and each EOS is a target once, BOS never."""
    return {"input_ids": rows.input_ids, "shift_labels": rows.next_ids}


@dataclass(frozen=True)
class MaskedLanguageModelling:
    """Predict hidden tokens (Devlin et al. 2019, section 3.1), with any rate and split.

    Each position that is no special token is a target with probability `rate`, on its own: a row has `rate` of its
    positions as targets on average, and a very short one may have none. Of the targets the share `random` gets a
    random token that is no special one, `keep` stays, the rest becomes [MASK].
    """

    rate: float
    random: float
    keep: float

    def __call__(self, rows: Rows, draws: Draws, tokens: SpecialIds) -> dict[str, npt.NDArray[Any]]:
        """Hide tokens of `rows`."""
        mask = tokens.need("mask", "objective.kind: mlm")
        ids = rows.input_ids.reshape(-1)  # (B * L,)
        places = np.flatnonzero(below(draws.bits("mlm: is target"), self.rate).reshape(-1))
        places = places[~tokens.is_special[ids[places]] & (rows.document_ids.reshape(-1)[places] > 0)]
        labels = np.full(ids.shape, IGNORE, dtype=np.int64)
        labels[places] = ids[places]
        how = draws.bits_at("mlm: how", places)
        is_kept = below(how, self.keep)
        is_random = below(how, self.keep + self.random) & ~is_kept
        shown = np.full(places.shape, mask, dtype=np.int64)
        shown[is_kept] = ids[places[is_kept]]
        which = integers(draws.bits_at("mlm: replacement", places[is_random]), len(tokens.replaceable))
        shown[is_random] = tokens.replaceable[which]
        inputs = ids.copy()
        inputs[places] = shown
        shape = rows.input_ids.shape
        return {"input_ids": inputs.reshape(shape), "labels": labels.reshape(shape)}


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a configuration names.

    Raises:
        ValueError: when an import path leads nowhere, or to something that cannot be called.
    """
    if config.kind == "causal":
        return causal
    if config.kind == "mlm":
        return MaskedLanguageModelling(config.rate, config.random, config.keep)
    module_name, _, name = config.kind.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"objective.kind: {config.kind} cannot be imported ({error}); is it on PYTHONPATH?") from error
    if not callable(found):
        raise ValueError(f"objective.kind: {config.kind} is a {type(found).__name__}, not a function")
    objective: Objective = found
    return objective


def objective_identity(config: ObjectiveConfig, objective: Objective) -> dict[str, Any]:
    """What of an objective decides the batches, for the fingerprint: its keys, or the source of one's own function."""
    if config.kind == "causal":
        return {"kind": "causal"}
    if config.kind == "mlm":
        return config.model_dump()
    try:
        return {"kind": config.kind, "source": inspect.getsource(objective)}
    except (OSError, TypeError):
        return {"kind": config.kind}


def check_batch(arrays: dict[str, npt.NDArray[Any]], shape: tuple[int, ...], kind: str) -> None:
    """Raise ValueError when an objective gave back something else than rows of inputs and targets."""
    targets = [name for name in ("labels", "shift_labels") if name in arrays]
    if "input_ids" not in arrays or len(targets) != 1:
        raise ValueError(
            f"objective.kind: {kind} returned {sorted(arrays)}; needed are input_ids and one of labels, shift_labels"
        )
    for name, array in arrays.items():
        if array.shape[:2] != shape:
            raise ValueError(f"objective.kind: {kind} returned `{name}` of shape {array.shape}; rows are {shape}")
