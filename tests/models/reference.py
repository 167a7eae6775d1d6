"""The whole Transformer family once more, slowly: every switch by its definition, in float64, one position at a time.

What lives here: `reference_logits`, an implementation that shares no line with the package's. It reads the values of a
config and parameters by their names, and nothing else. Sums over positions, heads and channels are written as loops or
einsum; gradients come from autograd of these formulas. What must not: anything imported from `pretrain`, tables, caches
for speed.

    settings = settings_of(model.config)
    weights = weights_of(model)                       # float64 leaves, by parameter name
    logits = reference_logits(settings, weights, ids) # (B, L, vocabulary)

An encoder-decoder also takes `output_ids`, the decoder's input; its logits are those of the decoder. `documents` (B, L)
and `output_documents` number the pieces of packed rows, 0 is padding; positions restart with each piece. Logits at
padding mean nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Settings = dict[str, Any]
Weights = dict[str, Tensor]


def settings_of(config: Any, **instead: Any) -> Settings:
    """The values of a config as a plain dictionary, with some put in their place."""
    settings = {key: getattr(config, key, None) for key in (*config.to_dict(), "num_decoder_layers")}
    return settings | {"kind": type(config).kind} | instead


def weights_of(model: torch.nn.Module) -> Weights:
    """A float64 leaf for each parameter, by its name; tied ones appear once."""
    return {name: p.detach().double().clone().requires_grad_() for name, p in model.named_parameters()}


def reference_logits(
    settings: Settings,
    weights: Weights,
    ids: Tensor,
    *,
    documents: Tensor | None = None,
    token_types: Tensor | None = None,
    output_ids: Tensor | None = None,
    output_documents: Tensor | None = None,
) -> Tensor:
    """(B, L) token ids -> (B, L, vocabulary), one row at a time; of an encoder-decoder (B, T, vocabulary)."""
    rows = []
    for row in range(ids.shape[0]):
        pieces = [1] * ids.shape[1] if documents is None else documents[row].tolist()
        types = None if token_types is None else token_types[row].tolist()
        if settings["kind"] != "seq2seq":
            causal = settings["kind"] == "decoder"
            states = stack(settings, weights, "model.", ids[row].tolist(), pieces, types, causal=causal)
        else:
            assert output_ids is not None
            memory = stack(settings, weights, "model.encoder.", ids[row].tolist(), pieces, types, causal=False)
            written = output_ids[row].tolist()
            out = [1] * len(written) if output_documents is None else output_documents[row].tolist()
            states = stack(
                settings,
                weights,
                "model.decoder.",
                written,
                out,
                None,
                causal=True,
                memory=memory,
                memory_pieces=pieces,
            )
        rows.append(head(settings, weights, states))
    return torch.stack(rows)


# --- the stack ---------------------------------------------------------------------------------------------------


def stack(
    settings: Settings,
    weights: Weights,
    prefix: str,
    ids: list[int],
    pieces: list[int],
    types: list[int] | None,
    *,
    causal: bool,
    memory: Tensor | None = None,
    memory_pieces: list[int] | None = None,
) -> Tensor:
    """Token ids of one row -> (L, hidden): embeddings, then every layer."""
    positions = positions_of(pieces)
    states = embed(settings, weights, prefix, ids, positions, types)
    layers = settings["num_hidden_layers"]
    groups = settings["num_hidden_groups"]
    if settings["kind"] == "seq2seq":
        layers = groups = settings["num_decoder_layers"] if memory is not None else layers
    for layer in range(layers):
        # ALBERT: the first layers / groups layers share the first set of weights, and so on.
        name = f"{prefix}layers.{layer // (layers // groups)}."
        seen = visible(settings, pieces, causal=causal, local=is_local(settings, layer))
        scheme = Scheme(settings, weights, prefix, positions, seen, causal, is_local(settings, layer))
        crossing = None if memory is None else (memory, memory_pieces or [])
        states = block(settings, weights, name, states, scheme, first=layer == 0, pieces=pieces, crossing=crossing)
    if settings["norm_placement"] == "pre":
        states = norm(settings, weights, prefix + "norm.", states)
    return states


def positions_of(pieces: list[int]) -> list[int]:
    """Places counted from the start of each piece."""
    places: list[int] = []
    for index, piece in enumerate(pieces):
        places.append(places[-1] + 1 if index and pieces[index - 1] == piece else 0)
    return places


def is_local(settings: Settings, layer: int) -> bool:
    """Whether a layer looks within the window alone."""
    pattern = settings["attention_pattern"]
    if pattern is not None:
        return str(pattern[layer % len(pattern)]) == "local"
    return bool(layer % settings["global_attention_every"] != 0)


def visible(settings: Settings, pieces: list[int], *, causal: bool, local: bool) -> list[list[bool]]:
    """seen[i][j]: whether place i of the row looks at place j. Padding looks at itself, so that it has numbers."""
    seen = [[False] * len(pieces) for _ in pieces]
    for i, of_query in enumerate(pieces):
        for j, of_key in enumerate(pieces):
            allowed = of_query == of_key != 0
            if causal and j > i:
                allowed = False
            if local and causal and i - j >= settings["local_window"]:
                allowed = False
            if local and not causal and abs(i - j) > settings["local_window"] // 2:
                allowed = False
            seen[i][j] = allowed or i == j
    return seen


def embed(
    settings: Settings, weights: Weights, prefix: str, ids: list[int], positions: list[int], types: list[int] | None
) -> Tensor:
    """(L, hidden): token times scale, plus type, plus position; norm; projection."""
    table = weights[
        "model.encoder.embed_tokens.weight" if settings["kind"] == "seq2seq" else "model.embed_tokens.weight"
    ]
    rows = []
    for index, (token, position) in enumerate(zip(ids, positions, strict=True)):
        vector = table[token] * settings["embedding_scale"]
        if settings["type_vocab_size"]:
            vector = vector + weights[prefix + "embed_token_types.weight"][0 if types is None else types[index]]
        place = position + settings["position_offset"]
        if settings["position_kind"] == "learned":
            vector = vector + weights[prefix + "embed_positions.weight"][place]
        if settings["position_kind"] == "sinusoidal":
            vector = vector + sinusoid(place, settings["embedding_size"], settings["sinusoidal_layout"])
        rows.append(vector)
    states = torch.stack(rows)
    if settings["embedding_norm"]:
        states = norm(settings, weights, prefix + "embed_norm.", states)
    if settings["embedding_size"] != settings["hidden_size"]:
        states = linear(weights, prefix + "embed_project.", states)
    return states


def sinusoid(place: int, width: int, layout: str) -> Tensor:
    """Vaswani et al. 2017, section 3.5: PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(...)."""
    vector = [0.0] * width
    for i in range(width // 2):
        angle = place / 10_000 ** (2 * i / width)
        sine, cosine = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, width // 2 + i)
        vector[sine], vector[cosine] = math.sin(angle), math.cos(angle)
    return torch.tensor(vector, dtype=torch.float64)


def block(
    settings: Settings,
    weights: Weights,
    name: str,
    states: Tensor,
    scheme: Scheme,
    *,
    first: bool,
    pieces: list[int],
    crossing: tuple[Tensor, list[int]] | None,
) -> Tensor:
    """One layer on (L, hidden)."""
    scale = settings["residual_scale"]

    def normed(which: str, values: Tensor) -> Tensor:
        if which == "attention_norm" and first and not settings["first_norm"]:
            return values
        return norm(settings, weights, f"{name}{which}.", values)

    if settings["block_kind"] == "parallel":
        mixed = self_attention(settings, weights, name + "self_attn.", normed("attention_norm", states), scheme)
        return states + scale * mixed + scale * mlp(settings, weights, name, normed("mlp_norm", states))
    if settings["block_kind"] == "parallel_shared_norm":
        shared = normed("attention_norm", states)
        mixed = self_attention(settings, weights, name + "self_attn.", shared, scheme)
        return states + scale * mixed + scale * mlp(settings, weights, name, shared)
    branches = [
        ("attention_norm", lambda x: self_attention(settings, weights, name + "self_attn.", x, scheme)),
        ("mlp_norm", lambda x: mlp(settings, weights, name, x)),
    ]
    if crossing is not None:
        look = ("cross_attention_norm", lambda x: cross_attention(settings, weights, name, x, pieces, *crossing))
        branches.insert(1, look)
    for which, branch in branches:
        if settings["norm_placement"] == "pre":  # x + f(norm(x))
            states = states + scale * branch(normed(which, states))
        else:  # norm(x + f(x))
            states = normed(which, states + scale * branch(states))
    return states


# --- attention ---------------------------------------------------------------------------------------------------


class Scheme:
    """What a layer's attention knows of places: who sees whom, what turns, what a distance is worth."""

    def __init__(
        self,
        settings: Settings,
        weights: Weights,
        prefix: str,
        positions: list[int],
        seen: list[list[bool]],
        causal: bool,
        local: bool,
    ) -> None:
        self.settings, self.weights, self.prefix = settings, weights, prefix
        self.positions, self.seen, self.causal, self.local = positions, seen, causal, local

    def turn(self, heads: Tensor) -> Tensor:
        """(L, heads, head_dim): multiply each position's vectors by that position's rotation matrix."""
        if self.settings["position_kind"] != "rotary":
            return heads
        rotations = torch.stack([self._rotation(position) for position in self.positions])
        return torch.einsum("lcd,lhd->lhc", rotations, heads)

    def _rotation(self, position: int) -> Tensor:
        """(head_dim, head_dim): plane i holds channels i and i + width / 2 of the first `width`; the rest stays."""
        settings = self.settings
        width = int(settings["head_dim"] * settings["partial_rotary_factor"])
        theta = settings["local_rope_theta"] if self.local else settings["rope_theta"]
        scaling = None if self.local else settings["rope_scaling"]
        frequencies, magnitude = rotary_frequencies(width, theta, scaling)
        matrix = torch.eye(settings["head_dim"], dtype=torch.float64)
        for i, frequency in enumerate(frequencies):
            cosine, sine = math.cos(position * frequency), math.sin(position * frequency)
            j = i + width // 2
            matrix[i, i], matrix[i, j] = magnitude * cosine, -magnitude * sine
            matrix[j, i], matrix[j, j] = magnitude * sine, magnitude * cosine
        return matrix

    def bias(self, i: int, keys: list[int]) -> Tensor | float:
        """(heads, keys): what is added to the scores of place i looking at these places."""
        if self.settings["position_kind"] == "alibi":
            heads = self.settings["num_attention_heads"]
            slopes = [[-alibi_slope(head, heads) * abs(i - j) for j in keys] for head in range(heads)]
            return torch.tensor(slopes, dtype=torch.float64)
        if self.settings["position_kind"] == "relative":
            table = self.weights[self.prefix + "mixer_inputs.relative_bias.weight"]
            buckets = self.settings["relative_attention_num_buckets"]
            longest = self.settings["relative_attention_max_distance"]
            return table[[t5_bucket(j - i, buckets, longest, both_sides=not self.causal) for j in keys]].T
        return 0.0


def rotary_frequencies(width: int, theta: float, scaling: dict[str, Any] | None) -> tuple[list[float], float]:
    """Angle per position of each plane (Su et al. 2021, section 3.2.2), and what queries and keys are multiplied by."""
    kind = None if scaling is None else scaling["rope_type"]
    factor = 1.0 if scaling is None else scaling["factor"]
    if kind == "ntk":  # b' = b * s^(|D| / (|D| - 2)): Peng et al. 2023, equation 16
        theta = theta * factor ** (width / (width - 2))
    frequencies = [theta ** (-2 * i / width) for i in range(width // 2)]
    if kind == "linear":  # positions m become m / s: Chen et al. 2023
        frequencies = [frequency / factor for frequency in frequencies]
    if kind != "yarn":
        return frequencies, 1.0
    assert scaling is not None
    context = scaling["original_max_position_embeddings"]
    fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)

    def plane(turns: float) -> float:
        """The plane i at which context * theta^(-2 i / width) / 2 pi = turns."""
        return width * math.log(context / (2 * math.pi * turns)) / (2 * math.log(theta))

    # Its authors' code takes whole planes, within the head.
    start, stop = max(math.floor(plane(fast)), 0), min(math.ceil(plane(slow)), width - 1)
    mixed = []
    for i, frequency in enumerate(frequencies):
        kept = 1 - min(max((i - start) / ((stop - start) or 0.001), 0.0), 1.0)  # gamma of equation 18
        mixed.append((1 - kept) * frequency / factor + kept * frequency)
    given = scaling.get("attention_factor")
    return mixed, 0.1 * math.log(factor) + 1 if given is None else given


def alibi_slope(head: int, heads: int) -> float:
    """Press et al. 2021, section 3: 2^(-8/n), 2^(-16/n), ...; for n not a power of two as footnote 5's code."""
    power = 1
    while power * 2 <= heads:
        power *= 2
    if head < power:
        return float(2 ** (-8 * (head + 1) / power))
    return float(2 ** (-8 * (2 * (head - power) + 1) / (2 * power)))


def t5_bucket(distance: int, buckets: int, longest: int, *, both_sides: bool) -> int:
    """Raffel et al. 2019, section 2.1: the bucket of a key `distance` places behind (+) or before (-) its query."""
    first = 0
    if both_sides:
        buckets //= 2
        first = buckets if distance > 0 else 0
        away = abs(distance)
    else:
        away = max(-distance, 0)
    single = buckets // 2
    if away < single:
        return first + away
    # The first bucket with its upper border above; borders lie at single * (longest / single)^(n / (buckets - single)).
    more = 0
    while more + 1 < buckets - single and away >= single * (longest / single) ** ((more + 1) / (buckets - single)):
        more += 1
    return first + single + more


def self_attention(settings: Settings, weights: Weights, name: str, states: Tensor, scheme: Scheme) -> Tensor:
    """(L, hidden) -> (L, hidden)."""
    query, key, value = project(settings, weights, name, states, states)
    return attend(settings, weights, name, scheme.turn(query), scheme.turn(key), value, scheme.seen, scheme.bias)


def cross_attention(
    settings: Settings, weights: Weights, name: str, states: Tensor, pieces: list[int], memory: Tensor, of: list[int]
) -> Tensor:
    """(T, hidden) looks at (S, hidden): each piece of the output at the piece of the same number, without positions."""
    query, key, value = project(settings, weights, name + "cross_attn.", states, memory)
    seen = [[mine == theirs != 0 for theirs in of] for mine in pieces]
    seen = [row if any(row) else [True] * len(row) for row in seen]  # padding: any numbers will do
    return attend(settings, weights, name + "cross_attn.", query, key, value, seen, lambda i, keys: 0.0)


def project(
    settings: Settings, weights: Weights, name: str, states: Tensor, looked_at: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (Q, heads, head_dim), keys and values (K, key-value heads, head_dim), normed where asked."""

    def heads(which: str, values: Tensor) -> Tensor:
        values = linear(weights, f"{name}{which}_proj.", values)
        normed = which != "v"
        if normed and settings["qk_norm"] == "full_width":
            values = norm(settings, weights, f"{name}{which}_norm.", values)
        split = torch.stack(values.split(settings["head_dim"], dim=-1), dim=1)
        if normed and settings["qk_norm"] == "per_head":
            split = norm(settings, weights, f"{name}{which}_norm.", split)
        return split

    return heads("q", states), heads("k", looked_at), heads("v", looked_at)


def attend(
    settings: Settings,
    weights: Weights,
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: list[list[bool]],
    bias: Any,
) -> Tensor:
    """Softmax attention (Vaswani et al. 2017, equation 1), each query over the list of keys that it sees."""
    scale = settings["attention_scale"]
    scale = 1 / math.sqrt(settings["head_dim"]) if scale is None else scale
    cap = settings["attention_softcap"]
    heads = settings["num_attention_heads"]
    group = heads // settings["num_key_value_heads"]
    key = torch.stack([key[:, head // group] for head in range(heads)], dim=1)  # (K, heads, head_dim)
    value = torch.stack([value[:, head // group] for head in range(heads)], dim=1)
    rows = []
    for i in range(query.shape[0]):
        keys = [j for j in range(key.shape[0]) if seen[i][j]]
        scores = torch.einsum("hd,khd->hk", query[i], key[keys]) * scale
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        powers = torch.exp(scores + bias(i, keys))
        shares = powers / powers.sum(-1, keepdim=True)
        rows.append(torch.einsum("hk,khd->hd", shares, value[keys]).flatten())
    return linear(weights, name + "o_proj.", torch.stack(rows))


# --- the small parts ---------------------------------------------------------------------------------------------


def slow_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Softmax attention in plain loops: (B, heads, L, D) each, allowed (B, L, L) bool."""
    batch, heads, length, _ = query.shape
    mixed = torch.zeros_like(query)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                seen = [j for j in range(length) if allowed[b, i, j]]
                scores = [float(query[b, h, i] @ key[b, h, j]) * scale for j in seen]
                top = max(scores)
                weights = [math.exp(score - top) for score in scores]
                for weight, j in zip(weights, seen, strict=True):
                    mixed[b, h, i] += weight / sum(weights) * value[b, h, j]
    return mixed


def mlp(settings: Settings, weights: Weights, name: str, states: Tensor) -> Tensor:
    """Plain: W2 f(W1 x). Gated (Shazeer 2020): W2 (f(W x) * V x)."""
    name = name + "mlp."
    inner = linear(weights, name + "up_proj.", states)
    if settings["mlp_kind"] == "gated":
        inner = activation(settings["hidden_act"], linear(weights, name + "gate_proj.", states)) * inner
    else:
        inner = activation(settings["hidden_act"], inner)
    return linear(weights, name + "down_proj.", inner)


def activation(kind: str, x: Tensor) -> Tensor:
    """The activations by their formulas."""
    if kind == "gelu":  # x Phi(x): Hendrycks and Gimpel 2016
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if kind in ("gelu_new", "gelu_pytorch_tanh"):  # their approximation
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    if kind == "silu":
        return x / (1 + torch.exp(-x))
    positive = x * (x > 0)
    return positive * positive if kind == "relu2" else positive


def norm(settings: Settings, weights: Weights, name: str, x: Tensor) -> Tensor:
    """Layer norm (Ba et al. 2016) or RMS norm (Zhang and Sennrich 2019) over the last axis."""
    width = x.shape[-1]
    if settings["norm_kind"] == "layer_norm":
        x = x - (x.sum(-1) / width)[..., None]
    x = x / torch.sqrt((x * x).sum(-1) / width + settings["norm_eps"])[..., None] * weights[name + "weight"]
    return x + weights[name + "bias"] if settings["norm_bias"] else x


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """W x + b, where there is a b."""
    y = torch.einsum("oi,li->lo", weights[name + "weight"], x)
    return y + weights[name + "bias"] if name + "bias" in weights else y


def head(settings: Settings, weights: Weights, states: Tensor) -> Tensor:
    """(L, hidden) -> (L, vocabulary): scale, transform, matrix (the embeddings' own where tied), cap."""
    states = states * settings["output_scale"]
    if settings["head_transform"]:
        states = activation(settings["hidden_act"], linear(weights, "head.dense.", states))
        states = norm(settings, weights, "head.norm.", states)
    tied = "model.encoder.embed_tokens.weight" if settings["kind"] == "seq2seq" else "model.embed_tokens.weight"
    matrix = weights[tied if settings["tie_word_embeddings"] else "lm_head.weight"]
    logits = torch.einsum("vi,li->lv", matrix, states)
    if settings["head_bias"]:
        logits = logits + weights["lm_head.bias"]
    cap = settings["logit_softcap"]
    return logits if cap is None else cap * torch.tanh(logits / cap)
