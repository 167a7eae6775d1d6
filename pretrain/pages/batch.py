"""The page of a batch: its rows, token by token.

What lives here: what `pretrain inspect --html` writes. What must not: how a batch is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pretrain.data.looking.inspection import Kind, Piece, Row, Token
from pretrain.data.looking.spelling import NEWLINE
from pretrain.pages.page import escape, page, paragraph

LEGEND: dict[Kind, str] = {
    "masked": "hidden behind [MASK]; the original is shown",
    "random": "replaced by a random token (struck through); the original is shown",
    "kept": "left as it is, and predicted",
    "ahead": "predicts a token (after the arrow) that is not the next place's",
    "none": "predicts nothing",
    "output": "what the decoder is to write, behind what the encoder reads",
}
"""What the marks mean, by what is predicted at a place."""


def batch_page(title: str, facts: Sequence[str], warnings: Sequence[str], rows: Iterable[Row], kinds: set[Kind]) -> str:
    """The HTML of a batch.

    Args:
        title: what is shown.
        facts: lines about the whole batch.
        warnings: lines that must not be overlooked.
        rows: the rows to show.
        kinds: which marks the legend explains.
    """
    return page(title, _body(facts, warnings, rows, kinds))


def _body(facts: Sequence[str], warnings: Sequence[str], rows: Iterable[Row], kinds: set[Kind]) -> Iterator[str]:
    yield from (paragraph(line) for line in facts)
    yield from (paragraph(line, "warn") for line in warnings)
    marks = [
        f'<span class="{kind}">token</span> {escape(meaning)}' for kind, meaning in LEGEND.items() if kind in kinds
    ]
    marks.append('<span class="special">name</span> special token')
    yield f'<p class="tokens">{" · ".join(marks)}</p>'
    yield paragraph("A line ends each token; hold the pointer over one for its id, position and target.", "soft")
    for row in rows:
        yield f'<section id="row-{row.number}">'
        yield paragraph(describe_row(row))
        for number, piece in enumerate(row.pieces, start=1):
            yield paragraph(f"{number}. {describe_piece(piece)}", "soft")
            yield f'<div class="tokens">{"".join(map(_token, piece.tokens))}</div>'
        if row.padding:
            yield paragraph(f"{row.padding:,} places of padding", "pad")
        yield "</section>"


def describe_row(row: Row) -> str:
    """One line: where the row comes from, and how full it is."""
    source = f"source {row.source} · " if row.source else ""
    places = row.tokens + row.padding
    return (
        f"row {row.number} · {source}epoch {row.epoch} · row {row.plan_row:,} of the plan · "
        f"{len(row.pieces)} document{'s' if len(row.pieces) != 1 else ''} · {row.tokens:,} of {places:,} places "
        f"({row.tokens / places:.1%}) · {row.targets:,} targets"
    )


def describe_piece(piece: Piece) -> str:
    """One line: which document of the shard, and of those from its file, and how much of it. Numbers count from 0."""
    origin = piece.origin
    where = f"{origin.shard} document {origin.document:,}"
    if origin.file is not None and origin.document_in_file is not None:
        where += f" ({origin.file}, {origin.document_in_file:,} of {origin.documents_of_file:,})"
    label = "" if piece.pair is None else f", pair label {piece.pair}"
    if origin.is_whole:
        return f"{where}, whole, {origin.tokens:,} tokens{label}"
    return f"{where}, tokens {origin.first:,} to {origin.end - 1:,} of {origin.tokens:,}{label}"


def _token(token: Token) -> str:
    style = " ".join(filter(None, ("special" if token.is_special else "", "" if token.kind == "plain" else token.kind)))
    about = f"id {token.id}, position {token.position}"
    if token.target is not None:
        how = "" if token.kind == "plain" else f" ({token.kind})"
        about += f", target {token.target} “{token.target_text}”{how}"
    text = escape(token.text).replace(NEWLINE, f"{NEWLINE}\n")
    if token.kind == "random":
        text = f"<s>{escape(token.shown)}</s>{text}"
    if token.kind == "ahead":
        text += f"→{escape(token.target_text)}"
    attribute = f' class="{style}"' if style else ""
    return f'<span{attribute} title="{escape(about)}">{text}</span>'
