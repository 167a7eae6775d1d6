"""What scores are called for people: in tables, on cards, over charts.

What lives here: one name a score. What must not: how a number is written, or which ones are shown.
"""

from __future__ import annotations

SCORE_NAMES = {
    "loss": "loss (nats a target)",
    "perplexity": "perplexity",
    "pseudo_perplexity": "pseudo-perplexity",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy",
    "acc": "accuracy",
    "acc_norm": "accuracy, by length",
    "f1": "F1",
    "f1_macro": "F1, macro",
    "f1_micro": "F1, micro",
    "matthews_correlation": "Matthews' correlation",
    "pearson": "Pearson's correlation",
    "spearman": "Spearman's correlation",
    "mse": "mean squared error",
    "mrr": "mean reciprocal rank",
    "mrr_at_10": "MRR@10",
    "ndcg_at_10": "nDCG@10",
    "recall_at_1": "recall@1",
    "recall_at_10": "recall@10",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
}


def score_name(score: str) -> str:
    """A score's name for people; of one that nobody named its own, with spaces."""
    return SCORE_NAMES.get(score, score.replace("_", " "))
