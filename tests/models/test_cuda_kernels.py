"""The GPU paths as far as a CPU can show them: flex forward against eager, varlen over a slow stand-in for its kernel.

Their backward passes and the kernels themselves are in `tests/gpu`.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as library
import torch.nn.attention.varlen as borders_library
from loom_builders import ARCHITECTURE_NAMES, documents, relative, tiny_config, tiny_model, tokens
from torch import Tensor

from pretrain.models import CAPABILITIES, LoomConfig, pick_backend
from pretrain.models.attention import eager_attention, missing_abilities
from pretrain.models.cuda_kernels import flex, piece_borders, varlen
from pretrain.models.masks import AttentionMask, build_masks

LENGTH = 40
PADDED = torch.ones(2, LENGTH, dtype=torch.long)
PADDED[0, 30:] = 0
LEFT = PADDED.flip(1)
ROWS: dict[str, dict[str, Tensor]] = {
    "open": {},
    "packed": {"document_ids": documents([11, 24, -5], [1, 39])},
    "padded": {"attention_mask": PADDED},
    "padded left": {"attention_mask": LEFT},
    "packed and padded": {"document_ids": documents([11, 29], [15, 25]), "attention_mask": PADDED},
}
every_row = pytest.mark.parametrize("rows", ROWS)
either_way = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])


@pytest.fixture
def uncompiled(monkeypatch) -> None:
    """The library's own switch for running without its compiler."""
    monkeypatch.setattr(library, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    warnings.filterwarnings("ignore", message="flex_attention called without")


def real_places(rows: str) -> Tensor:
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    for given in ROWS[rows].values():
        real = real & (given != 0)
    return real


def masks_of(rows: str, causal: bool, window: int | None) -> AttentionMask:
    keys = {} if window is None else {"attention_pattern": ["local"], "local_window": window}
    config = tiny_config("gpt2" if causal else "bert", **keys)
    made = build_masks(
        config,
        causal=causal,
        length=LENGTH,
        past_length=0,
        key_length=LENGTH,
        device=torch.device("cpu"),
        **ROWS[rows],
    )
    return made["global" if window is None else "local"]


def heads(key_value_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, count, LENGTH, 16) for count in (4, key_value_heads, key_value_heads)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


@pytest.mark.usefixtures("uncompiled")
@every_row
@either_way
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("more", ["plain", "bias", "cap and bias"])
def test_flex_is_eager(rows: str, causal: bool, window: int | None, more: str) -> None:
    query, key, value = heads()
    mask, softcap = masks_of(rows, causal, window), 1.5 if "cap" in more else None
    if "bias" in more:
        mask = mask.with_position_bias(torch.randn(1, 4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)))
    found = flex(query, key, value, mask, 0.3, softcap).transpose(1, 2)
    assert mask._allowed is None  # no square was made
    expected, _ = eager_attention(query, key, value, mask, scale=0.3, dropout=0.0, softcap=softcap)
    real = real_places(rows)
    assert relative(found[real], expected[real]) < 1e-5
    assert torch.isfinite(found).all()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("bert", {"position_kind": "alibi"}),
        ("modernbert", {}),
        ("gpt2", {"position_kind": "relative", "attention_softcap": 2.0}),
        ("qwen3", {}),
    ],
)
def test_models_give_the_same_with_flex(architecture: str, keys: dict[str, Any]) -> None:
    model = tiny_model(architecture, hidden_size=64, head_dim=16, num_hidden_layers=2, **keys)
    ids, packed = tokens(2, LENGTH), ROWS["packed"]["document_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids, document_ids=packed).logits
        model.set_attn_implementation("flex")
        assert relative(model(input_ids=ids, document_ids=packed).logits[packed != 0], expected[packed != 0]) < 1e-5
        alone = model(input_ids=ids[:1, 11:35]).logits
        assert relative(alone, expected[:1, 11:35]) < 1e-5
        square = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
        by_square = model(input_ids=ids, attention_mask=square).logits  # a caller's own mask takes another way
        model.set_attn_implementation("sdpa")
        assert torch.equal(by_square, model(input_ids=ids, attention_mask=square).logits)


@pytest.mark.usefixtures("uncompiled")
def test_a_filled_cache_takes_another_way() -> None:
    model = tiny_model("llama", hidden_size=64, num_hidden_layers=2)
    ids = tokens(2, 9)
    keys = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    expected = model.generate(ids, **keys).tolist()
    model.set_attn_implementation("flex")
    assert model.generate(ids, **keys).tolist() == expected


def slow_pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What the documentation of `varlen_attn` says, piece by piece, on (T, heads, D)."""
    assert torch.equal(cu_seq_q, cu_seq_k)
    mixed = torch.zeros_like(query)
    for start, stop in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        assert 0 < stop - start <= max_q == max_k
        place = slice(start, stop)
        scores = torch.einsum("qhd,khd->hqk", query[place], key[place]) * scale
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)[None, :]
        left, right = window_size
        closed = (distance > left if left >= 0 else distance > stop) | (
            -distance > right if right >= 0 else distance > stop
        )
        scores = scores.masked_fill(closed, -torch.inf)
        mixed[place] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[place])
    return mixed


def slow_grouped_pieces(*given: Any, enable_gqa: bool = False, **keys: Any) -> Tensor:
    """The same with the signature of torch 2.12 and later."""
    query, key, value, *borders = given
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    return slow_pieces(query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), *borders, **keys)


@every_row
@either_way
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kernel", [slow_pieces, slow_grouped_pieces])
@pytest.mark.parametrize("key_value_heads", [4, 1])
def test_varlen_gives_its_kernel_the_right_pieces(
    rows: str, causal: bool, window: int | None, kernel, key_value_heads: int, monkeypatch
) -> None:
    monkeypatch.setattr(borders_library, "varlen_attn", kernel)
    query, key, value = heads(key_value_heads)
    mask = masks_of(rows, causal, window)
    found = varlen(query, key, value, mask, 0.3)
    assert mask._allowed is None  # no square was made
    expected, _ = eager_attention(query, key, value, mask, scale=0.3, dropout=0.0)
    real = real_places(rows)
    assert relative(found[real], expected[real]) < 1e-5
    assert torch.isfinite(found).all()


def test_the_installed_kernel_takes_what_it_is_given() -> None:
    signature = inspect.signature(borders_library.varlen_attn)
    signature.bind(*[torch.zeros(1)] * 5, 1, 1, scale=0.3, window_size=(-1, 0))


def test_borders_of_rows_without_padding_are_those_of_their_pieces() -> None:
    visibility = masks_of("packed", causal=False, window=None).visibility
    assert visibility is not None
    order, borders = piece_borders(visibility, 2)
    assert order is None
    assert borders.tolist() == [0, 11, 35, 40, 41, 80]
    assert borders.dtype == torch.int32


def test_a_gradient_on_a_cpu_is_refused_with_the_remedy() -> None:
    model = tiny_model("llama", hidden_size=64)
    model.set_attn_implementation("flex")
    with pytest.raises(ValueError, match="no backward pass on a CPU: take sdpa"):
        model(input_ids=tokens(1, 8))
    model.set_attn_implementation("varlen")
    with pytest.raises(ValueError, match="needs a CUDA device"):
        model(input_ids=tokens(1, 8))


@pytest.mark.parametrize(
    ("backend", "keys", "message"),
    [
        ("flex", {"attention_dropout": 0.1}, "flex cannot hold attention_dropout 0.1: take one of eager, sdpa"),
        ("flex", {"head_dim": 8}, "head_dim 8"),
        ("varlen", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ("varlen", {"position_kind": "alibi"}, "position_kind alibi: take one of eager, sdpa, flex"),
        ("varlen", {"position_kind": "relative"}, "position_kind relative"),
        ("varlen", {"attention_softcap": 2.0}, "attention_softcap 2.0"),
        ("varlen", {"head_dim": 20}, "head_dim 20"),
        ("flesh", {}, '"flesh". is not supported by Loom models: take one of eager, sdpa, flex, varlen'),
    ],
)
def test_a_backend_that_cannot_hold_the_config_is_refused(backend: str, keys: dict[str, Any], message: str) -> None:
    model = tiny_model("gpt2", **{"hidden_size": 64} | keys)
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation(backend)


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_a_cpu_is_never_given_them(architecture: str) -> None:
    config: LoomConfig = tiny_config(architecture, hidden_size=64, head_dim=16)
    for name in ("flex", "varlen"):
        assert CAPABILITIES[name].devices == ("cuda",)
        assert not missing_abilities(name, config)
    assert pick_backend(config, "cpu")[0] == "sdpa"
    assert pick_backend(config, "cpu", need_weights=True)[0] == "eager"
