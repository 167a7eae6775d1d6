"""The engines: how one step's work, and what is trained, is split over processes.

What lives here: which engine runs a strategy. What must not: the engines.
"""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from pretrain.config_loop import LoopTrainConfig
from pretrain.ranks import Ranks
from pretrain.training.engines.base import Engine, Judge, refuse_differences

__all__ = ["Engine", "Judge", "make_engine"]


def make_engine(
    strategy: str,
    config: LoopTrainConfig,
    accelerator: Accelerator,
    ranks: Ranks,
    model: nn.Module,
    optimizer: Optimizer,
) -> Engine:
    """The engine of a strategy, which `runtime.open_job` has resolved. All processes of the job call it together.

    Raises:
        ValueError: when the engine does not run as it was configured; names each setting.
    """
    engine = _class_of(strategy)(strategy, config, accelerator, ranks, model, optimizer)
    refuse_differences(engine.checks())
    return engine


def _class_of(strategy: str) -> type[Engine]:
    """Imported when it is wanted: DeepSpeed takes seconds, and may not be installed."""
    if strategy == "fsdp2":
        from pretrain.training.engines.fsdp2 import Fsdp2Engine

        return Fsdp2Engine
    if strategy.startswith("zero"):
        from pretrain.training.engines.zero import ZeroEngine

        return ZeroEngine
    return Engine
