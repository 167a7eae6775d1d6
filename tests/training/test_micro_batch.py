"""The rows of a forward pass: what is chosen, and that a try that breaks off can be made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import elastic
import pytest
import tiny
import torch

from pretrain.config import load_config
from pretrain.train import build_trainer
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
