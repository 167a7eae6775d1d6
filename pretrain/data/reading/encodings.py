"""Which encoding a text is in: what the configuration says, checked against its bytes; else its mark, or UTF-8.

What lives here: choosing the codec of a file, refusing what would come out garbled, and turning wide text into UTF-8 as
it is read. What must not: lines and documents.

Nothing is guessed. `auto` is UTF-8, or UTF-16 and UTF-32 by their byte-order mark; a file whose first block is clearly
something else is refused, with the encodings that would read it. In all encodings but UTF-16 and UTF-32 the bytes of a
newline, a quote and a comma stand for nothing else, so that such files are split by byte range as they are; wide ones
are read whole, through a decoder, and their positions count bytes of the UTF-8 text.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from pretrain.data.reading.compression import DamagedFileError
from pretrain.data.reading.sources import SourceFile
from pretrain.data.reading.streams import open_bytes

_BLOCK = 1 << 16
# What Windows writes under the names of the standards, as web browsers read them: supersets with the vendors' signs.
_CODECS = {"big5": "cp950", "shift_jis": "cp932", "euc-kr": "cp949"}
_WIDE = ("utf-16", "utf-32")
_MARKS = (  # the longer marks first: that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
_FEWEST_BAD_LINES = 10
_FEWEST_UTF8_CHARACTERS = 8  # text of another encoding that reads as so many characters of UTF-8 is no accident
_FEWEST_NULS = 8
_FEW, _MANY = 0.02, 0.3  # shares of zeros among the bytes of a unit that hold the low part, or the high one
_CANDIDATES = ("gb18030", "big5", "shift_jis", "euc-kr", "cp1252", "latin-1")
_BAD = "\udcff"  # becomes the byte 0xFF, which no UTF-8 text holds


def _mark_bad(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return _BAD, error.end


codecs.register_error("pretrain.mark_bad", _mark_bad)


@contextmanager
def open_text(file: SourceFile, *, as_utf8: bool = False) -> Iterator[tuple[IO[bytes], IO[bytes], str]]:
    """Open a file: (the text's bytes, the file on the disk, the codec of the text's bytes).

    The bytes are those of the file, decompressed; of UTF-16 and UTF-32, and of all with `as_utf8`, the same text in
    UTF-8, where the byte 0xFF stands for what could not be decoded.

    Raises:
        ValueError: when the bytes are clearly of another encoding than `data.encoding` says.
        DamagedFileError: when compressed data is damaged, while it is read.
    """
    with open_bytes(file) as (stream, raw):
        codec = codec_of(file, _first_block(stream))
        if is_wide(codec) or (as_utf8 and codec != "utf-8"):
            yield io.BufferedReader(_Utf8Stream(stream, codec), _BLOCK), raw, "utf-8"
        else:
            yield stream, raw, codec


def encoding_of(file: SourceFile) -> str:
    """The codec of a file's text, by its first block."""
    with open_bytes(file) as (stream, _):
        return codec_of(file, _first_block(stream))


def is_wide(codec: str) -> bool:
    """Whether newlines take more than a byte, so that the text has to be decoded before it is cut."""
    return codec.startswith(_WIDE)


def codec_of(file: SourceFile, block: bytes) -> str:
    """The codec of a file that begins with `block`.

    Raises:
        ValueError: when the bytes are clearly of another encoding than `data.encoding` says; names the file, the first
            bad byte, the encodings that would read it, and the remedy.
    """
    marked = next((codec for mark, codec in _MARKS if block.startswith(mark)), None)
    encoding = file.encoding
    if encoding == "auto":
        if marked is None:
            _refuse_unlike_utf8(file, block)
        return marked or "utf-8"
    if marked is not None and not marked.startswith(encoding):
        raise ValueError(
            f"data.encoding: `{file.name}` opens with the mark of {marked[:6].rstrip('-')}, and `{encoding}` is asked "
            "for; use auto, or give this file a source with an encoding of its own"
        )
    if encoding in _WIDE:
        return marked or _byte_order(file, block)
    if encoding != "utf-8" and _is_surely_utf8(block):
        raise ValueError(
            f"data.encoding: `{file.name}` is UTF-8, and `{encoding}`, which is asked for, would garble it; use auto, "
            "or give this file a source with an encoding of its own"
        )
    return _CODECS.get(encoding, encoding)


def mark_of(codec: str) -> bytes:
    """The byte-order mark that text of a codec may open with; empty where there is none."""
    return "\ufeff".encode(codec) if codec in ("utf-8", "gb18030") else b""


def readable_as(block: bytes) -> list[tuple[str, str]]:
    """The encodings that decode `block` strictly, the likeliest first, each with the first of what is not ASCII."""
    found: list[tuple[float, int, str, str]] = []
    for rank, encoding in enumerate(_CANDIDATES):
        try:
            text = codecs.getincrementaldecoder(_CODECS.get(encoding, encoding))().decode(block)
        except UnicodeDecodeError:
            continue
        runs = re.findall(r"[^\x00-\x7f]+", text)
        foreign = "".join(runs)
        western = encoding in ("cp1252", "latin-1")
        likely = sum(_is_common(character, encoding) for character in foreign) / max(1, len(foreign))
        # Accented letters stand among plain ones, signs of East Asian scripts beside each other.
        if (len(foreign) > 2 * len(runs)) == western:
            likely /= 2
        shown = " ".join(text[text.find(runs[0]) :][:16].split()) if runs else ""
        found.append((-round(likely, 2), rank, encoding, shown))
    return [(encoding, shown) for likely, _, encoding, shown in sorted(found) if likely < -0.2]


def _is_common(character: str, encoding: str) -> bool:
    """Whether a sign that is not ASCII is one of those that most of the text in an encoding is made of."""
    if "\u3000" <= character <= "\u303f" or "\uff00" <= character <= "\uff5e":
        return encoding not in ("cp1252", "latin-1")
    if encoding == "gb18030":
        return _has(character, "gb2312", 0xB0, 0xF7)
    if encoding == "big5":
        return _has(character, "cp950", 0xA4, 0xC6)
    if encoding == "shift_jis":
        return "\u3040" <= character <= "\u30ff" or _has(character, "cp932", 0x88, 0x97)
    if encoding == "euc-kr":
        return "\uac00" <= character <= "\ud7a3"
    return ("\u00c0" <= character <= "\u017f" and character.isalpha()) or "\u2010" <= character <= "\u203a"


def _has(character: str, codec: str, first: int, last: int) -> bool:
    """Whether the first of a sign's two bytes lies between two others: where a standard keeps its common signs."""
    try:
        data = character.encode(codec)
    except UnicodeEncodeError:
        return False
    return len(data) == 2 and first <= data[0] <= last


def _first_block(stream: IO[bytes]) -> bytes:
    """The first bytes of a stream that stands at its beginning; it stays there."""
    assert isinstance(stream, io.BufferedReader)
    try:
        return stream.peek(_BLOCK)[:_BLOCK]
    except DamagedFileError:  # nothing at all can be read; the reader meets it again
        return b""


def _refuse_unlike_utf8(file: SourceFile, block: bytes) -> None:
    """Raise ValueError for a first block of UTF-16 or UTF-32 without a mark, or one whose lines are bad as a rule.

    They are when most of those that are not plain ASCII are not UTF-8, and these are at least ten, or most of all.
    """
    wide = _looks_wide(block)
    if wide is not None:
        raise ValueError(
            f"data.encoding: `{file.name}` looks like {wide} without its byte-order mark (every other byte is zero); "
            f"say so with data.encoding: {wide[:6]}"
        )
    whole, newline, rest = block.rpartition(b"\n")
    lines = (whole + newline if newline else rest).split(b"\n")
    bad = foreign = 0
    for number, line in enumerate(lines, start=1):
        if line.isascii():
            continue
        foreign += 1
        # A block without a newline ends where it happens to, perhaps within a character.
        bad += not _decodes(line, is_whole=bool(newline) or number < len(lines))
    if bad * 2 > foreign and (bad >= _FEWEST_BAD_LINES or bad * 2 > sum(map(bool, lines))):
        raise ValueError(not_utf8(file, block))


def not_utf8(file: SourceFile, block: bytes, offset: int | None = None) -> str:
    """The message for a file that is not UTF-8, by a block with bad lines; its first bad byte is at `offset`."""
    where = ""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(block)
    except UnicodeDecodeError as error:
        offset = error.start if offset is None else offset
        where = f": byte 0x{block[error.start]:02x} at {offset:,} ({error.reason})"
    readable = readable_as(block)
    if not readable:
        perhaps = "none of the encodings known here reads it, so it may be damaged, or no text; leave it out"
    else:
        shown = ", ".join(f"{encoding} (\u201c{text}\u201d)" for encoding, text in readable[:3])
        remedy = f"say so with data.encoding: {readable[0][0]}, or `encoding` of a source of its own"
        perhaps = f"perhaps it is {shown}; {remedy}"
    return f"data.encoding: `{file.name}` is not UTF-8{where}; {perhaps}"


def _decodes(line: bytes, *, is_whole: bool) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(line, is_whole)
    except UnicodeDecodeError:
        return False
    return True


def _is_surely_utf8(block: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(block)
    except UnicodeDecodeError:
        return False
    return sum(character > "\x7f" for character in text) >= _FEWEST_UTF8_CHARACTERS


def _looks_wide(block: bytes) -> str | None:
    """`utf-16` or `utf-32`, with its byte order, where zero bytes stand as in wide text with some ASCII in it."""
    if block.count(0) < _FEWEST_NULS:
        return None
    units = len(block) // 4
    zeros = [block[at : units * 4 : 4].count(0) / max(1, units) for at in range(4)]
    if zeros[0] < _FEW and min(zeros[2], zeros[3]) > 0.9:
        return "utf-32-le"
    if zeros[3] < _FEW and min(zeros[0], zeros[1]) > 0.9:
        return "utf-32-be"
    if max(zeros[0], zeros[2]) < _FEW and min(zeros[1], zeros[3]) > _MANY:
        return "utf-16-le"
    if max(zeros[1], zeros[3]) < _FEW and min(zeros[0], zeros[2]) > _MANY:
        return "utf-16-be"
    return None


def _byte_order(file: SourceFile, block: bytes) -> str:
    """The byte order of wide text without its mark: the one in which it has more ASCII and common Chinese signs.

    Raises:
        ValueError: when the two are alike.
    """
    votes = {}
    for order in ("le", "be"):
        text = block.decode(f"{file.encoding}-{order}", "replace")
        votes[order] = sum(
            "\x09" <= sign <= "\x7e" or "\u3000" <= sign <= "\u30ff" or "\u4e00" <= sign <= "\u9fff" for sign in text
        )
    if votes["le"] == votes["be"] and block:
        raise ValueError(
            f"data.encoding: `{file.name}` has no byte-order mark, and which byte of its {file.encoding} comes first "
            "cannot be told; put the mark before it, or convert it to UTF-8"
        )
    return f"{file.encoding}-{'le' if votes['le'] >= votes['be'] else 'be'}"


class _Utf8Stream(io.RawIOBase):
    """Text of another encoding as UTF-8; the byte 0xFF stands for what cannot be decoded."""

    def __init__(self, stream: IO[bytes], codec: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(codec)("pretrain.mark_bad")
        self._output = b""
        self._ended = False

    def readable(self) -> bool:
        """A stream to read from."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Give what is decoded, at most a block."""
        while not self._output:
            if self._ended:
                return 0
            block = self._stream.read1(_BLOCK) if isinstance(self._stream, io.BufferedReader) else b""
            self._ended = not block
            self._output = self._decoder.decode(block, self._ended).encode("utf-8", "surrogateescape")
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


def what_it_is(file: SourceFile) -> str | None:
    """What a file with undecodable lines may be, by the first of them; None when all can be decoded."""
    bad: list[bytes] = []
    where = size = offset = 0
    try:
        with open_text(file) as (stream, _, codec):
            while size < _BLOCK and len(bad) < 1000 and (line := stream.readline(_BLOCK)):
                try:
                    line.decode(codec)
                except UnicodeDecodeError as error:
                    where = where if bad else offset + error.start
                    bad.append(line)
                    size += len(line)
                offset += len(line)
    except ValueError:
        return None
    return not_utf8(file, b"".join(bad), where) if bad and file.encoding in ("auto", "utf-8") else None
