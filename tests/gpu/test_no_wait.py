"""On a CUDA device nothing on the host waits in a normal step, and the device withholds what the host would skip."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.training import pending
from pretrain.training.guard import NonFiniteError
from pretrain.training.pending import AtOnce, StepLate
from tests.gpu.synthetic import make_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BAD = 4  # step whose loss is NaN, from 1
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": 3e-3},
    "stable-adamw": {"name": "stable-adamw", "lr": 3e-3},
    "muon": {"name": "muon", "lr": 2e-2},
}


def build(folder: Path, *, optimizer: str = "adamw", **train: Any) -> Any:
    from pretrain.train import build_trainer

    keys = {"steps": 10, "micro_batch": 8, "strategy": "single", "on_nonfinite": "skip", **train}
    torch.manual_seed(0)
    return build_trainer(make_run(folder, train=keys, optimizer=OPTIMIZERS[optimizer]))


def spoil(made: Any) -> None:
    """NaN in the loss of one micro-batch of step BAD."""
    sends = {"step": 0}
    step = made._step

    def counted(progress: Any, *rest: Any) -> None:
        sends["step"] = progress.step + 1
        step(progress, *rest)

    def hook(module: Any, inputs: Any, output: Any) -> None:
        if sends["step"] == BAD and module.training:
            output.loss = output.loss * math.nan

    made._step = counted
    made.engine.bare.register_forward_hook(hook)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_no_step_waits(tmp_path: Path, optimizer: str, strategy: str) -> None:
    """torch raises where an operation makes the host wait; the first steps make state and plans, and may."""
    made = build(tmp_path, optimizer=optimizer, strategy=strategy)
    assert isinstance(made.road, StepLate)
    step = made._step

    def watched(progress: Any, *rest: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if progress.step >= 3 else "default")
        try:
            step(progress, *rest)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    made._step = watched
    assert made.train().finished


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_late_is_at_once(tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for late in (False, True):
        monkeypatch.setattr(pending, "waits_for_no_step", lambda config, engine, late=late: late)
        made = build(tmp_path / str(late), optimizer=optimizer)
        assert isinstance(made.road, StepLate if late else AtOnce)
        spoil(made)
        progress = made.train().progress
        assert progress.guard.skipped == {"not finite": 1}
        logged = [json.loads(line) for line in (made.directory / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in logged if line.get("skipped")] == [BAD]
        ends.append([parameter.detach().clone() for parameter in made.engine.bare.parameters()])
    assert all(tensor.isfinite().all() for tensor in ends[1])
    assert max(float((one - other).abs().max()) for one, other in zip(*ends, strict=True)) < 1e-3


def test_a_stop_changes_no_weight(tmp_path: Path) -> None:
    """The host learns of it one step late; the update of that step is withheld too."""
    made = build(tmp_path, on_nonfinite="stop")
    spoil(made)
    before: list[torch.Tensor] = []
    step = made._step

    def watched(progress: Any, *rest: Any) -> None:
        if progress.step == BAD - 1:
            before.extend(parameter.detach().clone() for parameter in made.engine.bare.parameters())
        step(progress, *rest)

    made._step = watched
    with pytest.raises(NonFiniteError, match=rf"step {BAD}: loss nan"):
        made.train()
    assert all(torch.equal(one, other) for one, other in zip(before, made.engine.bare.parameters(), strict=True))
