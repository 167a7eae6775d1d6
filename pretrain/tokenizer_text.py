"""The text that a tokenizer learns from: which files, and which documents of them.

What lives here: reading training documents for `pretrain.tokenizer`; those that `data.validation` holds out are passed
over. What must not: learning from them, or artifacts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.progress import Progress

from pretrain.config import RunConfig
from pretrain.config_data import DocumentStart, ValidationSplit
from pretrain.data.preparing.splits import TRIAL_TAIL, Split, by_fraction, by_tail, by_tail_of_text
from pretrain.data.reading.documents import Document, ReadReport, document_mode, read_documents, resolve_sources, units
from pretrain.data.reading.encodings import what_it_is
from pretrain.data.reading.pairs import TextField, check_pairs, sides
from pretrain.data.reading.sources import TOKEN_FORMATS, SourceFile
from pretrain.data.shards import TRAIN

_log = logging.getLogger(__name__)


def text_files(config: RunConfig) -> list[SourceFile]:
    """The files of text that are trained on, not downloaded yet.

    Raises:
        ValueError: when there are none, as of ready ids.
    """
    data = config.data
    files = resolve_sources(data.train, encoding=data.encoding, download=False) if data.ids_field is None else []
    files = [file for file in files if file.format not in TOKEN_FORMATS]
    check_pairs(files, data.text_field)
    if not files:
        keys = {"data.from": data.from_, "data.ids_field": data.ids_field}
        key = next((name for name, value in keys.items() if value is not None), "data.train")
        raise ValueError(
            f"tokenizer: {key} gives ready ids and no text to train one on; give tokenizer.from: the tokenizer that "
            "they were made with, or `tokenizer: {algorithm: ids, vocab_size: N}` for ids that stand for no text"
        )
    return files


def split_of_file(config: RunConfig, file: SourceFile, max_bytes: int | None) -> Split | None:
    """How a file's documents part into training and validation; None: all are for training."""
    rule = config.data.validation
    if not isinstance(rule, ValidationSplit):
        return None
    if max_bytes is not None:
        return by_tail_of_text(TRIAL_TAIL) if isinstance(config.data.text_field, str) else by_fraction(TRIAL_TAIL)
    if rule.fraction is not None:
        return by_fraction(rule.fraction)
    assert rule.tail is not None
    if document_mode(file, config.data.document) == "file":
        return by_tail_of_text(rule.tail)
    return by_tail(rule.tail, units(file))


def training_documents(
    files: Sequence[SourceFile],
    document: str | DocumentStart,
    text_field: TextField,
    split_of: Callable[[SourceFile], Split | None],
    max_bytes: int | None,
    progress: Progress,
) -> Iterator[Document]:
    """The training documents of all files, or of the first `max_bytes` of their text.

    Raises:
        ValueError: at the end, when there was no text because lines or rows were bad; names the first.
    """
    total = sum(file.bytes for file in files)
    task = progress.add_task("reading", total=(total if max_bytes is None else min(total, max_bytes)) or None)
    done = 0
    found = False
    reports: list[tuple[SourceFile, ReadReport]] = []  # of files with bad lines or rows
    for file in files:
        if max_bytes is not None and max_bytes <= 0:
            return
        report = ReadReport()
        split = split_of(file)
        documents = read_documents(file, document=document, text_field=text_field, report=report, max_bytes=max_bytes)
        for read in documents:
            found = True
            if max_bytes is not None:
                max_bytes -= len(read.text.encode(errors="replace"))
            parts = [read] if split is None else [part for name, part in split(read) if name == TRAIN]
            yield from parts if isinstance(text_field, str) else (side for pair in parts for side in _both_sides(pair))
            if file.format not in ("hub", "parquet"):
                progress.update(task, completed=done + report.consumed)
        done += file.bytes
        progress.update(task, completed=done)
        if report.bad:
            _log.warning("%s: %d bad lines or rows left out; the first: %s", file.name, report.bad, report.named[0])
            reports.append((file, report))
    if reports and not found:
        raise ValueError(_all_bad(reports))


def _both_sides(pair: Document) -> Iterator[Document]:
    """Source and target of a pair as documents of their own: one vocabulary learns from both."""
    for text in sides(pair.text):
        yield Document(text, pair.file, pair.position)


def _all_bad(reports: Sequence[tuple[SourceFile, ReadReport]]) -> str:
    """The message for files that gave no text: their first bad lines or rows, and what the first such file may be."""
    bad = sum(report.bad for _, report in reports)
    named = "".join(f"\n  {name}" for name in [name for _, report in reports for name in report.named][:5])
    undecodable = (file for file, report in reports if report.by_kind.get("encoding", 0) * 2 > report.bad)
    guess = next((found for file in undecodable if (found := what_it_is(file)) is not None), None)
    return (
        f"data.train: there is no text in the files given: {bad:,} lines or rows are bad, and none is good; the first:"
        f"{named}\n{guess or 'Mend the text, or name other files'}"
    )


def first_bytes(documents: Iterable[Document], most: int) -> Iterator[Document]:
    """Whole documents, until they hold `most` bytes."""
    for read in documents:
        yield read
        most -= len(read.text.encode(errors="replace"))
        if most <= 0:
            return
