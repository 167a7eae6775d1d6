"""Which process keeps the others waiting, and with what: measured at every step, compared every so often.

What lives here: the clock of one rank's own work, and the judgement over all ranks. What must not: the loop, or
anything that waits for a device.

A slow rank cannot be seen in the length of a step: all ranks meet in every step, so all of them are as slow as the
slowest. What is measured is therefore what a rank does before it meets the others:

    data     the wait for its rows
    host     from the last meeting of one step to the first of the next, less the wait: logging, Python, swapping,
             and the update where each rank makes it by itself, on the processor (ddp without a GPU)
    forward  its forward passes (not with fsdp2 and zero3, where ranks meet in every layer)

The backward pass is left out, since gradients meet in it; a device that is slow is slow in the forward pass too. A
rank is named when, over the window, its median lies above that of the others by 20% and 10 ms and 1% of a step, and by
half as much in nine of ten steps: chance does not do that in twenty steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

from pretrain.training.engines import Engine

PARTS: Final = ("data", "host", "forward")
_WORDS = {"data": "the wait for its data", "host": "the work between steps", "forward": "the forward pass"}
SHARE, SECONDS, SHARE_OF_STEP = 0.2, 0.010, 0.01
_STEADY = 0.9
_FEWEST = 5
_SAY_AGAIN = 50


@dataclass(frozen=True)
class Slow:
    """A rank that keeps the others waiting.

    Attributes:
        rank: which.
        part: of `PARTS`.
        seconds: its median of a step.
        others: the median of the others.
    """

    rank: int
    part: str
    seconds: float
    others: float


def find_slow(times: np.ndarray, step_seconds: float) -> list[Slow]:
    """Who is slow, and in what; the largest first.

    Args:
        times: (ranks, steps, parts) in seconds; NaN where something was not measured.
        step_seconds: of a whole step.
    """
    world = times.shape[0]
    found = []
    for rank in range(world):
        others = np.median(np.delete(times, rank, axis=0), axis=0)  # (steps, parts)
        for number, part in enumerate(PARTS):
            own, theirs = times[rank, :, number], others[:, number]
            measured = ~np.isnan(own - theirs)
            if measured.sum() < _FEWEST:
                continue
            own, theirs = own[measured], theirs[measured]
            usual = float(np.median(theirs))
            least = max(SHARE * usual, SECONDS, SHARE_OF_STEP * step_seconds)
            above = own - theirs
            if np.median(above) > least and np.quantile(above, 1.0 - _STEADY) > least / 2:
                found.append(Slow(rank, part, float(np.median(own)), usual))
    return sorted(found, key=lambda slow: slow.others - slow.seconds)


@dataclass
class _Step:
    """What was measured of a step; a forward pass on a GPU is a pair of events, which are read later."""

    data: float
    host: float
    total: float
    forward: list[Any] = field(default_factory=list)


class SlowRanks:
    """The measure of this rank, and who is slow among all of them.

    Args:
        every: steps between two looks; None: there are none.
        engine: says where forward passes run, and whether the ranks meet in them.
        hosts: of each rank.
        clock: seconds.
    """

    def __init__(
        self,
        every: int | None,
        engine: Engine,
        hosts: Sequence[str],
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._every = every if engine.ranks.world > 1 else None
        self._ranks = engine.ranks
        self._hosts = hosts
        self._events = engine.device.type == "cuda"
        self._forward = not engine.meets_in_forward
        self._updates_alone = engine.name == "ddp" and not self._events
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        """The run begins, or goes on from a checkpoint."""
        self._left: float | None = None
        self._met: float | None = None
        self._window: list[_Step] = []
        self._looks = 0
        self._said: dict[tuple[int, str], int] = {}

    def arrive(self, waited: float) -> None:
        """This rank comes to the first meeting of a step, after it waited so many seconds for its data."""
        if self._every is None:
            return
        if self._left is None:  # something else came between: an evaluation, a save, the start
            self._window.append(_Step(np.nan, np.nan, np.nan))
            return
        own = self._clock() - self._left
        self._window.append(_Step(waited, max(0.0, own - waited), np.nan))

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Measure a forward pass."""
        if not self._forward or not self._window:
            yield
        elif self._events:
            event: Any = torch.cuda.Event
            begin, end = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._window[-1].forward.append((begin, end))
        else:
            begun = self._clock()
            yield
            self._window[-1].forward.append(self._clock() - begun)

    def noticing(self, agree: Callable[..., Any]) -> Callable[..., Any]:
        """`agree`, and a note of when it was over where it is the last meeting before a rank's own update."""
        if not self._updates_alone:
            return agree

        def noticed(*values: float) -> Any:
            sums = agree(*values)
            self._met = self._clock()
            return sums

        return noticed

    def leave(self) -> None:
        """A step is over; its last meeting was now, or when it was noticed."""
        now = self._met if self._met is not None else self._clock()
        self._met = None
        if self._left is not None and self._window:
            self._window[-1].total = now - self._left
        self._left = now

    def pause(self) -> None:
        """Something other than a step comes next: the time until the next one says nothing."""
        self._left = None

    def look(self, step: int) -> list[str]:
        """After every so many steps, on the main process: what is to be said of slow ranks, a line each.

        All ranks call it after each step: they tell each other what they measured, in one meeting a look.
        A rank that stays slow is named again after fifty looks.
        """
        if self._every is None or step % self._every:
            return []
        window, self._window = self._window, []
        self._met = None  # the meeting here comes after it
        totals = [one.total for one in window if not np.isnan(one.total)]
        times = np.zeros((self._ranks.world, len(window), len(PARTS)))  # zero where another rank has the numbers
        times[self._ranks.rank] = [[one.data, one.host, self._seconds_of(one)] for one in window]
        times = np.array(self._ranks.sum(times.ravel().tolist())).reshape(times.shape)
        self._looks += 1
        if not totals or not self._ranks.main:
            return []
        return [
            self._line(slow, len(window))
            for slow in find_slow(times, float(np.median(totals)))
            if self._is_news((slow.rank, slow.part))
        ]

    def _seconds_of(self, step: _Step) -> float:
        """The forward passes of a step; NaN where they were not measured, or the device is not done with them."""
        if not step.forward:
            return float(np.nan)
        if not self._events:
            return float(sum(step.forward))
        if not all(end.query() for _, end in step.forward):
            return float(np.nan)
        return float(sum(begin.elapsed_time(end) for begin, end in step.forward)) / 1000.0

    def _is_news(self, key: tuple[int, str]) -> bool:
        last = self._said.get(key)
        if last is not None and self._looks - last < _SAY_AGAIN:
            return False
        self._said[key] = self._looks
        return True

    def _line(self, slow: Slow, steps: int) -> str:
        return (
            f"slow rank: rank {slow.rank} ({self._hosts[slow.rank]}) keeps the others waiting in {slow.part}: "
            f"{_WORDS[slow.part]} takes it {1000 * slow.seconds:.0f} ms a step, the others "
            f"{1000 * slow.others:.0f} ms (medians of the last {steps} steps)"
        )
