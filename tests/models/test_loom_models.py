"""Whole models: losses with and without logits, cache, generation, checkpointing, saving, initial values, heads."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from loom_builders import (
    ARCHITECTURE_NAMES,
    DECODERS,
    ENCODERS,
    HERE,
    documents,
    relative,
    tiny_config,
    tiny_model,
    tokens,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from pretrain.models import LoomDecoderForCausalLM, model_class, model_from_config


def batch(architecture: str, rows: int = 3, length: int = 20):
    """A packed batch with targets, under the name its objective uses."""
    ids = tokens(rows, length)
    targets = tokens(rows, length, seed=9)
    targets[torch.rand(targets.shape, generator=torch.Generator().manual_seed(4)) > 0.4] = -100
    name = "labels" if architecture in ENCODERS else "shift_labels"
    return {"input_ids": ids, "document_ids": documents(*[[7, length - 9, -2]] * rows), name: targets}


def gradients(model, inputs, **keys):
    model.zero_grad()
    loss = model(**inputs, **keys).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("keys", [{}, {"logit_softcap": 2.0, "output_scale": 0.5}], ids=["plain", "capped"])
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_the_loss_without_logits_equals_the_loss_with_them(architecture: str, keys: dict[str, float]) -> None:
    model = tiny_model(architecture, **keys).double().train()
    inputs = batch(architecture)
    assert model(**inputs).logits is None
    assert model(**inputs, return_logits=True).logits.shape == (3, 20, 61)
    fused_loss, fused = gradients(model, inputs)
    plain_loss, plain = gradients(model, inputs, return_logits=True)
    assert fused_loss == pytest.approx(plain_loss, rel=1e-12)
    for name in plain:
        assert torch.allclose(fused[name], plain[name], atol=1e-11), name


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_the_loss_is_a_sum_over_the_given_number_of_items(architecture: str) -> None:
    model = tiny_model(architecture).train()
    inputs = batch(architecture)
    targets = inputs.get("labels", inputs.get("shift_labels"))
    count = int((targets != -100).sum())
    mean = model(**inputs).loss
    assert model(**inputs, num_items_in_batch=count * 2).loss.item() == pytest.approx(mean.item() / 2, rel=1e-5)
    assert model(**inputs, num_items_in_batch=torch.tensor(count)).loss.item() == pytest.approx(mean.item(), rel=1e-5)
    model.eval()
    assert model(**inputs, num_items_in_batch=count).loss.item() == pytest.approx(mean.item(), rel=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_a_batch_without_targets_has_loss_zero_and_gradients_everywhere(architecture: str) -> None:
    model = tiny_model(architecture).train()
    inputs = batch(architecture)
    targets = inputs.get("labels", inputs.get("shift_labels"))
    targets.fill_(-100)
    loss, made = gradients(model, inputs)
    assert loss == 0.0
    assert all(torch.isfinite(gradient).all() for gradient in made.values())


def test_unshifted_labels_are_shifted_inside_documents() -> None:
    model = tiny_model("gpt2")
    ids, packed = tokens(1, 12), documents([5, 7])
    loss = model(input_ids=ids, document_ids=packed, labels=ids).loss
    parts = [model(input_ids=ids[:, a:b], labels=ids[:, a:b]).loss * (b - a - 1) for a, b in ((0, 5), (5, 12))]
    assert loss.item() == pytest.approx(sum(part.item() for part in parts) / 10, rel=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_autocast_trains_near_float32(architecture: str) -> None:
    model = tiny_model(architecture, hidden_size=32, seed=2).train()
    inputs = batch(architecture, rows=16)  # 320 rows of states: the joined projections are used
    exact_loss, exact = gradients(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss, rounded = gradients(model, inputs)
    assert loss == pytest.approx(exact_loss, rel=0.02)
    exact_flat, rounded_flat = (torch.cat([g.flatten() for g in made.values()]) for made in (exact, rounded))
    assert float(torch.nn.functional.cosine_similarity(exact_flat, rounded_flat, dim=0)) > 0.99


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_joined_projections_equal_separate_ones(architecture: str) -> None:
    model = tiny_model(architecture).double().train()
    inputs = batch(architecture, rows=16)
    _, joined = gradients(model, inputs)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_: None)  # a hook is a reason to call each module
    _, separate = gradients(model, inputs)
    for name in joined:
        assert torch.allclose(joined[name], separate[name], atol=1e-11), name


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_gradient_checkpointing_gives_equal_gradients(architecture: str) -> None:
    model = tiny_model(architecture).train()
    inputs = batch(architecture)
    _, plain = gradients(model, inputs)
    model.activation_checkpointing_enable()
    calls = []
    model.model.layers[-1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    _, recomputed = gradients(model, inputs)
    uses = len(model.model.attention_kinds) // len(model.model.layers)  # of each set of weights
    assert len(calls) == 2 * uses
    for name in plain:
        assert torch.equal(plain[name], recomputed[name]), name


WINDOWS = {"global_attention_every": 2, "local_window": 6}
CACHED = {name: (name, {}) for name in DECODERS} | {
    "sinusoidal": ("gpt2", {"position_kind": "sinusoidal"}),
    "alibi": ("gpt2", WINDOWS | {"position_kind": "alibi"}),
    "relative": ("gpt2", WINDOWS | {"position_kind": "relative", "attention_softcap": 3.0}),
    "none": ("gpt2", {"position_kind": "none"}),
    "linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "shared weights": ("gpt2", {"num_hidden_groups": 1}),
    "parallel": ("gpt2", {"block_kind": "parallel", "qk_norm": "full_width", "num_key_value_heads": 1}),
}
every_cached = pytest.mark.parametrize(("architecture", "keys"), CACHED.values(), ids=CACHED)


@every_cached
@pytest.mark.parametrize("attention", HERE)
def test_a_cache_changes_nothing(architecture: str, keys: dict[str, Any], attention: str) -> None:
    model = tiny_model(architecture, attention=attention, **keys)
    ids = tokens(2, 24)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :10])
        middle = model(input_ids=ids[:, 10:20], past_key_values=first.past_key_values)
        steps = [first.logits, middle.logits]
        for position in range(20, 24):
            step = model(input_ids=ids[:, position : position + 1], past_key_values=middle.past_key_values)
            steps.append(step.logits)
    assert relative(torch.cat(steps, dim=1), whole) < 2e-5


@every_cached
def test_generation_with_left_padding_equals_generation_alone(architecture: str, keys: dict[str, Any]) -> None:
    model = tiny_model(architecture, **keys)
    ids = tokens(1, 9)
    padded = torch.cat((torch.full((1, 4), 1), ids), dim=1)
    other = tokens(1, 13, seed=3)
    mask = torch.tensor([[0] * 4 + [1] * 9, [1] * 13])
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    alone = model.generate(ids, **how)[0, 9:]
    together = model.generate(torch.cat((padded, other)), attention_mask=mask, **how)
    assert together[0, 13:].tolist() == alone.tolist()
    assert together[1, 13:].tolist() == model.generate(other, **how)[0, 13:].tolist()
    without_cache = model.generate(ids, use_cache=False, **how)[0, 9:]
    assert without_cache.tolist() == alone.tolist()
    beams = model.generate(ids, num_beams=3, **how)
    assert beams.shape == (1, 15)


@every_cached
def test_a_cache_of_fixed_size_generates_the_same(architecture: str, keys: dict[str, Any]) -> None:
    model = tiny_model(architecture, **keys)
    ids = tokens(2, 9)
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    cache = StaticCache(config=model.config, max_cache_len=16)
    assert model.generate(ids, past_key_values=cache, **how).tolist() == model.generate(ids, **how).tolist()


def test_training_builds_no_cache() -> None:
    model = tiny_model("gpt2")
    assert model(input_ids=tokens(1, 5)).past_key_values is not None
    assert model.train()(input_ids=tokens(1, 5)).past_key_values is None


def test_a_row_longer_than_the_position_table_is_refused() -> None:
    with pytest.raises(ValueError, match="max_position_embeddings 64"):
        tiny_model("gpt2")(input_ids=tokens(1, 65))


def test_documents_with_a_filled_cache_are_refused() -> None:
    model = tiny_model("gpt2")
    first = model(input_ids=tokens(1, 5))
    with pytest.raises(ValueError, match="filled key-value cache"):
        model(input_ids=tokens(1, 5), past_key_values=first.past_key_values, document_ids=documents([5]))


def test_saving_and_loading_in_another_process_keeps_every_bit(tmp_path) -> None:
    ids = tokens(2, 30)
    for architecture in ARCHITECTURE_NAMES:
        model = tiny_model(architecture)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        model.save_pretrained(tmp_path / architecture / "model")
        torch.save((ids, logits), tmp_path / architecture / "expected.pt")
    script = """
import sys, torch, transformers
import pretrain.models
for path in sys.argv[1:]:
    config = transformers.AutoConfig.from_pretrained(path + "/model")
    auto = transformers.AutoModelForMaskedLM if config.kind == "encoder" else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(path + "/model").eval()
    ids, expected = torch.load(path + "/expected.pt")
    assert not list(model.buffers())
    assert model.config.tie_word_embeddings == (model.lm_head.weight is model.get_input_embeddings().weight)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected), path
"""
    paths = [str(tmp_path / architecture) for architecture in ARCHITECTURE_NAMES]
    subprocess.run([sys.executable, "-c", script, *paths], check=True, timeout=120)


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_classifiers_train_and_load_from_a_pretrained_model(architecture: str, tmp_path) -> None:
    pretrained = tiny_model(architecture)
    pretrained.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).train()
    assert type(model) is model_class(pretrained.config, "classification")
    assert torch.equal(model.model.embed_tokens.weight, pretrained.model.embed_tokens.weight)
    ids, mask = tokens(4, 12), torch.ones(4, 12, dtype=torch.long)
    mask[1, 7:] = 0
    output = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 2, 1]))
    output.loss.backward()
    assert output.logits.shape == (4, 3)
    assert model.config.problem_type == "single_label_classification"
    model.eval()
    with torch.no_grad():
        short = model(input_ids=ids[1:2, :7]).logits
        assert relative(model(input_ids=ids, attention_mask=mask).logits[1:2], short) < 1e-4


@pytest.mark.parametrize("architecture", ENCODERS)
def test_mean_pooling_and_the_other_problem_types(architecture: str) -> None:
    model = tiny_model(architecture, task="classification", classifier_pooling="mean", classifier_dropout=0.1)
    ids, mask = tokens(2, 12), torch.tensor([[1] * 12, [1] * 5 + [0] * 7])
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask).logits
        assert relative(both[1:], model(input_ids=ids[1:, :5]).logits) < 1e-4
    assert model(input_ids=ids, labels=torch.rand(2, 2)).loss.item() > 0
    assert model.config.problem_type == "multi_label_classification"
    with pytest.raises(ValueError, match="2D attention_mask"):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool))


def test_a_decoder_classifier_needs_to_know_the_padding() -> None:
    model = tiny_model("gpt2", task="classification", pad_token_id=None)
    with pytest.raises(ValueError, match="pad_token_id"):
        model(input_ids=tokens(2, 6))


def test_initial_widths_follow_the_architecture() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 8, "vocab_size": 400}
    for architecture in ARCHITECTURE_NAMES:
        config = tiny_config(architecture, **sizes)
        model = model_from_config(config)
        layer = model.model.layers[-1]
        divided = 0.02 / math.sqrt(16) if architecture in ("gpt2", "modernbert", "modernbert-decoder") else 0.02
        # A normal cut at two deviations has 0.88 of its width.
        cut = 0.88 if architecture.startswith("modernbert") else 1.0
        assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02 * cut, rel=0.05)
        assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(divided * cut, rel=0.05)
        assert layer.mlp.down_proj.weight.std().item() == pytest.approx(divided * cut, rel=0.05)
        assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02 * cut, rel=0.05)
        if architecture.startswith("modernbert"):
            assert model.head.dense.weight.std().item() == pytest.approx(divided * cut, rel=0.05)
        assert all(p.abs().sum() == 0 for name, p in model.named_parameters() if name.endswith(".bias"))


def test_initial_widths_of_t5_are_those_of_its_own_class() -> None:
    sizes = {"vocab_size": 400, "num_attention_heads": 8, "head_dim": 24, "num_hidden_layers": 2}
    torch.manual_seed(0)
    ours = model_from_config(tiny_config("t5", hidden_size=128, **sizes)).state_dict()
    stock = T5ForConditionalGeneration(
        T5Config(vocab_size=400, d_model=128, num_layers=2, num_heads=8, d_kv=24, d_ff=512, feed_forward_proj="relu")
    ).state_dict()
    pairs = {
        "encoder.embed_tokens": "shared",
        "decoder.layers.1.self_attn.q_proj": "decoder.block.1.layer.0.SelfAttention.q",
        "encoder.layers.1.self_attn.k_proj": "encoder.block.1.layer.0.SelfAttention.k",
        "decoder.layers.1.cross_attn.v_proj": "decoder.block.1.layer.1.EncDecAttention.v",
        "decoder.layers.1.cross_attn.o_proj": "decoder.block.1.layer.1.EncDecAttention.o",
        "encoder.layers.0.mlp.up_proj": "encoder.block.0.layer.1.DenseReluDense.wi",
        "decoder.layers.0.mlp.down_proj": "decoder.block.0.layer.2.DenseReluDense.wo",
        "encoder.mixer_inputs.relative_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    }
    for mine, theirs in pairs.items():
        width = stock[f"{theirs}.weight"].std().item()
        assert ours[f"model.{mine}.weight"].std().item() == pytest.approx(width, rel=0.2), mine


def test_initial_widths_of_2017() -> None:
    torch.manual_seed(0)
    ours = model_from_config(tiny_config("transformer", hidden_size=128, vocab_size=400)).state_dict()
    assert ours["model.encoder.embed_tokens.weight"].std().item() == pytest.approx(128**-0.5, rel=0.05)
    for name, fans in (("self_attn.q_proj", 128 + 128), ("mlp.up_proj", 128 + 512), ("mlp.down_proj", 512 + 128)):
        weight = ours[f"model.decoder.layers.0.{name}.weight"]
        assert weight.abs().max().item() == pytest.approx((6 / fans) ** 0.5, rel=0.01)
        assert weight.std().item() == pytest.approx((2 / fans) ** 0.5, rel=0.05)


def test_loading_keeps_weights_when_one_is_missing(tmp_path) -> None:
    model = tiny_model("llama")
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.layers[1].mlp.gate_proj.weight, model.model.layers[1].mlp.gate_proj.weight)
    assert loaded.model.layers[1].mlp.up_proj.weight.std() < 0.1


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_resized_embeddings_stay_tied_and_train_without_logits(architecture: str) -> None:
    model = tiny_model(architecture).train()
    model.resize_token_embeddings(70)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    loss, _ = gradients(model, batch(architecture))
    assert math.isfinite(loss)


def test_dropout_acts_in_training_alone() -> None:
    for key in ("hidden_dropout", "attention_dropout", "embedding_dropout"):
        model = tiny_model("bert", **{key: 0.5})
        inputs = {"input_ids": tokens(1, 10)}
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("position_kind", ["none", "learned", "sinusoidal", "rotary", "alibi", "relative"])
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_every_position_kind_runs_with_every_design(architecture: str, position_kind: str) -> None:
    model = tiny_model(architecture, position_kind=position_kind)
    loss, _ = gradients(model.train(), batch(architecture))
    assert math.isfinite(loss)


def test_token_types_reach_the_embeddings() -> None:
    model = tiny_model("bert")
    ids = tokens(1, 8)
    plain = model(input_ids=ids).logits
    assert torch.equal(plain, model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits)
    assert not torch.equal(plain, model(input_ids=ids, token_type_ids=torch.ones_like(ids)).logits)


def test_exactly_one_input_is_needed() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        tiny_model("bert")()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["modernbert", "gpt2"])
def test_compiled_training_equals_eager(architecture: str) -> None:
    model = tiny_model(architecture, num_hidden_layers=2).train()
    inputs = batch(architecture)
    loss, eager = gradients(model, inputs)
    compiled = torch.compile(model)
    model.zero_grad()
    compiled_loss = compiled(**inputs).loss
    compiled_loss.backward()
    assert compiled_loss.item() == pytest.approx(loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, eager[name], atol=1e-5), name


def test_auto_classes_find_the_models() -> None:
    assert type(AutoModelForMaskedLM.from_config(tiny_config("bert"))).__name__ == "LoomEncoderForMaskedLM"
    assert type(AutoModelForCausalLM.from_config(tiny_config("llama"))) is LoomDecoderForCausalLM
    assert type(model_from_config(tiny_config("bert"))).__name__ == "LoomEncoderForMaskedLM"
