"""Failures on paper: how often, how often to save, and what share of the time is left for training.

What lives here: Young's rule and the arithmetic around it. What must not: rates of failure (`assumptions`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.planning.facts import ModelFacts


@dataclass(frozen=True)
class Reliability:
    """What to expect of a job.

    Attributes:
        mttf: seconds between failures of the whole job.
        interval: seconds between saves.
        goodput: share of the time that trains.
        failures: to expect over the job.
    """

    mttf: float
    interval: float
    goodput: float
    failures: float


def reliability(gpus: int, mttf_hours: float, stall: float, restart: float, compute_seconds: float) -> Reliability:
    """The best interval between saves, and what failures and saves cost.

    interval = sqrt(2 stall MTTF) (Young 1974). A failure costs half an interval and the restart.

    Args:
        gpus: of the job; each may end it.
        mttf_hours: GPU-hours between failures.
        stall: seconds that training waits for a save.
        restart: seconds from a failure to the first step after it.
        compute_seconds: of the job without failures and saves.
    """
    mttf = max(1.0, 3600.0 * mttf_hours / gpus)
    interval = max(math.sqrt(2 * stall * mttf), 10 * stall, 1.0)
    between = interval / (interval + stall)
    goodput = between * max(0.01, 1.0 - (interval / 2 + restart) / mttf)
    return Reliability(mttf, interval, goodput, compute_seconds / goodput / mttf)


def checkpoint_bytes(facts: ModelFacts, optimizer: str) -> float:
    """Bytes of a checkpoint: fp32 parameters, and the optimizer's tensors of those that are trained."""
    matrices = sum(facts.layer_matrices) if optimizer == "muon" else 0
    return 4.0 * (facts.size + 2 * facts.trainable - matrices)


def stall_seconds(
    size: float, gpus: int, nodes: int, *, asynchronous: bool, sharded: bool, copy_rate: float, write_rate: float
) -> float:
    """Seconds that training waits for a save of `size` bytes: for the copy, or for the disk.

    Args:
        size: of the checkpoint.
        gpus: of the job.
        nodes: that write.
        asynchronous: whether it is written in the background.
        sharded: whether each process takes its share.
        copy_rate: bytes/s from a GPU to main memory.
        write_rate: bytes/s of a node.
    """
    copy = size / (gpus if sharded else 1) / copy_rate
    return copy if asynchronous else copy + size / (nodes if sharded else 1) / write_rate
