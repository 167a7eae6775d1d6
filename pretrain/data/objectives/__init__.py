"""Objectives: tokens to inputs and targets.

What lives here: the registry, each of our objectives in a file of its own, and the door to others by import path. What
must not: models, or where rows come from.

     registry      kind -> objective, its identity, what validation uses
     inputs        what an objective is given: Rows, or Pieces that it lays out in rows itself
     masking       mlm and rtd: tokens, whole words, spans (`spans`), at a rate that may move over the run
     sentences     mlm with next-sentence or sentence-order pairs
     corruption    span corruption with sentinels
     translation   pairs of source and target
     own           what a function of one's own must give

An objective of one's own is a function `fn(rows: Rows, draws: Draws, tokens: SpecialIds) -> dict[str, numpy.ndarray]`,
named in the configuration as `objective.kind: my_module:fn`. It returns what the model's `forward` takes beside
`position_ids` and `document_ids`: `input_ids` and either `labels` (targets at their own positions, for a masked model)
or `shift_labels` (the target of each position, already shifted, for a causal one), each (B, L) int64 with -100 where
there is no target. For an encoder-decoder it returns all that `forward` takes: `input_ids` (B, S), `decoder_input_ids`
and `labels` (B, T), and position and document ids of both where rows hold several documents. It draws from `draws`
alone, so that the batch stays a pure function of (data, seed, step). Modules in the working directory are found.

Special tokens are never hidden, and no random replacement is special. Every draw is a hash of (seed, epoch, row, place,
purpose): a row's targets do not depend on the rows beside it.
"""

from pretrain.data.objectives.inputs import IGNORE, Arrays, Objective, PieceObjective, Pieces, Rows, Texts
from pretrain.data.objectives.masking import MaskedLanguageModelling
from pretrain.data.objectives.own import check_batch
from pretrain.data.objectives.registry import (
    BUILT_IN,
    EVALUATION_MLM,
    causal,
    corrupted_span,
    evaluation_objective,
    make_objective,
    objective_identity,
    takes_pieces,
)

__all__ = [
    "BUILT_IN",
    "EVALUATION_MLM",
    "IGNORE",
    "Arrays",
    "MaskedLanguageModelling",
    "Objective",
    "PieceObjective",
    "Pieces",
    "Rows",
    "Texts",
    "causal",
    "check_batch",
    "corrupted_span",
    "evaluation_objective",
    "make_objective",
    "objective_identity",
    "takes_pieces",
]
