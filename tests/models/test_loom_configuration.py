"""Configs: published sizes, refusals that name the key, round trips, cost arithmetic against the real modules."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
import transformers
from loom_builders import ARCHITECTURE_NAMES, SEQ2SEQ, randomize, tiny_config, tiny_model

from pretrain.models import (
    ARCHITECTURES,
    LoomConfig,
    LoomDecoderConfig,
    LoomEncoderConfig,
    config_keys,
    flops_per_token,
    loom_config,
    model_class,
    num_multiplied_parameters,
)
from pretrain.models.configuration_checks import CHOICES
from pretrain.models.configuration_loom import CONFIG_CLASSES
from pretrain.models.mixers import MIXERS

PUBLISHED = {
    "bert": 109_514_298, "roberta": 124_697_433, "electra": 109_514_298, "albert": 11_221_680,
    "modernbert": 149_655_232, "eurobert": 310_266_624, "gpt2": 124_439_808, "llama": 369_148_928,
    "qwen3": 596_049_920, "modernbert-decoder": 149_655_232, "transformer": 63_082_496, "t5": 222_903_552,
}  # fmt: skip
_WIDE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
_PAIR = {"vocab_size": 37_000, "decoder_vocab_size": 37_000, "pad_token_id": 0, "decoder_start_token_id": 0}
_SIDES = {
    f"{side}_{key}": size
    for side in ("encoder", "decoder")
    for key, size in (("layers", 6), ("attention_heads", 8), ("ffn_dim", 2048))
}
STOCK = {
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig()),
    "roberta": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1)
    ),
    "electra": lambda: transformers.ElectraForMaskedLM(transformers.ElectraConfig(embedding_size=768, **_WIDE)),
    "albert": lambda: transformers.AlbertForMaskedLM(transformers.AlbertConfig(**_WIDE)),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(transformers.ModernBertConfig()),
    "eurobert": lambda: transformers.EuroBertForMaskedLM(transformers.EuroBertConfig(tie_word_embeddings=False)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32_000, hidden_size=1024, intermediate_size=2752, num_hidden_layers=24, num_attention_heads=16
        )
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        )
    ),
    "modernbert-decoder": lambda: transformers.ModernBertDecoderForCausalLM(transformers.ModernBertDecoderConfig()),
    "transformer": lambda: transformers.MarianMTModel(transformers.MarianConfig(d_model=512, **_PAIR, **_SIDES)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
    ),
}


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_default_sizes_are_those_of_the_published_base_model(architecture: str) -> None:
    config = loom_config(architecture, **({"pad_token_id": 1} if architecture == "roberta" else {}))
    with torch.device("meta"):
        ours = model_class(config)(config)
        stock = STOCK[architecture]()
    assert ours.num_parameters() == PUBLISHED[architecture]
    assert stock.num_parameters(only_trainable=True) == PUBLISHED[architecture]  # tables of sines are not trained


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_multiplied_parameters_are_the_matrices_of_the_model(architecture: str) -> None:
    model = tiny_model(architecture)
    uses = model.config.num_hidden_layers // model.config.num_hidden_groups
    matrices = sum(
        module.weight.numel() * (uses if ".layers." in name else 1)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
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
        ("gpt2", {"position_kind": "rotary", "partial_rotary_factor": 0.3}, "even number of channels"),
        ("gpt2", {"position_kind": "rotary", "partial_rotary_factor": 1.5}, "must lie in"),
        ("gpt2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor does nothing"),
        ("gpt2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling does nothing"),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "linear, ntk, yarn"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "takes .*original_max_position_embeddings"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "below 1"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "takes factor, got"),
        ("llama", {"head_dim": 2, "rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "at least 4 channels"),
        ("llama", {"position_offset": 2}, "position_offset does nothing"),
        ("gpt2", {"position_offset": -1}, "position_offset must be"),
        ("gpt2", {"sinusoidal_layout": "halves"}, "sinusoidal_layout does nothing"),
        ("transformer", {"embedding_size": 15, "tie_word_embeddings": False}, "even embedding_size"),
        ("t5", {"relative_attention_num_buckets": 30}, "multiple of 4"),
        ("t5", {"relative_attention_max_distance": 16}, "more than half"),
        ("gpt2", {"position_kind": "rope"}, "position_kind 'rope' is unknown"),
        ("gpt2", {"attention_softcap": 0.0}, "attention_softcap must be a number above 0"),
        ("gpt2", {"attention_pattern": ["globl"], "local_window": 4}, "list of global and local"),
        ("gpt2", {"attention_pattern": [], "local_window": 4}, "list of global and local"),
        ("gpt2", {"attention_pattern": ["local"]}, "needs local_window"),
        ("gpt2", {"attention_pattern": ["local"], "global_attention_every": 2}, "leave one out"),
        ("gpt2", {"attention_pattern": ["global"], "local_window": 8}, "do nothing with attention_pattern"),
        ("bert", {"block_kind": "parallel"}, "needs norm_placement pre"),
        ("gpt2", {"block_kind": "parallel_shared_norm", "first_norm": False}, "its MLP reads that norm too"),
        ("gpt2", {"num_hidden_groups": 5}, "not a multiple of num_hidden_groups"),
        ("gpt2", {"num_hidden_groups": 1, "first_norm": False}, "the first layer shares its norms"),
        ("gpt2", {"embedding_size": 64}, "needs head_transform true"),
        ("transformer", {"num_hidden_groups": 1}, "an encoder or a decoder alone"),
        ("transformer", {"norm_placement": "pre", "block_kind": "parallel"}, "no place for attention to an encoder"),
        ("transformer", {"norm_placement": "pre", "first_norm": False}, "an encoder or a decoder alone"),
        ("transformer", {"type_vocab_size": 2}, "an encoder or a decoder alone"),
        ("transformer", {"label_smoothing": 1.0}, "label_smoothing must lie in"),
        ("transformer", {"num_decoder_layers": 0}, "num_decoder_layers must be"),
        ("gpt2", {"num_decoder_layers": 2}, "unknown model key 'num_decoder_layers'"),
        ("gpt2", {"mixer": "atention"}, "mixer 'atention' is unknown"),
        ("transformer", {"initializer_range": 0.01}, "range 0.01 does nothing .*xavier_uniform.*leave it out"),
        ("gpt2", {"initializer": "xavier_uniform", "initializer_range": 0.1}, "initializer_range 0.1 does nothing"),
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


ROTARY = {"position_kind": "rotary", "local_rope_theta": None}
GLOBAL = {"global_attention_every": 1, "local_window": None}
WINDOWS = {"global_attention_every": 2, "local_window": 8}
RELATIVE = {"position_kind": "relative"}
PRE = {"norm_placement": "pre", "first_norm": True, "block_kind": "sequential"}
# key -> (keys among which it acts, another value for it; None: the other of its two)
SWITCHES: dict[str, tuple[dict[str, Any], Any]] = {
    "attention_bias": ({}, None),
    "attention_dropout": ({}, 0.5),
    "attention_pattern": (GLOBAL | {"attention_pattern": ["local", "global"], "local_window": 4}, ["global", "local"]),
    "attention_scale": ({}, 0.9),
    "attention_softcap": ({}, 0.01),
    "block_kind": (PRE, "parallel"),
    "decoder_start_token_id": ({}, 7),
    "embedding_dropout": ({}, 0.5),
    "embedding_norm": ({}, None),
    "embedding_scale": ({"embedding_scale": 1.0}, 3.0),
    "embedding_size": ({"head_transform": True, "embedding_size": 24}, 12),
    "first_norm": (PRE | {"num_hidden_groups": 4}, False),
    "global_attention_every": (WINDOWS, 3),
    "head_bias": ({}, None),
    "head_dense_bias": ({"head_transform": True}, None),
    "head_dim": ({}, 4),
    "head_transform": ({"embedding_size": 24}, None),
    "hidden_act": ({"hidden_act": "gelu"}, "relu"),
    "hidden_dropout": ({}, 0.5),
    "hidden_size": ({"embedding_size": 24, "head_transform": True}, 32),
    "initializer": ({"initializer": "normal"}, "scaled_normal"),
    "initializer_range": ({"initializer": "normal"}, 0.7),
    "intermediate_size": ({}, 20),
    "label_smoothing": ({}, 0.3),
    "local_rope_theta": (ROTARY | WINDOWS, 7.0),
    "local_window": (WINDOWS, 4),
    "logit_softcap": ({}, 0.1),
    "max_position_embeddings": ({"position_kind": "learned"}, 40),
    "mlp_bias": ({}, None),
    "mlp_kind": ({"mlp_kind": "plain"}, "gated"),
    "norm_bias": ({"norm_kind": "layer_norm"}, None),
    "norm_eps": ({}, 0.5),
    "norm_kind": ({"norm_kind": "layer_norm", "norm_bias": False}, "rms_norm"),
    "norm_placement": (PRE, "post"),
    "num_attention_heads": ({"num_key_value_heads": 2, "head_dim": 6}, 2),
    "num_decoder_layers": ({}, 2),
    "num_hidden_groups": (PRE | {"num_hidden_groups": 4}, 2),
    "num_hidden_layers": ({"num_decoder_layers": 4}, 3),
    "num_key_value_heads": ({}, 1),
    "output_scale": ({"output_scale": 1.0}, 0.5),
    "partial_rotary_factor": (ROTARY | {"head_dim": 8}, 0.5),
    "position_kind": (GLOBAL | {"position_kind": "none", "rope_theta": None}, "learned"),
    "position_offset": ({"position_kind": "learned", "position_offset": 0}, 3),
    "qk_norm": ({"qk_norm": "none"}, "per_head"),
    "relative_attention_max_distance": (RELATIVE, 20),
    "relative_attention_num_buckets": (RELATIVE, 8),
    "residual_scale": ({}, 0.5),
    "rope_scaling": (ROTARY | {"head_dim": 8}, {"rope_type": "linear", "factor": 4.0}),
    "rope_theta": (ROTARY, 77.0),
    "sinusoidal_layout": ({"position_kind": "sinusoidal", "sinusoidal_layout": "halves"}, "interleaved"),
    "tie_word_embeddings": ({}, None),
    "type_vocab_size": ({"type_vocab_size": 2}, 3),
    "vocab_size": ({}, 67),
}
TOLD_ELSEWHERE = {
    "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id",  # read by tokenizers and `generate`
    "classifier_dropout", "classifier_head", "classifier_pooling",  # the classifiers' own tests
    "generator_size", "generator", "rtd_weight", "rtd_sharing",  # the detection's own tests
    "use_cache",  # the cache's own tests
    "mixer",  # has one value
}  # fmt: skip
NOT_IN_SEQ2SEQ = {"block_kind", "first_norm", "num_hidden_groups", "type_vocab_size"}  # refused there


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_every_switch_changes_the_model(architecture: str) -> None:
    """A key that does nothing has no place: each one moves outputs, losses, parameters or initial values."""
    told = TOLD_ELSEWHERE | (NOT_IN_SEQ2SEQ if architecture in SEQ2SEQ else set())
    keys = set(config_keys(architecture))
    assert keys - told <= set(SWITCHES)
    for key in sorted(keys - told):
        among, value = SWITCHES[key]
        among = {name: given for name, given in among.items() if name in keys}
        base = tiny_config(architecture, **among)
        value = (not getattr(base, key)) if value is None else value
        changed = tiny_config(architecture, **among | {key: value})
        assert any(_fingerprint(changed, initial) != _fingerprint(base, initial) for initial in (False, True)), key


def test_each_switch_named_here_is_one() -> None:
    known = {key for architecture in ARCHITECTURES for key in config_keys(architecture)}
    assert set(SWITCHES) | TOLD_ELSEWHERE <= known
    assert set(CHOICES["mixer"]) == set(MIXERS) == {"attention"}


def _fingerprint(config: LoomConfig, initial: bool) -> tuple[float, ...]:
    """Parameters, output and loss of a model with its initial values, or with drawn ones."""
    return _of(json.dumps(config.to_dict(), sort_keys=True), config.kind, initial)


@functools.lru_cache(maxsize=256)
def _of(written: str, kind: str, initial: bool) -> tuple[float, ...]:
    config = CONFIG_CLASSES[kind].from_dict(json.loads(written))
    torch.manual_seed(0)
    model = model_class(config)(config).train()
    if not initial:
        randomize(model)
    torch.manual_seed(1)
    ids = torch.arange(5, 35)[None]
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids.flip(1), return_logits=True)
    size = sum(p.numel() for p in model.parameters())
    return (float(size), float(output.logits.double().abs().sum()), float(output.loss))
