"""The loop: normalization, exact resume, stop signals, budgets, non-finite losses, what is logged and kept."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.config import RunConfig, config_from_dict
from pretrain.files import ArtifactError, write_safetensors
from pretrain.training.checkpoint import list_checkpoints, optimizer_state_by_name, read_pointer, tensor_bytes
from pretrain.training.guard import NonFiniteError
from pretrain.training.optim import build_optimizer
from pretrain.training.progress import steps_of
from pretrain.training.trainer import Trainer

LENGTH, VOCABULARY, WIDTH = 8, 32, 16


class Toy(nn.Module):
    """Embedding, one hidden matrix in a stack, dropout, tied head: enough for every optimizer group."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False)])
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, num_items_in_batch: int) -> SimpleNamespace:
        hidden = self.dropout(self.norm(torch.tanh(self.layers[0](self.embed(input_ids)))))
        logits = hidden @ self.embed.weight.T  # (B, L, vocabulary)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
        return SimpleNamespace(loss=loss / num_items_in_batch)


@dataclass
class Rows:
    arrays: Mapping[str, np.ndarray]
    num_targets: int
    num_tokens: int
    row_ids: np.ndarray


class RaggedData:
    """Rows of random length: the number of targets differs from row to row."""

    fingerprint = "toy"
    num_rows = 40

    def batch(self, step: int, rows: slice | None = None) -> Rows:
        generator = np.random.default_rng(step)
        ids = generator.integers(0, VOCABULARY, (8, LENGTH))
        labels = np.where(np.arange(LENGTH) < generator.integers(1, LENGTH, (8, 1)), np.roll(ids, -1, 1), -100)
        chosen = rows or slice(0, 8)
        labels = labels[chosen]
        arrays = {"input_ids": ids[chosen], "labels": labels}
        return Rows(arrays, int((labels != -100).sum()), labels.size, np.arange(8)[chosen] + 8 * step)

    def for_run(self, total_steps: int) -> list[str]:
        return []

    def state(self, samples_seen: int) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "seed": 0, "samples_seen": samples_seen}

    def check(self, state: Mapping[str, Any]) -> None:
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(f"the data are {self.fingerprint}, the checkpoint saw {state['fingerprint']}")


class Store:
    def write(self, model: nn.Module, weights: Mapping[str, Tensor], directory: Path) -> dict[str, str]:
        tensors = [(name, tensor_bytes(tensor)) for name, tensor in weights.items()]
        return {"model.safetensors": write_safetensors(directory / "model.safetensors", tensors)}

    def read(self, model: nn.Module, directory: Path) -> dict[str, Tensor]:
        return load_file(directory / "model.safetensors")


def config(tmp_path: Path, **sections: dict[str, Any]) -> RunConfig:
    raw: dict[str, Any] = {
        "name": "toy",
        "out": str(tmp_path),
        "data": {"train": ["x"], "sequence_length": LENGTH},
        "model": {"architecture": "gpt2"},
        "objective": {"kind": "causal"},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "train": {"steps": 10, "batch_tokens": 8 * LENGTH, "precision": "fp32", "micro_batch": 8},
        "checkpoint": {"every": 4, "keep": 2},
        "evaluate": {"every": 5},
        "log": {"to": ["jsonl"]},
    }
    for section, keys in sections.items():
        raw[section] = raw[section] | keys
    return config_from_dict(raw)


def trainer(
    configuration: RunConfig, *, dropout: float = 0.0, data: RaggedData | None = None, evaluators: Any = None
) -> Trainer:
    torch.manual_seed(1)
    model = Toy(dropout)
    return Trainer(
        configuration,
        model=model,
        data=data or RaggedData(),
        optimizer=build_optimizer(model, configuration.optimizer),
        store=Store(),
        evaluators=evaluators,
    )


def lines(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory: Path) -> list[tuple[float, float, float]]:
    return [(line["step"], line["loss"], line["lr"]) for line in lines(directory) if "loss" in line]


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_batch_split_is_the_same_batch(tmp_path: Path, optimizer: str) -> None:
    """1 x 8, 2 x 4, 8 x 1 rows of ragged lengths: losses within 1e-6, gradients within 1e-5, final weights too."""
    ends, histories, gradients = [], [], []
    for micro_batch in (8, 4, 1, 3):
        settings = {"name": optimizer, "lr": 0.01}
        configuration = config(tmp_path / str(micro_batch), train={"micro_batch": micro_batch}, optimizer=settings)
        made = trainer(configuration)
        micro_batches = made.feed.micro_batches(0)
        made._backward(micro_batches, {"targets": sum(batch.num_targets for batch in micro_batches)})
        gradients.append(
            torch.cat([p.grad.flatten().clone() for p in made.engine.bare.parameters() if p.grad is not None])
        )
        made.engine.drop()
        made.train()
        ends.append(weights(made.engine.bare))
        histories.append([loss for _, loss, _ in losses(made.directory)])
    for history, gradient, end in zip(histories[1:], gradients[1:], ends[1:], strict=True):
        np.testing.assert_allclose(history, histories[0], rtol=1e-6)
        assert torch.linalg.norm(gradient - gradients[0]) < 1e-5 * torch.linalg.norm(gradients[0])
        assert torch.linalg.norm(end - ends[0]) < 1e-5 * torch.linalg.norm(ends[0])


@pytest.mark.parametrize("optimizer", ["adamw", "stable-adamw", "muon"])
@pytest.mark.parametrize("stop_at", [1, 4, 6, 9])
def test_an_interrupted_run_is_the_uninterrupted_one(tmp_path: Path, optimizer: str, stop_at: int) -> None:
    """Bit for bit, with dropout: loss and learning rate of every step, and the final weights."""
    settings = {"name": optimizer, "lr": 0.01, "weight_decay": 0.1}
    whole = trainer(config(tmp_path / "whole", optimizer=settings), dropout=0.3)
    whole.train()

    def stopping(model: nn.Module, context: Any) -> dict[str, float]:
        if context.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0}

    cut = config(tmp_path / "cut", optimizer=settings, evaluate={"every": 1})
    first = trainer(cut, dropout=0.3, evaluators={"stop": stopping}).train()
    assert (first.stopped_by, first.progress.step, first.finished) == ("SIGTERM", stop_at, False)
    second = trainer(cut, dropout=0.3)
    assert second.train().finished
    assert losses(second.directory) == losses(whole.directory)
    assert torch.equal(weights(second.engine.bare), weights(whole.engine.bare))
    ours, theirs = (
        optimizer_state_by_name(made.engine.bare, made.engine.optimizer).tensors for made in (second, whole)
    )
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    configuration = config(tmp_path)
    trainer(configuration).train()
    before = {path: path.read_bytes() for path in configuration.directory.rglob("*") if path.is_file()}
    result = trainer(configuration).train()
    assert result.finished
    assert result.checkpoint.name == "step-00000010"
    assert {path: path.read_bytes() for path in configuration.directory.rglob("*") if path.is_file()} == before


def test_other_data_are_refused(tmp_path: Path) -> None:
    configuration = config(tmp_path)
    trainer(configuration).train()
    other = RaggedData()
    other.fingerprint = "other"
    with pytest.raises(ValueError, match="the checkpoint saw toy"):
        trainer(configuration, data=other).train()


def test_best_and_latest_are_kept(tmp_path: Path) -> None:
    scores = {0: 9.0, 2: 1.0, 4: 5.0, 6: 4.0, 8: 3.0, 10: 2.0}
    configuration = config(tmp_path, evaluate={"every": 2}, checkpoint={"every": 2, "keep": 1})
    made = trainer(configuration, evaluators={"validation": lambda model, context: {"loss": scores[context.step]}})
    made.train()
    names = [path.name for path in list_checkpoints(made.directory)]
    assert names == ["step-00000002", "step-00000010"]
    best, latest = (read_pointer(made.directory, name) for name in ("best", "latest"))
    assert (best and best.name, latest and latest.name) == ("step-00000002", "step-00000010")
    assert [line["validation/loss"] for line in lines(made.directory) if "validation/loss" in line] == list(
        scores.values()
    )


def test_a_validation_loss_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    scores = {0: 9.0, 2: math.nan, 4: 5.0, 6: 4.0, 8: math.inf, 10: 4.5}
    configuration = config(tmp_path, evaluate={"every": 2}, checkpoint={"every": 2, "keep": 1})
    made = trainer(configuration, evaluators={"validation": lambda model, context: {"loss": scores[context.step]}})
    assert made.train().progress.best == {"step": 6, "loss": 4.0}
    best = read_pointer(made.directory, "best")
    assert best is not None
    assert best.name == "step-00000006"


class NaNAtStep(Toy):
    """A model whose loss is NaN once."""

    calls = 0

    def forward(self, **batch: Any) -> SimpleNamespace:
        self.calls += 1
        out = super().forward(**batch)
        return SimpleNamespace(loss=out.loss * (math.nan if self.calls == 3 else 1.0))


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_that_is_not_finite_is_never_learned(tmp_path: Path, policy: str) -> None:
    configuration = config(tmp_path, train={"on_nonfinite": policy})
    torch.manual_seed(1)
    model = NaNAtStep()
    made = Trainer(
        configuration,
        model=model,
        data=RaggedData(),
        optimizer=build_optimizer(model, configuration.optimizer),
        store=Store(),
    )
    if policy == "stop":
        with pytest.raises(NonFiniteError, match=r"step 3: loss nan.*rows 16, 17"):
            made.train()
    else:
        assert made.train().finished
        assert [math.isnan(loss) for _, loss, _ in losses(made.directory)] == [step == 3 for step in range(1, 11)]
    assert weights(model).isfinite().all()


@pytest.mark.parametrize(
    ("budget", "steps"),
    [({"steps": 7}, 7), ({"tokens": 641}, 11), ({"epochs": 2}, 10), ({"minutes": 1}, 120), ({"hours": 0.5}, 3600)],
)
def test_budgets(tmp_path: Path, budget: dict[str, float], steps: int) -> None:
    configuration = config(tmp_path).model_copy(
        update={"train": config(tmp_path).train.model_copy(update={"steps": None, **budget})}
    )
    assert steps_of(configuration, num_rows=40, seconds_per_step=0.5) == steps


def test_a_budget_of_time_is_fixed_once_and_leaves_no_trace(tmp_path: Path) -> None:
    """The measured steps change neither weights, nor optimizer, nor random numbers; the record holds from then on."""
    timed = config(tmp_path / "timed")
    timed = timed.model_copy(update={"train": timed.train.model_copy(update={"steps": None, "minutes": 0.0005})})
    made = trainer(timed, dropout=0.3)
    made.train()
    record = json.loads((made.directory / "budget.json").read_text())
    steps = record["steps"]
    assert record["tokens"] == steps * 8 * LENGTH
    (made.directory / "budget.json").write_text('{"minutes": 0.0005')
    with pytest.raises(ArtifactError, match=r"budget\.json` cannot be read .*; remove it, and it is measured again"):
        trainer(timed, dropout=0.3)._total_steps()
    counted = trainer(config(tmp_path / "counted", train={"steps": steps}), dropout=0.3)
    counted.train()
    assert [entry[:2] for entry in losses(made.directory)] == [entry[:2] for entry in losses(counted.directory)]
    assert torch.equal(weights(made.engine.bare), weights(counted.engine.bare))


def test_what_is_logged(tmp_path: Path) -> None:
    made = trainer(config(tmp_path))
    made.train()
    for line in lines(made.directory):
        assert {"loss", "grad_norm", "lr", "tokens", "tokens_per_second", "data_wait", "memory_gib"} <= set(line)
        assert 0 <= line["data_wait"] <= 1
    assert lines(made.directory)[-1]["tokens"] == 10 * 8 * LENGTH
