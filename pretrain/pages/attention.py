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
_STYLE = """<style>
.heads { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .6rem; }
figure { margin: 0; } figcaption { font-size: 12px; color: var(--soft); }
img.map { width: 100%; aspect-ratio: var(--aspect, 1); image-rendering: pixelated; border: 1px solid var(--line); }
.big { max-width: 34rem; } .big img.map { display: block; }
.grid td { width: 2.6rem; height: 1.5rem; padding: 0 .2rem; text-align: center; font-size: 11px; color: #14181d; }
.grid th { padding: 0 .5rem 0 0; font-size: 12px; }
.look td { padding: .1rem .9rem .1rem 0; }
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
    body = [_STYLE, paragraph(model, "soft"), f'<div class="sample">{escape(text)}</div>']
    body.append(
        paragraph(
            "In a map a row is a token that looks and a column one that is looked at; dark is much. The strength of a "
            "colour is the square root of the probability, so that faint looks are seen."
        )
    )
    for stack in stacks:
        body.append(f"<h2>{escape(stack.title)}</h2>")
        body.extend(_importance(stack))
        body.extend(_rollout(stack))
        body.extend(_maps(stack))
    return page(f"attention of {model}", body, images=True)


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
        cells = "".join(f'<td style="background:{_shade(share)}">{share:.2f}</td>' for share in shares)
        rows.append(f"<tr><th>layer {layer}</th>{cells}</tr>")
    top, body = f"<thead><tr><th></th>{head}</tr></thead>", "".join(rows)
    yield f'<div class="wide"><table class="grid">{top}<tbody>{body}</tbody></table></div>'


def _shade(share: float) -> str:
    """From white to blue."""
    red, green, blue = (round(255 - share * (255 - channel)) for channel in (70, 130, 210))
    return f"rgb({red},{green},{blue})"


def _rollout(stack: Stack) -> Iterator[str]:
    """The map of rollout, and the tokens that each token draws on most."""
    if stack.rollout is None:
        return
    yield paragraph(
        "Rollout: through all layers, half of each layer's look and half of what stays (Abnar and Zuidema 2020, arXiv "
        "2005.00928): how much of each input token has reached each place."
    )
    yield f'<div class="big">{_figure(stack.rollout, "")}</div>'
    if len(stack.queries) > _MOST_LABELS:
        yield paragraph(f"{len(stack.queries)} tokens; what each draws on is listed for up to {_MOST_LABELS}.", "soft")
        return
    rows = []
    for number, token in enumerate(stack.queries):
        best = np.argsort(-stack.rollout[number])[:4]
        from_ = ", ".join(f"{stack.keys[place]} {stack.rollout[number, place]:.2f}" for place in best.tolist())
        rows.append(f"<tr><td>{escape(token)}</td><td>{escape(from_)}</td></tr>")
    body = "".join(rows)
    yield (
        '<div class="wide"><table class="look"><thead><tr><th>at</th><th>draws on</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


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
    """One map as an image."""
    data = base64.b64encode(png(weights)).decode()
    rows, columns = weights.shape
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    alt = escape(caption or "attention map")
    return (
        f'<figure><img class="map" style="--aspect:{columns}/{rows}" alt="{alt}" src="data:image/png;base64,{data}" />'
        f"{words}</figure>"
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
