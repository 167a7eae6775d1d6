"""Small texts, and a run of each objective over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pretrain.config import RunConfig, config_from_dict
from pretrain.prepare import prepare_data
from pretrain.tokenizer import train_tokenizer

TEXT = "the quick brown fox jumps over a lazy dog while seventeen birds sing. Nobody minded it at all! Why? Perhaps"
WORDS = TEXT.split()
OBJECTIVES = {
    "words": ("bert", {"kind": "mlm", "whole_words": True, "final_rate": 0.5, "rate": 0.1}),
    "spans": ("bert", {"kind": "mlm", "span": 3.0}),
    "order": ("bert", {"kind": "mlm", "sentences": "order"}),
    "next": ("bert", {"kind": "mlm", "sentences": "next", "whole_words": True}),
    "rtd": ("electra", {"kind": "rtd"}),
    "corruption": ("t5", {"kind": "span-corruption"}),
    "translation": ("transformer", {"kind": "translation"}),
}


def write_text(directory: Path) -> None:
    """Documents of 1 to 90 words, and pairs, one of them too long for a row."""
    generator = np.random.default_rng(0)
    documents = [" ".join(generator.choice(WORDS, generator.integers(1, 90))) for _ in range(150)]
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    pairs = [
        (
            " ".join(generator.choice(WORDS, generator.integers(1, 9))),
            " ".join(generator.choice(WORDS, generator.integers(1, 9))),
        )
        for _ in range(150)
    ]
    lines = [
        "en\tid\tzh",
        *(f"{a}\t{at}\t{b}" for at, (a, b) in enumerate(pairs)),
        "\t1\tnothing",
        f"a\t2\t{'b ' * 300}",
    ]
    (directory / "pairs.tsv").write_text("\n".join(lines) + "\n")


def run_of(text: Path, out: Path | str, name: str, **changes: Any) -> RunConfig:
    """A run; `changes` are keys of its sections."""
    architecture, objective = OBJECTIVES[name]
    data: dict[str, Any] = {"train": [str(text / "text.jsonl")], "sequence_length": 32, "validation": {"fraction": 0.2}}
    if name == "translation":
        data |= {"train": [str(text / "pairs.tsv")], "text_field": ["en", "zh"]}
    data |= {"max_documents_per_row": 8} | changes.pop("data", {})
    return config_from_dict(
        {
            "name": name,
            "out": str(out),
            "tokenizer": {"algorithm": "byte-bpe", "vocab_size": 512},
            "data": data,
            "model": {
                "architecture": architecture,
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
            "objective": objective | changes.pop("objective", {}),
            "optimizer": {"lr": 1e-3},
            "train": {"batch_tokens": 8 * data["sequence_length"], "steps": 10},
        }
    )


def prepared(config: RunConfig) -> RunConfig:
    """The run with its tokenizer and its data."""
    train_tokenizer(config, console=Console(quiet=True))
    prepare_data(config)
    return config
