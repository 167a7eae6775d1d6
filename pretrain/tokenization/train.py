"""Training a tokenizer on a sample of text, and writing the directory that `AutoTokenizer` loads.

What lives here: from a sample to a `tokenizers.Tokenizer` of the asked size, the same bytes each time, and from there
to files. What must not: reading corpora, configuration files, manifests.

Same text, same bytes. The library's merges (BPE, WordPiece) depend on counts alone, with ties broken by token ids; so
the ids must not come from the order of a hash map. Two of the library's habits would let them, and are avoided: a
limit on the alphabet breaks ties at random, so the alphabet is chosen here; and WordPiece numbers its `##x` characters
as it meets them, so they are numbered here beforehand. Its unigram trainer cannot be held to one order at all; see
`unigram.py`.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, trainers

from pretrain.config import TokenizerConfig
from pretrain.files import write_bytes, write_json

from .algorithms import (
    BYTE_TOKENS,
    CONTINUATION,
    SPACE,
    SpecialTokens,
    assemble,
    byte_characters,
    model_input_names,
    special_tokens_of,
    untrained_tokenizer,
)
from .sample import TextSample
from .unigram import train_unigram

_log = logging.getLogger(__name__)

_ALPHABET_SHARE = 0.75  # of the ids that are free; the rest is for longer tokens
_MOST_WORDS = 1_000_000  # different words in memory; the rarest go when there are more
_UNIGRAM_CHARACTERS = 3_000_000  # of different words, most frequent first: about 3 GB of lattices
_PROBE_BYTES = 4_000_000
_DIFFERENT_BYTES = 50_000_000  # of different words; training merges on them takes about 100 bytes each: 5 GB
_RESERVED_SCORE = -1000.0  # unigram: tokens that text must never be cut into


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer with its special tokens; `learnt` ids carry meaning, the rest up to `vocab_size` is reserved."""

    tokenizer: Tokenizer
    special: SpecialTokens
    architecture: str
    vocab_size: int
    learnt: int
    notes: tuple[str, ...]


def fit_tokenizer(config: TokenizerConfig, sample: TextSample, architecture: str) -> TrainedTokenizer:
    """Train the algorithm that `config` names on the sample.

    `len(tokenizer)` is `config.vocab_size` rounded up to `pad_to_multiple`, or less when the text has no more tokens
    to learn (`notes` says so); tokens `<|unused0|>`, ... fill it up. For `bytes` it is 256 and the special tokens, for
    `ids` the numbers 0 to `config.vocab_size` - 1 and after them the special tokens: the sample is not read.

    Raises:
        ValueError: when the vocabulary cannot hold the special tokens and the alphabet.
    """
    if config.algorithm == "ids":
        return bare_tokenizer(config, architecture)
    special = special_tokens_of(config, architecture)
    size = _round_up(config.vocab_size, config.pad_to_multiple)
    _check_size(config, special, size)
    unk = special.roles.get("unk_token")
    notes: tuple[str, ...] = ()
    if config.algorithm == "bytes":
        tokens: list[str] = [*special.tokens, *byte_characters()]
        size = _round_up(len(tokens), config.pad_to_multiple)
        merges: list[tuple[str, str]] = []
        scores: dict[str, float] = {}
    elif config.algorithm == "unigram":
        scores = dict(_fit_unigram(config, sample, special, size))
        tokens, merges = [*special.tokens, *BYTE_TOKENS, *scores], []
    else:
        notes = _bound_memory(config, sample)
        tokens, merges = _fit_merges(config, sample, special, size)
        scores = {}
    learnt = len(tokens)
    notes += _notes(config, learnt, size)
    tokens += [f"<|unused{number}|>" for number in range(_round_up(learnt, config.pad_to_multiple) - learnt)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    _refuse_double(tokens)
    model: models.Model
    if config.algorithm == "unigram":
        scored = [(token, scores.get(token, _RESERVED_SCORE)) for token in tokens]
        model = models.Unigram(scored, unk_id=special.id_of("unk_token"), byte_fallback=True)
    elif config.algorithm == "wordpiece":
        model = models.WordPiece(vocabulary, unk_token=unk, continuing_subword_prefix=CONTINUATION)
    else:
        model = models.BPE(vocabulary, merges, unk_token=unk, byte_fallback=config.algorithm == "bpe")
    tokenizer = assemble(config, architecture, special, model)
    tokenizer.add_special_tokens(tokens[learnt:])
    for note in notes:
        _log.warning(note)
    return TrainedTokenizer(tokenizer, special, architecture, len(tokens), learnt, notes)


def bare_tokenizer(config: TokenizerConfig, architecture: str) -> TrainedTokenizer:
    """A vocabulary of numbers: `0` to `config.vocab_size` - 1, each its own id, then the special tokens, then padding.

    Text is numbers with white space between them; any other word is the unknown token.
    """
    special = special_tokens_of(config, architecture)
    tokens = [*map(str, range(config.vocab_size)), *special.tokens]
    learnt = len(tokens)
    tokens += [f"<|unused{number}|>" for number in range(_round_up(learnt, config.pad_to_multiple) - learnt)]
    _refuse_double(tokens)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = assemble(config, architecture, special, models.WordLevel(vocabulary, special.roles["unk_token"]))
    tokenizer.add_special_tokens(tokens[learnt:])
    return TrainedTokenizer(tokenizer, special, architecture, len(tokens), learnt, ())


def _refuse_double(tokens: Sequence[str]) -> None:
    double = next((token for token, count in Counter(tokens).items() if count > 1), None)
    if double is not None:
        raise ValueError(f"tokenizer.special_tokens: `{double}` is also a reserved token or a byte; rename it")


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _notes(config: TokenizerConfig, learnt: int, size: int) -> tuple[str, ...]:
    if config.algorithm == "bytes" or learnt >= size:
        return ()
    return (
        f"tokenizer.vocab_size: {config.vocab_size} ids were asked for, the text gives {learnt} (nothing more is "
        f"seen {config.min_frequency} times or more); the smaller vocabulary is kept, padded to a multiple of "
        f"{config.pad_to_multiple}",
    )


def _check_size(config: TokenizerConfig, special: SpecialTokens, size: int) -> None:
    fixed = len(special.tokens) + {"wordpiece": 16, "bytes": 0}.get(config.algorithm, 256)
    if config.algorithm != "bytes" and size < fixed + 16:
        raise ValueError(
            f"tokenizer.vocab_size: {config.vocab_size} cannot hold {len(special.tokens)} special tokens, the alphabet "
            f"and tokens to learn; raise it to at least {fixed + 16}, or use `algorithm: bytes`"
        )


# --- BPE and WordPiece ----------------------------------------------------------------------------------------------


def _bound_memory(config: TokenizerConfig, sample: TextSample) -> tuple[str, ...]:
    """Shrink the sample when its different words would take too much memory; say so.

    The library keeps each different word once. Where words repeat (most languages) their bytes are a small share of
    the text; where they are whole clauses (Chinese, Japanese, Thai: no spaces) they are nearly all of it.
    The share is measured on a part of the sample, and falls as text grows, so the bound errs on the safe side.
    """
    words: set[str] = set()
    seen = 0
    tokenizer = untrained_tokenizer(config)
    for text in sample.part(_PROBE_BYTES):
        seen += len(text.encode())
        words.update(_words(tokenizer, text))
    # Byte-level words are written in one character a byte.
    different = sum(len(word) if config.algorithm == "byte-bpe" else len(word.encode()) for word in words)
    share = different / max(seen, 1)
    before, most = sample.sample_bytes, int(_DIFFERENT_BYTES / max(share, 1e-6))
    if before <= most:
        return ()
    sample.shrink(most)
    return (
        f"{share:.0%} of the text are different words, as where words are not parted by spaces, and memory grows with "
        f"them: {sample.sample_bytes} of {before} bytes sampled were used",
    )


def _fit_merges(
    config: TokenizerConfig, sample: TextSample, special: SpecialTokens, size: int
) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens in the order of their ids, and merges (none for WordPiece)."""
    tokenizer = untrained_tokenizer(config)
    first: list[str] = list(special.tokens)
    if config.algorithm == "byte-bpe":
        alphabet = byte_characters()
    elif config.algorithm == "bpe":
        first += BYTE_TOKENS
        counts = character_counts(tokenizer, sample.texts())
        alphabet = _most_frequent(counts, frozenset(), config.min_frequency, size - len(first))
    else:
        counts, inner = word_character_counts(tokenizer, sample.texts())
        alphabet = _most_frequent(counts, inner, config.min_frequency, size - len(first))
        first += [CONTINUATION + character for character in alphabet if character in inner]
    train_merges(
        tokenizer,
        sample.texts(),
        first=first,
        alphabet=alphabet,
        vocab_size=size,
        min_frequency=config.min_frequency,
    )
    learnt = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)
    return tokens, [(left, right) for left, right in learnt.get("merges", ())]


def train_merges(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    first: Sequence[str],
    alphabet: Sequence[str],
    vocab_size: int,
    min_frequency: int,
) -> None:
    """Let the library learn merges into `tokenizer`, whose model is a BPE or a WordPiece.

    `first` are the tokens with the lowest ids, in order; then comes the alphabet by code point, then merges.

    Raises:
        ValueError: when the tokenizer has no pre-tokenizer: whole documents would be words, and memory without bound.
    """
    if tokenizer.pre_tokenizer is None:
        raise ValueError(
            "a tokenizer without a pre-tokenizer takes each document for one word and needs memory without bound; "
            "set tokenizer.pre_tokenizer before training"
        )
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "min_frequency": min_frequency,
        "show_progress": False,
        "special_tokens": list(first),
        "initial_alphabet": list(alphabet),
        "limit_alphabet": len(alphabet),
    }
    trainer: trainers.Trainer
    if isinstance(tokenizer.model, models.WordPiece):
        trainer = trainers.WordPieceTrainer(continuing_subword_prefix=CONTINUATION, **settings)
    else:
        trainer = trainers.BpeTrainer(**settings)
    tokenizer.train_from_iterator(texts, trainer)


def _most_frequent(counts: Counter[str], inner: frozenset[str], min_frequency: int, free: int) -> list[str]:
    """The alphabet, by code point: characters seen often enough, the most frequent that three quarters of `free` hold.

    A character in `inner` also stands within words and takes two ids. Ties go to the lower code point.
    """
    room = int(free * _ALPHABET_SHARE)
    chosen: list[str] = []
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        room -= 2 if character in inner else 1
        if count < min_frequency or room < 0:
            break
        chosen.append(character)
    return sorted(chosen)


# --- unigram --------------------------------------------------------------------------------------------------------


def _fit_unigram(
    config: TokenizerConfig, sample: TextSample, special: SpecialTokens, size: int
) -> list[tuple[str, float]]:
    words = word_counts(untrained_tokenizer(config), sample.texts())
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    characters.pop("\0", None)  # parts words in training; encoded as a byte
    free = size - len(special.tokens) - len(BYTE_TOKENS)
    alphabet = _most_frequent(characters, frozenset(), config.min_frequency, free)
    learnt = train_unigram(_shortened(words), alphabet, free)
    reserved = {*special.tokens, *BYTE_TOKENS}
    return [(piece, score) for piece, score in learnt if piece not in reserved]


def _shortened(words: Counter[str]) -> dict[str, int]:
    """The most frequent words, up to a number of characters that bounds the memory of training."""
    kept: dict[str, int] = {}
    room = _UNIGRAM_CHARACTERS
    for word, count in sorted(words.items(), key=lambda item: (-item[1], item[0])):
        room -= len(word)
        if room < 0:
            break
        kept[word] = count
    return kept


# --- counting -------------------------------------------------------------------------------------------------------


def _words(tokenizer: Tokenizer, text: str) -> Counter[str]:
    normalizer = tokenizer.normalizer
    text = text if normalizer is None else normalizer.normalize_str(text)
    return Counter(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))


def word_counts(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs. Above a million different words the rarest are forgotten: memory stays bounded."""
    counts: Counter[str] = Counter()
    floor = 1
    for text in texts:
        counts.update(_words(tokenizer, text))
        while len(counts) > _MOST_WORDS:
            counts = Counter({word: count for word, count in counts.items() if count > floor})
            floor += 1
    return counts


def character_counts(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """How often each character occurs in normalized text; a space counts as `▁`."""
    counts: Counter[str] = Counter()
    normalizer = tokenizer.normalizer
    for text in texts:
        counts.update(text if normalizer is None else normalizer.normalize_str(text))
    if spaces := counts.pop(" ", 0):
        counts[SPACE] += spaces
    return counts


def word_character_counts(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[Counter[str], frozenset[str]]:
    """How often each character occurs in words, and which characters occur elsewhere than at a word's beginning."""
    counts: Counter[str] = Counter()
    inner: set[str] = set()
    for text in texts:
        for word, count in _words(tokenizer, text).items():
            inner.update(word[1:])
            for character in word:
                counts[character] += count
    return counts, frozenset(inner)


# --- writing --------------------------------------------------------------------------------------------------------


def write_tokenizer(directory: Path, trained: TrainedTokenizer, *, model_max_length: int) -> dict[str, str]:
    """Write `tokenizer.json` and `tokenizer_config.json`; return each file's SHA-256.

    The class named is `PreTrainedTokenizerFast`, which transformers 4.57 and 5 both know.
    """
    special = trained.special
    named = set(special.roles.values())
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "model_input_names": model_input_names(trained.architecture),
        "clean_up_tokenization_spaces": False,
        **special.roles,
    }
    if more := [token for token in special.tokens if token not in named]:
        settings["additional_special_tokens"] = more
    return {
        "tokenizer.json": write_bytes(directory / "tokenizer.json", trained.tokenizer.to_str(pretty=True).encode()),
        "tokenizer_config.json": write_json(directory / "tokenizer_config.json", settings),
    }
