"""An extended tokenizer: ids keep their meaning, text comes back, new text takes fewer tokens."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pretrain.tokenization.extend import extend_tokenizer

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
OLD = ["the", "cat", "sat", "on", "mat", "dog"]
NEW = ["pharmacology", "immunoglobulin", "the", "antibody", "receptor"]


def lines(words: list[str], seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice(words) for _ in range(8)) for _ in range(100)]


def byte_bpe() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    made.train_from_iterator(lines(OLD, 0), trainer)
    made.add_special_tokens(["<mask>"])  # an id behind the model's own
    return made


def wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=100, initial_alphabet=LETTERS, special_tokens=["[UNK]"], show_progress=False
    )
    made.train_from_iterator([*lines(OLD, 0), "".join(LETTERS) * 2], trainer)
    made.add_special_tokens(["[MASK]"])
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, initial_alphabet=LETTERS, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([*lines(OLD, 0), " ".join(LETTERS)], trainer)
    made.add_special_tokens(["<mask>"])
    return made


KINDS = {"byte-bpe": byte_bpe, "wordpiece": wordpiece, "unigram": unigram}


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_keep_their_meaning_and_new_text_gets_shorter(kind: str) -> None:
    old, new = KINDS[kind](), lines(NEW, 1)
    extension = extend_tokenizer(old, new, 30)
    made = extension.tokenizer
    assert len(extension.made_of) == 30
    assert list(extension.made_of) == list(range(old.get_vocab_size(), old.get_vocab_size() + 30))
    assert all(made.token_to_id(piece) == token_id for piece, token_id in old.get_vocab().items())
    for token_id, parts in extension.made_of.items():
        spelled = [old.id_to_token(part) for part in parts]
        assert made.id_to_token(token_id) == spelled[0] + "".join(part.removeprefix("##") for part in spelled[1:])
    before, after = (sum(len(one.encode(line).ids) for line in new) for one in (old, made))
    assert after < 0.5 * before
    assert all(made.decode(made.encode(line).ids) == old.decode(old.encode(line).ids) for line in new)
    if kind == "byte-bpe":  # merges that come last change no word that has none of them
        assert all(made.encode(line).ids == old.encode(line).ids for line in lines(OLD, 2))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text("abcde ", min_size=1, max_size=30), min_size=1, max_size=8), st.integers(1, 12))
def test_any_text_comes_back(texts: list[str], pieces: int) -> None:
    old = byte_bpe()
    try:
        made = extend_tokenizer(old, [*texts, *texts], pieces).tokenizer
    except ValueError:
        return  # there is no pair to join
    assert all(made.decode(made.encode(text).ids) == text for text in texts)
    assert all(len(made.encode(text).ids) <= len(old.encode(text).ids) for text in texts)


def test_what_cannot_be_taught_is_said() -> None:
    with pytest.raises(ValueError, match="no two pieces stand side by side 50 times"):
        extend_tokenizer(byte_bpe(), ["immunoglobulin"], 5, min_frequency=50)
    with pytest.raises(ValueError, match="a WordLevel tokenizer cannot be taught"):
        extend_tokenizer(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), ["a a"], 5)
