"""The verb `data`: what the prepared data are, in numbers and samples.

What lives here: gathering the report as plain data, and how it looks on a terminal. What must not: counting
(`pretrain.data.looking.statistics`), or any change of the data. Nothing is written but the HTML page that is asked for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pretrain.config import RunConfig
from pretrain.data.batches import LoadedSplit
from pretrain.data.loader import DataPlane
from pretrain.data.looking.spelling import Spelling, visible
from pretrain.data.looking.statistics import (
    MOST_DOCUMENTS,
    SplitCounts,
    Told,
    count_packing,
    count_shared,
    count_split,
    find_repeated,
    first_of,
)
from pretrain.data.objectives import evaluation_objective
from pretrain.data.preparing.parts import is_training
from pretrain.data.vocabulary import SpecialIds
from pretrain.files import Manifest, make_directories, read_manifest, write_bytes
from pretrain.pages.data import Block, blocks_of, data_page
from pretrain.training.records import length_of_run, newest_state

Report = dict[str, Any]

_TOP_TOKENS = 20
_SAMPLE_TOKENS = 100
_SAMPLE_CHARACTERS = 300
_SAMPLES_A_STEP = 3


def report_data(config: RunConfig, *, console: Console | None = None) -> Report:
    """Everything that is known of a run's prepared data, as plain data.

    Reads all ids once, in blocks: memory is bounded by about 16 bytes a document (at most `MOST_DOCUMENTS` of them;
    past that repetition is estimated), the documents' ends, and the packing plan.

    Args:
        config: the run configuration; its data and tokenizer must be there.
        console: where progress is shown; None is silent.

    Raises:
        ArtifactError: when the data or the tokenizer is missing, or does not fit.
    """
    directory = config.directory / "data"
    manifest = read_manifest(directory, "data")
    plane = DataPlane.from_config(config, keep_plan=False)
    names = list(manifest.facts["splits"])
    loaded = {split.name.rpartition("/")[2]: split for split in plane.splits}
    splits = {name: loaded[name] if name in loaded else _load(config, name) for name in names}
    special = SpecialIds.from_facts(manifest.facts["tokenizer"])
    share = min(1.0, MOST_DOCUMENTS / max(1, sum(facts["documents"] for facts in manifest.facts["splits"].values())))
    started = time.perf_counter()
    total = sum(split.store.num_tokens for split in splits.values())
    with _progress(total, console) as told:
        counts = {
            name: count_split(split.store, special.vocab_size, share=share, told=told) for name, split in splits.items()
        }
    seconds = time.perf_counter() - started
    spelling = Spelling(config.directory / "tokenizer", special)
    report: Report = {
        "name": config.name,
        "directory": str(directory),
        "sequence_length": config.data.sequence_length,
        "splits": {name: _split(manifest.facts["splits"][name], splits[name], counts[name]) for name in names},
        "run": _run(config, plane),
        "repetition": _repetition(splits, counts, share, spelling),
        "vocabulary": _vocabulary(counts, special, spelling),
        **_left_out(directory, manifest),
        "scan": {"tokens": total, "seconds": round(seconds, 3), "tokens_per_second": round(total / max(seconds, 1e-9))},
    }
    report["warnings"] = _warnings(report)
    return report


def _load(config: RunConfig, split: str) -> LoadedSplit:
    objective = config.objective if is_training(split) else evaluation_objective(config.objective)
    return LoadedSplit.of(config, split, objective=objective, keep_plan=False)


@contextmanager
def _progress(total: int, console: Console | None) -> Iterator[Told]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"))
    quiet = console is None or not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet, transient=True) as bar:
        task = bar.add_task("reading the shards", total=total, rate="")
        started, done = time.perf_counter(), 0

        def told(tokens: int) -> None:
            nonlocal done
            done += tokens
            rate = f"{done / max(1e-9, time.perf_counter() - started) / 1e6:,.0f} M tokens/s"
            bar.update(task, completed=done, rate=rate)

        yield told


# --- gathering ------------------------------------------------------------------------------------------------------


def _split(facts: Mapping[str, Any], split: LoadedSplit, counts: SplitCounts) -> Report:
    packing = count_packing(split.plan)
    return {
        "source": split.source,
        **{key: facts[key] for key in ("documents", "tokens", "bytes")},
        "bytes_per_token": round(facts["bytes"] / max(1, facts["tokens"]), 4),
        "documents_without_tokens": counts.lengths.empty,
        "tokens_a_document": {
            "mean": round(facts["tokens"] / max(1, facts["documents"]), 2),
            "quantiles": counts.lengths.quantiles(),
            "histogram": counts.lengths.histogram(),
        },
        "packing": {
            **asdict(packing),
            "utilisation": round(packing.utilisation, 6),
            "pieces_a_row": round(packing.pieces / max(1, packing.rows), 3),
            "documents_a_row": round(packing.documents / max(1, packing.rows), 3),
            "cut_share": round(packing.cut_documents / max(1, packing.documents), 6),
        },
    }


def _run(config: RunConfig, plane: DataPlane) -> Report:
    """How often the configured run reads each source, as far as its length is known."""
    directory = config.directory / "train"
    length = length_of_run(config, directory, plane.num_rows, newest_state(directory))
    told: list[str] = []
    samples = None
    if length is not None:
        try:
            told = plane.for_run(length.steps)
        except ValueError as error:
            told = [str(error)]
        samples = length.steps * plane.rows_per_batch
    if plane.mixture is not None and samples is not None:
        end = samples if plane.mixture.end is None else min(samples, plane.mixture.end)
        drawn: list[float | None] = [float(count) for count in plane.mixture.counts(end)]
    elif plane.mixture is None and samples is not None:
        drawn = [samples * rows / plane.num_rows for rows in plane.rows]
    else:
        drawn = [None] * len(plane.rows)
    sources = [
        {
            "name": name,
            "rows": rows,
            "drawn": None if count is None else round(count),
            "share": None if count is None or not samples else round(count / samples, 6),
            "epochs": None if count is None or not rows else round(count / rows, 4),
        }
        for name, rows, count in zip(plane.sources, plane.rows, drawn, strict=True)
    ]
    return {
        "steps": length.steps if length is not None else None,
        "said_by": length.said_by if length is not None else None,
        "rows_a_step": plane.rows_per_batch,
        "rows_an_epoch": plane.num_rows,
        "sources": sources,
        "told": told,
    }


def _repetition(
    splits: Mapping[str, LoadedSplit], counts: Mapping[str, SplitCounts], share: float, spelling: Spelling
) -> Report:
    training = [name for name in splits if is_training(name)]
    repeated = find_repeated([counts[name].hashes for name in training], share=share)
    groups = []
    for copies, wanted in repeated.groups:
        found = ((name, first_of(splits[name].store, counts[name], wanted)) for name in training)
        split, ids = next((name, ids) for name, ids in found if ids is not None)
        text = spelling.text(ids[:_SAMPLE_TOKENS].tolist())
        groups.append({"copies": copies, "split": split, "tokens": len(ids), "text": text[:_SAMPLE_CHARACTERS]})
    held_out = {
        name: {
            "documents": len(some.hashes) if share >= 1.0 else round(len(some.hashes) / share),
            "copies": find_repeated([some.hashes], share=share).copies,
            "in_training": count_shared(some.hashes, [counts[other].hashes for other in training], share=share),
        }
        for name, some in counts.items()
        if name not in training
    }
    return {
        "documents": repeated.documents,
        "copies": repeated.copies,
        "share": round(repeated.copies / max(1, repeated.documents), 6),
        "looked_at": round(share, 6),
        "groups": groups,
        "held_out": held_out,
    }


def _vocabulary(counts: Mapping[str, SplitCounts], special: SpecialIds, spelling: Spelling) -> Report:
    total = np.zeros(special.vocab_size, dtype=np.int64)
    for name, some in counts.items():
        if is_training(name):
            total += some.token_counts
    tokens = int(total.sum())
    useful = ~special.is_special
    unused = int(np.count_nonzero(useful & (total == 0)))
    top = [int(token) for token in np.argsort(-total, kind="stable")[:_TOP_TOKENS] if total[token]]
    return {
        "size": special.vocab_size,
        "without_special": int(useful.sum()),
        "unused": unused,
        "unused_share": round(unused / max(1, int(useful.sum())), 6),
        "unknown": int(total[special.unk]) if special.unk is not None else 0,
        "unknown_share": round(int(total[special.unk]) / max(1, tokens), 8) if special.unk is not None else 0.0,
        "top": [
            {
                "id": token,
                "token": spelling.alone(token),
                "count": int(total[token]),
                "share": round(int(total[token]) / max(1, tokens), 6),
            }
            for token in top
        ],
    }


def _left_out(directory: Path, manifest: Manifest) -> Report:
    """What did not become data, and why: bad lines, empty documents, what filters and deduplication removed."""
    facts = manifest.facts
    samples: dict[str, list[Report]] = {}
    for sample in _lines(directory / "removed.jsonl"):
        of_step = samples.setdefault(str(sample.get("step", "")), [])
        if len(of_step) < _SAMPLES_A_STEP:
            of_step.append({**sample, "text": str(sample.get("text", ""))[:_SAMPLE_CHARACTERS]})
    files = list(_lines(directory / "files.jsonl"))
    encodings: dict[str, int] = {}
    for file in files:
        if "encoding" in file:
            encodings[str(file["encoding"])] = encodings.get(str(file["encoding"]), 0) + 1
    bad = facts.get("bad", {})
    worst = sorted((file for file in files if file.get("bad")), key=lambda file: -int(file["bad"]))
    return {
        "kept_out": [{**step, "samples": samples.get(str(step["step"]), [])} for step in facts.get("kept_out", ())],
        "bad": {
            "count": bad.get("count", 0),
            "by_kind": bad.get("by_kind", {}),
            "by_file": {file["name"]: file["bad"] for file in worst[:10]},
            "files_with_bad": len(worst),
            "named": bad.get("named", []),
        },
        "empty": facts.get("empty", 0),
        "files": len(files),
        "encodings": encodings,
    }


def _lines(path: Path) -> list[Report]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _warnings(report: Report) -> list[str]:
    """What a person should look into."""
    lines = list(report["run"]["told"])
    for name, held_out in report["repetition"]["held_out"].items():
        if held_out["in_training"]:
            lines.append(
                f"{held_out['in_training']:,} of {held_out['documents']:,} documents of {name} stand in the training "
                "data too, so its loss flatters: data.decontaminate leaves them out"
            )
    if report["repetition"]["share"] > 0.01:
        lines.append(
            f"{report['repetition']['share']:.1%} of the training documents repeat an earlier one: data.dedup: exact "
            "leaves them out"
        )
    if report["vocabulary"]["unknown_share"] > 0.001:
        lines.append(
            f"{report['vocabulary']['unknown_share']:.2%} of the training tokens are the unknown token: use a "
            "byte-level tokenizer, or train one on this text"
        )
    for name, split in report["splits"].items():
        packing = split["packing"]
        if packing["rows"] and packing["utilisation"] < 0.9 and packing["full_rows"] > packing["rows"] / 10:
            lines.append(
                f"{name}: {packing['utilisation']:.1%} of the places are used, as rows may hold no more documents: "
                "raise data.max_documents_per_row"
            )
    return lines


# --- showing --------------------------------------------------------------------------------------------------------


def write_page(report: Report, path: Path) -> None:
    """Write the report as one HTML file."""
    make_directories(path.parent)
    write_bytes(path, data_page(report).encode())


def show(report: Report, console: Console) -> None:
    """Print the report."""
    console.print(Text(f"{report['name']}: the data in {visible(report['directory'])}", style="bold"))
    for line in report["warnings"]:
        console.print(Text(f"! {visible(line)}", style="bold red"))
    for block in blocks_of(report):
        _show_block(block, console)


def _show_block(block: Block, console: Console) -> None:
    console.print()
    console.print(Text(block.title, style="bold"))
    for line in block.lines:
        console.print(Text(visible(line)))
    if block.rows:
        _show_table(block.head, block.rows, block.numbers, console)
    for label, share, value in block.bars:
        console.print(Text.assemble(f"{label:>19} ", ("█" * max(1, round(30 * share)) + " ", "blue"), value))
    for about, text in block.samples:
        if about:
            console.print(Text(visible(about), style="dim"))
        console.print(Text(f"  {visible(text)}", overflow="fold"))


def _show_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int], console: Console) -> None:
    table = Table(box=None, show_header=any(head), pad_edge=False, header_style="dim")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    console.print(table)
