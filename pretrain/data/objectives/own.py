"""Objectives of one's own: what they must give back.

What lives here: the checks on the arrays of a function by import path. What must not: our own objectives.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pretrain.data.objectives.inputs import IGNORE, Arrays

_TARGETS = {"encoder": "labels", "decoder": "shift_labels"}
_PAIRED = ("input_ids", "decoder_input_ids", "labels")


def check_batch(made: Any, shape: tuple[int, ...], kind: str, vocab_size: int, model_kind: str | None = None) -> Arrays:
    """What an objective of one's own gave back, with ids as int64.

    Args:
        made: what it returned.
        shape: of the rows, (B, L).
        kind: its import path.
        vocab_size: all ids lie below.
        model_kind: encoder, decoder or seq2seq, where it is known; else either kind of target will do.

    Raises:
        ValueError: when it is not rows of inputs and targets, or not the targets that the model takes.
    """
    returned = f"objective.kind: {kind} returned"
    if not isinstance(made, dict):
        raise ValueError(f"{returned} a {type(made).__name__}; return a dict of numpy arrays")
    paired = model_kind == "seq2seq" or (model_kind is None and "decoder_input_ids" in made)
    targets = "labels" if paired else _target(made, returned, model_kind)
    if paired and (missing := [name for name in _PAIRED if name not in made]):
        raise ValueError(f"{returned} {sorted(made)}; an encoder-decoder needs {', '.join(missing)} too")
    checked: Arrays = {}
    for name, array in made.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{returned} `{name}` as a {type(array).__name__}; return a numpy array")
        if array.shape[: 1 if paired else 2] != shape[: 1 if paired else 2]:
            raise ValueError(f"{returned} `{name}` of shape {array.shape}; rows are {shape}")
        checked[name] = array
    if paired:
        shape = checked["labels"].shape
    for name in _PAIRED if paired else ("input_ids", targets):
        array = checked[name]
        wanted = array.shape[:2] if paired and name == "input_ids" else shape
        if array.shape != wanted or array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{returned} `{name}` as {array.dtype} of shape {array.shape}; ids are int64 of {wanted}")
        ids = array[array != IGNORE] if name == targets else array
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(
                f"{returned} `{name}` from {ids.min()} to {ids.max()}; ids are 0 to {vocab_size - 1}"
                + (f", and {IGNORE} where there is no target" if name == targets else "")
            )
        checked[name] = array.astype(np.int64, copy=False)
    return checked


def _target(made: dict[str, Any], returned: str, model_kind: str | None) -> str:
    """The name of the targets among what was returned."""
    takes = _TARGETS.get(model_kind or "", "one of labels, shift_labels")
    targets = [name for name in _TARGETS.values() if name in made]
    if "input_ids" not in made or len(targets) != 1 or takes not in (targets[0], "one of labels, shift_labels"):
        of_kind = f" for {'an' if model_kind == 'encoder' else 'a'} {model_kind}" if model_kind else ""
        raise ValueError(f"{returned} {sorted(made)}; needed are input_ids and {takes}{of_kind}")
    return targets[0]
