"""Parameters of which a rank holds a part: what part that is, and whole matrices from parts.

What lives here: the layout of a flat buffer (DeepSpeed), shards (DTensor, FSDP2), and a matrix as Muon asks for it,
wherever it lies. What must not: update rules (`optim.py`), and how an engine comes to its parts.

An update rule that works element by element needs nothing of this: it runs on whatever a rank holds. Muon needs whole
matrices, StableAdamW a mean over each parameter. Everything that talks to other ranks is called by all of them in the
same order, which follows from shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor


@dataclass(frozen=True)
class Piece:
    """What a rank's flat buffer holds of one parameter: one run of its elements, or none.

    Attributes:
        name: of the parameter.
        shape: of the whole parameter.
        offset: where the run begins in the flat buffer.
        start: where it begins in the whole parameter, flattened.
        numel: its length; 0 when this rank holds nothing of the parameter.
        shared: whether more than one rank holds a part; the same on every rank.
        cut: elements of each rank's run, padding included, where the parameter is cut evenly over all ranks in order;
            None where it is not.
        transposed: whether the whole is an (in, out) matrix rather than torch's (out, in).
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    start: int
    numel: int
    shared: bool
    cut: int | None = None
    transposed: bool = False

    def of_flat(self, flat: Tensor) -> Tensor:
        """The run in a flat buffer, as a view."""
        return flat.detach().narrow(0, self.offset, self.numel)

    def of_whole(self, whole: Tensor) -> Tensor:
        """The run in a whole tensor, flat; a view where the whole is contiguous."""
        return whole.reshape(-1).narrow(0, self.start, self.numel)


@dataclass(frozen=True)
class Member:
    """A parameter of a group: its name, whole shape, and whether it is an (in, out) matrix."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return math.prod(self.shape)


def sliced_pieces(members: Sequence[Member], offsets: Sequence[int], size: int, rank: int) -> tuple[Piece, ...]:
    """The pieces of a rank when whole parameters lie one after the other in a buffer that is cut evenly (ZeRO-1, 2).

    Args:
        members: in the order of the buffer.
        offsets: where each begins in the uncut buffer.
        size: elements of each rank's cut; the last one ends in padding.
        rank: whose pieces.
    """
    pieces = []
    for member, offset in zip(members, offsets, strict=True):
        low, high = max(offset, rank * size), min(offset + member.numel, (rank + 1) * size)
        held = max(0, high - low)
        shared = offset // size != max(offset, offset + member.numel - 1) // size
        pieces.append(
            Piece(
                member.name,
                member.shape,
                offset=low - rank * size if held else 0,
                start=low - offset if held else 0,
                numel=held,
                shared=shared,
                transposed=member.transposed,
            )
        )
    return tuple(pieces)


def spread_pieces(members: Sequence[Member], rank: int, world: int) -> tuple[Piece, ...]:
    """The pieces of a rank when each parameter is cut evenly over all ranks, the last cuts padded (ZeRO-3)."""
    pieces, offset = [], 0
    for member in members:
        size = -(-member.numel // world)
        start = min(rank * size, member.numel)
        held = min(size, member.numel - start)
        pieces.append(
            Piece(
                member.name,
                member.shape,
                offset=offset,
                start=start,
                numel=held,
                shared=world > 1,
                cut=size,
                transposed=member.transposed,
            )
        )
        offset += size
    return tuple(pieces)


@dataclass(frozen=True)
class FlatLayout:
    """A flat buffer as pieces of parameters.

    Attributes:
        pieces: of every parameter that any rank holds in this buffer; the same names in the same order on each rank.
        group: the ranks that hold the parts; None when it is one.
        device: where they talk; the buffer itself may lie in main memory.
    """

    pieces: tuple[Piece, ...]
    group: Any
    device: torch.device

    def gather(self, piece: Piece, part: Tensor) -> Tensor:
        """The whole tensor of which each rank gives its run, on every rank, bit for bit. All ranks call it.

        Args:
            part: (piece.numel,), fp32.
        """
        assert part.dtype == torch.float32, part.dtype
        if piece.cut is not None and self.group is not None:
            return self._concatenate(piece, piece.cut, part)
        whole = torch.zeros(math.prod(piece.shape), dtype=torch.float32, device=self.device)
        piece.of_whole(whole).copy_(part)
        if self.group is not None:
            # Of each element one rank has the bits and the others zero: integers add up to them, -0.0 and NaN too.
            distributed.all_reduce(whole.view(torch.int32), group=self.group)
        return whole.view(piece.shape)

    def _concatenate(self, piece: Piece, cut: int, part: Tensor) -> Tensor:
        padded = torch.zeros(cut, dtype=torch.float32, device=self.device)
        padded[: piece.numel] = part
        runs = torch.empty(distributed.get_world_size(self.group), cut, dtype=torch.float32, device=self.device)
        distributed.all_gather(list(runs.unbind()), padded, group=self.group)
        return runs.view(-1)[: math.prod(piece.shape)].view(piece.shape)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over the ranks, on the device that they came from."""
        if self.group is None:
            return values
        total = values.to(self.device)
        distributed.all_reduce(total, group=self.group)
        return total.to(values.device)


# --- a matrix, wherever it lies -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """A matrix as Muon sees it; here, one that a rank holds whole.

    Attributes:
        weight, gradient, mean: what this rank holds of the weights, their gradient, and its running mean.
        shape: of the whole.
        transposed: whether it is (in, out).
    """

    weight: Tensor
    gradient: Tensor
    mean: Tensor
    shape: tuple[int, ...]
    transposed: bool

    def whole(self, part: Tensor) -> Tensor | None:
        """The whole of which each rank gives its part; None where this rank has no part. All ranks call it."""
        return part

    def part(self, whole: Tensor) -> Tensor:
        """What this rank holds of a whole matrix, shaped as `weight` is."""
        return whole


@dataclass(frozen=True)
class ShardedMatrix(Matrix):
    """A DTensor's matrix."""

    parameter: DTensor

    def whole(self, part: Tensor) -> Tensor | None:
        return whole_tensor(part, self.parameter)

    def part(self, whole: Tensor) -> Tensor:
        mesh, placements = self.parameter.device_mesh, self.parameter.placements
        return local(distribute_tensor(whole, mesh, placements, src_data_rank=None)).to(self.weight.device)


@dataclass(frozen=True)
class FlatMatrix(Matrix):
    """A matrix that is a piece of flat buffers."""

    layout: FlatLayout
    piece: Piece

    def whole(self, part: Tensor) -> Tensor | None:
        if not self.piece.shared:
            return part.view(self.shape).to(self.layout.device) if self.piece.numel else None
        whole = self.layout.gather(self.piece, part)
        return whole if self.piece.numel else None

    def part(self, whole: Tensor) -> Tensor:
        return self.piece.of_whole(whole).to(self.weight.device)


def matrices_of(
    parameter: Tensor, gradient: Tensor, mean: Tensor, transposed: bool, layout: FlatLayout | None
) -> list[Matrix]:
    """The matrices that an optimizer's parameter stands for: itself, or the pieces of a flat buffer."""
    if layout is not None:
        return [
            FlatMatrix(
                piece.of_flat(parameter),
                piece.of_flat(gradient),
                piece.of_flat(mean),
                piece.shape,
                piece.transposed,
                layout,
                piece,
            )
            for piece in layout.pieces
        ]
    held = (local(parameter), local(gradient), local(mean))
    if isinstance(parameter, DTensor):
        return [ShardedMatrix(*held, tuple(parameter.shape), transposed, parameter)]
    return [Matrix(*held, tuple(parameter.shape), transposed)]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def whole_tensor(part: Tensor, like: DTensor) -> Tensor:
    """A whole tensor from each rank's part of it, cut as `like` is. All ranks call it."""
    mesh = like.device_mesh
    shard = DTensor.from_local(
        part.to(mesh.device_type), mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return shard.full_tensor()


def sum_of_parts(value: Tensor, like: Tensor) -> Tensor:
    """A 0-d value of which each rank has the part that belongs to its part of `like`, summed over the parts."""
    if not isinstance(like, DTensor):
        return value
    mesh = like.device_mesh
    parts: list[Placement] = [Replicate() if placement.is_replicate() else Partial() for placement in like.placements]
    return DTensor.from_local(value.to(mesh.device_type), mesh, parts, run_check=False).full_tensor().to(value.device)
