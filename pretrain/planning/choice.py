"""Which micro-batch fits, and which strategy is the fastest of those that fit.

What lives here: the search over `memory` and `speed`, and the function that the training loop asks for `train.
micro_batch: auto`. What must not: formulas, or the words of a report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pretrain.config import RunConfig
from pretrain.config_objective import ObjectiveConfig
from pretrain.planning.activations import Pass
from pretrain.planning.facts import ModelFacts
from pretrain.planning.gpus import GIB
from pretrain.planning.memory import Layout, Parts, Strategy, memory
from pretrain.planning.speed import Links, Rates, StepTime, step_time

CONTEXT_GIB, NCCL_GIB, WASTE = 0.8, 1.0, 0.06
ALMOST = 0.97
"""A simpler strategy is taken when it reaches this share of the fastest one's speed."""


@dataclass(frozen=True)
class Margins:
    """What of a device's memory tensors cannot have: bytes of the libraries, share lost by the allocator."""

    context: float = (CONTEXT_GIB + NCCL_GIB) * GIB
    waste: float = WASTE


@dataclass(frozen=True)
class Option:
    """One way to run: where it lies, its micro-batch (None: not even one row fits), its memory and time."""

    layout: Layout
    micro_batch: int | None
    micro_steps: int
    parts: Parts
    time: StepTime | None


def pass_of(
    config: RunConfig, rows: int, compute: int, device: Literal["cuda", "cpu"] = "cuda", *, checkpointing: bool
) -> Pass:
    """A micro-batch of a run."""
    return Pass(
        rows=rows,
        length=config.row_tokens,
        compute=compute,
        device=device,
        eager_attention=config.train.attention == "eager",
        checkpointing=checkpointing,
        target_share=_most_targets(config.objective),
    )


def _most_targets(objective: ObjectiveConfig) -> float:
    """The largest share of the positions that the head sees at any time of the run."""
    masked = objective.kind in ("mlm", "rtd")
    return max(objective.rate, objective.final_rate or 0.0) if masked else 1.0


def largest_rows(
    facts: ModelFacts, step: Pass, layout: Layout, rows: int, device_memory: float, optimizer: str, margins: Margins
) -> int | None:
    """The most rows of a micro-batch that fit, up to `rows`; None when not even one does."""

    def fits(count: int) -> bool:
        parts = memory(
            facts,
            replace(step, rows=count),
            layout,
            optimizer=optimizer,
            accumulating=count < rows,
            context=margins.context,
            waste=margins.waste,
        )
        return parts.total <= device_memory

    if fits(rows):
        return rows
    low, high = 0, rows  # `low` fits, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low or None


def even_rows(rows: int, largest: int) -> int:
    """A micro-batch of at most `largest` rows that cuts `rows` into as few and as even parts as can be."""
    return math.ceil(rows / math.ceil(rows / largest))


def planned_micro_batch(
    config: RunConfig,
    facts: ModelFacts,
    device_memory_bytes: int,
    strategy: str,
    world: int,
    *,
    compute_bytes: int = 2,
) -> int:
    """Rows of a forward pass that should fit on each device: what `train.micro_batch: auto` tries first.

    Args:
        config: of the run.
        facts: of its model.
        device_memory_bytes: of one device, all of it.
        strategy: as `train.strategy`, resolved.
        world: processes.
        compute_bytes: of the compute type: 4 in fp32, 2 in bf16 and fp16.

    Returns:
        At least 1, at most the rows of a process; 1 also when nothing seems to fit.
    """
    shard = 1 if strategy in ("single", "ddp") else world
    if strategy == "fsdp2" and config.train.shard_size is not None:
        shard = config.train.shard_size
    layout = Layout(_strategy(strategy), world, shard, config.train.offload)
    rows = math.ceil(config.rows_per_batch / world)
    step = pass_of(config, 1, compute_bytes, checkpointing=config.train.gradient_checkpointing)
    margins = Margins(context=(CONTEXT_GIB + (NCCL_GIB if world > 1 else 0.0)) * GIB)
    largest = largest_rows(facts, step, layout, rows, device_memory_bytes, config.optimizer.name, margins)
    return even_rows(rows, largest or 1)


def _strategy(name: str) -> Strategy:
    for known in ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3"):
        if name == known:
            return known
    raise ValueError(f"train.strategy: {name} is unknown; use single, ddp, fsdp2, zero1, zero2 or zero3")


def layouts(gpus: int, per_node: int, *, shard_size: int | None, zero_bucket: float = 5e7) -> list[Layout]:
    """Every way to share a job, the simplest first."""
    if gpus == 1:
        return [Layout(), Layout("zero1", 1, 1, "optimizer", zero_bucket), Layout("fsdp2", 1, 1, "all", zero_bucket)]
    found = [Layout("ddp", gpus, 1)]
    found += [Layout("zero1", gpus, gpus, None, zero_bucket), Layout("zero2", gpus, gpus, None, zero_bucket)]
    hybrid = shard_size or per_node
    if 1 < hybrid < gpus and gpus % hybrid == 0:
        found.append(Layout("fsdp2", gpus, hybrid))
    found += [Layout("fsdp2", gpus, gpus), Layout("zero3", gpus, gpus, None, zero_bucket)]
    found += [Layout("zero2", gpus, gpus, "optimizer", zero_bucket), Layout("fsdp2", gpus, gpus, "all", zero_bucket)]
    return found


def evaluate(
    facts: ModelFacts,
    step: Pass,
    layout: Layout,
    *,
    rows: int,
    micro_batch: int | None,
    device_memory: float,
    optimizer: str,
    margins: Margins,
    rates: Rates,
    links: Links,
) -> Option:
    """The micro-batch, memory and time of one way to run; a `micro_batch` that is given is taken as it is."""
    largest = largest_rows(facts, step, layout, rows, device_memory, optimizer, margins)
    taken = None if largest is None else even_rows(rows, largest)
    if micro_batch is not None:
        wanted = min(rows, micro_batch)
        taken = wanted if largest is not None and wanted <= largest else None
    shown = taken or min(rows, micro_batch or 1)
    steps = math.ceil(rows / shown)
    there = replace(step, rows=shown)
    parts = memory(
        facts,
        there,
        layout,
        optimizer=optimizer,
        accumulating=steps > 1,
        context=margins.context,
        waste=margins.waste,
    )
    time = None
    if taken is not None:
        time = step_time(facts, there, layout, rates, micro_steps=rows / taken, optimizer=optimizer, links=links)
    return Option(layout, taken, steps, parts, time)


def best(options: Sequence[Option]) -> Option | None:
    """The simplest option that is almost as fast as the fastest; None when none fits."""
    fitting = [option for option in options if option.time is not None]
    if not fitting:
        return None
    fastest = min(option.time.seconds for option in fitting if option.time is not None)
    return next(option for option in fitting if option.time is not None and option.time.seconds * ALMOST <= fastest)
