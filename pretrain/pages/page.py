"""The frame of a page: style, escaping, tables, bars. A page is well-formed XML too, so that it can be checked.

What lives here: what all pages share. What must not: what a page says.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape as _escape

from pretrain.data.looking.spelling import visible

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c1e21; --soft: #6a7078; --line: #d9dce0; --card: #f6f7f8;
  --edge: #c3c8ce; --masked: #ffe08a; --random: #ffc4d6; --kept: #c9efc4; --ahead: #cfe3ff; --special: #6b3fa0;
  --warn: #b3261e; --bar: #7aa7e0; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181b; --ink: #e4e6e9; --soft: #9aa1a9; --line: #34383d;
  --card: #1e2125; --edge: #454b52; --masked: #6b5310; --random: #75294a; --kept: #245a2a; --ahead: #23456f;
  --special: #c9a6f5; --warn: #ff8a80; --bar: #4d7db8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 76rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; } h2 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
p { margin: .3rem 0; } .soft, th { color: var(--soft); } .warn { color: var(--warn); font-weight: 600; }
table { border-collapse: collapse; margin: .3rem 0; font-variant-numeric: tabular-nums; }
td, th { padding: .1rem .9rem .1rem 0; text-align: left; vertical-align: top; font-weight: inherit; }
td.n, th.n { text-align: right; } td.n { white-space: nowrap; } .wide { overflow-x: auto; }
section { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .9rem; margin: .8rem 0; }
.sample { background: var(--card); border-radius: 4px; padding: .4rem .6rem; margin: .3rem 0; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, monospace; }
.bar { display: inline-block; height: .7em; background: var(--bar); border-radius: 2px; min-width: 1px; }
.cell { width: 14rem; } @media (max-width: 600px) { .cell { width: 8rem; } }
.tokens { font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: .2rem 0 .8rem; }
.tokens span { unicode-bidi: isolate; border-right: 1px solid var(--edge); padding: .1rem 0; }
.special { color: var(--special); } .masked { background: var(--masked); } .random { background: var(--random); }
.kept { background: var(--kept); } .ahead { background: var(--ahead); } .output { background: var(--kept); }
.none { text-decoration: underline dotted; }
.pad { color: var(--soft); } s { opacity: .65; }
"""

_FRAME = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'{allowed}" />
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""


def escape(text: str) -> str:
    """Text for HTML, between tags or in an attribute; what cannot be seen is marked."""
    return _escape(visible(text), quote=True)


def page(title: str, body: Iterable[str], *, images: bool = False, scripts: Iterable[str] = ()) -> str:
    """A whole page. `title` is plain text, `body` is HTML; `images` allows those that the page itself holds.

    Of scripts a browser runs those in `scripts` alone, letter for letter: what else might stand in the page is dead.
    """
    allowed = "; img-src data:" if images else ""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    if sources := " ".join(f"'sha256-{digest}'" for digest in digests):
        allowed += f"; script-src {sources}"
    return _FRAME.format(title=escape(title), style=_STYLE, body="\n".join(body), allowed=allowed)


def paragraph(text: str, style: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """A table of plain text; columns in `numbers` stand at the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        styled = ((' class="n"' if number in numbers else "", cell) for number, cell in enumerate(cells))
        return "<tr>" + "".join(f"<{tag}{style}>{escape(cell)}</{tag}>" for style, cell in styled) + "</tr>"

    top = f"<thead>{line(head, 'th')}</thead>" if any(head) else ""
    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def bars(rows: Iterable[tuple[str, float, str]]) -> str:
    """A histogram: label, share of the longest bar (0 to 1), and what stands behind it."""
    lines = "".join(
        f'<tr><td class="n">{escape(label)}</td>'
        f'<td class="cell"><span class="bar" style="width:{share:.1%}"></span></td>'
        f'<td class="n">{escape(value)}</td></tr>'
        for label, share, value in rows
    )
    return f"<table><tbody>{lines}</tbody></table>"
