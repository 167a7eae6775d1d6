"""Multiple choice: which of several endings, answers or candidates fits a question.

What lives here: a row to one input a choice, and a score a choice to an answer. What must not: any other kind.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils.generic import ModelOutput

from pretrain.config_task import MultipleChoiceTask
from pretrain.tasks.base import Evaluated, Task, encoded, parts_pairs
from pretrain.tasks.examples import IGNORED, Example, padded
from pretrain.tasks.rows import Row

_READINGS = ("number", "name", "text")


def choices_for(section: MultipleChoiceTask, tokenizer: Any, *, causal: bool) -> Choices:
    """Multiple choice of an encoder, or of a decoder: these have no class for it in transformers."""
    return (DecoderChoices if causal else Choices)(section, tokenizer, causal=causal)


class Choices(Task):
    """One choice of a row: the question beside each of them, a score each, a softmax over the scores. Accuracy.

    Rows may differ in their number of choices. A label is a number from 0, a name (the column of the choice, the name
    that the row gives it, or a letter from A) or the text of the choice: whichever fits all training rows. A list of
    labels means that any of them is right; the first is trained on.
    """

    auto_class: ClassVar[str] = "AutoModelForMultipleChoice"
    section: MultipleChoiceTask

    def fit(self, rows: Sequence[Row]) -> None:
        """See how labels are written."""
        self.parted = parts_pairs(self.tokenizer)
        left = list(_READINGS)
        for row in rows:
            names, texts = self._choices(row)
            fitting = [reading for reading in left if self._right(row, names, texts, reading)]
            if not fitting:
                raise ValueError(
                    f"{row.where}: the label {row[self.section.label]!r} is no {' or '.join(left)} of the {len(texts)} "
                    f"choices (numbers are from 0, names {', '.join(names)}); check task.label"
                )
            left = fitting
        self.reading = left[0]

    @property
    def metric(self) -> str:
        """Accuracy."""
        return "accuracy"

    # --- rows to inputs ----------------------------------------------------------------------------------------------

    def _choices(self, row: Row) -> tuple[list[str], list[str]]:
        """The names and the texts of a row's choices."""
        chosen = self.section.choices
        if isinstance(chosen, tuple):
            names, texts = [str(column) for column in chosen], [row[column] for column in chosen]
        else:
            value = row[chosen]
            if isinstance(value, Mapping) and "text" in value:  # {text: [...], label: [...]}
                names, texts = [str(name) for name in value.get("label", ())], value["text"]
            else:
                names, texts = [], value
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts) or len(texts) < 2:
            raise ValueError(f"{row.where}: the choices are {str(texts)[:60]!r}; two texts or more are needed")
        return names or list(string.ascii_uppercase[: len(texts)]), list(texts)

    def _right(self, row: Row, names: Sequence[str], texts: Sequence[str], reading: str) -> list[int]:
        """The numbers of the right choices, by one reading of the label; none where it does not fit."""
        value = row[self.section.label]
        right = []
        for label in value if isinstance(value, list | tuple) else [value]:
            text = str(label).strip()
            if reading == "number" and text.isdecimal() and int(text) < len(texts):
                right.append(int(text))
            elif reading == "name" and text.upper() in (known := [name.upper() for name in names]):
                right.append(known.index(text.upper()))
            elif reading == "text" and text in (known := [one.strip() for one in texts]):
                right.append(known.index(text))
        return right

    def _row(self, row: Row) -> tuple[list[str], list[int]]:
        """The choices of a row, and the numbers of the right ones."""
        names, texts = self._choices(row)
        right = self._right(row, names, texts, self.reading)
        if not right:
            raise ValueError(
                f"{row.where}: the label {row[self.section.label]!r} is no {self.reading} of its {len(texts)} choices; "
                "those of the training rows are"
            )
        return texts, right

    def encode(self, rows: Sequence[Row], *, training: bool) -> list[Example]:
        """One example a row: inputs (choices, length); label (choices,) with the number of choices at the right one.

        So each row is one target, and the loss knows which scores are of choices and which of padding.
        """
        pads = self.padding()
        examples = []
        for place, row in enumerate(rows):
            texts, right = self._row(row)
            question = row.text(self.section.question).strip()
            made = [
                Example(
                    encoded(self.tokenizer, question, text, self.section.max_length, parted=self.parted), np.array(0), 0
                )
                for text in texts
            ]
            inputs = padded(made, pads, multiple=1)
            inputs.pop("labels")
            label = np.full(len(texts), IGNORED, dtype=np.int64)
            label[right[0]] = len(texts)
            examples.append(Example(inputs, label, place, extra=right))
        return examples

    def collate(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Examples as arrays: inputs (B, choices, L), labels (B, choices)."""
        arrays = padded(examples, self.padding())
        if "attention_mask" in arrays:  # a choice that is padding would have no token to attend to, and be NaN
            arrays["attention_mask"][..., 0] = 1
        return arrays

    # --- outputs to choices ------------------------------------------------------------------------------------------

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """Cross-entropy over the choices of each row."""
        logits = outputs.logits.float()  # (B, choices)
        known = (labels != IGNORED).any(-1)
        counts, right = labels.max(-1).values, labels.argmax(-1)
        padding = torch.arange(logits.shape[1], device=logits.device) >= counts[:, None]
        scores = logits.masked_fill(padding & known[:, None], -torch.inf)
        return F.cross_entropy(scores[known], right[known], reduction="sum")

    def predictions(self, outputs: Any, batch: Mapping[str, Tensor]) -> Sequence[Any]:
        """The scores of a row's choices, and of padding after them."""
        scores: list[list[float]] = outputs.logits.float().tolist()
        return scores

    def answer_of(self, row: Row) -> Any:
        """The number of the right choice, from 0; a list where several are right."""
        right = self._row(row)[1]
        return right if len(right) > 1 else right[0]

    def score(self, rows: Sequence[Row], examples: Sequence[Example], predictions: Sequence[Any]) -> Evaluated:
        """Accuracy, and the numbers of the choices."""
        said = [
            int(np.argmax(scores[: len(example.label)])) for example, scores in zip(examples, predictions, strict=True)
        ]
        right = [number in example.extra for number, example in zip(said, examples, strict=True)]
        return Evaluated({"accuracy": float(np.mean(right))}, list(said))


class DecoderChoices(Choices):
    """Multiple choice of a decoder: its classifier's one output, read at the last token, is the score of a choice."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    def model_keys(self) -> dict[str, Any]:
        """One output."""
        return {"num_labels": 1}

    def call(self, forward: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Any:
        """All choices of all rows as one batch; the outputs have `logits` (B, choices) alone."""
        shape = inputs["input_ids"].shape[:2]
        outputs = forward(**{name: array.flatten(0, 1) for name, array in inputs.items()})
        return ModelOutput(logits=outputs.logits.view(*shape))
