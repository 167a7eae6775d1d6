"""Where words and sentences start: the tokenizer's own words, for each kind of tokenizer, kept beside the ids."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pretrain.data.preparing import long_texts
from pretrain.data.preparing.long_texts import encode_texts
from pretrain.data.preparing.marks import Marker, split
from pretrain.data.shards import SENTENCE, WORD

TEXT = "Unbelievable things happened. Did they (really)? Yes! 12 of 13 birds sang,\nand nobody minded at all. " * 4


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]"], show_progress=False)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )


def without_words():
    """As Llama 2's: spaces become marks, and the text is never cut into words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    words = {character: at for at, character in enumerate(sorted({*TEXT.replace(" ", "▁"), "▁"}))}
    merges = [("▁", "b"), ("i", "r"), ("▁b", "ir")]
    words |= {a + b: len(words) + at for at, (a, b) in enumerate(merges)}
    tokenizer.model = models.BPE(words, merges)
    return tokenizer, None


@pytest.mark.parametrize("kind", [byte_level, wordpiece, unigram, without_words])
def test_marks_are_where_the_tokenizers_words_start(kind):
    tokenizer, trainer = kind()
    if trainer is not None:
        tokenizer.train_from_iterator([TEXT], trainer)
    (marked,) = encode_texts(tokenizer, [TEXT], Marker(tokenizer))
    ids, marks = split(np.array(marked, dtype=np.uint32))
    encoding = tokenizer.encode(TEXT, add_special_tokens=False)
    assert ids.tolist() == encoding.ids
    if kind is without_words:
        words = [at == 0 or token.startswith("▁") for at, token in enumerate(encoding.tokens)]
    else:
        words = [at == 0 or word != encoding.word_ids[at - 1] for at, word in enumerate(encoding.word_ids)]
    assert ((marks & WORD) != 0).tolist() == words
    assert 0.05 < np.mean(words) < 0.95
    begins = [
        TEXT[start:].lstrip()[:3]
        for (start, _), mark in zip(encoding.offsets, marks.tolist(), strict=True)
        if mark & SENTENCE
    ]
    assert {"Unb", "Did", "Yes", "12 "} <= set(begins)
    assert set(begins) <= {"Unb", "Did", "Yes", "12 ", "and", "13 ", ""}


def test_a_long_text_is_marked_as_a_whole_one(monkeypatch):
    tokenizer, trainer = byte_level()
    tokenizer.train_from_iterator([TEXT], trainer)
    text = TEXT * 60
    (whole,) = encode_texts(tokenizer, [text], Marker(tokenizer))
    monkeypatch.setattr(long_texts, "PIECE", 2000)
    (pieces,) = encode_texts(tokenizer, [text], Marker(tokenizer))
    ids, marks = split(np.array(whole, dtype=np.uint32))
    cut_ids, cut_marks = split(np.array(pieces, dtype=np.uint32))
    assert ids.tolist() == cut_ids.tolist()
    assert ((marks ^ cut_marks) & WORD == 0).all()
    lost = np.flatnonzero(marks != cut_marks)  # a cut may stand where a sentence starts: that one is not marked
    assert len(lost) <= len(text) // 2000
    assert isinstance(whole, array)
