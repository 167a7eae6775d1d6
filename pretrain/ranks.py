"""The processes of a job, and what they agree on: small values over a group of their own on the CPU.

What lives here: collectives over plain data. What must not: tensors of the model, devices, accelerate.

A job of one process has no group, and everything here gives back what it was given. The group is gloo on every
machine, so that an agreement never waits for a GPU; with `ddp_timeout` it fails rather than waiting for ever.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import numpy as np
import torch
from torch import distributed

PATIENT_SECONDS = 6 * 3600.0
"""How long processes wait where one of them reads or writes all there is; one that is gone shows at once."""


class LostRankError(ConnectionError):
    """Another process of the job is gone, or did not answer within `train.ddp_timeout`."""


class OtherRankError(ValueError):
    """Something failed on another process, which has said what; this one ends with it."""

    told_elsewhere = True


@dataclass(frozen=True)
class Ranks:
    """Which process this is, and the group of all of them.

    Attributes:
        rank: of this process, from 0.
        world: processes of the job.
        local_rank: of this process on its machine.
        group: gloo; None when the job is one process.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    group: Any = None

    @classmethod
    def alone(cls) -> Self:
        """The one process of a job."""
        return cls()

    @classmethod
    def of_job(cls, *, timeout: float) -> Self:
        """The processes of the default group of torch.distributed; `alone` when there is none.

        Args:
            timeout: seconds that a process waits for the others.
        """
        if not distributed.is_initialized():
            return cls()
        world = distributed.get_world_size()
        group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        return cls(
            rank=distributed.get_rank(),
            world=world,
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            group=group if world > 1 else None,
        )

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def another_group(self, *, timeout: float) -> Self:
        """The same processes with a group of their own, for a thread beside the loop. Called by all at one point."""
        if self.world == 1:
            return self
        group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        return type(self)(self.rank, self.world, self.local_rank, group)

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the processes, in float64 (counts are exact up to 2^53)."""
        if self.world == 1:
            return [float(value) for value in values]
        total = torch.tensor(list(values), dtype=torch.float64)
        self._wait(lambda: distributed.all_reduce(total, group=self.group))
        return [float(value) for value in total.tolist()]

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return self.sum([float(flag)])[0] > 0.0

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.sum([0.0])  # gloo waits for nobody where there is nothing to add up

    def gather(self, value: Any) -> list[Any]:
        """The plain data (JSON) of every process, by rank."""
        if self.world == 1:
            return [value]
        data = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(data)
        self._wait(lambda: distributed.all_reduce(sizes, group=self.group))
        longest = int(sizes.max())
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(data)] = torch.from_numpy(data.copy())
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world)]
        self._wait(lambda: distributed.all_gather(parts, mine, group=self.group))
        return [json.loads(bytes(part[:size].tolist())) for part, size in zip(parts, sizes.tolist(), strict=True)]

    def broadcast(self, value: Any) -> Any:
        """The plain data (JSON) of the main process."""
        return self.gather(value if self.main else None)[0]

    def on_main(self, function: Callable[[], Any]) -> Any:
        """What `function`, run by the main process alone, returns (JSON), on every process.

        Raises:
            BaseException: what it raised, there; on the others `OtherRankError`.
        """
        if self.world == 1:
            return function()
        if not self.main:
            result, error = self.broadcast(None)
            if error is not None:
                raise OtherRankError(error)
            return result
        try:
            result = function()
        except (LostRankError, KeyboardInterrupt, SystemExit):  # nobody is told: this process ends
            raise
        except BaseException as error:  # in a thread it would end no process, and the others would wait
            self.broadcast([None, words_of(error)])
            raise
        return self.broadcast([result, None])[0]

    def agree(self, error: Exception | None) -> None:
        """Let all processes end when one has failed: it raises its own error, the others `OtherRankError`."""
        found = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, message in enumerate(found):
            if message is not None:
                raise OtherRankError(f"rank {rank}: {message}")

    def _wait(self, collective: Callable[[], Any]) -> None:
        with self.missed():
            collective()

    @contextmanager
    def missed(self) -> Iterator[None]:
        """Say in plain words when another process is missed, whichever collective it is that finds it out.

        Raises:
            LostRankError: in place of the backend's error.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not _of_connection(error):
                raise
            raise LostRankError(
                f"rank {self.rank} lost the other processes of the job ({str(error).splitlines()[0]}); run the same "
                "command again to go on from the newest checkpoint, and look at what the rank said that ended first"
            ) from error


def words_of(error: BaseException) -> str:
    """An error in words for the other processes; with its kind, where it was not written for a person."""
    return str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"


_CONNECTION = re.compile(r"connection (closed|reset|refused)|timed? ?out|broken pipe|gloo|nccl|socket", re.IGNORECASE)


def _of_connection(error: RuntimeError) -> bool:
    """Whether a backend's error tells of another process: gloo raises plain errors, known by their words alone."""
    return isinstance(error, distributed.DistError) or _CONNECTION.search(str(error)) is not None
