"""Rows of jsonl, csv and tsv: one text a row.

What lives here: the three formats. What must not: columns (parquet, Hub), which `documents` reads.
"""

from __future__ import annotations

import csv
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from pretrain.data.reading.encodings import open_text
from pretrain.data.reading.lines import TOO_LONG, Document, LineReader, ReadReport, decode_line, without_newline
from pretrain.data.reading.pairs import SEPARATOR, TextField, fields_of
from pretrain.data.reading.sources import SourceFile
from pretrain.data.reading.token_files import row_ids
from pretrain.data.vocabulary import ReadyIds

_LARGEST_FIELD = (1 << 31) - 1
_ROWS_TO_FIND_A_FIELD_IN = 100
LARGEST_RECORD = 1 << 26
"""Bytes of a csv row that holds newlines: a quote that is not closed within as many was opened by mistake."""


@dataclass(frozen=True)
class _Problem:
    """Why a row is bad."""

    kind: str
    why: str


def table_rows(reader: LineReader, text_field: TextField, ready: ReadyIds | None = None) -> Iterator[Document]:
    """Rows of jsonl, csv and tsv; of two fields a pair each.

    Raises:
        ValueError: when none of the file's first rows has the field; a single one without it is a bad row.
    """
    fields = fields_of(text_field)
    rows = _json_rows(reader, fields) if reader.file.format == "jsonl" else _delimited_rows(reader, fields)
    report = reader.report
    lacking = 0
    first = ""
    for offset, number, row in rows:
        if isinstance(row, _Problem):
            reader.bad(row.why, row.kind, number)
            continue
        if ready is not None and isinstance(text_field, str) and text_field in row:
            made = row_ids(reader.file, ready, row, offset)
            if isinstance(made, str):
                reader.bad(made, "ids", number)
            elif made is None:
                report.empty += 1
            else:
                report.good += 1
                yield made
            continue
        field = next((name for name in fields if not _is_text(row.get(name))), None)
        if ready is None and field is None:
            texts = [row[name] for name in fields]
            del row
            if len(texts) == 1:
                yield from reader.document(texts[0], offset)
            else:
                yield from _pair(reader, texts, offset, number)
            continue
        field = field or fields[0]
        first = first or missing_field(reader.file, field, row, ready)
        reader.bad(_without_text(row.get(field), field), "field", number)
        lacking += 1
        if lacking == _ROWS_TO_FIND_A_FIELD_IN and not report.good + report.empty and reader.start == 0:
            raise ValueError(first)
    whole = reader.start == 0 and (reader.end is None or reader.end >= reader.file.bytes)
    if lacking and whole and lacking == report.bad and not report.good + report.empty:
        raise ValueError(first)


def _pair(reader: LineReader, texts: list[str], offset: int, number: int) -> Iterator[Document]:
    """Both sides as one text; a pair without one of them is empty."""
    if any(SEPARATOR in text for text in texts):
        reader.bad("a side of the pair holds U+001F, which parts the sides", "field", number)
    elif all(text and not text.isspace() for text in texts):
        yield from reader.document(SEPARATOR.join(texts), offset)
    else:
        reader.report.empty += 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and _is_encodable(value)


def missing_field(file: SourceFile, text_field: str, names: Iterable[str], ready: ReadyIds | None = None) -> str:
    """The message for a table without text, or without ids, where the configuration expects it."""
    names = list(names)
    fields = ", ".join(names) or "none"
    if ready is not None:
        return f"data.ids_field: `{file.name}` has no field `{text_field}`; the fields are: {fields}"
    if text_field in names:
        return f"data.text_field: `{text_field}` of `{file.name}` holds no text; the fields are: {fields}"
    return f"data.text_field or data.ids_field: `{file.name}` has no field `{text_field}`; the fields are: {fields}"


def _without_text(value: Any, text_field: str) -> str:
    if isinstance(value, str):
        return f"no text in `{text_field}`: it spells half of a surrogate pair"
    return f"no text in `{text_field}`" + ("" if value is None else f", but {type(value).__name__}")


def _is_encodable(text: str) -> bool:
    """False for lone surrogates, which JSON's escapes can spell and UTF-8 cannot."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


_Row = tuple[int, int, dict[str, Any] | _Problem]
"""(offset, number of the line within the range, row)."""


def _json_rows(reader: LineReader, fields: tuple[str, ...]) -> Iterator[_Row]:
    names = [re.compile(re.escape(json.dumps(name, ensure_ascii=False).encode()) + rb"\s*:") for name in fields]
    for offset, line in reader.lines():
        if not reader.in_range(offset):
            break
        if not line.strip():
            continue
        row = _json_row(reader, line, dict(zip(fields, names, strict=True)))
        del line
        yield offset, reader.line, row


def _json_row(reader: LineReader, line: bytes, fields: dict[str, re.Pattern[bytes]]) -> dict[str, Any] | _Problem:
    try:
        data: bytes | str = line
        if reader.codec != "utf-8":
            data = decode_line(line, reader.codec, reader.file.encoding)
            line = data.encode("utf-8")
        row = orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            row = _lenient_json(decode_line(line, "utf-8", reader.file.encoding))
        except ValueError as error:
            return _Problem("encoding", str(error))
    except ValueError as error:
        return _Problem("encoding", str(error))
    if not isinstance(row, dict):
        return _Problem("json", "not a JSON object")
    for field, name in fields.items():
        if len(name.findall(line)) > 1 and _stands_twice(line, field):
            return _Problem("json", f"`{field}` stands twice in the object")
    return row


def _lenient_json(line: str) -> Any:
    """What Python's own writer makes and strict JSON forbids: NaN and Infinity."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _stands_twice(line: bytes, text_field: str) -> bool:
    """Whether the object itself, and not one within it, has the field twice: which one is meant cannot be told."""
    last: list[int] = [0]

    def count(pairs: list[tuple[str, Any]]) -> None:
        last[0] = sum(key == text_field for key, _ in pairs)  # the outermost object comes last

    try:
        json.loads(line.decode("utf-8"), object_pairs_hook=count)
    except (ValueError, RecursionError):  # deeper, or with longer numbers, than Python's own reader takes
        return True
    return last[0] > 1


# --- csv and tsv ----------------------------------------------------------------------------------------------------


def _delimited_rows(reader: LineReader, wanted: tuple[str, ...]) -> Iterator[_Row]:
    """Rows of csv (RFC 4180: quoted fields may hold newlines) and tsv (no quoting, as IANA registers it)."""
    header, fields = _header(reader.file)
    if header is None:
        deque(reader.lines(), maxlen=0)  # there is none, or damage before it, which is counted so
        return
    for name in wanted:
        if name not in fields:
            raise ValueError(missing_field(reader.file, name, fields))
        if fields.count(name) > 1:
            raise ValueError(
                f"data.text_field: `{name}` stands twice in the header of `{reader.file.name}`; rename one"
            )
    csv.field_size_limit(_LARGEST_FIELD)
    for offset, number, record in _records(reader):
        if not reader.in_range(offset):
            break
        if offset <= header:
            continue
        if isinstance(record, _Problem):
            yield offset, number, record
            continue
        if not record.strip():
            continue
        try:
            values = _split(record, reader)
        except (csv.Error, ValueError) as error:
            kind = "columns" if isinstance(error, csv.Error) else "encoding"
            yield offset, number, _Problem(kind, f"not a row ({error})" if kind == "columns" else str(error))
            continue
        complete = len(values) == len(fields)
        problem = _Problem("columns", f"{len(values)} fields, the header {len(fields)}")
        yield offset, number, dict(zip(fields, values, strict=True)) if complete else problem


def _header(file: SourceFile) -> tuple[int | None, list[str]]:
    """Where the first row that is not blank starts, and its fields; (None, []) of a file without one.

    Raises:
        ValueError: when it cannot be read.
    """
    with open_text(file) as (stream, raw, codec):
        reader = LineReader(file, stream, raw, None, ReadReport(), codec)
        for offset, number, record in _records(reader):
            if isinstance(record, _Problem):
                raise ValueError(f"`{file.name}:{number}`: the header cannot be read: {record.why}; mend it")
            if not record.strip():
                continue
            try:
                return offset, _split(record, reader)
            except (csv.Error, ValueError) as error:
                raise ValueError(f"`{file.name}:{number}`: the header cannot be read: {error}; mend it") from error
    return None, []


def _records(reader: LineReader) -> Iterator[tuple[int, int, bytes | _Problem]]:
    """(offset, number of the line, row) of a table.

    In csv a quote opens a field only at its beginning, and a quoted field must be closed before a comma or the end of a
    line. A row whose first line opens a field that is not closed so, or not within `LARGEST_RECORD`, is bad by that one
    line alone: reading goes on with the next. So where rows start depends on nothing that stands before a row.
    """
    lines = reader.lines()
    again: deque[tuple[int, int, bytes]] = deque()  # lines to be looked at once more

    def following() -> tuple[int, int, bytes] | None:
        if again:
            return again.popleft()
        found = next(lines, None)
        return None if found is None else (found[0], reader.line, found[1])

    is_csv = reader.file.format == "csv"
    while (first := following()) is not None:
        offset, number, line = first
        if not is_csv or b'"' not in line:
            del first
            yield offset, number, line
            continue
        pending, size = [first], 0
        quoted = _ends_quoted(line, False)
        while quoted:
            more = following() if size <= LARGEST_RECORD else None
            if more is not None:
                pending.append(more)
            if more is None or more[2] == TOO_LONG:
                quoted = None
                break
            size += len(more[2])
            quoted = _ends_quoted(more[2], True)
        if quoted is None:
            again.extendleft(reversed(pending[1:]))
            yield offset, number, _Problem("quotes", "a quote that is not closed, or stands where none can")
        else:
            yield offset, number, b"".join(line for _, _, line in pending)


def _ends_quoted(line: bytes, quoted: bool) -> bool | None:
    """Whether the end of a line is within a quoted field, as its beginning is or not; None where a quote is wrong."""
    at = 0
    while True:
        if not quoted and line.startswith(b'"', at):
            quoted, at = True, at + 1
        if quoted:
            at = line.find(b'"', at)
            if at < 0:
                return True
            after = line[at + 1 : at + 2]
            if after == b'"':
                at += 2
                continue
            if after not in (b"", b",", b"\r", b"\n"):
                return None
            quoted = False
        at = line.find(b",", at) + 1
        if not at:
            return False


def _split(record: bytes, reader: LineReader) -> list[str]:
    text = without_newline(decode_line(record, reader.codec, reader.file.encoding))
    if reader.file.format == "tsv":
        return text.split("\t")
    return next(csv.reader([text]), [])


def row_starts(file: SourceFile, bounds: list[int]) -> list[int]:
    """For csv, the first row start at or after each bound, in one pass."""
    starts = [0]
    wanted = iter(bounds[1:-1])
    bound = next(wanted, None)
    with open_text(file) as (stream, raw, codec):
        for offset, _, _ in _records(LineReader(file, stream, raw, None, ReadReport(), codec)):
            while bound is not None and offset >= bound:
                starts.append(offset)
                bound = next(wanted, None)
    return [*starts, bounds[-1]]
