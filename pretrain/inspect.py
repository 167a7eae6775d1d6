"""The verb `inspect`: the batch of a step, as a person can read it.

What lives here: which batch, what the run says about its step, and how it looks on a terminal. What must not: another
way to make a batch than the trainer's. Nothing is written but the HTML page that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from pretrain.config import RunConfig, config_to_dict, difference
from pretrain.data.batches import Batch, LoadedSplit
from pretrain.data.loader import DataPlane
from pretrain.data.looking.inspection import Inspector, Kind, Row, Token, Totals
from pretrain.data.looking.spelling import NEWLINE, Spelling
from pretrain.data.objectives import evaluation_objective
from pretrain.data.shards import TRAIN
from pretrain.data.validation import ValidationData
from pretrain.files import make_directories, read_manifest, write_bytes
from pretrain.pages.batch import LEGEND, batch_page, describe_piece, describe_row
from pretrain.training.records import findings_of_step, length_of_run, newest_state, numbers_of_step

_ROWS_ON_TERMINAL = 4
_INDENT = 3
_PLACES_ON_PAGE = 1 << 16
_DECIDING = (
    "data.from",
    "data.max_documents_per_row",
    "data.phases",
    "data.sequence_length",
    "data.train",
    "model.architecture",
    "objective",
    "tokenizer",
    "train.batch_tokens",
    "train.seed",
)
"""Keys, or the beginnings of keys, that decide the batch of a step."""
_STYLES: dict[Kind, str] = {
    "plain": "",
    "masked": "black on yellow",
    "random": "black on magenta",
    "kept": "black on green",
    "ahead": "blue",
    "none": "dim",
    "output": "green",
}
_MARKS: dict[Kind, str] = {
    "plain": "",
    "masked": "▣",
    "random": "◇",
    "kept": "◆",
    "ahead": "",
    "none": "",
    "output": "",
}


@dataclass(frozen=True)
class Inspected:
    """A batch with all that is known of it.

    Attributes:
        title: the step and the run.
        batch: what the trainer is fed at this step.
        facts: lines about the batch and its step.
        warnings: lines that must not be overlooked.
        totals: counts over all of the batch.
        rows: the numbers of the rows that can be shown, of the asked split.
        inspector: takes them apart.
    """

    title: str
    batch: Batch
    facts: tuple[str, ...]
    warnings: tuple[str, ...]
    totals: Totals
    rows: tuple[int, ...]
    inspector: Inspector


def inspect_step(config: RunConfig, step: int, *, split: str = TRAIN) -> Inspected:
    """Make the batch of a step again, and gather what the run says about it. Reads alone.

    Args:
        config: the run configuration; its data and tokenizer must be there, its training directory need not.
        step: as the log counts, from 1; for a validation split, the batch of its pass.
        split: train, train-NAME for the rows of one source alone, or a validation split.

    Raises:
        ArtifactError: when the data or the tokenizer is missing, or does not fit.
        ValueError: when there is no such step or split.
    """
    if step < 1:
        raise ValueError(f"--step {step}: steps count from 1, as in the log")
    known = read_manifest(config.directory / "data", "data").facts["splits"]
    if split != TRAIN and split not in known:
        raise ValueError(f"--split {split}: the data have {', '.join(dict.fromkeys((TRAIN, *known)))}")
    if split in DataPlane.validation_splits(config):
        return _inspect_validation(config, step, split)
    data = DataPlane.from_config(config, keep_plan=False)
    state = newest_state(config.directory / "train")
    length = length_of_run(config, config.directory / "train", data.num_rows, state)
    warnings = []
    if length is not None:
        data.for_run(length.steps)
        if step > length.steps:
            warnings.append(
                f"the run ends at step {length.steps:,} ({length.said_by} says so): this batch is beyond it"
            )
    elif any(isinstance(phase.until, str) for phase in config.data.phases):
        warnings.append(
            "data.phases are shares of a run whose length is not known yet (a budget of time is measured when training "
            "starts), so this is the batch of the first phase"
        )
    batch = data.batch(step - 1)
    seen, found = _said_of(config.directory / "train", step, batch)
    of = f" of {length.steps:,}" if length is not None else ""
    return _inspected(
        config,
        f"{config.name}: step {step:,}{of}",
        batch,
        data.splits,
        seen,
        [*warnings, *_differences(config, data, state), *found],
        source=split.removeprefix(TRAIN).removeprefix("-") if split != TRAIN else None,
    )


def _inspect_validation(config: RunConfig, number: int, split: str) -> Inspected:
    """Batch `number`, from 1, of the pass over a validation split."""
    loaded = LoadedSplit.of(config, split, objective=evaluation_objective(config.objective), keep_plan=False)
    data = ValidationData(loaded, config.objective)
    one_pass = data.batches(config.evaluate.max_tokens)
    batches = math.ceil(one_pass.num_rows / data.rows_per_batch)
    if number > batches:
        raise ValueError(f"--step {number}: a pass over `{split}` has {batches:,} batches")
    batch = next(batch for at, batch in enumerate(one_pass, start=1) if at == number)
    return _inspected(config, f"{config.name}: {split}, batch {number:,} of {batches:,}", batch, [loaded], [], [])


def _inspected(
    config: RunConfig,
    title: str,
    batch: Batch,
    splits: Sequence[LoadedSplit],
    facts: Sequence[str],
    warnings: Sequence[str],
    source: str | None = None,
) -> Inspected:
    spelling = Spelling(config.directory / "tokenizer", splits[0].tokens)
    inspector = Inspector(config.directory / "data", splits, spelling)
    totals = inspector.totals(batch)
    rows = list(range(totals.rows))
    if source is not None:
        number = [split.source for split in splits].index(source)
        rows = [int(row) for row in np.flatnonzero(batch.row_ids[:, 0] == number)]
    return Inspected(title, batch, (*_count(totals), *facts), tuple(warnings), totals, tuple(rows), inspector)


# --- what is known of the step --------------------------------------------------------------------------------------


def _count(totals: Totals) -> list[str]:
    lines = [
        f"{totals.rows:,} rows of {totals.length:,} places: {totals.tokens:,} tokens ({totals.utilisation:.1%} used), "
        f"{totals.pieces:,} documents or parts of one, {totals.targets:,} targets"
    ]
    counted = [f"{count:,} {kind}" for kind in ("masked", "random", "kept") if (count := totals.kinds.get(kind))]
    if counted:
        lines.append(f"targets ({totals.targets / max(1, totals.tokens):.1%} of the tokens): {', '.join(counted)}")
    if totals.pairs:
        said = " and ".join(f"{count:,} of label {label}" for label, count in totals.pairs.items())
        lines.append(f"pairs of segments: {said} (0: the second follows the first)")
    if any(totals.sources):
        lines.append("rows by source: " + ", ".join(f"{name} {count:,}" for name, count in totals.sources.items()))
    return lines


def _said_of(directory: Path, step: int, batch: Batch) -> tuple[list[str], list[str]]:
    """(facts, warnings) from the run's own records of a step."""
    facts, warnings = [], []
    numbers = numbers_of_step(directory, step)
    if numbers is not None:
        said = (("loss", "loss"), ("grad_norm", "gradient norm"), ("lr", "learning rate"))
        facts.append("the log: " + ", ".join(f"{name} {numbers[key]:.6g}" for key, name in said if key in numbers))
    for record in findings_of_step(directory, step):
        became = "the update was not made" if record.get("skipped", True) else "the update was made"
        loss, norm = record.get("loss"), record.get("grad_norm")
        warnings.append(f"{record.get('why', 'skipped')}: loss {loss}, gradient norm {norm}; {became}")
        rows = record.get("rows")
        if rows is not None and sorted(rows) != sorted(batch.row_ids.tolist()):
            warnings.append(
                "skipped.jsonl names other rows for this step than these: the data or the keys have changed"
            )
    if (
        not warnings
        and numbers is not None
        and not all(math.isfinite(numbers.get(key, 0.0)) for key in ("loss", "grad_norm"))
    ):
        warnings.append(f"not finite: loss {numbers['loss']}, gradient norm {numbers.get('grad_norm')}")
    return facts, warnings


def _differences(config: RunConfig, data: DataPlane, state: dict[str, Any] | None) -> list[str]:
    """Why the run's checkpoint was not trained on this batch; empty when it was."""
    if state is None:
        return []
    warnings = []
    try:
        data.check(state["data"])
    except ValueError as error:
        warnings.append(f"this is not what the newest checkpoint was trained on: {error}")
    for key, (was, now) in difference(state["config"], config_to_dict(config)).items():
        if not warnings and key.startswith(_DECIDING):
            warnings.append(f"this is not what the newest checkpoint was trained on: {key} was {was}, is {now}")
    return warnings


# --- showing --------------------------------------------------------------------------------------------------------


def parse_rows(text: str | None, available: Sequence[int], most: int) -> list[int]:
    """The rows that `--rows A:B` (or A, or A: or :B) names of those there are; the first `most` when left out.

    Raises:
        ValueError: when it is no range, or holds none of them.
    """
    if text is None:
        return list(available[:most])
    first, colon, last = text.partition(":")
    if not all(part == "" or part.isdecimal() for part in (first, last)) or not (first or colon):
        raise ValueError(f"--rows {text}: write A:B, rows A up to B - 1, counted from 0")
    start = int(first or 0)
    stop = (int(last) if last else None) if colon else start + 1
    chosen = [row for row in available if row >= start and (stop is None or row < stop)]
    if not chosen:
        raise ValueError(f"--rows {text}: none of the {len(available)} rows lies in it")
    return chosen


def show(inspected: Inspected, console: Console, *, rows: str | None = None) -> None:
    """Print the batch; without `rows`, its first few rows."""
    chosen = parse_rows(rows, inspected.rows, _ROWS_ON_TERMINAL)
    console.print(Text(inspected.title, style="bold"))
    for line in inspected.facts:
        console.print(Text(line))
    for line in inspected.warnings:
        console.print(Text(f"! {line}", style="bold red"))
    console.print(_legend(inspected.totals))
    for number in chosen:
        _show_row(inspected.inspector.row(inspected.batch, number), console)
    if len(chosen) < len(inspected.rows) and rows is None:
        console.print(
            Text(f"\n{len(inspected.rows) - len(chosen):,} rows more: --rows A:B, or --html FILE", style="dim")
        )


def _legend(totals: Totals) -> Text:
    legend = Text("│", style="dim")
    legend.append(" ends a token", style="dim")
    for kind in LEGEND:
        if kind not in totals.kinds:
            continue
        legend.append(" · ", style="dim")
        sample = {"random": "◇shown→token", "ahead": "token→target", "none": "token∎"}.get(kind, f"{_MARKS[kind]}token")
        legend.append(sample, style=_STYLES[kind])
        short = {"masked": "hidden behind [MASK]", "random": "replaced at random", "kept": "left, and predicted"}
        rest = {"ahead": "its target is not the next place", "none": "no target", "output": "written by the decoder"}
        legend.append(f" {(short | rest)[kind]}", style="dim")
    return legend


def _show_row(row: Row, console: Console) -> None:
    console.print()
    console.print(Text(describe_row(row), style="bold"))
    for number, piece in enumerate(row.pieces, start=1):
        console.print(Padding(Text(f"{number}. {describe_piece(piece)}", style="dim"), (0, 0, 0, 1), expand=False))
        for line in _lines(piece.tokens, console.width - _INDENT):
            console.print(Padding(line, (0, 0, 0, _INDENT), expand=False))
    if row.padding:
        console.print(
            Padding(Text(f"▒ {row.padding:,} places of padding", style="dim"), (0, 0, 0, _INDENT), expand=False)
        )


def _lines(tokens: Sequence[Token], width: int) -> Iterator[Text]:
    """The tokens in lines of at most `width` cells, broken between tokens, and behind a newline of the text."""
    line = Text(overflow="fold")
    for token in tokens:
        style = _STYLES[token.kind] or ("cyan" if token.is_special else "")
        *before, last = _spelled(token).split(NEWLINE)
        parts = [*(f"{part}{NEWLINE}" for part in before), *([last] if last else [])]
        for number, part in enumerate(parts, start=1):
            if line.cell_len and line.cell_len + cell_len(part) + 1 > width:
                yield line
                line = Text(overflow="fold")
            line.append(part, style=style or None)
            if number == len(parts):
                line.append("│", style="dim")
            if part.endswith(NEWLINE):
                yield line
                line = Text(overflow="fold")
    if line.cell_len:
        yield line


def _spelled(token: Token) -> str:
    """The token's text with its marks; one before the text stands at its first letter."""
    bare = token.text.lstrip(" ")
    text = token.text[: len(token.text) - len(bare)] + _MARKS[token.kind] + bare
    if token.kind == "random":
        return f"{_MARKS[token.kind]}{token.shown}→{token.text}"
    if token.kind == "ahead":
        return f"{text}→{token.target_text}"
    return f"{text}∎" if token.kind == "none" else text


def write_page(inspected: Inspected, path: Path, *, rows: str | None = None) -> int:
    """Write the batch as one HTML file; without `rows`, as many as a browser shows with ease. Returns how many."""
    most = max(1, _PLACES_ON_PAGE // inspected.totals.length)
    chosen = parse_rows(rows, inspected.rows, most)
    facts = list(inspected.facts)
    if len(chosen) < len(inspected.rows):
        facts.append(f"{len(chosen):,} of these rows are shown; --rows A:B chooses others")
    made = (inspected.inspector.row(inspected.batch, number) for number in chosen)
    html = batch_page(inspected.title, facts, inspected.warnings, made, set(inspected.totals.kinds))
    make_directories(path.parent)
    write_bytes(path, html.encode())
    return len(chosen)
