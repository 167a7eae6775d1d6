"""One trajectory on any engine: the same rows, rates and losses however the work is split, and from any checkpoint.

`python scripts/elastic.py docs/elastic.md` makes all 121 pairs of the matrix; the six here go once around the engines.
"""

from __future__ import annotations

import math
from pathlib import Path

import elastic
import pytest
import tiny
from elastic import SECTIONS, STATES, State

from pretrain.config import load_config
from pretrain.strategy import read_launch, resolve_strategy

PAIRS = (
    (State("single", 1), State("zero3", 2)),
    (State("zero3", 2), State("fsdp2", 2)),
    (State("fsdp2", 2), State("ddp", 2)),
    (State("ddp", 2), State("zero1", 2)),
    (State("zero2", 2), State("single", 1)),
    (State("zero1", 1), State("fsdp2", 1)),
)


def test_six_pairs_of_the_matrix(tmp_path: Path) -> None:
    for pair in elastic.pairs(tmp_path, PAIRS):
        assert not pair.problem, f"{pair.saved_by} -> {pair.resumed_by}: {pair.problem}"
        assert pair.loss <= elastic.BOUND
        assert pair.compared > 100


def test_a_relay_of_four_engines_is_one_run(tmp_path: Path) -> None:
    loss, problem = elastic.relayed(tmp_path)
    assert not problem
    assert loss <= elastic.BOUND


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [("muon", "fp32"), pytest.param("adamw", "fp32", marks=pytest.mark.slow)]
    + [pytest.param(optimizer, "bf16", marks=pytest.mark.slow) for optimizer in ("muon", "adamw")],
)
def test_every_engine_makes_the_same_run(tmp_path: Path, optimizer: str, precision: str) -> None:
    """50 steps; two processes, and one of each kind of engine."""
    states = [state for state in STATES if state.processes == 2 or state.strategy in ("fsdp2", "zero3")]
    for found in elastic.parity(tmp_path, [(optimizer, precision)], states=states).values():
        for state, (_, problem) in found.items():
            assert not problem, f"{state}: {problem}"


def test_more_processes_than_rows_in_a_micro_batch(tmp_path: Path) -> None:
    """3 rows over 2 processes, one at a time: one of them idles through a micro-batch. Masked targets, BERT."""
    sections = {
        "model": {"architecture": "bert", "hidden_dropout": 0.1},
        "train": {"steps": 8, "batch_tokens": 96, "micro_batch": 1, "precision": "fp32"},
        "data": {"sequence_length": 32},
        "evaluate": {"every": 4, "max_tokens": 480},
    }
    base = tiny.make(tmp_path / "base", **sections)
    states = (STATES[0], State("ddp", 2), State("fsdp2", 2), State("zero3", 2))
    legs = [(state, elastic.leg(tiny.copy(base, tmp_path / state.folder), state)) for state in states]
    straight, *others = elastic.race(legs, tmp_path / "job")
    assert not straight.error
    for state, found in zip(states[1:], others, strict=True):
        loss, problem = elastic.judge(found, straight, first=1, state=state)
        assert not problem, f"{state}: {problem}"
        assert loss <= elastic.BOUND


def test_settings_of_the_engines_change_nothing(tmp_path: Path) -> None:
    """Gradient checkpointing, offload and hybrid sharding: the run of one process without them."""
    sections = {**SECTIONS, "train": {**SECTIONS["train"], "steps": 6}}
    base = tiny.make(tmp_path / "base", **sections)
    settings = [
        (State("ddp", 2), "train.gradient_checkpointing=true"),
        (State("fsdp2", 2), "train.gradient_checkpointing=true"),
        (State("zero3", 2), "train.gradient_checkpointing=true"),
        (State("fsdp2", 2), "train.offload=all"),
        (State("fsdp2", 2), "train.shard_size=1"),
        (State("zero2", 2), "train.offload=optimizer"),
    ]
    legs = [(STATES[0], elastic.leg(tiny.copy(base, tmp_path / "straight"), STATES[0]))]
    for number, (state, override) in enumerate(settings):
        legs.append((state, elastic.leg(tiny.copy(base, tmp_path / str(number)), state, override)))
    straight, *others = elastic.race(legs, tmp_path / "job")
    for (state, override), found in zip(settings, others, strict=True):
        _, problem = elastic.judge(found, straight, first=1, state=state)
        assert not problem, f"{state} with {override}: {problem}"


def test_a_stop_signal_to_one_of_two_processes_stops_both(tmp_path: Path) -> None:
    base = tiny.make(tmp_path / "base", **SECTIONS)
    states = [State(strategy, 2) for strategy in ("ddp", "fsdp2", "zero2")]
    runs = [tiny.copy(base, tmp_path / state.folder) for state in states]
    legs = [
        (state, elastic.leg(run, state, stop_after=step, stop_rank=1))
        for step in (3, 7)
        for state, run in zip(states, runs, strict=True)
    ]
    for (state, leg), found in zip(legs, elastic.race(legs, tmp_path / "job"), strict=True):
        assert found.code == 75, f"{state} at step {leg.stop_after}: {found.error}"
        assert max(found.losses) == leg.stop_after
        assert all(math.isfinite(loss) for loss in found.losses.values())


LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("overrides", "environment", "words"),
    [
        (("train.strategy=single",), {}, r"single runs on one process, but 2 were launched"),
        (("train.processes=3",), {}, r"train.processes: 3 were asked for, but this job has 2.*--processes 3"),
        (("train.batch_tokens=32",), {}, r"1 rows of 32, fewer than the 2 processes; raise it .* to 64"),
        (("train.strategy=ddp",), {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, r"configured for fsdp2"),
        ((), {"ACCELERATE_USE_FSDP": "true"}, r"FSDP version 1 is not supported"),
        ((), {"ACCELERATE_MIXED_PRECISION": "bf16"}, r"train.precision: fp32 was asked for.*bf16"),
        ((), {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, r"gradient_accumulation_steps 4 has no place here"),
        ((), {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, r"dynamo_backend is inductor, but train.compile is False"),
        (("train.offload=optimizer",), {}, r"train.offload: optimizer is of zero1, zero2, zero3, not of ddp"),
        (("train.shard_size=2",), {}, r"hybrid sharding is of fsdp2, not of ddp"),
        (("train.check_replicas=5", "train.strategy=zero3"), {}, r"there is one copy of the weights"),
    ],
)
def test_what_was_launched_must_be_what_was_asked_for(
    tmp_path: Path, overrides: tuple[str, ...], environment: dict[str, str], words: str
) -> None:
    run = tiny.make(tmp_path)
    with pytest.raises(ValueError, match=words):
        resolve_strategy(load_config(run.config, overrides), read_launch(LAUNCHED | environment))
