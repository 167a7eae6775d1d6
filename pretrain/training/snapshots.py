"""What a save holds: weights and optimizer state of one moment, each rank's share of them.

What lives here: which rank writes what, buffers that are kept from save to save, and the copy that training waits for.
What must not: files, or when a run is saved.

Parameters are gathered one at a time; the rank that writes one keeps it, the others let it go. So no rank ever holds
more than its share and one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pretrain.training.engines import Engine
from pretrain.training.optim import state_keys
from pretrain.training.state import OptimizerState, Shape, whole_state

_LIVE = ("single", "ddp")  # engines whose whole tensors are the live ones: gathering takes no memory
_SLAB = 256 << 20  # bytes that are page-locked at a time: a power of two, to which CUDA's allocator rounds up
_ALIGNED = 64


@dataclass(frozen=True)
class Shares:
    """Which rank writes what, the same on every rank.

    Attributes:
        weights: names of the model's tensors, for each rank that writes.
        state: names of the parameters whose optimizer state it writes.
    """

    weights: tuple[frozenset[str], ...]
    state: tuple[frozenset[str], ...]

    @property
    def count(self) -> int:
        """How many ranks write: the first ones."""
        return len(self.weights)


def share_out(
    weights: Mapping[str, int], state: Mapping[str, int], joined: Sequence[Sequence[str]], count: int
) -> Shares:
    """Share tensors out by bytes, the largest first to whoever has least.

    Args:
        weights: bytes of the model's tensors, by name.
        state: bytes of each parameter's optimizer state.
        joined: names that one rank must have together; every name of `weights` once.
        count: ranks that write.
    """
    loads = [0] * count

    def deal(units: Mapping[tuple[str, ...], int]) -> tuple[frozenset[str], ...]:
        names: list[set[str]] = [set() for _ in range(count)]
        for unit in sorted(units, key=lambda unit: (-units[unit], unit)):
            rank = loads.index(min(loads))
            loads[rank] += units[unit]
            names[rank].update(unit)
        return tuple(frozenset(own) for own in names)

    dealt = deal({tuple(sorted(unit)): sum(weights[name] for name in unit) for unit in joined})
    return Shares(dealt, deal({(name,): size for name, size in state.items()}))


@dataclass(frozen=True)
class Snapshot:
    """A rank's share of the weights and the optimizer state of one moment.

    Attributes:
        weights: the model's tensors by name, whole; those of other ranks hold no data.
        optimizer: tensors of this rank's share; groups and names without state are the whole optimizer's.
        shares: of all ranks.
    """

    weights: Mapping[str, Tensor]
    optimizer: OptimizerState
    shares: Shares


@dataclass
class Snapshots:
    """Takes snapshots of an engine, one after another, into buffers that are kept.

    Attributes:
        engine: holds the weights and the optimizer's state.
        above: bytes of weights; a larger model is shared out between the ranks, else the first one has it all.
        joined: names of the model's tensors, together where one rank must write them.
    """

    engine: Engine
    above: int
    joined: Callable[[Collection[str]], Sequence[Sequence[str]]]
    _shares: Shares | None = None
    _names: frozenset[str] | None = None
    _kept: KeptBuffers | None = field(default=None, repr=False)

    def take(self, *, copied: bool) -> Snapshot:
        """Weights and state as they are now. All ranks call it together.

        Args:
            copied: into the kept buffers, so that training may go on at once; else live tensors where the engine has
                whole ones, and others in main memory.
        """
        engine, shares = self.engine, self.shares()
        own_weights, own_state = self._own(shares.weights), self._own(shares.state)
        keep = self._keeper(copied)
        shapes = engine.shapes()
        weights: dict[str, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        stateless: set[str] = set()
        for name in engine.names():
            parameter, state = engine.parameter(name), engine.state(name)
            mine = name in own_weights
            if mine and engine.name in _LIVE and not shapes[name].trained:  # no step changes it: it needs no copy
                weights[name] = parameter
            else:
                weights[name] = keep(name, parameter) if mine else _without_data(shapes[name])
            if not state:
                stateless.add(name)
            if name in own_state:
                tensors |= {f"{name}/{key}": keep(f"{name}/{key}", value) for key, value in state.items()}
            del parameter, state
        for name, buffer in self._buffers().items():
            weights[name] = keep(name, buffer) if name in own_weights else torch.empty_like(buffer, device="meta")
        if copied and engine.device.type == "cuda":
            torch.cuda.current_stream(engine.device).synchronize()
        whole = whole_state(engine.groups(), tensors)
        members = {name for group in whole.groups for name in group["parameters"]}
        optimizer = OptimizerState(whole.tensors, whole.groups, tuple(sorted(stateless & members)))
        return Snapshot(weights, optimizer, shares)

    def shares(self) -> Shares:
        """Which rank writes what; found out once."""
        if self._shares is None:
            shapes = self.engine.shapes()
            weights = {name: shape.nbytes for name, shape in shapes.items()}
            weights |= {name: buffer.nbytes for name, buffer in self._buffers().items()}
            state = state_bytes(self.engine.groups(), shapes)
            world = self.engine.ranks.world
            if world == 1 or sum(weights.values()) <= self.above:
                self._shares = Shares((frozenset(weights),), (frozenset(state),))
            else:
                self._shares = share_out(weights, state, self.joined(weights), world)
        return self._shares

    def _buffers(self) -> dict[str, Tensor]:
        """The buffers that belong to the model's state; which ones is found out once, between two steps."""
        if self._names is None:
            self._names = frozenset(self.engine.bare.state_dict())
        return {name: buffer.detach() for name, buffer in self.engine.bare.named_buffers() if name in self._names}

    def _own(self, shares: Sequence[Collection[str]]) -> Collection[str]:
        rank = self.engine.ranks.rank
        return shares[rank] if rank < len(shares) else ()

    def _keeper(self, copied: bool) -> Callable[[str, Tensor], Tensor]:
        if copied:
            self._kept = self._kept or KeptBuffers(locked=self.engine.device.type == "cuda")
            return self._kept.copy
        if self.engine.name in _LIVE:
            return lambda _, tensor: tensor
        return lambda _, tensor: tensor.to("cpu")


def state_bytes(groups: Sequence[Mapping[str, Any]], shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Bytes of the optimizer's state of each parameter, but for its step, a number."""
    return {
        name: (len(state_keys(dict(group))) - 1) * shapes[name].nbytes
        for group in groups
        for name in group["parameters"]
    }


def _without_data(shape: Shape) -> Tensor:
    return torch.empty(shape.shape, dtype=shape.dtype, device="meta")


class KeptBuffers:
    """Memory for copies of tensors by name: allocated at the first copy of a name, written over at each further one.

    Args:
        locked: page-locked, so that a GPU writes into it while the CPU goes on.
    """

    def __init__(self, *, locked: bool = False) -> None:
        self._locked = locked
        self._buffers: dict[str, Tensor] = {}
        self._slab = torch.empty(0, dtype=torch.uint8)

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of `tensor` in main memory. One from a GPU is there when its stream has got so far."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = self._allocate(tensor)
        return buffer.copy_(tensor.detach(), non_blocking=self._locked)

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _allocate(self, like: Tensor) -> Tensor:
        if not self._locked:
            return torch.empty(like.shape, dtype=like.dtype)
        size = -(-like.nbytes // _ALIGNED) * _ALIGNED
        if size > len(self._slab):
            self._slab = torch.empty(max(size, _SLAB), dtype=torch.uint8, pin_memory=True)
        part, self._slab = self._slab[: like.nbytes], self._slab[size:]
        return part.view(like.dtype).view(like.shape)
