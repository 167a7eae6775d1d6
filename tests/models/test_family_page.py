"""docs/family.md: every row that the code has, what follows from the code in its words, figures within the bounds.

Where a figure is measured by a test, that test compares it with the page (`family_page.written`).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from family_page import AGAIN, INTRODUCTION, LARGEST, PAGE, SECTIONS, Section, read

TESTS = Path(__file__).parents[1]
BOUNDS = {
    **dict.fromkeys(("logits", "gradients", "loss", "float64"), LARGEST.logits),
    **dict.fromkeys(("float32", "place", "ways"), LARGEST.float32),
    "neighbour": 0.0,
}


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)
def test_the_page_says_what_the_code_says(section: Section) -> None:
    """Names, keys, references and homes, each asked anew."""
    table = read()[section.title]
    assert list(table) == section.names, AGAIN
    for name, cells in table.items():
        assert tuple(cells) == section.columns, AGAIN
        assert {column: cells[column] for column in cells if column not in section.figures} == {
            section.columns[0]: name
        } | section.facts(name), AGAIN


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)
def test_the_figures_are_within_the_bounds(section: Section) -> None:
    for cells in read()[section.title].values():
        for column in section.figures:
            assert cells[column] == "on a GPU" or 0 <= float(cells[column]) <= BOUNDS[column]


def test_the_page_has_no_other_section_and_this_introduction() -> None:
    assert list(read()) == [section.title for section in SECTIONS], AGAIN
    assert PAGE.read_text(encoding="utf-8").startswith(INTRODUCTION.rstrip("\n")), AGAIN


def test_the_tests_that_the_page_names_are_there() -> None:
    for title, column in (("Mixers and backends", "test"), ("Objectives", "batches")):
        for cells in read()[title].values():
            for name in cells[column].split(", "):
                assert (TESTS / name.strip("`")).exists(), name


def test_names_are_told_apart() -> None:
    assert all(len(set(section.names)) == len(section.names) for section in SECTIONS)
    switches = [name for section in SECTIONS if section.columns[0] == "variant" for name in section.names]
    assert len(set(switches)) == len(switches)


def test_a_row_measured_now_is_the_row_of_the_page() -> None:
    """The first row of the tables that are fast: ten times more or less is another figure."""
    for section in (section for section in SECTIONS if section.title not in ("Masks", "Heads")):
        name = section.names[0]
        cells, page = dict(zip(section.columns, section.row(name), strict=True)), read()[section.title][name]
        for column in section.figures:
            now, then = float(cells[column]), float(page[column])
            floor = 1e-15 if BOUNDS[column] < 1e-6 else 1e-7
            assert now <= max(10 * then, floor), AGAIN
            assert then <= max(10 * now, floor), AGAIN
