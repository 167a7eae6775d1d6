"""README.zh.md says what README.md says: the same commands, headings one to one, the same files."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    return re.findall(r"^```.*?^```$", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def headings(text: str) -> list[str]:
    return re.findall(r"^(#+ .*)$", prose(text), re.MULTILINE)


def parts(text: str) -> list[str]:
    return re.split(r"^#+ .*$", prose(text), flags=re.MULTILINE)


def test_every_block_is_the_same() -> None:
    assert blocks(CHINESE) == blocks(ENGLISH)
    assert len(blocks(ENGLISH)) >= 8


def test_headings_correspond() -> None:
    levels = [[heading.split()[0] for heading in headings(text)] for text in (ENGLISH, CHINESE)]
    assert levels[0] == levels[1]
    for english, chinese in zip(headings(ENGLISH)[1:], headings(CHINESE)[1:], strict=True):
        assert re.search(r"[\u4e00-\u9fff]", chinese), f"`{english}` is not translated"


def test_each_part_names_the_same_files_and_keys() -> None:
    """What stands in backticks, part by part; so no sentence with a file, key or command is missing in one of them."""
    for heading, english, chinese in zip(["", *headings(ENGLISH)], parts(ENGLISH), parts(CHINESE), strict=True):
        wanted, found = (sorted(re.findall(r"`([^`]+)`", re.sub(r"\s+", " ", text))) for text in (english, chinese))
        assert found == wanted, heading


def test_tables_and_lists_have_as_many_rows() -> None:
    for english, chinese in zip(parts(ENGLISH), parts(CHINESE), strict=True):
        for mark in (r"^\|", r"^- "):
            assert len(re.findall(mark, chinese, re.MULTILINE)) == len(re.findall(mark, english, re.MULTILINE))


def test_every_figure_of_the_prose_is_there() -> None:
    """Numbers of three digits or more, and commits."""
    for english, chinese in zip(parts(ENGLISH), parts(CHINESE), strict=True):
        for figure in re.findall(r"\b(?:\d[\d,.]*\d{2}|[0-9a-f]{7})\b", re.sub(r"`[^`]*`", "", english)):
            assert figure in chinese, figure


def test_each_names_the_other() -> None:
    assert "](README.zh.md)" in ENGLISH
    assert "](README.md)" in CHINESE
