"""The same losses as transformers' Trainer with the stock class: same weights, batches, AdamW, clipping, schedule."""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console

STEPS = 200
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def sides() -> Iterator[ModuleType]:
    """`scripts/side_by_side.py`, which `scripts/bench_speed.py` times."""
    scripts = str(Path(__file__).resolve().parent.parent / "scripts")
    sys.path.insert(0, scripts)
    try:
        yield importlib.import_module("side_by_side")
    finally:
        sys.path.remove(scripts)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate's state is the process's: precision and devices of another test would hold here."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert", "modernbert"])
def test_the_loss_of_every_step_is_equal(architecture: str, sides: ModuleType, tmp_path: Path) -> None:
    # ModernBERT's window is 128 wide (64 to either side), so its rows are longer than that.
    length = 144 if architecture == "modernbert" else 32
    shape = sides.Shape(hidden=32, layers=3, heads=2, glu=64, vocabulary=64, length=length, rows=4)
    run = sides.run_config(architecture, shape, steps=STEPS, precision="fp32", lr=2e-3, warmup=20, log=["jsonl"])
    rows = sides.make_rows(architecture, shape, STEPS * shape.rows)
    stock = sides.stock_model(architecture, shape)
    ours = sides.our_trainer(sides.our_model(stock), rows, run, tmp_path / "ours", Console(file=io.StringIO()))
    ours.train()
    lines = (tmp_path / "ours" / "metrics.jsonl").read_text().splitlines()
    our_losses = torch.tensor([entry["loss"] for entry in map(json.loads, lines) if "loss" in entry])

    peer = sides.peer_trainer(stock, rows, run, tmp_path / "peer")
    peer.train()
    peer_losses = torch.tensor([entry["loss"] for entry in peer.state.log_history if "loss" in entry])

    assert len(our_losses) == len(peer_losses) == STEPS
    assert peer_losses[-20:].mean() < peer_losses[:20].mean() - 0.2, "too little was learned to tell the sides apart"
    torch.testing.assert_close(our_losses, peer_losses, rtol=0.0, atol=TOLERANCE)
