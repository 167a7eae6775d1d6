"""The labelled examples of a task: which rows are trained on, which decide, which are scored.

What lives here: the three parts, what is held out, the columns that a task looks at. What must not: file formats
(`rows`), tokens, or what a task makes of a row.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config_task import Column, HeldOut, TaskSection
from pretrain.data.reading.sources import HUB_PREFIX
from pretrain.tasks.rows import Row, rows_of_file, rows_of_hub

PARTS = ("train", "validation", "test")

COLUMN_KEYS = {
    "classification": ("text", "text_pair", "label"),
    "regression": ("text", "text_pair", "label"),
    "token-classification": ("tokens", "tags"),
    "multiple-choice": ("question", "choices", "label"),
    "text-to-text": ("source", "target"),
    "instructions": ("messages", "prompt", "response"),
    "embeddings": ("anchor", "positive", "negative", "score"),
}
"""The keys of each kind of task that name a column; question answering has SQuAD's own names."""
_SQUAD = ("question", "context", "answers")


@dataclass(frozen=True)
class Parts:
    """The rows of a task, and the columns that tell one from another: those that it looks at; none: all."""

    train: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row]
    columns: Sequence[Column] = ()

    @property
    def digest(self) -> str:
        """A hash of all values of all rows in order."""
        total = hashlib.sha256()
        for name in PARTS:
            total.update(name.encode())
            for row in getattr(self, name):
                total.update(row.identity().encode())
        return total.hexdigest()

    @property
    def repeated(self) -> int:
        """How many test rows stand among the training rows, value for value of the columns that count."""
        trained = {row.identity(self.columns) for row in self.train}
        return sum(row.identity(self.columns) in trained for row in self.test)


def columns_of(task: TaskSection) -> tuple[Column, ...]:
    """The columns that a task looks at. What else a row holds, its number say, makes it no other row."""
    kind = getattr(task, "kind", "")
    if kind == "question-answering":
        return _SQUAD
    given = {key: getattr(task, key) for key in COLUMN_KEYS.get(kind, ())}
    if given.get("prompt") is not None:
        given["messages"] = None
    named = [value if isinstance(value, tuple) else (value,) for value in given.values() if value is not None]
    return tuple(dict.fromkeys(column for some in named for column in some))


def read_parts(task: TaskSection) -> Parts:
    """Read the rows of a task: training, validation and test.

    Rows that are held out by a fraction, or taken by a limit, are chosen by a hash of the columns that the task looks
    at: equal rows are on one side, whatever number each has.

    Raises:
        ValueError: when an entry names nothing, or a file cannot be read; names the file and line.
    """
    columns = columns_of(task)
    train = _read(task, task.train, "task.train")
    _check_any(train, task.train, "task.train")
    test, train = _part(task, task.test, train, "test")
    validation, train = _part(task, task.validation, train, "validation")
    if task.train_limit is not None and task.train_limit < len(train):
        chosen = sorted(range(len(train)), key=lambda number: train[number].identity(columns))[: task.train_limit]
        train = [train[number] for number in sorted(chosen)]
    _check_any(validation, task.validation, "task.validation")
    if task.test:
        _check_any(test, task.test, "task.test")
    return Parts(train, validation, test, columns)


def _check_any(rows: Sequence[Row], entries: Sequence[str] | HeldOut, key: str) -> None:
    if not rows:
        named = "" if isinstance(entries, HeldOut) else f" of {', '.join(f'`{entry}`' for entry in entries)}"
        raise ValueError(f"{key}: there are no rows in the files{named}; check them, and task.format")


def _part(
    task: TaskSection, wanted: Sequence[str] | HeldOut, train: list[Row], name: str
) -> tuple[list[Row], list[Row]]:
    """The rows of a part, and what is left of the training rows."""
    if not isinstance(wanted, HeldOut):
        return _read(task, wanted, f"task.{name}"), train
    columns = columns_of(task)
    shares = [_share(row, wanted.by, columns, name) for row in train]
    out = [row for row, share in zip(train, shares, strict=True) if share < wanted.fraction]
    left = [row for row, share in zip(train, shares, strict=True) if share >= wanted.fraction]
    if not out or not left:
        raise ValueError(
            f"task.{name}: {{fraction: {wanted.fraction}}} of {len(train)} rows leaves one side empty; choose another, "
            "or name files"
        )
    return out, left


def _share(row: Row, by: Column | None, columns: Sequence[Column], name: str) -> float:
    """A number from 0 to 1 that the part's name and a row's own columns, or its value in one column, decide."""
    chosen = row.identity(columns if by is None else (by,))
    return int(hashlib.sha256(f"{name} {chosen}".encode()).hexdigest()[:12], 16) / 16**12


def _read(task: TaskSection, entries: Sequence[str], key: str) -> list[Row]:
    rows: list[Row] = []
    for entry in entries:
        if entry.startswith(HUB_PREFIX):
            rows += rows_of_hub(entry, key)
            continue
        for path in _paths(entry, task.root, key):
            rows += rows_of_file(path, task, key)
    return rows


def _paths(entry: str, root: str | None, key: str) -> list[str]:
    full = os.path.join(root, entry) if root is not None else entry
    full = os.path.expanduser(full)
    found = [full] if os.path.isfile(full) else sorted(path for path in glob.glob(full) if os.path.isfile(path))
    if not found:
        hint = "" if root is not None else "; files are looked for in the current directory, or in task.root"
        raise ValueError(f"{key}: `{full}` names no file; check the path{hint}")
    return found
