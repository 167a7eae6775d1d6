"""Transformers' own tests of tokenizers, against those that `pretrain.tokenization` trains; runs in its `tests`.

What lives here: a small tokenizer of each algorithm and of each habit of what is added around a text, and the test
class that joins it with transformers' mixin; what is skipped by name, with the reason. What must not: assertions of
our own.
"""

from __future__ import annotations

import random
import string
import tempfile
import unittest
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.test_tokenization_common import TokenizerTesterMixin
from transformers import PreTrainedTokenizerFast

from pretrain.config import TokenizerConfig
from pretrain.tokenization import draw_sample, fit_tokenizer, write_tokenizer

# (algorithm, design): [CLS] and [SEP], nothing, BOS in front, EOS behind.
TOKENIZERS = (
    ("wordpiece", "bert"),
    ("byte-bpe", "modernbert"),
    ("byte-bpe", "gpt2"),
    ("unigram", "llama"),
    ("unigram", "t5"),
    ("bpe", "llama"),
    ("bytes", "bert"),
)

_WORDS = (
    "the a this that is was one two in of and to we you it not with for on at river water house garden letter night",
    "morning sentence sentences split test tests first second third word words token tokens hello world system user",
    "assistant message content low lower newer wide new encode decode pad truncate long short text sequence sequences",
)


@dataclass(frozen=True)
class _Text:
    text: str
    file: str = "words.txt"
    position: int = 0


def _texts() -> list[_Text]:
    """Sentences of common words, and every character that ASCII prints."""
    draw = random.Random(0)
    words, made = " ".join(_WORDS).split(), []
    for number in range(60):
        lines = [f"{' '.join(draw.choices(words, k=9)).capitalize()}, {draw.randrange(1000)}." for _ in range(12)]
        made.append(_Text("\n".join([*lines, " ".join(string.printable.strip())]), position=number))
    return made


def _write(algorithm: str, design: str) -> Path:
    """The directory of a tokenizer of 512 ids."""
    config = TokenizerConfig.model_validate({"algorithm": algorithm, "vocab_size": 512, "pad_to_multiple": 64})
    directory = Path(tempfile.mkdtemp(prefix=f"{algorithm}-{design}-"))
    with draw_sample(_texts(), config.max_bytes, config.seed) as sample:
        write_tokenizer(directory, fit_tokenizer(config, sample, design), model_max_length=512)
    return directory


class _Case(TokenizerTesterMixin):
    tokenizer_class = PreTrainedTokenizerFast
    rust_tokenizer_class = PreTrainedTokenizerFast
    test_slow_tokenizer = False
    algorithm, design = "", ""

    @classmethod
    def setUpClass(cls) -> None:
        cls.from_pretrained_id = [str(_write(cls.algorithm, cls.design))]
        super().setUpClass()


def _cases() -> dict[str, type[unittest.TestCase]]:
    made = {}
    for algorithm, design in TOKENIZERS:
        keys: dict[str, Any] = {"algorithm": algorithm, "design": design}
        name = f"{algorithm.replace('-', '_')}__{design}"
        made[name] = type(name, (_Case, unittest.TestCase), keys)
    return made


globals().update(_cases())
