"""Writes docs/family.md: every variant of the model, what it follows, and how far it lies from a slow reference.

    python tests/models/family_page.py docs/family.md

What lives here: the page and its sections. A section lists the names of its rows cheaply, so that a test can see that
the page is whole, and measures them when the page is written. Further sections are added to `SECTIONS`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

if __name__ == "__main__":  # run as a command: the builders lie beside this file, the package two folders up
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from variants import GROUPS, Errors, Variant, measure

LARGEST = Errors(logits=1e-9, gradients=1e-9, float32=1e-5)
"""What `test_switches.py` allows."""


@dataclass(frozen=True)
class Section:
    """One table of the page: its columns, the names in its first one, and what makes its rows."""

    title: str
    text: str
    columns: tuple[str, ...]
    names: Callable[[], list[str]]
    rows: Callable[[], list[tuple[str, ...]]]


def _switches(title: str, variants: list[Variant]) -> Section:
    columns = ("variant", "keys", "follows", "models", "logits", "gradients", "float32")

    def row(variant: Variant) -> tuple[str, ...]:
        worst = Errors(0.0, 0.0, 0.0)
        for kind in variant.kinds:
            worst = worst.worst(measure(variant, kind))
        errors = (f"{error:.0e}" for error in (worst.logits, worst.gradients, worst.float32))
        return (variant.name, _keys(variant), variant.source, ", ".join(variant.kinds), *errors)

    text = "" if title != "Designs" else "The conventions of each `architecture`, at tiny sizes."
    return Section(
        title,
        text,
        columns,
        lambda: [variant.name for variant in variants],
        lambda: [row(variant) for variant in variants],
    )


def _keys(variant: Variant) -> str:
    if variant.architecture:
        return f"`architecture: {variant.architecture}`"
    return ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in variant.keys.items())


SECTIONS = [_switches(title, variants) for title, variants in GROUPS.items()]

INTRODUCTION = """# The family

Every variant of the one Transformer block, and how far a model of it lies from a second implementation
(`tests/models/reference.py`): plain loops over the definitions in the papers, in float64, which share no line with the
package. Each row is a tiny model with every parameter drawn from a normal, over packed rows with padding, on every
attention backend of a CPU, as a change of BERT (encoder), GPT-2 (decoder) and the Transformer of 2017 (seq2seq). The
figures are the largest difference over the largest value: of logits and of the gradients of all parameters in float64,
and of logits in float32. `tests/models/test_switches.py` allows 1e-9, 1e-9 and 1e-5, and tries random combinations of
switches too; angles, slopes and buckets are also those of transformers.

Written by `python tests/models/family_page.py docs/family.md`
"""


def page() -> str:
    """The whole page, measured now."""
    versions = f"with torch {torch.__version__} and transformers {transformers.__version__}.\n"
    parts = [INTRODUCTION.rstrip("\n") + " " + versions]
    for section in SECTIONS:
        lines = [f"## {section.title}", *([section.text] if section.text else []), ""]
        lines += ["| " + " | ".join(section.columns) + " |", "|" + "---|" * len(section.columns)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in section.rows()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def read(text: str) -> dict[str, list[list[str]]]:
    """The cells of each section's table, by the section's title."""
    tables: dict[str, list[list[str]]] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("## "):
            title = line[3:]
            tables[title] = []
        elif line.startswith("| ") and title:
            tables[title].append([cell.strip() for cell in line.strip("|").split(" | ")])
    return {title: rows[1:] for title, rows in tables.items()}  # without the heading


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tests/models/family_page.py docs/family.md")
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
