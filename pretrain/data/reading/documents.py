"""Documents out of files: text and jsonl, csv, tsv, parquet, Hub datasets, plain or compressed, split by byte range.

What lives here: what a document is, and reading those that start in a range. What must not: tokens, or which documents
are held out. This is the one door to the `datasets` library.

Text is kept byte for byte: NUL, CR, form feeds and all. A byte-order mark at a file's beginning is no text; lines end
with LF, and the LF or CR LF that ends a document of one line, or a paragraph, is not part of it. Decoding is strict: a
bad line or row is skipped, counted and named, and costs no other. A range owns the documents that start in it, so the
ranges of a file together give each document once.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pyarrow
import pyarrow.parquet

from pretrain.config_data import DocumentStart
from pretrain.data.reading.compression import DamagedFileError
from pretrain.data.reading.embedded import stdlib_corpus
from pretrain.data.reading.encodings import encoding_of, is_wide, open_text
from pretrain.data.reading.lines import ByteRange, Document, LineReader, ReadReport
from pretrain.data.reading.pairs import TextField, check_pairs
from pretrain.data.reading.sources import (
    TOKEN_FORMATS,
    SourceFile,
    Told,
    corpus_digest,
    digest_of_files,
    hash_files,
    hash_with_index,
    resolve_sources,
)
from pretrain.data.reading.streams import first_bytes
from pretrain.data.reading.tables import missing_field, row_starts, table_rows
from pretrain.data.reading.text import paragraphs, started, text_lines, whole_file
from pretrain.data.reading.token_files import (
    column_ids,
    count_tokens,
    id_column,
    numbers_as_ids,
    row_ids,
    token_documents,
    token_ranges,
)
from pretrain.data.vocabulary import ReadyIds
from pretrain.files import sha256_json

__all__ = [
    "Document",
    "ReadReport",
    "SourceFile",
    "byte_ranges",
    "corpus_digest",
    "document_mode",
    "input_digest",
    "read_documents",
    "resolve_sources",
    "stdlib_corpus",
    "units",
]

_PAGE_BUFFER = 1 << 20
_ROW_FORMATS = ("jsonl", "csv", "tsv", "parquet", "hub")


def document_mode(file: SourceFile, document: str | DocumentStart) -> str | DocumentStart:
    """What a document is in this file: row | file | line | paragraph | DocumentStart.

    Raises:
        ValueError: when the configured one does not fit the file's format.
    """
    rows = file.format in _ROW_FORMATS
    if file.format in TOKEN_FORMATS:
        return "row"  # the file says where its documents end
    if document == "auto":
        # A row of a table is one text by the table's own design. In plain text no mark is sure to part documents (an
        # empty line parts paragraphs, a newline may only wrap), so a file is taken as one; other rules are asked for.
        return "row" if rows else "file"
    if rows and document != "row":
        given = document if isinstance(document, str) else f"{{start: {document.start}}}"
        raise ValueError(f"data.document: {given} is for text, but `{file.name}` is {file.format}; use row or auto")
    if document == "row" and not rows:
        raise ValueError(f"data.document: row is for tables, but `{file.name}` is text; use file, line or paragraph")
    return document


def read_documents(
    file: SourceFile,
    *,
    document: str | DocumentStart = "auto",
    text_field: TextField = "text",
    byte_range: ByteRange | None = None,
    report: ReadReport | None = None,
    max_bytes: int | None = None,
    ready: ReadyIds | None = None,
) -> Iterator[Document]:
    """The documents of a file that start in `byte_range` (all of them when None), in order.

    Args:
        file: what to read.
        document: as `data.document` of the configuration.
        text_field: the column or key that holds the text, for tables; two for pairs (`pairs`).
        byte_range: [start, end) in bytes of a plain file or of parquet, in rows of a Hub dataset; compressed files,
            UTF-16 and UTF-32 are read whole. For csv, one that `byte_ranges` gave, as only a whole pass finds where
            rows start.
        report: filled while reading.
        max_bytes: for trials, without `byte_range`: read about the first `max_bytes` of the text and no more; the last
            document may be cut off, and a Hub dataset is not downloaded.
        ready: how files and columns of ready token ids, and the numbers of a bare vocabulary, become documents.

    Raises:
        ValueError: when no row, or none of many first ones, has text in `text_field`; when the text is of another
            encoding, compressed data is damaged and what was read may be wrong, or a Hub dataset cannot be loaded; and
            at the first bad line or row when the report's policy is to stop. Names the file.
    """
    report = report if report is not None else ReadReport()
    mode = document_mode(file, document)
    check_pairs([file], text_field)
    if file.format in TOKEN_FORMATS:
        if ready is None:
            raise ValueError(f"`{file.name}` holds token ids, not text; give text, or use it as data.train of a run")
        yield from token_documents(file, ready, byte_range, report, max_bytes)
        return
    if ready is not None and ready.field is None:
        if ready.numbers is not None:
            same: Any = {"document": document, "text_field": text_field, "byte_range": byte_range}
            texts = read_documents(file, **same, report=report, max_bytes=max_bytes)
            yield from numbers_as_ids(texts, ready, report)
            return
        ready = None
    if ready is not None:
        text_field = id_column(file, ready)
    if file.format in ("hub", "parquet"):
        assert isinstance(text_field, str)
        if file.format == "parquet":
            rows = _parquet_rows(file, text_field, byte_range, report, ready, small=max_bytes is not None)
        elif max_bytes is not None:
            rows = _hub_first_rows(file, text_field, report, ready)
        else:
            rows = _hub_rows(file, text_field, byte_range, report, ready)
        yield from rows if max_bytes is None else _until(rows, max_bytes)
    else:
        with open_text(file, as_utf8=max_bytes is not None) as (stream, raw, codec):
            if max_bytes is not None:
                stream = first_bytes(stream, max_bytes, file.format)
            reader = LineReader(file, stream, raw, byte_range, report, codec)
            if mode == "row":
                yield from table_rows(reader, text_field, ready)
            elif mode == "line":
                yield from text_lines(reader)
            elif mode == "file":
                yield from whole_file(reader)
            elif mode == "paragraph":
                yield from paragraphs(reader)
            else:
                assert isinstance(mode, DocumentStart)
                yield from started(reader, re.compile(mode.start))


def _until(documents: Iterator[Document], most: int) -> Iterator[Document]:
    """Documents up to the one that reaches `most` bytes."""
    for document in documents:
        yield document
        most -= document.size
        if most <= 0:
            return


def byte_ranges(file: SourceFile, part_bytes: int, document: str | DocumentStart = "auto") -> list[ByteRange | None]:
    """Cut a file into ranges of about `part_bytes` that `read_documents` takes; [None] where it is read whole."""
    if file.format in TOKEN_FORMATS:
        return token_ranges(file, part_bytes)
    total = units(file) if file.format == "hub" else file.bytes
    whole = file.compression is not None or document_mode(file, document) == "file"
    if not whole and total > part_bytes and file.format not in ("hub", "parquet"):
        whole = is_wide(encoding_of(file))
    size = part_bytes
    if file.format == "hub":
        size = max(1, int(part_bytes / max(1.0, _hub_dataset(file).data.nbytes / max(1, total))))
    elif file.format == "parquet":
        size = max(1, part_bytes // 4)  # about what compression makes of text
    count = -(-total // size)
    if whole or count <= 1:
        return [None]
    bounds = [total * number // count for number in range(count + 1)]
    if file.format == "csv":
        bounds = row_starts(file, bounds)
    return [(start, end) for start, end in pairwise(bounds) if start < end]


def units(file: SourceFile) -> int:
    """The length of a file in what `Document.position` counts: bytes of text, rows, or tokens."""
    if file.format in TOKEN_FORMATS:
        return count_tokens(file)
    if file.format == "hub":
        return len(_hub_dataset(file))
    if file.format == "parquet":
        try:
            return int(pyarrow.parquet.read_metadata(file.path).num_rows)
        except (pyarrow.ArrowException, OSError):
            return 0  # reading it counts it as bad
    if file.compression is None and not is_wide(encoding_of(file)):
        return file.bytes
    with open_text(file) as (stream, _, _):
        assert isinstance(stream, io.BufferedReader)
        size = 0
        try:
            while block := stream.read1(_PAGE_BUFFER):
                size += len(block)
        except DamagedFileError:  # reading it counts it as bad, or refuses it
            pass
        return size


def input_digest(file: SourceFile, max_bytes: int | None = None, told: Told | None = None) -> str:
    """SHA-256 of an input file's bytes; of a Hub dataset, of the files that it is cached in.

    With `max_bytes`, for trials, of the first bytes alone; of a Hub dataset, of its name.
    """
    if file.format == "hub":
        if max_bytes is not None:
            return sha256_json(file.name)
        paths = [entry["filename"] for entry in _hub_dataset(file).cache_files]
        return digest_of_files((str(number), digest) for number, digest in enumerate(hash_files(paths)))
    return hash_with_index([path for path in (file.path, file.beside) if path is not None], max_bytes, told)


# --- columns --------------------------------------------------------------------------------------------------------


def _parquet_rows(
    file: SourceFile,
    text_field: str,
    byte_range: ByteRange | None,
    report: ReadReport,
    ready: ReadyIds | None,
    *,
    small: bool = False,
) -> Iterator[Document]:
    """Rows of the row groups that start in the range; `small` reads pages as they are needed, not whole columns."""
    start, end = byte_range if byte_range is not None else (0, file.bytes + 1)
    try:
        opened = pyarrow.parquet.ParquetFile(
            file.path, buffer_size=_PAGE_BUFFER if small else 0, page_checksum_verification=True
        )
    except (pyarrow.ArrowException, OSError) as error:
        if start == 0:  # once, whatever the ranges
            report.note_bad(file.name, f"the parquet file is damaged: {_in_a_line(error)}; get it anew", "damaged")
        return
    with opened as parquet:
        if text_field not in parquet.schema_arrow.names:
            raise ValueError(missing_field(file, text_field, parquet.schema_arrow.names, ready))
        row = 0
        for number in range(parquet.metadata.num_row_groups):
            group = parquet.metadata.row_group(number)
            column = group.column(0)
            offset = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
            if start <= offset < end:
                batches = _sound_batches(file, parquet, number, text_field, row, report)
                yield from _column_rows(file, text_field, batches, row, report, ready)
                report.consumed = min(offset, file.bytes) - start
            row += group.num_rows


def _sound_batches(
    file: SourceFile, parquet: Any, number: int, text_field: str, row: int, report: ReadReport
) -> Iterator[Any]:
    """The text column of a row group, up to where it is damaged; the rows after that are bad."""
    rows = parquet.metadata.row_group(number).num_rows
    done = 0
    try:
        for batch in parquet.iter_batches(1024, row_groups=[number], columns=[text_field]):
            done += batch.num_rows
            yield batch.column(0)
    except (pyarrow.ArrowException, OSError) as error:
        where = f"{file.name}:rows {row + done + 1} to {row + rows}"
        report.note_bad(where, f"row group {number} is damaged: {_in_a_line(error)}", "damaged", rows - done)


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _hub_rows(
    file: SourceFile, text_field: str, byte_range: ByteRange | None, report: ReadReport, ready: ReadyIds | None
) -> Iterator[Document]:
    dataset = _hub_dataset(file)
    if text_field not in dataset.column_names:
        raise ValueError(missing_field(file, text_field, dataset.column_names, ready))
    start, end = byte_range if byte_range is not None else (0, len(dataset))
    table = dataset.with_format("arrow").select_columns([text_field])
    for row in range(start, end, 1024):
        column = table[row : min(row + 1024, end)].column(0)
        yield from _column_rows(file, text_field, column.chunks, row, report, ready)
        report.consumed = row - start


def _hub_first_rows(
    file: SourceFile, text_field: str, report: ReadReport, ready: ReadyIds | None
) -> Iterator[Document]:
    """The first rows of a Hub dataset, which is streamed."""
    for number, row in enumerate(_hub_stream(file)):
        if ready is not None:
            if text_field not in row:
                raise ValueError(missing_field(file, text_field, row, ready))
            made = row_ids(file, ready, row, number)
            if isinstance(made, Document):
                yield made
            elif made is None:
                report.empty += 1
            else:
                report.note_bad(f"{file.name}:row {number + 1}", made, "ids")
            continue
        text = row.get(text_field)
        if isinstance(text, str):
            if text and not text.isspace():
                report.good += 1
                yield Document(text, file.name, number)
            else:
                report.empty += 1
        elif number == 0:
            raise ValueError(missing_field(file, text_field, row))
        else:
            report.note_bad(f"{file.name}:row {number + 1}", f"no text in `{text_field}`", "field")


def _column_rows(
    file: SourceFile,
    text_field: str,
    columns: Iterable[Any],
    row: int,
    report: ReadReport,
    ready: ReadyIds | None,
) -> Iterator[Document]:
    if ready is not None:
        yield from column_ids(file, ready, columns, row, report)
        return
    for column in columns:
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        kind = column.type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise ValueError(f"data.text_field: `{text_field}` of `{file.name}` holds {kind}, not text")
        for data in column.cast(pyarrow.large_binary()).to_pylist():
            row += 1
            if data is None:
                report.note_bad(f"{file.name}:row {row}", f"no text in `{text_field}`", "field")
                continue
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                report.note_bad(f"{file.name}:row {row}", f"not UTF-8 ({error.reason})", "encoding")
                continue
            if text and not text.isspace():
                report.good += 1
                yield Document(text, file.name, row - 1)
            else:
                report.empty += 1


@lru_cache(maxsize=8)
def _hub_dataset(file: SourceFile) -> Any:
    return load_hub(file.path, f"data.train or data.validation: `{file.name}`")


def _hub_stream(file: SourceFile) -> Iterator[dict[str, Any]]:
    return iter(load_hub(file.path, f"data.train or data.validation: `{file.name}`", streaming=True))


def load_hub(entry: str, what: str, **how: bool) -> Any:
    """NAME[/CONFIG] or ORG/NAME[/CONFIG] on the Hub, each with `:SPLIT` behind it where it is not train.

    Two parts are ORG/NAME where there is such a dataset, else NAME/CONFIG.

    Raises:
        ValueError: when it cannot be had, or has no such configuration or split.
    """
    from datasets import load_dataset

    path, _, split = entry.partition(":")
    parts = path.split("/")
    readings = [("/".join(parts[:2]), "/".join(parts[2:]) or None)]
    if len(parts) == 2:
        readings.append((parts[0], parts[1]))
    problems: list[str] = []
    for name, config in readings:
        try:
            return load_dataset(name, config, split=split or "train", **how)
        except (OSError, ValueError) as error:  # no such dataset, no connection; no such configuration or split
            problems.append(str(error))
            if isinstance(error, ValueError):
                break  # the dataset is there
    raise ValueError(
        f"{what} cannot be loaded ({'; '.join(problems)}); check the name, the "
        "configuration and the split, and, for a dataset that is not in the cache, the connection and HF_HUB_OFFLINE; "
        "or download it elsewhere and give its files"
    )
