"""Documents, what reading them met, and the lines that they are made of.

What lives here: line numbers, ranges, strict decoding, the policy for bad lines. What must not: what makes a document
of lines.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Literal

from pretrain.data.reading.compression import DamagedFileError
from pretrain.data.reading.encodings import mark_of
from pretrain.data.reading.sources import SourceFile
from pretrain.data.reading.streams import count_lines, seek_line

ByteRange = tuple[int, int]
Policy = Literal["keep-going", "stop"]

LARGEST_DOCUMENT = 1 << 30
"""Bytes of a line and of a document, at most: what is longer is bad, and is never held in memory as a whole."""
_NAMED_PROBLEMS = 20
_SKIPPED_BLOCK = 1 << 20
TOO_LONG = b"\xff\x00 this line is too long to be read \x00\xff\n"
"""Stands for such a line; no text holds it."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it comes from; `position` is its byte offset in the (decompressed) file, or its row number.

    A document of ready token ids has them in `ids`, as little-endian uint32, and no text.
    """

    text: str
    file: str
    position: int
    ids: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes of UTF-8, or of ids."""
        return len(self.text.encode(errors="replace")) if self.ids is None else len(self.ids)


@dataclass
class ReadReport:
    """What reading met: good and bad lines or rows (the first bad ones by name), empty ones, and how far it is.

    In tables, and where a line is a document, `good` counts documents, and `empty` those without text. Elsewhere `good`
    counts lines, and `empty` documents. `by_kind` counts what is bad by the kind of problem. `consumed` counts bytes on
    the disk, or rows of a Hub dataset, from the start of the range.
    """

    bad: int = 0
    empty: int = 0
    consumed: int = 0
    named: list[str] = field(default_factory=list)
    good: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    on_error: Policy = "keep-going"

    def note_bad(self, where: str, why: str, kind: str = "other", count: int = 1) -> None:
        """Count a bad line or row, or several of one problem.

        Raises:
            ValueError: when the policy is to stop.
        """
        if self.on_error == "stop":
            raise ValueError(f"data.on_error: stop: {where}: {why}; mend it, or skip such lines with keep-going")
        self.bad += count
        self.by_kind[kind] = self.by_kind.get(kind, 0) + count
        if len(self.named) < _NAMED_PROBLEMS:
            self.named.append(f"{where}: {why}")


class LineReader:
    """The lines of a file from the first that starts in a range on; keeps line numbers and progress."""

    def __init__(
        self,
        file: SourceFile,
        stream: IO[bytes],
        raw: IO[bytes],
        byte_range: ByteRange | None,
        report: ReadReport,
        codec: str = "utf-8",
    ) -> None:
        self.file, self.stream, self.report, self.codec = file, stream, report, codec
        self.start = byte_range[0] if byte_range is not None else 0
        self.end = byte_range[1] if byte_range is not None else None
        self._first = 0  # where the range's first line starts
        self.line = 0  # number of the current line within the range, from 1
        self._raw = raw
        self._is_mapped = stream is not raw  # offsets count the text's bytes, which are not the file's
        self._lines_before: int | None = None

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(offset, line) from the range's first line on, past its end: the caller stops where it must.

        Where compressed data ends too early, so do the lines; the one that was cut is bad.
        """
        offset = self._first = seek_line(self.stream, self.start)
        limit = LARGEST_DOCUMENT
        while True:
            try:
                line = self.stream.readline(limit + 1)
                self.line += 1
                start = offset
                offset += len(line)
                if len(line) > limit and not line.endswith(b"\n"):
                    offset += self._skip_line()
                    line = TOO_LONG
            except DamagedFileError as error:
                self.line += 1
                self.damaged(error)
                break
            if not line:
                break
            if start == 0:
                line = line.removeprefix(mark_of(self.codec))
            held = [line]
            del line  # a long one is the caller's alone
            yield start, held.pop()
        self.report.consumed = self.file.bytes - self.start

    def read_all(self) -> bytes:
        """The whole text. Where compressed data ends too early, the lines before that; the one that was cut is bad.

        Raises:
            ValueError: when it is longer than a document may be.
        """
        blocks: list[bytes] = []
        size = 0
        try:
            while block := self._read_some():
                blocks.append(block)
                size += len(block)
                if size > LARGEST_DOCUMENT:
                    raise ValueError(too_large(self.file, size))
        except DamagedFileError as error:
            text = b"".join(blocks)
            text = text[: text.rfind(b"\n") + 1]
            self.line = text.count(b"\n") + 1
            self.damaged(error)
            self.line = 0
            return text.removeprefix(mark_of(self.codec))
        self.report.consumed = self.file.bytes
        return b"".join(blocks).removeprefix(mark_of(self.codec))

    def _read_some(self) -> bytes:
        # Not `read`, which gathers until it has as much as was asked for, and at damage loses what it had.
        assert isinstance(self.stream, io.BufferedReader | io.BytesIO)
        return self.stream.read1(_SKIPPED_BLOCK)

    def _skip_line(self) -> int:
        """Read to the end of a line and keep nothing of it; return how long that was."""
        size = 0
        while part := self.stream.readline(_SKIPPED_BLOCK):
            size += len(part)
            if part.endswith(b"\n"):
                break
        return size

    def in_range(self, offset: int) -> bool:
        """Whether a document that starts at `offset` belongs to the range; also notes the progress."""
        self.report.consumed = self._raw.tell() if self._is_mapped else offset - self.start
        return self.end is None or offset < self.end

    def bad(self, why: str, kind: str, line: int | None = None) -> None:
        """Count a line of the range (the current one, if none is given) as bad."""
        if self._lines_before is None:
            self._lines_before = count_lines(self.file, self._first) if self._first else 0
        number = self._lines_before + (self.line if line is None else line)
        self.report.note_bad(f"{self.file.name}:{number}", why, kind)

    def damaged(self, error: DamagedFileError) -> None:
        """Count the current line as the one where a compressed file ends too early.

        Raises:
            DamagedFileError: when what came before may be wrong too.
        """
        if not error.sound:
            raise error
        self.bad(f"{error}; what follows is lost", "damaged")

    def decode(self, line: bytes, *, count: bool = True) -> str | None:
        """A line's text, or None when it cannot be had: then it is a bad line, unless another range counts it."""
        try:
            return decode_line(line, self.codec, self.file.encoding)
        except ValueError as error:
            if count:
                self.bad(str(error), "too long" if line == TOO_LONG else "encoding")
            return None

    def good_lines(self, data: bytes) -> Iterator[str]:
        """The lines of `data` that can be decoded; the others are counted."""
        for line in io.BytesIO(data):
            self.line += 1
            text = self.decode(line)
            if text is not None:
                yield text

    def document(self, text: str, position: int, *, counted: bool = True) -> Iterator[Document]:
        """The document, unless it is empty or blank; `counted` says that it is the unit of what is good."""
        if text and not text.isspace():
            self.report.good += counted
            yield Document(text, self.file.name, position)
        else:
            self.report.empty += 1


def decode_line(line: bytes, codec: str, encoding: str) -> str:
    """A line's text.

    Raises:
        ValueError: says why it has none.
    """
    if line == TOO_LONG:
        raise ValueError(f"longer than {LARGEST_DOCUMENT:,} bytes, the most that a line may have")
    try:
        return line.decode(codec)
    except UnicodeDecodeError as error:
        name = "UTF-8" if encoding in ("auto", "utf-8") else encoding
        raise ValueError(f"not {name} ({error.reason} at byte {error.start} of the line)") from None


def too_large(file: SourceFile, size: int) -> str:
    """The message for a file that would be too long a document."""
    return (
        f"data.document: `{file.name}` would be one document of {size:,} bytes or more, above {LARGEST_DOCUMENT:,}; "
        "give line, paragraph or {start: REGEX}"
    )


def without_newline(line: str) -> str:
    """The line without what ends it."""
    return line[:-2] if line.endswith("\r\n") else line.removesuffix("\n")
