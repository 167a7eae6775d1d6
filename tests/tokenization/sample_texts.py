"""Small texts for the tokenizer tests: English-like and Chinese documents, the same each time."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pretrain.config import TokenizerConfig
from pretrain.tokenization import TrainedTokenizer, draw_sample, fit_tokenizer

ALGORITHMS = ("byte-bpe", "bpe", "wordpiece", "unigram", "bytes")
ARCHITECTURES = ("bert", "modernbert", "gpt2", "llama")

_STEMS = ("walk", "talk", "jump", "light", "water", "river", "house", "garden", "letter", "number", "answer")
_ENDINGS = ("", "s", "ed", "ing", "er", "ers", "less", "ful", "fully")
_CHINESE = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏"


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str
    file: str = "a.txt"
    position: int = 0


def documents(count: int = 40, seed: int = 0) -> list[Text]:
    """Documents in two files: sentences with capitals, digits and punctuation, some in Chinese."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        lines = []
        for _ in range(12):
            words = [draw.choice(_STEMS) + draw.choice(_ENDINGS) for _ in range(9)]
            chinese = "".join(draw.choice(_CHINESE) for _ in range(8))
            lines.append(f"{' '.join(words).capitalize()}, {draw.randrange(10_000)} café: {chinese}。")
        made.append(Text("\n".join(lines), f"{'ab'[number % 2]}.txt", number))
    return made


def trained(algorithm: str = "byte-bpe", architecture: str = "bert", **keys: object) -> TrainedTokenizer:
    """A tokenizer trained on `documents()`; 512 ids unless told otherwise."""
    plain = {"algorithm": algorithm, "vocab_size": 512, "pad_to_multiple": 64, **keys}
    config = TokenizerConfig.model_validate(plain)
    with draw_sample(documents(), config.max_bytes, config.seed) as sample:
        return fit_tokenizer(config, sample, architecture)
