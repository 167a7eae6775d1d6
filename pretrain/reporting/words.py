"""What a run's own records say, in words: how it stands, what happened in it, what a reader should know.

What lives here: the wording of the summary and of events. What must not: HTML, or loading a model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pretrain.config_types import redacted
from pretrain.reporting.places import Place, parameters_of, read_json
from pretrain.training.history import Curves, Scores

NOT_KNOWN = "–"
_FRESH_SECONDS = 120.0


def kind_of(skip: Mapping[str, Any]) -> str:
    """How a line of `skipped.jsonl` is marked on a chart."""
    if skip.get("skipped"):
        return "skipped"
    return "not finite" if skip.get("why") == "not finite" else "spike"


def skip_words(skip: Mapping[str, Any]) -> str:
    """What such a line says."""
    update = "no update" if skip.get("skipped") else "updated all the same"
    numbers = [
        f"{name} {float(skip[key]):.5g}"
        for key, name in (("loss", "loss"), ("grad_norm", "norm"))
        if isinstance(skip.get(key), int | float)
    ]
    return f"{', '.join([str(skip.get('why', 'found')), *numbers])}; {update}"


def changes(state: Mapping[str, Any]) -> list[tuple[int, str, str]]:
    """What was changed on the way, by the newest checkpoint: step, kind, words."""
    made = (state.get("progress") or {}).get("changes") or []
    return [
        (
            int(change.get("step", 0)),
            "changed",
            redacted(f"{change.get('key')}: {change.get('before')!r} → {change.get('after')!r}"),
        )
        for change in made
    ]


def events(
    skips: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]], state: Mapping[str, Any], found: Curves
) -> list[tuple[int, str, str]]:
    """Everything that happened, by step: step, kind, words."""
    told = [(skip["step"], kind_of(skip), skip_words(skip)) for skip in skips]
    seen = {step for step, _, _ in told}
    told += [(step, "not finite", "the loss is not finite") for step in found.not_finite if step not in seen]
    for number, start in enumerate(starts):
        when = str(start.get("time", "")).replace("T", " ").replace("+00:00", " UTC")
        about = ", ".join([when, *(str(start[key]) for key in ("split", "device", "precision") if key in start)])
        told.append((start["step"], "restart" if number else "start", about))
    return sorted([*told, *changes(state)], key=lambda event: event[0])


def notes(found: Curves) -> list[str]:
    """What a reader should be warned of."""
    told = []
    if found.times_not_finite:
        told.append(
            f"{found.times_not_finite:,} logged steps have a loss that is not finite; its curve leaves them out"
        )
    if found.bad:
        told.append(f"{found.bad:,} lines of metrics.jsonl could not be read")
    return told


def remarks(found: Curves) -> list[str]:
    """What a reader should know of the curves."""
    if found.span == 1:
        return []
    return [
        f"{found.lines:,} steps were logged; a point of its curves is the mean of {found.span:,} of them, and the band "
        "behind it reaches from the smallest to the largest"
    ]


def facts(
    place: Place,
    found: Curves,
    scores: Scores,
    state: Mapping[str, Any],
    skips: Sequence[Mapping[str, Any]],
    starts: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """The summary; what is not known is left out."""
    result = read_json(place.train / "result.json") or read_json(place.root / "result.json")
    progress: Mapping[str, Any] = state.get("progress") or {}
    ends = {key: float(values[-1]) for key, values in found.along.items()}
    step = int(max(ends.get("step", 0), result.get("step", 0), progress.get("step", 0)))
    told = {"state": _standing(place, result, progress, step), "steps": f"{step:,}"}
    if total := progress.get("total_steps"):
        told["steps"] += f" of {total:,}"
    if "tokens" in ends:
        told["tokens"] = f"{ends['tokens']:,.0f}"
    if "seconds" in ends:
        minutes = ends["seconds"] / 60
        told["training time"] = f"{minutes / 60:,.2f} h" if minutes >= 6 else f"{minutes:,.2f} min"
        if text := progress.get("text_tokens"):
            told["text tokens a second"] = f"{text / max(float(progress.get('seconds') or 0), 1e-9):,.0f}"
    best = result.get("best") or progress.get("best")
    if isinstance(best, Mapping) and "step" in best:
        judged = f" (loss {float(best['loss']):.4f})" if "loss" in best else ""
        told["best step"] = f"{int(best['step']):,}{judged}"
    parameters = parameters_of(place)
    told["parameters"] = f"{parameters:,}" if parameters else NOT_KNOWN
    told["skipped steps"] = f"{sum(bool(skip.get('skipped')) for skip in skips):,}"
    told["restarts"] = f"{len(starts) - 1:,}" if starts else NOT_KNOWN
    if starts:
        told["on"] = ", ".join(dict.fromkeys(f"{s.get('processes', 1)} x {s.get('device', '?')}" for s in starts))
    for key, (_, values) in scores.items():
        if not key.rpartition("/")[2].startswith("num_"):
            last = f"{values[-1]:.4f}"
            told[key.replace("/", " ").replace("_", " ")] = last if len(values) == 1 else f"{values[0]:.4f} → {last}"
    for key, value in (result.get("test") or {}).items():  # of a fine-tuning
        if isinstance(value, int | float):
            told[f"test {key.replace('_', ' ')}"] = f"{value:.4f}"
    return told


def _standing(place: Place, result: Mapping[str, Any], progress: Mapping[str, Any], step: int) -> str:
    """Finished, going on, or stopped, as far as its files tell."""
    ended = result.get("step", (result.get("best") or {}).get("of", -1))
    if ended >= step > 0:
        return "finished"
    if not (place.train / "metrics.jsonl").is_file():
        return "nothing logged"
    ago = time.time() - (place.train / "metrics.jsonl").stat().st_mtime
    if ago < _FRESH_SECONDS:
        return f"going on: its last line is {max(0.0, ago):.0f} s old"
    when = datetime.fromtimestamp(time.time() - ago, UTC)
    return f"not finished: its last line is of {when:%Y-%m-%d %H:%M} UTC"
