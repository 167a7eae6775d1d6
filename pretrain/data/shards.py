"""Token shards: the ids of a part's documents, one after another, and where each document ends.

What lives here: the format. What must not: text, or how documents become rows.

`part-00000.ds` holds little-endian uint16 when the vocabulary has up to 65,536 ids, else uint32; no special tokens.
`part-00000.ds.index` holds a little-endian uint64 a document: where it ends, in tokens. This is the layout of
datatrove's and nanotron's tokenized files; the width is written in our manifest and never guessed.
Where the objective wants to know where words start, `part-00000.ds.marks` holds a byte a token: WORD and SENTENCE.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pretrain.files import ArtifactError, HashingWriter, sync_directory

TOKENS_SUFFIX = ".ds"
INDEX_SUFFIX = ".ds.index"
MARKS_SUFFIX = ".ds.marks"
UNFINISHED_SUFFIX = ".unfinished"

WORD, SENTENCE = 1, 2
"""Marks of a token: it starts a word of the tokenizer; a sentence starts with it."""

TRAIN, VALIDATION = "train", "validation"
"""Names of splits, each a directory of shards; further validation splits are called validation-NAME."""

IntArray = npt.NDArray[np.int64]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The width of an id on the disk."""
    return np.dtype("<u2") if vocab_size <= 65_536 else np.dtype("<u4")


@dataclass(frozen=True)
class ShardFacts:
    """What a shard holds; `name` is its path in the data directory without suffix, `bytes` the text's UTF-8 bytes.

    `marks_digest` is None where the shard has no marks.
    """

    name: str
    documents: int
    tokens: int
    bytes: int
    digest: str
    index_digest: str
    marks_digest: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, without what the shard does not have."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def digests_of(shard: dict[str, Any]) -> dict[str, str]:
    """The digest of each file of a shard, given as plain data, by name."""
    suffixes = {"digest": TOKENS_SUFFIX, "index_digest": INDEX_SUFFIX, "marks_digest": MARKS_SUFFIX}
    return {shard["name"] + suffix: shard[key] for key, suffix in suffixes.items() if shard.get(key) is not None}


class ShardWriter:
    """Writes one shard. A context manager: all its files appear whole when it closes, none on an error."""

    def __init__(self, stem: Path, name: str, vocab_size: int, *, marked: bool = False) -> None:
        self.documents = self.tokens = self.bytes = 0
        self._name, self._vocab_size, self._dtype = name, vocab_size, token_dtype(vocab_size)
        suffixes = (TOKENS_SUFFIX, INDEX_SUFFIX, *([MARKS_SUFFIX] if marked else []))
        self._paths = [stem.with_name(stem.name + suffix) for suffix in suffixes]
        stem.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: a worker that outlived its killed parent may be writing the same shard.
        mark = f".{uuid.uuid4().hex[:8]}{UNFINISHED_SUFFIX}"
        self._writers = [HashingWriter(path.with_name(path.name + mark)) for path in self._paths]
        self._tokens, self._index = self._writers[:2]
        self._marks = self._writers[2] if marked else None

    def add(
        self,
        ids: npt.NDArray[Any],
        lengths: npt.NDArray[Any],
        text_bytes: int,
        marks: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        """Append documents: their ids one after another (T,), the number of ids of each (D,), and their UTF-8 bytes.

        `marks` (T,) say where words and sentences start, for a shard that has them.

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
        if self._marks is not None:
            assert marks is not None
            assert len(marks) == len(ids)
            self._marks.write(np.ascontiguousarray(marks).data if len(marks) else b"")
        self.documents += len(lengths)
        self.tokens += len(ids)
        self.bytes += text_bytes

    def facts(self) -> ShardFacts:
        """What was written, once it is closed."""
        digests = [writer.digest for writer in self._writers]
        return ShardFacts(self._name, self.documents, self.tokens, self.bytes, *digests)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers:
            writer.__exit__(kind, error, trace)
        for writer, path in zip(self._writers, self._paths, strict=True):
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
        self._marks: list[npt.NDArray[Any]] = []
        for shard in self.shards:
            self._tokens.append(_map(directory / (shard.name + TOKENS_SUFFIX), dtype, shard.tokens))
            self._ends.append(_map(directory / (shard.name + INDEX_SUFFIX), np.dtype("<u8"), shard.documents))
            if shard.marks_digest is not None:
                self._marks.append(_map(directory / (shard.name + MARKS_SUFFIX), np.dtype("u1"), shard.tokens))
        self.is_marked = len(self._marks) == len(self.shards)
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

    def source_lengths(self, separator: int) -> IntArray:
        """Tokens before the separator of each document, which is a pair, over all shards in order: (documents,).

        Raises:
            ArtifactError: when a document does not have exactly one separator.
        """
        found: list[IntArray] = [np.empty(0, dtype=np.int64)]
        for shard, ids, ends in zip(self.shards, self._tokens, self._ends, strict=True):
            places = np.flatnonzero(ids == separator)
            starts = np.concatenate([[0], ends[:-1].astype(np.int64)]) if len(ends) else places
            if len(places) != len(ends) or not ((starts <= places) & (places < ends)).all():
                raise ArtifactError(
                    f"`{shard.name}` holds no pairs, which objective.kind: translation needs; prepare the data with "
                    "data.text_field: [source, target]"
                )
            found.append(places - starts)
        return np.concatenate(found)

    def documents_at(self, offsets: IntArray) -> IntArray:
        """The number of the document that each position lies in, over all shards in order: (P,)."""
        before = np.cumsum([0, *(shard.documents for shard in self.shards)])
        shards = np.searchsorted(self.starts, offsets, side="right") - 1
        numbers = np.empty(len(offsets), dtype=np.int64)
        for shard in np.unique(shards):
            chosen = shards == shard
            inside = (offsets[chosen] - self.starts[shard]).astype(np.uint64)
            numbers[chosen] = before[shard] + np.searchsorted(self._ends[shard], inside, side="right")
        return numbers

    def gather(self, offsets: IntArray, lengths: IntArray) -> npt.NDArray[Any]:
        """The ids of several runs, one after another.

        Args:
            offsets: (P,) where each run starts; a run lies within one shard, as documents do.
            lengths: (P,) ids in each run.
        """
        return self._gather(self._tokens, offsets, lengths, np.int64)

    def gather_marks(self, offsets: IntArray, lengths: IntArray) -> npt.NDArray[np.uint8]:
        """The marks of the tokens that `gather` gives; for shards that have them."""
        return self._gather(self._marks, offsets, lengths, np.uint8)

    def _gather(
        self, values: list[npt.NDArray[Any]], offsets: IntArray, lengths: IntArray, dtype: Any
    ) -> npt.NDArray[Any]:
        if len(values) == 1:
            return _gather(values[0], offsets, lengths)
        shards = np.searchsorted(self.starts, offsets, side="right") - 1
        out = np.empty(int(lengths.sum()), dtype=dtype)
        places = np.cumsum(lengths) - lengths
        for shard in np.unique(shards):
            chosen = shards == shard
            run_lengths = lengths[chosen]
            out[run_indices(places[chosen], run_lengths)] = _gather(
                values[shard], offsets[chosen] - self.starts[shard], run_lengths
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
