"""The picture of a run: its loss over the tokens seen, as SVG that needs nothing else.

What lives here: drawing. What must not: reading, or any address. It is legible on light and on dark ground.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from pretrain.cards.words import compact
from pretrain.training.history import Curves, Scores

FILE = "training-curve.svg"
_WIDTH, _HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 34, 40
_COLOURS = ("#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0c8599", "#e67700")
_TRAINING = "#4c8bf5"
_MOST_SETS = len(_COLOURS)

Points = list[tuple[float, float]]


def draw_curve(curves: Curves, evaluations: Scores, title: str) -> str | None:
    """The training loss and that of each validation set over tokens; None when there are no two points of a line."""
    lines = _lines(curves, evaluations)
    points = [point for _, line in lines for point in line]
    if not any(len(line) > 1 for _, line in lines):
        return None
    xs, ys = [x for x, _ in points], sorted(y for _, y in points)
    low, high = ys[0], ys[min(len(ys) - 1, math.ceil(0.995 * len(ys)))]
    ticks = _ticks(low, high if high > low else low + 1.0)
    bottom, top = min(low, ticks[0]), max(high, ticks[-1])
    last = max(xs) or 1.0

    def at(point: tuple[float, float]) -> tuple[float, float]:
        share = (min(point[1], top) - bottom) / (top - bottom)
        x = _LEFT + point[0] / last * (_WIDTH - _LEFT - _RIGHT)
        return x, _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [*_frame(ticks, at, last, title)]
    for number, (name, line) in enumerate(lines):
        colour = _TRAINING if number == 0 and name == "training" else _COLOURS[number % len(_COLOURS)]
        parts += _line([at(point) for point in line], colour, dots=name != "training")
        parts.append(_legend(number, name, colour))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'role="img" aria-label="{escape(title)}" font-family="sans-serif" font-size="12">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _lines(curves: Curves, evaluations: Scores) -> list[tuple[str, Points]]:
    """(tokens, loss) by name: training first, then validation sets."""
    steps, tokens = curves.along.get("step"), curves.along.get("tokens")
    loss = curves.curves.get("loss")
    if steps is None or tokens is None or loss is None or not len(steps):
        return []
    rate = float(tokens[-1]) / max(1.0, float(steps[-1]))  # tokens a step, which a run keeps
    found = [("training", _finite(zip(tokens.tolist(), loss.mean.tolist(), strict=True)))]
    named = [name for name in evaluations if name.endswith("/loss")][:_MOST_SETS]
    for name in named:
        at, values = evaluations[name]
        found.append(
            (name.removesuffix("/loss"), _finite((step * rate, value) for step, value in zip(at, values, strict=True)))
        )
    return [(name, line) for name, line in found if line]


def _finite(points: Iterable[tuple[float, float]]) -> Points:
    return [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two others, about five."""
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first = math.floor(low / step)
    return [round(step * number, 10) for number in range(first, math.ceil(high / step) + 1)]


def _frame(
    ticks: Sequence[float], at: Callable[[tuple[float, float]], tuple[float, float]], last: float, title: str
) -> Iterable[str]:
    yield f'<text x="{_LEFT}" y="16" fill="#808890">{escape(title)}</text>'
    for tick in ticks:
        _, y = at((0.0, tick))
        yield f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#808890" stroke-opacity=".3"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#808890">{tick:g}</text>'
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, _ = at((share * last, ticks[0]))
        anchor = "end" if share == 1.0 else "middle"
        yield (
            f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="{anchor}" fill="#808890">'
            f"{compact(share * last)}</text>"
        )
    yield f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end" fill="#808890">tokens</text>'


def _line(points: Points, colour: str, *, dots: bool) -> Iterable[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5" stroke-linejoin="round"/>'
    if dots:
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points[-60:])


def _legend(number: int, name: str, colour: str) -> str:
    y = _TOP + 8 + 16 * number
    x = _WIDTH - _RIGHT - 8
    return f'<text x="{x}" y="{y}" text-anchor="end" fill="{colour}">{escape(name)}</text>'
