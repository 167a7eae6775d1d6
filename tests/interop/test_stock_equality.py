"""Loom and stock models give the same logits from the same weights, both ways, and lose nothing on the road."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from stock_builders import (
    ARCHITECTURE_NAMES,
    as_loom,
    as_stock,
    kept_state,
    load_exactly,
    loom_model,
    randomize,
    relative,
    tiny_config,
    tokens,
)

from pretrain.interop import HOMES, NoStockHome, config_json, from_stock, stock_config, to_stock
from pretrain.models import LoomDecoderForCausalLM, LoomEncoderForMaskedLM

VARIANTS = [
    ("bert", {}),
    ("bert", {"hidden_act": "relu", "type_vocab_size": 3, "norm_eps": 1e-3}),
    ("modernbert", {}),
    ("modernbert", {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "head_dense_bias": True}),
    ("modernbert", {"global_attention_every": 1, "local_window": None, "local_rope_theta": None}),
    ("modernbert", {"tie_word_embeddings": False, "global_attention_every": 2, "hidden_act": "silu"}),
    ("gpt2", {}),
    ("gpt2", {"tie_word_embeddings": False, "hidden_act": "gelu"}),
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "rope_theta": 500.0}),
]


def assert_same_logits(loom, stock) -> None:
    ids = tokens(3, 40)
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[1, 29:] = 0
    mask[2, 4:] = 0
    for backend in ("eager", "sdpa"):
        loom.set_attn_implementation(backend)
        stock.set_attn_implementation(backend)
        with torch.no_grad():
            assert relative(loom(input_ids=ids).logits, stock(input_ids=ids).logits) < 1e-5
            ours, theirs = (model(input_ids=ids, attention_mask=mask).logits for model in (loom, stock))
        assert relative(ours[mask == 1], theirs[mask == 1]) < 1e-5


@pytest.mark.parametrize(("architecture", "keys"), VARIANTS)
def test_to_stock_and_back(architecture: str, keys) -> None:
    loom = loom_model(architecture, **keys)
    stock = as_stock(loom)
    assert type(stock).__name__ == HOMES[architecture].classes["pretraining"]
    assert_same_logits(loom, stock)
    back = as_loom(stock)
    assert_configs_equal(back.config, loom.config)
    state = kept_state(loom)
    assert state.keys() == kept_state(back).keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in kept_state(back).items())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "BertForMaskedLM",
            transformers.BertConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, vocab_size=67),
        ),
        (
            "ModernBertForMaskedLM",
            transformers.ModernBertConfig(
                hidden_size=24,
                num_hidden_layers=4,
                num_attention_heads=4,
                vocab_size=67,
                intermediate_size=36,
                local_attention=12,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                cls_token_id=1,
                sep_token_id=2,
            ),
        ),
        (
            "GPT2LMHeadModel",
            transformers.GPT2Config(n_embd=24, n_layer=3, n_head=4, vocab_size=67, bos_token_id=0, eos_token_id=0),
        ),
        (
            "LlamaForCausalLM",
            transformers.LlamaConfig(
                hidden_size=24, num_hidden_layers=3, num_attention_heads=4, vocab_size=67, intermediate_size=64
            ),
        ),
    ],
)
def test_from_stock_and_back(name: str, config) -> None:
    stock = getattr(transformers, name)(config).eval()
    randomize(stock, seed=3)
    loom = as_loom(stock)
    assert isinstance(loom, LoomEncoderForMaskedLM | LoomDecoderForCausalLM)
    assert_same_logits(loom, stock)
    back, state = to_stock(loom.config, kept_state(loom))
    fields = set(json.loads(config.to_json_string(use_diff=False))) - {"architectures", "classifier_dropout", "n_inner"}
    assert {key: getattr(back, key) for key in fields} == {key: getattr(config, key) for key in fields}
    given = kept_state(stock)
    assert state.keys() == given.keys()
    assert all(torch.equal(tensor, given[key]) for key, tensor in state.items())


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
@pytest.mark.parametrize("task", ["classification", "base"])
def test_classifiers_and_bare_models_convert_too(architecture: str, task: str) -> None:
    loom = loom_model(architecture, task, pad_token_id=1)
    stock = as_stock(loom) if not (architecture == "bert" and task == "base") else None
    if stock is None:  # the stock base model would add a pooler, which ours has only for classification
        config, state = to_stock(loom.config, kept_state(loom))
        stock = transformers.BertModel(config, add_pooling_layer=False).eval()
        stock.load_state_dict(state)
    ids = tokens(3, 20)
    with torch.no_grad():
        ours, theirs = loom(input_ids=ids)[0], stock(input_ids=ids)[0]
    assert relative(ours, theirs) < 1e-5
    config, state = from_stock(stock.config, kept_state(stock))
    assert config.architectures == [type(loom).__name__]
    assert all(torch.equal(tensor, kept_state(loom)[name]) for name, tensor in state.items())


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_a_packed_row_equals_the_stock_model_on_each_document_alone(architecture: str) -> None:
    loom = loom_model(architecture)
    stock = as_stock(loom)
    ids = tokens(1, 40)
    packed = torch.tensor([[1] * 9 + [2] * 26 + [0] * 5], dtype=torch.int32)
    with torch.no_grad():
        row = loom(input_ids=ids, document_ids=packed).logits
        for start, stop in ((0, 9), (9, 35)):
            assert relative(row[:, start:stop], stock(input_ids=ids[:, start:stop]).logits) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_tied_weights_stay_tied_and_copies_must_agree(architecture: str) -> None:
    loom = loom_model(architecture, tie_word_embeddings=True)
    stock = as_stock(loom)
    assert stock.get_output_embeddings().weight is stock.get_input_embeddings().weight
    with_copies = {name: tensor.clone() for name, tensor in loom.state_dict().items()}
    _, state = to_stock(loom.config, with_copies)
    assert state.keys() == kept_state(stock).keys()
    with_copies["lm_head.weight"] += 1
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        to_stock(loom.config, with_copies)
    from_stock(stock.config, stock.state_dict())  # copies that agree are taken


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_every_tensor_is_used_once_and_leftovers_are_named(architecture: str) -> None:
    loom = loom_model(architecture)
    state = kept_state(loom)
    with pytest.raises(ValueError, match=r"left over \['model.layers.9.extra'\]"):
        to_stock(loom.config, state | {"model.layers.9.extra": torch.zeros(1)})
    missing = dict(state)
    del missing["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"missing \['model.layers.1.self_attn.k_proj.weight'\]"):
        to_stock(loom.config, missing)
    stock = as_stock(loom)
    with pytest.raises(ValueError, match="left over"):
        from_stock(stock.config, kept_state(stock) | {"more": torch.zeros(1)})


@pytest.mark.parametrize(
    ("architecture", "keys", "in_the_way"),
    [
        ("gpt2", {"position_kind": "rotary"}, "position_kind"),
        ("gpt2", {"norm_kind": "rms_norm", "norm_bias": False}, "norm_kind"),
        ("gpt2", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("gpt2", {"head_dim": 4}, "head_dim"),
        ("gpt2", {"attention_scale": 1.0}, "attention_scale"),
        ("gpt2", {"global_attention_every": 2, "local_window": 8}, "global_attention_every"),
        ("llama", {"position_kind": "none"}, "position_kind"),
        ("llama", {"norm_placement": "post"}, "norm_placement"),
        ("llama", {"embedding_norm": True}, "embedding_norm"),
        ("bert", {"type_vocab_size": 0}, "type_vocab_size"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("bert", {"mlp_kind": "gated"}, "mlp_kind"),
        ("bert", {"classifier_pooling": "mean"}, "classifier_pooling"),
        ("modernbert", {"first_norm": True}, "first_norm"),
        ("modernbert", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("modernbert", {"norm_kind": "rms_norm"}, "norm_kind"),
        ("modernbert", {"type_vocab_size": 2}, "type_vocab_size"),
    ],
)
def test_a_shape_without_a_stock_home_is_refused_by_its_key(architecture: str, keys, in_the_way: str) -> None:
    loom = loom_model(architecture, **keys)
    with pytest.raises(NoStockHome, match=in_the_way) as refusal:
        to_stock(loom.config, kept_state(loom))
    assert in_the_way in refusal.value.keys


def test_a_shape_that_another_stock_architecture_holds_goes_there() -> None:
    llama_like = {
        "position_kind": "rotary",
        "norm_kind": "rms_norm",
        "norm_bias": False,
        "mlp_kind": "gated",
        "mlp_bias": False,
        "attention_bias": False,
        "hidden_act": "silu",
    }
    loom = loom_model("gpt2", **llama_like)
    stock = as_stock(loom)
    assert isinstance(stock, transformers.LlamaForCausalLM)
    assert_same_logits(loom, stock)
    assert_configs_equal(as_loom(stock).config, loom.config)


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_dropouts_and_initialisers_survive_the_road(architecture: str, tmp_path) -> None:
    config = tiny_config(
        architecture,
        hidden_dropout=0.1,
        attention_dropout=0.2,
        embedding_dropout=0.3,
        classifier_dropout=0.15,
        initializer="scaled_normal",
        initializer_range=0.01,
    )
    stock = stock_config(config)
    (tmp_path / "config.json").write_text(json.dumps(config_json(stock)))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    loom = loom_model(architecture)
    back, _ = from_stock(loaded, to_stock(loom.config, kept_state(loom))[1])
    assert_configs_equal(back, config)


@pytest.mark.parametrize(
    ("stock", "key"),
    [
        (transformers.GPT2Config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (transformers.GPT2Config(activation_function="tanh"), "hidden_act 'tanh'"),
        (
            transformers.LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
            "rope_parameters",
        ),
        (transformers.BertConfig(is_decoder=True), "is_decoder"),
        (transformers.BertConfig(tie_word_embeddings=False), "tie_word_embeddings"),
        (transformers.ModernBertConfig(decoder_bias=False), "decoder_bias"),
        (
            transformers.ModernBertConfig(
                num_hidden_layers=4,
                layer_types=["full_attention", "full_attention", "sliding_attention", "full_attention"],
            ),
            "layer_types",
        ),
        (transformers.T5Config(), "model_type 't5'"),
    ],
)
def test_a_stock_value_without_a_switch_is_refused_by_its_key(stock, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        from_stock(stock, {})


def test_labels_and_problem_type_are_carried() -> None:
    loom = loom_model("bert", "classification")
    loom.config.id2label, loom.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    loom.config.problem_type = "single_label_classification"
    config, state = to_stock(loom.config, kept_state(loom))
    assert (config.id2label, config.problem_type) == ({0: "no", 1: "yes"}, "single_label_classification")
    assert from_stock(config, state)[0].id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_config_json_is_read_alike_by_this_version(architecture: str, tmp_path) -> None:
    stock = stock_config(tiny_config(architecture))
    (tmp_path / "config.json").write_text(json.dumps(config_json(stock)))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(stock)
    names = set(json.loads(stock.to_json_string(use_diff=False))) - {"_name_or_path", "transformers_version"}
    assert {name: getattr(loaded, name) for name in names} == {name: getattr(stock, name) for name in names}


def test_config_json_of_other_stock_models_gains_the_rotary_base() -> None:
    config = transformers.Qwen3Config(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 123.0})
    entries = config_json(config)
    assert entries["rope_theta"] == 123.0
    assert entries["rope_scaling"]["factor"] == 4.0


OLD_READER = """
import sys, torch, transformers
from safetensors.torch import load_file
assert transformers.__version__.startswith("4.57"), transformers.__version__
directory = sys.argv[1]
config = transformers.AutoConfig.from_pretrained(directory)
name = config.architectures[0]
model, report = getattr(transformers, name).from_pretrained(directory, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
expected = load_file(directory + "/expected.safetensors")
with torch.no_grad():
    logits = model.eval()(input_ids=expected["ids"], attention_mask=expected["mask"]).logits
difference = (logits - expected["logits"])[expected["mask"] == 1].abs().max() / expected["logits"].abs().max()
print(name, float(difference))
assert difference < 1e-5, difference
"""


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_transformers_4_57_reads_the_same_model(architecture: str, tmp_path) -> None:
    old = os.environ.get("PRETRAIN_TRANSFORMERS_457")
    if not old:
        pytest.skip("PRETRAIN_TRANSFORMERS_457 is not set: give it a directory that holds transformers 4.57")
    from safetensors.torch import save_file

    loom = loom_model(architecture)
    config, state = to_stock(loom.config, kept_state(loom))
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, 21:] = 0
    with torch.no_grad():
        logits = loom(input_ids=ids, attention_mask=mask).logits
    save_file({"ids": ids, "mask": mask, "logits": logits}, tmp_path / "expected.safetensors")
    environment = os.environ | {"PYTHONPATH": old}
    done = subprocess.run(
        [sys.executable, "-P", "-c", OLD_READER, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


def assert_configs_equal(first, second) -> None:
    ignored = {"architectures", "_name_or_path", "loom", "dtype"}
    ours, theirs = (
        {key: value for key, value in config.to_dict().items() if key not in ignored} for config in (first, second)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("architecture", "ids"),
    [
        ("bert", {"cls_token_id": 2, "sep_token_id": 3}),
        ("modernbert", {"pad_token_id": 5, "cls_token_id": 2, "sep_token_id": 3}),
        ("gpt2", {"bos_token_id": 9, "eos_token_id": 9}),
        ("llama", {"bos_token_id": 1, "eos_token_id": 2}),
    ],
)
def test_roles_without_a_token_stay_without_one(architecture: str, ids, tmp_path) -> None:
    """A stock class would else take its default id, which here is an ordinary token, as padding or as the end."""
    loom = loom_model(architecture, **ids)
    config, state = to_stock(loom.config, kept_state(loom))
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    roles = [f"{role}_token_id" for role in ("pad", "bos", "eos", "cls", "sep")]
    assert {role: getattr(loaded, role, None) for role in roles} == dict.fromkeys(roles) | ids
    stock = load_exactly(getattr(transformers, config.architectures[0])(loaded), state)
    assert getattr(stock.get_input_embeddings(), "padding_idx", None) == ids.get("pad_token_id")
    assert_configs_equal(from_stock(loaded, state)[0], loom.config)
