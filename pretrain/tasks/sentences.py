"""One text or two, and a label, several labels, or a number.

What lives here: classification (one label, or several) and regression. What must not: how a metric is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.config_task import ClassificationTask, LabelledSentences, RegressionTask
from pretrain.tasks import metrics
from pretrain.tasks.base import Evaluated, Task, encoded, parts_pairs
from pretrain.tasks.examples import IGNORED, Example, is_target
from pretrain.tasks.rows import Row


class _Sentences(Task):
    """What classification and regression share: their inputs."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    section: LabelledSentences

    def _inputs(self, rows: Sequence[Row]) -> list[dict[str, np.ndarray]]:
        section, pair = self.section, self.section.text_pair
        parted = pair is None or parts_pairs(self.tokenizer)
        return [
            encoded(
                self.tokenizer,
                row.text(section.text),
                None if pair is None else row.text(pair),
                section.max_length,
                parted=parted,
            )
            for row in rows
        ]


class Classification(_Sentences):
    """One label of a row, or any number of them.

    With one label: accuracy, macro F1, Matthews' correlation, and with two classes F1 of the second. With several:
    micro and macro F1, and the share of rows whose labels are all right. The default metric is accuracy, or micro F1.
    """

    section: ClassificationTask

    def fit(self, rows: Sequence[Row]) -> None:
        """Take the names of the labels from the configuration, or from the training rows."""
        section = self.section
        if isinstance(section.labels, str):
            path = Path(section.root or ".") / section.labels
            try:
                names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            except OSError as error:
                raise ValueError(f"task.labels: `{path}` cannot be read ({error.strerror}); check the path") from None
        elif section.labels is not None:
            names = list(section.labels)
        elif rows and not isinstance(section.label, int) and rows[0].names.get(section.label):
            names = list(rows[0].names[section.label] or ())  # a Hub dataset's own order: F1 is of its second label
        else:
            found = {name for row in rows for name in self._names(row)}
            names = sorted(found, key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))
        self.labels = [name for name in names if name not in section.ignore_labels]
        if len(self.labels) < 2:
            raise ValueError(
                f"task.label: column `{section.label}` of the training rows has {len(self.labels)} label(s) "
                f"({', '.join(self.labels)}); a classification needs two"
            )

    def model_keys(self) -> dict[str, Any]:
        """Names of the labels, and the kind of problem."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: number for number, name in enumerate(self.labels)},
            "problem_type": "multi_label_classification" if self.section.multi_label else "single_label_classification",
        }

    @property
    def metric(self) -> str:
        """Accuracy, or of several labels micro F1."""
        return "f1_micro" if self.section.multi_label else "accuracy"

    def _names(self, row: Row) -> list[str]:
        """The labels of a row, as text."""
        value = row[self.section.label]
        single = not self.section.multi_label  # of several labels none is an answer too
        if value is None or (single and not str(value).strip() and "" not in self.section.ignore_labels):
            remedy = "" if value is None else ", or leave such rows out with task.ignore_labels: ['']"
            raise ValueError(
                f"{row.where}: column `{self.section.label}` is empty; give a label or take the row out{remedy}"
            )
        if single:
            return [str(value).strip()]
        entries = value if isinstance(value, list | tuple) else str(value).split(self.section.label_separator)
        return [str(entry).strip() for entry in entries if str(entry).strip()]

    def encode(self, rows: Sequence[Row], *, training: bool) -> list[Example]:
        """One example a row; rows with a label of `ignore_labels` are left out."""
        kept = self.kept(rows)
        if left := len(rows) - len(kept):
            ignored = ", ".join(self.section.ignore_labels)
            self.notes.append(
                f"{left:,} of {len(rows):,} rows have a label of task.ignore_labels ({ignored}): left out"
            )
        places = {id(row): place for place, row in enumerate(rows)}
        made = zip(kept, self._inputs(kept), strict=True)
        return [Example(inputs, self.label_of(row), places[id(row)]) for row, inputs in made]

    def kept(self, rows: Sequence[Row]) -> list[Row]:
        """The rows without a label of `ignore_labels`."""
        return [row for row in rows if not set(self._names(row)) & set(self.section.ignore_labels)]

    def label_of(self, row: Row) -> np.ndarray:
        """The number of a row's label, () int64; of several labels (labels,) float32 of 0 and 1."""
        numbers = {name: number for number, name in enumerate(self.labels)}
        chosen = [self._number(name, numbers, row) for name in self._names(row)]
        if not self.section.multi_label:
            return np.array(chosen[0], dtype=np.int64)
        label = np.zeros(len(self.labels), dtype=np.float32)
        label[chosen] = 1.0
        return label

    def _number(self, name: str, numbers: Mapping[str, int], row: Row) -> int:
        """The number of a label; labels that are numbers already may be written so where names are given."""
        if name in numbers:
            return numbers[name]
        if name.isdecimal() and int(name) < len(self.labels):
            return int(name)
        raise ValueError(
            f"{row.where}: the label `{name}` is none of the {len(self.labels)} known ones "
            f"({', '.join(self.labels[:10])}{', ...' if len(self.labels) > 10 else ''}); name them all in task.labels, "
            "or leave such rows out with task.ignore_labels"
        )

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """Cross-entropy; of several labels the binary one, a target each."""
        logits = outputs.logits.float()  # (B, labels)
        if self.section.multi_label:
            known = is_target(labels)
            return F.binary_cross_entropy_with_logits(logits[known], labels[known].float(), reduction="sum")
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    def predictions(self, outputs: Any, batch: Mapping[str, Tensor]) -> Sequence[Any]:
        """The number of the likeliest label, or the numbers of all that pass the threshold."""
        if not self.section.multi_label:
            numbers: list[int] = outputs.logits.argmax(-1).tolist()
            return numbers
        chosen = torch.sigmoid(outputs.logits.float()) >= self.section.threshold
        return [row.nonzero().flatten().tolist() for row in chosen.cpu()]

    def score(self, rows: Sequence[Row], examples: Sequence[Example], predictions: Sequence[Any]) -> Evaluated:
        """Scores over the examples; what the model said by the labels' names."""
        truth = np.stack([example.label for example in examples])
        if self.section.multi_label:
            said = np.zeros_like(truth, dtype=np.int64)
            for place, chosen in enumerate(predictions):
                said[place, chosen] = 1
            scores = metrics.multi_label(truth.astype(np.int64), said)
        else:
            scores = metrics.single_label(truth, np.array(predictions), len(self.labels))
        named: list[Any] = [None] * len(rows)  # of a row with a label of `ignore_labels`
        for example, chosen in zip(examples, predictions, strict=True):
            several = self.section.multi_label
            named[example.row] = [self.labels[number] for number in chosen] if several else self.labels[chosen]
        return Evaluated(scores, named)

    def answer_of(self, row: Row) -> Any:
        """The label's name, or the labels' names; of a row with a label of `ignore_labels` that one."""
        numbers = {name: number for number, name in enumerate(self.labels)}
        names = [
            name if name in self.section.ignore_labels else self.labels[self._number(name, numbers, row)]
            for name in self._names(row)
        ]
        return names if self.section.multi_label else names[0]


class Regression(_Sentences):
    """A number of a row: Pearson's and Spearman's correlation, and the mean squared error."""

    section: RegressionTask

    def model_keys(self) -> dict[str, Any]:
        """One output."""
        return {"num_labels": 1, "problem_type": "regression"}

    @property
    def metric(self) -> str:
        """Pearson's correlation."""
        return "pearson"

    def fit(self, rows: Sequence[Row]) -> None:
        """The mean and spread of the training numbers: the head learns them standardized."""
        numbers = np.array([self.number_of(row) for row in rows])
        self.mean, self.spread = float(numbers.mean()), float(numbers.std()) or 1.0

    def prepare_model(self, model: Any) -> None:
        """Begin at the mean, where the head has a bias: it would need many steps to get there."""
        heads = [
            module for module in model.modules() if isinstance(module, torch.nn.Linear) and module.out_features == 1
        ]
        if heads and heads[-1].bias is not None:
            with torch.no_grad():
                heads[-1].bias.fill_(self.mean)

    def number_of(self, row: Row) -> float:
        """The number of a row.

        Raises:
            ValueError: when its label is none.
        """
        value = row[self.section.label]
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not np.isfinite(number):
            raise ValueError(f"{row.where}: the label `{value}` is no number; give one, or take the row out")
        if abs(number) > float(np.finfo(np.float32).max):
            raise ValueError(f"{row.where}: the label `{value}` is a number too large for a model; scale the column")
        return number

    def encode(self, rows: Sequence[Row], *, training: bool) -> list[Example]:
        """One example a row."""
        labels = [np.array(self.number_of(row), dtype=np.float32) for row in rows]
        inputs = self._inputs(rows)
        return [Example(one, label, place) for place, (one, label) in enumerate(zip(inputs, labels, strict=True))]

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """Squared error, over the variance of the training numbers."""
        known = is_target(labels)
        logits = outputs.logits.float().squeeze(-1)
        errors: Tensor = (logits[known] - labels[known].float()) / self.spread
        return errors.pow(2).sum()

    def predictions(self, outputs: Any, batch: Mapping[str, Tensor]) -> Sequence[Any]:
        """The numbers."""
        numbers: list[float] = outputs.logits.float().squeeze(-1).tolist()
        return numbers

    def score(self, rows: Sequence[Row], examples: Sequence[Example], predictions: Sequence[Any]) -> Evaluated:
        """Correlations over the rows."""
        truth = np.array([float(example.label) for example in examples])
        return Evaluated(metrics.regression(truth, np.array(predictions)), list(predictions))

    def answer_of(self, row: Row) -> float:
        """Its number."""
        return self.number_of(row)
