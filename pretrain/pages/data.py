"""The report on the data in blocks of lines, tables, bars and samples, and as a page.

What lives here: how the report of `pretrain data` is worded, on a terminal and in HTML alike. What must not: counting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.data.preparing.parts import is_training
from pretrain.pages.page import bars, escape, page, paragraph, table


@dataclass(frozen=True)
class Block:
    """A part of the report: lines, then a table, bars, samples, each plain text and perhaps none.

    `numbers` are the columns that stand at the right; `bars` are (label, share of the longest, value); `samples` are
    (what it is, text).
    """

    title: str
    lines: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    numbers: Sequence[int] = ()
    bars: Sequence[tuple[str, float, str]] = ()
    samples: Sequence[tuple[str, str]] = ()


def data_page(report: Mapping[str, Any]) -> str:
    """The report as HTML."""
    return page(f"{report['name']}: the data", data_parts(report))


def data_parts(report: Mapping[str, Any], heading: str = "h2") -> Iterator[str]:
    """The HTML of the report, for a page that says more than this; `heading` is the tag of its titles."""
    yield paragraph(report["directory"], "soft")
    yield from (paragraph(line, "warn") for line in report["warnings"])
    for block in blocks_of(report):
        yield from _block_parts(block, "", heading)


def run_parts(report: Mapping[str, Any], heading: str = "h2") -> Iterator[str]:
    """The HTML of what one run reads of data that it shares with others."""
    yield from _block_parts(_run(report["run"]), f"{report['name']}: ", heading)


def _block_parts(block: Block, before: str, heading: str) -> Iterator[str]:
    yield f"<{heading}>{escape(before + block.title)}</{heading}>"
    yield from (paragraph(line) for line in block.lines)
    if block.rows:
        yield table(block.head, block.rows, numbers=block.numbers)
    if block.bars:
        yield bars(block.bars)
    for about, text in block.samples:
        yield f'{paragraph(about, "soft") if about else ""}<div class="sample">{escape(text)}</div>'


def blocks_of(report: Mapping[str, Any]) -> Iterator[Block]:
    """The parts of the report, in order."""
    yield _splits(report["splits"])
    yield _lengths(report["splits"])
    yield _packing(report)
    yield _run(report["run"])
    yield _repetition(report["repetition"])
    yield _vocabulary(report["vocabulary"])
    yield from _left_out(report)
    scan = report["scan"]
    millions = scan["tokens_per_second"] / 1e6
    yield Block(
        "this report", [f"read {scan['tokens']:,} tokens in {scan['seconds']:.1f} s, {millions:,.0f} M a second"]
    )


def _splits(splits: Mapping[str, Any]) -> Block:
    rows = [
        [
            name,
            *(f"{split[key]:,}" for key in ("documents", "tokens", "bytes")),
            f"{split['bytes_per_token']:.2f}",
            f"{split['tokens_a_document']['mean']:,.0f}",
        ]
        for name, split in splits.items()
    ]
    head = ("split", "documents", "tokens", "bytes", "bytes/token", "tokens/document")
    return Block("what there is", head=head, rows=rows, numbers=range(1, 6))


def _lengths(splits: Mapping[str, Any]) -> Block:
    measured = {name: split["tokens_a_document"] for name, split in splits.items() if split["documents"]}
    shares = list(next(iter(measured.values()))["quantiles"]) if measured else []
    rows = [[name, *(f"{value:,}" for value in split["quantiles"].values())] for name, split in measured.items()]
    bins: dict[tuple[int, int], int] = {}
    for name, split in measured.items():
        for one in split["histogram"] if is_training(name) else ():
            bins[one["from"], one["to"]] = bins.get((one["from"], one["to"]), 0) + one["documents"]
    most = max(bins.values(), default=1) or 1
    drawn = [
        (f"{low:,} to {high:,}", count / most, f"{count:,}") for (low, high), count in sorted(bins.items()) if count
    ]
    lines = ["tokens a document: the length that this share of the documents does not pass; bars: training documents"]
    return Block("lengths", lines, ("split", *shares), rows, range(1, len(shares) + 1), drawn)


def _packing(report: Mapping[str, Any]) -> Block:
    rows = []
    for name, split in report["splits"].items():
        packing = split["packing"]
        rows.append(
            [
                name,
                f"{packing['rows']:,}",
                f"{packing['utilisation']:.2%}",
                f"{packing['pieces_a_row']:.2f}",
                f"{packing['most_pieces']:,}",
                f"{packing['cut_share']:.1%}",
            ]
        )
    head = ("split", "rows an epoch", "used", "pieces/row", "at most", "documents cut")
    return Block(f"rows of {report['sequence_length']:,} places", head=head, rows=rows, numbers=range(1, 6))


def _run(run: Mapping[str, Any]) -> Block:
    if run["steps"] is None:
        lines = ["a budget of time: how often the data are read is known once training has measured its pace"]
    else:
        places = run["steps"] * run["rows_a_step"]
        lines = [
            f"{run['steps']:,} steps of {run['rows_a_step']:,} rows ({run['said_by']} says so): {places:,} rows are "
            f"read, an epoch is {run['rows_an_epoch']:,}"
        ]
    rows = [
        [
            source["name"] or "(all)",
            f"{source['rows']:,}",
            *("not known" if source[key] is None else f"{source[key]:{form}}" for key, form in _RUN_COLUMNS),
        ]
        for source in run["sources"]
    ]
    return Block("what the run reads", lines, ("source", "rows", "rows read", "share", "epochs"), rows, range(1, 5))


_RUN_COLUMNS = (("drawn", ","), ("share", ".2%"), ("epochs", ".2f"))


def _repetition(repetition: Mapping[str, Any]) -> Block:
    about = "about " if repetition["looked_at"] < 1.0 else ""
    lines = [
        f"{about}{repetition['copies']:,} of {repetition['documents']:,} training documents "
        f"({repetition['share']:.2%}) have exactly the tokens of an earlier one"
    ]
    if repetition["looked_at"] < 1.0:
        lines.append(f"estimated from {repetition['looked_at']:.1%} of the texts, chosen by their hash")
    for name, held_out in repetition["held_out"].items():
        lines.append(
            f"{name}: {about}{held_out['copies']:,} of {held_out['documents']:,} repeat an earlier one, "
            f"{held_out['in_training']:,} stand in the training data"
        )
    samples = [
        (f"{group['copies']:,} times, {group['tokens']:,} tokens ({group['split']})", group["text"])
        for group in repetition["groups"]
    ]
    return Block("repeated documents", lines, samples=samples)


def _vocabulary(vocabulary: Mapping[str, Any]) -> Block:
    lines = [
        f"{vocabulary['size']:,} ids; of {vocabulary['without_special']:,} that are not special "
        f"{vocabulary['unused']:,} ({vocabulary['unused_share']:.2%}) never occur in the training data",
        f"unknown token: {vocabulary['unknown']:,} times ({vocabulary['unknown_share']:.4%})",
    ]
    rows = [
        [f"{top['id']}", f"“{top['token']}”", f"{top['count']:,}", f"{top['share']:.2%}"] for top in vocabulary["top"]
    ]
    return Block("vocabulary", lines, ("id", "most frequent", "times", "share"), rows, (0, 2, 3))


def _left_out(report: Mapping[str, Any]) -> Iterator[Block]:
    for step in report["kept_out"]:
        came = step["documents"] + step["kept_documents"]
        share = step["documents"] / max(1, came)
        lines = [f"{step['documents']:,} of {came:,} documents ({share:.2%}), {step['bytes']:,} bytes"]
        reasons = sorted(step["reasons"].items(), key=lambda item: -item[1]["documents"])
        rows = [[reason, f"{count['documents']:,}", f"{count['bytes']:,}"] for reason, count in reasons]
        samples = [
            (" · ".join(str(sample[key]) for key in ("reason", "where") if key in sample), sample["text"])
            for sample in step["samples"]
        ]
        yield Block(
            f"left out by {step['step']}", lines, ("reason", "documents", "bytes"), rows, (1, 2), samples=samples
        )
    bad = report["bad"]
    lines = [
        f"{bad['count']:,} bad lines or rows in {bad['files_with_bad']:,} of {report['files']:,} files; "
        f"{report['empty']:,} empty documents"
    ]
    if report["encodings"]:
        lines.append(
            "files by encoding: " + ", ".join(f"{name} {count:,}" for name, count in report["encodings"].items())
        )
    kinds = [[str(kind), f"{count:,}"] for kind, count in bad["by_kind"].items()]
    files = [[name, f"{count:,}"] for name, count in bad["by_file"].items()]
    samples = [("the first of them", line) for line in bad["named"][:1]] + [("", line) for line in bad["named"][1:5]]
    yield Block("what could not be read", lines, ("kind or file", "times"), [*kinds, *files], (1,), samples=samples)
