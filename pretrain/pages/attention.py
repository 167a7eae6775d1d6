"""The page of `pretrain attention`: maps of every head as images, rollout, head importance. No script runs in it.

What lives here: how numbers become a page. What must not: models.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pretrain.pages.page import escape, page, paragraph

Floats = npt.NDArray[np.float32]

_MOST_LABELS = 48  # tokens beside a map, above which they would not be read
_MOST_OPEN = 16  # tokens whose lists are shown without a click
LEGEND = (
    "In a map a row is a token that looks and a column one that is looked at. The stronger the colour, the more: it is "
    "the square root of the probability, so that faint looks are seen."
)
STYLE = """<style>
.heads { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .6rem; }
figure { margin: 0; } figcaption { font-size: 12px; color: var(--soft); }
h1, .soft { overflow-wrap: anywhere; }
:root { --look: #4682d2; }
img.map { width: 100%; aspect-ratio: var(--aspect, 1); image-rendering: pixelated; border: 1px solid var(--line);
  display: block; }
.heads img.map { max-height: 14rem; min-height: 3rem; } .big img.map { min-height: 4rem; }
.big { max-width: calc(34rem * min(1, var(--columns) / var(--rows))); min-width: 6rem; }
.named { display: grid; padding: .2rem 0; width: max-content;
  grid-template-columns: auto calc(var(--columns) * clamp(13px, 30rem / max(var(--columns), var(--rows)), 2.4rem)); }
.named span { font: 11px/1 ui-monospace, monospace; overflow: hidden; text-overflow: ellipsis; white-space: pre; }
.named .top { grid-column: 2; display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr));
  align-items: end; justify-items: center; }
.named .top span { writing-mode: vertical-rl; text-orientation: sideways; transform: rotate(180deg);
  max-height: 6rem; padding-top: .2rem; }
.named .left { display: grid; grid-template-rows: repeat(var(--rows), minmax(0, 1fr)); align-items: center;
  justify-items: end; padding-right: .3rem; }
.named .left span { max-width: 7rem; }
.grid td { width: 2.6rem; min-width: 2.2rem; height: 1.5rem; padding: 0 .2rem; text-align: center; font-size: 11px;
  vertical-align: middle; background: color-mix(in srgb, var(--look) var(--share), var(--ground)); }
.grid th { padding: 0 .5rem 0 0; font-size: 12px; white-space: nowrap; vertical-align: middle; }
.grid thead th { text-align: center; }
.look td { padding: .1rem .9rem .1rem 0; } .look td:first-child { white-space: pre; }
details { margin: .3rem 0; } summary { cursor: pointer; }
@media (prefers-color-scheme: dark) { :root { --look: #2f6cc4; }
  img.map { filter: invert(.92) hue-rotate(180deg); border-color: var(--ink); } }
</style>"""


@dataclass(frozen=True)
class Stack:
    """The attention of one stack to itself, or of a decoder to the encoder.

    title: what it is. queries and keys: the tokens. maps (layers, heads, Q, K): probabilities, a row sums to 1.
    importance (layers, heads): how much the loss depends on each head, or None. rollout (Q, K), or None.
    """

    title: str
    queries: Sequence[str]
    keys: Sequence[str]
    maps: Floats
    importance: Floats | None = None
    rollout: Floats | None = None


def attention_page(model: str, text: str, stacks: Sequence[Stack]) -> str:
    """The whole page."""
    name = model.rstrip("/").rsplit("/", 1)[-1]
    where = [paragraph(model, "soft")] if name != model else []
    body = [STYLE, *where, f'<div class="sample">{escape(text)}</div>']
    body.append(paragraph(LEGEND))
    body.extend(attention_parts(stacks))
    return page(f"attention of {name}", body, images=True)


def attention_parts(stacks: Sequence[Stack], heading: str = "h2") -> Iterator[str]:
    """The maps of a text, for a page that holds `STYLE`; `heading` is the tag of their titles."""
    for stack in stacks:
        yield f"<{heading}>{escape(stack.title)}</{heading}>"
        yield from _importance(stack)
        yield from _rollout(stack) if stack.rollout is not None else _mean(stack)
        yield from _maps(stack)


def _importance(stack: Stack) -> Iterator[str]:
    """A grid of layers and heads."""
    if stack.importance is None:
        return
    yield paragraph(
        "Head importance: the mean of |probability x slope of the loss| (Michel et al. 2019, arXiv 1905.10650), as a "
        "share of the largest."
    )
    largest = float(stack.importance.max()) or 1.0
    layers, heads = stack.importance.shape
    head = "".join(f"<th>{number}</th>" for number in range(heads))
    rows = []
    for layer in range(layers):
        shares = [float(value) / largest for value in stack.importance[layer]]
        cells = "".join(f'<td style="--share:{share:.1%}">{share:.2f}</td>' for share in shares)
        rows.append(f"<tr><th>layer {layer}</th>{cells}</tr>")
    top, body = f"<thead><tr><th></th>{head}</tr></thead>", "".join(rows)
    yield f'<div class="wide"><table class="grid">{top}<tbody>{body}</tbody></table></div>'


def _rollout(stack: Stack) -> Iterator[str]:
    """The map of rollout, and the tokens that each token draws on most."""
    assert stack.rollout is not None
    yield paragraph(
        "Rollout: through all layers, half of each layer's look and half of what stays (Abnar and Zuidema 2020, arXiv "
        "2005.00928): how much of each input token has reached each place."
    )
    yield from _whole(stack, stack.rollout, "draws on")


def _mean(stack: Stack) -> Iterator[str]:
    """The map of all heads together, and the tokens that each token looks at most."""
    yield paragraph("The mean of all layers and heads.")
    yield from _whole(stack, stack.maps.mean(axis=(0, 1)), "looks at")


def _whole(stack: Stack, weights: Floats, verb: str) -> Iterator[str]:
    """A large map with its tokens where they can be read, and the largest four of each row in words."""
    queries, keys = _labels(stack.queries), _labels(stack.keys)
    sizes = f"--rows:{len(queries)};--columns:{len(keys)}"
    if max(len(queries), len(keys)) <= _MOST_LABELS:
        top, left = ("".join(f"<span>{token}</span>" for token in tokens) for tokens in (keys, queries))
        yield (
            f'<div class="wide"><div class="named" style="{sizes}">'
            f'<div class="top">{top}</div><div class="left">{left}</div>{_image(weights, verb)}</div></div>'
        )
    else:
        yield f'<div class="big" style="{sizes}">{_image(weights, verb)}</div>'
    rows = []
    for number, token in enumerate(queries):
        best = np.argsort(-weights[number], kind="stable")[:4]
        found = ", ".join(f"{keys[place]} {weights[number, place]:.2f}" for place in best.tolist())
        rows.append(f"<tr><td>{token}</td><td>{found}</td></tr>")
    opened = ' open="open"' if len(queries) <= _MOST_OPEN else ""
    yield (
        f"<details{opened}><summary>what each token {verb}</summary>"
        f'<div class="wide"><table class="look"><tbody>{"".join(rows)}</tbody></table></div></details>'
    )


def _labels(tokens: Sequence[str]) -> list[str]:
    """Tokens for HTML; one that is space alone is seen."""
    return [escape(token if token.strip() else token.replace(" ", "␣")) for token in tokens]


def _maps(stack: Stack) -> Iterator[str]:
    """Every head, a layer in each fold; the first is open."""
    layers, heads = stack.maps.shape[:2]
    for layer in range(layers):
        figures = "".join(
            _figure(stack.maps[layer, head], f"head {head}, {_describe(stack.maps[layer, head])}")
            for head in range(heads)
        )
        opened = ' open="open"' if layer == 0 else ""
        yield f'<details{opened}><summary>layer {layer}</summary><div class="heads">{figures}</div></details>'


def _describe(weights: Floats) -> str:
    """How spread a head looks, in bits, and how far, in tokens."""
    entropy = float(-(weights * np.log2(np.maximum(weights, 1e-12))).sum(-1).mean())
    distance = np.abs(np.arange(weights.shape[0])[:, None] - np.arange(weights.shape[1])[None, :])
    return f"{entropy:.1f} bits, {float((weights * distance).sum(-1).mean()):.1f} tokens away"


def _figure(weights: Floats, caption: str) -> str:
    """One map with words below it."""
    return f"<figure>{_image(weights, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def _image(weights: Floats, words: str) -> str:
    """One map as an image."""
    data = base64.b64encode(png(weights)).decode()
    rows, columns = weights.shape
    return (
        f'<img class="map" style="--aspect:{columns}/{rows}" alt="{escape(words)}" '
        f'src="data:image/png;base64,{data}" />'
    )


def png(weights: Floats) -> bytes:
    """A map (rows, columns) of numbers from 0 to 1 as a palette image: 1 is dark blue, 0 white."""
    rows, columns = weights.shape
    levels = np.round(np.sqrt(np.clip(weights, 0.0, 1.0)) * 255).astype(np.uint8)
    pixels = np.concatenate([np.zeros((rows, 1), dtype=np.uint8), levels], axis=1)  # each line: no filter
    shares = np.arange(256)[:, None] / 255.0
    palette = np.round(255 - shares * (255 - np.array([[10, 50, 120]]))).astype(np.uint8)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"PLTE", palette.tobytes())
        + chunk(b"IDAT", zlib.compress(pixels.tobytes(), 9))
        + chunk(b"IEND", b"")
    )
