"""Documents in plain text: a line, a paragraph, a file, or from one opening line to the next.

What lives here: the four rules. What must not: tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pretrain.data.lines import Document, LineReader, without_newline
from pretrain.data.streams import BOM, after_blank_line, seek_line

_LARGEST_FILE_DOCUMENT = 1 << 30


def text_lines(reader: LineReader) -> Iterator[Document]:
    """Each line is a document, without the newline that ends it."""
    for offset, line in reader.lines():
        if not reader.in_range(offset):
            break
        text = reader.decode(line)
        if text is not None:
            yield from reader.document(without_newline(text), offset)


def whole_file(reader: LineReader) -> Iterator[Document]:
    """The file is one document, every byte of it (but for a byte-order mark)."""
    size = reader.file.bytes
    if reader.start > 0:
        return
    if size > _LARGEST_FILE_DOCUMENT:
        raise ValueError(
            f"data.document: `{reader.file.name}` would be one document of {size:,} bytes; "
            "give line, paragraph or {start: REGEX}"
        )
    data = reader.stream.read()
    reader.report.consumed = size
    try:
        text = data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError:
        text = "".join(reader.good_lines(data))
    yield from reader.document(text, 0)


def paragraphs(reader: LineReader) -> Iterator[Document]:
    """Lines up to a blank one are a document; blank lines, and the newline before one, belong to none."""
    first = seek_line(reader.stream, reader.start)
    elsewhere = reader.start > 0 and not after_blank_line(reader.stream, first)  # in another range's paragraph
    parts: list[str] = []
    position, is_open = 0, False
    for offset, line in reader.lines():
        blank = not line.strip()
        if blank:
            if is_open:
                yield from reader.document(without_newline("".join(parts)), position)
            parts, is_open, elsewhere = [], False, False
        if not is_open and not reader.in_range(offset):
            break
        if blank or elsewhere:
            continue
        if not is_open:
            position, is_open = offset, True
        text = reader.decode(line)
        if text is not None:
            parts.append(text)
    if is_open:
        yield from reader.document(without_newline("".join(parts)), position)


def started(reader: LineReader, start: re.Pattern[str]) -> Iterator[Document]:
    """A line that `start` finds something in opens a document; text before the file's first such line is one too."""
    parts: list[str] = []
    position, is_open = 0, reader.start == 0
    for offset, line in reader.lines():
        text = reader.decode(line, count=is_open)
        opens = text is not None and start.search(without_newline(text)) is not None
        if opens and is_open:
            if parts:
                yield from reader.document("".join(parts), position)
            parts, is_open = [], False
        if not is_open and not reader.in_range(offset):
            break
        if opens:
            position, is_open = offset, True
        if is_open and text is not None:
            parts.append(text)
    if parts:
        yield from reader.document("".join(parts), position)
