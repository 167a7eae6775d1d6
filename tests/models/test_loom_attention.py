"""Attention against a slow reference, backends against each other, documents and padding closed off."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loom_builders import (
    ARCHITECTURE_NAMES,
    DECODERS,
    HERE,
    documents,
    relative,
    tiny_config,
    tiny_model,
    tokens,
)
from reference import slow_attention

from pretrain.models import CAPABILITIES, pick_backend
from pretrain.models.attention import BACKENDS, apply_rotary
from pretrain.models.cpu_kernels import cpu_attention
from pretrain.models.masks import AttentionMask, build_masks
from pretrain.models.mixers import Geometry
from pretrain.models.positions import document_positions, rotary_tables


def random_heads(length: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 2, length, 6, generator=generator, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_backends_match_the_slow_reference(backend: str, causal: bool, packed: bool) -> None:
    query, key, value = random_heads(9)
    allowed = torch.ones(2, 9, 9, dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
    if packed:
        ids = documents([4, 5], [2, 3, 4])
        allowed = allowed & (ids[:, :, None] == ids[:, None, :])
    mask = AttentionMask(allowed=allowed[:, None] if packed else None, causal=causal)
    mixed, _ = BACKENDS[backend](query, key, value, mask, scale=0.4, dropout=0.0)
    assert torch.allclose(mixed.transpose(1, 2), slow_attention(query, key, value, allowed, 0.4), atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("length", [5, 130, 260])
def test_the_cpu_path_has_the_values_and_gradients_of_the_fused_kernel(causal, masked, length) -> None:
    query, key, value = (states.requires_grad_() for states in random_heads(length))
    allowed = None
    if masked:
        ids = documents([length // 2, length - length // 2], [length - 3, -3])
        allowed = (ids[:, None, :, None] == ids[:, None, None, :]) & torch.ones(length, length, dtype=torch.bool)
        allowed = allowed.tril() if causal else allowed
    mask = AttentionMask(allowed=allowed, causal=causal)
    ours = cpu_attention(query, key, value, mask, 0.3)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, is_causal=causal and not masked, scale=0.3
    )
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert relative(ours, theirs) < 1e-12
    for first, second in zip(
        torch.autograd.grad(ours, (query, key, value), upstream),
        torch.autograd.grad(theirs, (query, key, value), upstream),
        strict=True,
    ):
        assert relative(first, second) < 1e-11


def test_the_cpu_path_in_bfloat16_stays_near_float32() -> None:
    query, key, value = random_heads(200, torch.float32)
    mask = AttentionMask(causal=True)
    exact = cpu_attention(query, key, value, mask, 0.4)
    rounded = cpu_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), mask, 0.4)
    assert rounded.dtype == torch.bfloat16
    assert relative(rounded.float(), exact) < 0.02


def test_rotary_turns_by_angle_and_leaves_only_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 20, 1, 6, generator=generator, dtype=torch.float64)
    turned = apply_rotary(states, rotary_tables(torch.arange(20)[None], 6, 100.0))
    for position in (0, 3, 19):
        for pair in range(3):
            angle = position / 100.0 ** (2 * pair / 6)
            first, second = float(states[0, position, 0, pair]), float(states[0, position, 0, pair + 3])
            assert float(turned[0, position, 0, pair]) == pytest.approx(
                first * math.cos(angle) - second * math.sin(angle), abs=1e-5
            )
            assert float(turned[0, position, 0, pair + 3]) == pytest.approx(
                second * math.cos(angle) + first * math.sin(angle), abs=1e-5
            )
    same = states[:, :1].expand(1, 20, 1, 6)
    moved = [apply_rotary(same, rotary_tables(torch.arange(20)[None] + shift, 6, 100.0)) for shift in (0, 7)]
    products = [(m[0, 5, 0] @ m[0, 2, 0]).item() for m in moved]
    assert products[0] == pytest.approx(products[1], rel=1e-4)


def test_rotary_row_by_row_equals_the_plain_formula_and_its_gradient() -> None:
    states = torch.randn(3, 17, 2, 8, dtype=torch.float64, requires_grad=True)
    tables = rotary_tables(torch.randint(0, 30, (3, 17)), 8, 1000.0)
    first, second = states.chunk(2, dim=-1)
    cosine, sine = tables
    plain = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    turned = apply_rotary(states, tables)
    upstream = torch.randn(plain.shape, dtype=torch.float64)
    assert torch.allclose(turned, plain, atol=1e-12)
    gradients = [torch.autograd.grad(output, states, upstream)[0] for output in (turned, plain)]
    assert torch.allclose(*gradients, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
@pytest.mark.parametrize("case", ["plain", "padded", "packed", "bool 4D", "additive 4D"])
def test_eager_and_sdpa_agree(architecture: str, case: str) -> None:
    model = tiny_model(architecture)
    ids = tokens(2, 40)
    inputs = {"input_ids": ids}
    visible = torch.ones(2, 40, dtype=torch.bool)
    if case == "padded":
        visible[1, 25:] = False
        inputs["attention_mask"] = visible.long()
    elif case == "packed":
        inputs["document_ids"] = documents([10, 30], [5, 20, -15])
    elif case.endswith("4D"):
        square = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(3)) > 0.3
        square |= torch.eye(40, dtype=torch.bool)
        inputs["attention_mask"] = square if case == "bool 4D" else torch.where(square, 0.5, -torch.inf)
    outputs = []
    with torch.no_grad():
        for backend in HERE:
            model.set_attn_implementation(backend)
            outputs.append(model(**inputs).logits)
    assert torch.isfinite(outputs[0]).all()
    assert relative(outputs[0][visible], outputs[1][visible]) < 2e-5


@pytest.mark.parametrize("attention", HERE)
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_a_packed_row_gives_each_document_its_own_logits(architecture: str, attention: str) -> None:
    model = tiny_model(architecture, attention=attention)
    ids = tokens(1, 40)
    packed = documents([11, 24, -5])
    with torch.no_grad():
        row = model(input_ids=ids, document_ids=packed).logits
        for start, stop in ((0, 11), (11, 35)):
            alone = model(input_ids=ids[:, start:stop]).logits
            assert relative(row[:, start:stop], alone) < 2e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", HERE)
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_a_neighbour_changes_nothing_and_gets_no_gradient(architecture: str, attention: str, precision: str) -> None:
    model = tiny_model(architecture, attention=attention)
    packed = documents([11, 24, -5])
    embedded = model.get_input_embeddings()(tokens(1, 40)).detach()
    changed = embedded.clone()
    changed[:, 11:35] += 3.0
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        leaf = embedded.clone().requires_grad_()
        before = model.model(inputs_embeds=leaf, document_ids=packed).last_hidden_state[:, :11]
        after = model.model(inputs_embeds=changed, document_ids=packed).last_hidden_state[:, :11]
    assert torch.equal(before, after)
    (gradient,) = torch.autograd.grad(before.float().pow(2).sum(), leaf)
    assert gradient[:, :11].abs().sum() > 0
    assert gradient[:, 11:].abs().sum() == 0


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_rows_without_padding_or_neighbours_skip_the_mask(architecture: str) -> None:
    config = tiny_config(architecture)
    keys = {
        "causal": config.kind == "decoder",
        "length": 6,
        "past_length": 0,
        "key_length": 6,
        "device": torch.device("cpu"),
    }
    for given_mask in (
        {},
        {"attention_mask": torch.ones(2, 6, dtype=torch.long)},
        {"document_ids": torch.ones(2, 6, dtype=torch.int32)},
    ):
        mask = build_masks(config, **keys, **given_mask)["global"]
        assert mask.allowed is None
        assert mask.causal == (config.kind == "decoder")


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3),
    causal=st.booleans(),
    window=st.sampled_from([2, 4, 100]),
    pad=st.integers(0, 3),
)
def test_masks_allow_exactly_what_the_rules_say(pieces, causal: bool, window: int, pad: int) -> None:
    length = max(sum(row) for row in pieces) + pad
    ids = documents(*([*row, -(length - sum(row))] if length > sum(row) else row for row in pieces))
    config = tiny_config("gpt2" if causal else "bert", global_attention_every=2, local_window=window)
    masks = build_masks(
        config,
        causal=causal,
        length=length,
        past_length=0,
        key_length=length,
        device=torch.device("cpu"),
        document_ids=ids,
    )
    for kind, mask in masks.items():
        if mask.allowed is None:
            full = torch.ones(length, length, dtype=torch.bool)
            allowed = (full.tril() if mask.causal else full).expand(len(pieces), length, length)
        else:
            allowed = mask.allowed.expand(len(pieces), 1, length, length)[:, 0]
        for b, row in enumerate(ids.tolist()):
            for i in range(length):
                for j in range(length):
                    same = row[i] == row[j] != 0
                    near = kind == "global" or (i - j < window if causal else abs(i - j) <= window // 2)
                    expected = (same and near and (j <= i or not causal)) or i == j
                    assert bool(allowed[b, i, j]) == expected, (kind, b, i, j)


@pytest.mark.parametrize("attention", HERE)
def test_a_learned_additive_mask_gets_its_gradient(attention: str) -> None:
    model = tiny_model("gpt2", attention=attention).bfloat16()
    bias = torch.zeros(1, 4, 20, 20, requires_grad=True)
    model(input_ids=tokens(2, 20), attention_mask=bias).logits.float().pow(2).sum().backward()
    assert bias.grad.abs().sum() > 0


def test_positions_restart_with_each_document() -> None:
    ids = documents([3, 2, -2], [1, 5, -1])
    assert document_positions(ids).tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 2, 3, 4, 0]]


def test_local_layers_look_at_the_window_alone() -> None:
    model = tiny_model("modernbert", num_hidden_layers=2, global_attention_every=2)
    local = model.model.layers[1].double()
    states = torch.randn(1, 30, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = Geometry(torch.arange(30)[None], length=30, past_length=0, key_length=30)
    inputs = model.model.mixer_inputs(rows)["local"]
    changed = states.clone()
    changed[:, 15] += 1.0
    with torch.no_grad():
        first, second = (local(given, mixer_input=inputs) for given in (states, changed))
    difference = (first - second).abs().sum(-1)[0]
    assert difference.nonzero().flatten().tolist() == list(range(11, 20))  # local_window 8: four on each side


@pytest.mark.parametrize("architecture", DECODERS)
def test_decoders_take_local_layers_too(architecture: str) -> None:
    model = tiny_model(architecture, num_hidden_layers=2, global_attention_every=2, local_window=4)
    ids = tokens(1, 30)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        cache = None
        steps = []
        for position in range(30):
            output = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert relative(torch.cat(steps, dim=1), whole) < 2e-5


def test_the_capability_table_names_every_backend_and_picks_by_it() -> None:
    assert set(CAPABILITIES) == set(BACKENDS)
    config = tiny_config("modernbert", attention_dropout=0.1)
    assert pick_backend(config, "cpu")[0] == "sdpa"
    name, reason = pick_backend(config, torch.device("cpu"), need_weights=True)
    assert name == "eager"
    assert "sdpa cannot hold" in reason


def test_attention_weights_are_returned_when_asked_for() -> None:
    model = tiny_model("bert")
    output = model(input_ids=tokens(2, 7), output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 4
    assert torch.allclose(output.attentions[0].sum(-1), torch.ones(2, 4, 7), atol=1e-5)
    assert len(output.hidden_states) == 5


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="flash_attention_2"):
        tiny_model("bert").set_attn_implementation("flash_attention_2")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.ones(1, 5)}, "covers 5 positions"),
        ({"attention_mask": torch.ones(1, 8, 8)}, "2 or 4 dimensions"),
        ({"attention_mask": torch.ones(1, 1, 5, 8, dtype=torch.bool)}, "4D attention_mask ends in"),
        ({"attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.long)}, "bool or floating point"),
        (
            {
                "attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool),
                "document_ids": torch.ones(1, 8, dtype=torch.int32),
            },
            "not both",
        ),
    ],
)
def test_masks_that_do_not_fit_are_refused(inputs, message: str) -> None:
    if inputs["attention_mask"].dim() == 2:
        inputs = {"attention_mask": inputs["attention_mask"].index_fill(1, torch.tensor([4]), 0)}
    with pytest.raises(ValueError, match=message):
        tiny_model("bert")(input_ids=tokens(1, 8), **inputs)
