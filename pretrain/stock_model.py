"""Any stock language model in our loop: packed rows in, the sum of token losses out, documents kept apart.

What lives here: how a stock class is told about the documents of a row, the check that proves it, and the forward pass
that the trainer and the evaluators call. What must not: which class it is, or where its weights come from.

A packed row holds several documents. Stock classes can be told so in different ways, or not at all; no list of classes
would stay true. So each way is tried on the model itself: two documents in a row must give the logits that each gives
alone, and the first must not notice when the second changes. Where no way passes, each document gets a row of its own,
padded.
"""

# mypy: disable-error-code="no-untyped-call"
# (transformers' base classes are untyped)

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from pretrain.files import ArtifactError
from pretrain.models.losses import IGNORE_INDEX, mean_over_targets, token_cross_entropy_sum

_TOLERANCE = 1e-4  # of the largest logit, in float32
_LONGEST_CHECK = 1024  # positions of the check's longest document
_PIECES = (5, 9)  # lengths of the check's documents, where no window asks for more

Inputs = dict[str, Any]
Way = Callable[[Tensor, Tensor, Tensor], Inputs]
"""(input_ids, position_ids, document_ids), each (B, L) -> what the class is called with."""


@dataclass(frozen=True)
class Adapted:
    """How a class is told about documents: `words` for a person, and whether rows stay packed."""

    words: str
    packed: bool


def adapt(model: PreTrainedModel, kind: str, sequence_length: int) -> Adapted:
    """Make `model(**batch)` take packed rows: a way that keeps documents apart is found, proved, and put in place.

    The model's `forward` then takes input_ids, position_ids, document_ids (B, L) and labels or shift_labels (B, L),
    with num_items_in_batch, and returns `.loss` (summed over targets, divided by num_items_in_batch) or `.logits`. An
    encoder-decoder takes decoder_input_ids, decoder_position_ids, decoder_document_ids and labels (B, T) beside the
    first three. Its parameters, their names and its class stay as they are.

    Args:
        model: a class with a token head, in float32, in evaluation mode.
        kind: encoder, decoder or seq2seq.
        sequence_length: of the rows to come.

    Raises:
        ArtifactError: when even rows of one padded document give other logits than the document alone.
    """
    if kind == "seq2seq":
        _install(model, _padded_pairs, packed=False)
        return Adapted("each pair in a row of its own, padded", packed=False)
    for words, way in _ways(model, kind == "decoder", sequence_length):
        if _keeps_apart(model, _packed(way)):
            _install(model, _packed(way), packed=True)
            return Adapted(words, packed=True)
    if not _keeps_apart(model, _padded):
        raise ArtifactError(
            f"{type(model).__name__} gives other logits for a document with padding behind it than for the document "
            "alone, so that batches would change what it learns; use a class that honours attention_mask"
        )
    _install(model, _padded, packed=False)
    return Adapted("each document in a row of its own, padded", packed=False)


# --- the ways -------------------------------------------------------------------------------------------------------


def _ways(model: PreTrainedModel, causal: bool, sequence_length: int) -> Iterator[tuple[str, Way]]:
    """Ways to tell a class about documents, the cheapest first."""
    window = _window(model)
    if window is not None and window >= _LONGEST_CHECK and sequence_length > window:
        return  # what a way does beyond the window could not be checked
    first = int(getattr(model.config, "pad_token_id", None) or 0) + 1
    shifts = {"": 0, f" counted from {first}": first}
    reaches = (None,) if window is None else (None, window // 2, window - 1, window)
    for words, form in (("a boolean mask", _same), ("an additive mask", _additive)):
        for reach in reaches:
            for said, shift in shifts.items():
                yield f"{words} over pairs of positions, positions{said}", _with_mask(form, causal, reach, shift)
    for reach in reaches[1:]:
        yield "a mask for each kind of layer", _with_masks(causal, reach)


def _with_mask(form: Callable[..., Tensor], causal: bool, reach: int | None, shift: int) -> Way:
    """One mask for all layers."""

    def way(ids: Tensor, positions: Tensor, documents: Tensor) -> Inputs:
        mask = form(documents, causal, reach)[:, None]
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions + shift}

    return way


def _with_masks(causal: bool, reach: int | None) -> Way:
    """One mask for layers that look everywhere and one for those that look within a window."""

    def way(ids: Tensor, positions: Tensor, documents: Tensor) -> Inputs:
        masks = {"full_attention": None, "sliding_attention": reach}
        made = {kind: _same(documents, causal, within)[:, None] for kind, within in masks.items()}
        return {"input_ids": ids, "attention_mask": made, "position_ids": positions}

    return way


def _same(documents: Tensor, causal: bool, reach: int | None) -> Tensor:
    """(B, L, L) bool: both positions in one document, no later one if causal, within reach; each sees itself."""
    length = documents.shape[1]
    allowed = (documents[:, :, None] == documents[:, None, :]) & (documents != 0)[:, None, :]
    places = torch.arange(length, device=documents.device)
    behind = places[:, None] - places[None, :]
    if causal:
        allowed = allowed & (behind >= 0)
    if reach is not None:
        allowed = allowed & (behind.abs() <= reach)
    return allowed | (behind == 0)


def _additive(documents: Tensor, causal: bool, reach: int | None) -> Tensor:
    allowed = _same(documents, causal, reach)
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, torch.finfo(torch.float32).min)


def _window(model: PreTrainedModel) -> int | None:
    """The width that local layers look at, where the config names one."""
    config = model.config.get_text_config()
    for name in ("sliding_window", "local_attention", "attention_window"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


Run = Callable[..., Tensor]
"""(the class's own forward, input_ids, position_ids, document_ids, ...) -> logits (B, L, vocabulary)."""


def _packed(way: Way) -> Run:
    def run(forward: Callable[..., Any], ids: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        logits: Tensor = forward(**way(ids, positions, documents)).logits
        return logits

    return run


def _padded(forward: Callable[..., Any], ids: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
    """Logits of packed rows, each document run in a row of its own; those of padding are 0."""
    places = _pieces(documents)
    inputs, mask = _alone(ids, positions, places)
    return _back(forward(input_ids=inputs, attention_mask=mask).logits, positions, places)


def _padded_pairs(
    forward: Callable[..., Any],
    ids: Tensor,
    positions: Tensor,
    documents: Tensor,
    decoder_input_ids: Tensor,
    decoder_position_ids: Tensor,
    decoder_document_ids: Tensor,
) -> Tensor:
    """Logits (B, T, vocabulary) of packed rows of pairs, each pair run in a row of its own."""
    most = max(int(documents.max()), int(decoder_document_ids.max()))
    asked, answered = _pieces(documents, most), _pieces(decoder_document_ids, most)
    inputs, mask = _alone(ids, positions, asked)
    outputs, decoder_mask = _alone(decoder_input_ids, decoder_position_ids, answered)
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs: each piece of the one needs the other")
    made = forward(
        input_ids=inputs, attention_mask=mask, decoder_input_ids=outputs, decoder_attention_mask=decoder_mask
    )
    return _back(made.logits, decoder_position_ids, answered)


@dataclass(frozen=True)
class _Places:
    """Of each position that is no padding: the number of its document in the batch, and its flat place."""

    rows: Tensor
    flat: Tensor
    count: int


def _pieces(documents: Tensor, most: int | None = None) -> _Places:
    most = int(documents.max()) if most is None else most
    keys = documents + torch.arange(documents.shape[0], device=documents.device)[:, None] * (most + 1)
    flat = documents.flatten().nonzero().squeeze(1)
    different, rows = torch.unique(keys.flatten()[flat], return_inverse=True)
    return _Places(rows, flat, len(different))


def _alone(ids: Tensor, positions: Tensor, places: _Places) -> tuple[Tensor, Tensor]:
    """(documents, longest) ids and mask: each document in a row of its own."""
    within = positions.flatten()[places.flat]
    width = int(within.max()) + 1 if len(within) else 1
    alone = ids.new_zeros(max(1, places.count), width)
    mask = torch.zeros_like(alone)
    alone[places.rows, within] = ids.flatten()[places.flat]
    mask[places.rows, within] = 1
    return alone, mask


def _back(made: Tensor, positions: Tensor, places: _Places) -> Tensor:
    """Logits of documents in rows of their own -> where they stand in the packed rows."""
    logits = made.new_zeros(positions.numel(), made.shape[-1])
    logits = logits.index_put((places.flat,), made[places.rows, positions.flatten()[places.flat]])
    return logits.view(*positions.shape, -1)


# --- the check ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _keeps_apart(model: PreTrainedModel, run: Run) -> bool:
    """Whether packed documents have the logits that each has alone, whatever their neighbours are."""
    lengths = list(_PIECES)
    window = _window(model)
    if window is not None and window < _LONGEST_CHECK:
        lengths[1] = window + window // 2 + 3
    device = next(model.parameters()).device
    table: Any = model.get_input_embeddings()
    vocabulary: int = table.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    low = min(vocabulary // 2, 5)
    first, other, second = (
        torch.randint(low, vocabulary, (length,), generator=generator).to(device)
        for length in (lengths[0], lengths[0], lengths[1])
    )
    padding = 3
    ids = torch.stack([torch.cat((one, second, second.new_zeros(padding))) for one in (first, other)])
    documents = torch.tensor([1] * lengths[0] + [2] * lengths[1] + [0] * padding, device=device).expand(2, -1)
    positions = torch.cat([torch.arange(length) for length in lengths] + [torch.zeros(padding)]).long().to(device)
    try:
        logits = run(model.forward, ids, positions.expand(2, -1), documents)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError):
        return False  # the class does not take this form
    border, end = lengths[0], sum(lengths)
    expected = [model.forward(input_ids=one[None]).logits[0] for one in (first, other, second)]
    if logits.shape != (*ids.shape, expected[0].shape[-1]):
        return False
    pairs = [
        (logits[0, :border], expected[0]),
        (logits[1, :border], expected[1]),
        (logits[0, border:end], expected[2]),
        (logits[1, border:end], logits[0, border:end]),
    ]
    return all(bool((ours - theirs).abs().max() <= _TOLERANCE * theirs.abs().max()) for ours, theirs in pairs)


# --- the forward pass -----------------------------------------------------------------------------------------------


def _install(model: PreTrainedModel, run: Run, *, packed: bool) -> None:
    """Put our forward pass before the class's own."""
    own = model.forward

    def forward(
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        dropout_keys: Tensor | None = None,  # a stock class draws its own dropout
        **more: Any,
    ) -> ModelOutput:
        targets = labels if shift_labels is None else shift_labels
        if document_ids is None or position_ids is None:
            logits = own(input_ids=input_ids, **more).logits
        elif targets is not None and not return_logits and packed:
            with _head_sees_targets(model, targets):
                logits = run(own, input_ids, position_ids, document_ids)
        else:
            logits = run(own, input_ids, position_ids, document_ids, **more)
        if targets is None:
            return ModelOutput(logits=logits)
        if logits.shape[:-1] != targets.shape:  # those of the targets alone
            total = token_cross_entropy_sum(logits, targets[targets != IGNORE_INDEX])
        else:
            total = token_cross_entropy_sum(logits, targets)
        loss = mean_over_targets(total, targets, num_items_in_batch)
        return ModelOutput(loss=loss, logits=logits if return_logits else None)

    # Padded documents reach the output layer in other places than those of the batch.
    model.rearranges_rows = not packed  # type: ignore[assignment]
    model.forward = forward


class _head_sees_targets:  # noqa: N801 (a context manager)
    """Give the output layer the positions that have a target alone, so that no other logits are made."""

    def __init__(self, model: PreTrainedModel, targets: Tensor) -> None:
        self._head: Any = model.get_output_embeddings()
        self._targets = targets

    def __enter__(self) -> None:
        self._handle = None
        if isinstance(self._head, nn.Module):
            self._handle = self._head.register_forward_pre_hook(self._select)

    def _select(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = inputs[0] if inputs else None  # (B, L, hidden)
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != self._targets.shape:
            return None
        return (hidden[self._targets != IGNORE_INDEX][None], *inputs[1:])

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()


def flops_per_token(model: PreTrainedModel, sequence_length: int) -> float:
    """Operations of a training step for one token: 6 a parameter that multiplies, 12 a key and channel of each layer.

    PaLM (arXiv 2204.02311, appendix B), from the sizes that the config names; 0 attention where it names none.
    """
    tables = {id(parameter) for module in model.modules() if isinstance(module, nn.Embedding) for parameter in
              module.parameters()}  # fmt: skip
    head: Any = model.get_output_embeddings()
    kept = {id(parameter): parameter.numel() for parameter in model.parameters() if id(parameter) not in tables}
    if isinstance(head, nn.Module):
        kept |= {id(parameter): parameter.numel() for parameter in head.parameters()}
    config: Mapping[str, Any] = model.config.get_text_config().to_dict()
    width, layers = config.get("hidden_size") or 0, config.get("num_hidden_layers") or 0
    return float(6 * sum(kept.values()) + 12 * layers * width * sequence_length)
