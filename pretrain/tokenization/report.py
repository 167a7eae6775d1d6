"""What a tokenizer does to the text it was trained on: bytes per token, fertility, unknowns, exact round trips.

What lives here: measuring on a bounded part of the sample, and showing the numbers. What must not: training, files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from tokenizers import Tokenizer

from .sample import Piece, TextSample
from .train import TrainedTokenizer

REPORT_BYTES = 4_000_000  # measured in all, about
_BATCH = 64  # pieces encoded at once
_ROWS_SHOWN = 10
# A word: a Chinese, Japanese or Hangul character by itself, else characters without a space between.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(f"[{_CJK}]|[^\\s{_CJK}]+")


@dataclass
class Counts:
    """Sums over the text measured, and the rates that follow from them."""

    bytes: int = 0
    words: int = 0
    tokens: int = 0
    unknown: int = 0
    lines: int = 0
    exact_lines: int = 0

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes that one token stands for, special tokens left out."""
        return self.bytes / max(self.tokens, 1)

    @property
    def fertility(self) -> float:
        """Tokens a word; a word is a Chinese, Japanese or Hangul character, else characters without space between."""
        return self.tokens / max(self.words, 1)

    @property
    def unknown_rate(self) -> float:
        """Share of tokens that are the unknown token."""
        return self.unknown / max(self.tokens, 1)

    @property
    def exact_share(self) -> float:
        """Share of lines that encode and decode to themselves, character for character."""
        return self.exact_lines / max(self.lines, 1)

    def add(self, other: Counts) -> None:
        """Add the sums of another text."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def as_dict(self) -> dict[str, Any]:
        """Sums and rates as plain data."""
        rates = {name: round(getattr(self, name), 6) for name in _RATES}
        return {**asdict(self), **rates}


_RATES = ("bytes_per_token", "fertility", "unknown_rate", "exact_share")


@dataclass
class TokenizerReport:
    """The numbers of one tokenizer; `seconds` and `peak_rss_bytes` are the run's, all others follow from the text."""

    algorithm: str
    vocab_size: int
    learnt: int
    corpus_bytes: int
    corpus_documents: int
    corpus_digest: str
    sample_bytes: int
    total: Counts = field(default_factory=Counts)
    files: dict[str, Counts] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float | None = None
    peak_rss_bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `report.json`."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("total", "files")}
        plain["notes"] = list(self.notes)
        plain["total"] = self.total.as_dict()
        plain["files"] = {name: counts.as_dict() for name, counts in self.files.items()}
        return plain

    def as_markdown(self) -> str:
        """The report to read: a paragraph and a table, the largest files first."""
        share = self.sample_bytes / max(self.corpus_bytes, 1)
        lines = [
            f"# Tokenizer: {self.algorithm}, {self.vocab_size:,} ids",
            "",
            f"Corpus: {self.corpus_documents:,} documents, {self.corpus_bytes:,} bytes, sha256 sum "
            f"{self.corpus_digest[:16]}. Trained on {self.sample_bytes:,} bytes of it ({share:.1%}), measured on "
            f"{self.total.bytes:,}. {self.learnt:,} ids are learnt, {self.vocab_size - self.learnt:,} are reserved.",
        ]
        if self.seconds is not None and self.peak_rss_bytes is not None:
            lines.append(f"Took {self.seconds:.1f} s; peak memory of the process {self.peak_rss_bytes / 1e6:,.0f} MB.")
        lines += [f"Note: {note}." for note in self.notes]
        lines += ["", "| file | bytes/token | tokens/word | unknown | exact lines |", "|---|---:|---:|---:|---:|"]
        lines.append(_row("all", self.total))
        largest = sorted(self.files.items(), key=lambda item: (-item[1].bytes, item[0]))
        if len(largest) > 1:
            lines += [_row(name, counts) for name, counts in largest[:_ROWS_SHOWN]]
        if len(largest) > _ROWS_SHOWN:
            lines.append(f"| {len(largest) - _ROWS_SHOWN} more files, in report.json | | | | |")
        return "\n".join(lines) + "\n"


def _row(name: str, counts: Counts) -> str:
    return (
        f"| {name} | {counts.bytes_per_token:.3f} | {counts.fertility:.3f} | {counts.unknown_rate:.3%} "
        f"| {counts.exact_share:.2%} |"
    )


def measure_tokenizer(
    algorithm: str, trained: TrainedTokenizer, sample: TextSample, *, max_bytes: int = REPORT_BYTES
) -> TokenizerReport:
    """Encode and decode about `max_bytes` of the sample, and the first piece of as many files as that again holds."""
    report = TokenizerReport(
        algorithm=algorithm,
        vocab_size=trained.vocab_size,
        learnt=trained.learnt,
        corpus_bytes=sample.corpus_bytes,
        corpus_documents=sample.documents,
        corpus_digest=sample.digest,
        sample_bytes=sample.sample_bytes,
        notes=trained.notes,
    )
    unknown = trained.special.id_of("unk_token")
    batch: list[Piece] = []
    for piece in _chosen(sample, max_bytes):
        batch.append(piece)
        if len(batch) == _BATCH:
            _measure(trained.tokenizer, batch, unknown, report)
            batch = []
    _measure(trained.tokenizer, batch, unknown, report)
    for counts in report.files.values():
        report.total.add(counts)
    return report


def _chosen(sample: TextSample, max_bytes: int) -> Iterator[Piece]:
    """Pieces by a hash of their text, so that a file's end counts as much as its beginning; files' first pieces too."""
    share = max_bytes / max(sample.sample_bytes, 1)
    seen: set[str] = set()
    room = max_bytes
    for piece in sample:
        digest = hashlib.blake2b(piece.text.encode(), digest_size=8).digest()
        is_new = piece.file not in seen and room > 0
        if is_new or int.from_bytes(digest, "little") < share * 2**64:
            seen.add(piece.file)
            room -= len(piece.text) if is_new else 0
            yield piece


def _measure(tokenizer: Tokenizer, pieces: list[Piece], unknown: int | None, report: TokenizerReport) -> None:
    texts = [piece.text for piece in pieces]
    encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    decoded = tokenizer.decode_batch(encoded, skip_special_tokens=False)
    for piece, ids, back in zip(pieces, encoded, decoded, strict=True):
        lines = [line for line in piece.text.split("\n") if line]
        exact = len(lines) if back == piece.text else _exact_lines(tokenizer, lines)
        report.files.setdefault(piece.file, Counts()).add(
            Counts(
                bytes=len(piece.text.encode()),
                words=sum(1 for _ in _WORD.finditer(piece.text)),
                tokens=len(ids),
                unknown=0 if unknown is None else ids.count(unknown),
                lines=len(lines),
                exact_lines=exact,
            )
        )


def _exact_lines(tokenizer: Tokenizer, lines: list[str]) -> int:
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(lines, add_special_tokens=False)]
    decoded = tokenizer.decode_batch(ids, skip_special_tokens=False)
    return sum(back == line for back, line in zip(decoded, lines, strict=True))
