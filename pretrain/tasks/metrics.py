"""Scores as the field reports them, by the libraries that it takes them from.

What lives here: the one door to scikit-learn, SciPy, seqeval and rouge-score. What must not: models, rows.

The metrics of Hugging Face's `evaluate` are scripts that it downloads and runs; what they call is called here.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

EXTRA = 'pip install "pretrain[finetune]"'


def library(name: str) -> Any:
    """A library of scores.

    Raises:
        ValueError: when it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"scores of this task need `{name.split('.')[0]}`, which is not installed: {EXTRA}") from error


def single_label(truth: np.ndarray, said: np.ndarray, classes: int) -> dict[str, float]:
    """Accuracy, macro F1, Matthews' correlation, and of two classes the F1 of the second. (N,) numbers each."""
    sklearn = library("sklearn.metrics")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that nobody predicted: their F1 is 0
        scores = {
            "accuracy": float(sklearn.accuracy_score(truth, said)),
            "f1_macro": float(sklearn.f1_score(truth, said, average="macro", zero_division=0)),
            "matthews_correlation": float(sklearn.matthews_corrcoef(truth, said)),
        }
        if classes == 2:
            scores["f1"] = float(sklearn.f1_score(truth, said, zero_division=0))
    return scores


def multi_label(truth: np.ndarray, said: np.ndarray) -> dict[str, float]:
    """Micro and macro F1, and the share of rows that are right in all labels. (N, labels) of 0 and 1."""
    sklearn = library("sklearn.metrics")
    return {
        "f1_micro": float(sklearn.f1_score(truth, said, average="micro", zero_division=0)),
        "f1_macro": float(sklearn.f1_score(truth, said, average="macro", zero_division=0)),
        "accuracy": float(sklearn.accuracy_score(truth, said)),
    }


def regression(truth: np.ndarray, said: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation (0 where one side does not vary), and the mean squared error."""
    stats = library("scipy.stats")
    constant = len(truth) < 2 or np.ptp(truth) == 0 or np.ptp(said) == 0
    return {
        "pearson": 0.0 if constant else float(stats.pearsonr(truth, said)[0]),
        "spearman": 0.0 if constant else float(stats.spearmanr(truth, said)[0]),
        "mse": float(np.mean((truth - said) ** 2)),
    }


def tag_spans(truth: Sequence[list[str]], said: Sequence[list[str]]) -> dict[str, float]:
    """F1, precision and recall of whole spans as conlleval counts them, and accuracy of tags. A list a sentence."""
    seqeval = library("seqeval.metrics")
    return {
        "f1": float(seqeval.f1_score(truth, said, zero_division=0)),
        "precision": float(seqeval.precision_score(truth, said, zero_division=0)),
        "recall": float(seqeval.recall_score(truth, said, zero_division=0)),
        "accuracy": float(seqeval.accuracy_score(truth, said)),
    }


def tags(truth: Sequence[list[str]], said: Sequence[list[str]]) -> dict[str, float]:
    """Accuracy and macro F1 of tags that are no spans. A list a sentence."""
    sklearn = library("sklearn.metrics")
    right, given = ([tag for one in some for tag in one] for some in (truth, said))
    return {
        "accuracy": float(sklearn.accuracy_score(right, given)),
        "f1_macro": float(sklearn.f1_score(right, given, average="macro", zero_division=0)),
    }
