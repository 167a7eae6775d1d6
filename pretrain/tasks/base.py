"""What a task is: rows to examples, outputs to a loss, outputs to predictions, predictions to scores.

What lives here: the shape that all tasks have, and what most of them share. What must not: any one task.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.config_task import TaskSection
from pretrain.ranks import Ranks
from pretrain.tasks.examples import Example, is_target, padded
from pretrain.tasks.rows import Row

_TOKENS_A_BATCH = 16_384  # of a forward pass without gradients


@dataclass(frozen=True)
class Evaluated:
    """The scores of some rows, and what the model said of each, in their order: JSON values, None where nothing."""

    scores: dict[str, float]
    predictions: list[Any]


@dataclass(frozen=True)
class Evaluation:
    """What is scored, by what, and where.

    Attributes:
        model: in evaluation mode.
        rows: of a part.
        examples: made of them.
        device: where the model is.
        ranks: the processes that share the work; all of them get the same scores.
        look: called before each batch, equally often on each process; it may raise.
        part: validation or test, where the best model is scored at the end; None during training.
    """

    model: nn.Module
    rows: Sequence[Row]
    examples: Sequence[Example]
    device: torch.device
    ranks: Ranks
    look: Callable[[], None] = lambda: None
    part: str | None = None


class Task(ABC):
    """One kind of task, made for its rows and a tokenizer.

    Attributes:
        section: its part of the configuration.
        tokenizer: of the model.
        causal: whether the model is a decoder.
        notes: lines that a person should know about the rows: what was left out or cut.
    """

    auto_class: ClassVar[str]
    """The Auto class of transformers that has the head."""

    def __init__(self, section: TaskSection, tokenizer: Any, *, causal: bool) -> None:
        self.section, self.tokenizer, self.causal = section, tokenizer, causal
        self.notes: list[str] = []
        self.tokens_a_batch = _TOKENS_A_BATCH

    @property
    def head(self) -> str:
        """The Auto class for this model: `auto_class`, unless the kind of model decides."""
        return self.auto_class

    # --- what each task says -----------------------------------------------------------------------------------------

    def fit(self, rows: Sequence[Row]) -> None:  # noqa: B027 (most tasks learn nothing)
        """Learn from the training rows what the examples need: the names of labels, say."""

    def model_keys(self) -> dict[str, Any]:
        """Keys of the model's configuration that the task decides."""
        return {}

    @property
    @abstractmethod
    def metric(self) -> str:
        """The score that decides which checkpoint is best; with `-` before it where lower is better."""

    @abstractmethod
    def encode(self, rows: Sequence[Row], *, training: bool) -> list[Example]:
        """The examples of rows; a row may be several, and none where it is left out (say so in `notes`)."""

    @abstractmethod
    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """The sum over the targets among `labels` (`is_target` tells which they are) of what is to be low."""

    @abstractmethod
    def predictions(self, outputs: Any, batch: Mapping[str, Tensor]) -> Sequence[Any]:
        """What the model says of each example of a batch (with its `labels`): plain values that `score` understands."""

    @abstractmethod
    def score(self, rows: Sequence[Row], examples: Sequence[Example], predictions: Sequence[Any]) -> Evaluated:
        """Scores of the rows by the predictions of their examples."""

    def more_scores(self, asked: Evaluation, found: Evaluated) -> Evaluated:
        """`found`, and what follows from it or needs passes of another kind: texts that are written, say."""
        return found

    # --- what they share ---------------------------------------------------------------------------------------------

    def answer_of(self, row: Row) -> Any:
        """What a row says is right, as a JSON value beside the prediction; None where it says nothing."""
        return None

    def prepare_model(self, model: Any) -> None:  # noqa: B027 (most need nothing)
        """Change a model that was just read, before it is trained."""

    def finish(self, directory: Path) -> None:  # noqa: B027 (most need nothing)
        """Add to a published model's directory what its users need beside the model and the tokenizer."""

    def made_of(self) -> dict[str, str]:
        """What decides the examples beside the rows, the section and the tokenizer, by name."""
        return {}

    def given(self, model: Any, inputs: Mapping[str, Any], labels: Tensor) -> Mapping[str, Any]:
        """What the class's forward pass is given for these targets: `inputs`, or more."""
        return inputs

    def call(self, forward: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Any:
        """The outputs of the model's own forward pass for a batch without labels."""
        return forward(**inputs)

    def padding(self) -> dict[str, int]:
        """What fills each input; those that are not named are filled with 0."""
        return {"input_ids": pad_id(self.tokenizer)}

    def collate(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Examples as arrays, padded."""
        return padded(examples, self.padding())

    def evaluate(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        examples: Sequence[Example],
        device: torch.device,
        ranks: Ranks,
        look: Callable[[], None] = lambda: None,
        *,
        part: str | None = None,
    ) -> Evaluated:
        """Score rows by a model in evaluation mode; the arguments are those of `Evaluation`.

        The scores have `loss` too: the mean over the targets.
        """
        total, count = 0.0, 0.0
        said: dict[int, Any] = {}
        for numbers, own in _turns(examples, ranks, self.tokens_a_batch):
            look()
            arrays = self.collate([examples[number] for number in numbers])
            batch = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
            labels = batch.pop("labels")
            with torch.no_grad():
                outputs = model(**self.given(model, batch, labels))
                if not own:
                    continue
                total += float(self.loss(outputs, labels))
            count += float(is_target(labels).sum())
            said |= zip(numbers, self.predictions(outputs, {**batch, "labels": labels}), strict=True)
        total, count = ranks.sum([total, count])
        for others in ranks.gather(said):
            said |= {int(number): one for number, one in others.items()}  # JSON's keys are text
        evaluated = self.score(rows, examples, [said[number] for number in range(len(examples))])
        loss = {"loss": total / count} if count else {}
        found = Evaluated(loss | evaluated.scores, evaluated.predictions)
        return self.more_scores(Evaluation(model, rows, examples, device, ranks, look, part), found)


def prediction_lines(task: Task, rows: Sequence[Row], predictions: Sequence[Any]) -> Iterator[str]:
    """What was said of each row, a line of JSON each, in the order of the rows.

    An object of `row` (its number, from 0), `where` (its file and line), `label` (what the row says is right, where it
    says that) and `prediction` (null for a row that was left out).
    """
    for number, (row, said) in enumerate(zip(rows, predictions, strict=True)):
        answer = task.answer_of(row)
        label = {} if answer is None else {"label": answer}
        line = {"row": number, "where": row.where, **label, "prediction": said}
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _turns(examples: Sequence[Example], ranks: Ranks, tokens: int) -> Iterator[tuple[list[int], bool]]:
    """Numbers of a batch of examples of like length, and whether it is this process's own.

    Every process has equally many turns, as those of a sharded engine meet in each pass: one that has no batch left
    passes the first one again, for nothing.
    """
    order = sorted(range(len(examples)), key=lambda number: -examples[number].length)
    batches = []
    while order:
        size = max(1, tokens // max(1, examples[order[0]].length))
        batches.append(order[:size])
        order = order[size:]
    for start in range(0, len(batches), ranks.world):
        mine = start + ranks.rank
        yield (batches[mine], True) if mine < len(batches) else (batches[0], False)


def pad_id(tokenizer: Any) -> int:
    """What fills up a row: the padding token, of a decoder that has none its end of text."""
    for name in ("pad_token_id", "eos_token_id"):
        if (found := getattr(tokenizer, name, None)) is not None:
            return int(found)
    return 0


def encoded(tokenizer: Any, text: str, pair: str | None, max_length: int, *, parted: bool) -> dict[str, np.ndarray]:
    """A text, or two, as the tokenizer frames them, cut at the end to `max_length` (the longer of two first).

    Args:
        tokenizer: of the model.
        text: the first one.
        pair: the second one.
        max_length: tokens, special ones included.
        parted: whether the tokenizer puts something between two texts; if not, a newline does.
    """
    if pair is not None and not parted:
        pair = "\n" + pair
    made = tokenizer(text, pair, truncation=True, max_length=max_length, verbose=False)
    return {name: np.array(values, dtype=np.int64) for name, values in made.items()}


def parts_pairs(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a special token between two texts."""
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b"))
    both = list(tokenizer("a", "b")["input_ids"])
    for place in range(len(both) - len(first)):
        if both[place : place + len(first)] == list(first):
            rest = both[place + len(first) :]
            return rest[: len(second)] != list(second)
    return True
