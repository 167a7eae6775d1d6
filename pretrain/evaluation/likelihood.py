"""The likelihood of text under a model: loss, bits per byte, masked prediction, pseudo-perplexity.

What lives here: what each score means, for a model from disk (rows of text) and for one that is being trained (batches
of the data plane). What must not: files, printing, or which class a model is of.

Losses are nats a target. They are summed in float64 over targets, so neither batch size nor order changes a score by
more than the rounding of one forward pass.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.data.objectives import IGNORE
from pretrain.evaluation.passes import Passes, bare, num_targets, score_rows, target_scores
from pretrain.evaluation.text import (
    MASK_RATE,
    Row,
    SentenceSample,
    TextTally,
    causal_rows,
    encode,
    hidden_token_rows,
    make_template,
    masked_rows,
    prefix_id,
    take_texts,
)
from pretrain.ranks import Ranks

_MIN_SENTENCE_CHARACTERS = 20
_MAX_SENTENCE_TOKENS = 126

# --- a model that is being trained ----------------------------------------------------------------------------------


def evaluate_batches(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    device: torch.device | str,
    autocast: torch.dtype | None = None,
    num_bytes: int | None = None,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Score prepared batches with a live model; its training mode and its gradients stay as they are.

    Args:
        model: a Loom model, or a stock class when rows hold one document each.
        batches: numpy or torch dicts, or objects that hold one as `arrays`, with `input_ids` (B, L) and either
            `labels` (masked language modelling, detection of replaced tokens) or `shift_labels` (causal, already
            shifted), and where rows are packed `position_ids` and `document_ids`. Of an encoder-decoder also
            `decoder_input_ids` and `labels` (B, T), with position and document ids of their own.
        device: where the model is.
        autocast: bf16 or fp16 for the arithmetic, None for the weights' own.
        num_bytes: UTF-8 bytes of the text that the targets cover; default: what `batches.num_bytes` says, if it does.
        ranks: processes that score a share of the batches each (`share_of_batches`); all of them get the same scores.

    Returns:
        `loss` (nats a target), `num_targets`; for masked batches `accuracy`; for causal ones `bits_per_byte`, where
        the bytes are known. Bits per byte count every target, so the EOS of each document too. A detector of replaced
        tokens has `generator_loss` (nats a masked token), `discriminator_loss` (nats a token), and as `loss` their
        weighted sum, which it is trained on; of its verdicts `accuracy`, and of replaced tokens `detection_precision`,
        `detection_recall` (left out where none is called one, or is one) and `replaced`, their share of all tokens.

    Raises:
        ValueError: when no batch has a target, or a stock class is given packed rows.
    """
    place = torch.device(device)
    num_bytes = num_bytes if num_bytes is not None else getattr(batches, "num_bytes", None)
    total, hits, count, masked, name = 0.0, 0.0, 0.0, False, ""
    if getattr(bare(model), "generator", None) is not None:
        return _detection_scores(model, batches, place, autocast, ranks or Ranks.alone())
    with Passes(place, autocast).of(model):
        for batch in batches:
            tensors = _on_device(batch, place)
            name = "shift_labels" if "shift_labels" in tensors else "labels"
            masked = name == "labels" and "decoder_input_ids" not in tensors
            targets = tensors.pop(name)
            tensors.pop("labels", None)
            number = int((targets != IGNORE).sum())
            if _is_packable(model) and not masked:
                # The fused head and loss: the logits of the whole batch never exist at once.
                output = model(**tensors, **{name: targets}, num_items_in_batch=1, return_logits=False)
                total += float(output.loss)
            elif not number and ranks is not None and ranks.world > 1:
                model(**_for_forward(model, tensors))  # nothing to score, but sharded engines meet in each pass
            else:
                losses, right = target_scores(model, _for_forward(model, tensors), targets)
                total += float(losses.double().sum())
                hits += int(right.sum())
            count += number
    total, hits, count = (ranks or Ranks.alone()).sum([total, hits, count])
    if not count:
        raise ValueError("there is nothing to score: no batch has a target; give more validation text")
    scores: dict[str, float] = {"loss": total / count, "num_targets": int(count)}
    if masked:
        scores["accuracy"] = hits / count
    elif num_bytes and name == "shift_labels":
        scores["bits_per_byte"] = total / math.log(2) / num_bytes
    return scores


def _on_device(batch: Any, place: torch.device) -> dict[str, Tensor]:
    arrays: Mapping[str, np.ndarray | Tensor | None] = getattr(batch, "arrays", batch)
    return {key: torch.as_tensor(value).to(place) for key, value in arrays.items() if value is not None}


def _detection_scores(
    model: nn.Module, batches: Iterable[Any], place: torch.device, autocast: torch.dtype | None, ranks: Ranks
) -> dict[str, float]:
    """Scores of a detector of replaced tokens with its generator."""
    names = ("generator_loss", "discriminator_loss", "accuracy", "detection_precision", "detection_recall", "replaced")
    sums = np.zeros((len(names), 2))  # of each a sum and its divisor
    with Passes(place, autocast).of(model):
        for batch in batches:
            tensors = _on_device(batch, place)
            output = model(**tensors)
            if int((tensors["labels"] != IGNORE).sum()):  # else idle, or without a masked token: nothing was replaced
                sums += torch.stack([output.parts[name] for name in names]).double().cpu().numpy()
    sums = np.array(ranks.sum(sums.ravel().tolist())).reshape(sums.shape)
    pairs = dict(zip(names, sums.tolist(), strict=True))
    masked = pairs["generator_loss"][1]
    if not masked:
        raise ValueError("there is nothing to score: no batch has a target; give more validation text")
    scores = {name: total / by for name, (total, by) in pairs.items() if by}
    weight: Any = getattr(bare(model).config, "rtd_weight", 1.0)
    loss = scores["generator_loss"] + weight * scores["discriminator_loss"]
    return {"loss": loss, **scores, "num_targets": int(masked)}


def share_of_batches(batches: Iterable[Mapping[str, np.ndarray]], ranks: Ranks) -> Iterator[Mapping[str, np.ndarray]]:
    """The batches of one process: every W-th of them, in order.

    Sharded engines meet in each forward pass, so all processes get equally many: where the last round has fewer
    batches than processes, the rest get one without targets.
    """
    coming = iter(batches)
    while turn := list(islice(coming, ranks.world)):
        idle = {name: np.full_like(a, IGNORE) if "labels" in name else a for name, a in turn[0].items()}
        yield turn[ranks.rank] if ranks.rank < len(turn) else idle


def _is_packable(model: nn.Module) -> bool:
    return "document_ids" in inspect.signature(bare(model).forward).parameters


def _for_forward(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A stock class knows no `document_ids`: they are dropped where each row is one document without padding."""
    if _is_packable(model) or "document_ids" not in tensors:
        return tensors
    rest = dict(tensors)
    documents = [rest.pop(name) for name in ("document_ids", "decoder_document_ids") if name in rest]
    if not all(bool((numbers == 1).all()) for numbers in documents):
        raise ValueError(
            f"{type(model).__name__} cannot keep the documents of a packed row apart; "
            "use data.max_documents_per_row: 1 with rows that are full, or a Loom model"
        )
    return {key: value for key, value in rest.items() if key in inspect.signature(bare(model).forward).parameters}


# --- scores ---------------------------------------------------------------------------------------------------------


def score_causal(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    passes: Passes,
    *,
    window: int,
    stride: int | None = None,
    max_bytes: int | None = None,
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of a causal model; every token of every document is scored exactly once.

    Args:
        texts: the documents.
        window: positions of input a forward pass, BOS included.
        stride: new tokens a window; default `window`, that is, windows without overlap but for the one token that
            predicts the next window's first. A smaller stride gives every token at least `window - stride` of context.
        max_bytes: stop after the document that reaches this many bytes.

    Raises:
        ValueError: for a stride outside 1 to `window`, or when there is no text.
    """
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride: {stride} must lie between 1 and the window of {window} tokens")
    prefix, tally = prefix_id(tokenizer), TextTally()
    rows: list[Row] = []
    tokens, unknown = 0, 0
    for _, ids in encode(tokenizer, take_texts(texts, tally, max_bytes)):
        rows += causal_rows(ids, prefix, window, stride)
        tokens += len(ids)
        unknown += _count_unknown(tokenizer, ids)
    if not tokens:
        raise ValueError("there is nothing to score: no text was found; check the files and the text field")
    losses, _ = score_rows(model, rows, passes, pad_id=_pad_id(tokenizer), needs_mask=False)
    total = float(losses.sum())
    return {
        "loss": total / tokens,
        "perplexity": perplexity(total / tokens),
        "bits_per_byte": total / math.log(2) / tally.bytes,
        "tokens": tokens,
        "bytes": tally.bytes,
        "unknown_tokens": unknown,
        "context": {
            "window": window,
            "stride": stride,
            "document_start": tokenizer.convert_ids_to_tokens(prefix),
            "document_end": "not scored",
        },
        "text": {"documents": tally.documents, "bytes": tally.bytes, "sha256": tally.sha256},
    }


def score_masked(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    passes: Passes,
    *,
    window: int,
    sentences: int = 100,
    max_bytes: int | None = None,
) -> dict[str, Any]:
    """Loss and accuracy at 15% masks (80/10/10, fixed by the text), and pseudo-perplexity over a sample of sentences.

    Args:
        texts: the documents.
        window: positions a forward pass, special tokens included.
        sentences: lines of text (20 characters or more) in the sample for pseudo-perplexity; 0 leaves it out.
        max_bytes: stop after the document that reaches this many bytes.

    Raises:
        ValueError: when the tokenizer has no mask token, or when there is no text.
    """
    template, tally = make_template(tokenizer), TextTally()
    if window <= template.length:
        raise ValueError(f"a window of {window} tokens has no room beside {template.length} special tokens; raise it")
    rows: list[Row] = []
    sample = SentenceSample(sentences, _MIN_SENTENCE_CHARACTERS)
    tokens, unknown = 0, 0
    for text, ids in encode(tokenizer, take_texts(texts, tally, max_bytes)):
        rows += masked_rows(text, ids, template, window)
        sample.add(text)
        tokens += len(ids)
        unknown += _count_unknown(tokenizer, ids)
    targets = sum(num_targets(row) for row in rows)
    if not targets:
        raise ValueError("there is nothing to score: too little text for one mask; check the files and the text field")
    losses, hits = score_rows(model, rows, passes, pad_id=_pad_id(tokenizer), needs_mask=True, stage="masked tokens")
    scores: dict[str, Any] = {
        "loss": float(losses.sum()) / targets,
        "accuracy": float(hits.sum()) / targets,
        "num_targets": targets,
        "tokens": tokens,
        "bytes": tally.bytes,
        "unknown_tokens": unknown,
        "masking": {"rate": MASK_RATE, "mask": 0.8, "random": 0.1, "keep": 0.1, "drawn_by": "hash of the text"},
        "context": {"window": window},
        "text": {"documents": tally.documents, "bytes": tally.bytes, "sha256": tally.sha256},
    }
    chosen = sample.sentences()
    if chosen:
        limit = min(window - template.length, _MAX_SENTENCE_TOKENS)
        values, counts = pseudo_log_likelihoods(model, tokenizer, chosen, passes, max_tokens=limit)
        scores["pseudo_perplexity"] = perplexity(-float(values.sum()) / max(1, int(counts.sum())))
        scores["pseudo_perplexity_sample"] = {
            "sentences": len(chosen),
            "of_lines": sample.seen,
            "tokens": int(counts.sum()),
            "max_tokens_a_sentence": limit,
        }
    return scores


def pseudo_log_likelihoods(
    model: nn.Module, tokenizer: Any, sentences: Sequence[str], passes: Passes, *, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pseudo-log-likelihood of each sentence: each token's log probability when it alone is masked.

    Source: Salazar et al. 2020 (arXiv 1910.14659), equation 1. Sentences are cut at `max_tokens`.

    Returns:
        (S,) float64 nats (at most 0), and (S,) int64 tokens of each sentence.
    """
    template = make_template(tokenizer)
    rows: list[Row] = []
    owners: list[int] = []
    for number, (_, ids) in enumerate(encode(tokenizer, sentences)):
        hidden = list(hidden_token_rows(ids[:max_tokens], template))
        rows += hidden
        owners += [number] * len(hidden)
    losses, _ = score_rows(model, rows, passes, pad_id=_pad_id(tokenizer), needs_mask=True, stage="pseudo-perplexity")
    counts = np.bincount(owners, minlength=len(sentences))
    return -np.bincount(owners, weights=losses, minlength=len(sentences)), counts


def _pad_id(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0


def _count_unknown(tokenizer: Any, ids: np.ndarray) -> int:
    return 0 if tokenizer.unk_token_id is None else int((ids == tokenizer.unk_token_id).sum())


def perplexity(loss: float) -> float:
    """exp(loss), infinite rather than an error when it does not fit a float."""
    return math.exp(loss) if loss < 700 else math.inf
