"""A model made of a smaller one: whole multiples of width compute the same, old pieces keep their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from pretrain.growing import extend_vocabulary, grow
from pretrain.models import LoomPreTrainedModel, loom_config, model_from_config

VOCABULARY = 61


def small(architecture: str, **keys: Any) -> LoomPreTrainedModel:
    """A tiny model in float64, every parameter drawn from a normal."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
    }
    if architecture in ("llama", "qwen3"):
        sizes |= {"num_key_value_heads": 2, "head_dim": 6}
    model = model_from_config(loom_config(architecture, **(sizes | keys))).eval()
    for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.3
    model.tie_weights()
    return model.double()


@pytest.fixture
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def logits(model: Any, vocabulary: int = VOCABULARY) -> torch.Tensor:
    ids = torch.randint(5, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits[..., :vocabulary]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["bert", "modernbert", "gpt2", "llama", "qwen3"])
def test_whole_multiples_of_width_compute_the_same(architecture: str, tied: bool) -> None:
    model = small(architecture, tie_word_embeddings=tied)
    before = logits(model)
    large = grow(model, {"hidden_size": 72})
    assert large.config.num_attention_heads == 12
    assert (logits(large) - before).abs().max() <= 1e-12 * before.abs().max()


@pytest.mark.usefixtures("float64")
def test_depth_copies_layers_in_order_and_any_width_is_taken() -> None:
    model = small("modernbert")
    large = grow(model, {"num_hidden_layers": 6, "hidden_size": 36, "intermediate_size": 44})
    assert large.config.num_hidden_layers == 6
    layers = [layer.mlp.up_proj.weight[:40, :24] * 2 for layer in large.model.layers]  # 12 of 24 channels stand twice
    for index in range(6):
        source = model.model.layers[index // 2].mlp.up_proj.weight
        assert torch.equal(layers[index][:, 12:], 2 * source[:, 12:])
        assert torch.equal(layers[index][:, :12], source[:, :12])
    assert torch.isfinite(logits(large)).all()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 12}, "hidden_size 12 is below 24"),
        ({"hidden_size": 25}, "gives no whole num_attention_heads"),
        ({"vocab_size": 100}, "vocab_size cannot grow"),
    ],
)
def test_what_cannot_grow_is_said(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grow(small("gpt2"), sizes)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_old_pieces_keep_their_logits(architecture: str, tied: bool) -> None:
    model = small(architecture, tie_word_embeddings=tied)
    before, table = logits(model), model.get_input_embeddings().weight.clone()
    large = extend_vocabulary(model, {61: [7, 9], 62: [5]}, 63)
    assert large.config.vocab_size == 64
    assert torch.allclose(logits(large), before, rtol=1e-13, atol=0)
    grown = large.get_input_embeddings().weight
    assert torch.equal(grown[:61], table)
    assert torch.equal(grown[61], table[[7, 9]].mean(0))
    assert torch.equal(grown[62], table[5])


@pytest.mark.parametrize("tied", [True, False])
def test_new_pieces_take_rows_that_were_to_spare(tied: bool) -> None:
    """A released model may have more embeddings than its tokenizer has ids: then the table does not grow."""
    model = small("llama", vocab_size=128, tie_word_embeddings=tied).float()
    before, table = logits(model), model.get_input_embeddings().weight.clone()
    large = extend_vocabulary(model, {61: [7, 9], 62: [5]}, 63)
    assert torch.equal(logits(large), before)
    grown = large.get_input_embeddings().weight
    assert torch.equal(grown[61], table[[7, 9]].mean(0))
    assert torch.equal(grown[62], table[5])
    assert torch.equal(grown[63:], table[63:])


def test_a_stock_class_is_resized_in_place() -> None:
    config = transformers.DebertaV2Config(
        vocab_size=61, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40
    )
    model = transformers.DebertaV2ForMaskedLM(config).eval()
    before = logits(model)
    large = extend_vocabulary(model, {61: [7, 9]}, 62)
    assert large is model
    assert torch.allclose(logits(large), before, atol=1e-6)
    assert torch.equal(model.get_input_embeddings().weight[61], model.get_input_embeddings().weight[[7, 9]].mean(0))


def test_another_models_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="id 61 has no embedding in a model of 61"):
        extend_vocabulary(small("bert"), {64: [61, 5]}, 65)
