"""The passes over a plan's parts: which there are, which parts of each are finished, what comes between them.

What lives here: the order of the work. What must not: the work on a part, or who does it.

     note held-out text    where training text is compared with it: its runs of words, part by part
     write                 read, filter, tokenise; the shards, and fingerprints where documents are compared
     drop repeated         the shards again, without the documents that repeat others

A plan without such comparisons has the second alone. Between two passes one process brings together what all parts
gave; everything is on the disk, so that a call that was stopped goes on there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datatrove.pipeline.base import PipelineStep

from pretrain.data.keeping.decontamination import evaluation_runs
from pretrain.data.keeping.dropping import DropRepeated, choose_among_all
from pretrain.data.keeping.sieve import DECONTAMINATE, DEDUP
from pretrain.data.preparing.parts import Plan, is_training
from pretrain.data.preparing.pipeline import NoteHeldOut, ReadPart, WriteShards
from pretrain.data.preparing.unfinished import (
    RUNS,
    held_out_runs_of,
    is_finished,
    load_array,
    marker,
    save_array,
    shards_folder,
)
from pretrain.data.reading.sources import SourceFile


@dataclass(frozen=True)
class Pass:
    """One pass. `title` is what a person is shown; one that only copies is done on this machine, whatever the key."""

    name: str
    title: str
    here: bool = False


HELD_OUT = Pass("held out", "reading what is held out")
WRITE = Pass("write", "preparing")
DROP = Pass("drop", "dropping repeated documents", here=True)


def passes_of(plan: Plan) -> list[Pass]:
    """The passes that a plan needs, in order."""
    first = [HELD_OUT] if DECONTAMINATE in plan.steps else []
    return [*first, WRITE, *([DROP] if DEDUP in plan.steps else [])]


def steps_of(name: str, work: Path, plan: Plan) -> list[PipelineStep]:
    """What a worker does with a part in a pass."""
    if name == HELD_OUT.name:
        return [ReadPart(work, plan, held_out_only=True), NoteHeldOut(work, plan)]
    if name == WRITE.name:
        return [ReadPart(work, plan), WriteShards(work, plan)]
    return [DropRepeated(work, plan)]


def finished_parts(work: Path, plan: Plan, one: Pass, *, thorough: bool = True) -> list[int]:
    """The numbers of the parts that a pass need not work on; `thorough`: what they gave is read and compared."""
    numbered = enumerate(plan.parts)
    if one is HELD_OUT:
        nothing = plan.held_out is None  # the training files hold nothing out
        return [
            number
            for number, part in numbered
            if (nothing and is_training(part.split)) or held_out_runs_of(work, part).is_file()
        ]
    if not thorough:
        return [number for number, part in numbered if marker(work, part, kept=one is DROP).is_file()]
    if one is WRITE:
        return [number for number, part in numbered if is_finished(work, part, shards_folder(work, plan))]
    return [number for number, part in numbered if is_finished(work, part, work / "data", kept=True)]


def make_ready(work: Path, plan: Plan, one: Pass, evaluation: Sequence[SourceFile]) -> None:
    """Bring together what the passes before gave, unless an earlier call has done so. Runs in one process.

    Raises:
        ValueError: when an evaluation file cannot be read, or gives nothing to look for.
    """
    if one is WRITE and DECONTAMINATE in plan.steps:
        _merge_runs(work, plan, evaluation)
    if one is DROP:
        choose_among_all(work, plan)


def _merge_runs(work: Path, plan: Plan, evaluation: Sequence[SourceFile]) -> None:
    validation, extra = (work / name for name in RUNS.values())
    if not extra.is_file():
        save_array(extra, evaluation_runs(evaluation, plan.steps[DECONTAMINATE]["ngrams"], plan.text_field))
    if not validation.is_file():
        parts = [load_array(path) for part in plan.parts if (path := held_out_runs_of(work, part)).is_file()]
        save_array(validation, np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *parts])))
