"""Encoded examples, and the batch of a step of a fine-tuning: a pure function of (examples, seed, step).

What lives here: padding, the order of examples, the data plane that the trainer is handed. What must not: what a label
means, or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pretrain.data.order import IntArray, rows_of_samples
from pretrain.files import sha256_json

IGNORED = -100
"""What stands among labels that are whole numbers where there is no target; among others NaN does."""


@dataclass(frozen=True)
class Example:
    """One input of a model.

    Attributes:
        inputs: by the names of the model's `forward`, (length,) each, or (choices, length).
        label: what it is to predict: a number, or (targets,) of them; None where it is not known.
        row: number of the row that it was made of; a long row may be several examples.
        extra: what makes an answer of a prediction.
        written: tokens that a decoder reads beside the inputs.
    """

    inputs: Mapping[str, np.ndarray]
    label: np.ndarray
    row: int
    extra: Any = None
    written: int = 0

    @property
    def length(self) -> int:
        """Tokens, with padding between choices."""
        return int(self.inputs["input_ids"].size) + self.written

    @property
    def num_inputs(self) -> int:
        """Texts side by side: choices, or those of a pair."""
        ids = self.inputs["input_ids"]
        return len(ids) if ids.ndim > 1 else 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of every dimension of its arrays: what a batch of it and others is padded to, at least."""
        return tuple(size for array in (*self.inputs.values(), self.label) for size in array.shape)


@dataclass(frozen=True)
class TaskBatch:
    """Rows of a step, as the trainer takes them."""

    arrays: Mapping[str, np.ndarray]
    num_targets: int
    num_tokens: int
    row_ids: np.ndarray
    item_counts: Mapping[str, int] = field(default_factory=dict)


Collate = Callable[[Sequence[Example]], dict[str, np.ndarray]]
"""Examples -> arrays by the names of `forward`, with `labels`; `is_target` tells which of them are known."""


def is_target(labels: Any) -> Any:
    """Where an array or tensor of labels holds a target: of whole numbers all but -100, of others all but NaN.

    A number that is to be predicted may be -100.
    """
    floating = labels.dtype.kind == "f" if isinstance(labels, np.ndarray) else labels.dtype.is_floating_point
    return labels == labels if floating else labels != IGNORED


def stacked(arrays: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """Arrays of one number of dimensions as one, filled up at the end of each dimension to the largest."""
    shape = tuple(max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True))
    whole = np.full((len(arrays), *shape), fill, dtype=np.result_type(*arrays))
    for row, array in zip(whole, arrays, strict=True):
        row[tuple(slice(size) for size in array.shape)] = array
    return whole


def padded(examples: Sequence[Example], pad: Mapping[str, int], *, multiple: int = 8) -> dict[str, np.ndarray]:
    """The inputs of examples side by side, padded on the right to a multiple; `labels` as they are.

    Args:
        examples: with the same inputs.
        pad: what fills an input; 0 where it is not named.
        multiple: of the padded length.
    """
    made: dict[str, np.ndarray] = {}
    for name in examples[0].inputs:
        array = stacked([example.inputs[name] for example in examples], pad.get(name, 0))
        short = -array.shape[-1] % multiple
        edges = [(0, 0)] * (array.ndim - 1) + [(0, short)]
        made[name] = np.pad(array, edges, constant_values=pad.get(name, 0))
    labels = [example.label for example in examples]
    fill = np.nan if labels[0].dtype.kind == "f" else IGNORED
    made["labels"] = stacked(labels, fill) if labels[0].ndim else np.stack(labels)
    return made


@dataclass
class TaskData:
    """The training examples in the order of a seed; each once an epoch.

    Attributes:
        examples: those of the training rows.
        collate: makes arrays of some.
        rows_per_batch: examples a step, over all processes.
        seed: of the order.
        made_of: all that decides the examples, by name.
    """

    examples: Sequence[Example]
    collate: Collate
    rows_per_batch: int
    seed: int
    made_of: Mapping[str, Any]

    @property
    def num_rows(self) -> int:
        """Examples an epoch."""
        return len(self.examples)

    def locate(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        """(epoch, example) of samples of the endless stream."""
        return rows_of_samples(samples, self.num_rows, self.seed)

    def batch(self, step: int, rows: slice | None = None) -> TaskBatch:
        """The global batch of `step` (from 0), or the given rows of it."""
        first = step * self.rows_per_batch
        samples = np.arange(first, first + self.rows_per_batch, dtype=np.int64)[rows or slice(None)]
        return self._made(*self.locate(samples))

    def largest(self, rows: int) -> TaskBatch:
        """So many examples that are padded to the sizes of the largest ones, and among which the longest is."""
        sizes = np.array([example.sizes for example in self.examples])  # (examples, dimensions)
        longest = int(np.argmax([example.length for example in self.examples]))
        chosen = list(dict.fromkeys([longest, *sizes.argmax(0).tolist(), *range(self.num_rows)]))
        numbers = np.resize(np.array(chosen), rows)
        return self._made(np.zeros_like(numbers), numbers)

    def _made(self, epochs: IntArray, numbers: IntArray) -> TaskBatch:
        chosen = [self.examples[number] for number in numbers]
        arrays = self.collate(chosen)
        ids = np.stack([np.zeros_like(epochs), epochs, np.array([one.row for one in chosen])], axis=1)
        return TaskBatch(
            arrays=arrays,
            num_targets=int(is_target(arrays["labels"]).sum()),
            num_tokens=sum(example.length for example in chosen),
            row_ids=ids,
        )

    def for_run(self, total_steps: int) -> list[str]:
        """Nothing of a batch depends on the length of the run."""
        return []

    def state(self, samples_seen: int) -> dict[str, Any]:
        """What a checkpoint must hold of the data."""
        return {
            "fingerprint": sha256_json(dict(self.made_of)),
            "seed": self.seed,
            "samples_seen": samples_seen,
            "made_of": dict(self.made_of),
        }

    def check(self, state: dict[str, Any]) -> None:
        """Refuse a state that other examples, or another order, made.

        Raises:
            ValueError: lists each difference.
        """
        was, now = {**state["made_of"], "seed": state["seed"]}, {**self.made_of, "seed": self.seed}
        different = [
            f"{key} was {was.get(key)}, is {now.get(key)}"
            for key in sorted({*was, *now})
            if was.get(key) != now.get(key)
        ]
        if different:
            raise ValueError(
                f"the checkpoint saw other examples: {'; '.join(different)}; put them back as they were, or start a "
                "run under another name="
            )
