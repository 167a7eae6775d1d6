"""Attention and rotary positions on a CPU, arranged for its caches; elsewhere the library's own kernels are better.

Attention here is two matrix products with a softmax between. PyTorch's fused CPU kernel runs bfloat16 at a fraction of
the processor's matrix speed; keeping the probabilities (small at these lengths) and skipping the blocks above the
diagonal takes about a third of its time, forward and backward, at 64 to 1,024 positions. Nothing here knows about
models: tensors and one `AttentionMask` go in.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .masks import AttentionMask

# Rows of queries that share one matrix product in a causal layer. Smaller blocks skip more of the masked triangle
# and pay more calls: 128 was the fastest of 64, 128 and 256 at 256 positions.
CAUSAL_BLOCK = 128
# float32 gains only by the skipped triangle, so only causal rows of at least this length.
SHORTEST_FLOAT32_ROW = 256
# Kept probabilities of one layer, in elements, above which the fused kernel (which keeps none) is taken: 64 MiB in
# bfloat16. Speed alone would set no limit: at 2,048 positions this path is still twice as fast.
LARGEST_SQUARE = 2**25


def fits_cpu_attention(query: Tensor, key: Tensor, mask: AttentionMask, dropout: float) -> bool:
    """Whether `cpu_attention` can and should stand in for the fused kernel: (B, heads, Q, D) and (B, heads, K, D)."""
    if query.device.type != "cpu" or dropout > 0.0 or query.shape != key.shape or torch.compiler.is_compiling():
        return False
    batch, heads, length, _ = query.shape
    if batch * heads * length * length > LARGEST_SQUARE or length < 16:
        return False
    if mask.needs_grad:  # a learned bias needs a gradient that is not computed here
        return False
    return query.dtype in (torch.bfloat16, torch.float16) or (mask.causal and length >= SHORTEST_FLOAT32_ROW)


def cpu_attention(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """Softmax attention without dropout: (B, heads, L, D) each -> (B, heads, L, D), differentiable once.

    Scores are rounded to the dtype of the inputs before the softmax, as in every unfused implementation.
    """
    output: Tensor = _CpuAttention.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
    return output


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float) -> Tensor:
        batch, heads, length, width = query.shape
        with torch.autocast("cpu", enabled=False):
            q = (query * scale).reshape(batch * heads, length, width)
            k = key.reshape(batch * heads, length, width)
            v = value.reshape(batch * heads, length, width)
            additive = mask.additive(query.dtype)
            blocks = _blocks(length, mask.causal)
            output = torch.empty((batch, length, heads, width), dtype=query.dtype)
            probabilities = []
            for start, stop, seen in blocks:
                scores = torch.bmm(q[:, start:stop], k[:, :seen].transpose(1, 2))
                grid = scores.view(batch, heads, stop - start, seen)
                if additive is not None:
                    grid += _rows(additive, start, stop, seen)
                elif mask.causal:
                    grid[..., start:] += _triangle(stop - start, query.dtype)
                probability = torch.softmax(scores, dim=-1)
                block = torch.bmm(probability, v[:, :seen])
                output[:, start:stop] = block.view(batch, heads, stop - start, width).transpose(1, 2)
                probabilities.append(probability)
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.blocks, ctx.scale, ctx.shape = blocks, scale, query.shape
        return output.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *probabilities = ctx.saved_tensors
        batch, heads, length, width = ctx.shape
        grad = grad_output.reshape(batch * heads, length, width)
        grad_q = torch.empty_like(q)
        grad_k: Tensor | None = None
        grad_v = v
        # Last block first: it alone sees every key, so its products are the full-sized gradients others add to.
        for (start, stop, seen), probability in zip(reversed(ctx.blocks), reversed(probabilities), strict=True):
            rows = grad[:, start:stop]
            grad_probability = torch.bmm(rows, v[:, :seen].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_probability, probability, -1, q.dtype)
            grad_q[:, start:stop] = torch.bmm(grad_scores, k[:, :seen])
            more_k = torch.bmm(grad_scores.transpose(1, 2), q[:, start:stop])
            more_v = torch.bmm(probability.transpose(1, 2), rows)
            if grad_k is None:
                grad_k, grad_v = more_k, more_v
            else:
                grad_k[:, :seen] += more_k
                grad_v[:, :seen] += more_v
        assert grad_k is not None
        grad_q *= ctx.scale
        return grad_q.view(ctx.shape), grad_k.view(ctx.shape), grad_v.view(ctx.shape), None, None


def cpu_rotary(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn (B, L, heads, D) by tables (B or 1, L, 1, D / 2): row by row, so float32 copies stay in cache.

    Differentiable once by the states.
    """
    turned: Tensor = _CpuRotary.apply(states, cosine, sine)  # type: ignore[no-untyped-call]
    return turned


class _CpuRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turn(states, cosine, sine, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        return _turn(grad, cosine, sine, -1.0), None, None  # the transpose of a rotation turns back


def _turn(states: Tensor, cosine: Tensor, sine: Tensor, direction: float) -> Tensor:
    output = torch.empty(states.shape, dtype=states.dtype)
    half = states.shape[-1] // 2
    wide = torch.promote_types(states.dtype, torch.float32)
    for row in range(states.shape[0]):
        table = row if cosine.shape[0] > 1 else 0
        first, second = states[row, ..., :half].to(wide), states[row, ..., half:].to(wide)
        turned = first * cosine[table]
        output[row, ..., :half] = turned.addcmul_(second, sine[table], value=-direction)
        torch.mul(second, cosine[table], out=turned)
        output[row, ..., half:] = turned.addcmul_(first, sine[table], value=direction)
    return output


def _blocks(length: int, causal: bool) -> list[tuple[int, int, int]]:
    """(first query, one past the last query, keys seen) of each matrix product."""
    if not causal:
        return [(0, length, length)]
    starts = range(0, length, CAUSAL_BLOCK)
    return [(start, min(start + CAUSAL_BLOCK, length), min(start + CAUSAL_BLOCK, length)) for start in starts]


def _rows(additive: Tensor, start: int, stop: int, seen: int) -> Tensor:
    return additive[..., start:stop, :seen]


def _triangle(length: int, dtype: torch.dtype) -> Tensor:
    """(length, length): the lowest number above the diagonal, else 0."""
    return torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu_(1)
