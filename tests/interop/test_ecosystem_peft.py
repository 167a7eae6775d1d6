"""PEFT's LoRA on every linear layer: of Loom's classes, and of the stock classes that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ecosystem_builders import SENTENCES, make_tokenizer, publish, tiny

peft = pytest.importorskip("peft")

# architecture, task of the class, PEFT's name of it, the Auto class, further keys
CASES: dict[str, tuple[str, str, str, str, dict[str, Any]]] = {
    "encoder": ("modernbert", "classification", "SEQ_CLS", "AutoModelForSequenceClassification", {"local_window": 8}),
    "decoder": ("llama", "pretraining", "CAUSAL_LM", "AutoModelForCausalLM", {}),
    "seq2seq": ("transformer", "pretraining", "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM", {}),
}
PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}  # of every Loom block


def make(kind: str, stock: bool, root: Path) -> tuple[Any, dict[str, Any]]:
    """A model, the same each time, and a batch with padding."""
    architecture, task, _, auto, keys = CASES[kind]
    tokenizer = make_tokenizer(root / "tokenizer", architecture)
    model = tiny(tokenizer, architecture, task, **keys)
    if stock:
        if not (root / "stock").exists():
            publish(model, root / "stock", root / "tokenizer")
        model = getattr(transformers, auto).from_pretrained(root / "stock").eval()
        assert type(model).__module__.startswith("transformers.models.")
    batch = dict(tokenizer(SENTENCES[:4], padding=True, return_tensors="pt"))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if kind == "encoder":
        labels = torch.tensor([0, 1, 1, 0])
    elif kind == "seq2seq":
        labels = labels[:, :9].clone()
    return model, batch | {"labels": labels}


def train(model: Any, batch: dict[str, Any], steps: int = 20) -> list[float]:
    """The losses of some steps, after which exactly what is trained has a gradient."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(trained)
    model.eval()
    return losses


def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch).logits
    return found


@pytest.mark.parametrize(
    ("kind", "stock"),
    [
        pytest.param("encoder", False, id="encoder-loom"),
        pytest.param("encoder", True, id="encoder-stock", marks=pytest.mark.slow),
        pytest.param("decoder", False, id="decoder-loom"),
        pytest.param("decoder", True, id="decoder-stock"),
        pytest.param("seq2seq", False, id="seq2seq-loom"),
        pytest.param("seq2seq", True, id="seq2seq-stock", marks=pytest.mark.slow),
    ],
)
def test_adapters_train_come_back_and_merge(kind: str, stock: bool, tmp_path: Path) -> None:
    model, batch = make(kind, stock, tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = logits(model, batch)
    config = peft.LoraConfig(task_type=CASES[kind][2], r=4, target_modules="all-linear")
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(logits(adapted, batch), first)  # adapters begin at nothing
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    beside = {name for name in trained if ".lora_" not in name}
    assert all(".classifier.modules_to_save." in name for name in beside)  # the new head of a classifier
    assert bool(beside) is (kind == "encoder")
    if not stock:
        assert {name.split(".lora_")[0].split(".")[-1] for name in trained - beside} >= PARTS
    losses = train(adapted, batch)
    assert losses[-1] < 0.9 * losses[0]
    for name, tensor in adapted.get_base_model().state_dict().items():  # what was there has not moved
        if ".lora_" not in name and ".modules_to_save." not in name:
            plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            assert torch.equal(tensor, before[plain]), name
    expected = logits(adapted, batch)
    adapted.save_pretrained(tmp_path / "adapters")
    again = peft.PeftModel.from_pretrained(make(kind, stock, tmp_path)[0], tmp_path / "adapters").eval()
    assert torch.equal(logits(again, batch), expected)
    merged = adapted.merge_and_unload()
    assert type(merged) is type(model)
    assert float((logits(merged, batch) - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("way", ["adapters", "whole"])
def test_what_peft_puts_around_the_token_head_is_trained(way: str, tmp_path: Path) -> None:
    """An adapter on the head, or a copy of it that is trained whole, is part of the loss."""
    model, batch = make("decoder", False, tmp_path)
    targets: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"]}
    if way == "whole":
        targets = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **targets))
    losses = train(adapted, batch, steps=8)
    assert losses[-1] < 0.98 * losses[0]
    # The loss of training, which keeps no logits otherwise, is that of the logits.
    evaluated = adapted(**batch).loss
    adapted.train()
    assert torch.allclose(adapted(**batch).loss, evaluated, rtol=1e-5)
