"""Failures, saves and goodput: Young's rule gives the known table."""

from __future__ import annotations

import pytest
import torch

from pretrain.models import loom_config, model_from_config
from pretrain.planning.facts import model_facts
from pretrain.planning.failures import checkpoint_bytes, reliability, stall_seconds


# GPUs, hours between failures of one, stall and restart in seconds -> minutes between saves, goodput
@pytest.mark.parametrize(
    ("gpus", "hours", "stall", "restart", "minutes", "goodput"),
    [
        (8, 10_000, 5, 300, 112, 0.998),
        (64, 10_000, 5, 300, 40, 0.995),
        (512, 10_000, 5, 300, 14, 0.984),
        (512, 50_000, 60, 900, 107, 0.979),
        (4096, 10_000, 60, 900, 17, 0.78),
        (4096, 50_000, 5, 300, 11, 0.978),
    ],
)
def test_goodput(gpus: int, hours: float, stall: float, restart: float, minutes: float, goodput: float) -> None:
    found = reliability(gpus, hours, stall, restart, compute_seconds=1e6)
    assert found.interval / 60 == pytest.approx(minutes, rel=0.04)
    assert found.goodput == pytest.approx(goodput, abs=0.015)
    assert found.failures == pytest.approx(1e6 / found.goodput / (hours * 3600 / gpus))


def test_the_interval_is_the_best() -> None:
    best = reliability(512, 10_000, 30, 300, 1e6)

    def lost(interval: float) -> float:
        return 30 / interval + (interval / 2 + 300) / best.mttf

    assert lost(best.interval) < min(lost(0.7 * best.interval), lost(1.4 * best.interval))


def test_a_save_never_takes_most_of_the_time() -> None:
    assert reliability(100_000, 100, 600, 300, 1e6).interval >= 10 * 600


def test_checkpoints_hold_parameters_and_moments() -> None:
    with torch.device("meta"):
        facts = model_facts(model_from_config(loom_config("llama")))
    assert checkpoint_bytes(facts, "adamw") == 12 * facts.size
    assert checkpoint_bytes(facts, "muon") == 12 * facts.size - 4 * sum(facts.layer_matrices)


def test_background_saves_wait_for_the_copy_alone() -> None:
    keys = {"copy_rate": 1e10, "write_rate": 1e9}
    assert stall_seconds(8e10, 8, 1, asynchronous=True, sharded=True, **keys) == 1.0
    assert stall_seconds(8e10, 8, 2, asynchronous=False, sharded=True, **keys) == 41.0
    assert stall_seconds(8e10, 8, 2, asynchronous=False, sharded=False, **keys) == 88.0
