"""Stock classes in our loop: packed documents have the logits that each has alone; a run trains, goes on, exports."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional

from pretrain.config import config_from_dict
from pretrain.files import ArtifactError
from pretrain.run import run
from pretrain.runtime import EXIT_STOPPED
from pretrain.stock_model import adapt, flops_per_token
from pretrain.training.trainer import Trainer

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
MARKERS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
PACKED = {
    "BertForMaskedLM": lambda: transformers.BertConfig(**SIZES),
    "RobertaForMaskedLM": lambda: transformers.RobertaConfig(**SIZES),
    "ModernBertForMaskedLM": lambda: transformers.ModernBertConfig(**SIZES, **MARKERS, local_attention=16),
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**SIZES),
    "MistralForCausalLM": lambda: transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=16),
    "Gemma3ForCausalLM": lambda: transformers.Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        num_key_value_heads=2,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
PADDED = {
    "DebertaV2ForMaskedLM": lambda: transformers.DebertaV2Config(
        **SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16, type_vocab_size=0
    ),
    "BloomForCausalLM": lambda: transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
}


def tiny(name: str) -> Any:
    """The class with every parameter drawn from a normal, without dropout."""
    model = getattr(transformers, name)({**PACKED, **PADDED}[name]()).eval()
    for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
        generator = torch.Generator().manual_seed(index)
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def batch() -> dict[str, torch.Tensor]:
    """Two rows: documents of 8 and 30 tokens with 2 of padding, and one of 40."""
    generator = torch.Generator().manual_seed(1)
    places = [torch.cat([torch.arange(length) for length in row]) for row in ((8, 30, 2), (40,))]
    documents = torch.tensor([[1] * 8 + [2] * 30 + [0] * 2, [1] * 40])
    return {
        "input_ids": torch.randint(5, 97, (2, 40), generator=generator),
        "position_ids": torch.stack(places).masked_fill(documents == 0, 0),
        "document_ids": documents,
    }


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_documents_of_a_row_are_what_they_are_alone(name: str) -> None:
    model, rows = tiny(name), batch()
    own = type(model).forward
    adapted = adapt(model, "decoder" if name.endswith("CausalLM") else "encoder", 40)
    assert adapted.packed == (name in PACKED), adapted.words
    targets = torch.where(torch.rand(2, 40, generator=torch.Generator().manual_seed(2)) < 0.3, rows["input_ids"], -100)
    targets[rows["document_ids"] == 0] = -100
    key = "shift_labels" if name.endswith("CausalLM") else "labels"
    loss = model(**rows, **{key: targets}, num_items_in_batch=7).loss
    logits = model(**rows).logits
    total = 0.0
    for row, begin, end in ((0, 0, 8), (0, 8, 38), (1, 0, 40)):
        alone = own(model, input_ids=rows["input_ids"][row : row + 1, begin:end]).logits[0]
        assert (logits[row, begin:end] - alone).abs().max() <= 1e-4 * alone.abs().max()
        total += float(functional.cross_entropy(alone, targets[row, begin:end], reduction="sum").detach())
    assert abs(float(loss.detach()) * 7 - total) <= 1e-4 * total
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_pairs_of_a_row_are_what_they_are_alone() -> None:
    config = transformers.T5Config(
        vocab_size=97,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    own = type(model).forward
    adapt(model, "seq2seq", 40)
    rows = batch()
    outputs = {f"decoder_{name}": array[:, :20].clone() for name, array in rows.items()}
    outputs["decoder_document_ids"] = torch.tensor([[1] * 4 + [2] * 14 + [0] * 2, [1] * 20])
    places = [torch.cat([torch.arange(length) for length in row]) for row in ((4, 14, 2), (20,))]
    outputs["decoder_position_ids"] = torch.stack(places)
    labels = outputs["decoder_input_ids"].masked_fill(outputs["decoder_document_ids"] == 0, -100)
    loss = model(**rows, **outputs, labels=labels, num_items_in_batch=3).loss
    total = 0.0
    for row, asked, answered in ((0, (0, 8), (0, 4)), (0, (8, 38), (4, 18)), (1, (0, 40), (0, 20))):
        question = rows["input_ids"][row : row + 1, slice(*asked)]
        answer = outputs["decoder_input_ids"][row : row + 1, slice(*answered)]
        alone = own(model, input_ids=question, decoder_input_ids=answer).logits[0]
        total += float(functional.cross_entropy(alone, labels[row, slice(*answered)], reduction="sum").detach())
    assert abs(float(loss.detach()) * 3 - total) <= 1e-4 * total


def test_a_class_that_does_not_honour_padding_is_refused() -> None:
    model = tiny("BertForMaskedLM")
    own = model.forward
    model.forward = lambda input_ids, **_: own(input_ids=input_ids)  # masks are ignored
    with pytest.raises(ArtifactError, match="padding behind it"):
        adapt(model, "encoder", 40)


def test_operations_count_the_head_once_and_tables_not() -> None:
    model = tiny("BertForMaskedLM")
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 48) + 32 * 32 + 97 * 32
    least, most = 6 * matrices, 6 * (matrices + 2 * 600) + 12 * 2 * 32 * 40  # biases and norms
    assert least + 12 * 2 * 32 * 40 <= flops_per_token(model, 40) <= most


WORDS = ("cat", "dog")
TEXT = "".join(f"the {word} of number {number} says it {word}s again\n" for number in range(60) for word in WORDS)


def test_a_run_trains_goes_on_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeBERTa, which Loom does not hold: trained to the middle and on equals trained at once; the export is its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    base = {
        "name": "base",
        "tokenizer": {"algorithm": "wordpiece", "vocab_size": 160},
        "data": {"train": ["text.txt"], "sequence_length": 32, "validation": {"fraction": 0.1}, "document": "line"},
        "model": {"architecture": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "objective": {"kind": "mlm"},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 2, "batch_tokens": 128, "precision": "fp32"},
    }
    assert run(config_from_dict(base)) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained("runs/base/tokenizer")
    config = transformers.DebertaV2Config(
        **(SIZES | {"vocab_size": len(tokenizer)}), relative_attention=True, type_vocab_size=0, pad_token_id=0
    )
    transformers.DebertaV2ForMaskedLM(config).save_pretrained("deberta")
    tokenizer.save_pretrained("deberta")
    raw = base | {"model": {"from": "deberta", "class": "stock"}, "tokenizer": {"from": "deberta"}}
    raw["train"] = base["train"] | {"steps": 6}  # type: ignore[operator]
    straight, cut = config_from_dict(raw | {"name": "straight"}), config_from_dict(raw | {"name": "cut"})
    assert run(straight) == 0
    step = Trainer._step

    def stopping(self: Trainer, progress: Any, *rest: Any) -> None:
        step(self, progress, *rest)
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", stopping)
        assert run(cut) == EXIT_STOPPED
    assert run(cut) == 0
    weights = [
        load_file(made.directory / "train/checkpoints/step-00000006/model/model.safetensors")
        for made in (straight, cut)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    exported = transformers.AutoModelForMaskedLM.from_pretrained(straight.directory / "export")
    assert type(exported).__name__ == "DebertaV2ForMaskedLM"
    scores = json.loads((straight.directory / "report" / "scores.json").read_text())
    assert math.isfinite(scores["validation"]["loss"])
