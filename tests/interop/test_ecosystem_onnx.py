"""ONNX export of encoders by transformers' own exporter: ONNX Runtime gives torch's logits, whatever the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem_builders import SENTENCES, make_tokenizer, publish, tiny
from transformers import AutoModelForMaskedLM

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

WINDOWED = {"local_window": 8}
# Without a stock home; one local layer, which must keep its window although the rows that are traced are shorter.
HOMELESS = {"position_kind": "learned", "first_norm": True, "num_hidden_layers": 1}
HOMELESS |= {"attention_pattern": ["local"], "global_attention_every": 1, "local_window": 32}
BATCHES = [["a cat"], SENTENCES[:3], ["the cat", SENTENCES[3]], ["a"] * 5, [" ".join(SENTENCES)[:140], SENTENCES[0]]]


@pytest.mark.parametrize(
    ("architecture", "task", "stock", "keys"),
    [
        pytest.param("modernbert", "pretraining", False, HOMELESS, id="homeless"),
        pytest.param("bert", "pretraining", True, {}, id="bert", marks=pytest.mark.slow),
        pytest.param("modernbert", "pretraining", True, WINDOWED, id="modernbert", marks=pytest.mark.slow),
        pytest.param("modernbert", "pretraining", False, WINDOWED, id="loom", marks=pytest.mark.slow),
        pytest.param("bert", "classification", False, {}, id="loom-classifier", marks=pytest.mark.slow),
        pytest.param("eurobert", "pretraining", False, {}, id="loom-eurobert", marks=pytest.mark.slow),
    ],
)
def test_onnx_runtime_gives_the_logits_of_torch(
    architecture: str, task: str, stock: bool, keys: dict[str, Any], tmp_path: Path
) -> None:
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    tokenizer = make_tokenizer(tmp_path / "tokenizer", architecture)
    model = tiny(tokenizer, architecture, task, **keys)
    if stock:
        publish(model, tmp_path / "stock", tmp_path / "tokenizer")
        model = AutoModelForMaskedLM.from_pretrained(tmp_path / "stock").eval()
    rows = tokenizer(["the cat sat", "a dog"], padding=True, return_tensors="pt")
    OnnxExporter().export(model, dict(rows), OnnxConfig(dynamic=True)).save_pretrained(tmp_path / "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    lengths = set()
    for texts in BATCHES:
        given = dict(tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))
        lengths.add(given["input_ids"].shape[1])
        with torch.no_grad():
            expected = model(**given).logits
        said = session.run(["logits"], {entry.name: given[entry.name].numpy() for entry in session.get_inputs()})
        difference = (torch.tensor(said[0]) - expected).abs()
        if task == "pretraining":
            difference = difference[given["attention_mask"].bool()]
        assert float(difference.max() / expected.abs().max()) < 1e-4
    assert len(lengths) == len(BATCHES)
