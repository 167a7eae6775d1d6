"""How many rows a forward pass takes: as configured, or what a CPU's caches like, or the most that fit on a GPU.

What lives here: the choice, by the plan of `pretrain.planning` where there is one, and the real step that verifies it.
What must not: what a step is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.config import RunConfig
from pretrain.config_loop import LoopConfig
from pretrain.planning.choice import planned_micro_batch
from pretrain.planning.facts import ModelFacts
from pretrain.ranks import Ranks
from pretrain.training.engines import Engine
from pretrain.training.feed import Data, Feed, MicroBatch, counts_of, divisors, item_counts_of, largest_share

_CPU_TOKENS = 4096


def choose_micro_batch(config: LoopConfig, precision: str, engine: Engine, data: Data, facts: ModelFacts | None) -> int:
    """Rows of a forward pass, the same on every rank. All of them call it together.

    Where rows meet in a pass, `auto` is all that a process has of a step: fewer would be another loss.

    Args:
        config: the run configuration.
        precision: of the arithmetic.
        engine: at step 0, without any optimizer state yet.
        data: the data plane.
        facts: of the model, for the plan; None tries all rows first.

    Raises:
        torch.OutOfMemoryError: when it does not fit and nothing smaller can be tried; names the remedy.
    """
    ranks, rows = engine.ranks, largest_share(config.rows_per_batch, engine.ranks.world)
    if config.train.micro_batch != "auto":
        return min(rows, config.train.micro_batch)
    if engine.device.type != "cuda":
        if config.rows_meet:
            return rows
        return min(rows, max(1, _CPU_TOKENS // config.row_tokens))
    micro_batch = rows
    if facts is not None:
        assert isinstance(config, RunConfig)  # facts are of a pretraining's model
        memory = torch.cuda.get_device_properties(engine.device).total_memory
        width = 4 if precision == "fp32" else 2
        micro_batch = planned_micro_batch(config, facts, memory, engine.name, ranks.world, compute_bytes=width)
    # Where ranks meet within a pass, one that has run out of memory leaves the others waiting: it is not tried twice.
    meets = engine.name.startswith("zero") or (engine.name == "fsdp2" and ranks.world > 1)
    while not fits(engine, data, micro_batch):
        if micro_batch == 1 or meets or config.rows_meet:
            raise torch.OutOfMemoryError(
                f"train.micro_batch: {micro_batch} rows do not fit on the device; give fewer, or use "
                "train.gradient_checkpointing=true, shorter rows, or an engine that shards more (train.strategy)"
            )
        micro_batch = (micro_batch + 1) // 2
    return micro_batch


def _largest(data: Data, rows: int) -> MicroBatch:
    """Rows that take as much memory as any so many, where the data plane tells which; else all are equally long."""
    find = getattr(data, "largest", None)
    if find is None:
        (trial,) = Feed(data, rows, rows, Ranks.alone()).micro_batches(0)
        return trial
    batch = find(rows)
    return MicroBatch(batch.arrays, batch.num_targets, batch.num_tokens, batch.row_ids, item_counts_of(batch))


def fits(engine: Engine, data: Data, micro_batch: int) -> bool:
    """Whether a forward and backward pass of so many rows goes through on every rank, with room for the state."""
    held = sum(shape.nbytes for shape in engine.shapes().values() if shape.trained)
    if engine.name not in ("single", "ddp"):
        held //= engine.config.shard_size or engine.ranks.world
    whole = True
    trial = _largest(data, micro_batch)

    def share() -> Tensor:
        loss: Tensor = engine.model(**trial.tensors(engine.device), **divisors(counts_of([trial]))).loss
        return loss

    engine.model.train()
    try:
        # The optimizer's state is not there yet: hold its place (two values a parameter) while trying.
        place = torch.empty(2 * held, dtype=torch.uint8, device=engine.device)
        # DDP's ranks do not meet before the last micro-batch; a reduction that breaks off could not be tried again.
        engine.backward(share, last=engine.name != "ddp")
        del place
    except torch.OutOfMemoryError:
        whole = False
    finally:
        engine.drop()
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
    return not engine.ranks.any(not whole)
