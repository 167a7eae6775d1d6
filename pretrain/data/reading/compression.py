"""Compressed bytes as a stream that says how they are damaged.

What lives here: gzip, xz and zstandard frames, one after another. What must not: lines, or what a document is.

Data that ends too early, and bytes behind the last frame that are none, leave all before them sound. Data that does not
decompress, or whose checksum is another one, may have been wrong for some time before it was noticed: nothing of such a
file can be trusted. (Bits that flipped may also look like an early end; a zstandard frame may have no checksum.)
"""

from __future__ import annotations

import io
import lzma
import zlib
from typing import IO, Any

import zstandard

_BLOCK = 1 << 16
_ZSTD_BLOCK = 1 << 12  # its decompressor gives all at once; a block of 4 KiB holds 128 MiB at the very most
_OUTPUT = 1 << 20
_MAGIC = {"gz": (b"\x1f\x8b",), "xz": (b"\xfd7zXZ\x00", b"\x5d\x00\x00"), "zst": (b"\x28\xb5\x2f\xfd",)}
_LONGEST_MAGIC = 6


class DamagedFileError(ValueError):
    """Compressed data that cannot be read to its end. `sound`: what came before the damage is as it was written."""

    def __init__(self, message: str, *, sound: bool) -> None:
        super().__init__(message)
        self.sound = sound


class FrameStream(io.RawIOBase):
    """The bytes in a file of gzip members, xz streams or zstandard frames; zeros behind a frame are padding.

    Raises:
        DamagedFileError: while it is read; all bytes before the damage were given by then.
    """

    def __init__(self, file: IO[bytes], compression: str, name: str) -> None:
        self._file, self._compression, self._name = file, compression, name
        self._frame: Any = None  # none is open
        self._frames = 0
        self._input = self._output = b""
        self._problem: DamagedFileError | None = None

    def readable(self) -> bool:
        """A stream to read from."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer as far as there is data."""
        done = 0
        while done < len(buffer):
            if not self._output and not self._advance():
                break
            size = min(len(buffer) - done, len(self._output))
            buffer[done : done + size] = self._output[:size]
            self._output = self._output[size:]
            done += size
        if not done and self._problem is not None:
            raise self._problem
        return done

    def _advance(self) -> bool:
        """Decompress until there is output; False at the end, or at damage."""
        while not self._output:
            if self._problem is not None or not (self._frame is not None or self._open_frame()):
                return False
            try:
                self._decompress()
            except (zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
                self._problem = self._damaged(f"does not decompress ({error})", sound=False)
        return True

    def _open_frame(self) -> bool:
        while True:
            if len(self._input) < _LONGEST_MAGIC:
                self._input += self._file.read(_BLOCK)
            if self._frames:
                self._input = self._input.lstrip(b"\x00")
            if not self._input:
                if not self._frames:  # what is packed is never empty
                    self._problem = self._damaged("ends too early", sound=True)
                return False
            if len(self._input) >= _LONGEST_MAGIC or not (more := self._file.read(_BLOCK)):
                break
            self._input += more
        if self._frames and not self._is_magic():
            self._problem = self._damaged("has other bytes behind its end", sound=True)
            return False
        self._frames += 1
        if self._compression == "gz":
            self._frame = zlib.decompressobj(31)
        elif self._compression == "xz":
            self._frame = lzma.LZMADecompressor()
        else:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        return True

    def _is_magic(self) -> bool:
        if self._compression == "zst" and self._input[1:4] == b"\x2a\x4d\x18":
            return self._input[0] >> 4 == 5  # a frame to skip
        return self._input.startswith(_MAGIC[self._compression])

    def _decompress(self) -> None:
        waiting = self._compression == "xz" and not self._frame.needs_input
        if not self._input and not waiting:
            self._input = self._file.read(_BLOCK)
            if not self._input:
                self._problem = self._damaged("ends too early", sound=True)
                return
        if self._compression == "gz":
            self._output = self._frame.decompress(self._input, _OUTPUT)
            self._input = self._frame.unconsumed_tail
        elif self._compression == "xz":
            self._output = self._frame.decompress(self._input, _OUTPUT)
            self._input = b""
        else:
            self._output = self._frame.decompress(self._input[:_ZSTD_BLOCK])
            self._input = self._input[_ZSTD_BLOCK:]
        if self._frame.eof:
            self._input = self._frame.unused_data + self._input
            self._frame = None

    def _damaged(self, why: str, *, sound: bool) -> DamagedFileError:
        remedy = "get it anew" if sound else "get it anew, or leave it out"
        return DamagedFileError(
            f"`{self._name}`: the {self._compression} data is damaged: it {why}; {remedy}", sound=sound
        )
