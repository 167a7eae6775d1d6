"""The page of `pretrain report`: runs side by side, in curves, tables, samples and attention maps.

What lives here: what the page says of runs, given as plain values. What must not: reading them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pretrain.pages.attention import LEGEND, Stack, attention_parts
from pretrain.pages.attention import STYLE as ATTENTION_STYLE
from pretrain.pages.curves import STYLE as CURVES_STYLE
from pretrain.pages.curves import (
    RunCurves,
    Scripts,
    controls,
    curve_charts,
    figures,
    numbers,
    score_charts,
    swatch,
)
from pretrain.pages.data import data_parts, run_parts
from pretrain.pages.page import escape, page, paragraph

NOT_KNOWN = "–"
_MOST_STEPS = 9  # of samples, of one prompt and run
_MOST_EVENTS = 20  # of one run in the table
_STYLE = """<style>
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .4rem 0; } nav a { color: inherit; }
h2 { border-top: 1px solid var(--line); padding-top: 1.2rem; scroll-margin-top: 3.5rem; }
h3 { font-size: .95rem; margin: 1rem 0 .2rem; } h4 { font-size: .9rem; margin: .9rem 0 .2rem; }
h1, summary, h3 { overflow-wrap: anywhere; }
summary { cursor: pointer; } details { margin: .4rem 0; }
.compare th, .compare td { min-width: 5rem; padding-top: .2rem; padding-bottom: .2rem; }
.compare thead th { color: var(--ink); font-weight: 600; position: relative; padding-left: 1.1em;
  overflow-wrap: anywhere; }
.compare thead .swatch { position: absolute; left: 0; top: .65em; }
summary code { background: var(--card); border-radius: 3px; padding: .1rem .3rem; font: 13px ui-monospace, monospace;
  white-space: pre-wrap; }
.compare td { padding-left: 1.1em; }
.compare tr.differs td { background: color-mix(in srgb, var(--masked) 40%, var(--ground)); }
.compare tbody tr { border-bottom: 1px solid var(--line); }
.compare.values td { font: 13px/1.5 ui-monospace, monospace; max-width: 26rem; } .compare.values th { font-size: 13px; }
.compare.values td, .compare.values tbody th { overflow-wrap: anywhere; min-width: 7rem; }
.over { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem .8rem; margin: .4rem 0 1rem; }
.over .sample { white-space: pre-wrap; margin: 0; max-height: 9rem; overflow-y: auto; }
.over .when { color: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; padding-top: .35rem; }
.over .guesses { color: var(--soft); font-size: 12px; display: block; white-space: normal; }
.indent { padding-left: .8rem; border-left: 2px solid var(--line); }
</style>"""


@dataclass(frozen=True)
class RunPage:
    """One run, as the page shows it. Every text is plain.

    Attributes:
        name: of the run, unlike the others'.
        directory: where it lies.
        facts: the summary, by name.
        notes: what a reader should be warned of.
        remarks: what a reader should know of the curves.
        curves: its numbers.
        events: step, what, words: of skips, spikes, starts, changes.
        samples: `step`, `prompt`, `text`, of a masked model `candidates` too.
        data: the report on its data, and of which digest; None where there is none.
        tokenizer: the figures of its tokenizer, by name.
        attention: sentences and their maps.
        config: every key, dotted, and its value.
        left_out: what is missing by section, and why.
    """

    name: str
    directory: str
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    remarks: Sequence[str] = ()
    curves: RunCurves = field(default_factory=lambda: RunCurves(""))
    events: Sequence[tuple[int, str, str]] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    data: tuple[str, Mapping[str, Any]] | None = None
    tokenizer: Mapping[str, str] = field(default_factory=dict)
    attention: Sequence[tuple[str, Sequence[Stack]]] = ()
    config: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


SECTIONS = {
    "result": "result",
    "curves": "curves",
    "evaluations": "evaluations",
    "events": "what happened",
    "samples": "samples over time",
    "data": "data and packing",
    "tokenizer": "tokenizer",
    "attention": "attention",
    "configuration": "configuration",
}


def report_page(runs: Sequence[RunPage], scripts: Scripts, made: str) -> str:
    """The whole page; `made` says when and by what."""
    curves = [run.curves for run in runs]
    steps, scores = curve_charts(curves), score_charts(curves)
    parts: dict[str, list[str]] = {
        "result": list(_result(runs)),
        "curves": [*controls(curves), *_remarks(runs), figures(steps, 0)] if steps else [],
        "evaluations": [figures(scores, len(steps))] if scores else [],
        "events": list(_events(runs)),
        "samples": list(_samples(runs)),
        "data": list(_data(runs)),
        "tokenizer": list(_compared(runs, [run.tokenizer for run in runs])),
        "attention": list(_attention(runs)),
        "configuration": list(_config(runs)),
    }
    links = "".join(f'<a href="#{key}">{escape(SECTIONS[key])}</a>' for key in SECTIONS)
    body = [_STYLE, CURVES_STYLE, ATTENTION_STYLE, f"<nav>{links}</nav>"]
    for key, title in SECTIONS.items():
        body.append(f'<h2 id="{key}">{escape(title)}</h2>')
        body += parts[key]
        for run in runs:
            if key in run.left_out:
                body.append(paragraph(f"{run.name}: {run.left_out[key]}", "soft"))
    body += [paragraph(made, "soft"), numbers(curves, [*steps, *scores]), scripts.body]
    names = ", ".join(run.name for run in runs)
    return page(f"report: {names}", body, images=True, scripts=scripts.allowed)


def _head(runs: Sequence[RunPage]) -> str:
    cells = "".join(f"<th>{swatch(number)}{escape(run.name)}</th>" for number, run in enumerate(runs))
    return f"<thead><tr><th></th>{cells}</tr></thead>"


def _compared(
    runs: Sequence[RunPage], values: Sequence[Mapping[str, str]], style: str = "", *, mark: bool = False
) -> Iterator[str]:
    """A row for each fact, a column for each run; nothing when there are no facts."""
    keys = list(dict.fromkeys(key for facts in values for key in facts))
    if not keys:
        return
    rows = []
    for key in keys:
        found = [facts.get(key, NOT_KNOWN) for facts in values]
        differs = ' class="differs"' if mark and len(set(found)) > 1 else ""
        cells = "".join(f"<td>{escape(value)}</td>" for value in found)
        rows.append(f"<tr{differs}><th>{escape(key)}</th>{cells}</tr>")
    table = f'<table class="compare {style}">{_head(runs)}<tbody>{"".join(rows)}</tbody></table>'
    yield f'<div class="wide">{table}</div>'


def _result(runs: Sequence[RunPage]) -> Iterator[str]:
    yield from _compared(runs, [run.facts for run in runs])
    for run in runs:
        yield from (paragraph(f"{run.name}: {note}", "warn") for note in run.notes)
    yield from (paragraph(run.directory, "soft") for run in runs)


def _remarks(runs: Sequence[RunPage]) -> Iterator[str]:
    for run in runs:
        yield from (paragraph(f"{run.name}: {remark}", "soft") for remark in run.remarks)


def _events(runs: Sequence[RunPage]) -> Iterator[str]:
    for number, run in enumerate(runs):
        if not run.events:
            continue
        yield f"<h3>{swatch(number)}{escape(run.name)}</h3>"
        if len(run.events) > _MOST_EVENTS:
            yield paragraph(
                f"{len(run.events):,} entries; the first and the last {_MOST_EVENTS // 2} are shown, "
                "train/skipped.jsonl holds all skips and spikes",
                "soft",
            )
        half = _MOST_EVENTS // 2
        shown = run.events if len(run.events) <= _MOST_EVENTS else [*run.events[:half], *run.events[-half:]]
        rows = "".join(
            f'<tr><td class="n">{step:,}</td><td>{escape(what)}</td><td>{escape(words)}</td></tr>'
            for step, what, words in shown
        )
        head = '<thead><tr><th class="n">step</th><th>what</th><th></th></tr></thead>'
        yield f'<div class="wide"><table>{head}<tbody>{rows}</tbody></table></div>'


def _samples(runs: Sequence[RunPage]) -> Iterator[str]:
    prompts = list(dict.fromkeys(str(sample["prompt"]) for run in runs for sample in run.samples))
    if prompts:
        yield paragraph("What the model made of the prompts at each evaluation, by the likeliest token.", "soft")
    for place, prompt in enumerate(prompts):
        rows, told = [], ""
        for number, run in enumerate(runs):
            of_run = [sample for sample in run.samples if sample["prompt"] == prompt]
            shown = [of_run[chosen] for chosen in spread(len(of_run), _MOST_STEPS)]
            if len(shown) < len(of_run):
                told = f" (of up to {len(of_run):,} evaluations {_MOST_STEPS} are shown)"
            rows += [(number, int(sample["step"]), sample) for sample in shown]
        lines = "".join(
            f'<div class="when">{swatch(number)}{step:,}</div><div class="sample">{_sample(sample)}</div>'
            for number, step, sample in rows
        )
        opened = ' open="open"' if place == 0 else ""
        yield f'<details{opened}><summary><code>{escape(prompt)}</code><span class="soft">{told}</span></summary>'
        yield f'<div class="over">{lines}</div></details>'


def _sample(sample: Mapping[str, Any]) -> str:
    text = escape(str(sample["text"]))
    if not text.strip():
        text = f'<span class="soft">({len(text)} spaces)</span>' if text else '<span class="soft">(nothing)</span>'
    gaps = sample.get("candidates") or ()
    guesses = " | ".join(", ".join(f"{word or '(space)'} {chance:.0%}" for word, chance in gap) for gap in gaps)
    return f'{text}<span class="guesses">{escape(guesses)}</span>' if guesses else text


def spread(count: int, most: int) -> list[int]:
    """At most `most` places of `count`, evenly, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(number * (count - 1) / (most - 1)) for number in range(most)})


def _data(runs: Sequence[RunPage]) -> Iterator[str]:
    same: dict[str, list[RunPage]] = {}
    for run in runs:
        if run.data is not None:
            same.setdefault(run.data[0], []).append(run)
    for number, members in enumerate(same.values()):
        opened = ' open="open"' if number == 0 else ""
        names = ", ".join(run.name for run in members)
        assert members[0].data is not None
        yield f'<details{opened}><summary>{escape(names)}</summary><div class="indent">'
        yield from data_parts(members[0].data[1], "h3")
        for other in members[1:]:
            yield from run_parts(other.data[1], "h3") if other.data is not None else ()
        yield "</div></details>"


def _attention(runs: Sequence[RunPage]) -> Iterator[str]:
    if any(run.attention for run in runs):
        yield paragraph(LEGEND)
    for number, run in enumerate(runs):
        for place, (text, stacks) in enumerate(run.attention):
            opened = ' open="open"' if place == 0 and number == 0 else ""
            yield f"<details{opened}><summary>{swatch(number)}{escape(run.name)}: {escape(text)}</summary>"
            yield '<div class="indent">'
            yield from attention_parts(stacks, "h4")
            yield "</div></details>"


def _config(runs: Sequence[RunPage]) -> Iterator[str]:
    values = [run.config for run in runs]
    keys = list(dict.fromkeys(key for config in values for key in config))
    if len(runs) > 1 and keys:
        differing = [key for key in keys if len({config.get(key) for config in values}) > 1]
        kept = [{key: config[key] for key in differing if key in config} for config in values]
        yield f"<h3>{len(differing):,} of {len(keys):,} keys differ</h3>"
        yield from _compared(runs, kept, "values", mark=True)
    if keys:
        opened = "" if len(runs) > 1 else ' open="open"'
        yield f"<details{opened}><summary>all {len(keys):,} keys</summary>"
        yield from _compared(runs, values, "values", mark=True)
        yield "</details>"
