"""A slow rank is named within one window, by part; chance, uneven logs and pauses name nobody."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.training.slow_ranks import SlowRanks, find_slow


def even(draw: np.random.Generator, world: int, steps: int, spread: float, tail: float) -> np.ndarray:
    """Times of ranks that do the same: (world, steps, parts), lognormal, now and then ten times as long."""
    base = np.array([0.0005, 0.002, 0.2])
    times = base * np.exp(spread * draw.standard_normal((world, steps, 3)))
    return np.where(draw.random((world, steps, 3)) < tail, 10 * times, times)


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("spread", [0.02, 0.3, 0.6])
def test_an_even_run_names_nobody(world: int, spread: float) -> None:
    """700 windows of 20 steps; single steps differ by half and more, and some are ten times as long."""
    draw = np.random.default_rng(world)
    named = [slow for _ in range(700) for slow in find_slow(even(draw, world, 20, spread, tail=0.03), 0.5)]
    assert not named


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_slow_rank_is_named_in_each_window(world: int, part: int) -> None:
    draw = np.random.default_rng(7)
    for _ in range(200):
        times = even(draw, world, 20, 0.05, tail=0.0)
        times[:, 7] *= 10  # a step that is slow for all
        times[0, 11] *= 10  # and one that is slow for another rank
        times[1, :, part] += 0.05 if part < 2 else 0.1
        (slow,) = find_slow(times, 0.5)
        assert (slow.rank, slow.part) == (1, ("data", "host", "forward")[part])
        assert slow.seconds - slow.others == pytest.approx(0.05 if part < 2 else 0.1, rel=0.3)


def test_what_does_not_matter_is_not_named() -> None:
    times = np.zeros((2, 20, 3))
    times[1, :, 1] = 0.009
    assert find_slow(times, 0.1) == []  # 9 ms
    times[1, :, 1] = 0.05
    assert find_slow(times, 10.0) == []  # half a percent of a step
    assert find_slow(times, 0.5)
    times[1, ::2, 1] = 0.0  # every other step alone
    assert find_slow(times, 0.5) == []
    times[1, :, 1] = np.nan
    assert find_slow(times, 0.5) == []


class Clock:
    """Seconds that pass when somebody says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def job(world: int, every: int = 20, name: str = "ddp") -> tuple[list[SlowRanks], list[Clock], list[list[Any]]]:
    """The measures of all ranks in one process; who looks last hears what all have told."""
    told: list[list[Any]] = [[] for _ in range(world)]
    clocks = [Clock() for _ in range(world)]
    made = []
    for rank in range(world):

        def add(values: list[float], rank: int = rank) -> list[float]:
            told[rank] = values
            return [sum(column) for column in zip(*filter(None, told), strict=True)]

        engine: Any = SimpleNamespace(
            ranks=SimpleNamespace(world=world, rank=rank, main=rank == 0, sum=add),
            device=torch.device("cpu"),
            meets_in_forward=name == "fsdp2",
            name=name,
        )
        made.append(SlowRanks(every, engine, [f"node{number}" for number in range(world)], clock=clocks[rank]))
    return made, clocks, told


def step(
    made: SlowRanks, clock: Clock, *, data: float = 0.0, host: float = 0.001, forward: float = 0.01, wait: float = 0.0
) -> None:
    clock.now += host + data
    made.arrive(data)
    clock.now += wait  # the others are not there yet
    with made.computing():
        clock.now += forward / 2
    with made.computing():
        clock.now += forward / 2
    clock.now += 0.03  # the backward pass
    made.leave()


@pytest.mark.parametrize(
    ("slowness", "told"),
    [
        ({"data": 0.05}, "in data: the wait for its data takes it 50 ms a step, the others 0 ms"),
        ({"host": 0.05}, "in host: the work between steps takes it 50 ms a step, the others 1 ms"),
        ({"forward": 0.06}, "in forward: the forward pass takes it 60 ms a step, the others 10 ms"),
    ],
)
def test_the_rank_its_host_and_its_part_are_named(slowness: dict[str, float], told: str) -> None:
    made, clocks, _ = job(2)
    for _ in range(20):
        step(made[0], clocks[0], wait=0.05)
        step(made[1], clocks[1], **slowness)
    made[1].look(20)
    (line,) = made[0].look(20)
    assert line.startswith("slow rank: rank 1 (node1) keeps the others waiting")
    assert told in line
    for _ in range(20):
        step(made[0], clocks[0], wait=0.05)
        step(made[1], clocks[1], **slowness)
    made[1].look(40)
    assert made[0].look(40) == []  # once said is enough for a while


@pytest.mark.parametrize(("name", "named"), [("ddp", True), ("fsdp2", False)])
def test_an_update_that_each_rank_makes_by_itself_is_its_own_work(name: str, named: bool) -> None:
    """The others wait for it at the first meeting of the next step. Sharded ranks meet in the update itself."""
    made, clocks, _ = job(2, name=name)
    for number in range(1, 21):
        for rank, update in ((0, 0.002), (1, 0.05)):
            clocks[rank].now += 0.001
            made[rank].arrive(0.0)
            clocks[rank].now += 0.05 - update  # the other one is not there yet
            agreed = made[rank].noticing(lambda *values: [*values, 1.0])(2.0)
            assert agreed == [2.0, 1.0]
            clocks[rank].now += update
            assert number == 20 or made[rank].look(number) == []
            made[rank].leave()
    made[1].look(20)
    said = made[0].look(20)
    assert [line.startswith("slow rank: rank 1 (node1) keeps the others waiting in host") for line in said] == (
        [True] if named else []
    )


def test_between_looks_nobody_meets() -> None:
    made, clocks, told = job(2)
    for number in range(1, 20):
        step(made[0], clocks[0])
        assert made[0].look(number) == []
    assert told == [[], []]


def test_what_comes_between_steps_is_not_held_against_anybody() -> None:
    """An evaluation, or a save that the main process writes, is no slow step."""
    made, clocks, _ = job(2)
    for _ in range(20):
        for rank in (0, 1):
            made[rank].pause()
            clocks[rank].now += 3.0 if rank == 0 else 0.1
            step(made[rank], clocks[rank])
    made[1].look(20)
    assert made[0].look(20) == []


def test_sharded_forward_passes_are_not_compared() -> None:
    """In fsdp2 a rank's forward pass holds the others' slowness."""
    made, clocks, told = job(2, name="fsdp2")
    for _ in range(20):
        step(made[0], clocks[0])
        step(made[1], clocks[1], forward=0.5)
    made[1].look(20)
    assert made[0].look(20) == []
    assert np.isnan(np.array(told[1]).reshape(2, 20, 3)[1, :, 2]).all()


def test_one_process_and_no_wish_measure_nothing() -> None:
    for world, every in ((1, 20), (2, None)):
        made, clocks, told = job(world, every)  # type: ignore[arg-type]
        for number in range(1, 41):
            step(made[0], clocks[0], forward=1.0)
            assert made[0].look(number) == []
        assert told[0] == []
