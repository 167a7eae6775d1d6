"""Dropout whose masks are a pure function of (row, site, position, channel).

What lives here: the hash from keys to masks, and which models use it. What must not: a random generator, or where keys
come from.

A generator's draws depend on all that was drawn before: on how a batch is split, and on what else ran. Here each row
brings a key, each place in the model that drops out has a number (its site), and whether an element stays is a hash of
the key, the site, and the element's place in the row. So the masks of a row are the same, bit for bit, in any split of
a batch over micro-batches and processes, under gradient checkpointing, autocast and `torch.compile`, on any device.

The hash is in 32-bit words. Small tensors hold them as int64 without overflow: what overflows is undefined in the C++
that torch.compile writes, and one such product of a loop's index was seen to break the loop.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .configuration_loom import LoomConfig

EMBEDDING_SITE = 0
"""The site of the embeddings; the branches of the blocks follow (`branch_sites`)."""
DECODER_SITES, CROSS_SITES = 1 << 16, 1 << 17
"""Where the sites of an encoder-decoder's decoder begin, and those of its looks at the encoder."""
CLASSIFIER_SITE, SAMPLING_SITE = 1 << 18, 1 << 19
"""The site before a classifier's linear layer, and that of tokens that a generator draws."""

_WORD = 2**32 - 1
_SIGN = 2**31
# A mixer of little bias, found by search (Wellons 2018, "Prospecting for hash functions"): shifts 16, 15, 16 and these
# factors. The second is 0x846CA68B less 2^32: the same product modulo 2^32, and one that no int64 overflows with.
_FACTOR_1, _FACTOR_2 = 0x7FEB352D, 0x846CA68B - 2**32
# The golden ratio, and the square root of 2, in 32 bits; odd, so that their multiples are distinct.
_SITES, _STEPS = 0x9E3779B9 - 2**32, 0x6A09E667


def branch_sites(layer: int) -> tuple[int, int]:
    """The sites of a block's attention and MLP branches."""
    return 2 * layer + 1, 2 * layer + 2


def wants_dropout_keys(config: LoomConfig) -> bool:
    """Whether a model draws by the keys of its rows while it trains: what drops out, or what its generator puts in."""
    has_generator = getattr(config, "generator_size", None) is not None
    return config.hidden_dropout > 0.0 or config.embedding_dropout > 0.0 or has_generator


def dropout(states: Tensor, probability: float, keys: Tensor | None, site: int) -> Tensor:
    """`functional.dropout` of (B, L, hidden) with masks from the keys (B,), int64; without keys, from the generator.

    An element stays with a probability that differs from 1 - `probability` by less than 2^-32, and is scaled by
    1 / (1 - `probability`).

    Raises:
        ValueError: when there is not one key a row.
    """
    if keys is None:
        return functional.dropout(states, p=probability)
    if keys.shape != states.shape[:1] or keys.dtype != torch.int64:
        raise ValueError(
            f"dropout_keys: {keys.dtype} of shape {tuple(keys.shape)} for {states.shape[0]} rows; give one int64 a row"
        )
    stays = keyed_mask(keys, site, probability, states.shape[1], states.shape[2])
    return torch.where(stays, states, 0.0).mul_(1.0 / (1.0 - probability))


@torch.no_grad()
def keyed_mask(keys: Tensor, site: int, probability: float, length: int, channels: int) -> Tensor:
    """Which elements stay: (B, L, channels) bool of the keys (B,), int64."""
    first, second = _position_words(keys, site, length)
    limit = min(round(probability * 2**32), _WORD) - _SIGN
    mask = _mask_traced if torch.compiler.is_compiling() else _mask_eager
    return mask(first, second, limit, channels)


@torch.no_grad()
def place_words(keys: Tensor, site: int, length: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """The two words of places (N,), counted over the rows of (B, L), at a site: (N, 1) each, for `keyed_uniform`."""
    first, second = _position_words(keys, site, length)
    return first.reshape(-1, 1)[places], second.reshape(-1, 1)[places]


@torch.no_grad()
@torch.compiler.disable  # type: ignore[untyped-decorator]
def keyed_uniform(words: tuple[Tensor, Tensor], channels: int) -> Tensor:
    """A number in (0, 1] for each channel of the places of `place_words`: (N, channels) float32, exact near 0."""
    values = _channel_words(*words, channels).bitwise_and_(_SIGN - 1)
    return values.to(torch.float32).add_(0.5).mul_(1.0 / _SIGN)


def _position_words(keys: Tensor, site: int, length: int) -> tuple[Tensor, Tensor]:
    """Two random words in [0, 2^32) for each position of each row at a site: (B, L, 1) int64 each."""
    words = torch.stack((keys & _WORD, (keys >> 32) & _WORD))  # (2, B)
    words = _mix(words + (site + 1) * _SITES)
    words = _mix(words + 2 * words.flip(0))  # each of both; an invertible map of the pair
    steps = torch.arange(length, device=keys.device) * _STEPS  # (L,)
    first, second = _mix(words[..., None] + steps)[..., None].unbind(0)
    return first, second


def _mix(words: Tensor) -> Tensor:
    """Scramble integers modulo 2^32, to [0, 2^32)."""
    words = words & _WORD
    words = words ^ (words >> 16)
    words = (words * _FACTOR_1) & _WORD
    words = words ^ (words >> 15)
    words = (words * _FACTOR_2) & _WORD
    return words ^ (words >> 16)


def _mask_eager(first: Tensor, second: Tensor, limit: int, channels: int) -> Tensor:
    """For each channel a hash of the channel with both words of the position, against the limit."""
    return _channel_words(first, second, channels) >= limit


def _channel_words(first: Tensor, second: Tensor, channels: int) -> Tensor:
    """A word in [-2^31, 2^31) for each channel of positions (..., 1): (..., channels) int32.

    In int32, which wraps around, and in two buffers: at this size fresh memory costs more than the arithmetic.
    """
    first, second = ((words ^ _SIGN).sub_(_SIGN).to(torch.int32) for words in (first, second))
    values = first + torch.arange(channels, dtype=torch.int32, device=first.device) * _SITES  # (..., channels)
    scratch = torch.bitwise_right_shift(values, 16).bitwise_and_(0xFFFF)  # the shift keeps the sign
    values.bitwise_xor_(scratch)
    torch.add(second, values, alpha=_FACTOR_1, out=values)
    torch.bitwise_right_shift(values, 15, out=scratch)
    values.bitwise_xor_(scratch.bitwise_and_(0x1FFFF))
    torch.add(first, values, alpha=_FACTOR_2, out=values)
    return values


def _mask_traced(first: Tensor, second: Tensor, limit: int, channels: int) -> Tensor:
    """The same bits in int64 without overflow, for a compiler that keeps them in registers."""
    values = (first + torch.arange(channels, device=first.device) * _SITES) & _WORD
    values = values ^ (values >> 16)
    values = (values * _FACTOR_1 + second) & _WORD
    values = values ^ (values >> 15)
    values = (values * _FACTOR_2 + first + _SIGN) & _WORD  # above 2^31: as the sign orders them
    return values >= limit + _SIGN
