"""Which documents are held out for validation.

What lives here: the two rules of `data.validation`, by share and by tail. What must not: named validation files, which
are sources of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

from pretrain.data.reading.lines import Document
from pretrain.data.shards import TRAIN, VALIDATION

TRIAL_TAIL = 0.25
"""Trials hold out this much of each text, whatever the rule: their few documents must give some to each side."""

Split = Callable[[Document], Iterator[tuple[str, Document]]]
"""Gives each document, or parts of it, with TRAIN or VALIDATION."""

_KEY = b"pretrain validation split, seed %d"


def is_held_out(text: str | bytes, fraction: float, seed: int = 0) -> bool:
    """Whether a keyed hash of the text, or of ready ids (BLAKE2b, 64 bits), falls below `fraction`.

    A text is on the same side whatever file, order or machine it comes from, so a repeated one is never on both.
    The seed is a part of the key; it is not the seed of training, so that runs with several seeds share their data.
    """
    data = text if isinstance(text, bytes) else text.encode("utf-8")
    digest = hashlib.blake2b(data, digest_size=8, key=_KEY % seed).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def by_fraction(fraction: float) -> Split:
    """Hold out about `fraction` of the documents."""

    def split(document: Document) -> Iterator[tuple[str, Document]]:
        key = document.text if document.ids is None else document.ids
        yield VALIDATION if is_held_out(key, fraction) else TRAIN, document

    return split


def by_tail(tail: float, length: int) -> Split:
    """Hold out the documents that start in the last share `tail` of a file of `length` (bytes of text, or rows)."""
    boundary = int(length * (1.0 - tail))

    def split(document: Document) -> Iterator[tuple[str, Document]]:
        yield VALIDATION if document.position >= boundary else TRAIN, document

    return split


def by_tail_of_text(tail: float) -> Split:
    """Hold out the last share `tail` of each text in bytes: for files that are one document, and for trials.

    The cut is at int(bytes * (1 - tail)), moved back to where a UTF-8 character starts.
    """

    def split(document: Document) -> Iterator[tuple[str, Document]]:
        if document.ids is not None:
            yield from _cut_ids(document, document.ids, tail)
            return
        data = document.text.encode("utf-8")
        cut = int(len(data) * (1.0 - tail))
        while 0 < cut < len(data) and data[cut] & 0xC0 == 0x80:
            cut -= 1
        for name, start, part in ((TRAIN, 0, data[:cut]), (VALIDATION, cut, data[cut:])):
            if part:
                yield name, Document(part.decode("utf-8"), document.file, document.position + start)

    return split


def _cut_ids(document: Document, ids: bytes, tail: float) -> Iterator[tuple[str, Document]]:
    cut = int(len(ids) // 4 * (1.0 - tail))
    for name, start, part in ((TRAIN, 0, ids[: 4 * cut]), (VALIDATION, cut, ids[4 * cut :])):
        if part:
            yield name, Document("", document.file, document.position + start, part)


def of_source(split: Split, source: str) -> Split:
    """The same rule, with splits of the source's own: train-NAME and validation-NAME; `split` itself without a name."""
    if not source:
        return split

    def named(document: Document) -> Iterator[tuple[str, Document]]:
        for name, part in split(document):
            yield f"{name}-{source}", part

    return named


def entirely(name: str) -> Split:
    """Every document goes to one split."""

    def split(document: Document) -> Iterator[tuple[str, Document]]:
        yield name, document

    return split
