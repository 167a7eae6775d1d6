"""Pretraining inside the Hugging Face stack: raw text in, a model that plain `transformers` loads out.

The road, one verb a stage (see `pretrain --help`):

    text --tokenizer--> runs/NAME/tokenizer --prepare--> runs/NAME/data --train--> runs/NAME/train
         --evaluate--> scores --export--> runs/NAME/export, a directory for AutoModel and AutoTokenizer

The names below are the public Python surface. They are imported on first use, so `import pretrain` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_SURFACE = {
    "load_config": "pretrain.config",
    "RunConfig": "pretrain.config",
    "train_tokenizer": "pretrain.tokenizer",
    "prepare_data": "pretrain.prepare",
    "build_model": "pretrain.building",
    "build_data": "pretrain.train",
    "build_optimizer": "pretrain.train",
    "build_evaluators": "pretrain.train",
    "build_trainer": "pretrain.train",
    "Trainer": "pretrain.training.trainer",
    "export_model": "pretrain.export",
    "evaluate_model": "pretrain.evaluate",
}

__all__ = ["__version__", *_SURFACE]


def __getattr__(name: str) -> Any:
    if name in _SURFACE:
        return getattr(import_module(_SURFACE[name]), name)
    raise AttributeError(f"module 'pretrain' has no attribute {name!r}")
