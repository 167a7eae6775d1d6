"""The fused head and cross-entropy: values and gradients of the plain way, in every form it is called."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pretrain.models import linear_cross_entropy
from pretrain.models.losses import mean_over_targets, shift_targets, token_cross_entropy_sum


def case(dtype=torch.float64, rows: int = 37, vocabulary: int = 53):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 8, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, 8, generator=generator, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocabulary, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[::5] = -100
    return hidden, weight, bias, targets


def plain(hidden, weight, bias, targets):
    return functional.cross_entropy(functional.linear(hidden, weight, bias), targets, reduction="sum")


@pytest.mark.parametrize("chunk_rows", [1, 7, 36, 37, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_gradients_equal_the_plain_way(chunk_rows: int, with_bias: bool) -> None:
    hidden, weight, bias, targets = case()
    parts = [hidden, weight, bias] if with_bias else [hidden, weight]
    given = bias if with_bias else None
    fused = linear_cross_entropy(hidden, weight, targets, bias=given, chunk_rows=chunk_rows)
    naive = plain(hidden, weight, given, targets)
    assert fused.item() == pytest.approx(naive.item(), rel=1e-13)
    for ours, theirs in zip(
        torch.autograd.grad(fused * 0.3, parts), torch.autograd.grad(naive * 0.3, parts), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-12)


def by_definition(hidden, weight, bias, targets, softcap, smoothing):
    """Row by row: (1 - e) times the target's loss plus e times the mean over the vocabulary, of capped logits."""
    total = hidden.new_zeros(())
    for row, target in zip(hidden, targets.tolist(), strict=True):
        if target == -100:
            continue
        logits = weight @ row + bias
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        losses = torch.log(torch.exp(logits).sum()) - logits  # of each token, were it the target
        total = total + (1 - smoothing) * losses[target] + smoothing * losses.mean()
    return total


@pytest.mark.parametrize("chunk_rows", [7, 1000])
@pytest.mark.parametrize("softcap", [None, 1.3])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_caps_and_smoothing_are_their_definitions(chunk_rows: int, softcap: float | None, smoothing: float) -> None:
    hidden, weight, bias, targets = case()
    keys = {"softcap": softcap, "label_smoothing": smoothing}
    fused = linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_rows=chunk_rows, **keys)
    slow = by_definition(hidden, weight, bias, targets, softcap, smoothing)
    assert fused.item() == pytest.approx(slow.item(), rel=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(fused, [hidden, weight, bias]),
        torch.autograd.grad(slow, [hidden, weight, bias]),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-12)
    if softcap is None:
        logits = functional.linear(hidden, weight, bias)
        assert token_cross_entropy_sum(logits, targets, label_smoothing=smoothing).item() == pytest.approx(slow.item())


def test_capped_rows_in_bfloat16_stay_near_float32() -> None:
    hidden, weight, bias, targets = case(torch.float32, rows=300)
    slow = by_definition(hidden, weight, bias, targets, 2.0, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        fused = linear_cross_entropy(hidden, weight, targets, bias=bias, softcap=2.0, label_smoothing=0.1)
    assert fused.item() == pytest.approx(slow.item(), rel=5e-3)
    for ours, theirs in zip(
        torch.autograd.grad(fused, [hidden, weight, bias]),
        torch.autograd.grad(slow, [hidden, weight, bias]),
        strict=True,
    ):
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-2


def test_gradients_pass_the_numerical_check() -> None:
    hidden, weight, bias, targets = case(rows=6, vocabulary=9)

    def loss(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_rows=4)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_a_row_of_huge_logits_stays_exact() -> None:
    hidden = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.5, 1.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    assert loss.item() == pytest.approx(2000.0)
    loss.backward()
    assert torch.isfinite(hidden.grad).all()


def test_autocast_runs_the_products_in_bfloat16_and_sums_the_weight_gradient_in_float32() -> None:
    hidden, weight, bias, targets = case(torch.float32, rows=300)
    naive = plain(hidden, weight, bias, targets)
    exact = torch.autograd.grad(naive, [hidden, weight, bias])
    with torch.autocast("cpu", torch.bfloat16):
        fused = linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_rows=16)
    gradients = torch.autograd.grad(fused, [hidden, weight, bias])
    assert fused.dtype == torch.float32
    assert fused.item() == pytest.approx(naive.item(), rel=5e-3)
    for ours, theirs in zip(gradients, exact, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-2
    # The sum over chunks is not rounded to bfloat16: more chunks do not move it away from the exact gradient.
    assert gradients[1].bfloat16().float().sub(gradients[1]).abs().max() > 0


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_parts_that_need_no_gradient_get_none(frozen: str) -> None:
    hidden, weight, bias, targets = case()
    parts = {"hidden": hidden, "weight": weight, "bias": bias}
    parts[frozen].requires_grad_(False)
    linear_cross_entropy(hidden, weight, targets, bias=bias).backward()
    for name, part in parts.items():
        assert (part.grad is None) == (name == frozen)


def test_without_gradients_and_without_rows() -> None:
    hidden, weight, bias, targets = case()
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets, bias=bias).item() == pytest.approx(
            plain(hidden, weight, bias, targets).item()
        )
    empty = linear_cross_entropy(hidden[:0], weight, targets[:0], bias=bias)
    empty.backward()
    assert empty.item() == 0.0
    assert weight.grad.abs().sum() == 0


def test_rows_and_targets_must_match() -> None:
    hidden, weight, _, targets = case()
    with pytest.raises(ValueError, match="37 rows, targets 36"):
        linear_cross_entropy(hidden, weight, targets[:-1])


def test_the_mean_is_over_targets_or_the_given_number() -> None:
    targets = torch.tensor([3, -100, 5])
    assert mean_over_targets(torch.tensor(6.0), targets, None).item() == 3.0
    assert mean_over_targets(torch.tensor(6.0), targets, 4).item() == 1.5
    assert mean_over_targets(torch.tensor(6.0), targets, torch.tensor(4)).item() == 1.5
    assert mean_over_targets(torch.tensor(0.0), torch.tensor([-100]), None).item() == 0.0


def test_shifted_targets_end_at_rows_and_documents() -> None:
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    assert shift_targets(labels).tolist() == [[2, 3, 4, 5, -100]]
    assert shift_targets(labels, torch.tensor([[1, 1, 2, 2, 2]])).tolist() == [[2, -100, 4, 5, -100]]
