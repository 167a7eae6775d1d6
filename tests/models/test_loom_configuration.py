"""Configs: published sizes, refusals that name the key, round trips, cost arithmetic against the real modules."""

from __future__ import annotations

import pytest
import torch
import transformers
from loom_builders import ARCHITECTURE_NAMES, tiny_config, tiny_model

from pretrain.models import (
    ARCHITECTURES,
    LoomDecoderConfig,
    LoomEncoderConfig,
    config_keys,
    flops_per_token,
    loom_config,
    model_class,
    num_multiplied_parameters,
)

PUBLISHED = {"bert": 109_514_298, "modernbert": 149_655_232, "gpt2": 124_439_808, "llama": 369_148_928}
STOCK = {
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig()),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(transformers.ModernBertConfig()),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32_000, hidden_size=1024, intermediate_size=2752, num_hidden_layers=24, num_attention_heads=16
        )
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_default_sizes_are_those_of_the_published_base_model(architecture: str) -> None:
    config = loom_config(architecture)
    with torch.device("meta"):
        ours = model_class(config)(config)
        stock = STOCK[architecture]()
    assert ours.num_parameters() == PUBLISHED[architecture]
    assert stock.num_parameters() == PUBLISHED[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_multiplied_parameters_are_the_matrices_of_the_model(architecture: str) -> None:
    model = tiny_model(architecture)
    matrices = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)
    )  # the tied head is a Linear and counts
    assert num_multiplied_parameters(model.config) == matrices


def test_flops_follow_windows_and_the_target_share() -> None:
    config = tiny_config("gpt2")
    assert flops_per_token(config, 32) == 6 * num_multiplied_parameters(config) + 12 * 4 * 32 * 24
    local = tiny_config("modernbert")  # layers 0 and 3 global, 1 and 2 within 8
    assert flops_per_token(local, 32) - 6 * num_multiplied_parameters(local) == 12 * (32 + 8 + 8 + 32) * 24
    head = 61 * 24 + 24 * 24
    assert num_multiplied_parameters(local) - num_multiplied_parameters(local, 0.25) == pytest.approx(0.75 * head)


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_a_saved_config_comes_back_equal(architecture: str, tmp_path) -> None:
    config = tiny_config(architecture, hidden_dropout=0.1, attention_scale=0.5)
    config.save_pretrained(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_the_classes_alone_know_the_conventions_too() -> None:
    assert LoomDecoderConfig(architecture="llama").norm_kind == "rms_norm"
    assert LoomEncoderConfig().norm_placement == "post"
    assert LoomDecoderConfig().to_dict() == LoomDecoderConfig(architecture="gpt2").to_dict()


@pytest.mark.parametrize(
    ("architecture", "hidden", "intermediate"),
    [("bert", 96, 384), ("gpt2", 96, 384), ("llama", 96, 256), ("llama", 1024, 2752), ("modernbert", 96, 144)],
)
def test_the_mlp_width_follows_the_architecture(architecture: str, hidden: int, intermediate: int) -> None:
    assert loom_config(architecture, hidden_size=hidden, num_attention_heads=8).intermediate_size == intermediate


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("gtp2", {}, "did you mean 'gpt2'"),
        ("gpt2", {"hiden_size": 8}, "did you mean 'hidden_size'"),
        ("gpt2", {"use_cash": True}, "did you mean 'use_cache'"),
        ("bert", {"use_cache": True}, "unknown model key 'use_cache'"),
        ("gpt2", {"hidden_size": 10, "num_attention_heads": 4}, "hidden_size 10 is not a multiple"),
        ("llama", {"num_attention_heads": 16, "num_key_value_heads": 5}, "num_key_value_heads 5"),
        ("llama", {"norm_bias": True}, "RMS norm has no bias"),
        ("llama", {"head_dim": 7}, "even number of channels"),
        ("gpt2", {"rope_theta": 1e4}, "rope_theta does nothing"),
        ("gpt2", {"local_window": 8}, "do nothing with global_attention_every 1"),
        ("gpt2", {"global_attention_every": 2}, "needs local_window"),
        ("bert", {"first_norm": False}, "first_norm false needs norm_placement pre"),
        ("gpt2", {"hidden_dropout": 1.0}, "hidden_dropout must lie in"),
        ("gpt2", {"hidden_act": "gelu_fast"}, "hidden_act 'gelu_fast' is unknown"),
        ("gpt2", {"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ("gpt2", {"hidden_size": "64"}, "hidden_size"),
        ("gpt2", {"vocab_size": 100, "eos_token_id": 100}, "eos_token_id 100 lies outside"),
    ],
)
def test_impossible_configs_are_refused_with_the_key(architecture: str, keys, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loom_config(architecture, **keys)


def test_an_encoder_design_does_not_fit_a_decoder() -> None:
    with pytest.raises(ValueError, match="bert is a encoder"):
        LoomDecoderConfig(architecture="bert")


def test_every_id_of_a_tokenizer_may_be_passed() -> None:
    ids = {"pad_token_id": 0, "unk_token_id": 1, "cls_token_id": 2, "sep_token_id": 3, "mask_token_id": 4}
    config = loom_config("bert", **ids)
    assert (config.pad_token_id, config.cls_token_id, config.sep_token_id) == (0, 2, 3)
    assert not hasattr(config, "mask_token_id")
    assert loom_config("llama", **ids).pad_token_id == 0


def test_a_role_that_a_tokenizer_lacks_is_none_and_not_the_design_s_id() -> None:
    llama = loom_config("llama", bos_token_id=1, eos_token_id=2)
    assert (llama.bos_token_id, llama.eos_token_id, llama.pad_token_id) == (1, 2, None)
    gpt2 = loom_config("gpt2", bos_token_id=50_256, eos_token_id=50_256, unk_token_id=50_256)
    assert (gpt2.bos_token_id, gpt2.eos_token_id, gpt2.pad_token_id) == (50_256, 50_256, None)
    assert loom_config("gpt2", unk_token_id=7).eos_token_id is None  # an id of the tokenizer alone speaks for it too
    encoder = loom_config("modernbert", pad_token_id=0, cls_token_id=2, sep_token_id=3)
    assert (encoder.bos_token_id, encoder.eos_token_id) == (None, None)
    assert (loom_config("gpt2").eos_token_id, loom_config("gpt2").pad_token_id) == (0, 1)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_every_switch_changes_the_model(architecture: str) -> None:
    """A key that does nothing has no place: each one moves outputs, parameters or initial values, or is named here."""
    told_elsewhere = {
        "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id",  # read elsewhere
        "classifier_dropout", "classifier_head", "classifier_pooling",  # the classifier's own tests
        "use_cache",  # the cache's own tests
        "max_position_embeddings" if ARCHITECTURES[architecture].conventions["position_kind"] == "rotary" else "",
        "num_key_value_heads", "head_dim", "num_hidden_layers", "num_attention_heads", "vocab_size", "hidden_size",
        "intermediate_size", "first_norm", "global_attention_every", "local_window", "local_rope_theta",
    }  # fmt: skip
    other = {
        "type_vocab_size": 3, "position_kind": "none", "rope_theta": 77.0, "attention_bias": None,
        "attention_scale": 0.9, "mlp_kind": None, "mlp_bias": None, "hidden_act": "relu", "norm_kind": None,
        "norm_bias": None, "norm_eps": 0.5, "norm_placement": None, "embedding_norm": None,
        "tie_word_embeddings": None, "hidden_dropout": 0.5, "attention_dropout": 0.5, "embedding_dropout": 0.5,
        "initializer": None, "initializer_range": 0.7, "head_dense_bias": None, "max_position_embeddings": 40,
    }  # fmt: skip
    flipped = {
        "mlp_kind": ("plain", "gated"),
        "norm_kind": ("layer_norm", "rms_norm"),
        "norm_placement": ("pre", "post"),
        "initializer": ("normal", "scaled_normal"),
    }
    base = tiny_config(architecture)
    reference = _fingerprint(base)
    for key in config_keys(architecture):
        if key in told_elsewhere or (key == "rope_theta" and base.position_kind != "rotary"):
            continue
        now = getattr(base, key)
        value = other[key]
        if value is None:
            value = (not now) if isinstance(now, bool) else next(word for word in flipped[key] if word != now)
        keys = {key: value}
        if key == "norm_kind" and value == "rms_norm":
            keys["norm_bias"] = False
        if key == "norm_bias" and base.norm_kind == "rms_norm":
            continue
        if key == "norm_placement" and value == "post":
            keys["first_norm"] = True
        if key == "position_kind" and base.local_window:
            keys |= {"global_attention_every": 1, "local_window": None}
        assert _fingerprint(tiny_config(architecture, **keys)) != reference, key


def _fingerprint(config) -> tuple[float, ...]:
    torch.manual_seed(0)
    model = model_class(config)(config).train()
    torch.manual_seed(1)
    output = model(input_ids=torch.arange(5, 35)[None]).logits
    sizes = sum(p.numel() for p in model.parameters())
    return (float(output.detach().double().abs().sum()), float(sizes))
