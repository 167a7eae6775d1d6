"""Where a run stands, how it ended, and how many steps its budget is.

What lives here: plain values. What must not: the loop, or files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.config_loop import LoopConfig
from pretrain.training.guard import GuardState


@dataclass
class Progress:
    """Where a run stands; a checkpoint holds it.

    `tokens` counts positions, `text_tokens` leaves out padding. `first_scores` are those of step 0. `arithmetic` is
    precision and device as they were resolved, `split` the engine and its processes. `changes` tells what was changed
    on the way: step, key, before, after. `patience` is how many steps may pass without a better checkpoint.
    """

    run_id: str
    total_steps: int
    step: int = 0
    samples: int = 0
    tokens: int = 0
    text_tokens: int = 0
    seconds: float = 0.0
    micro_batch: int = 0
    best: dict[str, float] | None = None
    first_scores: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    scored_at: int | None = None
    arithmetic: str = ""
    split: str = ""
    changes: list[dict[str, Any]] = field(default_factory=list)
    guard: GuardState = field(default_factory=GuardState)
    patience: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.guard, dict):  # as a checkpoint holds it
            self.guard = GuardState(**self.guard)

    @property
    def given_up(self) -> bool:
        """Whether more steps than `patience` have passed since the best checkpoint."""
        return self.patience is not None and self.best is not None and self.step - self.best["step"] >= self.patience

    @property
    def finished(self) -> bool:
        """Whether the whole budget was trained, or given up, and the end was evaluated."""
        return (self.step >= self.total_steps or self.given_up) and self.scored_at == self.step


@dataclass(frozen=True)
class Result:
    """How a call of `Trainer.train` ended."""

    progress: Progress
    checkpoint: Path
    stopped_by: str | None = None
    where: str = ""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.progress.finished


def steps_of(config: LoopConfig, num_rows: int, seconds_per_step: float | None) -> int:
    """Optimizer steps of the whole budget, at least 1.

    Args:
        config: the run configuration.
        num_rows: rows an epoch, for a budget in epochs.
        seconds_per_step: for a budget in minutes or hours.
    """
    train = config.train
    if train.steps is not None:
        return train.steps
    if train.tokens is not None:
        return math.ceil(train.tokens / config.tokens_per_step)
    if train.epochs is not None:
        return max(1, math.ceil(train.epochs * num_rows / config.rows_per_batch))
    assert seconds_per_step is not None
    return max(1, round(60.0 * budget_minutes(config) / seconds_per_step))


def budget_minutes(config: LoopConfig) -> float:
    """A budget of time in minutes; 0 when the budget is none."""
    return config.train.minutes or 60.0 * (config.train.hours or 0.0)
