"""A row of labelled examples, and the files and Hub datasets that rows stand in.

What lives here: csv, tsv, jsonl, json, parquet, CoNLL, CoNLL-U, SQuAD's JSON, Hub datasets. What must not: which rows
are trained on, tokens, or what a task makes of a row.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pretrain.config_task import Column, Columns, TaskSection
from pretrain.data.reading.documents import load_hub
from pretrain.data.reading.sources import HUB_PREFIX, SourceFile
from pretrain.data.reading.streams import open_bytes
from pretrain.files import is_below

_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".conll": "conll",
    ".bio": "conll",
    ".conllu": "conllu",
}
_COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".xz": "xz"}
_CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")


@dataclass(frozen=True)
class Row:
    """One example: its values by column, where it stands, and the names of labels, in order, that its source gives."""

    values: Mapping[str, Any]
    where: str
    names: Mapping[str, Sequence[str] | None] = field(default_factory=dict)

    def __getitem__(self, column: Column) -> Any:
        """The value of a column.

        Raises:
            ValueError: when there is none; names the columns there are.
        """
        try:
            return self.values[str(column)]
        except KeyError:
            known = ", ".join(f"`{name}`" for name in self.values)
            raise ValueError(
                f"{self.where}: there is no column `{column}`; there are {known}: give the key of `task` that names it "
                "one of these"
            ) from None

    def text(self, column: Columns) -> str:
        """A column that must hold a text; several are joined by spaces.

        Raises:
            ValueError: when it holds something else.
        """
        if isinstance(column, tuple):
            return " ".join(self.text(one).strip() for one in column)
        value = self[column]
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: column `{column}` holds {value!r}, and a text is needed; take the row out")
        return value

    def identity(self, columns: Sequence[Column] = ()) -> str:
        """A hash of the values of some columns; without any, of all.

        Raises:
            ValueError: when a column is not there; names those that are.
        """
        chosen = {str(column): self[column] for column in columns} if columns else self.values
        plain = json.dumps(chosen, sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(plain.encode()).hexdigest()


def rows_of_file(path: str, task: TaskSection, key: str) -> list[Row]:
    bare, compression = path, None
    for suffix, name in _COMPRESSIONS.items():
        if path.endswith(suffix):
            bare, compression = path.removesuffix(suffix), name
    kind = task.format if task.format != "auto" else _SUFFIXES.get(Path(bare).suffix.lower(), "")
    if not kind:
        raise ValueError(
            f"{key}: `{path}` has an ending that tells no format; say it with task.format "
            f"({', '.join(dict.fromkeys([*_SUFFIXES.values(), 'squad']))})"
        )
    if kind == "parquet":
        return list(_parquet(path))
    file = SourceFile(name=path, path=path, format=kind, bytes=os.path.getsize(path), compression=compression)
    readers = {"jsonl": _jsonl, "json": _json, "squad": _json}
    with open_bytes(file) as (stream, _):
        if kind in readers:
            return list(readers[kind](stream, path))
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        try:
            if kind in ("conll", "conllu"):
                return list(_conll(text, path, _CONLLU if kind == "conllu" else task.columns, kind))
            return list(_table(text, path, task, kind))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{key}: `{path}` is no UTF-8 ({error.reason} at byte {error.start}); convert it"
            ) from None


# --- formats --------------------------------------------------------------------------------------------------------


def _table(text: IO[str], path: str, task: TaskSection, kind: str) -> Iterator[Row]:
    quoting = task.quoting if task.quoting is not None else kind == "csv"
    csv.field_size_limit(1 << 30)
    reader = csv.reader(
        text,
        delimiter="," if kind == "csv" else "\t",
        quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE,
        strict=quoting,
    )
    names = None if task.columns is None else _checked(task.columns, path, kind)
    try:
        for fields in reader:
            if not fields or (len(fields) == 1 and not fields[0].strip()):
                continue
            if names is None:
                names = _checked(fields, f"{path}:{reader.line_num}", kind)
                continue
            where = f"{path}:{reader.line_num}"
            if len(fields) != len(names):
                raise ValueError(
                    f"{where}: {len(fields)} fields, and the columns are {len(names)} ({', '.join(names)}); check "
                    "task.columns and task.quoting"
                )
            yield Row(dict(zip(names, fields, strict=True)), where)
    except csv.Error as error:
        raise ValueError(
            f"{path}:{reader.line_num}: {error}; task.quoting says whether quotes enclose fields"
        ) from None


def _checked(names: Sequence[str], where: str, kind: str) -> list[str]:
    """The names of columns, each once; and not one name for all of them."""
    for name, count in Counter(names).items():
        if name.strip() and count > 1:
            raise ValueError(f"{where}: {count} columns are called `{name}`; rename all but one")
    other = next((mark for mark in ("\t", ";", ",") if len(names) == 1 and mark in names[0]), None)
    if other is not None:
        own, remedy = ("tab", "csv") if kind == "tsv" else ("comma", "tsv")
        how = "write it with commas or tabs" if other == ";" else f"set task.format: {remedy}"
        raise ValueError(f"{where}: no {own} parts the columns of `{names[0]}`, read as {kind}; {how}")
    return list(names)


def _jsonl(stream: IO[bytes], path: str) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield _object(_parsed(line, f"{path}:{number}"), f"{path}:{number}")


def _json(stream: IO[bytes], path: str) -> Iterator[Row]:
    """A list of objects, SQuAD's form, or (as some files named .json are) an object a line."""
    content = stream.read()
    if not content.strip():
        return
    first, _, rest = content.lstrip().partition(b"\n")
    if first.startswith(b"{") and first.rstrip().endswith(b"}") and rest.strip():
        yield from _jsonl(io.BytesIO(content), path)
        return
    whole = _parsed(content, path)
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        if whole["data"] and isinstance(whole["data"][0], dict) and "paragraphs" in whole["data"][0]:
            yield from _squad(whole["data"], path)
            return
        whole = whole["data"]
    for number, entry in enumerate(whole if isinstance(whole, list) else [whole], start=1):
        yield _object(entry, f"{path}, entry {number}")


def _squad(articles: Iterable[Mapping[str, Any]], path: str) -> Iterator[Row]:
    """One row a question, as the Hub's `squad` has them; one that has no answer has none in its list."""
    for number, article in enumerate(articles, start=1):
        where = f"{path}, article {number}"
        for paragraph in _named(article, "paragraphs", where):
            for asked in _named(paragraph, "qas", where):
                identity = str(_named(asked, "id", where))
                answers = asked.get("answers") or []
                where_asked = f"{path}, question {identity}"
                values = {
                    "id": identity,
                    "title": article.get("title", ""),
                    "context": _named(paragraph, "context", where),
                    "question": _named(asked, "question", where_asked),
                    "answers": {
                        "text": [_named(answer, "text", where_asked) for answer in answers],
                        "answer_start": [int(_named(answer, "answer_start", where_asked)) for answer in answers],
                    },
                }
                yield Row(values, where_asked)


def _named(entry: Any, name: str, where: str) -> Any:
    """What stands under a name in SQuAD's form."""
    if not isinstance(entry, Mapping) or name not in entry:
        raise ValueError(f"{where}: `{name}` is missing; SQuAD's form has it in every entry of this kind")
    return entry[name]


def _conll(text: IO[str], path: str, columns: Sequence[str] | None, kind: str) -> Iterator[Row]:
    """One row a sentence, each column a list; of CoNLL-U without multiword tokens (1-2) and empty nodes (8.1)."""
    lines: list[list[str]] = []
    begun = 1
    for number, line in enumerate(text, start=1):
        line = line.rstrip("\r\n")
        if not line.strip():
            if lines:
                yield _sentence(lines, f"{path}:{begun}", columns, kind)
            lines, begun = [], number + 1
            continue
        if (kind == "conllu" and line.startswith("#")) or line.startswith("-DOCSTART-"):
            continue
        fields = line.split("\t") if "\t" in line else line.split()
        if kind == "conllu" and not fields[0].isdigit():
            continue
        if lines and len(fields) != len(lines[0]):
            raise ValueError(f"{path}:{number}: {len(fields)} columns, and {len(lines[0])} in the line before it")
        lines.append(fields)
    if lines:
        yield _sentence(lines, f"{path}:{begun}", columns, kind)


def _sentence(lines: list[list[str]], where: str, columns: Sequence[str] | None, kind: str) -> Row:
    names = columns or [str(number) for number in range(len(lines[0]))]
    if len(names) != len(lines[0]):
        wanted = (
            f"CoNLL-U has {len(names)}; other forms are task.format: conll, with their task.columns"
            if kind == "conllu"
            else f"task.columns names {len(names)}"
        )
        raise ValueError(f"{where}: {len(lines[0])} columns, and {wanted}")
    return Row({name: [fields[number] for fields in lines] for number, name in enumerate(names)}, where)


def _parquet(path: str) -> Iterator[Row]:
    tables: Any = importlib.import_module("pyarrow.parquet")
    number = 0
    try:
        file = tables.ParquetFile(path)
    except (ValueError, OSError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(f"`{path}` is no parquet file ({error}); check it, and task.format") from None
    for batch in file.iter_batches():
        for values in batch.to_pylist():
            number += 1
            yield Row(values, f"{path}, row {number}")


def rows_of_hub(entry: str, key: str) -> list[Row]:
    """`hub:NAME[/CONFIG][:SPLIT]` or `hub:ORG/NAME[/CONFIG][:SPLIT]`; label numbers become the dataset's own names."""
    name = entry.removeprefix(HUB_PREFIX)
    if not is_below(name.partition(":")[0]):
        raise ValueError(f"{key}: `{entry}` is no name on the Hub; write hub:ORG/NAME or hub:ORG/NAME/CONFIG:SPLIT")
    found = load_hub(name, f"{key}: `{entry}`")
    named = {column: _label_names(feature) for column, feature in found.features.items()}
    rows = []
    for number, values in enumerate(found):
        plain = {column: _by_name(value, named.get(column)) for column, value in values.items()}
        rows.append(Row(plain, f"{entry}, row {number + 1}", named))
    return rows


def _label_names(feature: Any) -> list[str] | None:
    """The names of a dataset's labels, of a column of them or of lists of them."""
    found = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    return list(found) if found else None


def _by_name(value: Any, names: Sequence[str] | None) -> Any:
    """A label's number, or a list of them, as names; -1 (a label that is not told) stays."""
    if names is None:
        return value
    if isinstance(value, list):
        return [_by_name(one, names) for one in value]
    return names[value] if isinstance(value, int) and value >= 0 else value


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None


def _object(entry: Any, where: str) -> Row:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object with named values, found {type(entry).__name__}")
    return Row(entry, where)
