"""Rank 0 of a job of many ranks, of which no other exists: real sharding code on fake tensors and a fake network.

Run as a program (a process group does not leave its process): arguments are JSON, and so is what it prints. What lives
here: one job, and the bytes that its rank holds. What must not: any expectation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pretrain.config_loop import OptimizerConfig
from pretrain.models import loom_config, model_from_config
from pretrain.training.optim import build_optimizer
from tests.planning.live_tensors import LiveTensors


def held(tensors: Iterable[Any]) -> int:
    """Bytes of this rank's parts; parts that share one buffer count once."""
    parts = [tensor.to_local().untyped_storage() for tensor in tensors]
    return sum({part._cdata: part.nbytes() for part in parts}.values())


def run(
    architecture: str, sizes: dict[str, int], *, world: int, shard: int, rows: int, length: int, bf16: bool
) -> dict[str, int]:
    """Two steps of a job as the FSDP2 engine shards it: every block a unit, and the root."""
    distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    shape, names = ((world,), ("shard",)) if shard == world else ((world // shard, shard), ("copies", "shard"))
    mesh = distributed.init_device_mesh("cpu", shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model_from_config(loom_config(architecture, **sizes))
        model.train()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        optimizer = build_optimizer(model, OptimizerConfig(name="adamw", lr=1e-3))
        batch: dict[str, Tensor] = {
            name: torch.zeros(rows, length, dtype=torch.long) for name in ("input_ids", "shift_labels")
        }
        counter = LiveTensors()
        counter.know(model.parameters())
        gradients = 0
        with counter:
            for _ in range(2):
                counter.reset_peak()
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = model(**batch, num_items_in_batch=rows * length).loss
                loss.backward()
                del loss
                gradients = held(parameter.grad for parameter in model.parameters())
                optimizer.step()
                optimizer.zero_grad()
        moments = [tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"]
        masters = held(model.parameters())
        result = {"masters": masters, "gradients": gradients, "optimizer": held(moments), "peak": counter.peak}
    distributed.destroy_process_group()
    return result


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(**json.loads(sys.argv[1]))) + "\n")
