"""Token shards: the ids of a part's documents, one after another, and where each document ends.

What lives here: the format. What must not: text, or how documents become rows.

`part-00000.ds` holds little-endian uint16 when the vocabulary has up to 65,536 ids, else uint32; no special tokens.
`part-00000.ds.index` holds a little-endian uint64 a document: where it ends, in tokens. This is the layout of
datatrove's and nanotron's tokenized files; the width is written in our manifest and never guessed.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pretrain.files import ArtifactError, HashingWriter, sync_directory

TOKENS_SUFFIX = ".ds"
INDEX_SUFFIX = ".ds.index"
UNFINISHED_SUFFIX = ".unfinished"

TRAIN, VALIDATION = "train", "validation"
"""Names of splits, each a directory of shards; further validation splits are called validation-NAME."""

IntArray = npt.NDArray[np.int64]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The width of an id on the disk."""
    return np.dtype("<u2") if vocab_size <= 65_536 else np.dtype("<u4")


@dataclass(frozen=True)
class ShardFacts:
    """What a shard holds; `name` is its path in the data directory without suffix, `bytes` the text's UTF-8 bytes."""

    name: str
    documents: int
    tokens: int
    bytes: int
    digest: str
    index_digest: str


class ShardWriter:
    """Writes one shard. A context manager: both files appear whole when it closes, neither on an error."""

    def __init__(self, stem: Path, name: str, vocab_size: int) -> None:
        self.documents = self.tokens = self.bytes = 0
        self._name, self._vocab_size, self._dtype = name, vocab_size, token_dtype(vocab_size)
        self._paths = [stem.with_name(stem.name + suffix) for suffix in (TOKENS_SUFFIX, INDEX_SUFFIX)]
        stem.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: a worker that outlived its killed parent may be writing the same shard.
        mark = f".{uuid.uuid4().hex[:8]}{UNFINISHED_SUFFIX}"
        unfinished = [path.with_name(path.name + mark) for path in self._paths]
        self._tokens, self._index = HashingWriter(unfinished[0]), HashingWriter(unfinished[1])

    def add(self, ids: npt.NDArray[Any], lengths: npt.NDArray[Any], text_bytes: int) -> None:
        """Append documents: their ids one after another (T,), the number of ids of each (D,), and their UTF-8 bytes.

        Raises:
            ValueError: when an id is beyond the vocabulary.
        """
        if len(ids) and (largest := int(ids.max())) >= self._vocab_size:
            raise ValueError(
                f"the tokenizer gave id {largest}, beyond its vocabulary of {self._vocab_size}; "
                "tokenizer.json and its manifest do not fit, so make the tokenizer again"
            )
        self._tokens.write(np.ascontiguousarray(ids, dtype=self._dtype).data.cast("B") if len(ids) else b"")
        ends = self.tokens + np.cumsum(lengths, dtype=np.uint64)
        self._index.write(ends.astype("<u8").data.cast("B") if len(ends) else b"")
        self.documents += len(lengths)
        self.tokens += len(ids)
        self.bytes += text_bytes

    def facts(self) -> ShardFacts:
        """What was written, once it is closed."""
        return ShardFacts(self._name, self.documents, self.tokens, self.bytes, self._tokens.digest, self._index.digest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in (self._tokens, self._index):
            writer.__exit__(kind, error, trace)
        for writer, path in zip((self._tokens, self._index), self._paths, strict=True):
            if kind is None:
                writer.path.replace(path)
            else:
                writer.path.unlink(missing_ok=True)
        sync_directory(self._paths[0].parent)


class TokenStore:
    """The shards of a split as one run of ids, memory-mapped. Positions count tokens over all shards, in order."""

    def __init__(self, directory: Path, shards: Sequence[ShardFacts], vocab_size: int) -> None:
        """Map the shards.

        Raises:
            ArtifactError: when a file is missing or has another size than the manifest says.
        """
        dtype = token_dtype(vocab_size)
        self.shards = tuple(shards)
        self._tokens: list[npt.NDArray[Any]] = []
        self._ends: list[npt.NDArray[Any]] = []
        for shard in self.shards:
            self._tokens.append(_map(directory / (shard.name + TOKENS_SUFFIX), dtype, shard.tokens))
            self._ends.append(_map(directory / (shard.name + INDEX_SUFFIX), np.dtype("<u8"), shard.documents))
        self.starts: IntArray = np.cumsum([0, *(shard.tokens for shard in self.shards)], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """Ids in all shards, special tokens not counted (there are none)."""
        return int(self.starts[-1])

    def shard(self, number: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The mapped ids (T,) of a shard, and where its documents end in them (D,)."""
        return self._tokens[number], self._ends[number]

    def document_lengths(self) -> IntArray:
        """Tokens of each document, over all shards in order: (documents,)."""
        lengths = [np.diff(ends.astype(np.int64), prepend=0) for ends in self._ends]
        return np.concatenate([np.empty(0, dtype=np.int64), *lengths])

    def gather(self, offsets: IntArray, lengths: IntArray) -> npt.NDArray[Any]:
        """The ids of several runs, one after another.

        Args:
            offsets: (P,) where each run starts; a run lies within one shard, as documents do.
            lengths: (P,) ids in each run.
        """
        if len(self._tokens) == 1:
            return _gather(self._tokens[0], offsets, lengths)
        shards = np.searchsorted(self.starts, offsets, side="right") - 1
        out = np.empty(int(lengths.sum()), dtype=np.int64)
        places = np.cumsum(lengths) - lengths
        for shard in np.unique(shards):
            chosen = shards == shard
            run_lengths = lengths[chosen]
            out[run_indices(places[chosen], run_lengths)] = _gather(
                self._tokens[shard], offsets[chosen] - self.starts[shard], run_lengths
            )
        return out


def run_indices(starts: IntArray, lengths: IntArray) -> IntArray:
    """start, start + 1, ..., start + length - 1 of each run, one run after another."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)


def _gather(tokens: npt.NDArray[Any], offsets: IntArray, lengths: IntArray) -> npt.NDArray[Any]:
    return tokens[run_indices(offsets, lengths)]


def _map(path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    if not path.is_file():
        raise ArtifactError(f"`{path}` is missing from the data; prepare it again")
    if path.stat().st_size != count * dtype.itemsize:
        raise ArtifactError(
            f"`{path}` has {path.stat().st_size} bytes, the manifest says {count} ids of {dtype.itemsize}; "
            "it was cut off or altered, so prepare the data again"
        )
    if count == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)).view(np.ndarray)
