"""Objectives: rows of tokens to inputs and targets.

What lives here: `mlm` and `causal`, and the door to others by import path. What must not: models, or where rows come
from.

An objective is a function `fn(rows: Rows, draws: Draws, tokens: SpecialIds) -> dict[str, numpy.ndarray]`, named in the
configuration as `objective.kind: my_module:fn`. It returns what the model's `forward` takes beside `position_ids` and
`document_ids`: `input_ids` and either `labels` (targets at their own positions, for a masked model) or `shift_labels`
(the target of each position, already shifted, for a causal one), each (B, L) int64 with -100 where there is no target.
It draws from `draws` alone, so that the batch stays a pure function of (data, seed, step). Modules in the working
directory are found.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.config import ObjectiveConfig
from pretrain.data.order import Draws, IntArray, below, integers
from pretrain.data.vocabulary import SpecialIds
from pretrain.plugins import import_path

IGNORE = -100
"""Target of a position that is not scored, as in `torch.nn.functional.cross_entropy`."""

BUILT_IN = ("causal", "mlm")
_TARGETS = {"encoder": "labels", "decoder": "shift_labels"}
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
        places = np.flatnonzero(draws.below("mlm: is target", self.rate).reshape(-1))
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
        ValueError: when an import path leads nowhere, or to something that cannot be called, or keys of mlm stand
            beside it.
    """
    if config.kind == "causal":
        return causal
    if config.kind == "mlm":
        return MaskedLanguageModelling(config.rate, config.random, config.keep)
    plain, defaults = config.model_dump(), ObjectiveConfig(kind=config.kind).model_dump()
    if without_effect := [f"objective.{key}" for key in plain if plain[key] != defaults[key]]:
        raise ValueError(
            f"{without_effect[0]}: {plain[without_effect[0].partition('.')[2]]} belongs to mlm and has no effect with "
            f"objective.kind: {config.kind}; remove it, and set it in the function itself"
        )
    try:
        found = import_path(config.kind)
    except ValueError as error:
        raise ValueError(f"objective.kind: {error}") from error
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


def check_batch(
    made: Any, shape: tuple[int, ...], kind: str, vocab_size: int, model_kind: str | None = None
) -> dict[str, npt.NDArray[Any]]:
    """What an objective of one's own gave back, with ids as int64.

    Args:
        made: what it returned.
        shape: of the rows, (B, L).
        kind: its import path.
        vocab_size: all ids lie below.
        model_kind: encoder or decoder, where it is known; else either kind of target will do.

    Raises:
        ValueError: when it is not rows of inputs and targets, or not the targets that the model takes.
    """
    returned = f"objective.kind: {kind} returned"
    if not isinstance(made, dict):
        raise ValueError(f"{returned} a {type(made).__name__}; return a dict of numpy arrays")
    takes = _TARGETS.get(model_kind or "", "one of labels, shift_labels")
    targets = [name for name in _TARGETS.values() if name in made]
    if "input_ids" not in made or len(targets) != 1 or takes not in (targets[0], "one of labels, shift_labels"):
        of_kind = f" for {'an' if model_kind == 'encoder' else 'a'} {model_kind}" if model_kind else ""
        raise ValueError(f"{returned} {sorted(made)}; needed are input_ids and {takes}{of_kind}")
    checked: dict[str, npt.NDArray[Any]] = {}
    for name, array in made.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{returned} `{name}` as a {type(array).__name__}; return a numpy array")
        if array.shape[:2] != shape:
            raise ValueError(f"{returned} `{name}` of shape {array.shape}; rows are {shape}")
        checked[name] = array
    for name in ("input_ids", targets[0]):
        array = checked[name]
        if array.shape != shape or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{returned} `{name}` as {array.dtype} of shape {array.shape}; ids are int64 of {shape}")
        ids = array if name == "input_ids" else array[array != IGNORE]
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(
                f"{returned} `{name}` from {ids.min()} to {ids.max()}; ids are 0 to {vocab_size - 1}"
                + (f", and {IGNORE} where there is no target" if name != "input_ids" else "")
            )
        checked[name] = array.astype(np.int64, copy=False)
    return checked
