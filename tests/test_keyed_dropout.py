"""Runs with dropout of hidden states are the same in any split of their batches; attention dropout needs leave."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from pretrain.building import build_model
from pretrain.changes import ChangedConfigError
from pretrain.config import RunConfig, load_config
from pretrain.models import dropout
from pretrain.train import build_data, build_trainer, train
from scripts.faults import tiny

STEPS = 20
QUIET = Console(quiet=True)
SECTIONS: dict[str, Any] = {
    "model": {"hidden_dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.0, "num_hidden_layers": 2},
    "train": {"steps": STEPS, "batch_tokens": 256},
    "checkpoint": {"every": STEPS},
    "evaluate": {"every": STEPS},
}
CAUSAL: dict[str, Any] = {"architecture": "gpt2"}


def losses(config: RunConfig) -> list[float]:
    lines = (config.directory / "train" / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def trained(config: RunConfig, patch: pytest.MonkeyPatch) -> tuple[list[float], dict[tuple[int, int], str]]:
    """The loss of each step, and a digest of the mask of each (row's key, site)."""
    masks: dict[tuple[int, int], str] = {}
    keyed_mask = dropout.keyed_mask

    def recorded(keys: Tensor, site: int, *rest: Any) -> Tensor:
        made: Tensor = keyed_mask(keys, site, *rest)
        for key, mask in zip(keys.tolist(), made, strict=True):
            digest = hashlib.sha256(mask.numpy().tobytes()).hexdigest()
            assert masks.setdefault((key, site), digest) == digest  # a row that is computed again draws what it drew
        return made

    patch.setattr(dropout, "keyed_mask", recorded)
    build_trainer(config, console=QUIET).train()
    patch.setattr(dropout, "keyed_mask", keyed_mask)
    return losses(config), masks


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_every_split_of_a_batch_draws_the_same_masks(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8, 4, 3, 2 and 1 rows at a time, and with gradient checkpointing: masks bit for bit, losses within 1e-6."""
    model = {**SECTIONS["model"], **(CAUSAL if kind == "causal" else {})}
    run = tiny.make(tmp_path / "made", **{**SECTIONS, "model": model})
    splits = [(8, False), (4, False), (3, False), (2, True), (1, False)]
    seen = []
    for micro_batch, checkpointing in splits:
        copy = tiny.copy(run, tmp_path / f"by-{micro_batch}")
        overrides = [f"train.micro_batch={micro_batch}", f"train.gradient_checkpointing={str(checkpointing).lower()}"]
        seen.append(trained(load_config(copy.config, overrides), monkeypatch))
    ours, masks = seen[0]
    assert len(ours) == STEPS
    assert len(masks) == STEPS * 8 * 5  # each row of each step, an epoch later too, at each of five sites
    assert len(set(masks.values())) == len(masks)
    for others, drawn in seen[1:]:
        assert drawn == masks
        assert others == pytest.approx(ours, rel=1e-6)


def test_keys_go_to_models_that_use_them_alone(tmp_path: Path) -> None:
    """A key is a function of (seed, source, epoch, row), so it is the same in any part of a batch, and never twice."""
    run = tiny.make(tmp_path, **SECTIONS)
    config = load_config(run.config)
    data = build_data(config)
    assert "dropout_keys" not in data.batch(0).arrays
    plain = {name: array.tobytes() for name, array in data.batch(3).arrays.items()}
    build_trainer(config, build_model(load_config(run.config, ["model.hidden_dropout=0"])), data, console=QUIET)
    assert data.dropout_keys  # for the embeddings
    none = load_config(run.config, ["model.hidden_dropout=0", "model.embedding_dropout=0"])
    build_trainer(none, data=data, console=QUIET)
    assert not data.dropout_keys
    build_trainer(config, data=data, console=QUIET)
    batch = data.batch(3)
    keys = batch.arrays["dropout_keys"]
    assert keys.shape == (8,)
    assert keys.dtype == "int64"
    assert {name: array.tobytes() for name, array in batch.arrays.items() if name != "dropout_keys"} == plain
    parts = [data.batch(3, slice(row, row + 1)).arrays["dropout_keys"][0] for row in range(8)]
    assert parts == keys.tolist()
    steps = 2 * data.num_rows // 8 + 2  # over the ends of two epochs
    everything = [int(key) for step in range(steps) for key in data.batch(step).arrays["dropout_keys"]]
    assert len(set(everything)) == len(everything)
    other = build_data(load_config(run.config, ["train.seed=4"]))
    other.dropout_keys = True
    assert not {int(key) for step in range(steps) for key in other.batch(step).arrays["dropout_keys"]} & set(everything)


def test_another_split_needs_leave_with_attention_dropout_alone(tmp_path: Path) -> None:
    """A micro-batch of `auto` is the checkpoint's, so it needs none."""
    sections: dict[str, Any] = {**SECTIONS, "train": {"steps": 2}, "checkpoint": {"every": 2}}
    drawn = {**sections, "model": {**SECTIONS["model"], "attention_dropout": 0.1}}
    first = tiny.make(tmp_path / "first", **drawn)
    assert train(load_config(first.config), console=QUIET) == 0
    longer = ["train.steps=3", "train.micro_batch=2"]
    with pytest.raises(ChangedConfigError, match=r"train.micro_batch: 4 -> 2: attention dropout draws other masks"):
        train(load_config(first.config, longer), allow_changes=["train.steps"], console=QUIET)
    own = tiny.copy(first, tmp_path / "own")
    assert (
        train(load_config(own.config, ["train.steps=3", "train.micro_batch=auto"]), allow_changes=["train.steps"]) == 0
    )
    assert train(load_config(first.config, longer), allow_changes=["train"], console=QUIET) == 0
    plain = tiny.make(tmp_path / "plain", **sections)
    assert train(load_config(plain.config), console=QUIET) == 0
    assert train(load_config(plain.config, longer), allow_changes=["train.steps"], console=QUIET) == 0
    assert torch.isfinite(torch.tensor(losses(load_config(plain.config)))).all()
