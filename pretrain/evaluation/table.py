"""The scores of one model, or of several beside each other, as a table.

What lives here: which numbers are shown, how they are called and written. What must not: printing it, or any score.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from pretrain.score_names import score_name

_OF_TEXT = {
    "loss": "{:.4f}",
    "perplexity": "{:,.2f}",
    "bits_per_byte": "{:.4f}",
    "bleu": "{:.2f}",
    "chrf": "{:.2f}",
    "accuracy": "{:.4f}",
    "pseudo_perplexity": "{:,.2f}",
    "tokens": "{:,}",
    "bytes": "{:,}",
    "unknown_tokens": "{:,}",
}
_OF_RETRIEVAL = ("recall_at_1", "recall_at_10", "mrr_at_10", "ndcg_at_10")
_MOST_GROUPS = 15
"""A breakdown into more is left to the JSON."""


def score_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each score, a column for each model.

    Args:
        models: scores as `evaluate_model` gives them, at least one.
    """
    alone = len(models) == 1
    first = models[0]["model"]
    table = Table(title=f"{first['source']}  ({first['class']})" if alone else None, show_header=not alone)
    table.add_column("")
    rows: dict[str, list[str]] = {}
    for number, scores in enumerate(models):
        table.add_column(f"{scores['model']['source']}\n({scores['model']['class']})", overflow="fold")
        for label, value in _rows(scores):
            rows.setdefault(label, [""] * len(models))[number] = value
    for label, cells in rows.items():
        table.add_row(label, *cells)
    return table


def _rows(scores: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from _of_text(scores)
    for name, found in scores.get("minimal_pairs", {}).items():
        yield f"{name}: minimal pairs", f"{_share(found['accuracy'])} of {found['pairs']:,}{_ties(found)}"
        # The widest kind of group that parts them; the JSON has all.
        groups: Mapping[str, Any] = next((g for g in found["by"].values() if 1 < len(g) <= _MOST_GROUPS), {})
        yield from ((f"  {name}, {group}", _share(one["accuracy"])) for group, one in groups.items())
        yield f"  {name} by", found["scored_by"]
    for name, found in scores.get("similarity", {}).items():
        for kind in ("spearman", "pearson"):
            value = "none, all cosines are the same" if found[kind] is None else f"{found[kind]:.4f}"
            yield f"{name}: {score_name(kind)}", f"{value}{_cut(found)}"
    for name, found in scores.get("retrieval", {}).items():
        for key in _OF_RETRIEVAL:
            yield f"{name}: {score_name(key)}", f"{found[key]:.4f}{_cut(found)}"
        yield f"  {name}", f"{found['queries']:,} queries, {found['candidates']:,} candidates"
    for task, found in scores.get("tasks", {}).items():
        for metric, value in found.items():
            if metric in ("examples", "num_fewshot", "version") or metric.endswith("_stderr"):
                continue
            error = found.get(f"{metric}_stderr")
            yield f"{task}: {metric}", f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
        shots = f", {found['num_fewshot']} shots" if found.get("num_fewshot") else ""
        if "examples" in found:
            yield f"  {task}", f"{found['examples']:,} examples{shots}"
    yield "precision", scores["precision"]


def _of_text(scores: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, form in _OF_TEXT.items():
        label = score_name(key) + (" at 15% masks" if key == "accuracy" else "")
        if key in scores:
            yield label, form.format(scores[key])
        if key == "pseudo_perplexity" and (sample := scores.get("pseudo_perplexity_sample")):
            yield "  over", f"{sample['sentences']:,} of {sample['of_lines']:,} lines"
        if signature := scores.get(f"{key}_signature"):
            yield f"  {label} as", signature
    if context := scores.get("context"):
        overlap = f", stride {context['stride']:,}" if "stride" in context else ""
        yield "context", f"{context['window']:,} tokens{overlap}"
    if "cut_off" in scores:
        ended = f"{scores['cut_off']:,} cut off after {scores['max_new_tokens']} tokens"
        yield "outputs", f"{scores['num_beams']} beams; {ended}"
    if text := scores.get("text"):
        units = "pairs" if "bleu" in scores else "documents"
        yield "text", f"{text['documents']:,} {units}, sha256 {text['sha256'][:12]}"


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def _ties(found: Mapping[str, Any]) -> str:
    return f", {found['ties']:,} ties" if found["ties"] else ""


def _cut(found: Mapping[str, Any]) -> str:
    return f" ({found['cut']:,} texts cut)" if found["cut"] else ""
