"""Schedules: bounded, continuous, rising while warming up, ending where they should."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config_loop import ScheduleConfig
from pretrain.training.schedule import learning_rate_scale

KINDS = ("constant", "cosine", "linear", "inverse-sqrt", "wsd")


def schedule(kind: str, warmup: int, decay: int, final: float) -> ScheduleConfig:
    keys = {"decay": decay} if kind == "wsd" else {}
    return ScheduleConfig(kind=kind, warmup=warmup, final=final, **keys)


@st.composite
def runs(draw: st.DrawFn) -> tuple[ScheduleConfig, int, int, int]:
    total = draw(st.integers(1, 400))
    warmup = draw(st.integers(0, total))
    decay = draw(st.integers(0, total - warmup))
    final = draw(st.floats(0.0, 1.0))
    return schedule(draw(st.sampled_from(KINDS)), warmup, decay, final), total, warmup, decay


@settings(max_examples=200, deadline=None)
@given(runs())
def test_bounded_continuous_and_rising_in_warmup(run: tuple[ScheduleConfig, int, int, int]) -> None:
    config, total, warmup, decay = run
    scales = [learning_rate_scale(step, total, config) for step in range(total + 3)]
    assert all(0.0 <= scale <= 1.0 for scale in scales)
    assert scales[0] > 0.0
    rising = scales[: min(warmup, total - 1) + 1]
    assert all(before < after for before, after in pairwise(rising))
    assert all(a >= b for a, b in pairwise(scales[warmup:])), "falls or stays after"
    # A linear piece of n steps moves by 1/n a step, a cosine by at most pi/2 of that, 1 - sqrt by sqrt(1/n) at first.
    falling = total - warmup
    bound = {
        "constant": 0.0,
        "cosine": math.pi / 2 / max(1, falling),
        "linear": 1 / max(1, falling),
        "inverse-sqrt": 1 / (warmup + 1),
        "wsd": math.sqrt(1 / max(1, decay)),
    }[config.kind]
    bound = max(bound, 1 / (warmup + 1)) + 1e-12
    assert all(abs(a - b) <= bound for a, b in pairwise(scales))


@settings(max_examples=100, deadline=None)
@given(runs())
def test_end_value(run: tuple[ScheduleConfig, int, int, int]) -> None:
    config, total, warmup, _ = run
    end = learning_rate_scale(total, total, config)
    if config.kind in ("cosine", "linear", "wsd"):
        assert end == config.final
    elif config.kind == "inverse-sqrt":
        assert end == min(1.0, max(config.final, math.sqrt((warmup + 1) / (total + 1))))
    else:
        assert end == 1.0
    assert learning_rate_scale(total + 10, total, config) <= end


def test_known_values() -> None:
    assert learning_rate_scale(0, 100, schedule("cosine", 9, 0, 0.0)) == pytest.approx(0.1)
    assert learning_rate_scale(9, 100, schedule("cosine", 9, 0, 0.0)) == 1.0
    assert learning_rate_scale(50, 100, schedule("cosine", 0, 0, 0.2)) == pytest.approx(0.6)
    assert learning_rate_scale(25, 100, schedule("linear", 0, 0, 0.0)) == pytest.approx(0.75)
    assert learning_rate_scale(39, 100, schedule("inverse-sqrt", 9, 0, 0.0)) == pytest.approx(0.5)
    assert learning_rate_scale(80, 100, schedule("wsd", 0, 20, 0.0)) == 1.0
    assert learning_rate_scale(85, 100, schedule("wsd", 0, 20, 0.0)) == pytest.approx(0.5)
    assert learning_rate_scale(85, 100, schedule("wsd", 0, 20, 0.5)) == pytest.approx(0.75)
    assert learning_rate_scale(7, 100, schedule("constant", 0, 0, 0.0)) == 1.0


def test_shares_of_the_run() -> None:
    config = ScheduleConfig(kind="wsd", warmup="10%", decay="50%")
    assert learning_rate_scale(10, 100, config) == 1.0
    assert learning_rate_scale(9, 100, config) < 1.0
    assert learning_rate_scale(50, 100, config) == 1.0
    assert learning_rate_scale(51, 100, config) < 1.0


def test_two_shares_that_round_up_are_no_error() -> None:
    config = ScheduleConfig(kind="wsd", warmup="50%", decay="50%")
    assert [learning_rate_scale(step, 3, config) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.0])


@pytest.mark.parametrize(
    ("config", "key"),
    [(schedule("cosine", 11, 0, 0.0), "schedule.warmup"), (schedule("wsd", 6, 8, 0.0), "schedule.decay")],
)
def test_longer_than_the_run_is_refused(config: ScheduleConfig, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        learning_rate_scale(0, 10, config)
