"""Numbers, names and tables as a card writes them.

What lives here: formatting for Markdown. What must not: what is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_UNITS = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def cell(value: Any) -> str:
    """A value as the cell of a Markdown table: in one line, nothing in it taken for markup."""
    text = str(value).replace("\\", "\\\\").replace("\n", " ").replace("\r", " ")
    for mark in "|*_[]<>":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("`", "'")


def code(text: Any) -> str:
    """Text in a code span, on one line; in a table too."""
    plain = str(text).replace("\n", " ").replace("\r", " ").replace("`", "'").replace("|", "\\|")
    return f"`{plain}`" if plain.strip() else "(empty)"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def facts_table(rows: Mapping[str, Any]) -> str:
    """Two columns; None leaves a row out. Values are Markdown already."""
    return table(("", ""), [(label, str(value)) for label, value in rows.items() if value is not None])


def compact(number: float) -> str:
    """1,234,567 as 1.23 M."""
    for size, unit in _UNITS:
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def scientific(number: float) -> str:
    """3.2e+15 as 3.2 x 10^15, in Unicode."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    exponent = math.floor(math.log10(abs(number)))
    return f"{number / 10**exponent:.2f} × 10{str(exponent).translate(_RAISED)}"


_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def number(value: Any) -> str:
    """A number as people read it: whole ones with commas, others with four significant digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return cell(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def counted(count: int, thing: str, things: str | None = None) -> str:
    """`1 document`, `2,000 documents`; `things` where it is more than an s."""
    return f"{count:,} {thing if count == 1 else things or f'{thing}s'}"


def told(section: Mapping[str, Any], name: str) -> str | None:
    """A section of a configuration in one line, such as `adamw (lr 0.001, betas 0.9 / 0.95)`; None without its name."""
    if not section.get(name):
        return None
    keys = [f"{key} {_value(value)}" for key, value in section.items() if key != name and value not in (None, False)]
    return cell(section[name]) + (f" ({', '.join(keys)})" if keys else "")


def _value(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " / ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else cell(value)
