"""A bounded, seeded sample of a corpus of any size, drawn in one pass and kept on the disk.

What lives here: the choice of text and its bookkeeping (bytes, files, digest). What must not: tokenizers.

Each document is cut into pieces of at most 65,536 characters. A piece's place in [0, 1) is a keyed hash of (seed,
file, position, number of the piece), and the sample is all pieces below the largest threshold that keeps it within
`max_bytes`. So the sample is the same whatever the order of the documents, and text that is added to the corpus only
lowers the threshold. The threshold falls while the corpus is read; little more than twice `max_bytes` lies on the
disk, and memory holds one document, one number for each of 2^20 thresholds, and one entry a file.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

import numpy as np

PIECE_CHARACTERS = 65_536
LARGEST_SAMPLE = 2**31 - 1  # bytes; the library counts pairs in 32 bits, and more text could overflow them
_PLACES = 1 << 20
_RECORD = struct.Struct("<IIQI")  # place, file, position, length in bytes


class TextDocument(Protocol):
    """What is read of a document: its text, the file it stands in, and where."""

    @property
    def text(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def position(self) -> int: ...


@dataclass(frozen=True)
class Piece:
    """Part of a document; `position` is the document's."""

    text: str
    file: str
    position: int


@dataclass
class FileBytes:
    """UTF-8 bytes of one file: in all, and in the sample."""

    corpus: int = 0
    sample: int = 0


class TextSample:
    """The sample. Use as a context manager: `add` documents, then `finish`, then iterate as often as needed."""

    def __init__(self, max_bytes: int, seed: int = 0, directory: Path | None = None) -> None:
        """Sample at most `max_bytes` UTF-8 bytes of text; `directory` holds the temporary file."""
        self.max_bytes = min(max_bytes, LARGEST_SAMPLE)
        self.documents = 0
        self.files: dict[str, FileBytes] = {}
        self._key = hashlib.blake2b(str(seed).encode(), digest_size=16).digest()
        self._directory = directory
        self._digest = 0
        self._threshold = _PLACES
        self._bytes_at = np.zeros(_PLACES, dtype=np.int64)
        self._kept = 0
        self._spooled = 0
        self._names: list[str] = []
        self._indices: dict[str, int] = {}
        self._spool: IO[bytes] = self._new_spool()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spool.close()

    @property
    def corpus_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(file.corpus for file in self.files.values())

    @property
    def sample_bytes(self) -> int:
        """UTF-8 bytes of the sample (after `finish`)."""
        return self._kept

    @property
    def complete(self) -> bool:
        """Whether the sample is the whole corpus."""
        return self._threshold == _PLACES

    @property
    def digest(self) -> str:
        """One hash of all documents (files, positions, texts), whatever their order: the sum of their SHA-256."""
        return f"{self._digest:064x}"

    def add(self, document: TextDocument) -> None:
        """Consider one document. Lone surrogates, which no encoding can write, become question marks."""
        encoded = document.text.encode("utf-8", errors="replace")
        name = f"{document.file}\0{document.position}\0".encode("utf-8", errors="replace")
        document_digest = int.from_bytes(hashlib.sha256(name + encoded).digest(), "big")
        self._digest = (self._digest + document_digest) % 2**256
        self.documents += 1
        file = self.files.setdefault(document.file, FileBytes())
        file.corpus += len(encoded)
        if document.file not in self._indices:
            self._indices[document.file] = len(self._names)
            self._names.append(document.file)
        index = self._indices[document.file]
        if len(encoded) <= PIECE_CHARACTERS:
            self._add_piece(name, 0, index, document.position, encoded)
            return
        for number, text in enumerate(cut(document.text)):
            self._add_piece(name, number, index, document.position, text.encode("utf-8", errors="replace"))

    def _add_piece(self, name: bytes, number: int, file: int, position: int, encoded: bytes) -> None:
        if not encoded:
            return
        place = self._place(name, number)
        self._bytes_at[place] += len(encoded)
        if place >= self._threshold:
            return
        self._spool.write(_RECORD.pack(place, file, position, len(encoded)) + encoded)
        self._kept += len(encoded)
        self._spooled += len(encoded)
        if self._kept > self.max_bytes + self.max_bytes // 4:  # not at every piece: finding the threshold costs
            self._lower_threshold()
            if self._spooled > 2 * self.max_bytes:
                self._compact()

    def _place(self, name: bytes, number: int) -> int:
        digest = hashlib.blake2b(name + number.to_bytes(8, "little"), digest_size=8, key=self._key).digest()
        return int.from_bytes(digest, "little") >> (64 - _PLACES.bit_length() + 1)

    def _threshold_for(self, max_bytes: int) -> tuple[int, int]:
        """The largest threshold below which at most `max_bytes` lie, and the bytes that do."""
        totals = np.cumsum(self._bytes_at)
        threshold = int(np.searchsorted(totals, max_bytes, side="right"))
        return threshold, int(totals[threshold - 1]) if threshold else 0

    def _lower_threshold(self) -> None:
        self._threshold, self._kept = self._threshold_for(self.max_bytes)

    def _compact(self) -> None:
        old, self._spool, self._spooled = self._spool, self._new_spool(), 0
        for place, file, position, encoded in self._records(old):
            self._spool.write(_RECORD.pack(place, file, position, len(encoded)) + encoded)
            self._spooled += len(encoded)
        old.close()

    def finish(self) -> None:
        """Settle the threshold.

        Raises:
            ValueError: when there is no text, or `max_bytes` is too small to hold a piece.
        """
        if self._kept > self.max_bytes:
            self._lower_threshold()
        if not self.corpus_bytes:
            raise ValueError("data.train: there is no text in the files given; name other files")
        if not self._kept:
            raise ValueError(
                f"tokenizer.max_bytes: {self.max_bytes} is too little to hold a sample of {self.corpus_bytes} bytes "
                f"of text; raise it to at least {min(self.corpus_bytes, 64 * PIECE_CHARACTERS)}"
            )
        self._count_files()

    def shrink(self, max_bytes: int) -> None:
        """Keep a part of at most `max_bytes`: what a smaller budget would have drawn. It holds one piece at least."""
        threshold, kept = self._threshold_for(max_bytes)
        if threshold < self._threshold and kept:
            self._threshold, self._kept = threshold, kept
            self._count_files()

    def part(self, max_bytes: int) -> Iterator[str]:
        """The texts that a budget of `max_bytes` would have drawn; the sample stays as it is."""
        threshold, _ = self._threshold_for(max_bytes)
        return (encoded.decode("utf-8") for place, _, _, encoded in self._records(self._spool) if place < threshold)

    def _count_files(self) -> None:
        for file in self.files.values():
            file.sample = 0
        for _, number, _, encoded in self._records(self._spool):
            self.files[self._names[number]].sample += len(encoded)

    def __iter__(self) -> Iterator[Piece]:
        """The pieces of the sample, in the order in which they were added."""
        for _, file, position, encoded in self._records(self._spool):
            yield Piece(encoded.decode("utf-8"), self._names[file], position)

    def texts(self) -> Iterator[str]:
        """The texts of the sample's pieces."""
        return (piece.text for piece in self)

    def _records(self, spool: IO[bytes]) -> Iterator[tuple[int, int, int, bytes]]:
        spool.seek(0)
        while header := spool.read(_RECORD.size):
            place, file, position, length = _RECORD.unpack(header)
            encoded = spool.read(length)
            if place < self._threshold:
                yield place, file, position, encoded

    def _new_spool(self) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=self._directory, prefix=".tmp-sample-")  # __exit__ closes it


def cut(text: str) -> Iterator[str]:
    """Cut a long text into pieces of at most 65,536 characters, after the last line break or space of each."""
    start = 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        if end < len(text):
            at = text.rfind("\n", start, end)
            at = at if at > start else text.rfind(" ", start, end)
            end = at + 1 if at > start else end
        yield text[start:end]
        start = end


def draw_sample(
    documents: Iterable[TextDocument], max_bytes: int, seed: int = 0, directory: Path | None = None
) -> TextSample:
    """Read all documents once and keep the sample; the caller closes it.

    Raises:
        ValueError: when there is no text, or `max_bytes` is too small.
    """
    sample = TextSample(max_bytes, seed, directory)
    try:
        for document in documents:
            sample.add(document)
        sample.finish()
    except BaseException:
        sample.__exit__(None, None, None)
        raise
    return sample
