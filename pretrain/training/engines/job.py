"""Opening a job: the processes, the device and the Accelerator of a run, for every strategy.

What lives here: how Accelerate is told what a run wants, on a GPU and on a CPU alike. What must not: the model.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)

from pretrain.config_loop import LoopConfig
from pretrain.ranks import Ranks
from pretrain.runtime import MIXED, Precision, resolve_precision
from pretrain.strategy import Launch, Strategy, read_launch, resolve_strategy

_OF_DEEPSPEED = "ACCELERATE_DEEPSPEED_"  # compared by its own door
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Job:
    """The processes of a run and what they run on.

    Attributes:
        strategy: as it was resolved.
        accelerator: Accelerate's object, made for the strategy.
        ranks: the processes.
        precision: of the arithmetic.
    """

    strategy: Strategy
    accelerator: Accelerator
    ranks: Ranks
    precision: Precision

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device


def open_job(config: LoopConfig) -> Job:
    """Join the processes that were launched, and make the Accelerator of the run's strategy.

    Raises:
        ValueError: when what was asked for, what was launched and what Accelerate made of it differ; names the remedy.
    """
    train, launch = config.train, read_launch(os.environ)
    strategy = resolve_strategy(config, launch)
    cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    _refuse_crowding(cpu=cpu)
    wanted = launch.precision if train.precision == "auto" and launch.precision is not None else train.precision
    precision = resolve_precision(wanted, torch.device("cpu" if cpu else "cuda"))
    timeout = timedelta(seconds=train.ddp_timeout)
    with _environment(strategy, launch, cpu=cpu):
        _forget_accelerate(strategy)
        if strategy in ("single", "ddp", "fsdp2"):
            accelerator = _accelerator(strategy, MIXED[precision], timeout, cpu=cpu, offload=train.offload is not None)
        else:
            from pretrain.training.engines.zero import make_accelerator

            accelerator = make_accelerator(config, strategy, launch, precision, timeout, cpu=cpu)
    ranks = Ranks.of_job(timeout=train.ddp_timeout) if strategy != "single" else Ranks.alone()
    _refuse_other(strategy, accelerator, launch.world or 1)
    return Job(strategy, accelerator, ranks, precision)


def _accelerator(strategy: str, mixed: str, timeout: timedelta, *, cpu: bool, offload: bool) -> Accelerator:
    # With offload, norms and whole tensors are summed on the CPU.
    backend = "gloo" if cpu else ("cuda:nccl,cpu:gloo" if offload else None)
    group = InitProcessGroupKwargs(backend=backend, timeout=timeout)
    if strategy == "single":
        return Accelerator(cpu=cpu, mixed_precision=mixed)
    if strategy == "ddp":
        # Loom models have no buffers that training changes, and every parameter takes part in every step.
        copies = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return Accelerator(cpu=cpu, mixed_precision=mixed, kwargs_handlers=[group, copies])
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True, cpu_ram_efficient_loading=False)
    return Accelerator(mixed_precision=mixed, fsdp_plugin=plugin, kwargs_handlers=[group])


def _refuse_crowding(*, cpu: bool) -> None:
    """Refuse more processes on this machine than it has GPUs: two on one would wait for each other in NCCL."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if not cpu and rank >= torch.cuda.device_count():
        raise ValueError(
            f"this is process {rank + 1} of this machine, which has {torch.cuda.device_count()} GPUs; start as many "
            "processes as there are GPUs"
        )


def _refuse_other(strategy: str, accelerator: Accelerator, world: int) -> None:
    """Compare what Accelerate made with what was asked for."""
    kinds = {
        "single": {DistributedType.NO},
        "ddp": {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU},
        "fsdp2": {DistributedType.FSDP},
    }
    kind = accelerator.distributed_type
    if kind not in kinds.get(strategy, {DistributedType.DEEPSPEED}):
        raise ValueError(
            f"train.strategy: {strategy} was asked for, but accelerate runs {kind.value}; unset the variables that "
            "start with ACCELERATE_, or launch it with `pretrain train CONFIG --processes N`"
        )
    if accelerator.num_processes != world:
        raise ValueError(
            f"{world} processes were launched, but accelerate counts {accelerator.num_processes}; launch it with "
            "`pretrain train CONFIG --processes N` or torchrun"
        )


def _forget_accelerate(strategy: str) -> None:
    """Accelerate keeps one state a process; a program may train two models in turn, and not the same way."""
    other = PartialState._shared_state.get("distributed_type")
    single = other is None or other == DistributedType.NO
    AcceleratorState._reset_state(reset_partial_state=not (single and strategy == "single"))


@contextmanager
def _environment(strategy: str, launch: Launch, *, cpu: bool) -> Iterator[None]:
    """The variables that Accelerate reads when it is made, and only then.

    One process that no launcher started gets a group of its own where its strategy needs one. On a CPU, Accelerate
    would run FSDP as plain DDP: its choice of backend is replaced while its state is made.
    """
    before = dict(os.environ)
    prepare = PartialState._prepare_backend
    if strategy == "single":
        for name in _LAUNCHED:
            os.environ.pop(name, None)
    elif launch.world is None:
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {name: str(value) for name, value in alone.items()}
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    foreign = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
    for name in [name for name in os.environ if name.startswith(foreign) and not name.startswith(_OF_DEEPSPEED)]:
        del os.environ[name]  # they were read and compared; what we ask for is said by arguments
    if strategy == "fsdp2" and cpu:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = _gloo
    try:
        yield
    finally:
        PartialState._prepare_backend = prepare
        os.environ.clear()
        os.environ.update(before)


def _gloo(self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None) -> tuple[str, Any]:
    return "gloo", DistributedType.MULTI_GPU


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def close_job() -> None:
    """Leave the process group, so that the process ends in peace. All ranks call it together, at their end."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
