"""Shapes that no stock architecture holds: refused with the key in the way, or the whole road with their code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from pretrain.config import config_from_dict
from pretrain.export import export_model
from pretrain.fill import fill_masks
from pretrain.interop import NoStockHome
from pretrain.model_dir import write_model
from pretrain.model_reading import read_config, read_loom, read_state
from pretrain.models import loom_config, model_class
from pretrain.published_store import PublishedStore
from pretrain.run import run
from pretrain.training.snapshots import share_out

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "birds", "sing", "and", "see")
AUTO = {
    "mlm": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
    "span-corruption": "AutoModelForSeq2SeqLM",
    "rtd": "AutoModelForPreTraining",
}
SHAPES: dict[str, dict[str, Any]] = {
    "mlm": {"architecture": "modernbert", "position_kind": "alibi"},
    "causal": {"architecture": "gpt2", "position_kind": "alibi", "block_kind": "parallel"},
    "span-corruption": {"architecture": "t5", "position_kind": "rotary"},
    "rtd": {"architecture": "modernbert", "position_kind": "alibi", "generator_size": 0.5},
}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
ELSEWHERE = """
import sys
sys.modules["pretrain"] = None  # an import of it fails
import torch, transformers
from safetensors.torch import load_file
auto, directory, proof = sys.argv[1:]
proof = load_file(proof)
given = {name: proof[name] for name in ("input_ids", "attention_mask")}
more = {"decoder_input_ids": given["input_ids"]} if "Seq2Seq" in auto else {}
model = getattr(transformers, auto).from_pretrained(directory, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
with torch.no_grad():
    found = model(**given, **more).logits[given["attention_mask"] == 1]
assert torch.equal(found, proof["logits"]), float((found - proof["logits"]).abs().max())
if not more:
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, trust_remote_code=True, num_labels=3
    )
    assert torch.equal(classifier.model.norm.weight, model.model.norm.weight)
    classifier(**given, labels=torch.tensor([0, 2])).loss.backward()
    assert classifier.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
print("equal")
"""


def config_of(directory: Path, kind: str, **sections: Any) -> Any:
    text = directory / "text.txt"
    if not text.exists():
        generator = np.random.default_rng(0)
        text.write_text("".join(" ".join(generator.choice(WORDS, 30)) + "\n" for _ in range(80)))
    plain: dict[str, Any] = {
        "name": kind,
        "out": str(directory / "runs"),
        "tokenizer": {"algorithm": "byte-bpe", "vocab_size": 384},
        "data": {"train": [str(text)], "document": "line", "sequence_length": 32, "validation": {"fraction": 0.1}},
        "model": SIZES | SHAPES[kind],
        "objective": {"kind": kind},
        "optimizer": {"lr": 1e-3},
        "train": {"batch_tokens": 64, "steps": 2, "micro_batch": 2},
        "log": {"to": []},
    }
    return config_from_dict(plain | sections)


@pytest.mark.parametrize(
    "kind", ["mlm", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("causal", "span-corruption", "rtd"))]
)
def test_the_whole_road_with_code(kind: str, tmp_path: Path) -> None:
    with pytest.raises(NoStockHome, match=r"position_kind.*export\.to: code"):
        run(config_of(tmp_path, kind))
    assert not (tmp_path / "runs").exists()
    config = config_of(tmp_path, kind, export={"to": "code"})
    quiet = Console(quiet=True)
    assert run(config, console=quiet) == 0
    out = config.directory / "export"
    assert json.loads((config.directory / "report" / "scores.json").read_text())["validation"]["loss"] > 0
    if kind == "mlm":  # read by the class that is installed: the code beside it is not run
        (out / "modeling_loom_encoder.py").write_text("raise SystemExit('ran')")
        assert fill_masks(out, "the quick [MASK]")
        assert export_model(out, tmp_path / "again", dtype="bf16").difference == 0
        out = tmp_path / "again"
        export_model(config.directory, out, replace=True, proof_file=config.directory / "report" / "logits.safetensors")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    proof = config.directory / "report" / "logits.safetensors"
    done = subprocess.run(
        [sys.executable, "-P", "-c", ELSEWHERE, AUTO[kind], str(out), str(proof)],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env=environment,
    )
    assert done.stdout == "equal\n", done.stderr


def drawn(kind: str, **keys: Any) -> Any:
    sizes = SIZES | {"vocab_size": 64, "max_position_embeddings": 32} | keys
    config = loom_config(**(sizes | SHAPES[kind] | keys))
    model = model_class(config, "replaced_token_detection" if kind == "rtd" else "pretraining")(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.mark.parametrize("kind", SHAPES)
def test_a_store_reads_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Whole, and in the shares of three processes; the directory goes on to more training."""
    model, store = drawn(kind), PublishedStore(code=True)
    with pytest.raises(NoStockHome):
        PublishedStore().write(model, {}, tmp_path)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    assert set(store.write(model, weights, whole)) == {path.name for path in whole.iterdir()}
    sizes = {name: tensor.nbytes for name, tensor in weights.items()}
    shares = share_out(sizes, sizes, store.together(model, sizes), 3).weights
    written: dict[str, str] = {}
    for number in range(3):
        written |= store.write_share(model, weights, parts, shares, number)
    assert set(written) == {path.name for path in parts.iterdir()}
    for directory in (whole, parts):
        read = PublishedStore().read(model, directory)  # whatever the run asks for now
        assert set(read) == set(weights)
        assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())
    assert read_config(whole).architectures == [type(model).__name__]
    task = "replaced_token_detection" if kind == "rtd" else "pretraining"
    again = read_loom(whole, task=task)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.named_parameters())


def test_what_the_form_is_decided_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, source = drawn("causal", position_kind="learned", block_kind="sequential"), tmp_path / "source"
    source.mkdir()
    write_model(model, source, code=True)
    export_model(source, tmp_path / "stock")  # a stock architecture holds it
    assert read_config(tmp_path / "stock").model_type == "gpt2"
    export_model(tmp_path / "stock", tmp_path / "ours", code=True)
    assert read_config(tmp_path / "ours").model_type == "loom_decoder"
    assert read_state(tmp_path / "ours").keys() == read_state(source).keys()
    bare = drawn("causal")
    for found in (type(bare), type(bare.config)):  # as they are before anybody registers them for the Hub
        monkeypatch.setattr(found, "_auto_class", None)
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(NoStockHome, match=r"position_kind.*--code"):
        export_model(tmp_path / "bare", tmp_path / "out")
    assert export_model(tmp_path / "bare", tmp_path / "out", code=True).difference == 0
    assert (tmp_path / "out" / "modeling_loom_decoder.py").is_file()


def test_code_is_for_our_classes(tmp_path: Path) -> None:
    model = {"from": "somewhere", "class": "stock"}
    with pytest.raises(ValueError, match=r"export\.to: code is for our own classes"):
        config_of(tmp_path, "causal", model=model, tokenizer={"from": "somewhere"}, export={"to": "code"})
