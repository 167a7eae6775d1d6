"""Rows of jsonl, csv and tsv: one text a row.

What lives here: the three formats. What must not: columns (parquet, Hub), which `documents` reads.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from pretrain.data.lines import Document, LineReader, ReadReport, without_newline
from pretrain.data.sources import SourceFile
from pretrain.data.streams import open_bytes

_LARGEST_FIELD = (1 << 31) - 1


def table_rows(reader: LineReader, text_field: str) -> Iterator[Document]:
    """Rows of jsonl, csv and tsv. The file's first row must have the field; a later one without it is a bad row."""
    rows = _json_rows(reader) if reader.file.format == "jsonl" else _delimited_rows(reader, text_field)
    for offset, row in rows:
        if isinstance(row, str):
            reader.bad(row)
            continue
        text = row.get(text_field)
        if isinstance(text, str) and _is_encodable(text):
            yield from reader.document(text, offset)
        elif reader.line <= 1 and reader.start == 0:
            raise ValueError(missing_field(reader.file, text_field, row))
        else:
            reader.bad(f"no text in `{text_field}`")


def missing_field(file: SourceFile, text_field: str, names: Iterable[str]) -> str:
    """The message for a table without text where the configuration expects it."""
    names = list(names)
    fields = ", ".join(names) or "none"
    if text_field in names:
        return f"data.text_field: `{text_field}` of `{file.name}` holds no text; the fields are: {fields}"
    return f"data.text_field: `{file.name}` has no field `{text_field}`; the fields are: {fields}"


def _is_encodable(text: str) -> bool:
    """False for lone surrogates, which JSON's escapes can spell and UTF-8 cannot."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _json_rows(reader: LineReader) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for offset, line in reader.lines():
        if not reader.in_range(offset):
            break
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            row = _lenient_json(line)
        yield offset, row if isinstance(row, dict) else "not a JSON object"


def _lenient_json(line: bytes) -> Any:
    """What Python's own writer makes and strict JSON forbids: NaN and Infinity."""
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _delimited_rows(reader: LineReader, text_field: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Rows of csv (RFC 4180: quoted fields may hold newlines) and tsv (no quoting, as IANA registers it)."""
    fields = _header(reader.file)
    if text_field not in fields:
        raise ValueError(missing_field(reader.file, text_field, fields))
    csv.field_size_limit(_LARGEST_FIELD)
    for offset, record in _records(reader):
        if not reader.in_range(offset):
            break
        if offset == 0 or not record.strip():
            continue
        try:
            values = _split(record, reader.file.format)
        except (csv.Error, UnicodeDecodeError) as error:
            yield offset, f"not a row ({error})"
            continue
        complete = len(values) == len(fields)
        row = dict(zip(fields, values, strict=True)) if complete else f"{len(values)} fields, the header {len(fields)}"
        yield offset, row


def _header(file: SourceFile) -> list[str]:
    with open_bytes(file) as (stream, raw):
        for _, record in _records(LineReader(file, stream, raw, None, ReadReport())):
            return _split(record, file.format)
    return []


def _records(reader: LineReader) -> Iterator[tuple[int, bytes]]:
    quoted = reader.file.format == "csv"
    pending: list[bytes] = []
    start, odd = 0, False
    for offset, line in reader.lines():
        start = start if pending else offset
        pending.append(line)
        odd ^= quoted and line.count(b'"') % 2 == 1
        if not odd:
            yield start, b"".join(pending)
            pending = []
    if pending:
        yield start, b"".join(pending)


def _split(record: bytes, file_format: str) -> list[str]:
    text = without_newline(record.decode("utf-8"))
    if file_format == "tsv":
        return text.split("\t")
    return next(csv.reader([text]), [])


def row_starts(file: SourceFile, bounds: list[int]) -> list[int]:
    """For csv, the first row start at or after each bound, in one pass: a newline ends a row where quotes are even."""
    starts = [0]
    wanted = iter(bounds[1:-1])
    bound = next(wanted, None)
    odd, offset = False, 0
    with Path(file.path).open("rb") as stream:
        for line in stream:
            odd ^= line.count(b'"') % 2 == 1
            offset += len(line)
            while bound is not None and not odd and offset >= bound:
                starts.append(offset)
                bound = next(wanted, None)
    return [*starts, bounds[-1]]
