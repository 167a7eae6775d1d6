"""Bytes of an input file, plain or compressed, and the lines in them.

What lives here: opening, decompression, where a line starts. What must not: what a document is.

A line ends with `\\n`; its bytes, `\\r` too, stay as they are. A damaged compressed file is an error, not a short one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pretrain.data.reading.compression import FrameStream
from pretrain.data.reading.sources import SourceFile

_BUFFER = 1 << 20
_BLANK = b" \t\r\v\f"


@contextmanager
def open_bytes(file: SourceFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file: (the text's bytes, the file on the disk, whose position tells how far the reading is).

    Raises:
        DamagedFileError: when the compressed data is damaged, while it is read.
    """
    with open(file.path, "rb", buffering=_BUFFER) as raw:
        if file.compression is None:
            yield raw, raw
        else:
            yield io.BufferedReader(FrameStream(raw, file.compression, file.name), _BUFFER), raw


def first_bytes(stream: IO[bytes], most: int, file_format: str) -> IO[bytes]:
    """About the first `most` bytes: of text up to a whole character, of a table up to a whole row."""
    data = stream.read(most)
    if len(data) < most:
        return io.BytesIO(data)
    if file_format == "txt":
        end = len(data)
        while end and data[end - 1] & 0xC0 == 0x80:  # a character of several bytes may be cut off: leave it out
            end -= 1
        return io.BytesIO(data if end == len(data) and data[-1] < 0x80 else data[: max(0, end - 1)])
    data += stream.readline()
    while file_format == "csv" and data.count(b'"') % 2 and (line := stream.readline()):  # within a quoted field
        data += line
    return io.BytesIO(data)


def seek_line(stream: IO[bytes], start: int) -> int:
    """Go to the first line that starts at `start` or later; return where that is."""
    if start == 0:
        return 0
    stream.seek(start - 1)
    return start - 1 + len(stream.readline())


def after_blank_line(stream: IO[bytes], line_start: int) -> bool:
    """Whether the line before the one at `line_start` is blank, or there is none. Leaves the stream elsewhere."""
    position = line_start - 1  # the newline that ends the line before
    while position > 0:
        begin = max(0, position - 4096)
        stream.seek(begin)
        rest = stream.read(position - begin).rstrip(_BLANK)
        if rest:
            return rest.endswith(b"\n")
        position = begin
    return True


def count_lines(file: SourceFile, end: int) -> int:
    """How many lines end before byte `end` of a plain file."""
    lines = 0
    with Path(file.path).open("rb") as raw:
        while end > 0 and (block := raw.read(min(_BUFFER, end))):
            lines += block.count(b"\n")
            end -= len(block)
    return lines
