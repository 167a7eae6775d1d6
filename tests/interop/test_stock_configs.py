"""Which stock configuration holds a shape, what is refused by its key, and that every version reads the same config."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file
from stock_builders import (
    ARCHITECTURE_NAMES,
    YARN,
    as_loom,
    as_stock,
    assert_configs_equal,
    assert_same_logits,
    kept_state,
    load_exactly,
    loom_model,
    tiny_config,
    tokens,
)

from pretrain.config_model import HOME_KINDS
from pretrain.interop import HOMES, NoStockHome, config_json, from_stock, from_stock_config, stock_config, to_stock


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
        ("bert", {"tie_word_embeddings": False, "hidden_act": "relu"}, "tie_word_embeddings"),
        ("bert", {"mlp_kind": "gated"}, "mlp_kind"),
        ("bert", {"position_offset": 3}, "position_offset"),
        ("bert", {"position_kind": "sinusoidal"}, "position_kind"),
        ("bert", {"num_hidden_groups": 1}, "num_hidden_groups"),
        ("bert", {"embedding_scale": 2.0}, "embedding_scale"),
        ("roberta", {"position_offset": 2}, "position_offset"),
        ("roberta", {"cls_token_id": 1}, "pad_token_id"),
        ("roberta", {"hidden_act": "silu"}, "hidden_act"),
        ("roberta", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("electra", {"hidden_act": "gelu_new", "embedding_size": 24, "tie_word_embeddings": False}, "hidden_act"),
        ("electra", {"head_transform": False, "embedding_size": 24}, "head_transform"),
        ("electra", {"embedding_norm": False}, "embedding_norm"),
        ("albert", {"embedding_size": 24}, "embedding_size"),
        ("albert", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("albert", {"attention_softcap": 5.0}, "attention_softcap"),
        ("eurobert", {"head_bias": True}, "head_bias"),
        ("eurobert", {"qk_norm": "per_head"}, "qk_norm"),
        ("eurobert", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("eurobert", {"head_dim": 6, "num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size"),
        ("llama", {"qk_norm": "full_width"}, "qk_norm"),
        ("llama", {"logit_softcap": 5.0}, "logit_softcap"),
        ("llama", {"residual_scale": 0.5}, "residual_scale"),
        ("llama", {"block_kind": "parallel"}, "block_kind"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"global_attention_every": 2, "local_window": 8}, "global_attention_every"),
        ("modernbert-decoder", {"bos_token_id": 1}, "pad_token_id"),
        ("modernbert-decoder", {"pad_token_id": 1}, "bos_token_id"),
        ("modernbert-decoder", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("modernbert-decoder", {"mlp_kind": "plain"}, "mlp_kind"),
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


def test_a_classifier_is_refused_where_the_stock_one_looks_elsewhere() -> None:
    loom = loom_model("bert", "classification", classifier_pooling="mean")
    with pytest.raises(NoStockHome, match="classifier_pooling"):
        to_stock(loom.config, kept_state(loom))
    loom = loom_model("bert", classifier_pooling="mean")  # a language model has no classifier
    assert from_stock(*to_stock(loom.config, kept_state(loom)))[0].classifier_pooling == "mean"
    eurobert = loom_model("eurobert", "question_answering")
    with pytest.raises(NoStockHome, match=r"task one of pretraining, .* \(here 'question_answering'\)"):
        to_stock(eurobert.config, kept_state(eurobert))


@pytest.mark.parametrize(
    ("architecture", "keys", "home"),
    [
        ("bert", {"tie_word_embeddings": False}, transformers.ElectraForMaskedLM),
        ("bert", {"embedding_size": 10}, transformers.ElectraForMaskedLM),
        ("bert", {"embedding_size": 10, "num_hidden_groups": 1}, transformers.AlbertForMaskedLM),
        ("bert", {"position_offset": 3, "pad_token_id": 2}, transformers.RobertaForMaskedLM),
        ("roberta", {"position_offset": 0, "hidden_act": "silu"}, transformers.BertForMaskedLM),
        ("llama", {"qk_norm": "per_head"}, transformers.Qwen3ForCausalLM),
        ("qwen3", {"qk_norm": "none", "mlp_bias": True}, transformers.LlamaForCausalLM),
    ],
)
def test_a_shape_goes_to_its_next_of_kin(architecture: str, keys, home) -> None:
    loom = loom_model(architecture, **keys)
    stock = as_stock(loom)
    assert isinstance(stock, home)
    assert_same_logits(loom, stock)
    assert_configs_equal(as_loom(stock).config, loom.config)


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
            transformers.LlamaConfig(
                rope_parameters={
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "rope_theta": 10000.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            ),
            "rope_parameters",
        ),
        (transformers.BertConfig(is_decoder=True), "is_decoder"),
        (transformers.BertConfig(tie_word_embeddings=False), "tie_word_embeddings"),
        (transformers.ModernBertConfig(classifier_activation="relu"), "classifier_activation"),
        (transformers.RobertaConfig(pad_token_id=None), "pad_token_id"),
        (transformers.RobertaConfig(hidden_act="relu"), "hidden_act"),
        (transformers.RobertaConfig(tie_word_embeddings=False), "tie_word_embeddings"),
        (transformers.RobertaConfig(type_vocab_size=0), "type_vocab_size"),
        (transformers.ElectraConfig(hidden_act="relu"), "hidden_act"),
        (transformers.ElectraConfig(is_decoder=True), "is_decoder"),
        (transformers.AlbertConfig(embedding_size=64, hidden_size=64), "embedding_size 64"),
        (transformers.AlbertConfig(inner_group_num=2), "inner_group_num"),
        (transformers.AlbertConfig(num_hidden_layers=6, num_hidden_groups=4), "num_hidden_groups"),
        (transformers.AlbertConfig(tie_word_embeddings=False), "tie_word_embeddings"),
        (transformers.Qwen3Config(use_sliding_window=True, max_window_layers=2), "use_sliding_window"),
        (transformers.EuroBertConfig(hidden_act="tanh"), "hidden_act 'tanh'"),
        (
            transformers.EuroBertConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
            "rope_parameters",
        ),
        (transformers.ModernBertDecoderConfig(classifier_activation="relu"), "classifier_activation"),
        (transformers.DebertaV2Config(), "model_type 'deberta-v2'"),
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


def test_config_json_of_gpt2_names_its_context_as_other_readers_do(tmp_path) -> None:
    """Under the name of early releases too; it comes back as the same model."""
    config = tiny_config("gpt2")
    entries = config_json(stock_config(config))
    assert entries["n_ctx"] == entries["n_positions"] == config.max_position_embeddings
    (tmp_path / "config.json").write_text(json.dumps(entries))
    back = from_stock_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert back.to_dict() == from_stock_config(stock_config(config)).to_dict()


def test_config_json_of_other_stock_models_gains_the_rotary_base() -> None:
    config = transformers.Qwen3Config(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 123.0})
    entries = config_json(config)
    assert entries["rope_theta"] == 123.0
    assert entries["rope_scaling"]["factor"] == 4.0


OLD_READER = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file
assert transformers.__version__.startswith("4.57"), transformers.__version__
said = {}
for directory in sorted(Path(sys.argv[1]).iterdir()):
    name = transformers.AutoConfig.from_pretrained(directory).architectures[0]
    try:
        model, report = getattr(transformers, name).from_pretrained(directory, output_loading_info=True)
    except (TypeError, ZeroDivisionError) as error:
        said[directory.name] = type(error).__name__
        continue
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    expected = load_file(directory / "expected" / "logits.safetensors")
    with torch.no_grad():
        logits = model.eval()(input_ids=expected["ids"], attention_mask=expected["mask"]).logits
    difference = (logits - expected["logits"])[expected["mask"] == 1].abs().max() / expected["logits"].abs().max()
    said[directory.name] = float(difference)
print(json.dumps(said))
"""
OLD_CASES: dict[str, tuple[str, dict[str, object]]] = {
    **{name: (name, {}) for name in ARCHITECTURE_NAMES if name not in ("eurobert", "modernbert-decoder")},
    "modernbert-decoder": ("modernbert-decoder", {"local_rope_theta": 3000.0}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "qwen3-yarn": ("qwen3", {"rope_scaling": YARN}),
    "electra-untied": ("electra", {"tie_word_embeddings": False}),
    "albert-groups": ("albert", {"num_hidden_layers": 6, "num_hidden_groups": 3}),
    "stops-decoder-with-two-bases": ("modernbert-decoder", {}),
    "stops-other-pattern": ("modernbert", {"global_attention_every": 1, "attention_pattern": ["local", "global"]}),
}


def test_transformers_4_57_reads_the_same_models_or_stops(tmp_path) -> None:
    """What it cannot build it must not build as something else. EuroBERT is newer than it."""
    old = os.environ.get("PRETRAIN_TRANSFORMERS_457")
    if not old:
        pytest.skip("PRETRAIN_TRANSFORMERS_457 is not set: give it a directory that holds transformers 4.57")
    for case, (architecture, keys) in OLD_CASES.items():
        write_for_old_reader(loom_model(architecture, **keys), tmp_path / case)
    done = subprocess.run(
        [sys.executable, "-P", "-c", OLD_READER, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": old},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said.keys() == OLD_CASES.keys()
    for case, found in said.items():
        assert isinstance(found, str) if case.startswith("stops") else found < 1e-5, (case, found)


def write_for_old_reader(loom, directory) -> None:
    (directory / "expected").mkdir(parents=True)
    config, state = to_stock(loom.config, kept_state(loom))
    (directory / "config.json").write_text(json.dumps(config_json(config)))
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, 21:] = 0
    with torch.no_grad():
        logits = loom(input_ids=ids, attention_mask=mask).logits
    save_file({"ids": ids, "mask": mask, "logits": logits}, directory / "expected" / "logits.safetensors")


@pytest.mark.parametrize(
    ("architecture", "ids"),
    [
        ("bert", {"cls_token_id": 2, "sep_token_id": 3}),
        ("modernbert", {"pad_token_id": 5, "cls_token_id": 2, "sep_token_id": 3}),
        ("gpt2", {"bos_token_id": 9, "eos_token_id": 9}),
        ("llama", {"bos_token_id": 1, "eos_token_id": 2}),
        ("roberta", {"pad_token_id": 3, "cls_token_id": 2}),
        ("electra", {"cls_token_id": 2, "sep_token_id": 3}),
        ("albert", {"cls_token_id": 2, "sep_token_id": 3}),
        ("eurobert", {"pad_token_id": 5, "cls_token_id": 2, "sep_token_id": 3}),
        ("qwen3", {"bos_token_id": 1, "eos_token_id": [2, 4]}),
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


def test_a_run_can_ask_for_every_home_by_name() -> None:
    assert {name: home.kind for name, home in HOMES.items()} == HOME_KINDS
