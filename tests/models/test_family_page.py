"""docs/family.md names every variant that the tests know, in their words, with figures within the bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_page import INTRODUCTION, LARGEST, SECTIONS, Section, read
from variants import GROUPS, Variant

PAGE = Path(__file__).parents[2] / "docs" / "family.md"
AGAIN = "run python tests/models/family_page.py docs/family.md"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)
def test_the_page_has_each_variant_once(section: Section) -> None:
    written = [row[0] for row in read(PAGE.read_text(encoding="utf-8")).get(section.title, [])]
    assert written == section.names(), AGAIN


def test_the_page_has_no_other_section_and_this_introduction() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert list(read(text)) == [section.title for section in SECTIONS], AGAIN
    assert text.startswith(INTRODUCTION.rstrip("\n")), AGAIN


@pytest.mark.parametrize("title", GROUPS)
def test_the_figures_are_within_the_bounds(title: str) -> None:
    by_name: dict[str, Variant] = {variant.name: variant for variant in GROUPS[title]}
    for name, keys, source, kinds, *errors in read(PAGE.read_text(encoding="utf-8"))[title]:
        variant = by_name[name]
        assert all(f"`{key}: " in keys for key in variant.keys) or variant.architecture, AGAIN
        assert (source, kinds) == (variant.source, ", ".join(variant.kinds)), AGAIN
        logits, gradients, float32 = (float(error) for error in errors)
        assert logits < LARGEST.logits
        assert gradients < LARGEST.gradients
        assert float32 < LARGEST.float32


def test_names_are_told_apart() -> None:
    names = [variant.name for variants in GROUPS.values() for variant in variants]
    assert len(set(names)) == len(names)
