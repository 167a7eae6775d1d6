"""The engine that shards parameters, gradients and optimizer state over the ranks: PyTorch's fully_shard (FSDP2).

What lives here: what is a unit of sharding, and whole tensors from shards and back. What must not: DeepSpeed.

Each layer of the model's stack is a unit, gathered for its forward and backward pass and freed after; what is outside
the stack (embeddings, final norm, head) is the root's and stays whole through a step: tied weights and the fused head
read it outside of any module's forward. Parameters, reductions and results are fp32, and the arithmetic is autocast's,
so that precision means what it means on one process; the price is that parameters travel as 4 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pretrain.training.engines.base import Engine, with_autocast


class Fsdp2Engine(Engine):
    """Every rank holds a part of each parameter, cut along its first axis; hybrid: each group of ranks a whole copy."""

    def _prepare(self) -> Any:
        model: Any = self.bare
        model.forward = with_autocast(model.forward, self.device, self.accelerator.mixed_precision)
        offload = self.config.offload == "all"
        settings: dict[str, Any] = {
            "mesh": self._mesh(),
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
            "offload_policy": CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if offload else OffloadPolicy(),
        }
        names = {parameter: name for name, parameter in model.named_parameters()}
        for layer in _layers(model):
            fully_shard(layer, reshard_after_forward=True, **settings)
        fully_shard(model, reshard_after_forward=False, **settings)
        sharded = dict(model.named_parameters())
        for group in self.optimizer.param_groups:
            group["params"] = [sharded[names[parameter]] for parameter in group["params"]]
        self._stepper = self.accelerator.prepare_optimizer(self.optimizer)
        return model

    def _mesh(self) -> DeviceMesh:
        """All ranks in one axis; with hybrid sharding (copies, parts of a copy)."""
        world, size = self.ranks.world, self.config.shard_size or self.ranks.world
        if size == world:
            return init_device_mesh(self.device.type, (world,), mesh_dim_names=("part",))
        return init_device_mesh(self.device.type, (world // size, size), mesh_dim_names=("copy", "part"))

    def backward(self, loss: Callable[[], Tensor], *, last: bool) -> Tensor:
        """Each micro-batch's gradient is reduced at once, so that no rank ever holds a whole one."""
        value = loss()
        self.accelerator.backward(value * self.ranks.world)
        return value.detach()

    def evaluated(self) -> None:
        """Free the root's parameters: without a backward pass nothing does, and each rank would in its own time."""
        self.bare.reshard()  # type: ignore[operator]

    def checks(self) -> list[tuple[str, Any, Any]]:
        """That every parameter is sharded, over as many ranks as were asked for."""
        sharded = [parameter for parameter in self._parameters.values() if isinstance(parameter, DTensor)]
        parts = {parameter.device_mesh.size(-1) for parameter in sharded}
        return [
            *super().checks(),
            ("sharded parameters", len(self._parameters), len(sharded)),
            ("ranks that share a copy", {self.config.shard_size or self.ranks.world}, parts),
        ]

    @property
    def part(self) -> int:
        sharded: Any = next(iter(self._parameters.values()))
        part: int = sharded.device_mesh.get_local_rank("part")
        return part

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _write(self, parameter: Tensor, whole: Tensor) -> None:
        assert isinstance(parameter, DTensor)
        with torch.no_grad():
            parameter.to_local().copy_(_cut(whole, parameter).to_local())

    def _part(self, parameter: Tensor, key: str, whole: Tensor) -> Tensor:
        return whole if key == "step" else _cut(whole, parameter)


def _cut(whole: Tensor, like: Any) -> DTensor:
    """This rank's part of a tensor that every rank has, split as `like` is."""
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the model's stacks: what lies in its module lists, outermost first."""
    stacks = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [path for path in stacks if not any(path.startswith(f"{other}.") for other in stacks)]
    return [layer for path in outer for layer in model.get_submodule(path).children()]
