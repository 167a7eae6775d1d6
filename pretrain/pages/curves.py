"""The curves of a report: charts that a reader zooms into, drawn by a plotting library that the page carries.

What lives here: which charts there are, the numbers as the page holds them, the controls, the scripts. What must not:
reading runs. How a chart is drawn stands in `curves.js`.

The library is plotly.js (MIT), gzipped: two megabytes. A browser unpacks it, and runs it only if its SHA-256 is the one
that the head of the page names.
"""

from __future__ import annotations

import base64
import gzip
import importlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.pages.page import escape
from pretrain.score_names import score_name

Floats = npt.NDArray[np.float64]

COLOURS = 8
STYLE = """<style>
:root { --run-0: #2f6fd0; --run-1: #d9622b; --run-2: #23935a; --run-3: #a44bc0; --run-4: #b88a12; --run-5: #cc3d68;
  --run-6: #1a8fa3; --run-7: #74777d; }
@media (prefers-color-scheme: dark) { :root { --run-0: #6ea3f5; --run-1: #f58d5c; --run-2: #4cc38a; --run-3: #cf8be6;
  --run-4: #e0b84c; --run-5: #f0789c; --run-6: #4fc3d6; --run-7: #a9adb5; } }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: .8rem; }
.chart { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .4rem .5rem 0; min-width: 0; }
.chart figcaption { color: var(--ink); font-size: 14px; padding-left: .3rem; overflow-wrap: anywhere; }
.plot { height: 250px; overflow: hidden; }
.controls { display: flex; flex-wrap: wrap; gap: .4rem 1.1rem; align-items: center; padding: .5rem 0; margin: .3rem 0;
  position: sticky; top: 0; background: var(--ground); z-index: 5; border-bottom: 1px solid var(--line); }
.controls label { display: inline-flex; gap: .4rem; align-items: center; color: var(--soft); font-size: 13px; }
.controls select, .controls input, button.run { font: inherit; color: var(--ink); accent-color: var(--run-0); }
.controls select { background: var(--card); border: 1px solid var(--edge); border-radius: 4px; padding: .1rem .3rem; }
.controls input[type=range] { width: 6rem; }
button.run { background: none; border: 1px solid var(--edge); border-radius: 1rem; padding: .1rem .7rem;
  cursor: pointer; max-width: 100%; overflow-wrap: anywhere; text-align: left; }
button.run[aria-pressed=false] { opacity: .4; text-decoration: line-through; }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; }
@media (max-width: 600px) { .controls { position: static; } }
</style>"""

# Plain symbols of the library, and what stands for each in the legend.
SYMBOLS = {
    "skipped": ("x", "✖", "a step without its update"),
    "spike": ("triangle-up", "▲", "a spike that was trained on"),
    "not finite": ("diamond", "◆", "a loss that is not finite"),
    "changed": ("square", "■", "the configuration changed"),
}
RESTART = ("┊", "training started again")


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: a key of `SYMBOLS`, and words."""

    kind: str
    step: int
    text: str


@dataclass(frozen=True)
class RunCurves:
    """One run.

    Attributes:
        name: of the run.
        along: where each point lies, by `step`, `tokens`, `seconds`; as many of them as are known.
        curves: the points by name: their values, or of spans of steps the mean, the smallest and the largest.
        scores: steps and values of evaluations, by name.
        marks: what happened.
        restarts: steps from which training went on.
    """

    name: str
    along: Mapping[str, Floats] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Floats]] = field(default_factory=dict)
    scores: Mapping[str, tuple[Sequence[int], Sequence[float]]] = field(default_factory=dict)
    marks: Sequence[Mark] = ()
    restarts: Sequence[int] = ()


# What is known of a number that a run logs: its title, and how its axis is marked.
_KNOWN: dict[str, tuple[str, dict[str, bool]]] = {
    "loss": (score_name("loss"), {"smooth": True, "log": True, "marked": True}),
    "lr": ("learning rate", {"zero": True}),
    "grad_norm": ("gradient norm, before clipping", {"smooth": True, "log": True, "marked": True}),
    "tokens_per_second": ("tokens a second", {"smooth": True, "zero": True, "large": True}),
    "mfu": ("model FLOPs utilisation", {"smooth": True, "zero": True, "percent": True}),
    "data_wait": ("share of a step that waits for data", {"smooth": True, "zero": True, "percent": True}),
    "memory_gib": ("peak memory (GiB)", {"zero": True}),
}
_SHARES = ("accuracy", "token_accuracy", "detection_precision", "detection_recall", "replaced")
_UNBOUNDED = ("loss", "perplexity", "bits")


def curve_charts(runs: Sequence[RunCurves]) -> list[dict[str, Any]]:
    """The charts of what training logged: those known first, in their order; then whatever else there is."""
    there = {key for run in runs for key in run.curves}
    keys = [key for key in _KNOWN if key in there] + sorted(there - set(_KNOWN))
    return [
        {"kind": "curve", "key": key, "title": _KNOWN[key][0], **_KNOWN[key][1]}
        if key in _KNOWN
        else {"kind": "curve", "key": key, "title": key.replace("_", " "), "smooth": True, "log": True}
        for key in keys
    ]


def score_charts(runs: Sequence[RunCurves]) -> list[dict[str, Any]]:
    """The charts of evaluations: of numbers that never change, none."""
    keys: dict[str, set[float]] = {}
    for run in runs:
        for key, (_, values) in run.scores.items():
            keys.setdefault(key, set()).update(values)
    charts = []
    for key, known in keys.items():
        name, _, score = key.rpartition("/")
        if score == "num_targets" or (len(known) == 1 and score.startswith("num_")):
            continue
        title = f"{name}: {'loss' if score == 'loss' else score_name(score)}"  # of a regression it is not in nats
        axis = {"percent": score in _SHARES, "log": any(word in score for word in _UNBOUNDED)}
        charts.append({"kind": "score", "key": key, "title": title, **axis})
    return charts


def controls(runs: Sequence[RunCurves]) -> Iterator[str]:
    """Runs to show, the axis, smoothing; what the marks mean."""
    buttons = "".join(
        f'<button class="run" type="button" data-run="{number}" aria-pressed="true">{swatch(number)}'
        f"{escape(run.name)}</button>"
        for number, run in enumerate(runs)
    )
    names = (("step", "steps"), ("tokens", "tokens"), ("seconds", "hours"))
    axes = [f'<option value="{key}">{name}</option>' for key, name in names if any(key in run.along for run in runs)]
    yield (
        f'<div class="controls">{buttons}<label>along <select id="curves-along">{"".join(axes)}</select></label>'
        '<label>smoothing <input id="curves-smooth" type="range" min="0" max="0.98" step="0.02" value="0.6" /></label>'
        '<label><input id="curves-log" type="checkbox" /> logarithmic losses and norms</label></div>'
    )
    kinds = {mark.kind for run in runs for mark in run.marks}
    told = [f"{sign} {words}" for kind, (_, sign, words) in SYMBOLS.items() if kind in kinds]
    if any(run.restarts for run in runs):
        told.append(f"{RESTART[0]} {RESTART[1]}")
    told.append("drag over a chart to zoom all of them, double-click to go back")
    yield f'<p class="soft">{escape(" · ".join(told))}</p>'
    yield '<p class="warn" id="curves-word" hidden="hidden"></p>'
    yield '<noscript><p class="warn">The curves are drawn by a script, and scripts are off here.</p></noscript>'


def swatch(number: int) -> str:
    """The colour of a run."""
    return f'<span class="swatch" style="background:var(--run-{number % COLOURS})"></span>'


def figures(charts: Sequence[Mapping[str, Any]], first: int) -> str:
    """Places for charts, the first of which is number `first` of the page."""
    made = "".join(
        f'<figure class="chart"><figcaption>{escape(str(chart["title"]))}</figcaption>'
        f'<div class="plot" data-chart="{number}"></div></figure>'
        for number, chart in enumerate(charts, start=first)
    )
    return f'<div class="charts">{made}</div>'


def numbers(runs: Sequence[RunCurves], charts: Sequence[Mapping[str, Any]]) -> str:
    """What the script reads."""
    plain = {
        "runs": [_plain(run) for run in runs],
        "charts": list(charts),
        "symbols": {kind: symbol for kind, (symbol, _, _) in SYMBOLS.items()},
        "colours": COLOURS,
    }
    text = json.dumps(plain, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    for letter in "<>&\u2028\u2029":  # nothing in it ends the element, whatever the names are
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return f'<script type="application/json" id="curves-numbers">{text}</script>'


def _plain(run: RunCurves) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {}
    for mark in run.marks:
        of_kind = kinds.setdefault(mark.kind, {"kind": mark.kind, "steps": [], "texts": []})
        of_kind["steps"].append(mark.step)
        of_kind["texts"].append(escape(mark.text))  # the library reads tags in what it shows
    return {
        "name": escape(run.name),
        "along": {key: _short(values) for key, values in run.along.items()},
        "curves": {
            key: dict(zip(("mean", "low", "high"), map(_short, values), strict=False))
            for key, values in run.curves.items()
        },
        "scores": {
            key: {"steps": list(steps), "values": _short(values)} for key, (steps, values) in run.scores.items()
        },
        "marks": list(kinds.values()),
        "restarts": list(run.restarts),
    }


def _short(values: Iterable[float]) -> list[float | int | None]:
    """Six digits are more than a chart shows; whole numbers stay; null where there is none."""
    return [
        None if not math.isfinite(value) else int(value) if value == int(value) else float(f"{value:.6g}")
        for value in map(float, values)
    ]


@dataclass(frozen=True)
class Scripts:
    """The two that run: the library, and ours; and what carries them in the body."""

    allowed: tuple[str, str]
    body: str


def scripts() -> Scripts:
    """The plotting library and the script that uses it.

    Raises:
        ValueError: when plotly is not installed.
    """
    library = _library()
    ours = f"//<![CDATA[\n{Path(__file__).with_name('curves.js').read_text(encoding='utf-8')}//]]>"
    body = f'<script type="application/gzip" id="curves-library">{_packed(library)}</script>\n<script>{ours}</script>'
    return Scripts((library, ours), body)


@lru_cache(maxsize=1)
def _packed(library: str) -> str:
    return base64.b64encode(gzip.compress(library.encode(), 9, mtime=0)).decode()


def _library() -> str:
    try:
        module = importlib.import_module("plotly.offline")
    except ImportError as error:
        raise ValueError(
            "the curves of a report are drawn by plotly, which is not installed: pip install 'pretrain[report]'"
        ) from error
    return str(module.get_plotlyjs())
