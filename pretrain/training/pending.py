"""How loss, norm and verdict of a step come to the host: at once, or a step late without waiting for the device.

What lives here: the two roads from a step's gradient to its verdict. What must not: the judgement itself
(`guard.py`), what is logged of it, the loop.

On both roads all ranks judge the same two numbers, so they agree: the sum of their shares of the loss, and the mean of
their norms (equal on all of them, unless one rank computed something else, and NaN when one has NaN).

`AtOnce` waits for both numbers, asks the guard, and makes the update or not. It is the road of a CPU, which waits
anyway, of DeepSpeed and of loss scalers, which read the device themselves, and of a guard that looks for spikes: its
windows are on the host.

`StepLate` decides on the device. There the only question is whether both numbers are finite; a tensor with the answer
goes to the optimizer, which leaves weights and state as they are where it says so. The numbers follow to pinned memory,
and the host reads them after it has sent off the next step: it waits until the device is done with one step while the
device has the next one to do. What the host then finds is what the device has decided, by the same rule. A step that
ends the run is known to the host one step late; the device withholds that next update too, and every later one, so
that weights and optimizer state are those before the bad step, as on the other road. Nothing of this depends on when
the host looks, so that a save, which looks before its time, changes no later bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

from pretrain.config_loop import LoopTrainConfig
from pretrain.training.engines import Engine
from pretrain.training.feed import MicroBatch
from pretrain.training.guard import Guard, GuardState, Verdict
from pretrain.training.parts import Parts

Agree = Callable[..., Sequence[float]]
"""The sums over all ranks of the given numbers, through the host; every rank calls it once a step."""


@dataclass(frozen=True)
class Sent:
    """What is known of a step when its work was sent off.

    Attributes:
        step: as the log counts, from 1.
        tokens: token positions of the run so far, this step's included.
        text_tokens: of this step, without padding.
        scale: of the learning rate.
        since: when the wait for its data began, by `time.perf_counter`.
        waited: seconds that its data let this rank wait.
        micro_batches: of this rank.
        parts: what its forward passes said of themselves.
    """

    step: int
    tokens: int
    text_tokens: int
    scale: float
    since: float
    waited: float
    micro_batches: Sequence[MicroBatch]
    parts: Parts = field(default_factory=Parts)


@dataclass(frozen=True)
class Known:
    """A step of which everything is known.

    Attributes:
        sent: the step.
        loss: mean over the targets of the global batch.
        norm: of its gradient, before clipping.
        verdict: of the guard; the update was made, or not, as it says.
        at: when it was known, by `time.perf_counter`.
    """

    sent: Sent
    loss: float
    norm: float
    verdict: Verdict
    at: float


class AtOnce:
    """The host waits for loss and norm, judges, and then the update is made or not.

    Args:
        guard: judges.
        engine: updates.
        limit: at which the gradient is clipped.
    """

    def __init__(self, guard: Guard, engine: Engine, limit: float | None) -> None:
        self._guard = guard
        self._engine = engine
        self._limit = limit

    def begin(self, state: GuardState) -> None:
        """The run begins, or goes on from a checkpoint."""

    def update(self, state: GuardState, sent: Sent, share: Tensor, agree: Agree) -> list[Known]:
        """Make the update, or not, with the gradient that the engine has; returns the steps that are known now.

        Args:
            state: the guard's, brought up to date with every step that is known.
            sent: the step.
            share: this rank's share of the loss, 0-d on the device.
            agree: sums over the ranks.
        """
        found: list[tuple[float, float, Verdict]] = []

        def judge(own_norm: float) -> bool:
            loss, norms = agree(share.item(), own_norm)
            norm = norms / self._engine.ranks.world
            verdict = self._guard.judge(state, loss, norm)
            found.append((loss, norm, verdict))
            return verdict.update

        self._engine.update(self._limit, judge)
        ((loss, norm, verdict),) = found  # the engine asks once
        return [Known(sent, loss, norm, verdict, time.perf_counter())]

    def drain(self, state: GuardState) -> list[Known]:
        """The steps that were sent off and are not known yet: none."""
        return []


class StepLate:
    """The device decides whether the update is made; the host learns it while the device does the next step.

    Args:
        guard: the rule, which must look for no spikes.
        engine: updates; it `decides_on_device`.
        limit: at which the gradient is clipped.
    """

    def __init__(self, guard: Guard, engine: Engine, limit: float | None) -> None:
        assert guard.sigma is None
        assert engine.decides_on_device
        self._guard = guard
        self._engine = engine
        self._limit = limit
        self._patience = 1 if guard.on_nonfinite == "stop" else guard.patience
        self.begin(GuardState())

    def begin(self, state: GuardState) -> None:
        """The run begins, or goes on from a checkpoint: nothing is under way, and it has not ended."""
        self._coming: tuple[Sent, Tensor, Any] | None = None
        # What the device remembers, both 0-d float32: steps in a row without an update, and whether the run has ended.
        self._in_a_row = torch.full((), float(state.in_a_row), device=self._engine.device)
        self._ended = torch.zeros_like(self._in_a_row)

    def update(self, state: GuardState, sent: Sent, share: Tensor, agree: Agree) -> list[Known]:
        """Send off the update, or its withholding, with the gradient that the engine has; the steps known now.

        The arguments are those of `AtOnce.update`.
        """
        totals = torch.empty(0)

        def withhold(norm: Tensor) -> Tensor:
            nonlocal totals
            totals = self._totals(share, norm)
            return self._withhold(totals)

        self._engine.update_on_device(self._limit, withhold)
        coming = sent, *_send(totals)
        agree()
        known = self.drain(state)
        self._coming = coming
        return known

    def drain(self, state: GuardState) -> list[Known]:
        """Wait for the step that was sent off and is not known yet, if there is one."""
        if self._coming is None:
            return []
        sent, totals, mark = self._coming
        self._coming = None
        if mark is not None:
            mark.synchronize()
        loss, norm = totals.tolist()
        return [Known(sent, loss, norm, self._guard.judge(state, loss, norm), time.perf_counter())]

    def _totals(self, share: Tensor, norm: Tensor) -> Tensor:
        """(2,) float64 on the device: the loss of the global batch, and the norm of its gradient."""
        world = self._engine.ranks.world
        totals = torch.stack([share.double(), norm.double()])
        if world > 1:
            distributed.all_reduce(totals)
            totals[1] /= world
        return totals

    def _withhold(self, totals: Tensor) -> Tensor:
        """1 where the update is withheld, else 0: the guard's rule for what is not finite, on the device."""
        bad = 1.0 - totals.isfinite().all().float()
        self._in_a_row = (self._in_a_row + 1.0) * bad
        self._ended = torch.maximum(self._ended, (self._in_a_row >= self._patience).float())
        return torch.maximum(bad, self._ended)


def _send(values: Tensor) -> tuple[Tensor, Any]:
    """A copy on the host, and the mark in the device's work after which it holds the values; None: it does already."""
    if values.device.type != "cuda":
        return values, None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    event: Any = torch.cuda.Event
    mark = event(blocking=True)
    mark.record()
    return copy, mark


def waits_for_no_step(config: LoopTrainConfig, engine: Engine) -> bool:
    """Whether the host of a run goes on without waiting for a step's numbers."""
    return engine.device.type == "cuda" and config.spike_sigma is None and engine.decides_on_device


def make_road(config: LoopTrainConfig, guard: Guard, engine: Engine) -> AtOnce | StepLate:
    """The way that a run's verdicts take to the host."""
    road = StepLate if waits_for_no_step(config, engine) else AtOnce
    return road(guard, engine, config.max_grad_norm)
