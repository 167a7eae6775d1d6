"""Two encoder-decoders written out from their papers, one row and one head at a time: slow, and plain to check.

`transformer` is Vaswani et al. 2017 (arXiv 1706.03762), `t5` Raffel et al. 2019 (arXiv 1910.10683). Weights come as a
dict of tensors. Nothing of the package is used here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def sinusoid_table(length: int, width: int, *, interleaved: bool) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i / d)), PE(pos, 2i + 1) = cos of the same (section 3.5).

    The authors' code puts PE(pos, 2i) into column i and PE(pos, 2i + 1) into column d / 2 + i.
    """
    table = torch.zeros(length, width, dtype=torch.float64)
    for position in range(length):
        for i in range(width // 2):
            angle = position / 10000 ** (2 * i / width)
            table[position, 2 * i if interleaved else i] = math.sin(angle)
            table[position, 2 * i + 1 if interleaved else width // 2 + i] = math.cos(angle)
    return table


def layer_norm(states: Tensor, weights: Weights, name: str, eps: float) -> Tensor:
    """Ba et al. 2016: each position to mean 0 and variance 1, then a gain and a bias."""
    rows = []
    for row in states:
        centred = row - row.sum() / len(row)
        variance = (centred * centred).sum() / len(row)
        rows.append(centred / torch.sqrt(variance + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"])
    return torch.stack(rows)


def rms_norm(states: Tensor, weights: Weights, name: str, eps: float) -> Tensor:
    """T5's simplified layer norm: no mean is taken off, no bias is added."""
    rows = [row / torch.sqrt((row * row).sum() / len(row) + eps) * weights[f"{name}.weight"] for row in states]
    return torch.stack(rows)


def dense(states: Tensor, weights: Weights, name: str) -> Tensor:
    """x W^T + b, without b where there is none."""
    product = states @ weights[f"{name}.weight"].T
    return product + weights[f"{name}.bias"] if f"{name}.bias" in weights else product


def attention(
    asking: Tensor,
    asked: Tensor,
    weights: Weights,
    name: str,
    *,
    heads: int,
    scale: float,
    causal: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """Multi-head attention of (Q, hidden) to (K, hidden): softmax(q k^T scale + bias) v, a head at a time."""
    query, key, value = (
        dense(states, weights, f"{name}.{letter}_proj")
        for states, letter in ((asking, "q"), (asked, "k"), (asked, "v"))
    )
    width = query.shape[1] // heads
    mixed = []
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        rows = []
        for place in range(len(asking)):
            seen = place + 1 if causal else len(asked)
            scores = (key[:seen, columns] @ query[place, columns]) * scale
            if bias is not None:
                scores = scores + bias[head, place, :seen]
            exponentials = torch.exp(scores - scores.max())
            rows.append((exponentials / exponentials.sum()) @ value[:seen, columns])
        mixed.append(torch.stack(rows))
    return dense(torch.cat(mixed, dim=1), weights, f"{name}.o_proj")


def transformer(
    weights: Weights,
    source: list[int],
    target: list[int],
    *,
    layers: int,
    decoder_layers: int,
    heads: int,
    eps: float,
    interleaved: bool = False,
    scaled: bool = True,
    post_norm: bool = True,
) -> Tensor:
    """The Transformer of 2017: input ids and the output so far -> (T, vocabulary) logits.

    Post-norm is LayerNorm(x + Sublayer(x)) as written (section 3.1); pre-norm x + Sublayer(LayerNorm(x)) with a last
    norm on each stack, as its authors' code had it later.
    """
    table = weights["model.encoder.embed_tokens.weight"]
    hidden = table.shape[1]

    def embed(ids: list[int]) -> Tensor:
        looked_up = torch.stack([table[token] for token in ids])
        looked_up = looked_up * math.sqrt(hidden) if scaled else looked_up
        return looked_up + sinusoid_table(len(ids), hidden, interleaved=interleaved)

    def feed_forward(states: Tensor, name: str) -> Tensor:
        return dense(torch.clamp(dense(states, weights, f"{name}.up_proj"), min=0), weights, f"{name}.down_proj")

    def attend(states: Tensor, asked: Tensor, name: str, causal: bool) -> Tensor:
        return attention(states, asked, weights, name, heads=heads, scale=(hidden / heads) ** -0.5, causal=causal)

    def sublayer(states: Tensor, norm: str, function) -> Tensor:
        if post_norm:
            return layer_norm(states + function(states), weights, norm, eps)
        return states + function(layer_norm(states, weights, norm, eps))

    memory = embed(source)
    for layer in range(layers):
        name = f"model.encoder.layers.{layer}"
        memory = sublayer(memory, f"{name}.attention_norm", lambda x, n=name: attend(x, x, f"{n}.self_attn", False))
        memory = sublayer(memory, f"{name}.mlp_norm", lambda x, n=name: feed_forward(x, f"{n}.mlp"))
    if not post_norm:
        memory = layer_norm(memory, weights, "model.encoder.norm", eps)
    states = embed(target)
    for layer in range(decoder_layers):
        name = f"model.decoder.layers.{layer}"
        states = sublayer(states, f"{name}.attention_norm", lambda x, n=name: attend(x, x, f"{n}.self_attn", True))
        states = sublayer(
            states, f"{name}.cross_attention_norm", lambda x, n=name: attend(x, memory, f"{n}.cross_attn", False)
        )
        states = sublayer(states, f"{name}.mlp_norm", lambda x, n=name: feed_forward(x, f"{n}.mlp"))
    if not post_norm:
        states = layer_norm(states, weights, "model.decoder.norm", eps)
    return states @ weights.get("lm_head.weight", table).T


def t5_bucket(distance: int, *, both_sides: bool, buckets: int, furthest: int) -> int:
    """The bucket of key position minus query position.

    Half of the buckets of a side are single distances, the other half grow logarithmically to `furthest`. With both
    sides, keys that come later have the upper half of all buckets; else they share the bucket of distance 0.
    """
    first = 0
    if both_sides:
        buckets //= 2
        first = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    single = buckets // 2
    if distance < single:
        return first + distance
    share = math.log(distance / single) / math.log(furthest / single)
    return first + min(single + math.floor(share * (buckets - single) + 1e-9), buckets - 1)


def t5(
    weights: Weights,
    source: list[int],
    target: list[int],
    *,
    layers: int,
    decoder_layers: int,
    heads: int,
    eps: float,
    buckets: int,
    furthest: int,
    gated: bool = False,
    tied: bool = True,
) -> Tensor:
    """T5: relu and one table for all (version 1.0), or gated GELU and a head of its own (`gated`, not `tied`).

    Pre-norm, no biases, scores not divided by the root of their width, one relative bias a stack for all its layers
    and none across, the tied head's input times hidden ** -0.5.
    """
    table = weights["model.encoder.embed_tokens.weight"]
    hidden = table.shape[1]

    def relative_bias(length: int, stack: str, both_sides: bool) -> Tensor:
        learned = weights[f"model.{stack}.mixer_inputs.relative_bias.weight"]  # (buckets, heads)
        rows = [
            [
                learned[t5_bucket(key - query, both_sides=both_sides, buckets=buckets, furthest=furthest)]
                for key in range(length)
            ]
            for query in range(length)
        ]
        return torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)

    def feed_forward(states: Tensor, name: str) -> Tensor:
        up = dense(states, weights, f"{name}.up_proj")
        if gated:
            gate = dense(states, weights, f"{name}.gate_proj")
            inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
            return dense(0.5 * gate * (1 + torch.tanh(inner)) * up, weights, f"{name}.down_proj")
        return dense(torch.clamp(up, min=0), weights, f"{name}.down_proj")

    def norm(states: Tensor, name: str) -> Tensor:
        return rms_norm(states, weights, name, eps)

    def attend(states: Tensor, asked: Tensor, name: str, causal: bool, bias: Tensor | None) -> Tensor:
        return attention(states, asked, weights, name, heads=heads, scale=1.0, causal=causal, bias=bias)

    memory = torch.stack([table[token] for token in source])
    bias = relative_bias(len(source), "encoder", True)
    for layer in range(layers):
        name = f"model.encoder.layers.{layer}"
        normed = norm(memory, f"{name}.attention_norm")
        memory = memory + attend(normed, normed, f"{name}.self_attn", False, bias)
        memory = memory + feed_forward(norm(memory, f"{name}.mlp_norm"), f"{name}.mlp")
    memory = norm(memory, "model.encoder.norm")
    states = torch.stack([table[token] for token in target])
    bias = relative_bias(len(target), "decoder", False)
    for layer in range(decoder_layers):
        name = f"model.decoder.layers.{layer}"
        normed = norm(states, f"{name}.attention_norm")
        states = states + attend(normed, normed, f"{name}.self_attn", True, bias)
        normed = norm(states, f"{name}.cross_attention_norm")
        states = states + attend(normed, memory, f"{name}.cross_attn", False, None)
        states = states + feed_forward(norm(states, f"{name}.mlp_norm"), f"{name}.mlp")
    states = norm(states, "model.decoder.norm")
    return (states * hidden**-0.5) @ table.T if tied else states @ weights["lm_head.weight"].T


def smoothed_loss(logits: Tensor, targets: list[int], smoothing: float) -> Tensor:
    """Summed cross-entropy against 1 - e on the target and e spread evenly over the whole vocabulary (section 5.4)."""
    total = torch.zeros((), dtype=logits.dtype)
    for row, target in zip(logits, targets, strict=True):
        log_probabilities = row - row.max() - torch.log(torch.exp(row - row.max()).sum())
        wanted = torch.full_like(row, smoothing / len(row))
        wanted[target] += 1 - smoothing
        total = total - (wanted * log_probabilities).sum()
    return total
