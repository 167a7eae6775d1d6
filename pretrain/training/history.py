"""What a training wrote about itself, read back for looking at: numbers of steps, scores, skips, starts, samples.

What lives here: reading the line files of `<run>/train`, whole or cut short, of any length, while a run writes them;
and making curves of them that fit a page. What must not: torch, or how a curve is drawn.

A curve of more steps than a page can show is cut into spans of equal numbers of lines. Each span keeps its mean, its
smallest and its largest value, so that no peak is lost.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

Floats = npt.NDArray[np.float64]

_ALONG = ("step", "tokens", "seconds")
_MARKS = ("skipped", "spike")
_MOST_NOT_FINITE = 200


@dataclass
class Curve:
    """One number over a run's spans: (S,) each, NaN where a span has no finite value.

    `low` and `high` are None where every line is a span of its own.
    """

    mean: Floats
    low: Floats | None = None
    high: Floats | None = None


@dataclass
class Curves:
    """The numbers of the steps of a run, as far as a page shows them.

    Attributes:
        along: `step`, `tokens`, `seconds`, where each span ends: (S,) each, those that the run wrote.
        curves: by name, as the run wrote them.
        lines: steps that were logged.
        span: lines in a span; 1: nothing was left out.
        bad: lines that could not be read.
        not_finite: the first steps whose loss is not finite.
        times_not_finite: how many there are.
    """

    along: dict[str, Floats] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    lines: int = 0
    span: int = 1
    bad: int = 0
    not_finite: list[int] = field(default_factory=list)
    times_not_finite: int = 0


Scores = dict[str, tuple[list[int], list[float]]]
"""Of evaluations, by name: the steps and the values."""


def read_metrics(path: Path, *, most: int) -> tuple[Curves, Scores]:
    """The curves and the scores in a `metrics.jsonl`, which may be missing.

    Args:
        path: the file; a last line that is being written is left alone.
        most: points that a curve may have.
    """
    columns: dict[str, array[float]] = {}
    scores: Scores = {}
    rows = bad = 0
    for values in _objects(path):
        if values is None or not isinstance(values.get("step"), int | float):
            bad += 1
        elif "loss" in values:
            for key, value in values.items():
                number = _number(value)
                if number is None or key in _MARKS:
                    continue
                column = columns.get(key)
                if column is None:
                    column = columns[key] = array("d", [math.nan]) * rows
                elif len(column) < rows:
                    column.extend([math.nan] * (rows - len(column)))
                column.append(number)
            rows += 1
        else:
            step = int(values.pop("step"))
            for key, value in values.items():
                number = _number(value)
                if number is not None and "/" in key:
                    steps, found = scores.setdefault(key, ([], []))
                    steps.append(step)
                    found.append(number)
    for column in columns.values():
        column.extend([math.nan] * (rows - len(column)))
    return _reduced({key: np.frombuffer(column) for key, column in columns.items()}, rows, bad, most), scores


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _objects(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a line file; None for a line that is none, but for a last one without an end."""
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                values = orjson.loads(line)
            except orjson.JSONDecodeError:
                values = _loads(line)  # orjson takes no NaN
            if isinstance(values, dict):
                yield values
            elif line.endswith(b"\n") and line.strip():
                yield None


def _loads(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _reduced(columns: dict[str, Floats], rows: int, bad: int, most: int) -> Curves:
    made = Curves(lines=rows, bad=bad, span=max(1, math.ceil(rows / most)))
    if not rows:
        return made
    wrong = np.flatnonzero(~np.isfinite(columns["loss"]))
    made.not_finite = [int(step) for step in columns["step"][wrong[:_MOST_NOT_FINITE]]]
    made.times_not_finite = len(wrong)
    starts = np.arange(0, rows, made.span)
    ends = np.minimum(starts + made.span, rows) - 1
    for key, column in columns.items():
        if key in _ALONG:
            made.along[key] = column[ends]
        elif made.span == 1:
            made.curves[key] = Curve(np.where(np.isfinite(column), column, np.nan))
        else:
            made.curves[key] = _spans(column, starts)
    return made


def _spans(column: Floats, starts: npt.NDArray[np.int64]) -> Curve:
    """Mean, smallest and largest finite value of each span."""
    finite = np.isfinite(column)
    count = np.add.reduceat(finite, starts, dtype=np.int64)
    mean = np.add.reduceat(np.where(finite, column, 0.0), starts) / np.maximum(count, 1)
    low = np.minimum.reduceat(np.where(finite, column, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, column, -np.inf), starts)
    empty = count == 0
    return Curve(*(np.where(empty, np.nan, values) for values in (mean, low, high)))


# --- what happened --------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a line file, each with a `step`; what cannot be read is left out."""
    found = [values for values in _objects(path) if values is not None and _number(values.get("step")) is not None]
    return [values | {"step": int(values["step"])} for values in found]
