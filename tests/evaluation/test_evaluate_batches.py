"""Live models on prepared batches: packed rows, fused loss, accuracy, and a model that is left as it was."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn import functional as F

from pretrain.evaluation.likelihood import evaluate_batches
from pretrain.interop import to_stock
from pretrain.models import loom_config, model_from_config

Batch = dict[str, Any]


def loom(architecture: str) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = model_from_config(loom_config(architecture, max_position_embeddings=32, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model


def packed_batch(kind: str, *, seed: int = 0) -> Batch:
    """Two rows of 12: documents of 5 and 7 tokens, and one of 8 with 4 positions of padding."""
    generator = np.random.default_rng(seed)
    documents = np.array([[1] * 5 + [2] * 7, [1] * 8 + [0] * 4], np.int32)
    positions = np.array([[*range(5), *range(7)], [*range(8), 0, 0, 0, 0]], np.int64)
    ids = generator.integers(5, 64, (2, 12))
    targets = generator.integers(5, 64, (2, 12))
    if kind == "causal":
        targets[documents == 0] = -100
        return {"input_ids": ids, "position_ids": positions, "document_ids": documents, "shift_labels": targets}
    targets[generator.random((2, 12)) > 0.3] = -100
    targets[0, 3], targets[1, 8:] = 9, -100
    return {"input_ids": ids, "position_ids": positions, "document_ids": documents, "labels": targets}


def by_document(model: Any, batch: Batch) -> tuple[float, int, int]:
    """Summed loss, right first choices and targets, each document run by itself."""
    total, hits, count = 0.0, 0, 0
    targets = batch["labels"] if "labels" in batch else batch["shift_labels"]
    for row in range(2):
        for document in range(1, batch["document_ids"][row].max() + 1):
            inside = batch["document_ids"][row] == document
            with torch.no_grad():
                logits = model(torch.from_numpy(batch["input_ids"][row, inside][None])).logits[0].double()
            wanted = torch.from_numpy(targets[row, inside])
            total += float(F.cross_entropy(logits, wanted, reduction="sum")) if (wanted != -100).any() else 0.0
            hits += int((logits.argmax(-1) == wanted).sum())
            count += int((wanted != -100).sum())
    return total, hits, count


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert", "modernbert"])
def test_packed_rows_score_as_documents_by_themselves(architecture: str) -> None:
    model = loom(architecture).train()
    kind = "causal" if architecture in ("gpt2", "llama") else "mlm"
    batches = [packed_batch(kind), packed_batch(kind, seed=1)]
    scores = evaluate_batches(model, batches, device="cpu", num_bytes=100)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    parts = [by_document(model, batch) for batch in batches]
    total, hits, count = (sum(part[number] for part in parts) for number in range(3))
    assert scores["num_targets"] == count
    assert scores["loss"] == pytest.approx(total / count, rel=1e-5)
    if kind == "mlm":
        assert scores["accuracy"] == hits / count
        assert "bits_per_byte" not in scores
    else:
        assert scores["bits_per_byte"] == pytest.approx(total / math.log(2) / 100, rel=1e-5)
        assert "accuracy" not in scores


def test_torch_and_numpy_batches_score_alike() -> None:
    model, batch = loom("bert"), packed_batch("mlm")
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    assert evaluate_batches(model, [batch], device="cpu") == evaluate_batches(model, [tensors], device="cpu")


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert", "modernbert"])
def test_a_stock_class_scores_full_rows_alike_and_refuses_packed_ones(architecture: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    ours = loom(architecture)
    kind = "causal" if architecture in ("gpt2", "llama") else "mlm"
    config, state = to_stock(ours.config, ours.state_dict())
    auto: Any = AutoModelForCausalLM if kind == "causal" else AutoModelForMaskedLM
    stock = auto.from_config(config)
    stock.load_state_dict(state, strict=False)
    stock.tie_weights()
    full = packed_batch(kind)
    full["document_ids"] = np.ones_like(full["document_ids"])
    full["position_ids"] = np.tile(np.arange(12), (2, 1))
    expected, found = (evaluate_batches(model, [full], device="cpu") for model in (ours, stock))
    assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="max_documents_per_row"):
        evaluate_batches(stock, [packed_batch(kind)], device="cpu")


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_a_prepared_and_compiled_model_scores_alike(architecture: str) -> None:
    """Accelerate's wrapping of forward keeps the signature, and a compiled graph does not swallow the selection."""
    kind = "causal" if architecture == "gpt2" else "mlm"
    plain = evaluate_batches(loom(architecture), [packed_batch(kind)], device="cpu", autocast=torch.bfloat16)
    AcceleratorState._reset_state(True)  # it is the process's: another test's precision would hold here, and ours there
    try:
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(loom(architecture))
        assert evaluate_batches(prepared, [packed_batch(kind)], device="cpu") == pytest.approx(plain, rel=1e-6)
    finally:
        AcceleratorState._reset_state(True)
    compiled = loom(architecture)
    compiled.compile(backend="eager")
    exact = evaluate_batches(loom(architecture), [packed_batch(kind)], device="cpu")
    assert evaluate_batches(compiled, [packed_batch(kind)], device="cpu") == pytest.approx(exact, rel=1e-6)
