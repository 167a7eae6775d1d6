"""How many rows a forward pass takes: as configured, or what a CPU's caches like, or the most that fit on a GPU.

What lives here: the choice, by the plan of `pretrain.planning` where there is one, and the real step that verifies it.
What must not: what a step is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pretrain.config import RunConfig
from pretrain.planning.choice import planned_micro_batch
from pretrain.planning.facts import ModelFacts
from pretrain.ranks import Ranks
from pretrain.training.engines import Engine
from pretrain.training.feed import Data, Feed, MicroBatch, largest_share

_CPU_TOKENS = 4096


def choose_micro_batch(
    config: RunConfig,
    precision: str,
    engine: Engine,
    data: Data,
    backward: Callable[[Sequence[MicroBatch], int], Any],
    facts: ModelFacts | None,
) -> int:
    """Rows of a forward pass, the same on every rank. All of them call it together.

    Args:
        config: the run configuration.
        precision: of the arithmetic.
        engine: at step 0, without any optimizer state yet.
        data: the data plane.
        backward: makes the gradient of micro-batches with so many targets.
        facts: of the model, for the plan; None tries all rows first.

    Raises:
        torch.OutOfMemoryError: when not even one row fits.
    """
    ranks, rows = engine.ranks, largest_share(config.rows_per_batch, engine.ranks.world)
    if config.train.micro_batch != "auto":
        return min(rows, config.train.micro_batch)
    if engine.device.type != "cuda":
        return min(rows, max(1, _CPU_TOKENS // config.data.sequence_length))
    micro_batch = rows
    if facts is not None:
        memory = torch.cuda.get_device_properties(engine.device).total_memory
        width = 4 if precision == "fp32" else 2
        micro_batch = planned_micro_batch(config, facts, memory, engine.name, ranks.world, compute_bytes=width)
    while not _fits(engine, data, backward, micro_batch):
        if micro_batch == 1:
            raise torch.OutOfMemoryError(
                "train.micro_batch: not even one row fits; use train.gradient_checkpointing=true, shorter rows, or an "
                "engine that shards the model (train.strategy: fsdp2, zero2, zero3)"
            )
        micro_batch = (micro_batch + 1) // 2
    return micro_batch


def _fits(engine: Engine, data: Data, backward: Callable[[Sequence[MicroBatch], int], Any], micro_batch: int) -> bool:
    """Whether a forward and backward pass of so many rows goes through on every rank, with room for the state."""
    held = sum(shape.nbytes for shape in engine.shapes().values() if shape.trained)
    if engine.name in ("fsdp2", "zero1", "zero2", "zero3"):
        held //= engine.config.shard_size or engine.ranks.world
    whole = True
    try:
        # The optimizer's state is not there yet: hold its place (two values a parameter) while trying.
        place = torch.empty(2 * held, dtype=torch.uint8, device=engine.device)
        trial = Feed(data, micro_batch, micro_batch, Ranks.alone()).micro_batches(0)
        backward(trial, trial[0].num_targets)
        del place
    except torch.OutOfMemoryError:
        whole = False
    finally:
        engine.drop()
        torch.cuda.empty_cache()
    return not engine.ranks.any(not whole)
