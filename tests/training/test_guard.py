"""The guard: one bad step is one skipped step, windows are never poisoned, and nothing is skipped for ever."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from rich.console import Console
from test_trainer import RaggedData, Store, Toy, config, lines, losses, weights

from pretrain.training.checkpoint import optimizer_state_by_name
from pretrain.training.guard import LEAST, Guard, GuardState, NonFiniteError, SpikeError
from pretrain.training.optim import build_optimizer
from pretrain.training.pending import AtOnce
from pretrain.training.progress import Progress
from pretrain.training.trainer import Trainer

GUARD = Guard(on_nonfinite="skip", sigma=6.0, window=128)


def noise(steps: int, level: float = 3.0, spread: float = 0.02, seed: int = 0) -> np.ndarray:
    return level + spread * np.random.default_rng(seed).standard_normal(steps)


def judged(values: Any, guard: Guard = GUARD, state: GuardState | None = None) -> tuple[list[str], GuardState]:
    """Why each step was found fault with, when loss and norm are both `values`, and what is remembered."""
    state = state or GuardState()
    return [guard.judge(state, float(value), float(value)).why for value in values], state


# --- the judgement ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "norm"])
def test_one_step_that_is_not_finite_is_one_skipped_step(bad: float, where: str) -> None:
    """A NaN in the window would make every later comparison false, or skip a window's length."""
    values, state = noise(600), GuardState()
    for step, value in enumerate(values):
        loss, norm = (bad, value) if where == "loss" else (value, bad)
        verdict = GUARD.judge(state, loss, norm) if step in (5, 300) else GUARD.judge(state, value, value)
        assert verdict.update == (step not in (5, 300))
    assert state.skipped == {"not finite": 2}
    assert np.isfinite([*state.losses, *state.norms]).all()
    assert GUARD.judge(state, 300.0, 3.0).why == "spike"


@pytest.mark.parametrize("length", [1, 30])
def test_poisoned_batches_alone_are_skipped(length: int) -> None:
    values = noise(500)
    values[200 : 200 + length] *= 100
    found, state = judged(values)
    assert found == ["spike" if 200 <= step < 200 + length else "" for step in range(500)]
    assert state.skipped == {"spike": length}
    assert max(state.losses) < 4


def test_loss_and_norm_each_make_a_spike() -> None:
    _, state = judged(noise(200))
    assert "loss 9 is" in GUARD.judge(state, 9.0, 3.0).detail
    assert "gradient norm 9 is" in GUARD.judge(state, 3.0, 9.0).detail
    both = GUARD.judge(state, 9.0, 9.0).detail
    assert "loss 9 is" in both
    assert "gradient norm 9 is" in both
    assert GUARD.judge(state, 0.1, 0.1).update  # below the mean is no spike


def test_nothing_is_judged_before_half_the_window() -> None:
    for window, needed in ((128, 64), (40, 20), (20, LEAST), (8, 8)):
        guard = Guard(sigma=6.0, window=window)
        for steps, expected in ((needed - 1, ""), (needed, "spike")):
            found, _ = judged([*noise(steps), 300.0], guard)
            assert found[-1] == expected, (window, steps)


def test_without_sigma_only_what_is_not_finite_is_found() -> None:
    found, state = judged([*noise(200), 1e9, math.nan], Guard(on_nonfinite="skip"))
    assert found == [""] * 201 + ["not finite"]
    assert state.losses == []


def test_a_new_level_is_taken_after_half_a_window() -> None:
    """No weight changes while steps are skipped, so so many in a row are the level: of other data, say."""
    values = np.concatenate([noise(300), noise(300, level=5.0, seed=1)])
    found, state = judged(values)
    assert found[300:364] == ["spike"] * GUARD.patience == ["spike"] * 64
    assert found[364] == "new level"
    assert found[365:] == [""] * 235
    assert len(state.losses) == 128
    assert min(state.losses) > 4


def test_many_steps_in_a_row_that_are_not_finite_end_the_run() -> None:
    _, state = judged(noise(100))
    verdicts = [GUARD.judge(state, math.nan, 1.0) for _ in range(64)]
    assert [verdict.stop for verdict in verdicts] == [False] * 63 + [True]
    scattered = GuardState()
    for _ in range(300):  # every other step: training goes on
        assert not GUARD.judge(scattered, math.nan, 1.0).stop
        assert GUARD.judge(scattered, 3.0, 3.0).update


def test_policies() -> None:
    assert Guard(on_nonfinite="stop").judge(GuardState(), math.nan, 1.0).stop
    for policy, update, stop in (("skip", False, False), ("stop", False, True), ("log", True, False)):
        guard = Guard(sigma=6.0, on_spike=policy)  # type: ignore[arg-type]
        _, state = judged(noise(200), guard)
        verdict = guard.judge(state, 300.0, 3.0)
        assert (verdict.update, verdict.stop, verdict.why) == (update, stop, "spike")
        assert verdict.numbers() == ({"spike": 1.0} if update else {"skipped": 1.0})


def test_a_logged_spike_does_not_blind_the_guard() -> None:
    """It enters the window as the threshold that it passed; as it is, it would hide the next ones."""
    values = noise(400)
    values[[200, 210, 220]] *= 2
    found, state = judged(values, Guard(sigma=6.0, on_spike="log"))
    assert [step for step, why in enumerate(found) if why] == [200, 210, 220]
    assert max(state.losses) < 3.5


def test_values_that_hardly_differ_make_no_spike_of_the_next() -> None:
    assert set(judged([1.0] * 200 + [1.001] + [0.0] * 200 + [0.0])[0]) == {""}
    assert judged([1.0] * 200 + [1.1])[0][-1] == "spike"


def test_a_scalers_search_is_neither_fault_nor_spike() -> None:
    guard = Guard(on_nonfinite="stop", sigma=6.0, on_spike="stop", scaled=True)
    state = GuardState()
    for _ in range(16):  # 65,536 halved down to 1
        verdict = guard.judge(state, 9.0, math.inf)
        assert (verdict.why, verdict.update, verdict.stop) == ("overflow", False, False)
    assert set(judged(noise(300), guard, state)[0]) == {""}
    assert guard.judge(state, math.nan, math.nan).stop  # the loss itself is no matter of scale
    endless = [guard.judge(GuardState(in_a_row=number), 9.0, math.inf).stop for number in (0, 62, 63)]
    assert endless == [False, False, True]


# --- no false skips -----------------------------------------------------------------------------------------------


def by_median(values: np.ndarray, sigma: float = 6.0, window: int = 128) -> list[int]:
    """Steps that median and absolute deviation would skip, for comparison."""
    kept: list[float] = []
    skipped = []
    for step, value in enumerate(values):
        if len(kept) >= window // 2:
            middle = float(np.median(kept))
            if value > middle + sigma * 1.4826 * float(np.median(np.abs(np.array(kept) - middle))):
                skipped.append(step)
                continue
        kept = [*kept, float(value)][-window:]
    return skipped


SEQUENCES = {
    "a loss that falls": lambda steps, draw: 2.5 + 7 * np.exp(-steps / 60) + 0.05 * draw,
    "a norm that rises with the warm-up, then falls": lambda steps, draw: (
        np.exp(np.minimum(steps, 200) / 60 - np.maximum(steps - 200, 0) / 100) * np.exp(0.15 * draw)
    ),
    "a norm with heavy tails": lambda steps, draw: 0.5 * np.exp(0.35 * draw),
    "batches of two kinds": lambda steps, draw: np.where(steps % 10 == 3, 3.0, 1.2) + 0.02 * draw,
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_harmless_sequences_are_left_alone(name: str) -> None:
    steps = np.arange(2000)
    for seed in range(3):
        values = SEQUENCES[name](steps, np.random.default_rng(seed).standard_normal(2000))
        state = GuardState()
        for value in values.tolist():
            pair = (3.0, value) if "norm" in name else (value, 1.0)
            assert GUARD.judge(state, *pair).why == ""


def test_a_median_would_skip_the_rarer_kind_for_ever() -> None:
    steps = np.arange(2000)
    values = SEQUENCES["batches of two kinds"](steps, np.random.default_rng(0).standard_normal(2000))
    assert len(by_median(values)) > 150


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 0.01), ("muon", 0.05)])
def test_real_training_from_its_first_step_is_left_alone(tmp_path: Path, optimizer: str, rate: float) -> None:
    """A loss that falls from the first step on, with warm-up: no step is found fault with at 6 or at 4 deviations."""
    keys = {"steps": 300, "batch_tokens": 64}
    configuration = config(tmp_path, train=keys, optimizer={"name": optimizer, "lr": rate}, evaluate={"every": 400})
    made = trainer(configuration, Toy(), data=Learnable())
    made.train()
    curve = [(line["loss"], line["grad_norm"]) for line in lines(made.directory) if "loss" in line]
    assert curve[-1][0] < 0.7 * curve[0][0]
    for sigma in (6.0, 4.0):
        state = GuardState()
        assert not any(Guard(sigma=sigma).judge(state, *values).why for values in curve)


# --- in a run -----------------------------------------------------------------------------------------------------


class Learnable(RaggedData):
    """Rows in which one token follows from the one before."""

    def batch(self, step: int, rows: slice | None = None) -> Any:
        made = super().batch(step, rows)
        made.arrays["labels"][:] = np.where(
            made.arrays["labels"] == -100, -100, (made.arrays["input_ids"] * 5 + 1) % 32
        )
        return made


class Poisoned(Toy):
    """Toy whose loss is multiplied at some steps, by the ids of what it is given: a restart changes nothing."""

    def __init__(self, factors: dict[int, float], dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.factors = {tuple(RaggedData().batch(step).arrays["input_ids"][0]): by for step, by in factors.items()}

    def forward(self, **batch: Any) -> SimpleNamespace:
        factor = self.factors.get(tuple(batch["input_ids"][0].tolist()), 1.0)
        return SimpleNamespace(loss=super().forward(**batch).loss * factor)


def trainer(configuration: Any, model: Toy, *, data: Any = None, evaluators: Any = None) -> Trainer:
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Trainer(
        configuration,
        model=model,
        data=data or RaggedData(),
        optimizer=build_optimizer(model, configuration.optimizer),
        store=Store(),
        evaluators=evaluators,
        console=Console(file=StringIO(), width=80),
    )


GUARDED = {"steps": 40, "on_nonfinite": "skip", "spike_sigma": 6.0, "spike_window": 16}
FACTORS = {2: math.nan, 24: 100.0, 31: math.inf, 33: 100.0}  # batches, from 0


def skipped(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "skipped.jsonl").read_text().splitlines()]


def test_bad_steps_are_skipped_logged_and_named(tmp_path: Path) -> None:
    configuration = config(tmp_path, train={**GUARDED, "micro_batch": 3}, log={"every": 50})
    made = trainer(configuration, Poisoned(FACTORS))
    progress = made.train().progress
    assert weights(made.engine.bare).isfinite().all()
    assert progress.guard.skipped == {"not finite": 2, "spike": 2}
    entries = skipped(made.directory)
    assert [(entry["step"], entry["why"], entry["skipped"]) for entry in entries] == [
        (3, "not finite", True),
        (25, "spike", True),
        (32, "not finite", True),
        (34, "spike", True),
    ]
    assert entries[1]["rows"] == list(range(8 * 24, 8 * 25))  # the batch that led to line `step 25`
    logged = {line["step"]: line for line in lines(made.directory) if "loss" in line}
    assert set(logged) == {3, 25, 32, 34, 40}  # a bad step is logged whatever log.every says
    assert [step for step, line in logged.items() if line.get("skipped") == 1] == [3, 25, 32, 34]
    assert math.isnan(logged[3]["loss"])
    assert not math.isfinite(logged[32]["loss"])
    assert '"loss": NaN' in (made.directory / "metrics.jsonl").read_text()
    shown = made.console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 25: loss" in shown
    assert f"`pretrain inspect {made.directory / 'config.yaml'} --step 25` shows them" in shown
    assert "rows 192, 193, 194, 195, 196, 197, 198, 199;" in shown


def test_a_skipped_step_changes_nothing_but_where_the_run_stands(tmp_path: Path) -> None:
    made = trainer(config(tmp_path, train=GUARDED), Poisoned(FACTORS))
    state: list[Any] = []
    step = made._step

    def watched(progress: Progress, *rest: Any) -> None:
        before = snapshot()
        step(progress, *rest)
        state.append((before == snapshot(), progress.samples))

    def snapshot() -> list[bytes]:
        tensors = optimizer_state_by_name(made.engine.bare, made.engine.optimizer).tensors
        return [weights(made.engine.bare).numpy().tobytes(), *(tensors[name].numpy().tobytes() for name in tensors)]

    made._step = watched  # type: ignore[method-assign]
    made.train()
    assert [number for number, (same, _) in enumerate(state) if same] == sorted(FACTORS)
    assert [samples for _, samples in state] == [8 * step for step in range(1, 41)]


@pytest.mark.parametrize("stop_at", [3, 20, 25, 32])
def test_an_interrupted_run_with_skips_is_the_uninterrupted_one(tmp_path: Path, stop_at: int) -> None:
    whole = trainer(config(tmp_path / "whole", train=GUARDED), Poisoned(FACTORS, dropout=0.3))
    expected = whole.train().progress

    def stopping(model: torch.nn.Module, context: Any) -> dict[str, float]:
        if context.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0}

    cut = config(tmp_path / "cut", train=GUARDED, evaluate={"every": 1})
    first = trainer(cut, Poisoned(FACTORS, dropout=0.3), evaluators={"stop": stopping}).train()
    assert first.progress.step == stop_at
    again = trainer(cut, Poisoned(FACTORS, dropout=0.3))
    progress = again.train().progress
    assert repr(losses(again.directory)) == repr(losses(whole.directory))  # NaN is not equal to itself
    assert torch.equal(weights(again.engine.bare), weights(whole.engine.bare))
    assert asdict(progress.guard) == asdict(expected.guard)
    assert repr(skipped(again.directory)) == repr(skipped(whole.directory))


def test_what_is_remembered_survives_as_plain_data() -> None:
    _, state = judged(noise(300))
    state.skipped["spike"] = 3
    progress = Progress("run", 10, guard=state)
    again = Progress(**json.loads(json.dumps(asdict(progress))))
    assert again.guard == state
    assert Progress(**{"run_id": "older", "total_steps": 9}).guard == GuardState()
    narrower = Guard(sigma=6.0, window=32)  # another window may be asked for when a run goes on
    assert narrower.judge(again.guard, 3.0, 3.0).update
    assert len(again.guard.losses) == 32


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        (
            {"on_spike": "stop"},
            SpikeError,
            r"step 25: loss .* standard deviations above .*rows 192.*train\.on_spike=skip",
        ),
        ({"on_nonfinite": "stop"}, NonFiniteError, r"step 3: loss nan.*not made; rows 16, .*train\.on_nonfinite=skip"),
    ],
)
def test_stopping_names_the_rows_and_the_remedy(tmp_path: Path, keys: Any, error: Any, words: str) -> None:
    made = trainer(config(tmp_path, train=GUARDED | keys), Poisoned(FACTORS))
    with pytest.raises(error, match=words):
        made.train()
    assert weights(made.engine.bare).isfinite().all()


def test_a_loss_scaler_finds_its_scale_and_survives_skips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 with the scaler on a CPU: its overflows are no faults, and a skipped spike leaves it as it should be."""
    factors = {0: 1e9, 1: 1e9, 24: 100.0, 30: 100.0}  # gradients that overflow at the first scale, then spikes
    made = trainer(config(tmp_path, train=GUARDED | {"on_nonfinite": "stop"}), Poisoned(factors))
    accelerator = made.job.accelerator
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**110, growth_interval=1000)
    wrapped = AcceleratedOptimizer(made.engine.optimizer, scaler=scaler)
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    monkeypatch.setattr(accelerator, "native_amp", True)
    monkeypatch.setattr(accelerator, "scaler", scaler)
    monkeypatch.setattr(accelerator, "_optimizers", [wrapped])
    made.engine._stepper = wrapped
    made.road = AtOnce(Guard.of(made.config.train, scaled=True), made.engine, made.config.train.max_grad_norm)
    progress = made.train().progress
    assert progress.guard.skipped == {"overflow": 2, "spike": 2}
    assert scaler.get_scale() == 2.0**108
    assert [entry["step"] for entry in skipped(made.directory)] == [25, 31]
    assert [line["step"] for line in lines(made.directory) if line.get("skipped")] == [1, 2, 25, 31]
    assert progress.guard.summary() == "skipped steps: 2 (2 spike)"
    assert weights(made.engine.bare).isfinite().all()


def test_a_run_that_is_never_finite_ends(tmp_path: Path) -> None:
    made = trainer(config(tmp_path, train=GUARDED), Poisoned(dict.fromkeys(range(5, 40), math.nan)))
    with pytest.raises(NonFiniteError, match=r"step 21: .* the last of 16 steps in a row without an update"):
        made.train()
    assert [entry["step"] for entry in skipped(made.directory)] == list(range(6, 22))
