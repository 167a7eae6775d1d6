"""Files of ready token ids, as other programs write them, and rows of ids in tables: documents without text.

What lives here: their layouts, their documents by ranges of tokens, columns of integer lists, numbers written as text.
What must not: text, or what a vocabulary is. Everything is little-endian; positions count tokens.

Megatron, `NAME.idx` beside `NAME.bin`: "MMIDIDX\\0\\0", uint64 version 1, uint8 code of the type (1 uint8, 2 int8,
3 int16, 4 int32, 5 int64, 8 uint16; 6 and 7 are floats), uint64 sequences S, uint64 length D of the document index;
then int32 tokens of each sequence (S), int64 byte where each starts (S), int64 first sequence of each document and S at
the end (D), and in some files an int8 mode of each sequence (S). A document's sequences are joined.

llm.c, `.bin`: 256 int32, of which the first three are magic, version and number of tokens; then the ids: uint16 after
magic 20240520, version 1; uint32 after magic 20240801, version 7. nanoGPT, `.bin`: uint16 ids and nothing else. The
documents of both are parted by the end-of-text id of the run's tokenizer.

datatrove, nanotron and our own shards, `.ds`: ids, with `.ds.index`: uint64 document ends in tokens. The width of an id
is the file's size over the last end, and must be 2 or 4; a `.ds.metadata` that says otherwise is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow

from pretrain.config_data import DataConfig
from pretrain.data.reading.lines import ByteRange, Document, ReadReport
from pretrain.data.reading.sources import TOKEN_FORMATS, SourceFile
from pretrain.data.vocabulary import ReadyIds

_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_MEGATRON_HEADER = len(_MEGATRON_MAGIC) + 8 + 1 + 8 + 8
_LLMC_HEADER = 256 * 4
_LLMC_TYPES = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
_BLOCK = 1 << 22  # tokens
_LARGEST_DOCUMENT = 1 << 28  # tokens: a gigabyte of ids
_NOT_SPACE = re.compile(r"[\x1c-\x1f]")  # Python parts words there, tokenizers do not

_ID_TABLES = ("jsonl", "parquet", "hub")

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Tokens:
    """The ids (T,) of a file, mapped, and where its documents start and end: (D,) each, None when an id parts them."""

    ids: npt.NDArray[Any]
    starts: _Ints | None = None
    ends: _Ints | None = None


def refuse_text_steps(data: DataConfig, files: Iterable[SourceFile]) -> None:
    """Raise ValueError when steps that work on text are asked for, and a file has none."""
    steps = {"filters": data.filters, "dedup": data.dedup, "decontaminate": data.decontaminate}
    asked = [name for name, value in steps.items() if value]
    ready = [file for file in files if file.format in TOKEN_FORMATS]
    if asked and ready:
        raise ValueError(
            f"data.{asked[0]} works on text, and `{ready[0].name}` holds token ids; remove it, or give the text instead"
        )


def token_ranges(file: SourceFile, part_bytes: int) -> list[ByteRange | None]:
    """Cut a file into ranges of tokens of about `part_bytes`.

    Raises:
        ValueError: when the file is not what its format says.
    """
    ids = _open(file).ids
    count = -(-ids.nbytes // part_bytes)
    bounds = [len(ids) * number // max(1, count) for number in range(count + 1)]
    return [(start, end) for start, end in pairwise(bounds) if start < end] or [None]


def count_tokens(file: SourceFile) -> int:
    """Ids in a file; errors as of `token_ranges`."""
    return len(_open(file).ids)


def token_documents(
    file: SourceFile,
    ready: ReadyIds,
    byte_range: ByteRange | None,
    report: ReadReport,
    max_bytes: int | None = None,
) -> Iterator[Document]:
    """The documents that start in a range of tokens (all when None), their ids as `ReadyIds.payload` leaves them.

    With `max_bytes`, for trials, those of about so many bytes at the start; the last one is cut off.

    Raises:
        ValueError: when the file is not what its format says, or an id is beyond the vocabulary; names file and token.
    """
    tokens = _open(file, ready)
    width = tokens.ids.itemsize
    first, last = byte_range if byte_range is not None else (0, len(tokens.ids))
    limit = len(tokens.ids) if max_bytes is None else min(len(tokens.ids), max(1, max_bytes // width))
    borders = (
        _between_ids(tokens, ready.separator, first, last) if tokens.starts is None else _indexed(tokens, first, last)
    )
    for start, end in borders:
        if start > limit or (start == limit and max_bytes is not None):
            break
        end = min(end, limit)
        if end - start > _LARGEST_DOCUMENT:
            raise ValueError(
                f"`{file.name}`: the document at token {start:,} has {end - start:,} ids; the end-of-text id "
                f"{ready.separator} of this tokenizer parts nothing there, so it may be another tokenizer's file"
            )
        ids = tokens.ids[start:end]
        if (problem := ready.problem(ids)) is not None:
            place, what = problem
            raise ValueError(
                f"`{file.name}`: token {start + place:,}: {what}; give tokenizer.from: the tokenizer it was made with"
            )
        report.consumed = (end - first) * (1 if byte_range is not None else width)
        yield from _document(file, ready.payload(ids), start, report)


def _document(file: SourceFile, payload: npt.NDArray[Any], position: int, report: ReadReport) -> Iterator[Document]:
    if len(payload):
        report.good += 1
        yield Document("", file.name, position, payload.astype("<u4").tobytes())
    else:
        report.empty += 1


def _indexed(tokens: _Tokens, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Documents that start in [first, last); the last range has those at the very end too, which are empty."""
    assert tokens.starts is not None
    assert tokens.ends is not None
    begin = int(np.searchsorted(tokens.starts, first))
    stop = len(tokens.starts) if last >= len(tokens.ids) else int(np.searchsorted(tokens.starts, last))
    for block in range(begin, stop, 8192):
        part = slice(block, min(block + 8192, stop))
        yield from zip(tokens.starts[part].tolist(), tokens.ends[part].tolist(), strict=True)


def _between_ids(tokens: _Tokens, separator: int | None, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Runs of ids without the separator that start in [first, last); borders that meet enclose no document."""
    ids = tokens.ids
    marks = _places(ids, separator, max(0, first - 1))
    start = 0 if first == 0 else next(marks, len(ids)) + 1
    for mark in marks:
        if start >= last:
            return
        if mark > start:
            yield start, mark
        start = mark + 1
    if start < min(last, len(ids)):
        yield start, len(ids)


def _places(ids: npt.NDArray[Any], separator: int | None, begin: int) -> Iterator[int]:
    for start in range(begin, len(ids) if separator is not None else 0, _BLOCK):
        yield from (start + np.flatnonzero(ids[start : start + _BLOCK] == separator)).tolist()


# --- layouts --------------------------------------------------------------------------------------------------------


def _open(file: SourceFile, ready: ReadyIds | None = None) -> _Tokens:
    if file.format == "megatron":
        return _open_megatron(file)
    if file.format == "ds":
        return _open_ds(file)
    with Path(file.path).open("rb") as stream:
        start = stream.read(12)
    header = np.frombuffer(start[: len(start) // 4 * 4], dtype="<i4")
    if len(header) and int(header[0]) in _LLMC_TYPES:
        return _open_llmc(file, header)
    if ready is not None and ready.vocab_size > 1 << 16 and ready.numbers is None:
        raise ValueError(
            f"`{file.name}`: a .bin without a header is read as nanoGPT's, 16 bits an id, and the tokenizer has "
            f"{ready.vocab_size:,} ids; write it with llm.c's header (magic 20240801), or as Megatron's or datatrove's"
        )
    size = os.path.getsize(file.path)
    if size % 2:
        raise ValueError(f"`{file.name}`: {size:,} bytes are no whole number of 16-bit ids, which nanoGPT writes")
    return _Tokens(_map(file.path, "<u2", 0, size // 2))


def _open_llmc(file: SourceFile, header: npt.NDArray[Any]) -> _Tokens:
    magic, version, count = header.tolist() if len(header) == 3 else (int(header[0]), None, 0)
    wanted, dtype = _LLMC_TYPES[magic]
    if version != wanted:
        raise ValueError(f"`{file.name}`: llm.c's header has version {version} after {magic}, known is {wanted}")
    size, width = os.path.getsize(file.path), np.dtype(dtype).itemsize
    if count < 0 or size != _LLMC_HEADER + count * width:
        raise ValueError(
            f"`{file.name}`: {size:,} bytes, but llm.c's header promises {count:,} ids of {width} after "
            f"{_LLMC_HEADER:,}; it was cut off or altered, so get it anew"
        )
    return _Tokens(_map(file.path, dtype, _LLMC_HEADER, count))


def _open_ds(file: SourceFile) -> _Tokens:
    index = str(file.beside)
    size, index_size = os.path.getsize(file.path), os.path.getsize(index)
    if index_size % 8:
        raise ValueError(f"`{file.name}.index`: {index_size:,} bytes are no whole number of 64-bit ends; get it anew")
    ends = _map(index, "<u8", 0, index_size // 8).astype(np.int64)
    last = int(ends[-1]) if len(ends) else 0
    if (len(ends) and ends[0] < 0) or bool((np.diff(ends) < 0).any()):
        raise ValueError(f"`{file.name}.index`: the document ends do not ascend; it is no index of datatrove's")
    widths = [width for width in (2, 4) if last * width == size]
    if not widths:
        raise ValueError(
            f"`{file.name}`: {size:,} bytes are neither 2 nor 4 for each of the {last:,} ids of its index; one of the "
            "two was cut off or altered, so get them anew"
        )
    said = _said_width(Path(f"{file.path}.metadata"))
    if size and said not in (None, widths[0]):
        raise ValueError(
            f"`{file.name}.metadata` says {said} bytes an id, file and index say {widths[0]}; get them anew"
        )
    return _Tokens(_map(file.path, f"<u{widths[0]}", 0, last), np.concatenate([np.zeros(1, np.int64), ends])[:-1], ends)


def _said_width(metadata: Path) -> int | None:
    """The bytes of an id behind the `|` of the first line, if there is such a file."""
    if not metadata.is_file():
        return None
    found = re.match(r"[^\n]*\|(\d+)\s*(\n|$)", metadata.read_text(encoding="utf-8", errors="replace"))
    return int(found[1]) if found else None


def _open_megatron(file: SourceFile) -> _Tokens:
    index = str(file.beside)
    name = file.name.removesuffix(".bin") + ".idx"
    size = os.path.getsize(index)
    with Path(index).open("rb") as stream:
        header = stream.read(_MEGATRON_HEADER)
    if not header.startswith(_MEGATRON_MAGIC) or len(header) < _MEGATRON_HEADER:
        raise ValueError(f"`{name}` is no index of Megatron's (it does not start with MMIDIDX); get it anew")
    version = int.from_bytes(header[9:17], "little")
    sequences, length = int.from_bytes(header[18:26], "little"), int.from_bytes(header[26:34], "little")
    if version != 1:
        raise ValueError(f"`{name}`: Megatron's index has version {version}, known is 1")
    if header[17] not in _MEGATRON_TYPES:
        raise ValueError(f"`{name}`: type {header[17]} of Megatron's is no integer; known are {[*_MEGATRON_TYPES]}")
    dtype = np.dtype(_MEGATRON_TYPES[header[17]])
    least = _MEGATRON_HEADER + 12 * sequences + 8 * length
    if size not in (least, least + sequences):
        raise ValueError(f"`{name}`: {size:,} bytes, its header promises {least:,}; it was cut off, so get it anew")
    lengths = _map(index, "<i4", _MEGATRON_HEADER, sequences).astype(np.int64)
    pointers = _map(index, "<i8", _MEGATRON_HEADER + 4 * sequences, sequences)
    documents = _map(index, "<i8", _MEGATRON_HEADER + 12 * sequences, length).astype(np.int64)
    ends = np.cumsum(
        np.concatenate([np.zeros(1, np.int64), lengths])
    )  # (S + 1,) where each sequence starts, and the end
    whole = length >= 1 and documents[0] == 0 and documents[-1] == sequences and not (np.diff(documents) < 0).any()
    if not whole or (lengths < 0).any() or not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
        raise ValueError(
            f"`{name}`: the sequences or documents do not follow one another; it was altered, so get it anew"
        )
    if os.path.getsize(file.path) != ends[-1] * dtype.itemsize:
        raise ValueError(
            f"`{file.name}`: {os.path.getsize(file.path):,} bytes, its index promises {ends[-1]:,} ids of "
            f"{dtype.itemsize}; it was cut off or is another's, so get both anew"
        )
    borders = ends[documents]
    return _Tokens(_map(file.path, dtype.str, 0, int(ends[-1])), borders[:-1], borders[1:])


def _map(path: str, dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
    if count == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)


# --- rows of tables, and numbers in text ----------------------------------------------------------------------------


def column_ids(
    file: SourceFile, ready: ReadyIds, columns: Iterable[Any], row: int, report: ReadReport
) -> Iterator[Document]:
    """Rows of a column of integer lists (parquet, Hub datasets); `row` is the first one's number.

    Raises:
        ValueError: when the column holds something else.
    """
    for column in columns:
        kind = column.type
        if pyarrow.types.is_fixed_size_list(kind):
            column = column.cast(pyarrow.list_(kind.value_type))
        elif not (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
            raise ValueError(f"data.ids_field: `{ready.field}` of `{file.name}` holds {kind}, not lists of integers")
        if not pyarrow.types.is_integer(kind.value_type):
            raise ValueError(f"data.ids_field: `{ready.field}` of `{file.name}` holds {kind}, not lists of integers")
        whole = column.values.null_count == 0
        for item in column:
            row += 1
            values = item.values
            if values is None or (not whole and values.null_count):
                report.note_bad(f"{file.name}:row {row}", f"no ids in `{ready.field}`", "ids")
                continue
            yield from _row(file, ready, values.to_numpy(zero_copy_only=False), row, row - 1, report)


def id_column(file: SourceFile, ready: ReadyIds) -> str:
    """The column or key of ids.

    Raises:
        ValueError: when the file is no table that can hold one.
    """
    if file.format not in _ID_TABLES or ready.field is None:
        raise ValueError(f"data.ids_field: `{file.name}` is {file.format}; lists of ids are in {', '.join(_ID_TABLES)}")
    return ready.field


def row_ids(file: SourceFile, ready: ReadyIds, row: dict[str, Any], position: int) -> Document | str | None:
    """The ids of a jsonl row as a document, None when there are none, or what is wrong with them."""
    values = row.get(str(ready.field))
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        return f"no list of integers in `{ready.field}`"
    if values and not -(1 << 63) <= min(values) <= max(values) < 1 << 63:
        return f"id {max(values, key=abs)} is beyond the vocabulary of {ready.vocab_size}"
    ids = np.array(values, dtype=np.int64)
    if (problem := ready.problem(ids)) is not None:
        return problem[1]
    payload = ready.payload(ids)
    return Document("", file.name, position, payload.astype("<u4").tobytes()) if len(payload) else None


def _row(
    file: SourceFile, ready: ReadyIds, ids: npt.NDArray[Any], row: int, position: int, report: ReadReport
) -> Iterator[Document]:
    if (problem := ready.problem(ids)) is not None:
        report.note_bad(f"{file.name}:row {row}", problem[1], "ids")
    else:
        yield from _document(file, ready.payload(ids), position, report)


def numbers_as_ids(documents: Iterable[Document], ready: ReadyIds, report: ReadReport) -> Iterator[Document]:
    """Documents of a bare vocabulary: the text is numbers, each of which is its own id; another word makes it bad."""
    assert ready.numbers is not None
    table = {str(number): number for number in range(ready.numbers)}
    for document in documents:
        if document.ids is not None:
            yield document
            continue
        where = f"{document.file}: the document at {document.position}"
        try:
            ids = np.array([table[word] for word in document.text.split()], dtype="<u4")
        except KeyError as error:
            why = f"`{str(error.args[0])[:40]}` is no number from 0 to {ready.numbers - 1}"
        else:
            why = "a control character between the numbers" if _NOT_SPACE.search(document.text) else ""
        if why:
            report.good = max(0, report.good - 1)  # it was good text
            report.note_bad(where, why, "ids")
        else:
            yield Document("", document.file, document.position, ids.tobytes())
