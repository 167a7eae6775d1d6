"""Scores of a model: from its run, from score files, and in the two forms in which the Hub takes them.

What lives here: one plain value a score, reading them, `model-index` and eval-results entries. What must not: making
scores, or wording.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry

from pretrain.cards.places import hub_name, is_hub_name
from pretrain.files import ArtifactError
from pretrain.score_names import SCORE_NAMES, score_name

TASKS = {
    "causal": ("text-generation", "Language modelling"),
    "mlm": ("fill-mask", "Masked language modelling"),
    "rtd": ("token-classification", "Replaced token detection"),
    "span-corruption": ("text2text-generation", "Span corruption"),
    "translation": ("translation", "Translation"),
}
"""The Hub's name of the task that an objective trains, and ours."""
_ON_THE_HUB = {"f1_macro": "f1", "f1_micro": "f1", "pearson": "pearsonr", "spearman": "spearmanr"}
_NO_METRICS = {"num_targets", "context"}


@dataclass(frozen=True)
class Score:
    """One number.

    Attributes:
        metric: as the field writes it, such as `bits_per_byte`.
        value: finite.
        on: what it was measured on, for people.
        task: the Hub's name of the task, then ours.
        dataset: the name of that text on the Hub; None for text that is not there.
        config, split: of the dataset.
        task_id: of a benchmark of the Hub, as its `eval.yaml` names the task; None for what is none.
        at_start: the same number before the first step.
        spread: standard error, or deviation between seeds.
        note: how it was measured.
        date: when, as ISO 8601 says it; None when that is not known.
    """

    metric: str
    value: float
    on: str
    task: tuple[str, str]
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    task_id: str | None = None
    at_start: float | None = None
    spread: float | None = None
    note: str = ""
    date: str | None = None

    @property
    def label(self) -> str:
        """The metric in words."""
        return score_name(self.metric)


def hub_metric(metric: str) -> str:
    """What the Hub calls a metric, where that differs."""
    return "rouge" if metric.startswith("rouge") else _ON_THE_HUB.get(metric, metric)


def scores_of_run(
    run: Path, config: Mapping[str, Any], progress: Mapping[str, Any], *, final: bool
) -> tuple[Score, ...]:
    """Scores on the validation sets: those of the stage `evaluate` for the end of a run, else those in training."""
    found: dict[str, Mapping[str, Any]] = {}
    if final:
        whole = _plain(run / "report" / "scores.json") or {}
        found = {name: values for name, values in whole.items() if isinstance(values, Mapping)}
    note = "all of the set, fp32" if found else "during training"
    if not found and progress.get("scored_at", progress.get("step")) == progress.get("step"):
        found = _by_set(progress.get("scores") or {})
    start = _by_set(progress.get("first_scores") or {})
    kind = str((config.get("objective") or {}).get("kind"))
    task = TASKS.get(kind, ("other", kind))
    return tuple(
        Score(metric, number, on, task, dataset=dataset_of(on, config), split="validation", note=note)
        if (before := _number(start.get(on, {}).get(metric))) is None
        else Score(metric, number, on, task, dataset_of(on, config), split="validation", at_start=before, note=note)
        for on, values in found.items()
        for metric, value in values.items()
        if metric not in _NO_METRICS and not metric.endswith("_before") and (number := _number(value)) is not None
    )


def _plain(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _by_set(flat: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """`{"validation/loss": 3.1}` as `{"validation": {"loss": 3.1}}`."""
    sets: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        on, slash, metric = name.rpartition("/")
        if slash:
            sets.setdefault(on, {})[metric] = value
    return dict(sets)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def dataset_of(split: str, config: Mapping[str, Any]) -> str | None:
    """The one dataset of the Hub that a validation set was taken from; None when it is another text, or several."""
    data = config.get("data") or {}
    held_out = data.get("validation")
    entries = held_out if isinstance(held_out, list) else data.get("train") or ()
    source = split.partition("-")[2]
    names: set[str | None] = set()
    for entry in entries:
        if isinstance(entry, Mapping):
            if not source or entry.get("name") == source:
                names |= {hub_name(str(file)) for file in entry.get("files") or ()}
        else:
            names.add(hub_name(str(entry)))
    return names.pop() if len(names) == 1 else None


# --- score files ----------------------------------------------------------------------------------------------------


def read_scores(path: Path) -> tuple[Score, ...]:
    """The scores in a JSON file of lm-eval (`results`, `configs`), or in one of `pretrain evaluate`.

    Raises:
        ArtifactError: when it holds none.
    """
    whole = _plain(path)
    found: tuple[Score, ...] = ()
    if whole is not None and isinstance(whole.get("results"), Mapping):
        found = tuple(_of_harness(whole))
    elif whole is not None and isinstance(whole.get("kind"), str):
        found = tuple(_of_text(whole))
    if not found:
        raise ArtifactError(f"`{path}` holds no scores: give the JSON that `pretrain evaluate` or lm-eval wrote")
    return found


def _of_harness(whole: Mapping[str, Any]) -> Iterable[Score]:
    """lm-eval: metrics are called `acc,none`, their errors `acc_stderr,none`; its date is in seconds since 1970."""
    seconds = _number(whole.get("date"))
    date = None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    for name, values in whole["results"].items():
        about = (whole.get("configs") or {}).get(name) or {}
        shots = (whole.get("n-shot") or {}).get(name)
        dataset = about.get("dataset_path")
        dataset = dataset if isinstance(dataset, str) and "/" in dataset and is_hub_name(dataset) else None
        config = about.get("dataset_name")
        for key, value in values.items():
            metric, _, which = key.partition(",")
            number = _number(value)
            if number is None or metric.endswith("_stderr") or metric in ("alias", "sample_len"):
                continue
            yield Score(
                metric,
                number,
                str(name),
                ("text-generation", "Text generation"),
                dataset=dataset,
                config=config if isinstance(config, str) else None,
                split=about.get("test_split") or about.get("validation_split"),
                task_id=None if dataset is None else str(config or "default"),
                spread=_number(values.get(f"{metric}_stderr,{which}")),
                note="lm-eval" + (f", {shots} shots" if isinstance(shots, int) else ""),
                date=date,
            )


def _of_text(whole: Mapping[str, Any]) -> Iterable[Score]:
    files = (whole.get("text") or {}).get("files") or ()
    on = ", ".join(sorted({Path(str(name)).name for name in files})[:3]) or "text"
    task = TASKS["mlm" if whole["kind"] == "mlm" else "causal"]
    if whole["kind"] == "seq2seq":
        task = TASKS["translation"]
    for metric, value in whole.items():
        number = _number(value)
        if number is not None and metric in SCORE_NAMES:
            yield Score(metric, number, on, task, note="pretrain evaluate")


# --- the Hub's two forms --------------------------------------------------------------------------------------------


def model_index(scores: Sequence[Score], title: str) -> list[EvalResult]:
    """The scores for `model-index`; text that is not on the Hub goes by the model's name."""
    return [
        EvalResult(
            task_type=score.task[0],
            task_name=score.task[1],
            dataset_type=score.dataset or f"{title}-{score.on}",
            dataset_name=score.on,
            dataset_config=score.config,
            dataset_split=score.split,
            metric_type=hub_metric(score.metric),
            metric_name=score.label,
            metric_value=rounded(score.value),
        )
        for score in scores
    ]


def benchmark_entries(scores: Sequence[Score]) -> dict[str, list[EvalResultEntry]]:
    """Entries for `.eval_results/NAME.yaml`, by NAME: only what was measured on a dataset of the Hub as a task of it.

    One number a task, as the form has no place for the metric's name: the first one that is an accuracy, else the
    first.
    """
    files: dict[str, list[EvalResultEntry]] = {}
    chosen: dict[tuple[str, str, str], Score] = {}
    for score in scores:
        if score.dataset is None or score.task_id is None:
            continue
        key = (score.dataset, score.task_id, score.on)
        known = chosen.get(key)
        if known is None or (known.metric not in _ACCURACIES and score.metric in _ACCURACIES):
            chosen[key] = score
    for (dataset, task_id, on), score in chosen.items():
        notes = ", ".join(filter(None, (score.label, score.note)))
        value = rounded(score.value)
        entry = EvalResultEntry(dataset_id=dataset, task_id=task_id, value=value, date=score.date, notes=notes)
        files.setdefault(_file_name(on), []).append(entry)
    return files


_ACCURACIES = ("acc", "accuracy", "exact_match")


def _file_name(on: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in on).lstrip(".") or "scores"


def rounded(value: float) -> float:
    """Six significant digits: what a card can tell."""
    return float(f"{value:.6g}")
