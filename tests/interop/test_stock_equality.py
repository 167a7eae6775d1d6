"""Loom and stock models give the same logits from the same weights, both ways, and lose nothing on the road."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from stock_builders import (
    ARCHITECTURE_NAMES,
    TABLES_OF_THEIR_OWN,
    YARN,
    as_loom,
    as_stock,
    assert_configs_equal,
    assert_same_logits,
    kept_state,
    load_exactly,
    loom_model,
    randomize,
    relative,
    tokens,
)

from pretrain.interop import HOMES, from_stock, to_stock
from pretrain.models import LoomDecoderForCausalLM, LoomEncoderForMaskedLM

VARIANTS = [
    ("bert", {}),
    ("bert", {"hidden_act": "relu", "type_vocab_size": 3, "norm_eps": 1e-3}),
    ("roberta", {}),
    ("roberta", {"pad_token_id": 3, "type_vocab_size": 2, "norm_eps": 1e-3}),
    ("roberta", {"pad_token_id": 0, "cls_token_id": 2}),
    ("electra", {}),
    ("electra", {"embedding_size": 24, "type_vocab_size": 3}),
    ("electra", {"tie_word_embeddings": False}),
    ("albert", {}),
    ("albert", {"num_hidden_layers": 6, "num_hidden_groups": 2, "embedding_size": 40, "hidden_act": "relu"}),
    ("albert", {"num_hidden_groups": 5}),
    ("eurobert", {}),
    ("eurobert", {"mlp_bias": True, "head_bias": True, "attention_bias": True, "num_key_value_heads": 1}),
    ("eurobert", {"tie_word_embeddings": True, "hidden_act": "gelu", "rope_theta": 500.0}),
    ("modernbert", {}),
    ("modernbert", {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "head_dense_bias": True}),
    ("modernbert", {"global_attention_every": 1, "local_window": None, "local_rope_theta": None}),
    ("modernbert", {"tie_word_embeddings": False, "global_attention_every": 2, "hidden_act": "silu"}),
    ("modernbert", {"global_attention_every": 1, "attention_pattern": ["local", "global"], "head_bias": False}),
    ("modernbert", {"global_attention_every": 1, "attention_pattern": ["global", "local"], "local_window": 5}),
    ("modernbert", {"global_attention_every": 9}),
    ("gpt2", {}),
    ("gpt2", {"tie_word_embeddings": False, "hidden_act": "gelu"}),
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "rope_theta": 500.0}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    ("llama", {"rope_scaling": YARN}),
    ("llama", {"rope_scaling": YARN | {"attention_factor": 1.3, "beta_fast": 24.0, "beta_slow": 2.0}}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": False, "attention_bias": True, "num_key_value_heads": 4, "head_dim": 6}),
    ("qwen3", {"rope_scaling": YARN, "rope_theta": 500.0}),
    ("modernbert-decoder", {}),
    ("modernbert-decoder", {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "head_dense_bias": True}),
    ("modernbert-decoder", {"tie_word_embeddings": False, "local_window": 1, "head_bias": False}),
    ("modernbert-decoder", {"global_attention_every": 1, "local_window": None, "local_rope_theta": None}),
    ("modernbert-decoder", {"global_attention_every": 1, "attention_pattern": ["local", "local", "global"]}),
]


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


SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 67}
SMALL_MODERNBERT = SMALL | {
    "num_hidden_layers": 4,
    "intermediate_size": 36,
    "local_attention": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
GROUPED = SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
FROM_STOCK = [
    ("BertForMaskedLM", transformers.BertConfig(**SMALL)),
    ("RobertaForMaskedLM", transformers.RobertaConfig(**SMALL, max_position_embeddings=50)),
    ("RobertaForMaskedLM", transformers.RobertaConfig(**SMALL, pad_token_id=3, type_vocab_size=1)),
    ("ElectraForMaskedLM", transformers.ElectraConfig(**SMALL, embedding_size=10)),
    ("ElectraForMaskedLM", transformers.ElectraConfig(**SMALL, embedding_size=24, summary_use_proj=False)),
    ("AlbertForMaskedLM", transformers.AlbertConfig(**SMALL, embedding_size=10, intermediate_size=40)),
    ("ModernBertForMaskedLM", transformers.ModernBertConfig(**SMALL_MODERNBERT)),
    ("ModernBertForMaskedLM", transformers.ModernBertConfig(**SMALL_MODERNBERT, decoder_bias=False)),
    (
        "ModernBertForMaskedLM",
        transformers.ModernBertConfig(
            **SMALL_MODERNBERT,
            layer_types=["full_attention", "full_attention", "sliding_attention", "full_attention"],
        ),
    ),
    (
        "EuroBertForMaskedLM",
        transformers.EuroBertConfig(**SMALL, mlp_bias=True, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    ),
    (
        "GPT2LMHeadModel",
        transformers.GPT2Config(n_embd=24, n_layer=3, n_head=4, vocab_size=67, bos_token_id=0, eos_token_id=0),
    ),
    ("LlamaForCausalLM", transformers.LlamaConfig(**SMALL, intermediate_size=64)),
    (
        "LlamaForCausalLM",
        transformers.LlamaConfig(
            **GROUPED, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}
        ),
    ),
    ("Qwen3ForCausalLM", transformers.Qwen3Config(**GROUPED, tie_word_embeddings=True)),
    ("ModernBertDecoderForCausalLM", transformers.ModernBertDecoderConfig(**SMALL_MODERNBERT)),
    (
        "ModernBertDecoderForCausalLM",
        transformers.ModernBertDecoderConfig(**SMALL_MODERNBERT, tie_word_embeddings=False, classifier_bias=True),
    ),
]
NOT_KEPT = {"architectures", "classifier_dropout", "n_inner", "summary_use_proj", "summary_last_dropout"}


@pytest.mark.parametrize(("name", "config"), FROM_STOCK)
def test_from_stock_and_back(name: str, config) -> None:
    stock = getattr(transformers, name)(config).eval()
    randomize(stock, seed=3)
    loom = as_loom(stock)
    assert isinstance(loom, LoomEncoderForMaskedLM | LoomDecoderForCausalLM)
    assert_same_logits(loom, stock)
    back, state = to_stock(loom.config, kept_state(loom))
    fields = set(json.loads(config.to_json_string(use_diff=False))) - NOT_KEPT
    assert {key: getattr(back, key) for key in fields} == {key: getattr(config, key) for key in fields}
    given = kept_state(stock)
    assert state.keys() == given.keys()
    assert all(torch.equal(tensor, given[key]) for key, tensor in state.items())


HEADS = [(architecture, task) for architecture in ARCHITECTURE_NAMES for task in HOMES[architecture].classes]


@pytest.mark.parametrize(("architecture", "task"), HEADS)
def test_every_head_of_a_stock_family_converts(architecture: str, task: str) -> None:
    loom = loom_model(architecture, task, pad_token_id=1, bos_token_id=2)
    config, state = to_stock(loom.config, kept_state(loom), task)
    assert config.architectures == [HOMES[architecture].classes[task]]
    found = getattr(transformers, config.architectures[0])
    # A stock base model may add a pooler, which ours has only below a classifier.
    more = {"add_pooling_layer": False} if task == "base" and architecture in ("bert", "roberta", "albert") else {}
    stock = load_exactly(found(config, **more), state)
    ids, mask = tokens(6, 20), torch.ones(6, 20, dtype=torch.long)
    mask[1, 13:], mask[4, 2:] = 0, 0
    ids = ids.masked_fill(mask == 0, 1)
    if task == "multiple_choice":
        ids, mask = ids.view(2, 3, 20), mask.view(2, 3, 20)
    with torch.no_grad():
        ours, theirs = numbers(loom, ids, mask), numbers(stock, ids, mask)
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        if mine.shape[:2] == (6, 20):  # of tokens: what padding gives means nothing
            mine, other = mine[mask == 1], other[mask == 1]
        assert relative(mine, other) < 1e-5
    back, again = from_stock(stock.config, kept_state(stock))
    assert back.architectures == [type(loom).__name__]
    assert again.keys() == state_of(loom).keys()
    assert all(torch.equal(tensor, state_of(loom)[name]) for name, tensor in again.items())


def numbers(model, ids, mask) -> list[torch.Tensor]:
    """What a model says, whatever its head."""
    said = model(input_ids=ids, attention_mask=mask)
    names = ("logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits", "sop_logits")
    names = names if any(name in said for name in names) else ("last_hidden_state",)
    return [said[name] for name in names if name in said]


def state_of(model) -> dict[str, torch.Tensor]:
    return kept_state(model)


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
    assert loom.lm_head.weight is loom.model.embed_tokens.weight
    stock = as_stock(loom)
    assert stock.get_output_embeddings().weight is stock.get_input_embeddings().weight
    with_copies = {name: tensor.clone() for name, tensor in loom.state_dict().items()}
    _, state = to_stock(loom.config, with_copies)
    assert state.keys() == kept_state(stock).keys()
    with_copies["lm_head.weight"] += 1
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        to_stock(loom.config, with_copies)
    from_stock(stock.config, stock.state_dict())  # copies that agree are taken
    copied = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    copied[next(iter(stock.all_tied_weights_keys))] += 1
    with pytest.raises(ValueError, match="to which it is tied"):
        from_stock(stock.config, copied)


@pytest.mark.parametrize("architecture", TABLES_OF_THEIR_OWN)
def test_weights_that_are_not_tied_stay_two(architecture: str) -> None:
    loom = loom_model(architecture, tie_word_embeddings=False)
    stock = as_stock(loom)
    assert not stock.config.tie_word_embeddings
    head, table = stock.get_output_embeddings().weight, stock.get_input_embeddings().weight
    assert torch.equal(head, loom.lm_head.weight)
    assert torch.equal(table, loom.model.embed_tokens.weight)
    assert not torch.equal(head, table)


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_a_dtype_is_kept(architecture: str) -> None:
    loom = loom_model(architecture).to(torch.bfloat16)
    _, state = to_stock(loom.config, kept_state(loom))
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in as_loom(as_stock(loom).to(torch.bfloat16)).state_dict().values()} == {
        torch.float32  # of a new model; what was read is bfloat16's numbers
    }


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_every_tensor_is_used_once_and_leftovers_are_named(architecture: str) -> None:
    loom = loom_model(architecture)
    state = kept_state(loom)
    with pytest.raises(ValueError, match=r"left over \['model.layers.9.extra'\]"):
        to_stock(loom.config, state | {"model.layers.9.extra": torch.zeros(1)})
    missing = dict(state)
    del missing["model.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"missing \['model.layers.0.self_attn.k_proj.weight'\]"):
        to_stock(loom.config, missing)
    stock = as_stock(loom)
    with pytest.raises(ValueError, match="left over"):
        from_stock(stock.config, kept_state(stock) | {"more": torch.zeros(1)})
