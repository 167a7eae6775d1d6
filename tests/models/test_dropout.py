"""Dropout by the keys of rows: the right rate, independent draws, and the same masks however rows are computed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loom_builders import ARCHITECTURE_NAMES, ENCODERS, tiny_config, tiny_model, tokens
from torch import Tensor
from torch.nn import functional

from pretrain.models import dropout as dropout_module
from pretrain.models import wants_dropout_keys
from pretrain.models.dropout import branch_sites, dropout, keyed_mask

KEYS = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5)
WORD = 2**32


def some_keys(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(seed))


def reference(key: int, site: int, probability: float, position: int, channel: int) -> bool:
    """The definition in integers without a limit, one element at a time."""

    def mix(word: int) -> int:
        word ^= word >> 16
        word = word * 0x7FEB352D % WORD
        word ^= word >> 15
        word = word * 0x846CA68B % WORD
        return word ^ word >> 16

    key %= 2**64
    low, high = (mix((half + (site + 1) * 0x9E3779B9) % WORD) for half in (key % WORD, key // WORD))
    pair = mix((low + 2 * high) % WORD), mix((high + 2 * low) % WORD)
    first, second = (mix((word + position * 0x6A09E667) % WORD) for word in pair)
    value = (first + channel * 0x9E3779B9) % WORD
    value ^= value >> 16
    value = (value * 0x7FEB352D + second) % WORD
    value ^= value >> 15
    value = (value * 0x846CA68B + first) % WORD
    return (value + 2**31) % WORD >= round(probability * WORD)


@settings(max_examples=30, deadline=None)
@given(keys=KEYS, site=st.integers(0, 200), probability=st.floats(0, 0.99), length=st.integers(1, 6))
def test_the_mask_is_its_definition(keys: list[int], site: int, probability: float, length: int) -> None:
    """So the masks of a run are the same from version to version and from device to device."""
    mask = keyed_mask(torch.tensor(keys), site, probability, length, 5)
    wanted = [[[reference(key, site, probability, t, c) for c in range(5)] for t in range(length)] for key in keys]
    assert mask.tolist() == wanted


@settings(max_examples=30, deadline=None)
@given(keys=KEYS, site=st.integers(0, 200), probability=st.floats(0, 1, exclude_max=True), channels=st.integers(1, 70))
def test_what_is_traced_is_what_is_run(keys: list[int], site: int, probability: float, channels: int) -> None:
    """The two forms of the hash, one for a compiler and one for eager kernels, agree in every bit."""
    first, second = dropout_module._position_words(torch.tensor(keys), site, 7)
    limit = min(round(probability * WORD), WORD - 1) - 2**31
    eager = dropout_module._mask_eager(first, second, limit, channels)
    assert torch.equal(eager, dropout_module._mask_traced(first, second, limit, channels))


@pytest.mark.parametrize(
    ("probability", "length", "channels"),
    [(0.5, 37, 101), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0.1, 37, 101), (0.1, 32, 48)))],
)
def test_compiled_masks_are_the_eager_ones(probability: float, length: int, channels: int) -> None:
    """Also at sizes that leave a rest beside whole vectors, where overflow of an index once broke the loop."""
    torch.compiler.reset()
    keys = some_keys(5)
    compiled = torch.compile(lambda keys: keyed_mask(keys, 3, probability, length, channels))
    assert torch.equal(compiled(keys), keyed_mask(keys, 3, probability, length, channels))


def normal(mask: Tensor, probability: float) -> Tensor:
    """Elements of mean 0 and variance 1 when they stay with 1 - probability."""
    return (mask.double() - (1 - probability)) / math.sqrt(probability * (1 - probability))


@pytest.mark.parametrize("probability", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("drawn", [True, False])
def test_elements_stay_at_the_rate_and_on_their_own(probability: float, drawn: bool) -> None:
    """Rates overall, of each channel, position, row and site, and correlations along every axis, within 5.5 sigma.

    Also with keys that are no random numbers.
    """
    keys = some_keys(32) if drawn else torch.arange(32)
    mask = torch.stack([keyed_mask(keys, site, probability, 64, 96) for site in range(9)])  # (site, B, L, channel)
    values = normal(mask, probability)
    for kept in ((), (0,), (1,), (2,), (3,), (0, 1), (2, 3), (1, 2)):
        others = [axis for axis in range(4) if axis not in kept]
        count = math.prod(mask.shape[axis] for axis in others)
        assert (values.sum(others) / math.sqrt(count)).abs().max() < 5.5
    for axis in range(4):
        for distance in (1, 2, 3, 8, 16, 31):
            if distance < mask.shape[axis]:
                size = mask.shape[axis] - distance
                pairs = values.narrow(axis, 0, size) * values.narrow(axis, distance, size)
                assert abs(pairs.sum() / math.sqrt(pairs.numel())) < 5.5
    squares = values[..., 1:, 1:] * values[..., 1:, :-1] * values[..., :-1, 1:] * values[..., :-1, :-1]
    assert abs(squares.sum() / math.sqrt(squares.numel())) < 5.5
    if probability < 0.1:
        return  # too few elements that two rows both lose for the normal's tails
    across = values.flatten(0, 1).flatten(1)  # (sites and rows, elements): every pair of draws
    products = across @ across.T / math.sqrt(across.shape[1])
    assert products.triu(diagonal=1).abs().max() < 5.5


def test_every_site_of_a_model_is_its_own() -> None:
    sites = [dropout_module.EMBEDDING_SITE, *(site for layer in range(100) for site in branch_sites(layer))]
    assert len(set(sites)) == len(sites)


@settings(max_examples=30, deadline=None)
@given(keys=KEYS, cut=st.integers(1, 4), site=st.integers(0, 50))
def test_a_mask_depends_on_its_row_alone(keys: list[int], cut: int, site: int) -> None:
    """Not on the rows beside it, nor on how long the row is, nor on what a generator did."""
    whole = keyed_mask(torch.tensor(keys), site, 0.3, 9, 11)
    parts = [
        keyed_mask(torch.tensor(keys[start : start + cut]), site, 0.3, 9, 11) for start in range(0, len(keys), cut)
    ]
    torch.rand(7)
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(keyed_mask(torch.tensor(keys), site, 0.3, 4, 11), whole[:, :4])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_states_and_gradients_are_those_of_the_mask(dtype: torch.dtype) -> None:
    states = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    keys = some_keys(3)
    mine, other = states.clone().requires_grad_(), states.clone().requires_grad_()
    mask = keyed_mask(keys, 4, 0.3, 5, 8)
    out, wanted = dropout(mine, 0.3, keys, 4), other * mask / 0.7
    assert out.dtype == dtype
    assert bool((out[~mask] == 0).all())
    torch.testing.assert_close(out, wanted)
    weights = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    (out * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda value: dropout(value, 0.3, keys, 4), (states.requires_grad_(),))


def test_without_keys_it_is_the_stock_function() -> None:
    states = torch.randn(2, 3, 4)
    torch.manual_seed(7)
    ours = dropout(states, 0.4, None, 1)
    torch.manual_seed(7)
    assert torch.equal(ours, functional.dropout(states, 0.4))


@pytest.mark.parametrize("keys", [torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 1).long()])
def test_keys_that_are_not_one_a_row_are_refused(keys: Tensor) -> None:
    with pytest.raises(ValueError, match=r"dropout_keys: .* for 2 rows; give one int64 a row"):
        dropout(torch.zeros(2, 3, 4), 0.1, keys, 0)


# --- in the models --------------------------------------------------------------------------------------------------

DROPPING = {"hidden_dropout": 0.3, "embedding_dropout": 0.2}


def inputs(architecture: str, rows: int = 6) -> dict[str, Tensor]:
    ids = tokens(rows, 12)
    return {"input_ids": ids, "labels" if architecture in ENCODERS else "shift_labels": ids.flip(1)}


def loss_and_gradients(model: torch.nn.Module, batch: dict[str, Tensor], **keys: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(**batch, **keys, num_items_in_batch=1).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_a_model_draws_by_the_keys_alone(architecture: str) -> None:
    """Equal keys, equal hidden states, whatever the split and the generator; the generator is not touched."""
    model = tiny_model(architecture, **DROPPING).train()
    ids, keys = tokens(6, 12), some_keys(6)
    state = torch.get_rng_state()
    whole = model.model(input_ids=ids, dropout_keys=keys).last_hidden_state
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.model(input_ids=ids, dropout_keys=keys).last_hidden_state, whole)
    for rows in (3, 2, 1):
        split = [
            model.model(input_ids=ids[start : start + rows], dropout_keys=keys[start : start + rows]).last_hidden_state
            for start in range(0, 6, rows)
        ]
        torch.testing.assert_close(torch.cat(split), whole, rtol=1e-5, atol=1e-5)
    other = model.model(input_ids=ids, dropout_keys=keys + 1).last_hidden_state
    assert not bool((other == whole).flatten(1).all(1).any())


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_gradient_checkpointing_draws_the_same_masks(architecture: str) -> None:
    model = tiny_model(architecture, **DROPPING).train()
    batch, keys = inputs(architecture), some_keys(6)
    loss, gradients = loss_and_gradients(model, batch, dropout_keys=keys)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant, "preserve_rng_state": False})
        assert model.is_gradient_checkpointing
        again, others = loss_and_gradients(model, batch, dropout_keys=keys)
        assert torch.equal(again, loss)
        assert all(map(torch.equal, others, gradients))


def test_autocast_draws_the_same_masks() -> None:
    seen: list[Tensor] = []

    def recorded(states: Tensor, *rest: object) -> Tensor:
        out = dropout(states, *rest)  # type: ignore[arg-type]
        seen.append(out.detach() != 0)
        return out

    model, batch, keys = tiny_model("gpt2", **DROPPING).train(), inputs("gpt2"), some_keys(6)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("layers", "modeling_loom"):
            patch.setattr(f"pretrain.models.{module}.dropout", recorded)
        model(**batch, dropout_keys=keys)
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch, dropout_keys=keys)
    assert len(seen) == 2 * (1 + 2 * 4)
    assert all(map(torch.equal, seen[:9], seen[9:]))
    assert not any(torch.equal(seen[one], seen[two]) for one in range(9) for two in range(one))


def test_evaluation_draws_nothing() -> None:
    model, ids = tiny_model("bert", **DROPPING), tokens(2, 9)
    plain = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, dropout_keys=some_keys(2)).logits, plain)


@pytest.mark.parametrize("architecture", ["modernbert", "llama"])
def test_classifiers_take_keys_too(architecture: str) -> None:
    model = tiny_model(architecture, task="classification", pad_token_id=0, **DROPPING).train()
    ids, keys = tokens(3, 9), some_keys(3)
    assert torch.equal(*(model(input_ids=ids, dropout_keys=keys).logits for _ in range(2)))
    assert not torch.equal(*(model(input_ids=ids).logits for _ in range(2)))


@pytest.mark.parametrize("key", ["hidden_dropout", "embedding_dropout", "attention_dropout", "classifier_dropout"])
def test_who_wants_keys(key: str) -> None:
    assert not wants_dropout_keys(tiny_config("bert"))
    assert wants_dropout_keys(tiny_config("bert", **{key: 0.1})) == (key in DROPPING)


@pytest.mark.slow
def test_compiled_training_is_the_eager_one() -> None:
    model, batch, keys = tiny_model("gpt2", num_hidden_layers=2, **DROPPING).train(), inputs("gpt2"), some_keys(6)
    loss, gradients = loss_and_gradients(model, batch, dropout_keys=keys)
    torch.compiler.reset()
    model.compile()
    compiled, others = loss_and_gradients(model, batch, dropout_keys=keys)
    torch.testing.assert_close(compiled, loss, rtol=1e-5, atol=1e-5)
    for other, gradient in zip(others, gradients, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-3)
