"""Minimal pairs against slow references in float64: one sentence, one mask at a time, no batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import build, word_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pretrain.evaluation.examples import Pair
from pretrain.evaluation.loading import LoadedModel, load_model
from pretrain.evaluation.minimal_pairs import log_likelihoods, pseudo_log_likelihoods_of, score_pairs
from pretrain.evaluation.passes import Passes
from pretrain.evaluation.text import encode_words
from tests.two_ranks import two_ranks

CPU = torch.device("cpu")
PASSES = Passes(CPU, batch_tokens=64)


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece with words of several pieces, Han characters, and BERT's frame; 32 ids."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "un", "##like", "##ly", "sat", "a"]
    names += ["中", "国", "##国", "人", "."]
    tokenizer = Tokenizer(models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{role}_token": token for role, token in roles.items()}
    )


def encoder(architecture: str = "bert", tokenizer: Any = None) -> LoadedModel:
    return LoadedModel(build(architecture), tokenizer or piece_tokenizer(), "mlm", "tiny", "tiny", CPU)


def log_probabilities(model: LoadedModel, ids: list[int]) -> torch.Tensor:
    """(n, vocabulary), of one row, in float64."""
    with torch.no_grad():
        logits: torch.Tensor = copy.deepcopy(model.model).double()(input_ids=torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_decoder_scores_every_token_after_bos(name: str, directories: dict[str, Path]) -> None:
    model = load_model(directories[name], device="cpu")
    sentences = ["the cat sat", "a", "it was very red, and then: more bytes than the window of the model holds"]
    found = log_likelihoods(model, sentences, PASSES, window=32)
    for score, sentence in zip(found[:2], sentences[:2], strict=True):
        ids = [0, *model.tokenizer(sentence, add_special_tokens=False)["input_ids"]]
        said = log_probabilities(model, ids)
        expected = sum(float(said[place, token]) for place, token in enumerate(ids[1:]))
        assert score == pytest.approx(expected, rel=1e-5)
    ids = [0, *model.tokenizer(sentences[2], add_special_tokens=False)["input_ids"]]
    expected = 0.0
    for begin in range(0, len(ids) - 1, 32):  # windows that share one token, as of bits per byte
        window, wanted = ids[begin : min(begin + 32, len(ids) - 1)], ids[begin + 1 : begin + 33]
        said = log_probabilities(model, window)
        expected += sum(float(said[place, token]) for place, token in enumerate(wanted))
    assert found[2] == pytest.approx(expected, rel=1e-5)


SENTENCES = ["the cats sat .", "a unlikely cat", "中国人", "unlikely"]


@pytest.mark.parametrize("how", ["original", "within-word"])
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_an_encoder_scores_each_token_masked(how: Any, architecture: str) -> None:
    model = encoder(architecture)
    found = pseudo_log_likelihoods_of(model, SENTENCES, PASSES, window=24, how=how)
    for score, sentence in zip(found, SENTENCES, strict=True):
        pieces = model.tokenizer.tokenize(sentence)
        ids = model.tokenizer.convert_tokens_to_ids(pieces)
        expected = 0.0
        for place in range(len(ids)):
            hidden = list(ids)
            hidden[place] = 4
            later = place + 1
            while how == "within-word" and later < len(ids) and pieces[later].startswith("##"):
                hidden[later] = 4
                later += 1
            expected += float(log_probabilities(model, [2, *hidden, 3])[place + 1, ids[place]])
        assert score == pytest.approx(expected, rel=1e-5)


def test_words_are_those_of_the_tokenizer_and_single_characters_of_unspaced_scripts() -> None:
    tokenizer = piece_tokenizer()
    ids, words = encode_words(tokenizer, "unlikely cats")
    assert [tokenizer.convert_ids_to_tokens(int(token)) for token in ids] == ["un", "##like", "##ly", "cat", "##s"]
    assert words == [0, 0, 0, 1, 1]
    # Bytes, where one piece is no whole character, and a run of Han has no border for the tokenizer.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _, words = encode_words(PreTrainedTokenizerFast(tokenizer_object=bytes_), "ab 中国 c")
    assert words == [0, 0, 1, 2, 2, 2, 3, 3, 3, 4, 4]


def test_the_share_of_pairs_that_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder(tokenizer=word_tokenizer())
    texts = [("the cat sat", "cat the sat"), ("a dog ran", "dog a ran"), ("it was red", "it was red")]
    pairs = [Pair(good, bad, {"UID": "order" if number < 2 else "same"}) for number, (good, bad) in enumerate(texts)]
    found = score_pairs(model, pairs, PASSES, window=24)
    likelier = [
        np.subtract(*pseudo_log_likelihoods_of(model, pair, PASSES, window=24, how="within-word")) > 0 for pair in texts
    ]
    assert found["accuracy"] == pytest.approx(np.mean(likelier))
    assert (found["pairs"], found["ties"]) == (3, 1)
    assert found["by"]["UID"]["order"] == {"accuracy": np.mean(likelier[:2]), "pairs": 2}
    assert found["by"]["UID"]["same"] == {"accuracy": 0.0, "pairs": 1}
    monkeypatch.setattr("pretrain.evaluation.minimal_pairs._AT_ONCE", 2)
    assert score_pairs(model, pairs, PASSES, window=24) == found, "however many sentences are in memory together"
    turned = score_pairs(model, [Pair(bad, good, {}) for good, bad in texts[:2]], PASSES, window=24)
    assert turned["accuracy"] == pytest.approx(1 - np.mean(likelier[:2]))


def test_two_processes_share_the_rows_and_get_all_scores() -> None:
    sentences = ["the cat sat", "a", "the dog ran under the tree", "it was very red", "and then"]

    models_ = [encoder(tokenizer=word_tokenizer()), encoder(tokenizer=word_tokenizer())]

    def scored(ranks: Any) -> tuple[list[float], int]:
        model, calls = models_[ranks.rank], []
        passes = Passes(CPU, batch_tokens=16, ranks=ranks, progress=lambda *_: calls.append(1))
        found = pseudo_log_likelihoods_of(model, sentences, passes, window=24, how="original")
        return found.tolist(), len(calls)

    alone = pseudo_log_likelihoods_of(
        encoder(tokenizer=word_tokenizer()), sentences, Passes(CPU, batch_tokens=16), window=24, how="original"
    )
    first, second = two_ranks(scored)
    assert first == second, "the same scores after the same number of passes"
    assert first[0] == pytest.approx(alone.tolist(), rel=1e-6)


def test_what_does_not_fit_is_named() -> None:
    model = encoder(tokenizer=word_tokenizer())
    with pytest.raises(ValueError, match="30 tokens does not fit the 24 positions"):
        score_pairs(model, [Pair("the " * 30, "a", {})], PASSES, window=24)
    with pytest.raises(ValueError, match="within-word or original"):
        score_pairs(model, [Pair("the", "a", {})], PASSES, window=24, pseudo_likelihood="whole")  # type: ignore[arg-type]
