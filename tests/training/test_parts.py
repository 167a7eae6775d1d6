"""Numbers of a step beside its loss: sums and divisors add up over micro-batches and processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from pretrain.training.parts import Parts


def output(**pairs: tuple[float, float]) -> SimpleNamespace:
    return SimpleNamespace(parts={name: torch.tensor(pair) for name, pair in pairs.items()})


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    parts = Parts()
    parts.add(output(accuracy=(1.0, 4.0), recall=(0.0, 0.0)))
    parts.add(output(recall=(0.0, 0.0), accuracy=(6.0, 8.0)))  # in any order
    parts.send(1)
    assert parts.numbers() == {"accuracy": 7 / 12}  # nothing to divide the other by
    with pytest.raises(ValueError, match=r"parts are accuracy, and accuracy, recall in another .* name the same ones"):
        parts.add(output(accuracy=(1.0, 4.0)))


def test_processes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    other = torch.tensor([[3.0, 5.0]])
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: tensor.add_(other))
    parts = Parts()
    parts.add(output(accuracy=(1.0, 4.0)))
    parts.send(2)
    assert parts.numbers() == {"accuracy": 4 / 9}


def test_a_model_that_says_nothing_more_logs_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(distributed, "all_reduce")  # the processes do not meet for it
    for silent in (SimpleNamespace(), SimpleNamespace(parts=None), SimpleNamespace(parts={})):
        parts = Parts()
        parts.add(silent)
        parts.send(2)
        assert parts.numbers() == {}
