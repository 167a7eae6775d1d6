"""Objectives by name: the one registry, and the door to others by import path.

What lives here: which objective a configuration names, what of it decides the batches, what is used in validation. What
must not: how any of them works.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from pretrain.config_objective import CORRUPTED_SPAN, ObjectiveConfig
from pretrain.data.objectives.corruption import SpanCorruption
from pretrain.data.objectives.inputs import Arrays, Objective, PieceObjective, Rows
from pretrain.data.objectives.masking import MaskedLanguageModelling
from pretrain.data.objectives.sentences import SentencePairs
from pretrain.data.objectives.translation import Translation
from pretrain.data.order import Draws
from pretrain.data.vocabulary import SpecialIds
from pretrain.plugins import import_path

EVALUATION_MLM = ObjectiveConfig(kind="mlm", rate=0.15, random=0.1, keep=0.1)
"""Validation masks, whatever the training rate, so that losses of different runs compare (Devlin et al. 2019)."""


def causal(rows: Rows, draws: Draws, tokens: SpecialIds) -> Arrays:
    """Predict the next token: each payload token and each EOS is a target once, BOS never."""
    return {"input_ids": rows.input_ids, "shift_labels": rows.next_ids}


def _masked(config: ObjectiveConfig) -> MaskedLanguageModelling:
    return MaskedLanguageModelling(
        config.rate, config.random, config.keep, config.final_rate, config.whole_words, config.span
    )


def _mlm(config: ObjectiveConfig) -> Objective | PieceObjective:
    return _masked(config) if config.sentences == "none" else SentencePairs(config.sentences, _masked(config))


def _replaced_token_detection(config: ObjectiveConfig) -> Objective:
    """The generator's batch (Clark et al. 2020, arXiv 2003.10555): all targets become [MASK]; the model fills them."""
    return MaskedLanguageModelling(
        config.rate, 0.0, 0.0, config.final_rate, config.whole_words, config.span, kind="rtd"
    )


_OBJECTIVES: dict[str, Callable[[ObjectiveConfig], Objective | PieceObjective]] = {
    "mlm": _mlm,
    "causal": lambda config: causal,
    "rtd": _replaced_token_detection,
    "span-corruption": lambda config: SpanCorruption(config.rate, corrupted_span(config)),
    "translation": lambda config: Translation(),
}
BUILT_IN = tuple(_OBJECTIVES)


def corrupted_span(config: ObjectiveConfig) -> float:
    """Mean tokens of a span that span corruption hides."""
    return CORRUPTED_SPAN if config.span is None else config.span


def make_objective(config: ObjectiveConfig) -> Objective | PieceObjective:
    """The objective that a configuration names.

    Raises:
        ValueError: when an import path leads nowhere, or to something that cannot be called, or keys of mlm stand
            beside it.
    """
    if not config.is_own:
        return _OBJECTIVES[config.kind](config)
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


def takes_pieces(objective: Objective | PieceObjective) -> bool:
    """Whether it makes the rows itself, of pieces."""
    return bool(getattr(objective, "takes_pieces", False))


def evaluation_objective(config: ObjectiveConfig) -> ObjectiveConfig:
    """What a run is scored by: mlm with the same masks whatever the training's; the others as they train.

    Replaced-token detection is scored at its standard rate, without words or spans.
    """
    if config.kind == "mlm":
        return EVALUATION_MLM
    return ObjectiveConfig(kind="rtd") if config.kind == "rtd" else config


def objective_identity(config: ObjectiveConfig, objective: Objective | PieceObjective) -> dict[str, Any]:
    """What of an objective decides the batches, for the fingerprint: its keys, or the source of one's own function."""
    if not config.is_own:
        return config.effective()
    try:
        return {"kind": config.kind, "source": inspect.getsource(objective)}
    except (OSError, TypeError):
        return {"kind": config.kind}
