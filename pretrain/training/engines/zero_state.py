"""Where DeepSpeed keeps weights, masters and optimizer state, and whole tensors by name from there and back.

What lives here: the flat buffers of ZeRO-1, 2 and 3 as pieces of parameters; reading and writing them. What must not:
steps, gradients, configuration.

DeepSpeed flattens the parameters of a group into buffers that the optimizer takes for its parameters. In ZeRO-1 and 2
a group is one buffer, cut evenly over the ranks: a parameter may span the cut. In ZeRO-3 every parameter is cut evenly,
and a group is one buffer or several (sub-groups). The state of the optimizer is flat too, with one `step` a buffer; so
all parameters of a buffer have made the same steps, and what was saved otherwise is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from pretrain.files import ArtifactError
from pretrain.training.sharded_optim import FlatLayout, Member, Piece, sliced_pieces, spread_pieces


@dataclass(frozen=True)
class Buffer:
    """A flat buffer of masters on this rank.

    Attributes:
        flat: the masters; the key of the optimizer's state.
        layout: what it is made of.
        group: index of the optimizer's group.
    """

    flat: Tensor
    layout: FlatLayout
    group: int


@dataclass(frozen=True)
class Place:
    """Where a trained parameter lies."""

    buffer: Buffer
    piece: Piece


class ZeroStore:
    """Weights and optimizer state of a DeepSpeed optimizer, by parameter.

    Args:
        zero: DeepSpeed's ZeRO optimizer.
        stage: 1, 2 or 3.
        names: of all parameters of the model.
        transposed: of each parameter that is an (in, out) matrix.
        device: of this process.
    """

    def __init__(
        self, zero: Any, stage: int, names: Mapping[Any, str], transposed: frozenset[Tensor], device: torch.device
    ) -> None:
        self.zero = zero
        self.stage = stage
        self.names = names
        self.transposed = transposed
        self.device = device
        self.buffers = self._spread() if stage == 3 else self._sliced()
        self.places = {piece.name: Place(buffer, piece) for buffer in self.buffers for piece in buffer.layout.pieces}

    # --- the layout -------------------------------------------------------------------------------------------------

    def _sliced(self) -> list[Buffer]:
        zero, buffers = self.zero, []
        for index, flat in enumerate(zero.single_partition_of_fp32_groups):
            process_group = zero.real_dp_process_group[index]
            pieces = sliced_pieces(
                self._members(zero.round_robin_bit16_groups[index]),
                zero.round_robin_bit16_offsets[index],
                int(zero.partition_size[index]),
                distributed.get_rank(process_group),
            )
            buffers.append(Buffer(flat, self._layout(pieces, process_group), index))
        return buffers

    def _spread(self) -> list[Buffer]:
        zero, buffers = self.zero, []
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
            process_group = zero.sub_group_process_groups[index]
            pieces = spread_pieces(
                self._members(zero.fp16_groups[index]),
                distributed.get_rank(process_group),
                distributed.get_world_size(process_group),
            )
            buffers.append(Buffer(flat, self._layout(pieces, process_group), zero.sub_group_to_group_id[index]))
        return buffers

    def _members(self, parameters: Sequence[nn.Parameter]) -> list[Member]:
        return [Member(self.names[p], whole_shape(p), p in self.transposed) for p in parameters]

    def _layout(self, pieces: tuple[Piece, ...], process_group: Any) -> FlatLayout:
        alone = distributed.get_world_size(process_group) == 1
        return FlatLayout(pieces, None if alone else process_group, self.device)

    # --- out --------------------------------------------------------------------------------------------------------

    def parameter(self, parameter: Tensor) -> Tensor:
        """A whole weight, fp32. All ranks call it together. The working weights of an fp32 model are its masters."""
        if self.stage < 3:
            return parameter.detach()
        gathered = importlib.import_module("deepspeed.runtime.zero").GatheredParameters
        with gathered([parameter], modifier_rank=None):
            return parameter.detach().clone()

    def state(self, name: str, state: Mapping[Tensor, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The whole optimizer state of a parameter; empty when there is none. All ranks call it together."""
        place = self.places.get(name)
        if place is None:
            return {}
        flat_state = state.get(place.buffer.flat, {})
        layout, piece = place.buffer.layout, place.piece
        return {
            key: flat_state[key] if key == "step" else layout.gather(piece, piece.of_flat(flat_state[key]))
            for key in sorted(flat_state)
        }

    # --- in ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_weights(self, wanted: Mapping[str, Tensor]) -> None:
        """Take up whole weights: the working weights, and the masters of those that are trained."""
        if self.stage == 3:
            self.zero._partition_all_parameters()
        for parameter, name in self.names.items():
            whole = wanted[name]
            if self.stage < 3:
                parameter.copy_(whole)
            else:
                self._write_partition(parameter, whole)
            place = self.places.get(name)
            if place is not None:
                place.piece.of_flat(place.buffer.flat).copy_(place.piece.of_whole(whole))
        if self.stage == 3 and self.zero.persistent_parameters:  # small ones stay whole on every rank
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def _write_partition(self, parameter: Any, whole: Tensor) -> None:
        process_group = getattr(parameter, "ds_process_group", None)
        rank, world = distributed.get_rank(process_group), distributed.get_world_size(process_group)
        (piece,) = spread_pieces([Member("", whole_shape(parameter))], rank, world)
        parameter.ds_tensor.data.narrow(0, 0, piece.numel).copy_(piece.of_whole(whole))

    def fit(self, wanted: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Refuse state that a flat buffer cannot hold.

        Raises:
            ArtifactError: when parameters of a buffer have made different numbers of steps; names two of them.
        """
        for buffer in self.buffers:
            steps = {piece.name: _steps(wanted[piece.name]) for piece in buffer.layout.pieces}
            first = next(iter(steps))
            for name, count in steps.items():
                if count != steps[first]:
                    raise ArtifactError(
                        f"the saved optimizer state has {steps[first]} updates of `{first}` and {count} of `{name}`; "
                        "ZeRO updates them together: go on with train.strategy ddp or fsdp2"
                    )

    @torch.no_grad()
    def load_optimizer(
        self,
        optimizer: torch.optim.Optimizer,
        wanted: Mapping[str, Mapping[str, Tensor]],
        put: Callable[[Mapping[str, Any], Tensor, Mapping[str, Tensor]], None],
    ) -> None:
        """Replace the optimizer's state.

        Args:
            optimizer: the one inside DeepSpeed's.
            wanted: whole tensors by key, by parameter; as `fit` lets them through.
            put: gives a parameter of a group its tensors.
        """
        optimizer.state.clear()
        for buffer in self.buffers:
            tensors: dict[str, Tensor] = {}
            for piece in buffer.layout.pieces:
                for key, whole in wanted[piece.name].items():
                    if key == "step":
                        tensors[key] = whole
                    else:
                        flat = tensors.setdefault(key, torch.zeros_like(buffer.flat, requires_grad=False))
                        piece.of_flat(flat).copy_(piece.of_whole(whole))
            if tensors:
                put(optimizer.param_groups[buffer.group], buffer.flat, tensors)
        self.relink()

    def relink(self) -> None:
        """Let DeepSpeed look for the state anew at the next step."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a whole parameter, which ZeRO-3 may hold in parts."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _steps(tensors: Mapping[str, Tensor]) -> int:
    return int(tensors["step"]) if tensors else 0
