"""Fixtures: complete model directories, and sentences of words that their tokenizers know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import WORDS, build, byte_tokenizer, word_tokenizer


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """architecture -> a complete model directory."""
    made = {}
    for architecture in ("gpt2", "llama", "bert", "roberta", "modernbert"):
        made[architecture] = tmp_path_factory.mktemp(architecture)
        build(architecture).save_pretrained(made[architecture])
        tokenizer = byte_tokenizer() if architecture in ("gpt2", "llama") else word_tokenizer()
        tokenizer.save_pretrained(made[architecture])
    return made


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """Fixed sentences of the word tokenizer's words, 3 to 40 words each."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(3, 41, (30,), generator=generator).tolist()
    return [
        " ".join(WORDS[number] for number in torch.randint(0, len(WORDS), (length,), generator=generator))
        for length in lengths
    ]
