"""Pairs of texts: a source and its target, which travel through a preparation as one text with a mark between them.

What lives here: the mark, and which files hold pairs. What must not: tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.data.reading.sources import SourceFile

TextField = str | tuple[str, str]
"""The column or key of a text, or those of a pair's two sides."""

SEPARATOR = "\x1f"
"""Unit separator: white space to what looks at words. A row whose side holds it is bad, so it parts a pair surely."""

_FORMATS = ("jsonl", "csv", "tsv")


def fields_of(text_field: TextField) -> tuple[str, ...]:
    """The columns or keys that are read."""
    return (text_field,) if isinstance(text_field, str) else text_field


def sides(text: str) -> tuple[str, str]:
    """Source and target of a pair."""
    source, _, target = text.partition(SEPARATOR)
    return source, target


def check_pairs(files: Sequence[SourceFile], text_field: TextField) -> None:
    """Refuse files that cannot hold pairs.

    Raises:
        ValueError: names the file.
    """
    for file in files if not isinstance(text_field, str) else ():
        if file.format not in _FORMATS:
            raise ValueError(
                f"data.text_field: [{', '.join(text_field)}] are columns or keys of a pair, and `{file.name}` is "
                f"{file.format}; pairs are read from {', '.join(_FORMATS)}"
            )
