"""Learning-rate schedules: pure functions of the step.

What lives here: the share of the peak learning rate at a step. What must not: state, optimizers. Because nothing is
remembered, a resumed run cannot land on another learning rate than the uninterrupted one.
"""

from __future__ import annotations

import math

from pretrain.config_loop import ScheduleConfig
from pretrain.config_types import amount_in_steps


def learning_rate_scale(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """The share of the peak learning rate, in [0, 1], for the update after `step` updates were made.

    Warm-up of w steps is linear: 1/(w+1) at step 0, so that no update is wasted, and 1 at step w. From there to
    `final` at `total_steps` (and after):

    - constant: stays at 1, whatever `final` says.
    - cosine: half a cosine (Loshchilov and Hutter 2017, one cycle).
    - linear: a straight line.
    - inverse-sqrt: sqrt((w+1)/(step+1)), as Vaswani et al. 2017, section 5.3; `final` is a floor.
    - wsd: 1 until the last `decay` steps, then 1 - sqrt(progress) (Hägele et al. 2024, section 3).

    Raises:
        ValueError: when warm-up, or warm-up and decay together, are longer than the run.
    """
    warmup = amount_in_steps(config.warmup, total_steps)
    if warmup > total_steps:
        raise ValueError(
            f"schedule.warmup: {config.warmup} is longer than the run of {total_steps} steps; "
            "shorten it, or give a share such as 2%"
        )
    start = _decay_start(warmup, total_steps, config) if config.kind == "wsd" else warmup
    if config.kind == "constant":
        return min(1.0, (step + 1) / (warmup + 1))
    if config.kind == "inverse-sqrt":
        return min((step + 1) / (warmup + 1), max(config.final, math.sqrt((warmup + 1) / (step + 1))))
    if step >= total_steps:
        return config.final
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if step <= start:
        return 1.0
    progress = (step - start) / (total_steps - start)
    return config.final + (1.0 - config.final) * _remaining(config.kind, progress)


def _remaining(kind: str, progress: float) -> float:
    """How much of the way from `final` to the peak is left, 1 at progress 0 and 0 at progress 1."""
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if kind == "linear":
        return 1.0 - progress
    assert kind == "wsd", kind
    return 1.0 - math.sqrt(progress)


def _decay_start(warmup: int, total_steps: int, config: ScheduleConfig) -> int:
    """The step at which the decay of `wsd` begins."""
    decay = amount_in_steps(config.decay, total_steps)
    if warmup + decay > total_steps + 1:  # one step more may come from rounding two shares
        raise ValueError(
            f"schedule.warmup: {config.warmup} and schedule.decay: {config.decay} together are longer than the run "
            f"of {total_steps} steps; shorten one of them"
        )
    return max(warmup, total_steps - decay)
