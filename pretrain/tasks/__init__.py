"""Fine-tuning tasks: labelled rows to examples, outputs to scores. One file a kind.

What lives here: which kind is made by which class. Imports are late: each kind needs libraries of its own.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pretrain.config_task import TaskConfig

KINDS = {
    "classification": "sentences:Classification",
    "regression": "sentences:Regression",
    "text-to-text": "texts:TextToText",
    "instructions": "instructions:Instructions",
    "token-classification": "tokens:Tokens",
    "question-answering": "answers:Answers",
    "multiple-choice": "choices:choices_for",
    "embeddings": "embeddings:Embeddings",
}


def make_task(section: TaskConfig, tokenizer: Any, *, causal: bool) -> Any:
    """The task that a configuration describes, for a model's tokenizer."""
    module, _, name = KINDS[section.kind].partition(":")
    return getattr(import_module(f"pretrain.tasks.{module}"), name)(section, tokenizer, causal=causal)
