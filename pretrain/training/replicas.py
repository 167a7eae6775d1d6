"""Do the copies of the weights still agree? A hash of what every rank holds, compared every so often.

What lives here: the hash of a tensor's bits, and who differs from whom. What must not: what a rank holds (the engine
says it), and when it is compared (the loop says it).

Ranks that hold the same part of weights and optimizer state compute the same updates, bit for bit, from a gradient that
was summed over all of them. When they differ, a processor, memory, a link or a kernel has computed something else, and
no later step heals it: the gradients go on being summed over models that are no longer one.

The hash is a sum of the tensor's bits, taken as integers, each times an odd number that belongs to its place, modulo
2^64: one pass on the device, any single change is found, and two that cancel are as rare as a collision. It is no
defence against somebody who means harm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.training.engines import Engine

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 22}  # elements at once: a CPU's cache, a bound on a GPU's memory
# Odd and negative, so that they fit int64: 2^64 over the golden ratio, and a multiplier of MurmurHash3's finalizer.
_GOLDEN, _MURMUR = -7046029254386353131, -49064778989728563


class ReplicasDifferError(ValueError):
    """Copies of the weights or of the optimizer's state are no longer the same; names step, ranks and the tensor."""


class Replicas:
    """Compares what the ranks hold.

    Args:
        every: steps between two comparisons; None: there are none.
        engine: says what this rank holds, and of which part that is.
        hosts: of each rank.
    """

    def __init__(self, every: int | None, engine: Engine, hosts: Sequence[str]) -> None:
        self._every = every
        self._engine = engine
        self._hosts = hosts
        self.begin()
        self._places: dict[torch.device, Tensor] = {}

    def begin(self) -> None:
        """The run begins, or goes on from a checkpoint."""
        self._alike_at: int | None = None

    @property
    def wanted(self) -> bool:
        """Whether copies are compared at all."""
        return self._every is not None

    def due(self, step: int) -> bool:
        """Whether they are compared after this step."""
        return self._every is not None and step % self._every == 0

    def check(self, step: int, next_call: Callable[[], str]) -> None:
        """Compare all copies, unless it was done after this step. All ranks call it together.

        Args:
            step: that was made last.
            next_call: a sentence that says from where the next call goes on.

        Raises:
            ReplicasDifferError: on every rank, when two that hold the same part differ.
        """
        if step == self._alike_at:
            return
        hashes = self._hashes()
        # One number a rank at first; which tensor differs is asked when one does.
        combined = _wrapped(sum(value * (2 * place + 1) for place, value in enumerate(hashes.values())))
        found = self._engine.ranks.gather([self._engine.part, combined])
        odd, undecided = _differing(found)
        if not odd and not undecided:
            self._alike_at = step
            return
        everything: list[Mapping[str, int]] = self._engine.ranks.gather(hashes)
        since = "when this call began" if self._alike_at is None else f"after step {self._alike_at}"
        raise ReplicasDifferError(
            f"step {step}: {_told(odd, undecided, self._hosts)}; `{_first_difference(found, everything)}` is the first "
            f"tensor that differs. They were the same {since}. {next_call()} When it comes again, a processor, its "
            "memory or a link is at fault: test that machine, or leave it out"
        )

    def _hashes(self) -> dict[str, int]:
        """The hash of each tensor that this rank holds, by name; one wait for each device."""
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, tensor in self._engine.held():
                by_device.setdefault(tensor.device, {})[name] = self._hash(tensor)
        hashes: dict[str, int] = {}
        for values in by_device.values():
            hashes |= dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
        return dict(sorted(hashes.items()))

    def _hash(self, tensor: Tensor) -> Tensor:
        """0-d int64 on the tensor's device."""
        size = _CHUNK.get(tensor.device.type, 1 << 20)
        if tensor.device not in self._places:
            self._places[tensor.device] = _place_numbers(size, tensor.device)
        places = self._places[tensor.device]
        bits: Any = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=tensor.device)
        for chunk in bits.split(size):
            # The integers are widened first: their products keep what 32 bits would lose.
            total = total * _GOLDEN + (chunk.to(torch.int64) * places[: chunk.numel()]).sum()
        return total


def _place_numbers(count: int, device: torch.device) -> Tensor:
    """(count,) int64: odd numbers without a pattern, one for each place."""
    numbers = torch.arange(1, count + 1, device=device) * _GOLDEN
    numbers ^= numbers >> 29
    numbers *= _MURMUR
    numbers ^= numbers >> 32
    return numbers | 1


def _wrapped(number: int) -> int:
    """Modulo 2^64, as the hashes themselves: a change of the highest bit alone stays."""
    return number % (1 << 64)


def _differing(found: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Ranks that differ from the majority of their part, and ranks of parts that have no majority.

    Args:
        found: by rank, the part that it holds, and its hash.
    """
    odd: list[int] = []
    undecided: list[int] = []
    for part in sorted({part for part, _ in found}):
        members = [rank for rank, (of, _) in enumerate(found) if of == part]
        (winner, votes), *others = Counter(found[rank][1] for rank in members).most_common()
        if not others:
            continue
        if 2 * votes > len(members):
            odd += [rank for rank in members if found[rank][1] != winner]
        else:
            undecided += members
    return sorted(odd), sorted(undecided)


def _told(odd: Sequence[int], undecided: Sequence[int], hosts: Sequence[str]) -> str:
    def names(ranks: Sequence[int]) -> str:
        return ", ".join(f"{rank} ({hosts[rank]})" for rank in ranks)

    told = []
    if odd:
        told.append(
            f"rank{'s' if len(odd) > 1 else ''} {names(odd)} no longer hold{'s' if len(odd) == 1 else ''} the same as "
            "the other ranks"
        )
    if undecided:
        told.append(
            f"ranks {names(undecided)} no longer hold the same, and it cannot be told which of them is right: "
            "there is no majority"
        )
    return "; ".join(told)


def _first_difference(found: Sequence[Sequence[int]], hashes: Sequence[Mapping[str, int]]) -> str:
    """The first tensor by name of which two ranks with the same part hold different bits."""
    firsts: dict[int, Mapping[str, int]] = {}
    names: list[str] = []
    for (part, _), own in zip(found, hashes, strict=True):
        first: Mapping[str, Any] = firsts.setdefault(part, own)
        names += [name for name in sorted({*first, *own}) if first.get(name) != own.get(name)][:1]
    return min(names)
