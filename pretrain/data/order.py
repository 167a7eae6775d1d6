"""The order of rows, and every random draw: pure functions of small integers, with nothing to carry along.

What lives here: a permutation with O(1) access, and one hash from counters to bits. What must not: data.

The stream of samples has no end: sample g is row pi(seed, epoch)(g mod N) of epoch g div N. Batch s is the samples
[s B, (s + 1) B), across the ends of epochs.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_ROUNDS = 6
_STRETCH = 4096  # samples whose rows are worked out together: for one alone the calls cost more than the work
_BLOCK_POSITIONS = 1 << 15  # positions that are hashed at a time: their 64-bit temporaries stay in a core's cache
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S32 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(32)


def mix(values: U64) -> U64:
    """Scramble 64-bit integers in place: the finalizer of SplitMix64 (Steele, Lea, Flood 2014). Returns `values`."""
    scratch = values >> _S30
    values ^= scratch
    values *= _MIX_1
    np.right_shift(values, _S27, out=scratch)
    values ^= scratch
    values *= _MIX_2
    np.right_shift(values, _S31, out=scratch)
    values ^= scratch
    return values


def hash_counters(*counters: int | npt.NDArray[np.integer]) -> U64:
    """One 64-bit hash of several counters, broadcast against each other; at least one dimension comes back."""
    state = np.zeros(1, dtype=np.uint64)
    for number, counter in enumerate(counters):
        state = _absorb(state, counter, number)
    return state


def _absorb(state: U64, counter: int | npt.NDArray[np.integer], number: int) -> U64:
    """The hash of one counter more, when `state` is that of the `number` counters before it."""
    part = np.atleast_1d(np.asarray(counter)).astype(np.uint64)
    return mix((state ^ part) + np.uint64(int(_GOLDEN) * (number + 1) % 2**64))


def permute(indices: IntArray, size: int, seed: int, epochs: int | IntArray) -> IntArray:
    """Where a random permutation of range(size) sends each index; another permutation for each (seed, epoch).

    A Feistel network over the smallest power of two that holds `size`, walked along its cycle until the value is
    below `size` (Black and Rogaway 2002): fewer than two walks on average, whatever the size.
    """
    bits = max(2, int(size - 1).bit_length())
    wide, narrow = (bits + 1) // 2, bits // 2
    epochs = np.broadcast_to(np.asarray(epochs, dtype=np.int64), indices.shape)
    keys = [hash_counters(seed, epochs, number) for number in range(_ROUNDS)]
    values = indices.astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        values[walking] = _feistel(values[walking], [key[walking] for key in keys], wide, narrow)
        walking = walking[values[walking] >= np.uint64(size)]
    return values.astype(np.int64)


def _feistel(values: U64, keys: list[U64], wide: int, narrow: int) -> U64:
    """Six rounds; the halves of `wide` and `narrow` bits change places after each."""
    left_bits, right_bits = wide, narrow
    left = values >> np.uint64(right_bits)
    right = values & np.uint64((1 << right_bits) - 1)
    for key in keys:
        scrambled = mix(right + key) & np.uint64((1 << left_bits) - 1)
        left, right = right, left ^ scrambled
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def source_seed(seed: int, name: str) -> int:
    """The seed of a named source, so that its order and draws do not depend on the sources beside it."""
    return int(hash_counters(seed, zlib.crc32(name.encode()))[0] >> np.uint64(1)) if name else seed


def rows_of_samples(samples: IntArray, num_rows: int, seed: int) -> tuple[IntArray, IntArray]:
    """(epochs, rows) of samples of the endless stream, each (S,)."""
    if len(samples):
        stretch = int(samples[0]) // _STRETCH
        if stretch * _STRETCH <= samples.min() and samples.max() < (stretch + 1) * _STRETCH:
            epochs, rows = _rows_of_stretch(stretch, num_rows, seed)
            places = samples - stretch * _STRETCH
            return epochs[places], rows[places]
    return _rows_of(samples, num_rows, seed)


@lru_cache(maxsize=256)  # a few for each source of a mixture; 64 KiB each
def _rows_of_stretch(stretch: int, num_rows: int, seed: int) -> tuple[IntArray, IntArray]:
    return _rows_of(np.arange(stretch * _STRETCH, (stretch + 1) * _STRETCH, dtype=np.int64), num_rows, seed)


def _rows_of(samples: IntArray, num_rows: int, seed: int) -> tuple[IntArray, IntArray]:
    epochs, indices = np.divmod(samples, num_rows)
    return epochs, permute(indices, num_rows, seed, epochs)


@dataclass(frozen=True)
class Draws:
    """Random bits for a batch of rows: each a hash of (seed, epoch, row, position, purpose) and of nothing else.

    So a draw does not depend on how rows are split over batches, workers or processes. `epochs` and `rows` are (B,),
    and so is `seed` where rows of several sources meet.
    """

    seed: int | IntArray
    epochs: IntArray
    rows: IntArray
    sequence_length: int

    def bits(self, purpose: str) -> U64:
        """64 random bits for each position: (B, L)."""
        return mix(self._keys(purpose)[:, None] + self._steps)

    def over(self, sequence_length: int) -> Draws:
        """The draws of the same rows where they have another number of positions; those that both have are equal."""
        return replace(self, sequence_length=sequence_length)

    def of(self, places: IntArray) -> Draws:
        """The draws of some of the rows."""
        seed = self.seed if isinstance(self.seed, int) else self.seed[places]
        return Draws(seed, self.epochs[places], self.rows[places], self.sequence_length)

    def below(self, purpose: str, share: float | FloatArray) -> npt.NDArray[np.bool_]:
        """`below(bits(purpose), share)`, (B, L), without holding the bits of all rows at once; `share` may be (B,)."""
        keys = self._keys(purpose)[:, None]
        out = np.empty((len(keys), self.sequence_length), dtype=np.bool_)
        rows = max(1, _BLOCK_POSITIONS // self.sequence_length)
        for start in range(0, len(keys), rows):
            part = share if isinstance(share, float | int) else share[start : start + rows, None]
            out[start : start + rows] = below(mix(keys[start : start + rows] + self._steps), part)
        return out

    def bits_at(self, purpose: str, places: IntArray) -> U64:
        """The same bits, at flat places b * L + t alone: (places,)."""
        batch_rows = places // self.sequence_length
        positions = places - batch_rows * self.sequence_length
        return mix(self._keys(purpose)[batch_rows] + self._steps[positions])

    def row_keys(self, purpose: str) -> IntArray:
        """64 random bits for each row, as signed integers: (B,)."""
        return self._keys(purpose).view(np.int64)

    def _keys(self, purpose: str) -> U64:
        """`hash_counters(seed, epochs, rows, purpose)`, (B,)."""
        return _absorb(self._row_keys, zlib.crc32(purpose.encode()), 3)

    @cached_property
    def _row_keys(self) -> U64:
        return hash_counters(self.seed, self.epochs, self.rows)

    @cached_property
    def _steps(self) -> U64:
        return np.arange(self.sequence_length, dtype=np.uint64) * _GOLDEN


def below(bits: U64, share: float | FloatArray) -> npt.NDArray[np.bool_]:
    """True with probability `share`: where the bits, as a fraction of 2^64, are below it. Those of an array are < 1."""
    if isinstance(share, np.ndarray):
        return bits < (share * 2.0**64).astype(np.uint64)
    if share >= 1.0:
        return np.ones(bits.shape, dtype=np.bool_)
    return bits < np.uint64(int(share * 2**64))


def integers(bits: U64, limit: int) -> IntArray:
    """Uniform integers in [0, limit), limit up to 2^32: the high 32 bits, scaled (bias below limit / 2^32)."""
    return (((bits >> _S32) * np.uint64(limit)) >> _S32).astype(np.int64)
