"""What processes agree on: they really wait for each other, and nobody waits for one that failed or is gone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.ranks import LostRankError, OtherRankError, Ranks
from pretrain.training.checkpoint_files import together
from tests.two_ranks import ThreadRanks, two_ranks


def test_plain_data_goes_around() -> None:
    found = two_ranks(lambda ranks: (ranks.gather({"rank": ranks.rank}), ranks.sum([1.0, float(ranks.rank)])))
    assert found == [([{"rank": 0}, {"rank": 1}], [2.0, 1.0])] * 2
    assert Ranks.alone().gather("x") == ["x"]


def test_a_barrier_holds_everybody_until_the_last_one_comes() -> None:
    came: dict[int, float] = {}

    def meet(ranks: ThreadRanks) -> float:
        if ranks.rank == 1:
            time.sleep(0.3)
        came[ranks.rank] = time.monotonic()
        ranks.barrier()
        return time.monotonic()

    left = two_ranks(meet)
    assert min(left) >= max(came.values())


@pytest.mark.parametrize("error", [RuntimeError("out of threads"), MemoryError("no memory"), KeyError("a defect")])
def test_whatever_fails_on_one_rank_is_everybodys_at_once(error: Exception) -> None:
    """In a thread an error ends no process: the others must hear of it."""

    def fail() -> None:
        raise error

    def work(ranks: ThreadRanks) -> None:
        together(ranks, fail if ranks.rank == 1 else lambda: None)

    started = time.monotonic()
    first, second = two_ranks(work)
    assert second is error
    assert isinstance(first, OtherRankError)
    assert f"rank 1: {type(error).__name__}" in str(first)
    first, second = two_ranks(lambda ranks: ranks.on_main(fail))
    assert first is error
    assert isinstance(second, OtherRankError)
    assert time.monotonic() - started < 30


_GOES = """
import os, sys, time
from torch import distributed
from pretrain.ranks import PATIENT_SECONDS, Ranks, LostRankError
distributed.init_process_group("gloo")
ranks = Ranks.of_job(timeout=60).another_group(timeout=PATIENT_SECONDS)
ranks.barrier()
if ranks.rank:
    time.sleep(0.5)
    os._exit(9)
started = time.monotonic()
try:
    ranks.barrier()
except LostRankError as error:
    print("lost", time.monotonic() - started, flush=True)
    os._exit(0)
"""


def test_one_that_is_gone_is_missed_at_once_however_long_the_others_would_wait(tmp_path: Path) -> None:
    """Two real processes: some seconds."""
    from pretrain.launching.processes import free_port

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _GOES],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = processes[0].communicate(timeout=100)[0]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    word, seconds = said.split()
    assert word == "lost"
    assert float(seconds) < 30
    assert issubclass(LostRankError, OSError), "and so it must not be taken for a disk that failed"
