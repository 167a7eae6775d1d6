"""Encoder-decoders and their stock homes, Marian and T5: the same logits and outputs, and nothing lost on the road."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from stock_builders import kept_state, load_exactly, randomize, relative, tokens
from transformers import AutoModel, AutoModelForSeq2SeqLM

from pretrain.interop import NoStockHome, config_json, from_stock, from_stock_config, stock_config, to_stock
from pretrain.interop.published import joined_names
from pretrain.model_dir import write_model, write_model_share
from pretrain.model_reading import read_loom, read_stock
from pretrain.models import LoomSeq2SeqForConditionalGeneration, loom_config, model_class, model_from_config
from pretrain.published_store import PublishedStore

T5_11 = {"mlp_kind": "gated", "hidden_act": "gelu_new", "tie_word_embeddings": False, "output_scale": 1.0}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("transformer", {}),
    ("transformer", {"head_bias": True, "hidden_act": "silu", "num_decoder_layers": 3, "embedding_scale": 1.0}),
    ("transformer", {"pad_token_id": 5, "decoder_start_token_id": 5, "eos_token_id": 6, "hidden_dropout": 0.1}),
    ("t5", {}),
    ("t5", T5_11),
    ("t5", {"num_decoder_layers": 3, "norm_eps": 1e-3, "hidden_act": "gelu", "max_position_embeddings": 99}),
    ("t5", T5_11 | {"hidden_act": "silu", "num_attention_heads": 3}),
]
STOCK_CLASSES = {"transformer": "MarianMTModel", "t5": "T5ForConditionalGeneration"}
MAY_BE_MISSING = {"model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"}


def loom_model(architecture: str, task: str = "pretraining", **keys: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 67,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
    }
    if architecture == "t5":
        sizes |= {"head_dim": 5, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 11}
    config = loom_config(architecture, **(sizes | keys))
    model = model_class(config, task)(config)
    randomize(model)
    return model.eval()


def stock_directory(loom: Any, directory: Path) -> Any:
    """The stock model that plain transformers reads from what we wrote, every tensor of it accounted for."""
    write_model(loom, directory)
    model, report = AutoModelForSeq2SeqLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    mask, output_mask = torch.ones(3, 19, dtype=torch.long), torch.ones(3, 13, dtype=torch.long)
    mask[1, 11:], mask[2, 1:] = 0, 0
    output_mask[0, 9:], output_mask[2, 2:] = 0, 0
    return {
        "input_ids": tokens(3, 19),
        "attention_mask": mask,
        "decoder_input_ids": tokens(3, 13, seed=1),
        "decoder_attention_mask": output_mask,
    }


def assert_same_logits(loom: Any, stock: Any) -> None:
    given = batch()
    plain = {name: given[name] for name in ("input_ids", "decoder_input_ids")}
    for backend in ("eager", "sdpa"):
        loom.set_attn_implementation(backend)
        stock.set_attn_implementation(backend)
        with torch.no_grad():
            assert relative(loom(**plain).logits, stock(**plain).logits) < 1e-5
            ours, theirs = (model(**given).logits for model in (loom, stock))
        shown = given["decoder_attention_mask"] == 1
        assert relative(ours[shown], theirs[shown]) < 1e-5


def assert_configs_equal(first: Any, second: Any) -> None:
    ignored = {"architectures", "_name_or_path", "loom", "dtype"}
    ours, theirs = (
        {key: value for key, value in config.to_dict().items() if key not in ignored} for config in (first, second)
    )
    assert ours == theirs


def assert_bit_equal(first: Any, second: Any) -> None:
    ours, theirs = kept_state(first), kept_state(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(("architecture", "keys"), VARIANTS)
def test_a_written_directory_is_the_stock_model_and_comes_back_bit_equal(architecture: str, keys, tmp_path) -> None:
    loom = loom_model(architecture, **keys)
    stock = stock_directory(loom, tmp_path)
    assert type(stock).__name__ == STOCK_CLASSES[architecture]
    assert_same_logits(loom, stock)
    back = read_loom(tmp_path)
    assert_configs_equal(back.config, loom.config)
    assert_bit_equal(back, loom)
    assert relative(read_stock(tmp_path)(**batch()).logits, stock(**batch()).logits) == 0
    again = tmp_path / "again"  # as a user's own save writes it
    stock.save_pretrained(again, max_shard_size="40KB")
    assert len(list(again.glob("*.safetensors"))) > 1
    assert_bit_equal(read_loom(again), loom)


@pytest.mark.parametrize(
    ("architecture", "keys", "num_beams"),
    [
        ("transformer", {}, 4),
        ("transformer", {"head_bias": True, "decoder_start_token_id": 5, "pad_token_id": 6, "eos_token_id": 7}, 1),
        ("t5", {}, 1),
        ("t5", T5_11, 4),
    ],
)
def test_generation_equals_the_stock_class_token_for_token(architecture: str, keys, num_beams: int, tmp_path) -> None:
    loom = loom_model(architecture, **keys)
    stock = stock_directory(loom, tmp_path)
    given = {key: batch()[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 9, "num_beams": num_beams, "length_penalty": 0.6}
    ids = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    assert all(getattr(stock.generation_config, name) == getattr(loom.config, name) for name in ids)
    assert torch.equal(loom.generate(**given, **options), stock.generate(**given, **options))


def stock_models() -> list[Any]:
    """Stock classes with configs of their own, as transformers makes them."""
    marian = {
        "vocab_size": 67,
        "d_model": 24,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 36,
        "decoder_ffn_dim": 36,
        "max_position_embeddings": 40,
        "activation_function": "swish",
        "scale_embedding": True,
        "pad_token_id": 66,
        "decoder_start_token_id": 66,
    }
    t5 = {"vocab_size": 67, "d_model": 24, "d_kv": 7, "d_ff": 36, "num_layers": 3, "num_decoder_layers": 2}
    t5 |= {"num_heads": 3, "decoder_start_token_id": 0}
    made = [
        transformers.MarianMTModel(transformers.MarianConfig(**marian)),
        transformers.T5ForConditionalGeneration(transformers.T5Config(**t5)),
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(**t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        ),
    ]
    for model in made:
        positions = {name: tensor.clone() for name, tensor in model.state_dict().items() if "embed_positions" in name}
        randomize(model, seed=3)
        model.load_state_dict(positions, strict=False)
        if "final_logits_bias" in dict(model.named_buffers()):
            model.final_logits_bias.normal_()
    return made


@pytest.mark.parametrize("number", range(3))
def test_a_stock_model_comes_in_and_goes_back_with_every_tensor(number: int) -> None:
    stock = stock_models()[number].eval()
    config, state = from_stock(stock.config, stock.state_dict())
    loom = load_exactly(model_from_config(config), state)
    assert isinstance(loom, LoomSeq2SeqForConditionalGeneration)
    assert_same_logits(loom, stock)
    back, returned = to_stock(loom.config, kept_state(loom))
    if stock.config.model_type == "marian":
        assert (loom.config.hidden_act, back.activation_function) == ("silu", "silu")  # another name of swish
        stock.config.activation_function = "silu"
    fields = set(json.loads(stock.config.to_json_string(use_diff=False))) - {"architectures", "forced_eos_token_id"}
    assert {key: getattr(back, key) for key in fields} == {key: getattr(stock.config, key) for key in fields}
    given = stock.state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in returned.items())
    left_out = given.keys() - returned.keys() - MAY_BE_MISSING
    assert all(torch.equal(given[name], given[next(n for n in returned if "shared" in n)]) for name in left_out)


@pytest.mark.parametrize(("architecture", "keys"), [VARIANTS[0], VARIANTS[1], VARIANTS[3], VARIANTS[4]])
def test_bare_models_convert_too(architecture: str, keys, tmp_path) -> None:
    loom = loom_model(architecture, "base", **keys)
    write_model(loom, tmp_path)
    stock, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(stock).__name__ == {"transformer": "MarianModel", "t5": "T5Model"}[architecture]
    assert not report["unexpected_keys"]
    assert set(report["missing_keys"]) <= {name.removeprefix("model.") for name in MAY_BE_MISSING}
    given = batch()
    with torch.no_grad():
        ours, theirs = loom(**given).last_hidden_state, stock(**given).last_hidden_state
    shown = given["decoder_attention_mask"] == 1
    assert relative(ours[shown], theirs[shown]) < 1e-5
    config, state = from_stock(stock.config, stock.state_dict())
    assert config.architectures == ["LoomSeq2SeqModel"]
    assert state.keys() == kept_state(loom).keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in kept_state(loom).items())


@pytest.mark.parametrize(
    ("architecture", "keys", "in_the_way"),
    [
        ("transformer", {"sinusoidal_layout": "interleaved"}, "sinusoidal_layout"),
        ("transformer", {"norm_placement": "pre"}, "norm_placement"),
        ("transformer", {"embedding_scale": 3.0}, "embedding_scale"),
        ("transformer", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("transformer", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("transformer", {"norm_eps": 1e-6}, "norm_eps"),
        ("transformer", {"head_dim": 8}, "head_dim"),
        ("transformer", {"decoder_start_token_id": None, "pad_token_id": 0}, "decoder_start_token_id"),
        ("transformer", {"position_kind": "learned"}, "position_kind"),
        ("transformer", {"mlp_bias": False}, "mlp_bias"),
        ("t5", {"output_scale": 1.0}, "output_scale"),
        ("t5", {"tie_word_embeddings": False}, "output_scale"),
        ("t5", {"attention_scale": 0.5}, "attention_scale"),
        ("t5", {"mlp_kind": "gated", "hidden_act": "gelu"}, "hidden_act"),
        ("t5", {"norm_kind": "layer_norm"}, "norm_kind"),
        ("t5", {"attention_bias": True}, "attention_bias"),
        ("t5", {"logit_softcap": 30.0}, "logit_softcap"),
        ("t5", {"qk_norm": "per_head"}, "qk_norm"),
    ],
)
def test_a_shape_without_a_stock_home_is_refused_by_its_key(architecture: str, keys, in_the_way: str) -> None:
    loom = loom_model(architecture, **keys)
    with pytest.raises(NoStockHome, match=in_the_way) as refusal:
        to_stock(loom.config, kept_state(loom))
    assert in_the_way in refusal.value.keys


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (
            transformers.MarianConfig(decoder_vocab_size=99, share_encoder_decoder_embeddings=False),
            "decoder_vocab_size",
        ),
        (transformers.MarianConfig(share_encoder_decoder_embeddings=False), "share_encoder_decoder_embeddings"),
        (transformers.MarianConfig(tie_word_embeddings=False), "tie_word_embeddings"),
        (transformers.MarianConfig(decoder_ffn_dim=2048), "decoder_ffn_dim"),
        (transformers.MarianConfig(decoder_attention_heads=8), "decoder_attention_heads"),
        (transformers.MarianConfig(encoder_layerdrop=0.1), "encoder_layerdrop"),
        (transformers.T5Config(feed_forward_proj="gated-tanh"), "hidden_act"),
    ],
)
def test_a_stock_value_without_a_switch_is_refused_by_its_key(config, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        from_stock_config(config)


def test_an_encoder_decoder_in_a_home_of_another_name() -> None:
    """A `transformer` whose switches are T5's goes to T5, and remembers what it was called."""
    t5 = loom_model("t5", **T5_11)
    keys = {name: getattr(t5.config, name) for name in ("norm_kind", "norm_bias", "norm_eps", "norm_placement")}
    keys |= {name: getattr(t5.config, name) for name in ("attention_bias", "mlp_bias", "attention_scale", "head_dim")}
    keys |= {"position_kind": "relative", "embedding_scale": 1.0, "label_smoothing": 0.3, **T5_11}
    loom = loom_model("transformer", **keys)
    stock = stock_config(loom.config)
    assert stock.model_type == "t5"
    back = from_stock_config(stock)
    assert (back.architecture, back.label_smoothing) == ("transformer", 0.3)
    assert_configs_equal(back, loom.config)


def test_tensors_missing_left_over_or_changed_are_named() -> None:
    for architecture in ("transformer", "t5"):
        loom = loom_model(architecture)
        state = kept_state(loom)
        with pytest.raises(ValueError, match=r"left over \['model.decoder.layers.9.extra'\]"):
            to_stock(loom.config, state | {"model.decoder.layers.9.extra": torch.zeros(1)})
        name = "model.decoder.layers.1.cross_attn.k_proj.weight"
        with pytest.raises(ValueError, match=rf"missing \['{name}'\]"):
            to_stock(loom.config, {key: tensor for key, tensor in state.items() if key != name})
        copies = {key: tensor.clone() for key, tensor in loom.state_dict().items()}
        to_stock(loom.config, copies)
        copies["lm_head.weight"] += 1
        with pytest.raises(ValueError, match=r"lm_head.weight differs from model.encoder.embed_tokens.weight"):
            to_stock(loom.config, copies)
    marian = stock_models()[0]
    state = {name: tensor.clone() for name, tensor in marian.state_dict().items()}
    state["model.decoder.embed_positions.weight"][3, 4] += 0.1
    with pytest.raises(ValueError, match=r"model.decoder.embed_positions.weight is not what a marian model computes"):
        from_stock(marian.config, state)
    config, state = to_stock(loom_model("transformer").config, kept_state(loom_model("transformer")))
    assert not state["final_logits_bias"].any()
    with pytest.raises(ValueError, match="final_logits_bias is not zero"):
        from_stock(config, state | {"final_logits_bias": torch.ones(1, 67)})


def test_a_packed_row_equals_the_stock_model_on_each_pair_alone(tmp_path) -> None:
    for architecture, keys in (VARIANTS[0], VARIANTS[4]):
        loom = loom_model(architecture, **keys)
        directory = tmp_path / architecture
        directory.mkdir()
        stock = stock_directory(loom, directory)
        inputs, outputs = tokens(1, 20), tokens(1, 16, seed=1)
        pieces = torch.tensor([[1] * 6 + [2] * 11 + [0] * 3])
        output_pieces = torch.tensor([[1] * 9 + [2] * 5 + [0] * 2])
        with torch.no_grad():
            row = loom(
                input_ids=inputs, decoder_input_ids=outputs, document_ids=pieces, decoder_document_ids=output_pieces
            ).logits
            for piece in (1, 2):
                alone = stock(
                    input_ids=inputs[:, pieces[0] == piece], decoder_input_ids=outputs[:, output_pieces[0] == piece]
                ).logits
                assert relative(row[:, output_pieces[0] == piece], alone) < 1e-5


OLD_READER = """
import sys, torch, transformers
from safetensors.torch import load_file
assert transformers.__version__.startswith("4.57"), transformers.__version__
directory = sys.argv[1]
model, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
expected = load_file(directory + "/expected.safetensors")
shown = expected["decoder_attention_mask"] == 1
logits = expected.pop("logits")
with torch.no_grad():
    difference = (model.eval()(**expected).logits - logits)[shown].abs().max() / logits.abs().max()
print(type(model).__name__, float(difference))
assert difference < 1e-5, difference
"""


@pytest.mark.parametrize(("architecture", "keys"), [VARIANTS[0], VARIANTS[1], VARIANTS[3], VARIANTS[4]])
def test_transformers_4_57_reads_the_same_model(architecture: str, keys, tmp_path) -> None:
    old = os.environ.get("PRETRAIN_TRANSFORMERS_457")
    if not old:
        pytest.skip("PRETRAIN_TRANSFORMERS_457 is not set: give it a directory that holds transformers 4.57")
    loom = loom_model(architecture, **keys)
    write_model(loom, tmp_path)
    with torch.no_grad():
        logits = loom(**batch()).logits
    save_file(batch() | {"logits": logits}, tmp_path / "expected.safetensors")
    done = subprocess.run(
        [sys.executable, "-P", "-c", OLD_READER, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": old},
    )
    assert done.returncode == 0, done.stderr


def test_the_config_tells_version_4_of_transformers_whether_the_head_is_tied() -> None:
    for keys, tied in (({}, True), (T5_11, False)):
        config = stock_config(loom_model("t5", **keys).config)
        entries = config_json(config)
        assert entries["tie_word_embeddings"] is tied
        assert transformers.T5Config(**entries).scale_decoder_outputs is tied
        assert_configs_equal(from_stock_config(transformers.T5Config(**entries)), loom_model("t5", **keys).config)


def test_weights_lie_once_in_the_file(tmp_path) -> None:
    write_model(loom_model("transformer"), tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    tables = [name for name in names if any(word in name for word in ("shared", "embed", "lm_head"))]
    assert tables == ["model.shared.weight"]


@pytest.mark.parametrize(("architecture", "keys"), [VARIANTS[0], VARIANTS[4]])
def test_shares_of_a_directory_are_the_whole_and_a_checkpoint_reads_it(architecture: str, keys, tmp_path) -> None:
    """As the trainer writes it: each process its share, and zeros that no tensor of ours stands behind by the first."""
    loom = loom_model(architecture, **keys)
    state = kept_state(loom)
    names = [name for together in joined_names(loom, state) for name in together]
    assert sorted(names) == sorted(state)
    shares = [names[::2], names[1::2]]
    for number in (1, 0):
        write_model_share(loom, tmp_path, weights=state, shares=shares, number=number)
    stock, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(loom, stock.eval())
    read = PublishedStore().read(loom, tmp_path)
    assert sorted(read) == sorted(state)
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
