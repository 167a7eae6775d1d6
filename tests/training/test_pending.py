"""Verdicts that come a step late: the same losses, skips and weights as at once, bit for bit, and no later update."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from test_guard import Poisoned, skipped, trainer
from test_trainer import Toy, config, lines, losses, weights
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.training import pending
from pretrain.training.checkpoint import list_checkpoints, optimizer_state_by_name
from pretrain.training.guard import LEAST, NonFiniteError
from pretrain.training.pending import AtOnce, StepLate
from pretrain.training.trainer import Trainer

KEYS = {"steps": 24, "on_nonfinite": "skip"}
FACTORS = {0: math.nan, 2: math.nan, 9: math.inf, 10: math.nan, 23: math.nan}  # batches; the first and last too


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Switches to the road of a CUDA device and back."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(pending, "waits_for_no_step", lambda config, engine: on)

    return switch


def state(made: Trainer) -> dict[str, bytes]:
    tensors = optimizer_state_by_name(made.engine.bare, made.engine.optimizer).tensors
    found = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return found | {"weights": weights(made.engine.bare).numpy().tobytes()}


def logged(made: Trainer) -> str:
    timed = {"seconds", "tokens_per_second", "data_wait", "memory_gib"}
    kept = [{key: value for key, value in line.items() if key not in timed} for line in lines(made.directory)]
    return repr((kept, skipped(made.directory)))  # NaN is not equal to itself


@pytest.mark.parametrize("optimizer", ["adamw", "stable-adamw", "muon"])
def test_late_is_at_once(tmp_path: Path, late: Any, optimizer: str) -> None:
    runs = []
    for on in (False, True):
        late(on)
        keys = {"optimizer": {"name": optimizer, "lr": 0.01, "weight_decay": 0.1}, "log": {"every": 3}}
        configuration = config(tmp_path / str(on), train={**KEYS, "micro_batch": 3}, **keys)
        made = trainer(configuration, Poisoned(FACTORS, dropout=0.3))
        assert isinstance(made.road, StepLate if on else AtOnce)
        progress = made.train().progress
        assert weights(made.engine.bare).isfinite().all()
        assert progress.guard.skipped == {"not finite": 5}
        runs.append((state(made), logged(made), asdict(progress.guard)))
    assert runs[0] == runs[1]
    assert [line["step"] for line in lines(made.directory) if line.get("skipped")] == [1, 3, 10, 11, 24]


@pytest.mark.parametrize("stop_at", [3, 10, 11, 20])
def test_an_interrupted_late_run_is_the_uninterrupted_one(tmp_path: Path, late: Any, stop_at: int) -> None:
    """What a save, an evaluation or a stop looks at before its time changes no later bit."""
    late(True)
    whole = trainer(config(tmp_path / "whole", train=KEYS), Poisoned(FACTORS, dropout=0.3))
    expected = whole.train().progress

    def stopping(model: torch.nn.Module, context: Any) -> dict[str, float]:
        if context.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0}

    cut = config(tmp_path / "cut", train=KEYS, evaluate={"every": 1})
    first = trainer(cut, Poisoned(FACTORS, dropout=0.3), evaluators={"stop": stopping}).train()
    assert first.progress.step == stop_at
    again = trainer(cut, Poisoned(FACTORS, dropout=0.3))
    progress = again.train().progress
    assert repr(losses(again.directory)) == repr(losses(whole.directory))
    assert state(again) == state(whole)
    assert asdict(progress.guard) == asdict(expected.guard)
    assert 0 < progress.seconds < 60


def test_a_stop_comes_late_and_changes_no_weight(tmp_path: Path, late: Any) -> None:
    """The step after the bad one is sent off before the host knows: its update is withheld on the device."""
    found = []
    for on in (False, True):
        late(on)
        made = trainer(config(tmp_path / str(on), train={"on_nonfinite": "stop"}), Poisoned({5: math.nan}))
        with pytest.raises(NonFiniteError, match=r"step 6: loss nan.*rows 40, 41.*from checkpoint step-00000004"):
            made.train()
        assert [line["step"] for line in lines(made.directory) if "loss" in line] == [1, 2, 3, 4, 5, 6]
        assert [path.name for path in list_checkpoints(made.directory)] == ["step-00000004"]
        found.append((state(made), logged(made)))
    assert found[0] == found[1]


def test_a_run_that_is_never_finite_ends_late(tmp_path: Path, late: Any) -> None:
    """After as many steps in a row as the guard bears, good ones after them make no update either."""
    patience = 2 * LEAST
    keys = {"steps": 60, "on_nonfinite": "skip", "spike_window": 2 * patience}
    factors = dict.fromkeys([3, *range(5, 5 + patience)], math.nan)
    found = []
    for on in (False, True):
        late(on)
        made = trainer(config(tmp_path / str(on), train=keys), Poisoned(factors))
        with pytest.raises(NonFiniteError, match=rf"step {5 + patience}: .* last of {patience} steps in a row"):
            made.train()
        found.append((state(made), logged(made)))
    assert found[0] == found[1]


def test_a_trainer_goes_on_after_its_error(tmp_path: Path, late: Any) -> None:
    """Called again, as in a notebook: the end of the first call is not the end of the second."""
    late(True)
    model = Poisoned({5: math.nan})
    made = trainer(config(tmp_path, train={"on_nonfinite": "stop"}), model)
    with pytest.raises(NonFiniteError):
        made.train()
    model.factors.clear()
    whole = trainer(config(tmp_path / "whole", train={"on_nonfinite": "stop"}), Poisoned({}))
    assert made.train().finished
    assert whole.train().finished
    assert state(made) == state(whole)
    assert losses(made.directory) == losses(whole.directory)


class Reads(TorchDispatchMode):
    """Counts the operations that make the host wait for a device's values."""

    waits: ClassVar = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique"}

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0]
        if name in self.waits:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "stable-adamw", "muon"])
def test_a_late_step_reads_no_value(tmp_path: Path, late: Any, optimizer: str) -> None:
    """On a CPU no read waits, but it can be counted; the two numbers of the step before are read from the copy."""
    counts = []
    for on in (False, True):
        late(on)
        keys = {"optimizer": {"name": optimizer, "lr": 0.01}, "train": {"micro_batch": 3}}
        made = trainer(config(tmp_path / str(on), **keys), Toy())
        step, seen = made._step, []

        def watched(progress: Any, *rest: Any, step: Any = step, seen: list[int] = seen) -> None:
            with Reads() as reads:
                step(progress, *rest)
            seen.append(len(reads.seen))

        made._step = watched  # type: ignore[method-assign]
        made.train()
        counts.append(seen)
    assert min(counts[0]) >= 2
    assert max(counts[1]) == 0


def test_spikes_and_odd_optimizers_are_judged_at_once(tmp_path: Path) -> None:
    """The switch itself: spikes have their windows on the host, and not every optimizer can leave a step out."""
    made = trainer(config(tmp_path), Poisoned({}))
    assert made.engine.decides_on_device
    assert not pending.waits_for_no_step(made.config.train, made.engine)  # a CPU waits anyway
    made.engine.device = torch.device("cuda")
    assert pending.waits_for_no_step(made.config.train, made.engine)
    spikes = made.config.train.model_copy(update={"spike_sigma": 6.0})
    assert not pending.waits_for_no_step(spikes, made.engine)
    made.engine.optimizer = torch.optim.SGD(made.engine.bare.parameters(), lr=0.1)
    assert not pending.waits_for_no_step(made.config.train, made.engine)
