"""The attention page: rollout and importance against their formulas, images that decode, a page without scripts."""

from __future__ import annotations

import base64
import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn import functional

from pretrain.attention import attention_of, rollout, write_attention
from pretrain.evaluation.loading import LoadedModel
from pretrain.models import loom_config, model_from_config
from pretrain.pages.attention import png

WORDS = ["[PAD]", "[UNK]", "</s>", "the", "cat", "sat", "on", "a", "mat"]
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
TEXT = "the cat sat on a mat"


def loaded(architecture: str) -> LoadedModel:
    """A tiny model with drawn weights and a tokenizer of words."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="</s>")
    ids = {"pad_token_id": 0, "eos_token_id": 2}
    if architecture in ("transformer", "t5"):
        ids["decoder_start_token_id"] = 0
    torch.manual_seed(0)
    model = model_from_config(loom_config(architecture, **SIZES, **ids)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    kind = {"bert": "mlm", "gpt2": "causal"}.get(architecture, "seq2seq")
    return LoadedModel(model, tokenizer, kind, architecture, architecture, torch.device("cpu"))


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_maps_and_importance_are_the_models(architecture: str) -> None:
    model = loaded(architecture)
    (stack,) = attention_of(model, TEXT)
    assert stack.queries == stack.keys == TEXT.split()
    assert stack.maps.shape == (3, 2, 6, 6)
    assert np.allclose(stack.maps.sum(-1), 1.0, atol=1e-5)
    assert stack.importance is not None
    # Scaling every probability of a head by (1 + e) moves the loss by e times the sum of probability x slope.
    ids = model.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    model.model.set_attn_implementation("eager")
    output = model.model(input_ids=ids, output_attentions=True)
    logits = output.logits[0, :-1] if architecture == "gpt2" else output.logits[0]
    loss = functional.cross_entropy(logits, ids[0, 1:] if architecture == "gpt2" else ids[0])
    slopes = torch.autograd.grad(loss, output.attentions)
    for layer, slope in enumerate(slopes):
        expected = (torch.from_numpy(stack.maps[layer]) * slope[0]).abs().mean(dim=(1, 2))
        assert np.allclose(stack.importance[layer], expected.numpy(), rtol=1e-4)
    if architecture == "gpt2":
        assert np.allclose(np.triu(stack.maps[0, 0], 1), 0.0)


def test_rollout_is_the_product_of_half_looks() -> None:
    generator = np.random.default_rng(0)
    maps = generator.random((2, 3, 4, 4)).astype(np.float32)
    maps /= maps.sum(-1, keepdims=True)
    first, second = (0.5 * maps[layer].mean(0) + 0.5 * np.eye(4) for layer in (0, 1))
    assert np.allclose(rollout(maps), second @ first, atol=1e-6)
    assert np.allclose(rollout(maps).sum(-1), 1.0, atol=1e-5)


def test_an_image_holds_every_number() -> None:
    weights = np.array([[0.0, 0.25, 1.0], [0.5, 0.04, 0.09]], dtype=np.float32)
    data = png(weights)
    places = {data[at + 4 : at + 8]: at for at in _chunks(data)}
    (length,) = struct.unpack(">I", data[places[b"IDAT"] : places[b"IDAT"] + 4])
    rows = zlib.decompress(data[places[b"IDAT"] + 8 : places[b"IDAT"] + 8 + length])
    levels = np.frombuffer(rows, dtype=np.uint8).reshape(2, 4)[:, 1:]
    assert np.abs((levels / 255.0) ** 2 - weights).max() < 0.005


def _chunks(data: bytes) -> list[int]:
    places, at = [], 8
    while at < len(data):
        places.append(at)
        at += struct.unpack(">I", data[at : at + 4])[0] + 12
    return places


@pytest.mark.parametrize(("architecture", "images"), [("bert", 7), ("transformer", 21)])
def test_a_page_stands_alone(architecture: str, images: int, tmp_path: Path) -> None:
    """Well-formed, no script, no address but its own images: one a head, and one of each stack."""
    path = write_attention(loaded(architecture), TEXT, tmp_path / "page.html", target=None)
    text = path.read_text(encoding="utf-8")
    ElementTree.fromstring(text.replace("<!DOCTYPE html>", ""))
    assert "<script" not in text
    assert "http:" not in text
    assert "https:" not in text
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(found) == images
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in found)


def test_tokens_are_read_as_text_and_never_as_tags(tmp_path: Path) -> None:
    """Characters of several bytes are shown once, and what is no text by its name."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": 257, "max_position_embeddings": 64}
    model = model_from_config(loom_config("gpt2", **sizes)).eval()
    text = "猫 <script>alert(1)</script><end>"
    bytewise = LoadedModel(model, tokenizer, "causal", "some/where", "some/where", torch.device("cpu"))
    (stack,) = attention_of(bytewise, text)
    assert list(stack.queries[:5]) == ["猫", "‥", "‥", " ", "<"]
    assert stack.queries[-1] == "<end>"
    written = write_attention(bytewise, text, tmp_path / "page.html").read_text(encoding="utf-8")
    page = ElementTree.fromstring(written.replace("<!DOCTYPE html>", ""))
    assert not page.findall(".//script")
    spans = ["".join(span.itertext()) for span in page.findall(".//div[@class='left']/span")]
    assert spans[:5] == ["猫", "‥", "‥", "␣", "<"]


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--target is for an encoder-decoder"):
        write_attention(loaded("gpt2"), TEXT, tmp_path / "page.html", target="a mat")
    with pytest.raises(ValueError, match="the text gives no token"):
        attention_of(loaded("gpt2"), "")
    with pytest.raises(ValueError, match="the text has 36 tokens, `gpt2` takes 32"):
        attention_of(loaded("gpt2"), " ".join([TEXT] * 6))
