"""Going on with another configuration than the checkpoint's: what it does to the budget and the learning rate.

What lives here: which change is taken, recorded and announced. What must not: reading checkpoints, or the loop. Which
key may change at all stands in `pretrain.changes`.

Nothing changes in silence: every difference is a line on the console and an entry of `Progress.changes`, and where the
learning rate of the next step is not what the checkpoint's configuration would give, both rates are shown.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pretrain.changes import Change, ChangedConfigError, changes_at_resume
from pretrain.config_loop import BUDGETS, LoopConfig, ScheduleConfig
from pretrain.training.progress import Progress, budget_minutes, steps_of
from pretrain.training.schedule import learning_rate_scale

_SAME = 1e-12


def take_up(
    progress: Progress,
    old: Mapping[str, Any],
    config: LoopConfig,
    *,
    num_rows: int,
    rates: Mapping[str, tuple[float, float]],
    arithmetic: str,
    allow: Collection[str] = (),
    attention_dropout: float | None = None,
    processes: tuple[int, int] | None = None,
) -> list[str]:
    """Move `progress`, as a checkpoint gave it, to the configuration that is wanted now; return what to announce.

    Args:
        progress: changed in place: `total_steps`, `arithmetic`, `changes`.
        old: the configuration in the checkpoint, as plain data.
        config: the configuration that is wanted now.
        num_rows: rows an epoch.
        rates: peak learning rates by optimizer group, (the checkpoint's, the one wanted now).
        arithmetic: precision and device as they are resolved now.
        allow: keys, or whole sections, that may change.
        attention_dropout: the model's, where it has one; else the configuration's.
        processes: of the job, (the checkpoint's, now).

    Raises:
        ChangedConfigError: when a change is not allowed, or the run has no steps left that it could touch.
    """
    changes = changes_at_resume(old, config, allow, attention_dropout=attention_dropout, processes=processes)
    before = progress.total_steps
    lines = [f"{change}: from step {progress.step + 1:,} on; {change.rule.reason}" for change in changes]
    if any(change.key in _BUDGETS for change in changes):
        progress.total_steps = _total_steps(progress, config, num_rows)
        lines.append(f"the budget is {progress.total_steps:,} steps now; it was {before:,}")
    _refuse_without_effect(progress, before, changes, config)
    if progress.finished:
        return []
    records = [{"key": change.key, "before": change.before, "after": change.after} for change in changes]
    if progress.arithmetic not in ("", arithmetic):
        lines.append(f"arithmetic: {progress.arithmetic} -> {arithmetic}: the run goes on, but not bit for bit")
        records.append({"key": "arithmetic", "before": progress.arithmetic, "after": arithmetic})
    progress.arithmetic = arithmetic
    lines += _jumps(progress, before, ScheduleConfig.model_validate(old["schedule"]), config.schedule, rates)
    progress.changes = [*progress.changes, *({"step": progress.step, **record} for record in records)]
    return lines


def _total_steps(progress: Progress, config: LoopConfig, num_rows: int) -> int:
    """Steps of a budget that replaces the checkpoint's. Time is counted at the mean pace of the run so far."""
    if budget_minutes(config) and not progress.step:
        raise ChangedConfigError(
            "train.minutes: no step was made yet whose time could be counted; give the new budget as train.steps"
        )
    return steps_of(config, num_rows, progress.seconds / progress.step if progress.step else None)


def _refuse_without_effect(
    progress: Progress, total_before: int, changes: Sequence[Change], config: LoopConfig
) -> None:
    """A change that no step would see must not stand in the records as if it had been trained with."""
    if progress.step > progress.total_steps:
        raise ChangedConfigError(
            f"the new budget is {progress.total_steps:,} steps, but `{config.directory}` has made {progress.step:,}; "
            f"give a longer one, or this one another name (name={config.name}-2)"
        )
    wanted = [str(change) for change in changes if change.rule.stage == "train"]
    if wanted and (progress.given_up or progress.step == progress.total_steps == total_before):
        raise ChangedConfigError(
            f"`{config.directory}` is finished ({progress.step:,} steps), so these would change nothing: "
            f"{'; '.join(wanted)}. Give a longer budget too, or this one another name (name={config.name}-2)"
        )


def _jumps(
    progress: Progress,
    total_before: int,
    old: ScheduleConfig,
    new: ScheduleConfig,
    rates: Mapping[str, tuple[float, float]],
) -> list[str]:
    """One line when the learning rate of the next step is not the one that was due; each group that jumps."""
    if progress.step >= progress.total_steps:
        return []
    scales = (
        learning_rate_scale(progress.step, total_before, old),
        learning_rate_scale(progress.step, progress.total_steps, new),
    )
    due = {name: (was * scales[0], now * scales[1]) for name, (was, now) in rates.items()}
    jumps = [
        f"{name} {was:.6g} -> {now:.6g}" for name, (was, now) in due.items() if abs(now - was) > _SAME * max(was, now)
    ]
    return [f"learning rate of step {progress.step + 1:,} jumps: {', '.join(jumps)}"] if jumps else []


_BUDGETS = frozenset(f"train.{budget}" for budget in BUDGETS)
