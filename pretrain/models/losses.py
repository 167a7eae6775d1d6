"""Losses: the token head and cross-entropy in one pass over chunks of rows, and the sums and means around it.

The vocabulary is the widest thing in a small model: logits of one step can outweigh everything else in memory. Here
they exist for one chunk at a time; gradients are computed in the forward pass, while the chunk's probabilities are at
hand, and scaled in the backward pass. No module or config appears here.
"""

# mypy: disable-error-code="no-untyped-call, untyped-decorator"

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

IGNORE_INDEX = -100
# Logits of one chunk, in elements: 8 Mi are 16 MB in bfloat16 and 32 MB in float32.
CHUNK_ELEMENTS = 8 * 2**20
# Elements that pass the softmax together on a CPU: 1 MiB in float32.
CACHE_ELEMENTS = 2**18


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    chunk_rows: int | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight^T + bias)[target], as a float32 scalar (float64 for float64).

    With `softcap` c the logits z become c tanh(z / c). With `label_smoothing` e the loss of a row is (1 - e) times that
    plus e times the mean of -log softmax over the vocabulary, as in `torch.nn.functional.cross_entropy`.

    hidden_states (..., hidden), weight (vocabulary, hidden), bias (vocabulary) or None, targets (...) of token ids;
    rows whose target is `ignore_index` count nothing. Products run in the autocast dtype where autocast is on, the
    softmax in float32, and the weight's gradient is summed over chunks in float32.
    """
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    flat = targets.reshape(-1)
    if rows.shape[0] != flat.shape[0]:
        raise ValueError(f"hidden states hold {rows.shape[0]} rows, targets {flat.shape[0]}")
    chunk = chunk_rows or max(64, CHUNK_ELEMENTS // weight.shape[0])
    loss: Tensor = _run(rows, weight, bias, flat, ignore_index, chunk, softcap, label_smoothing)
    return loss


def softcap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """c tanh(logits / c); None leaves them as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def token_cross_entropy_sum(
    logits: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX, label_smoothing: float = 0.0
) -> Tensor:
    """The same sum from logits that are wanted anyway: (..., vocabulary) and (...) -> float32 scalar."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, logits.shape[-1])
    return functional.cross_entropy(
        wide, targets.reshape(-1), ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
    )


def mean_over_targets(
    loss_sum: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | float | None, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Divide a summed loss by `num_items_in_batch`, or else by the number of targets (0 targets: a loss of 0)."""
    if num_items_in_batch is None:
        return loss_sum / (targets != ignore_index).sum().clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss_sum.device)
    return loss_sum / num_items_in_batch


def shift_targets(labels: Tensor, document_ids: Tensor | None = None, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Targets of each position from unshifted labels (B, L); the last one of a row or document has none."""
    shifted = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
    if document_ids is not None:
        last = document_ids[:, 1:] != document_ids[:, :-1]
        shifted[:, :-1].masked_fill_(last, ignore_index)
    return shifted


@torch.compiler.disable
def _run(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    chunk_rows: int,
    softcap: float | None,
    label_smoothing: float,
) -> Tensor:
    loss: Tensor = _LinearCrossEntropy.apply(
        rows, weight, bias, targets, ignore_index, chunk_rows, softcap, label_smoothing
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        chunk_rows: int,
        softcap: float | None,
        label_smoothing: float,
    ) -> Tensor:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else torch.promote_types(hidden.dtype, weight.dtype)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(dtype, torch.float32)
        grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if need_bias else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(device, enabled=False):
            matrix = weight.to(dtype)
            offset = None if bias is None else bias.to(dtype)
            for start in range(0, hidden.shape[0], chunk_rows):
                part = hidden[start : start + chunk_rows].to(dtype)
                target = targets[start : start + chunk_rows]
                logits = functional.linear(part, matrix, offset)
                if softcap is not None:
                    logits = softcap_logits(logits, softcap)
                    steepness = (logits / softcap).square_().neg_().add_(1.0)  # of the cap, at these logits
                loss += _loss_and_slope_(logits, target, ignore_index, label_smoothing)
                slope = logits if softcap is None else logits.mul_(steepness)
                if grad_hidden is not None:
                    torch.mm(slope, matrix, out=grad_hidden[start : start + chunk_rows])
                if grad_weight is not None:
                    grad_weight += slope.t() @ part
                if grad_bias is not None:
                    grad_bias += slope.sum(0, dtype=wide)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            None if grad is None else grad.mul(grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None, None)


def _loss_and_slope_(logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float = 0.0) -> Tensor:
    """Summed loss of one chunk; its derivative by the logits (softmax minus one-hot) takes the logits' place.

    On a CPU a few rows at a time, so that the float32 copies stay in the processor's cache (nine times as fast as
    whole chunks at a vocabulary of 8,192). The loss uses log-sum-exp = largest logit - log(largest probability).
    """
    rows, vocabulary = logits.shape
    block = max(8, CACHE_ELEMENTS // vocabulary) if logits.device.type == "cpu" else rows
    wide = torch.promote_types(logits.dtype, torch.float32)
    counted = targets != ignore_index
    index = targets.clamp(min=0)[:, None]
    minus_one = torch.full((), label_smoothing - 1.0, dtype=wide, device=logits.device)
    loss = torch.zeros((), dtype=wide, device=logits.device)
    for start in range(0, rows, max(block, 1)):
        place = slice(start, start + block)
        scores = logits[place].to(wide)
        probabilities = torch.softmax(scores, dim=-1)
        log_sum = scores.amax(-1) - probabilities.amax(-1).log()
        score = scores.gather(1, index[place])[:, 0]
        if label_smoothing > 0.0:
            score = (1.0 - label_smoothing) * score + label_smoothing * scores.mean(-1)
            probabilities.sub_(label_smoothing / vocabulary)
        loss += ((log_sum - score) * counted[place]).sum()
        probabilities.scatter_add_(1, index[place], minus_one.expand_as(index[place]))
        logits[place] = probabilities.mul_(counted[place, None])
    return loss
