"""Documents, what reading them met, and the lines that they are made of.

What lives here: line numbers, ranges, strict decoding. What must not: what makes a document of lines.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from pretrain.data.sources import SourceFile
from pretrain.data.streams import BOM, count_lines, seek_line

ByteRange = tuple[int, int]
_NAMED_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it comes from; `position` is its byte offset in the (decompressed) file, or its row number."""

    text: str
    file: str
    position: int


@dataclass
class ReadReport:
    """What reading met: bad lines or rows (the first ones by name), empty documents, and how far it is.

    `consumed` counts bytes on the disk, or rows of a Hub dataset, from the start of the range.
    """

    bad: int = 0
    empty: int = 0
    consumed: int = 0
    named: list[str] = field(default_factory=list)

    def note_bad(self, where: str, why: str) -> None:
        """Count a bad line or row."""
        self.bad += 1
        if len(self.named) < _NAMED_PROBLEMS:
            self.named.append(f"{where}: {why}")


class LineReader:
    """The lines of a file from the first that starts in a range on; keeps line numbers and progress."""

    def __init__(
        self, file: SourceFile, stream: IO[bytes], raw: IO[bytes], byte_range: ByteRange | None, report: ReadReport
    ) -> None:
        self.file, self.stream, self.report = file, stream, report
        self.start = byte_range[0] if byte_range is not None else 0
        self.end = byte_range[1] if byte_range is not None else None
        self._first = 0  # where the range's first line starts
        self.line = 0  # number of the current line within the range, from 1
        self._raw = raw
        self._lines_before: int | None = None

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(offset, line) from the range's first line on, past its end: the caller stops where it must."""
        offset = self._first = seek_line(self.stream, self.start)
        for line in self.stream:
            self.line += 1
            start = offset
            offset += len(line)
            if start == 0 and line.startswith(BOM):
                line = line[len(BOM) :]
            yield start, line
        self.report.consumed = self.file.bytes - self.start

    def in_range(self, offset: int) -> bool:
        """Whether a document that starts at `offset` belongs to the range; also notes the progress."""
        self.report.consumed = (offset if self.file.compression is None else self._raw.tell()) - self.start
        return self.end is None or offset < self.end

    def bad(self, why: str) -> None:
        """Count the current line as bad."""
        if self._lines_before is None:
            self._lines_before = count_lines(self.file, self._first)
        self.report.note_bad(f"{self.file.name}:{self._lines_before + self.line}", why)

    def decode(self, line: bytes, *, count: bool = True) -> str | None:
        """A line's text, or None when it is not UTF-8: then it is a bad line, unless another range counts it."""
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            if count:
                self.bad(f"not UTF-8 ({error.reason} at byte {error.start} of the line)")
            return None

    def good_lines(self, data: bytes) -> Iterator[str]:
        """The lines of `data` that are UTF-8; the others are counted."""
        for line in io.BytesIO(data.removeprefix(BOM)):
            self.line += 1
            text = self.decode(line)
            if text is not None:
                yield text

    def document(self, text: str, position: int) -> Iterator[Document]:
        """The document, unless it is empty or blank."""
        if text and not text.isspace():
            yield Document(text, self.file.name, position)
        else:
            self.report.empty += 1


def without_newline(line: str) -> str:
    """The line without what ends it."""
    return line[:-2] if line.endswith("\r\n") else line.removesuffix("\n")
