"""What a model can be measured on beside running text: minimal pairs, similarity, retrieval, tasks of lm-eval.

What lives here: what is asked for, reading it once, and scoring one model or another on all of it; `pretrain evaluate`
and a training both stand on it. What must not: how any measure works, or loading models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pretrain.config_evaluate import MeasuresConfig
from pretrain.evaluation.examples import ExampleSet, Pair, find_sets, read_pairs, read_retrieval, read_similarity
from pretrain.evaluation.harness import Tasks, load_tasks, run_tasks
from pretrain.evaluation.loading import Kind, LoadedModel
from pretrain.evaluation.minimal_pairs import PseudoLikelihood, score_pairs
from pretrain.evaluation.passes import Passes
from pretrain.evaluation.vectors import score_retrieval, score_similarity

MeasureKind = Literal["minimal_pairs", "similarity", "retrieval", "tasks"]
_DEFAULT_CONTEXT = 1_024
_NOT_SCORES = ("pairs", "ties", "queries", "candidates", "cut", "examples", "num_fewshot", "version")


class Measure(Protocol):
    """One set of examples, read, or all tasks."""

    @property
    def kind(self) -> MeasureKind: ...

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> str:
        """Of an evaluator in a training."""

    def score(self, model: LoadedModel, passes: Passes, window: int) -> dict[str, Any]:
        """Results as JSON takes them, of tasks by task."""


@dataclass(frozen=True)
class _MinimalPairs:
    name: str
    pairs: Sequence[Pair]
    pseudo_likelihood: PseudoLikelihood
    kind: MeasureKind = "minimal_pairs"

    @property
    def label(self) -> str:
        return f"pairs-{self.name}"

    def score(self, model: LoadedModel, passes: Passes, window: int) -> dict[str, Any]:
        return score_pairs(model, self.pairs, passes, window=window, pseudo_likelihood=self.pseudo_likelihood)


@dataclass(frozen=True)
class _Similarity:
    name: str
    examples: tuple[list[str], list[str], list[float]]
    kind: MeasureKind = "similarity"

    @property
    def label(self) -> str:
        return f"similarity-{self.name}"

    def score(self, model: LoadedModel, passes: Passes, window: int) -> dict[str, Any]:
        return score_similarity(model, *self.examples, passes, window=window)


@dataclass(frozen=True)
class _Retrieval:
    name: str
    examples: tuple[list[str], list[str], list[list[int]]]
    kind: MeasureKind = "retrieval"

    @property
    def label(self) -> str:
        return f"retrieval-{self.name}"

    def score(self, model: LoadedModel, passes: Passes, window: int) -> dict[str, Any]:
        return score_retrieval(model, *self.examples, passes, window=window)


@dataclass(frozen=True)
class _Tasks:
    tasks: Tasks
    num_fewshot: int | None
    limit: int | None
    standard_errors: bool
    name: str = "tasks"
    kind: MeasureKind = "tasks"

    @property
    def label(self) -> str:
        return self.name

    def score(self, model: LoadedModel, passes: Passes, window: int) -> dict[str, Any]:
        return run_tasks(
            model,
            self.tasks,
            passes,
            window=window,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            standard_errors=self.standard_errors,
        )


@dataclass(frozen=True)
class Measures:
    """Everything that was asked for, read; `sets` are the files of examples by kind."""

    all: Sequence[Measure]
    sets: Mapping[MeasureKind, Sequence[ExampleSet]]

    @classmethod
    def read(cls, asked: MeasuresConfig, *, trust_code: bool = False, standard_errors: bool = True) -> Measures:
        """Read the examples and load the tasks, so that what cannot be used is known before any model is scored.

        Args:
            asked: files, names and fields.
            trust_code: whether code may run that comes with a task.
            standard_errors: of tasks.

        Raises:
            ValueError: names the file or the task, and the remedy.
        """
        if (asked.num_fewshot is not None) and not asked.tasks:
            raise ValueError(f"num_fewshot: {asked.num_fewshot} is for tasks of lm-eval, and none is asked for")
        sets: dict[MeasureKind, Sequence[ExampleSet]] = {
            "minimal_pairs": find_sets(asked.minimal_pairs, "minimal pairs"),
            "similarity": find_sets(asked.similarity, "similarity"),
            "retrieval": find_sets(asked.retrieval, "retrieval"),
        }
        found: list[Measure] = []
        for one in sets["minimal_pairs"]:
            pairs = read_pairs(one, asked.pair_fields, asked.limit)
            found.append(_MinimalPairs(one.name, pairs, asked.pseudo_likelihood))
        for one in sets["similarity"]:
            found.append(_Similarity(one.name, read_similarity(one, asked.similarity_fields, asked.limit)))
        for one in sets["retrieval"]:
            found.append(_Retrieval(one.name, read_retrieval(one, asked.retrieval_fields, asked.limit)))
        if asked.tasks:
            tasks = load_tasks(asked.tasks, trust_code=trust_code)
            found.append(_Tasks(tasks, asked.num_fewshot, asked.limit, standard_errors))
        return cls(found, sets)

    def score(self, model: LoadedModel, passes: Passes, *, window: int | None = None) -> dict[str, Any]:
        """All results of one model: by kind, and by the name of the set or task.

        Args:
            model: with a head of its kind, where `needs_head` of what was asked.
            passes: how forward passes are run.
            window: positions of a forward pass; default: what the model takes, at most 1,024.

        Raises:
            ValueError: when an example does not fit the model.
        """
        positions = window or default_window(model)
        scores: dict[str, Any] = {}
        for measure in self.all:
            found = measure.score(model, passes, positions)
            if measure.kind == "tasks":
                scores["tasks"] = found
                continue
            (files,) = (one for one in self.sets[measure.kind] if one.name == measure.name)
            scores.setdefault(measure.kind, {})[measure.name] = found | {"files": files.digests()}
        return scores


def check_kind(asked: MeasuresConfig, kind: Kind, source: str) -> None:
    """Refuse a model before anything is read or scored.

    Raises:
        ValueError: names the model and the option.
    """
    if asked.tasks and kind != "causal":
        raise ValueError(f"--tasks: tasks of lm-eval are for decoders, which `{source}` is not; leave one out")
    if asked.minimal_pairs and kind not in ("causal", "mlm"):
        raise ValueError(
            f"--minimal-pairs: a likelihood of a sentence is had from decoders and encoders, and `{source}` is an "
            "encoder-decoder; leave one out"
        )


def default_window(model: LoadedModel) -> int:
    """The positions of a forward pass where nobody says: what the model takes, at most 1,024."""
    return min(model.max_positions or _DEFAULT_CONTEXT, _DEFAULT_CONTEXT)


def score_names(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers worth a curve in the result of one set or task: no counts, no groups, nothing that is not finite."""
    return {
        name: float(value)
        for name, value in results.items()
        if isinstance(value, (int, float))
        and not isinstance(value, bool)
        and name not in _NOT_SCORES
        and not name.endswith("_stderr")
        and math.isfinite(value)
    }
