"""Where a token stands, in every scheme: tables of numbers, angles and distances. Functions of positions alone.

Lives here: positions of packed rows, sinusoids, rotary angles with their scalings, ALiBi's slopes, T5's buckets. What
must not: parameters, or attention.
"""

import math
from typing import Any

import torch
from torch import Tensor

RotaryTables = tuple[Tensor, Tensor]


def document_positions(document_ids: Tensor) -> Tensor:
    """Positions that restart with each piece: (B, L) document ids, 0 = padding -> (B, L) int64, padding 0."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand(document_ids.shape)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    first = torch.where(starts, index, 0).cummax(dim=1).values
    return (index - first).masked_fill(document_ids == 0, 0)


def sinusoids(position_ids: Tensor, width: int, layout: str) -> Tensor:
    """(B, L) positions -> (B, L, width) float64 sines and cosines (Vaswani et al. 2017, section 3.5).

    Channel pair i holds sin and cos of position / 10000^(2 i / width). `interleaved` puts the two side by side, as the
    paper writes them; `halves` puts all sines first, as its authors' code does: the same model with its channels in
    another order.
    """
    exponents = torch.arange(0, width, 2, device=position_ids.device, dtype=torch.float64) / width
    angles = position_ids[..., None].double() / 10_000.0**exponents  # (B, L, width / 2)
    if layout == "interleaved":
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def rotary_tables(
    position_ids: Tensor,
    width: int,
    theta: float,
    scaling: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> RotaryTables:
    """Cosines and sines of the rotary angles: (B, L) positions -> two (B, L, 1, width / 2) tensors of `dtype`.

    Su et al. 2021 (arXiv 2104.09864), in the form where channel i turns with channel i + width / 2; `width` channels
    of each head turn. Computed from the config at each forward: a stored table would be a buffer, which loading leaves
    uninitialised. `scaling` is the config's `rope_scaling`.
    """
    exponents = torch.arange(0, width, 2, device=position_ids.device, dtype=dtype) / width
    frequencies = 1.0 / theta**exponents
    magnitude = 1.0
    if scaling is not None and scaling["rope_type"] == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling is not None and scaling["rope_type"] == "yarn":
        frequencies = _yarn(frequencies, width, theta, scaling)
        magnitude = yarn_magnitude(scaling)
    angles = position_ids[..., None].to(dtype) * frequencies
    return angles.cos().mul_(magnitude).unsqueeze(2), angles.sin().mul_(magnitude).unsqueeze(2)


def yarn_magnitude(scaling: dict[str, Any]) -> float:
    """What YaRN multiplies cosines and sines by, and so queries and keys: sqrt(1 / t) of its equation 22."""
    given = scaling.get("attention_factor")
    return float(given) if given is not None else 0.1 * math.log(scaling["factor"]) + 1.0


def _yarn(frequencies: Tensor, width: int, theta: float, scaling: dict[str, Any]) -> Tensor:
    """Slow frequencies divided by the factor, fast ones kept, a ramp between (Peng et al. 2023, arXiv 2309.00071).

    The ramp runs over channels from the one that turns `beta_fast` times (32) within the original context to the one
    that turns `beta_slow` times (1). Where the second comes before the first (a context of a few tokens) every
    frequency is kept, as in its authors' code and transformers.
    """
    original = scaling["original_max_position_embeddings"]

    def channel_that_turns(times: float) -> float:
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(channel_that_turns(scaling.get("beta_fast", 32))), 0)
    last = min(math.ceil(channel_that_turns(scaling.get("beta_slow", 1))), width - 1)
    channels = torch.arange(width // 2, device=frequencies.device, dtype=frequencies.dtype)
    ramp = ((channels - first) / ((last - first) or 0.001)).clamp(0, 1)
    return torch.lerp(frequencies, frequencies / scaling["factor"], ramp)


def alibi_slopes(heads: int) -> list[float]:
    """The slope of each head: 2^(-8 i / n) for n a power of two (Press et al. 2021, arXiv 2108.12409, section 3).

    For other counts, the slopes of the power of two below, then every other one of the power above, as in its code.
    """

    def of_power(count: int) -> list[float]:
        return [float(2.0 ** (-8.0 * index / count)) for index in range(1, count + 1)]

    below = 2 ** math.floor(math.log2(heads))
    more = of_power(2 * below)[0::2][: heads - below]
    return of_power(below) + more


def relative_buckets(distances: Tensor, *, both_sides: bool, num_buckets: int, max_distance: int) -> Tensor:
    """T5's bucket of each key position minus query position, int64 (Raffel et al. 2019, section 2.1).

    Half of the buckets hold single distances, the others grow logarithmically up to `max_distance`, and the last holds
    all beyond. With `both_sides`, keys behind the query have the second half of all buckets; without, they count as
    distance 0.
    """
    offset = torch.zeros_like(distances)
    if both_sides:
        num_buckets //= 2
        offset = (distances > 0).to(torch.int64) * num_buckets
        distances = distances.abs()
    else:
        distances = (-distances).clamp(min=0)
    single = num_buckets // 2
    share = torch.log(distances.clamp(min=1).float() / single) / math.log(max_distance / single)
    wide = (single + (share * (num_buckets - single)).to(torch.int64)).clamp(max=num_buckets - 1)
    buckets: Tensor = offset + torch.where(distances < single, distances, wide)
    return buckets
