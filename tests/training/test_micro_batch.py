"""The rows of a forward pass: what is chosen, and that a try that breaks off can be made again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import elastic
import numpy as np
import pytest
import tiny
import torch

from pretrain.config import load_config, validated
from pretrain.config_task import TuningConfig
from pretrain.ranks import Ranks
from pretrain.tasks.examples import Example, TaskData, padded
from pretrain.train import build_trainer
from pretrain.training.engines import Engine
from pretrain.training.micro_batch import choose_micro_batch, fits


class Full(torch.autograd.Function):
    """A backward pass that runs out of memory."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        raise torch.OutOfMemoryError("no room")


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_a_try_that_does_not_fit_can_be_made_again(tmp_path: Path, strategy: str) -> None:
    run = tiny.make(tmp_path, **elastic.SECTIONS)
    trainer = build_trainer(load_config(run.config, [f"train.strategy={strategy}"]))
    engine = trainer.engine

    def broken(module: Any, inputs: Any, output: Any) -> None:
        output.loss = Full.apply(output.loss)

    for _ in range(2):
        hook = engine.bare.register_forward_hook(broken)
        assert not fits(engine, trainer.data, 8)
        hook.remove()
    assert fits(engine, trainer.data, 4)
    assert all(parameter.grad is None for parameter in engine.bare.parameters())
    assert trainer.train().finished


def test_as_configured_but_never_more_than_there_are(tmp_path: Path) -> None:
    run = tiny.make(tmp_path, **elastic.SECTIONS)
    for wanted, chosen in (("3", 3), ("100", 10), ("auto", 10)):
        config = load_config(run.config, [f"train.micro_batch={wanted}"])
        trainer = build_trainer(config)
        assert choose_micro_batch(config, "fp32", trainer.engine, trainer.data, None) == chosen == trainer.micro_batch


def test_the_largest_examples_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A try has the sizes of the largest, which the first step need not have."""
    tried: list[tuple[int, ...]] = []

    class Device:
        """An engine that looks at what it is given."""

        name, device = "single", torch.device("cpu")
        ranks, config = Ranks.alone(), None

        def __init__(self) -> None:
            self.model = torch.nn.Module()
            self.model.forward = self.see  # type: ignore[method-assign]

        def see(self, *, input_ids: torch.Tensor, **others: Any) -> Any:
            tried.append(tuple(input_ids.shape))
            return SimpleNamespace(loss=torch.zeros(()))

        def shapes(self) -> dict[str, Any]:
            return {}

        def backward(self, share: Any, *, last: bool) -> None:
            share()

        def drop(self) -> None:
            """Nothing is kept."""

    lengths = [3] * 30 + [50, 7]
    examples = [Example({"input_ids": np.ones(length, dtype=np.int64)}, np.array(0), 0) for length in lengths]
    data = TaskData(examples, lambda some: padded(some, {}), 4, 0, {})
    assert fits(cast(Engine, Device()), data, 4)
    assert tried == [(4, 56)]


@pytest.mark.parametrize("meet", [False, True])
def test_rows_that_meet_are_not_parted(monkeypatch: pytest.MonkeyPatch, meet: bool) -> None:
    """On a CPU all of them, whatever its caches like; on a GPU all of them, or an error that names the remedy."""
    task = {"kind": "embeddings", "train": ["x"], "max_length": 128} | ({} if meet else {"score": "s"})
    config = validated(TuningConfig, {"name": "x", "task": task, "train": {"steps": 1, "batch_size": 64}}, "test")
    engine = SimpleNamespace(name="single", device=torch.device("cpu"), ranks=Ranks.alone())
    assert choose_micro_batch(config.with_inputs(2), "fp32", cast(Engine, engine), cast(Any, None), None) == (
        64 if meet else 16
    )
    engine.device = torch.device("cuda")
    monkeypatch.setattr("pretrain.training.micro_batch.fits", lambda engine, data, rows: rows <= 32)
    if meet:
        with pytest.raises(torch.OutOfMemoryError, match=r"train.micro_batch: 64 rows do not fit .*give fewer"):
            choose_micro_batch(config, "fp32", cast(Engine, engine), cast(Any, None), None)
    else:
        assert choose_micro_batch(config, "fp32", cast(Engine, engine), cast(Any, None), None) == 32
