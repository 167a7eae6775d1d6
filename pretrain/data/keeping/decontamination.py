"""Training documents that share a run of words with a held-out text are left out.

What lives here: the runs of words of the held-out texts, and the search for them in a document. What must not: what a
word is (`words`), or counting what was left out.

The rule (Brown et al. 2020, appendix C, and many since): a training document that has `ngrams` words in a row in common
with any validation document, or with any text of `decontaminate.files`, is left out whole. Held-out texts with fewer
words have no such run and are not looked for. Case, punctuation and white space do not count; in Chinese, Japanese and
other scripts without spaces a character counts as a word, so give a larger `ngrams` there.

Runs are compared by a hash of 64 bits: with 10^8 runs in the held-out texts, a clean document of 1,000 words is taken
for another's copy with a probability of 5e-9. The hashes lie sorted on the disk, 8 bytes a run, and all workers map
the same pages of memory.

Of evaluation files every text is taken, whatever the field: all strings of a JSON line, all of a CSV or plain-text
file; of Parquet files and Hub datasets the column `data.text_field`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pretrain.config_data import Decontamination
from pretrain.data.keeping.words import run_hashes, word_hashes, words_of
from pretrain.data.order import U64
from pretrain.data.reading.documents import ReadReport, read_documents
from pretrain.data.reading.pairs import TextField
from pretrain.data.reading.sources import SourceFile, resolve_sources

KEY = "data.decontaminate.files"
_MERGED_AT = 1 << 22


def evaluation_files(wanted: Decontamination | None) -> list[SourceFile]:
    """The files of `decontaminate.files`.

    Raises:
        ValueError: when an entry names nothing, or a file comes twice.
    """
    return resolve_sources(wanted.files, key=KEY) if wanted is not None else []


def text_hashes(text: str, ngrams: int) -> U64:
    """A hash of each run of `ngrams` words of a text, in order."""
    return run_hashes(word_hashes(words_of(text)), ngrams)


def known_runs(texts: Iterable[str], ngrams: int) -> U64:
    """The hashes of all runs in some texts, sorted, each once. Memory: 8 bytes a run, three times over."""
    merged = np.empty(0, dtype=np.uint64)
    waiting: list[U64] = []
    size = 0
    for text in texts:
        waiting.append(text_hashes(text, ngrams))
        size += len(waiting[-1])
        if size > max(_MERGED_AT, len(merged)):
            merged, waiting, size = np.unique(np.concatenate([merged, *waiting])), [], 0
    return np.unique(np.concatenate([merged, *waiting]))


def evaluation_runs(files: Sequence[SourceFile], ngrams: int, text_field: TextField) -> U64:
    """The runs of the evaluation files.

    Raises:
        ValueError: when a file cannot be read, or has no run of that many words; names it.
    """
    runs = []
    for file in files:
        found = known_runs(_texts(file, text_field), ngrams)
        if not len(found):
            raise ValueError(
                f"{KEY}: no text of `{file.name}` has {ngrams} words, so nothing of it would be found; "
                "give a smaller data.decontaminate.ngrams, or remove the file"
            )
        runs.append(found)
    return np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *runs]))


def _texts(file: SourceFile, text_field: TextField) -> Iterator[str]:
    report = ReadReport()
    if file.format in ("parquet", "hub"):
        yield from (document.text for document in read_documents(file, text_field=text_field, report=report))
    else:
        rows = file.format == "jsonl"
        plain = replace(file, format="txt")
        for document in read_documents(plain, document="line" if rows else "file", report=report):
            yield from _strings(_parsed(document.text)) if rows else (document.text,)
    if report.bad:
        raise ValueError(f"{KEY}: {report.named[0]}; an evaluation text must be whole, so mend the file")


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return line  # a piece of a JSON file of several lines: its words count all the same


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


class KnownRuns:
    """Searches documents for runs of the held-out texts."""

    def __init__(self, ngrams: int, runs: dict[str, U64]) -> None:
        """`runs` are sorted hashes by what the texts are called (a validation text, an evaluation text)."""
        self._ngrams = ngrams
        self._runs = {name: hashes for name, hashes in runs.items() if len(hashes)}

    def find(self, text: str) -> tuple[str, str] | None:
        """What kind of text a document shares a run with, and the first such run's words; None when it is clean."""
        words = words_of(text)
        hashes = run_hashes(word_hashes(words), self._ngrams)
        if not len(hashes):
            return None
        for name, known in self._runs.items():
            places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            found = known[places] == hashes
            if found.any():
                first = int(found.argmax())
                return name, " ".join(words[first : first + self._ngrams])
        return None
