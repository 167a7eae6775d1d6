"""Forward passes without gradients: which rows share one, which logits are made, the loss of each target.

What lives here: torch, and any model whose output has `logits`. What must not: text, tokenizers, or what a score means.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.data.objectives import IGNORE
from pretrain.evaluation.text import Row
from pretrain.ranks import Ranks

Progress = Callable[[str, int, int], None]
"""Told now and then what is being scored, how many targets are done, and how many there are."""

DEFAULT_BATCH_TOKENS = 8_192
_SUMMED = 1 << 20  # values that processes add up at a time
_CHUNK_BYTES = 1 << 26  # fp32 logits at a time
_LOGITS_BYTES = 1 << 30  # fp32 logits of a whole batch, for models that give no choice


@dataclass(frozen=True)
class Passes:
    """How forward passes are run: where, in which precision (None: the weights' own), at most how many tokens each.

    `ranks` share the batches of one measure; all of them get all results. They make equally many forward passes, in
    which sharded engines meet, and `progress` is called equally often on each.
    """

    device: torch.device
    autocast: torch.dtype | None = None
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    progress: Progress | None = None
    ranks: Ranks = field(default_factory=Ranks.alone)

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Evaluation mode, no gradients, autocast; the model's mode is put back afterwards."""
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                yield
        finally:
            model.train(was_training)


# --- one forward pass -----------------------------------------------------------------------------------------------


@contextmanager
def _head_sees(model: nn.Module, chosen: Tensor, positions: int) -> Iterator[None]:
    """Give the output layer the chosen of all positions alone, as one row, so that no other logits are made.

    A model without such a layer, or one that calls it with another shape, or with its rows rearranged, is left as it
    is.
    """
    find_head: Callable[[], Any] = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    if not isinstance(head, nn.Module) or getattr(model, "rearranges_rows", False):
        yield
        return

    def select(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = inputs[0] if inputs else None  # (B, L, hidden)
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2].numel() != positions:
            return None
        return (hidden.flatten(0, 1).index_select(0, chosen)[None], *inputs[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def bare(model: nn.Module) -> nn.Module:
    """The model inside a wrapper such as DistributedDataParallel."""
    inner = getattr(model, "module", model)
    return inner if isinstance(inner, nn.Module) else model


def target_scores(model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of every target, and whether the model's first choice was right.

    Args:
        model: any model whose output has `logits`.
        inputs: what its `forward` takes, without labels; `input_ids` is (B, L).
        targets: (B, L) int64, the id to predict at each position, `IGNORE` where none.

    Returns:
        (N,) float32 nats and (N,) bool, for the N targets in row order.
    """
    flat = targets.reshape(-1)
    chosen = (flat != IGNORE).nonzero().squeeze(1)  # (N,)
    wanted = flat.index_select(0, chosen)
    if not len(chosen):
        return flat.new_zeros(0, dtype=torch.float32), flat.new_zeros(0, dtype=torch.bool)
    extra = {"use_cache": False} if "use_cache" in inspect.signature(bare(model).forward).parameters else {}
    # A compiled graph would not notice the hook, so compiled models run eagerly here.
    with _head_sees(bare(model), chosen, flat.numel()), torch.compiler.set_stance("force_eager"):
        output = model(**inputs, **extra)
    logits = getattr(output, "prediction_logits", None)  # beside a head for pairs of segments
    if logits is None:
        logits = output.logits
    logits = logits.reshape(-1, logits.shape[-1])  # (N or B*L, vocabulary)
    if logits.shape[0] != len(chosen):
        logits = logits.index_select(0, chosen)
    rows = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    losses, hits = [], []
    for part, ids in zip(torch.split(logits, rows), torch.split(wanted, rows), strict=True):
        losses.append(F.cross_entropy(part.float(), ids, reduction="none"))
        hits.append(part.argmax(-1) == ids)
    return torch.cat(losses), torch.cat(hits)


def last_hidden_states(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states (B, L, hidden) of an encoder or decoder, whatever head it has.

    The whole model is called, where sharded engines gather what they need, and its head sees one position alone.
    """
    inner: Any = bare(model)
    if getattr(inner.config, "is_encoder_decoder", False):
        states: Tensor = inner.get_encoder()(**inputs)[0]
        return states
    extra = {"use_cache": False} if "use_cache" in inspect.signature(inner.forward).parameters else {}
    with torch.compiler.set_stance("force_eager"):
        if inner.base_model is inner:
            output: Any = model(**inputs, **extra)
            states = output[0]
            return states
        kept: list[Any] = []
        handle = inner.base_model.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        try:
            ids = inputs["input_ids"]
            with _head_sees(inner, torch.zeros(1, dtype=torch.int64, device=ids.device), ids.numel()):
                model(**inputs, **extra)
        finally:
            handle.remove()
    states = kept[0][0]
    return states


# --- rows of text ---------------------------------------------------------------------------------------------------


def score_rows(
    model: nn.Module, rows: Sequence[Row], passes: Passes, *, pad_id: int, needs_mask: bool, stage: str = "scoring"
) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss (nats, float64) and number of right first choices (int64) of each row, in the order of `rows`.

    Rows of like length share a forward pass. `needs_mask`: padding must be hidden from attention (encoders); a causal
    model never looks at padding on its right.
    """
    losses, hits = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    total = sum(num_targets(row) for row in rows)
    done = 0
    vocabulary = getattr(getattr(bare(model), "config", None), "vocab_size", None) or 1
    limit = min(passes.batch_tokens, _LOGITS_BYTES // (4 * vocabulary))
    with passes.of(model):
        for members, counts, together in turns(batches_by_length([len(row.input_ids) for row in rows], limit), passes):
            inputs, targets = _collate([rows[member] for member in members], pad_id, needs_mask, passes.device)
            loss, right = target_scores(model, inputs, targets)
            if counts:
                owners = np.repeat(members, [num_targets(rows[member]) for member in members])
                np.add.at(losses, owners, loss.double().cpu().numpy())
                np.add.at(hits, owners, right.cpu().numpy().astype(np.int64))
            done += sum(num_targets(rows[member]) for member in together)
            if passes.progress is not None:
                passes.progress(stage, done, total)
    return summed(losses, passes.ranks), summed(hits, passes.ranks)


def summed(values: npt.NDArray[Any], ranks: Ranks) -> npt.NDArray[Any]:
    """The sum of an array over the processes, in its own type and shape."""
    if ranks.world == 1:
        return values
    flat = values.ravel()
    parts = [ranks.sum(flat[begin : begin + _SUMMED].tolist()) for begin in range(0, len(flat), _SUMMED)]
    return np.array([value for part in parts for value in part], dtype=values.dtype).reshape(values.shape)


def turns(batches: Iterator[list[int]], passes: Passes) -> Iterator[tuple[list[int], bool, list[int]]]:
    """The batches of one process, whether each counts, and what all processes work on in that turn.

    Where the last turn has fewer batches than processes, the rest repeat one of them without counting it.
    """
    while turn := list(islice(batches, passes.ranks.world)):
        counts = passes.ranks.rank < len(turn)
        yield turn[passes.ranks.rank if counts else 0], counts, [member for batch in turn for member in batch]


def num_targets(row: Row) -> int:
    return int((row.targets != IGNORE).sum())


def batches_by_length(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Row numbers, longest first (memory is met at once, not at the end), at most `limit` padded tokens together."""
    order = sorted(range(len(lengths)), key=lambda member: -lengths[member])
    while order:
        size = max(1, limit // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def _collate(
    rows: Sequence[Row], pad_id: int, needs_mask: bool, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    width = max(len(row.input_ids) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    targets = np.full((len(rows), width), IGNORE, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row.input_ids)] = row.input_ids
        targets[place, : len(row.targets)] = row.targets
        mask[place, : len(row.input_ids)] = 1
    inputs = {"input_ids": torch.from_numpy(ids).to(device)}
    if needs_mask and not mask.all():
        inputs["attention_mask"] = torch.from_numpy(mask).to(device)
    return inputs, torch.from_numpy(targets).to(device)
