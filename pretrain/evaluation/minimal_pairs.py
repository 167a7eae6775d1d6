"""Minimal pairs: does a model find the grammatical sentence likelier than its twin with one mistake.

What lives here: likelihoods of sentences under a decoder, pseudo-likelihoods under an encoder, and how often the good
one wins. What must not: reading files, or loading models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from pretrain.evaluation.examples import Pair
from pretrain.evaluation.loading import LoadedModel
from pretrain.evaluation.passes import Passes, score_rows
from pretrain.evaluation.text import (
    Row,
    causal_rows,
    encode,
    encode_words,
    hidden_token_rows,
    hidden_word_rows,
    make_template,
    prefix_id,
)

PseudoLikelihood = Literal["within-word", "original"]
"""What is masked beside the token that is scored: the rest of its word (Kauf and Ivanova 2023), or nothing (Salazar et
al. 2020)."""


_AT_ONCE = 4_096  # sentences whose rows are in memory together


def score_pairs(
    model: LoadedModel,
    pairs: Sequence[Pair],
    passes: Passes,
    *,
    window: int,
    pseudo_likelihood: PseudoLikelihood = "within-word",
) -> dict[str, Any]:
    """The share of pairs whose good sentence is likelier than the bad one; equal ones count as wrong.

    Args:
        model: a decoder or an encoder with its language-model head.
        pairs: at least one.
        passes: how forward passes are run.
        window: positions of a forward pass; a decoder reads longer sentences through a window that slides.
        pseudo_likelihood: of an encoder.

    Returns:
        `pairs`, `accuracy`, `ties`, `scored_by`, and `by`: for each field of groups the accuracy and number of each
        group. Chance is 0.5.

    Raises:
        ValueError: for an encoder-decoder, or when a sentence does not fit an encoder.
    """
    sentences = [sentence for pair in pairs for sentence in (pair.good, pair.bad)]
    if model.kind not in ("causal", "mlm"):
        raise ValueError(
            f"minimal pairs: `{model.source}` is no decoder or encoder with a language-model head; leave them out"
        )
    how = "log-likelihood" if model.kind == "causal" else f"pseudo-log-likelihood, {pseudo_likelihood}"
    parts = [sentences[begin : begin + _AT_ONCE] for begin in range(0, len(sentences), _AT_ONCE)]
    found = []
    for number, part in enumerate(parts, start=1):
        stage = "minimal pairs" + (f" {number}/{len(parts)}" if len(parts) > 1 else "")
        given: dict[str, Any] = {"window": window, "stage": stage}
        if model.kind == "causal":
            found.append(log_likelihoods(model, part, passes, **given))
        else:
            found.append(pseudo_log_likelihoods_of(model, part, passes, how=pseudo_likelihood, **given))
    scores = np.concatenate(found)
    good, bad = scores[0::2], scores[1::2]
    right = good > bad
    return {
        "pairs": len(pairs),
        "accuracy": float(right.mean()),
        "ties": int((good == bad).sum()),
        "scored_by": how,
        "by": _by_group(pairs, right),
    }


def _by_group(pairs: Sequence[Pair], right: npt.NDArray[np.bool_]) -> dict[str, dict[str, dict[str, float]]]:
    members: dict[str, dict[str, list[bool]]] = {}
    for pair, won in zip(pairs, right.tolist(), strict=True):
        for field, group in pair.groups.items():
            members.setdefault(field, {}).setdefault(group, []).append(won)
    return {
        field: {
            group: {"accuracy": float(np.mean(found)), "pairs": len(found)} for group, found in sorted(groups.items())
        }
        for field, groups in members.items()
    }


def log_likelihoods(
    model: LoadedModel, sentences: Sequence[str], passes: Passes, *, window: int, stage: str = "minimal pairs"
) -> npt.NDArray[np.float64]:
    """Summed log probability (nats) of each sentence's tokens, (S,), the first one after BOS; EOS is not scored."""
    prefix = prefix_id(model.tokenizer)
    rows: list[Row] = []
    owners: list[int] = []
    for number, (_, ids) in enumerate(encode(model.tokenizer, sentences)):
        made = list(causal_rows(ids, prefix, window, window))
        rows += made
        owners += [number] * len(made)
    return _summed(model, rows, owners, len(sentences), passes, needs_mask=False, stage=stage)


def pseudo_log_likelihoods_of(
    model: LoadedModel,
    sentences: Sequence[str],
    passes: Passes,
    *,
    window: int,
    how: PseudoLikelihood,
    stage: str = "minimal pairs",
) -> npt.NDArray[np.float64]:
    """Pseudo-log-likelihood (nats) of each sentence, (S,): the sum over its tokens, each masked in its turn.

    Raises:
        ValueError: when a sentence does not fit the window, or the tokenizer knows no words.
    """
    if how not in get_args(PseudoLikelihood):
        raise ValueError(f"pseudo_likelihood: {how} is unknown; use {' or '.join(get_args(PseudoLikelihood))}")
    template = make_template(model.tokenizer)
    rows: list[Row] = []
    owners: list[int] = []
    for number, sentence in enumerate(sentences):
        if how == "within-word":
            ids, words = encode_words(model.tokenizer, sentence)
            made = list(hidden_word_rows(ids, words, template))
        else:
            ((_, ids),) = encode(model.tokenizer, [sentence])
            made = list(hidden_token_rows(ids, template))
        if len(ids) + template.length > window:
            raise ValueError(
                f"minimal pairs: a sentence of {len(ids)} tokens does not fit the {window} positions of "
                f"`{model.source}` (`{sentence[:60]}`); take it out, or give a model of longer inputs"
            )
        rows += made
        owners += [number] * len(made)
    return _summed(model, rows, owners, len(sentences), passes, needs_mask=True, stage=stage)


def _summed(
    model: LoadedModel,
    rows: list[Row],
    owners: list[int],
    count: int,
    passes: Passes,
    *,
    needs_mask: bool,
    stage: str,
) -> npt.NDArray[np.float64]:
    pad = model.tokenizer.pad_token_id
    pad_id = 0 if pad is None else int(pad)
    losses, _ = score_rows(model.model, rows, passes, pad_id=pad_id, needs_mask=needs_mask, stage=stage)
    sums: npt.NDArray[np.float64] = np.zeros(count)
    np.subtract.at(sums, owners, losses)
    return sums
