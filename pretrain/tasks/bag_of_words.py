"""The baseline that a pretrained model should beat: logistic regression over words.

What lives here: the same rows and scores as a task, without a neural network. What must not: torch.

TF-IDF over words and pairs of words, or characters and pairs of them where the text has no spaces; of two texts each
its own, and what they share. A label by logistic regression, several by one regression each, a number by ridge
regression, a word's tag by the word, its ending and its neighbours. The strength of the penalty is chosen on the
validation rows; the test rows are scored once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pretrain.config_task import ClassificationTask, RegressionTask, TaskConfig, TokenTask
from pretrain.tasks import metrics
from pretrain.tasks.metrics import library
from pretrain.tasks.reading import Parts
from pretrain.tasks.rows import Row

NAME = "bag-of-words"
"""What the command line says in place of a model."""

_STRENGTHS = (0.1, 1.0, 10.0, 100.0)
_PARTS = ("train", "validation", "test")
_HAN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


def score_baseline(section: TaskConfig, parts: Parts) -> dict[str, dict[str, float]]:
    """Scores of the validation rows, and of the test rows where there are any, by `validation` and `test`.

    Raises:
        ValueError: when the task is none of classification, regression and token classification.
    """
    if isinstance(section, TokenTask):
        return _tokens(section, parts)
    if isinstance(section, ClassificationTask | RegressionTask):
        return _sentences(section, parts)
    raise ValueError(
        f"{NAME}: it answers classification, regression and token-classification; task.kind is {section.kind}"
    )


def _sentences(section: ClassificationTask | RegressionTask, parts: Parts) -> dict[str, dict[str, float]]:
    from pretrain.tasks.sentences import Classification, Regression

    rows = {name: list(getattr(parts, name)) for name in _PARTS}
    task: Classification | Regression
    if isinstance(section, RegressionTask):
        task = told = Regression(section, None, causal=False)
        labels = {name: np.array([told.number_of(row) for row in some]) for name, some in rows.items()}
        score: Callable[..., dict[str, float]] = metrics.regression
    else:
        task = known = Classification(section, None, causal=False)
        known.fit(rows["train"])
        rows = {name: known.kept(some) for name, some in rows.items()}
        labels = {name: np.array([known.label_of(row) for row in some]) for name, some in rows.items()}
        if section.multi_label:
            score = metrics.multi_label
        else:
            count = len(known.labels)

            def score(truth: np.ndarray, said: np.ndarray) -> dict[str, float]:
                return metrics.single_label(truth, said, count)

    features = _features(section, rows)

    def fitted(strength: float) -> _Scorer:
        model = _estimator(section, strength).fit(features["train"], labels["train"])
        return lambda name: score(labels[name], model.predict(features[name]))

    return _best(fitted, section.metric or task.metric, test=bool(rows["test"]))


_Scorer = Callable[[str], dict[str, float]]
"""Scores of a part, by its name."""


def _best(fitted: Callable[[float], _Scorer], metric: str, *, test: bool) -> dict[str, dict[str, float]]:
    """Scores by the strength that is best on validation, the smallest of those that are; the test rows once."""
    name = metric.removeprefix("-")
    sign = -1.0 if metric.startswith("-") else 1.0
    best: dict[str, dict[str, float]] = {}
    chosen: _Scorer | None = None
    for strength in sorted(_STRENGTHS):
        scorer = fitted(strength)
        found = scorer("validation")
        if name not in found:
            raise ValueError(f"task.metric: there is no score `{name}` of {NAME}; there are {', '.join(found)}")
        if not best or sign * found[name] > sign * best["validation"][name]:
            best, chosen = {"validation": found}, scorer
    assert chosen is not None
    return best | ({"test": chosen("test")} if test else {})


def _estimator(section: ClassificationTask | RegressionTask, strength: float) -> Any:
    linear = library("sklearn.linear_model")
    if isinstance(section, RegressionTask):
        return linear.Ridge(alpha=1.0 / strength)
    logistic = linear.LogisticRegression(C=strength, max_iter=1000)
    return library("sklearn.multiclass").OneVsRestClassifier(logistic) if section.multi_label else logistic


def _features(section: ClassificationTask | RegressionTask, rows: dict[str, list[Row]]) -> dict[str, Any]:
    """A sparse matrix of each part: the first text, the second, and what both have."""
    sparse = library("scipy.sparse")
    text = library("sklearn.feature_extraction.text")
    first = {name: [row.text(section.text) for row in some] for name, some in rows.items()}
    characters = sum(bool(_HAN.search(one)) for one in first["train"]) * 2 > len(first["train"])
    how: dict[str, Any] = {"analyzer": "char"} if characters else {"token_pattern": r"(?u)\b\w+\b|[^\w\s]"}
    columns = [first]
    if section.text_pair is not None:
        pair = section.text_pair
        columns.append({name: [row.text(pair) for row in some] for name, some in rows.items()})
    made: dict[str, list[Any]] = {name: [] for name in rows}
    for column in columns:
        words = text.TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, **how).fit(column["train"])
        for name, some in column.items():
            made[name].append(words.transform(some) if some else None)
    if len(columns) == 2:
        both = text.CountVectorizer(binary=True, **how).fit([*columns[0]["train"], *columns[1]["train"]])
        for name in rows:
            if not rows[name]:
                continue
            left, right = both.transform(columns[0][name]), both.transform(columns[1][name])
            shared = left.multiply(right)
            sizes = np.maximum(1, np.asarray((left + right).sign().sum(1)))
            made[name] += [shared, sparse.csr_matrix(np.asarray(shared.sum(1)) / sizes)]
    return {name: sparse.hstack(some).tocsr() if rows[name] else None for name, some in made.items()}


def _tokens(section: TokenTask, parts: Parts) -> dict[str, dict[str, float]]:
    from pretrain.tasks.tokens import Tokens

    task = Tokens(section, None, causal=False)
    task.learn_tags(parts.train)
    words: dict[str, list[list[str]]] = {}
    tags: dict[str, list[list[str]]] = {}
    for name in _PARTS:
        pairs = [task.words_and_tags(row) for row in getattr(parts, name)]
        words[name], tags[name] = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    vectors = library("sklearn.feature_extraction").DictVectorizer()
    linear = library("sklearn.linear_model")
    seen = {"train": vectors.fit_transform(_word_features(words["train"]))}
    seen |= {name: vectors.transform(_word_features(words[name])) for name in _PARTS[1:] if any(words[name])}
    truth = [tag for sentence in tags["train"] for tag in sentence]

    def fitted(strength: float) -> _Scorer:
        model = linear.LogisticRegression(C=strength, max_iter=300).fit(seen["train"], truth)

        def score(name: str) -> dict[str, float]:
            flat = iter(model.predict(seen[name]) if name in seen else ())
            return task.scores_of(tags[name], [[str(next(flat)) for _ in sentence] for sentence in tags[name]])

        return score

    return _best(fitted, section.metric or task.metric, test=bool(parts.test))


def _word_features(sentences: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    features = []
    for sentence in sentences:
        for place, word in enumerate(sentence):
            before = sentence[place - 1].lower() if place else "<begin>"
            after = sentence[place + 1].lower() if place + 1 < len(sentence) else "<end>"
            features.append(
                {
                    "word": word.lower(),
                    "ending": word[-3:].lower(),
                    "beginning": word[:2].lower(),
                    "capital": word[:1].isupper(),
                    "digit": any(letter.isdigit() for letter in word),
                    "before": before,
                    "after": after,
                }
            )
    return features
