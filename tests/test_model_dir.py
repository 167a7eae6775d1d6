"""Released layouts read as Loom models: logits equal transformers' own, and what is left out or refused is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.files import ArtifactError
from pretrain.interop import HOMES
from pretrain.model_dir import write_model
from pretrain.model_reading import read_config, read_loom, read_stock, stored_task
from pretrain.models import (
    LoomDecoderForCausalLM,
    LoomEncoderForMaskedLM,
    loom_config,
    model_class,
    register_hub_code,
    task_of,
)

IDS = torch.arange(1, 21).reshape(2, 10)
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
IDS_OF_ROLES = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ALL_ROLES = IDS_OF_ROLES | {"cls_token_id": 1, "sep_token_id": 2}


def config_of(architecture: str, **keys: Any) -> Any:
    if architecture == "gpt2":
        sizes = {"vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}
        return transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **keys)
    kind = {"bert": transformers.BertConfig, "llama": transformers.LlamaConfig}[architecture]
    return kind(**SIZES, **keys)


def drawn(model: Any) -> Any:
    """Every parameter from a normal, norms and biases too."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def saved(model: Any, directory: Path) -> Any:
    drawn(model).save_pretrained(directory)
    return model


def rewrite(directory: Path, change: Any) -> None:
    """Pass the stored tensors through `change`."""
    state: dict[str, Tensor] = change(load_file(directory / "model.safetensors"))
    copies = {name: tensor.clone() for name, tensor in state.items()}
    save_file(copies, directory / "model.safetensors", {"format": "pt"})


def assert_same_logits(loom: Any, stock: Any) -> None:
    assert {parameter.dtype for parameter in loom.parameters()} == {torch.float32}
    assert not loom.training
    with torch.no_grad():
        ours, theirs = loom(input_ids=IDS).logits, stock(input_ids=IDS)
        theirs = theirs.prediction_logits if hasattr(theirs, "prediction_logits") else theirs.logits
    assert float((ours - theirs.float()).abs().max() / theirs.abs().max()) < 1e-5


# --- layouts --------------------------------------------------------------------------------------------------------


def test_bert_as_released_leaves_out_pooler_and_next_sentence_head(tmp_path: Path) -> None:
    """BertForPreTraining with the norm names of the first releases, as on the Hub."""
    stock = saved(transformers.BertForPreTraining(config_of("bert")), tmp_path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    pattern = re.compile("|".join(map(re.escape, old)))
    rewrite(tmp_path, lambda state: {pattern.sub(lambda m: old[m[0]], key): tensor for key, tensor in state.items()})
    notes: list[str] = []
    loom = read_loom(tmp_path, note=notes.append)
    assert isinstance(loom, LoomEncoderForMaskedLM)
    assert_same_logits(loom, stock)
    assert len(notes) == 1
    for name in ("bert.pooler.dense.weight", "cls.seq_relationship.bias"):
        assert name in notes[0]
    assert_same_logits(read_stock(tmp_path), stock)


def test_gpt2_as_released_has_no_prefix_no_head_and_mask_buffers(tmp_path: Path) -> None:
    stock = saved(transformers.GPT2LMHeadModel(config_of("gpt2")), tmp_path)

    def as_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        for layer in range(2):
            state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
            state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return state

    rewrite(tmp_path, as_released)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    notes: list[str] = []
    loom = read_loom(str(tmp_path), note=notes.append)
    assert isinstance(loom, LoomDecoderForCausalLM)
    assert loom.lm_head.weight is loom.model.embed_tokens.weight
    assert_same_logits(loom, stock)
    assert [line for line in notes if "h.*.attn.masked_bias" in line] == notes != []


def test_a_tied_head_is_in_the_embeddings_even_of_a_base_model(tmp_path: Path) -> None:
    base = saved(transformers.GPT2Model(config_of("gpt2")), tmp_path)
    loom = read_loom(tmp_path)
    with torch.no_grad():
        expected = base(input_ids=IDS).last_hidden_state @ base.wte.weight.T
        assert torch.allclose(loom(input_ids=IDS).logits, expected, atol=1e-4)
    assert_same_logits(loom, read_stock(tmp_path))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_as_fp32(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(config_of("llama", tie_word_embeddings=tied))
    saved(model.to(dtype), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    notes: list[str] = []
    loom = read_loom(tmp_path, note=notes.append)
    assert (loom.lm_head.weight is loom.model.embed_tokens.weight) == tied
    assert notes == []
    assert loom.config.dtype == torch.float32
    assert torch.equal(loom.model.embed_tokens.weight, stored["model.embed_tokens.weight"].float())
    assert_same_logits(loom, transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


def with_old_buffers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Position ids as a buffer, as releases before 2023 hold them, and a head that is stored beside its table."""
    stack = next(iter(state)).split(".")[0]
    ids = torch.arange(34)[None]
    return state | {f"{stack}.embeddings.position_ids": ids}


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("roberta."): tensor for name, tensor in state.items()}


RELEASED = [
    ("RobertaForMaskedLM", transformers.RobertaConfig(**SIZES, pad_token_id=0), with_old_buffers),
    ("RobertaForMaskedLM", transformers.RobertaConfig(**SIZES, pad_token_id=21), without_prefix),
    ("ElectraForMaskedLM", transformers.ElectraConfig(**SIZES, embedding_size=10), with_old_buffers),
    ("AlbertForMaskedLM", transformers.AlbertConfig(**SIZES, embedding_size=10), with_old_buffers),
    ("AlbertForPreTraining", transformers.AlbertConfig(**SIZES, embedding_size=10), dict),
    ("EuroBertForMaskedLM", transformers.EuroBertConfig(**SIZES, **IDS_OF_ROLES), dict),
    ("Qwen3ForCausalLM", transformers.Qwen3Config(**SIZES, **HEADS, tie_word_embeddings=True), dict),
    ("ModernBertForMaskedLM", transformers.ModernBertConfig(**SIZES, **ALL_ROLES), dict),
    ("ModernBertDecoderForCausalLM", transformers.ModernBertDecoderConfig(**SIZES, **IDS_OF_ROLES), dict),
]


@pytest.mark.parametrize(("name", "config", "change"), RELEASED)
def test_released_layouts_read(name: str, config: Any, change: Any, tmp_path: Path) -> None:
    stock = saved(getattr(transformers, name)(config), tmp_path)
    rewrite(tmp_path, change)
    loom = read_loom(tmp_path)
    assert_same_logits(loom, stock)
    assert loom.config.architecture == config.model_type


def test_a_config_of_transformers_4_reads_alike(tmp_path: Path) -> None:
    """Rotary bases and patterns by the keys of version 4, which released models have."""
    config = transformers.ModernBertConfig(**SIZES, **ALL_ROLES, local_attention=6)
    stock = saved(transformers.ModernBertForMaskedLM(config), tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_parameters", "layer_types"):
        del entries[key]
    more = {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "global_attn_every_n_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(entries | more))
    assert_same_logits(read_loom(tmp_path), stock)


@pytest.mark.parametrize(
    ("name", "config", "task"),
    [
        ("BertForPreTraining", transformers.BertConfig(**SIZES), "sentence_pretraining"),
        ("AlbertForPreTraining", transformers.AlbertConfig(**SIZES, embedding_size=10), "sentence_pretraining"),
        ("ElectraForPreTraining", transformers.ElectraConfig(**SIZES, embedding_size=10), "replaced_token_detection"),
    ],
)
def test_other_classes_of_pretraining_are_read_whole(name: str, config: Any, task: str, tmp_path: Path) -> None:
    saved(getattr(transformers, name)(config), tmp_path / "stock")
    assert stored_task(read_config(tmp_path / "stock")) == task
    notes: list[str] = []
    loom = read_loom(tmp_path / "stock", task=task, note=notes.append)
    assert notes == []
    assert task_of(loom) == task
    (tmp_path / "again").mkdir()
    write_model(loom, tmp_path / "again")
    given, written = (load_file(tmp_path / form / "model.safetensors") for form in ("stock", "again"))
    assert given.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in given.items())
    register_hub_code(loom)
    loom.save_pretrained(tmp_path / "loom")
    own = read_loom(tmp_path / "loom", task=stored_task(read_config(tmp_path / "loom")))
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in loom.state_dict().items())
    if task == "sentence_pretraining":  # read for language modelling alone, it is a model for that alone
        assert read_loom(tmp_path / "loom").config.architectures == ["LoomEncoderForMaskedLM"]
    assert type(read_stock(tmp_path / "again", task=task)).__name__ == name
    if task == "replaced_token_detection":
        with pytest.raises(ArtifactError, match="has no language-model head"):
            read_loom(tmp_path / "stock")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("BertForMaskedLM", transformers.BertConfig(**SIZES)),
        ("AlbertForMaskedLM", transformers.AlbertConfig(**SIZES, embedding_size=10)),
    ],
)
def test_a_model_without_a_sentence_head_is_told_so(name: str, config: Any, tmp_path: Path) -> None:
    saved(getattr(transformers, name)(config), tmp_path)
    words = rf"\({name}\) has no head for pairs of sentences.*as \w+ForPreTraining.*objective\.sentences: none"
    with pytest.raises(ArtifactError, match=words):
        read_loom(tmp_path, task="sentence_pretraining")


@pytest.mark.parametrize("architecture", [name for name, home in HOMES.items() if home.kind != "seq2seq"])
def test_our_own_form_and_the_stock_form_read_alike(architecture: str, tmp_path: Path) -> None:
    more = {"albert": {"embedding_size": 10}, "qwen3": HEADS}.get(architecture, {})
    config = loom_config(architecture, **SIZES, **more)
    loom = drawn(model_class(config)(config))
    (tmp_path / "stock").mkdir()
    write_model(loom, tmp_path / "stock")
    register_hub_code(loom)
    loom.save_pretrained(tmp_path / "loom")
    assert "auto_map" in json.loads((tmp_path / "loom" / "config.json").read_text())
    first, second = read_loom(tmp_path / "stock"), read_loom(tmp_path / "loom")
    assert type(first) is type(second) is type(loom)
    for name, tensor in loom.state_dict().items():
        assert torch.equal(first.state_dict()[name], tensor), name
        assert torch.equal(second.state_dict()[name], tensor), name
    assert_same_logits(second, loom)
    assert type(read_stock(tmp_path / "loom")) is type(loom)
    (tmp_path / "again").mkdir()
    write_model(second, tmp_path / "again")  # and it goes on to the stock form
    assert_same_logits(loom, read_stock(tmp_path / "again"))


def test_a_loom_shape_without_a_stock_home_reads_too(tmp_path: Path) -> None:
    config = loom_config("gpt2", **SIZES, position_kind="rotary")
    loom = drawn(model_class(config)(config))
    loom.save_pretrained(tmp_path)
    assert_same_logits(read_loom(tmp_path), loom)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "missing"),
    [
        (lambda: transformers.BertModel(config_of("bert")), r"BertModel\) has no .* `cls\.predictions\.bias`"),
        (lambda: transformers.BertForSequenceClassification(config_of("bert")), r"`cls\.predictions\.bias` is missing"),
        (lambda: transformers.LlamaModel(config_of("llama")), r"`lm_head\.weight` is missing"),
        (lambda: transformers.GPT2Model(config_of("gpt2", tie_word_embeddings=False)), r"`lm_head\.weight` is missing"),
        (lambda: model_class(llama := loom_config("llama", **SIZES), "base")(llama), r"`lm_head\.weight` is missing"),
    ],
)
def test_a_missing_head_is_named(model: Any, missing: str, tmp_path: Path) -> None:
    saved(model(), tmp_path)
    for read in (read_loom, read_stock):
        with pytest.raises(ArtifactError, match=missing):
            read(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    saved(transformers.LlamaForCausalLM(config_of("llama")), tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, lambda state: {key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(ArtifactError, match=r"lacks 1 tensors of LlamaForCausalLM, such as `model\.layers\.1\.mlp\.up"):
        read_loom(tmp_path)
    rewrite(tmp_path, lambda state: whole | {"model.layers.2.mlp.up_proj.weight": whole[name]})
    with pytest.raises(ArtifactError, match=r"does not hold, such as `model\.layers\.2"):
        read_loom(tmp_path)
    rewrite(tmp_path, lambda state: whole | {name: whole[name][:-1]})
    with pytest.raises(ArtifactError, match=r"has shape \(39, 24\), its config.json asks for \(40, 24\)"):
        read_loom(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match="cannot be loaded"):
        read_loom(tmp_path)


@pytest.mark.parametrize("form", ["stock", "loom"])
def test_a_head_that_differs_though_tied_is_refused(form: str, tmp_path: Path) -> None:
    config = loom_config("llama", **SIZES, tie_word_embeddings=True)
    loom = drawn(model_class(config)(config))
    if form == "stock":
        write_model(loom, tmp_path)
    else:
        loom.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        read_loom(tmp_path)


def test_an_architecture_that_we_do_not_hold_is_refused_before_its_weights(tmp_path: Path) -> None:
    transformers.DebertaV2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'deberta-v2'"):
        read_loom(tmp_path)
    config_of("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="rope_parameters"):
        read_loom(tmp_path)


def test_foreign_code_is_not_run(tmp_path: Path) -> None:
    entries = {"model_type": "strange", "auto_map": {"AutoConfig": "code.StrangeConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="code of its own, which is not run here"):
        read_config(tmp_path)


def test_paths_and_hub_names_that_give_nothing_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"`gpt2-none`.*no such directory.*reached.*HF_HUB_OFFLINE"):
        read_loom("gpt2-none")
    with pytest.raises(ArtifactError, match="there is no directory"):
        read_loom(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="there is no directory"):
        read_loom("runs/one/model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json is missing; did you mean"):
        read_loom(tmp_path)
