"""The guard: is a step's update made, judged by its loss and the norm of its gradient before anything is changed.

What lives here: the judgement, what it remembers, its words. What must not: tensors, files, the loop.

Two things are looked for. A loss or a norm that is not finite; and, with `train.spike_sigma: k`, a spike: a loss or a
norm more than k standard deviations above the mean of its window, the last `train.spike_window` values that were
accepted (norms by their logarithm: they vary by factors). A step that is skipped leaves weights and optimizer state
alone; it counts as a step all the same, so the schedule and the data go on, and step s sees the s-th batch whatever was
skipped before it.

- What is not finite, and what is skipped, never enters a window: one NaN cannot poison it. A spike that is only logged
  enters as the threshold that it passed, and so does what lies as far below the mean, so that one odd value does not
  blind the guard for the rest of the window.
- A window judges when it is half full (at least 16 values, and never more than it holds). It is judged on one side
  only, and by mean and standard deviation: while the loss falls at the start of a run the deviation is wide and values
  lie below the mean. Median and absolute deviation would see spikes a little earlier, and skip every batch of a rare,
  harder kind for ever: they take anything that less than half of the steps do for an outlier.
- Skipping cannot go on for ever. A skipped step changes no weight, so many batches in a row that all spike are no bad
  batches but a new level, of the data or of the model: after half a window (at least 16) of them the windows start
  anew, and training goes on as it would without a guard. As many steps in a row that are not finite end the run: no
  later batch will heal it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np

from pretrain.config_loop import LoopTrainConfig

LEAST = 16
"""A window judges with no fewer values than this (or all it holds), and no fewer skips in a row are given up on."""

_SMALLEST_DEVIATION = 1e-3
"""Of the mean, or of 1 where it is smaller: values that hardly differ make no spike of the next one that does."""

_NORM = "gradient norm"
_SMALLEST_NORM = 1e-12

Why = Literal["", "not finite", "spike", "overflow", "new level"]


class NonFiniteError(ValueError):
    """The loss or the gradient became NaN or infinite, and that ends the run; names step and rows."""


class SpikeError(ValueError):
    """The loss or the norm of the gradient spiked, and `train.on_spike` is stop; names step and rows."""


@dataclass
class GuardState:
    """What the guard remembers. Part of a run's progress, so that it survives a stop bit for bit.

    `losses` and `norms` are the windows, the norms as natural logarithms. `in_a_row` counts the last steps without an
    update; `skipped` all of them, by why: "not finite", "spike", and "overflow" (steps that the loss scaler of fp16
    gave up to find its scale).
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    in_a_row: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """What was skipped, in words; empty when nothing was (an fp16 scaler's search is not counted)."""
        counts = {why: count for why, count in self.skipped.items() if why != "overflow"}
        told = ", ".join(f"{count} {why}" for why, count in counts.items())
        return f"skipped steps: {sum(counts.values()):,} ({told})" if counts else ""


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step.

    Attributes:
        update: whether the update is made.
        why: what was found; empty when nothing was.
        detail: the finding in words.
        stop: whether the run ends here.
    """

    update: bool = True
    why: Why = ""
    detail: str = ""
    stop: bool = False

    def numbers(self) -> dict[str, float]:
        """For the log: `skipped` where no update was made, `spike` where one was made in spite of a spike."""
        if not self.update:
            return {"skipped": 1.0}
        return {"spike": 1.0} if self.why else {}


@dataclass(frozen=True)
class Guard:
    """Judges steps. Pure: the same state and values give the same verdict and the same state.

    Attributes:
        on_nonfinite: what a loss or a norm that is not finite does.
        sigma: standard deviations above the mean that make a spike; None looks for none.
        window: how many accepted values a spike is measured against.
        on_spike: what a spike does.
        scaled: whether a loss scaler is at work: then a finite loss with an infinite gradient is its way to find the
            scale, and neither a fault nor a spike.
    """

    on_nonfinite: Literal["skip", "stop"] = "stop"
    sigma: float | None = None
    window: int = 128
    on_spike: Literal["skip", "stop", "log"] = "skip"
    scaled: bool = False

    @classmethod
    def of(cls, config: LoopTrainConfig, *, scaled: bool) -> Self:
        """The guard that a configuration asks for."""
        return cls(config.on_nonfinite, config.spike_sigma, config.spike_window, config.on_spike, scaled)

    @property
    def patience(self) -> int:
        """Steps in a row without an update before the guard gives up on skipping."""
        return max(LEAST, self.window // 2)

    def judge(self, state: GuardState, loss: float, norm: float) -> Verdict:
        """Judge a step by its loss and the norm of its gradient before clipping; `state` is brought up to date."""
        verdict = self._find(state, loss, norm)
        if verdict.update:
            state.in_a_row = 0
            if self.sigma is not None:
                if verdict.why == "new level":
                    state.losses.clear()
                    state.norms.clear()
                self._remember(state.losses, loss)
                self._remember(state.norms, _logarithm(norm))
        else:
            state.in_a_row += 1
            state.skipped[verdict.why] = state.skipped.get(verdict.why, 0) + 1
        return verdict

    def _find(self, state: GuardState, loss: float, norm: float) -> Verdict:
        last = state.in_a_row + 1 >= self.patience
        if not (math.isfinite(loss) and math.isfinite(norm)):
            overflow = self.scaled and math.isfinite(loss)
            why: Why = "overflow" if overflow else "not finite"
            stop = last or (self.on_nonfinite == "stop" and not overflow)
            return Verdict(update=False, why=why, detail=f"loss {loss}, gradient norm {norm}", stop=stop)
        found = [
            self._spike(name, values, value)
            for name, values, value in (("loss", state.losses, loss), (_NORM, state.norms, _logarithm(norm)))
        ]
        detail = "; ".join(filter(None, found))
        if not detail:
            return Verdict()
        if self.on_spike == "skip" and state.in_a_row >= self.patience:
            detail += f"; so did the {state.in_a_row} steps before: this is taken for the new level"
            return Verdict(why="new level", detail=detail)
        return Verdict(update=self.on_spike == "log", why="spike", detail=detail, stop=self.on_spike == "stop")

    def _spike(self, name: str, values: list[float], value: float) -> str:
        bounds = self._bounds(values)
        if bounds is None or value <= bounds.high:
            return ""
        known = values[-self.window :]
        shown, mean = (math.exp(value), math.exp(bounds.mean)) if name == _NORM else (value, bounds.mean)
        above = (value - bounds.mean) / bounds.deviation
        return (
            f"{name} {shown:.5g} is {above:.1f} standard deviations above the {mean:.5g} of the last {len(known)} steps"
        )

    def _bounds(self, values: list[float]) -> _Bounds | None:
        """What a value is measured against; None while there are too few to tell."""
        if self.sigma is None or len(values) < min(self.window, max(LEAST, self.window // 2)):
            return None
        array = np.asarray(values[-self.window :], dtype=np.float64)
        mean = float(array.mean())
        deviation = max(float(array.std()), _SMALLEST_DEVIATION * max(1.0, abs(mean)))
        return _Bounds(mean, deviation, mean - self.sigma * deviation, mean + self.sigma * deviation)

    def _remember(self, values: list[float], value: float) -> None:
        bounds = self._bounds(values)
        values.append(value if bounds is None else min(max(value, bounds.low), bounds.high))
        del values[: -self.window]


@dataclass(frozen=True)
class _Bounds:
    mean: float
    deviation: float
    low: float
    high: float


def _logarithm(norm: float) -> float:
    return math.log(max(norm, _SMALLEST_NORM))


def message(step: int, verdict: Verdict, rows: list[object], command: str, *, shown: int = 8) -> str:
    """One line: the step, what was found, what became of it, its rows, and the command that shows them.

    Args:
        step: as the log counts, from 1.
        verdict: of the guard.
        rows: ids of the rows of the step, as the data plane names them; the first few are shown.
        command: what to type to look at the rows.
        shown: at most so many rows.
    """
    became = "the update was made" if verdict.update else "the update was not made"
    named = ", ".join(str(row) for row in rows[:shown])
    more = f" and {len(rows) - shown} more" if len(rows) > shown else ""
    return f"step {step}: {verdict.detail}; {became}; rows {named}{more}; `{command}` shows them"


def error(verdict: Verdict, line: str, in_a_row: int, next_call: str = "") -> ValueError:
    """The error that ends a run, with the remedy, and what the next call does."""
    line = f"{line}. {next_call}".rstrip()
    if verdict.why == "spike":
        return SpikeError(f"{line} Set train.on_spike=skip (or log) to go on, or raise train.spike_sigma")
    if in_a_row > 1:
        return NonFiniteError(
            f"{line} It is the last of {in_a_row} steps in a row without an update, so no later batch will heal it: "
            "look at the rows in skipped.jsonl, then go back to an earlier checkpoint or start a run with a lower lr"
        )
    return NonFiniteError(f"{line} Set train.on_nonfinite=skip to go on, or start another run with a lower lr")
