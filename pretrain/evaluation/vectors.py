"""Vectors of texts, and what they are worth: how well their nearness agrees with people, what a query finds.

What lives here: mean pooling, similarity, retrieval. What must not: reading files, or loading models.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from pretrain.evaluation.loading import LoadedModel
from pretrain.evaluation.passes import Passes, batches_by_length, last_hidden_states, summed, turns

Vectors = npt.NDArray[np.float32]

_NEEDED = "{what} needs {library}, which is not installed; pip install 'pretrain[eval]'"
_QUERIES_AT_ONCE = 256
_CUT = 10
_AS_NEAR = 1e-12  # what is the same to a model differs by rounding


def mean_vectors(
    model: LoadedModel, texts: Sequence[str], passes: Passes, *, window: int, stage: str = "vectors"
) -> tuple[Vectors, int]:
    """The mean of the last hidden states over a text's tokens, padding left out, special tokens included.

    As sentence-transformers pools a model that says nothing about it (Reimers and Gurevych 2019, arXiv 1908.10084). Of
    an encoder-decoder the encoder is taken.

    Args:
        model: any model of text.
        texts: each is cut to `window` tokens.
        passes: how forward passes are run.
        window: positions of a forward pass.
        stage: what `passes.progress` is told.

    Returns:
        (S, hidden) float32, and how many texts were cut.

    Raises:
        ValueError: when a text has no token.
    """
    encoded: list[list[int]] = []
    cut = 0
    for text in texts:
        ids = list(model.tokenizer(text, truncation=True, max_length=window, verbose=False)["input_ids"])
        if not ids:
            raise ValueError(f"`{text[:40]}` has no token in the tokenizer of `{model.source}`; take it out")
        # A text of exactly the window may have been cut or not: only then is it encoded again.
        if len(ids) == window:
            cut += len(model.tokenizer(text, verbose=False)["input_ids"]) > window
        encoded.append(ids)
    pad = model.tokenizer.pad_token_id or 0
    found: Vectors | None = None
    done = 0
    with passes.of(model.model):
        for members, counts, together in turns(batches_by_length(list(map(len, encoded)), passes.batch_tokens), passes):
            width = max(len(encoded[member]) for member in members)
            ids_ = torch.full((len(members), width), pad, dtype=torch.int64)  # (B, L)
            mask = torch.zeros_like(ids_)
            for row, member in enumerate(members):
                ids_[row, : len(encoded[member])] = torch.tensor(encoded[member])
                mask[row, : len(encoded[member])] = 1
            ids_, mask = ids_.to(passes.device), mask.to(passes.device)
            states = last_hidden_states(model.model, {"input_ids": ids_, "attention_mask": mask}).float()
            real = mask[..., None].float()
            means = (states * real).sum(dim=1) / real.sum(dim=1)  # (B, hidden)
            if found is None:
                found = np.zeros((len(texts), means.shape[1]), dtype=np.float32)
            if counts:
                found[members] = means.cpu().numpy()
            done += len(together)
            if passes.progress is not None:
                passes.progress(stage, done, len(texts))
    assert found is not None
    return summed(found, passes.ranks), cut


def score_similarity(
    model: LoadedModel,
    first: Sequence[str],
    second: Sequence[str],
    scores: Sequence[float],
    passes: Passes,
    *,
    window: int,
) -> dict[str, Any]:
    """Spearman's and Pearson's correlation of the cosine of two texts with how alike people found them.

    Returns:
        `pairs`, `spearman`, `pearson` (None where all cosines are the same), and `cut`: texts longer than `window`.
    """
    stats = _library("scipy.stats", "similarity")
    vectors, cut = mean_vectors(model, [*first, *second], passes, window=window, stage="similarity")
    one, other = torch.from_numpy(vectors).double().chunk(2)  # (P, hidden) each
    cosines = F.cosine_similarity(one, other).numpy()
    varies = bool(np.ptp(cosines) > 0)
    return {
        "pairs": len(scores),
        "spearman": float(stats.spearmanr(cosines, scores).statistic) if varies else None,
        "pearson": float(stats.pearsonr(cosines, scores).statistic) if varies else None,
        "cut": cut,
    }


def score_retrieval(
    model: LoadedModel,
    queries: Sequence[str],
    candidates: Sequence[str],
    answers: Sequence[Sequence[int]],
    passes: Passes,
    *,
    window: int,
) -> dict[str, Any]:
    """What each query finds among all candidates by cosine. A candidate as near as an answer stands before it.

    nDCG is that of Jarvelin and Kekalainen (2002, ACM TOIS 20) with a gain of 1 for each answer. All four scores are of
    the same places (`answer_places`), so that a model to which all texts are alike gains nothing by the order of a
    file; McSherry and Najork (2008, ECIR), and scikit-learn with them, take the mean over all orders instead.

    Args:
        model: any model of text.
        queries: texts.
        candidates: texts, two or more.
        answers: for each query the numbers of the candidates that answer it.
        passes: how forward passes are run.
        window: positions of a forward pass; longer texts are cut.

    Returns:
        `queries`, `candidates`, `recall_at_1`, `recall_at_10` (the share of a query's answers among so many first),
        `mrr_at_10`, `ndcg_at_10`, and `cut`: texts longer than `window`.
    """
    vectors, cut = mean_vectors(model, [*queries, *candidates], passes, window=window, stage="retrieval")
    unit = F.normalize(torch.from_numpy(vectors).double(), dim=1)
    asked, offered = unit[: len(queries)], unit[len(queries) :]
    sums = {"recall_at_1": 0.0, "recall_at_10": 0.0, "mrr_at_10": 0.0, "ndcg_at_10": 0.0}
    for begin in range(0, len(queries), _QUERIES_AT_ONCE):
        cosines = (asked[begin : begin + _QUERIES_AT_ONCE] @ offered.T).numpy()  # (Q, C)
        for row, numbers in zip(cosines, answers[begin : begin + _QUERIES_AT_ONCE], strict=True):
            places = answer_places(row, numbers)
            sums["recall_at_1"] += float((places <= 1).mean())
            sums["recall_at_10"] += float((places <= _CUT).mean())
            sums["mrr_at_10"] += float(1 / places[0]) if places[0] <= _CUT else 0.0
            best = np.arange(1, min(len(places), _CUT) + 1)
            sums["ndcg_at_10"] += float((1 / np.log2(1 + places[places <= _CUT])).sum() / (1 / np.log2(1 + best)).sum())
    means = {name: value / len(queries) for name, value in sums.items()}
    return {"queries": len(queries), "candidates": len(candidates), **means, "cut": cut}


def answer_places(near: npt.NDArray[Any], answers: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The places, from 1 and ascending, of a query's answers among all candidates by nearness.

    A candidate that is no answer and as near as one, or nearer, stands before it: no place depends on the order in
    which candidates are given. NaN is as near as anything, so that a broken vector finds nothing.

    Args:
        near: (C,) nearness of each candidate: cosines in float64 of vectors that were normalized in it. The rounding of
            float32 turns a vector by some 1e-7, and two that are the same by the square of that in their cosine.
        answers: numbers of those that answer, each once.
    """
    chosen = np.asarray(answers, dtype=np.int64)
    others = np.delete(near, chosen)
    own = np.sort(near[chosen])[::-1]  # (A,) the nearest first, NaN before it
    before = (~(others < own[:, None] - _AS_NEAR)).sum(axis=1)  # (A,)
    places: npt.NDArray[np.int64] = np.sort(before) + np.arange(1, len(own) + 1)
    return places


def _library(name: str, what: str) -> Any:
    """A library of statistics, which scoring alone needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(_NEEDED.format(what=what, library=name.partition(".")[0])) from error
