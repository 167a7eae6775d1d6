"""Documents in plain text: a line, a paragraph, a file, or from one opening line to the next.

What lives here: the four rules. What must not: tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pretrain.data.reading import lines
from pretrain.data.reading.lines import Document, LineReader, too_large, without_newline
from pretrain.data.reading.streams import after_blank_line, seek_line


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
    if reader.start > 0:
        return
    if reader.file.bytes > lines.LARGEST_DOCUMENT and reader.file.compression is None:
        raise ValueError(too_large(reader.file, reader.file.bytes))
    data = reader.read_all()
    reader.report.good += data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
    bad = reader.report.bad
    try:
        text = data.decode(reader.codec)
    except UnicodeDecodeError:
        text = "".join(reader.good_lines(data))
        reader.report.good -= reader.report.bad - bad
    del data
    yield from reader.document(text, 0, counted=False)


class _Open:
    """A document that lines are added to; one that grows too long is let go of, and counted as bad."""

    def __init__(self, reader: LineReader) -> None:
        self._reader = reader
        self._parts: list[str] = []
        self._size = self._line = 0
        self.position = 0
        self.is_open = False

    def open(self, position: int) -> None:
        """Begin with the current line."""
        self.position, self._line, self.is_open = position, self._reader.line, True

    def add(self, text: str, size: int) -> None:
        """Append a line of `size` bytes."""
        self._reader.report.good += 1
        self._size += size
        if self._size <= lines.LARGEST_DOCUMENT:
            self._parts.append(text)
        else:
            self._parts.clear()

    def close(self, *, keep_newline: bool, keep_empty: bool = True) -> Iterator[Document]:
        """The document, if it is one; the next can be opened after."""
        if self._size > lines.LARGEST_DOCUMENT:
            self._reader.bad(
                f"the document that starts here is longer than {lines.LARGEST_DOCUMENT:,} bytes", "too long", self._line
            )
        elif self.is_open and (self._parts or keep_empty):
            text = "".join(self._parts)
            self._parts = []
            text = text if keep_newline else without_newline(text)
            yield from self._reader.document(text, self.position, counted=False)
        self._parts, self._size, self.is_open = [], 0, False


def paragraphs(reader: LineReader) -> Iterator[Document]:
    """Lines up to a blank one are a document; blank lines, and the newline before one, belong to none."""
    first = seek_line(reader.stream, reader.start)
    elsewhere = reader.start > 0 and not after_blank_line(reader.stream, first)  # in another range's paragraph
    paragraph = _Open(reader)
    for offset, line in reader.lines():
        blank = not line.strip()
        if blank:
            yield from paragraph.close(keep_newline=False)
            elsewhere = False
        if not paragraph.is_open and not reader.in_range(offset):
            break
        if blank or elsewhere:
            continue
        if not paragraph.is_open:
            paragraph.open(offset)
        text = reader.decode(line)
        if text is not None:
            paragraph.add(text, len(line))
    yield from paragraph.close(keep_newline=False)


def started(reader: LineReader, start: re.Pattern[str]) -> Iterator[Document]:
    """A line that `start` finds something in opens a document; text before the file's first such line is one too."""
    document = _Open(reader)
    if reader.start == 0:
        document.open(0)
    for offset, line in reader.lines():
        text = reader.decode(line, count=document.is_open)
        opens = text is not None and start.search(without_newline(text)) is not None
        if opens:
            yield from document.close(keep_newline=True, keep_empty=False)
        if not document.is_open and not reader.in_range(offset):
            break
        if opens:
            document.open(offset)
        if document.is_open and text is not None:
            document.add(text, len(line))
    yield from document.close(keep_newline=True, keep_empty=False)
