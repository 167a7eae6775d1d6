"""Which position may look at which: attention masks, built once per forward and layer kind.

Nothing here computes attention. Padding positions look at themselves alone, so no row of scores is ever empty (an
empty row is where softmax gives NaN), and documents of one row are closed to each other. Squares of positions are made
when a backend first asks for one; some never do.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .configuration_loom import LoomConfig


@dataclass(frozen=True)
class Visibility:
    """Who may look at whom, in numbers for each position: what a square is made from, and sparse kernels read.

    Query i is the position i + past_length of the row. It looks at keys that are tokens (`tokens` (B, K) bool, None =
    all) of its own document (`documents` (B, L), 0 = padding, None = one), at most `behind` places before and `ahead`
    places after it (None = any), none after it if `causal`; and at itself.
    """

    length: int
    key_length: int
    past_length: int | Tensor
    device: torch.device
    causal: bool = False
    tokens: Tensor | None = None
    documents: Tensor | None = None
    behind: int | None = None
    ahead: int | None = None

    @property
    def whole_rows(self) -> bool:
        """Whether queries and keys are the same positions."""
        return isinstance(self.past_length, int) and self.past_length == 0 and self.key_length == self.length

    def square(self) -> Tensor | None:
        """(B or 1, 1, Q, K) bool; None where everything may be seen, or everything up to the diagonal of whole rows."""
        queries, keys = indices(self.length, self.past_length, self.key_length, self.device)
        allowed = None
        if self.tokens is not None:
            allowed = self.tokens[:, None, None, :]
        if self.documents is not None:
            same = self.documents[:, None, :, None] == self.documents[:, None, None, :]
            same = same & (self.documents != 0)[:, None, None, :]
            allowed = same if allowed is None else allowed & same
        if allowed is not None:
            allowed = allowed | (queries == keys)
        for reach, distance in ((self.behind, queries - keys), (self.ahead, keys - queries)):
            if reach is not None:
                near = (distance <= reach)[None, None]
                allowed = near if allowed is None else allowed & near
        ordered = self.whole_rows or _sees_all(self.length, self.past_length, self.key_length)
        if self.causal and (allowed is not None or not ordered):
            past = (keys <= queries)[None, None]
            allowed = past if allowed is None else allowed & past
        return allowed


class AttentionMask:
    """What one kind of layer may look at.

    allowed: (B or 1, heads or 1, Q, K) bool, True = may look; None = everything (below the diagonal if `causal`). Made
    from `visibility` when first asked for, where that is given instead.
    bias: the same shape, floating point, added to the scores (a caller's own additive mask); excludes `allowed`.
    causal: nothing above the diagonal is allowed, and queries and keys are the same positions (Q = K).
    position_bias: (1, heads, Q, K) added to the scores: what a distance is worth. It may need a gradient.
    """

    def __init__(
        self,
        allowed: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
        position_bias: Tensor | None = None,
        visibility: Visibility | None = None,
    ) -> None:
        self._allowed = allowed
        self.bias = bias
        self.causal = causal
        self.position_bias = position_bias
        self.visibility = visibility
        self._additive: dict[torch.dtype, Tensor] = {}
        self._kept: dict[str, Any] = {}

    @property
    def allowed(self) -> Tensor | None:
        """The square, see above."""
        if self._allowed is None and self.visibility is not None:
            self._allowed = self.visibility.square()
        return self._allowed

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """What a backend made from this mask, made once for all layers that share it."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def additive(self, dtype: torch.dtype) -> Tensor | None:
        """The mask as a summand of the scores in `dtype`, made once and kept: 0 where allowed, else the lowest number.

        The lowest finite number, not minus infinity: a row without any allowed key then gives numbers, not NaN.
        """
        if dtype not in self._additive:
            made = self._shut(dtype)
            if self.position_bias is not None:
                # Sums keep no tensor for the backward pass, so that recomputed layers may find the mask made already.
                bias = self.position_bias.to(dtype)
                made = bias if made is None else made + bias
            if made is None:
                return None
            self._additive[dtype] = made
        return self._additive[dtype]

    def _shut(self, dtype: torch.dtype) -> Tensor | None:
        """What closes positions, as a summand; half of the lowest number where a position bias comes on top."""
        lowest = torch.finfo(dtype).min / (1 if self.position_bias is None else 2)
        if self.bias is not None:
            return self.bias.clamp(min=lowest).to(dtype).clamp(min=lowest)
        allowed = self.allowed
        if allowed is None and self.causal and self.position_bias is not None:  # written out beside the bias
            rows, columns = self.position_bias.shape[-2:]
            allowed = torch.ones(rows, columns, dtype=torch.bool, device=self.position_bias.device).tril()[None, None]
        if allowed is None:
            return None
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, lowest)

    @property
    def needs_grad(self) -> bool:
        """Whether a gradient flows into what is added to the scores."""
        return any(bias is not None and bias.requires_grad for bias in (self.bias, self.position_bias))

    def with_position_bias(self, bias: Tensor) -> "AttentionMask":
        """This mask and a (1, heads, Q, K) summand of the scores."""
        return AttentionMask(self._allowed, self.bias, self.causal, bias, self.visibility)


def build_masks(
    config: LoomConfig,
    *,
    causal: bool,
    length: int,
    past_length: int | Tensor,
    key_length: int,
    device: torch.device,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    kinds: Collection[str] | None = None,
) -> dict[str, AttentionMask]:
    """One mask for each of `kinds` of layer; None: all that the config has ("global", "local").

    attention_mask: (B, keys so far) with 1 = token, 0 = padding; or (B or 1, heads or 1, Q, K), bool (True = may look)
    or added to the scores, which replaces the causal and padding rules and leaves the local window in force.
    document_ids: (B, L), 0 = padding, 1.. = piece of the row. Raises ValueError for shapes that do not fit.
    """
    kinds = sorted(set(config.attention_kinds if kinds is None else kinds))
    if attention_mask is not None and attention_mask.dim() == 4:
        base = _given_mask(attention_mask, document_ids, length, key_length)
        places = indices(length, past_length, key_length, device)
        return {kind: _with_window(base, config, kind, causal, *places) for kind in kinds}
    same_positions = isinstance(past_length, int) and past_length == 0 and key_length == length
    if document_ids is not None and not same_positions:
        raise ValueError("document_ids describe whole rows and cannot be used with a filled key-value cache")
    tokens = _tokens(attention_mask, length, key_length, device)
    if document_ids is not None and _all_true(document_ids == document_ids[:, :1].clamp(min=1)):
        document_ids = None
    base_rule = Visibility(length, key_length, past_length, device, causal, tokens, document_ids)
    return {
        kind: AttentionMask(causal=causal and same_positions, visibility=_narrowed(base_rule, config, kind))
        for kind in kinds
    }


def indices(length: int, past_length: int | Tensor, key_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions in the row of the queries (Q, 1) and of the keys (1, K)."""
    queries = torch.arange(length, device=device) + past_length
    return queries[:, None], torch.arange(key_length, device=device)[None, :]


def documents_by_positions(position_ids: Tensor | None, rows: int) -> Tensor | None:
    """(rows, L) document ids of rows in which positions (rows or 1, L) start anew with each piece; None: none does.

    This is how collators that know no document ids say what they packed (transformers' DataCollatorWithFlattening,
    TRL's). A place whose position does not follow on the one before begins a piece.
    """
    if position_ids is None:
        return None
    follows = torch.diff(position_ids, dim=-1) == 1  # (rows or 1, L - 1)
    if _all_true(follows):
        return None
    return torch.nn.functional.pad((~follows).cumsum(dim=-1), (1, 0)).expand(rows, -1) + 1


def _sees_all(length: int, past_length: int | Tensor, key_length: int) -> bool:
    """One new token after a cache that holds no free slots: it may look at every key."""
    return length == 1 and isinstance(past_length, int) and key_length == past_length + 1


def cross_mask(
    memory_mask: Tensor | None, memory_document_ids: Tensor | None, document_ids: Tensor | None, keys: int
) -> AttentionMask:
    """What the positions of a decoder may look at in an encoder's output.

    memory_mask (B, S): 1 = token, 0 = padding of the input; memory_document_ids (B, S) and document_ids (B, T): each
    piece of the output looks at the piece of the same number. A position that may look at nothing (padding) looks at
    everything, so that its numbers are finite; nothing is learned from it. Raises ValueError for shapes that do not
    fit.
    """
    if (memory_document_ids is None) != (document_ids is None):
        raise ValueError("give document_ids and decoder_document_ids, or neither: they say which belong together")
    allowed = None
    if memory_mask is not None:
        if memory_mask.dim() != 2 or memory_mask.shape[1] != keys:
            shape = tuple(memory_mask.shape)
            raise ValueError(f"the input's attention_mask has shape {shape}, expected (rows, {keys})")
        if not _all_true(memory_mask == 1):
            allowed = memory_mask.to(torch.bool)[:, None, None, :]
    if memory_document_ids is not None and document_ids is not None:
        same = (document_ids[:, :, None] == memory_document_ids[:, None, :])[:, None]  # (B, 1, T, S)
        same = same & (memory_document_ids != 0)[:, None, None, :]
        allowed = same if allowed is None else allowed & same
    if allowed is None:
        return AttentionMask()
    return AttentionMask(allowed=allowed | ~allowed.any(dim=-1, keepdim=True))


def _tokens(attention_mask: Tensor | None, length: int, key_length: int, device: torch.device) -> Tensor | None:
    """(B, K) bool, False = padding; None when every key is a token."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must have 2 or 4 dimensions, got shape {tuple(attention_mask.shape)}")
    if _all_true(attention_mask == 1):
        return None
    tokens = attention_mask.to(device=device, dtype=torch.bool)
    if tokens.shape[1] < key_length != length:  # a cache of fixed size has slots that are not written yet
        tokens = torch.nn.functional.pad(tokens, (0, key_length - tokens.shape[1]), value=False)
    if tokens.shape[1] != key_length:
        raise ValueError(f"attention_mask covers {tokens.shape[1]} positions, the keys are {key_length}")
    return tokens


def _all_true(mask: Tensor) -> bool:
    """Whether a mask hides nothing. Asked only where the answer costs no wait for a busy device."""
    if torch.compiler.is_compiling() or (mask.device.type != "cpu" and torch.is_grad_enabled()):
        return False
    return bool(mask.all())


def _given_mask(mask: Tensor, document_ids: Tensor | None, length: int, key_length: int) -> AttentionMask:
    if document_ids is not None:
        raise ValueError("give a 4D attention_mask or document_ids, not both: the 4D mask already says who sees whom")
    if mask.shape[-2:] != (length, key_length):
        raise ValueError(f"4D attention_mask ends in {tuple(mask.shape[-2:])}, expected {(length, key_length)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"4D attention_mask must be bool or floating point, got {mask.dtype}")
    if mask.dtype == torch.bool:
        return AttentionMask(allowed=mask | ~mask.any(dim=-1, keepdim=True))
    return AttentionMask(bias=mask)


def _reach(config: LoomConfig, kind: str, causal: bool, keys: int) -> int | None:
    """How many places a query of this kind of layer looks to each side; None: all, as in rows shorter than that."""
    if kind == "global":
        return None
    assert config.local_window is not None
    reach: int = config.local_window - 1 if causal else config.local_window // 2
    # A length that is traced as a symbol stands for longer rows too: an exported graph must keep the window.
    return None if isinstance(keys, int) and keys <= reach + 1 else reach


def _narrowed(rule: Visibility, config: LoomConfig, kind: str) -> Visibility:
    """The rule within the local window, for local layers."""
    reach = _reach(config, kind, rule.causal, rule.key_length)
    return rule if reach is None else replace(rule, behind=reach, ahead=None if rule.causal else reach)


def _with_window(
    base: AttentionMask, config: LoomConfig, kind: str, causal: bool, queries: Tensor, keys: Tensor
) -> AttentionMask:
    """A caller's own mask narrowed to the local window, for local layers."""
    reach = _reach(config, kind, causal, keys.shape[1])
    if reach is None:
        return base
    near = queries - keys <= reach  # (Q, K)
    if not causal:
        near = near & (keys - queries <= reach)
    if base.bias is not None:
        return AttentionMask(bias=base.bias.masked_fill(~near, torch.finfo(base.bias.dtype).min))
    assert base.allowed is not None
    return AttentionMask(allowed=base.allowed & near)
