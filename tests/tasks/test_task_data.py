"""Examples: how long they are, the largest of them, and what the configuration is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pretrain.config import validated
from pretrain.config_task import TuningConfig
from pretrain.tasks import make_task
from pretrain.tasks.examples import TaskData
from pretrain.tasks.rows import Row
from tests.tasks.small_tokenizers import wordpiece

TEXTS = ["cat", "the old cat sat on the mat", "who", "where did she go after the war"]
VALUES: list[dict[str, Any]] = [
    {"anchor": text, "positive": other, "choices": [text, other, "a"][: 2 + place % 2], "label": place % 2}
    for place, (text, other) in enumerate(zip(TEXTS, reversed(TEXTS), strict=True))
]


@pytest.mark.parametrize(
    ("task", "inputs", "tokens"),
    [
        ({"kind": "classification", "text": "anchor"}, 1, 24),
        ({"kind": "multiple-choice", "question": "anchor"}, 3, 72),
        ({"kind": "embeddings"}, 2, 48),
        ({"kind": "embeddings", "negative": "anchor"}, 3, 72),
        ({"kind": "text-to-text", "source": "anchor", "target": "positive", "max_target_length": 10}, 1, 34),
    ],
)
def test_all_inputs_of_an_example_count(task: dict[str, Any], inputs: int, tokens: int) -> None:
    given = {"name": "x", "task": {"train": ["a"], "max_length": 24, **task}, "train": {"steps": 1, "batch_size": 5}}
    config = validated(TuningConfig, given, "test")
    rows = [Row(values, f"a:{place}") for place, values in enumerate(VALUES)]
    made = make_task(config.task, wordpiece(), causal=False)
    made.fit(rows)
    examples = made.encode(rows, training=True)
    assert max(example.num_inputs for example in examples) == inputs
    told = config.with_inputs(inputs).of_seed(3)
    assert told.row_tokens == tokens
    assert told.tokens_per_step == 5 * tokens
    assert max(example.length for example in examples) <= tokens
    data = TaskData(examples, made.collate, 2, 0, {})
    every = made.collate(examples)
    for rows_a_pass in (len(examples), 3 * len(examples)):
        largest = data.largest(rows_a_pass)
        assert {name: array.shape[1:] for name, array in largest.arrays.items()} == {
            name: array.shape[1:] for name, array in every.items()
        }
        assert len(largest.arrays["input_ids"]) == rows_a_pass
    longest = max(range(len(examples)), key=lambda number: examples[number].length)
    np.testing.assert_array_equal(data.largest(1).row_ids[:, 2], [examples[longest].row])
