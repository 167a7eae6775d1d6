"""Attention on a GPU that makes no square of positions: block-sparse (flex) and over borders of pieces (varlen).

Both read a mask's `visibility` in place of its square. Nothing here knows about models: tensors and one `AttentionMask`
go in. Which config each can hold stands in `attention.py`.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .masks import AttentionMask, Visibility


def flex(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float, softcap: float | None) -> Tensor:
    """Attention by `torch.nn.attention.flex_attention`: (B, heads, L, D) each -> (B, heads, L, D).

    Blocks of 128 x 128 positions that nobody may look at are skipped. Key-value heads may be fewer than heads.

    Raises:
        ValueError: for a gradient on a CPU, which PyTorch has no kernel for.
    """
    from torch.nn.attention.flex_attention import flex_attention

    on_cpu = query.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise ValueError("attention backend flex has no backward pass on a CPU: take sdpa, or torch.no_grad()")
    assert mask.visibility is not None
    visibility = mask.visibility
    blocks = mask.keep("flex", lambda: _blocks(visibility, query.shape[0]))
    plain: Any = flex_attention
    run = plain if on_cpu or torch.compiler.is_compiling() else _compiled_flex()
    grouped = query.shape[1] != key.shape[1]
    return run(query, key, value, _score(mask, softcap), blocks, scale=scale, enable_gqa=grouped)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.cache
def _compiled_blocks() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)


def _blocks(visibility: Visibility, rows: int) -> Any:
    """The block mask of whole rows; None where everything may be seen."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens, documents = visibility.tokens, visibility.documents
    causal, behind, ahead = visibility.causal, visibility.behind, visibility.ahead
    of_rows = tokens is not None or documents is not None
    if not (of_rows or causal or behind is not None or ahead is not None):
        return None

    def may_look(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = query == query
        if tokens is not None:
            allowed = allowed & tokens[row, key]
        if documents is not None:
            allowed = allowed & (documents[row, query] == documents[row, key]) & (documents[row, key] != 0)
        if causal:
            allowed = allowed & (key <= query)
        if behind is not None:
            allowed = allowed & (query - key <= behind)
        if ahead is not None:
            allowed = allowed & (key - query <= ahead)
        return allowed | (query == key)

    on_cpu = visibility.device.type == "cpu"
    make = create_block_mask if on_cpu or torch.compiler.is_compiling() else _compiled_blocks()
    return make(may_look, rows if of_rows else None, None, visibility.length, visibility.length, visibility.device)


def _score(mask: AttentionMask, softcap: float | None) -> Callable[..., Tensor] | None:
    """What becomes of a score, scaled already: the cap, then the position's bias."""
    bias = mask.position_bias
    if softcap is None and bias is None:
        return None

    def score(value: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            value = softcap * torch.tanh(value / softcap)
        return value if bias is None else value + bias[0, head, query, key]

    return score


def varlen(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """Attention within pieces by `torch.nn.attention.varlen`: (B, heads, L, D), half precision -> (B, L, heads, D).

    Padding is a piece of its own in each row. Finding the borders waits for the device once a forward. Tokens of a
    row with padding between them count as neighbours, which matters to local windows alone.
    """
    from torch.nn.attention.varlen import varlen_attn

    assert mask.visibility is not None
    visibility = mask.visibility
    rows, heads, length, width = query.shape
    order, borders = mask.keep("varlen", lambda: piece_borders(visibility, rows))
    grouped: dict[str, Any] = {}
    if key.shape[1] != heads:
        if "enable_gqa" in (varlen_attn.__kwdefaults__ or {}):  # from torch 2.12 on
            grouped["enable_gqa"] = True
        else:
            key, value = (states.repeat_interleave(heads // key.shape[1], dim=1) for states in (key, value))

    def flat(states: Tensor) -> Tensor:
        states = states.transpose(1, 2).reshape(rows * length, -1, width)
        return states if order is None else states.index_select(0, order)

    ahead = 0 if visibility.causal else visibility.ahead
    window = (-1 if visibility.behind is None else visibility.behind, -1 if ahead is None else ahead)
    attend: Any = varlen_attn
    mixed: Tensor = attend(
        flat(query), flat(key), flat(value), borders, borders, length, length,
        scale=scale, window_size=window, **grouped,
    )  # fmt: skip
    if order is not None:
        mixed = torch.empty_like(mixed).index_copy(0, order, mixed)
    return mixed.view(rows, length, heads, width)


def piece_borders(visibility: Visibility, rows: int) -> tuple[Tensor | None, Tensor]:
    """The order in which positions of all rows stand in pieces (None: as they are), and where each piece begins.

    (rows x length,) int64 and (pieces + 1,) int32, from 0 to rows x length.
    """
    length, device = visibility.length, visibility.device
    pieces = torch.ones(rows, length, dtype=torch.int64, device=device)
    if visibility.documents is not None:
        pieces = visibility.documents.to(torch.int64).expand(rows, length)
    order = None
    if visibility.tokens is not None:  # tokens first, in their order, then the row's padding
        pieces = pieces * visibility.tokens
        within = torch.argsort((pieces == 0).to(torch.int8), dim=1, stable=True)
        pieces = pieces.gather(1, within)
        order = (within + length * torch.arange(rows, device=device)[:, None]).flatten()
    starts = torch.ones(rows, length, dtype=torch.bool, device=device)
    starts[:, 1:] = pieces[:, 1:] != pieces[:, :-1]
    first = starts.flatten().nonzero()[:, 0]
    return order, torch.cat((first, first.new_full((1,), rows * length))).to(torch.int32)
