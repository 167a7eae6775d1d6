"""Files of examples that models are measured on: minimal pairs, pairs with a score, queries with what answers them.

What lives here: reading jsonl, csv and tsv, and saying which line is wrong. What must not: models, or what a score
means.
"""

from __future__ import annotations

import csv
import glob
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.files import ArtifactError, sha256_file

PAIR_FIELDS = ("sentence_good", "sentence_bad")
GROUP_FIELDS = ("field", "linguistics_term", "UID")
"""Of BLiMP (Warstadt et al. 2020): what a pair is about, from the widest to the narrowest."""
SIMILARITY_FIELDS = ("sentence1", "sentence2", "score")
RETRIEVAL_FIELDS = ("query", "positive")

_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")


@dataclass(frozen=True)
class ExampleSet:
    """One argument of the command line, or one entry of a list: a file, or several of one kind under one name."""

    name: str
    files: tuple[Path, ...]

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each file, by its name as given."""
        return {str(file): sha256_file(file) for file in self.files}


@dataclass(frozen=True)
class Pair:
    """Two sentences that differ in one thing; `groups` says what it is about, by the name of the field."""

    good: str
    bad: str
    groups: Mapping[str, str]


def find_sets(places: Sequence[str], what: str) -> list[ExampleSet]:
    """The sets that files, directories and globs name; a directory or a glob is one set of all its files.

    Args:
        places: as given.
        what: the option or key, for messages.

    Raises:
        ValueError: when there is no such file, it is of another kind, or two sets have one name.
    """
    found: dict[str, ExampleSet] = {}
    for place in places:
        made = _set_of(place, what)
        if made.name in found:
            raise ValueError(f"{what}: `{place}` and another file are both called {made.name}; rename one of them")
        found[made.name] = made
    return list(found.values())


def _set_of(place: str, what: str) -> ExampleSet:
    path = Path(place).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
        if not files:
            raise ArtifactError(f"{what}: `{place}` holds no {', '.join(_SUFFIXES)} file")
        return ExampleSet(path.resolve().name, tuple(files))
    if path.is_file():
        files = [path]
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path))) if Path(name).is_file()]
        if not files:
            raise ArtifactError(f"{what}: there is no file `{place}`; give a {', '.join(_SUFFIXES)} file")
    for file in files:
        if file.suffix not in _SUFFIXES:
            raise ArtifactError(f"{what}: `{file}` is not one of {', '.join(_SUFFIXES)}; convert it, or name it so")
    return ExampleSet(files[0].stem if len(files) == 1 else files[0].resolve().parent.name, tuple(files))


def read_pairs(examples: ExampleSet, fields: Sequence[str] = (), limit: int | None = None) -> list[Pair]:
    """Minimal pairs.

    Args:
        examples: where they lie.
        fields: names of the good and of the bad sentence, and of what to break the result down by, if anything;
            default: those of BLiMP, and whichever of its three groups are there.
        limit: so many of each file, from its start.

    Raises:
        ValueError: names the file, the line and the remedy.
    """
    names = tuple(fields) or PAIR_FIELDS
    if len(names) not in (2, 3):
        raise ValueError(f"pair fields: {','.join(fields)} must be two names, or three with that of a group")
    pairs = []
    for file in examples.files:
        for line, record in _records(file, names, "--pair-fields GOOD,BAD", limit):
            good, bad = (_text(record, name, file, line) for name in names[:2])
            groups = names[2:] or tuple(name for name in GROUP_FIELDS if record.get(name) not in (None, ""))
            found = {name: str(record[name]) for name in groups}
            pairs.append(Pair(good, bad, found | ({"file": file.stem} if len(examples.files) > 1 else {})))
    return pairs


def read_similarity(
    examples: ExampleSet, fields: Sequence[str] = (), limit: int | None = None
) -> tuple[list[str], list[str], list[float]]:
    """First texts, second texts, and how alike people found them.

    Raises:
        ValueError: names the file, the line and the remedy; also when no two scores differ.
    """
    names = tuple(fields) or SIMILARITY_FIELDS
    if len(names) != 3:
        raise ValueError(f"similarity fields: {','.join(names)} must be three names: of two texts and of the score")
    first, second, scores = [], [], []
    for file in examples.files:
        for line, record in _records(file, names, "--similarity-fields TEXT,TEXT,SCORE", limit):
            first.append(_text(record, names[0], file, line))
            second.append(_text(record, names[1], file, line))
            scores.append(_number(record, names[2], file, line))
    if len(set(scores)) < 2:
        raise ArtifactError(f"`{examples.name}`: nothing can correlate with scores that are all {scores[0]:g}")
    return first, second, scores


def read_retrieval(
    examples: ExampleSet, fields: Sequence[str] = (), limit: int | None = None
) -> tuple[list[str], list[str], list[list[int]]]:
    """Queries, candidates, and the numbers of the candidates that answer each query; each text stands there once.

    Raises:
        ValueError: names the file, the line and the remedy; also when there is but one candidate.
    """
    names = tuple(fields) or RETRIEVAL_FIELDS
    if len(names) != 2:
        raise ValueError(f"retrieval fields: {','.join(names)} must be two names: of the query and of its answer")
    queries: dict[str, list[int]] = {}
    candidates: dict[str, int] = {}
    for file in examples.files:
        for line, record in _records(file, names, "--retrieval-fields QUERY,POSITIVE", limit):
            query, positive = (_text(record, name, file, line) for name in names)
            number = candidates.setdefault(positive, len(candidates))
            answers = queries.setdefault(query, [])
            if number not in answers:
                answers.append(number)
    if len(candidates) < 2:
        raise ArtifactError(f"`{examples.name}` has one candidate alone, which every query finds; give more pairs")
    return list(queries), list(candidates), list(queries.values())


# --- lines ----------------------------------------------------------------------------------------------------------


def _records(
    file: Path, names: Sequence[str], option: str, limit: int | None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Each example with the number of its line."""
    count = 0
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = _delimited(lines, file) if file.suffix in (".csv", ".tsv") else _json_lines(lines, file)
            for line, record in rows:
                for name in names:
                    if name not in record:
                        there = ", ".join(str(key) for key in list(record)[:12])
                        raise ArtifactError(
                            f"`{file}`, line {line}: there is no `{name}` (there are: {there}); name the fields "
                            f"with {option}"
                        )
                yield line, record
                count += 1
                if count == limit:
                    return
    except UnicodeDecodeError as error:
        raise ArtifactError(f"`{file}` is not UTF-8 (byte {error.start}); convert it: iconv -t utf-8") from error
    if not count:
        raise ArtifactError(f"`{file}` holds no example")


def _json_lines(lines: Any, file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ArtifactError(f"`{file}`, line {number}: not JSON ({error}); give one object a line") from error
        if not isinstance(record, dict):
            raise ArtifactError(f"`{file}`, line {number}: not an object with named fields; give one object a line")
        yield number, record


def _delimited(lines: Any, file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                wanted = len(reader.fieldnames or ())
                raise ArtifactError(
                    f"`{file}`, line {reader.line_num}: not the {wanted} columns of its first line; quote what holds "
                    "a delimiter"
                )
            yield reader.line_num, record
    except csv.Error as error:
        raise ArtifactError(f"`{file}`, line {reader.line_num}: {error}; mend the quotes of that line") from error


def _text(record: Mapping[str, Any], name: str, file: Path, line: int) -> str:
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        raise ArtifactError(f"`{file}`, line {line}: `{name}` is {value!r}, not a text; mend or remove the line")
    return value


def _number(record: Mapping[str, Any], name: str, file: Path, line: int) -> float:
    try:
        value = float(record[name])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ArtifactError(
            f"`{file}`, line {line}: `{name}` is {record[name]!r}, not a number; mend or remove the line"
        )
    return value
