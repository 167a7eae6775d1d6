"""Scores against plain one-by-one computations, on stock models with random weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import build, byte_tokenizer, word_tokenizer
from torch.nn import functional as F

from pretrain.evaluation.likelihood import evaluate_batches, pseudo_log_likelihoods, score_causal, score_masked
from pretrain.evaluation.passes import Passes, target_scores
from pretrain.evaluation.text import encode, make_template, masked_rows

CPU = Passes(torch.device("cpu"))
TEXTS = ["The cat sat. ", "x", "Ein längerer Text, der über mehrere Fenster geht. 好的!" * 2, "short one"]


def plain_causal_loss(model: Any, ids: list[int], window: int) -> float:
    """Each token by itself, from the tokens of its window before it."""
    full, total = [0, *ids], 0.0
    for place in range(len(ids)):
        context = full[place - place % window : place + 1]
        with torch.no_grad():
            logits = model(torch.tensor([context])).logits[0, -1]
        total += float(F.cross_entropy(logits[None].double(), torch.tensor([full[place + 1]])))
    return total


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_causal_loss_is_that_of_each_token_by_itself(architecture: str) -> None:
    model, tokenizer = build(architecture), byte_tokenizer()
    scores = score_causal(model, tokenizer, TEXTS, CPU, window=16)
    expected = sum(plain_causal_loss(model, ids.tolist(), 16) for _, ids in encode(tokenizer, TEXTS))
    size = sum(len(text.encode()) for text in TEXTS)
    assert scores["tokens"] == scores["bytes"] == size
    assert scores["loss"] == pytest.approx(expected / size, rel=1e-6)
    assert scores["bits_per_byte"] == pytest.approx(expected / size / math.log(2), rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["context"] == {
        "window": 16,
        "stride": 16,
        "document_start": "<|endoftext|>",
        "document_end": "not scored",
    }


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary() -> None:
    model = build("gpt2")
    torch.nn.init.zeros_(model.transformer.wte.weight)  # tied: the logits are all 0
    scores = score_causal(model, byte_tokenizer(), TEXTS, CPU, window=32)
    assert scores["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_scores_do_not_depend_on_the_batch_size(batch_tokens: int, sentences: list[str]) -> None:
    passes = Passes(torch.device("cpu"), None, batch_tokens)
    causal = score_causal(build("llama"), byte_tokenizer(), sentences[:6], passes, window=32)
    reference = score_causal(build("llama"), byte_tokenizer(), sentences[:6], CPU, window=32)
    assert causal["loss"] == pytest.approx(reference["loss"], rel=1e-6)
    masked = score_masked(build("bert"), word_tokenizer(), sentences[:6], passes, window=24, sentences=2)
    reference = score_masked(build("bert"), word_tokenizer(), sentences[:6], CPU, window=24, sentences=2)
    assert masked["loss"] == pytest.approx(reference["loss"], rel=1e-6)
    assert masked["accuracy"] == reference["accuracy"]
    assert masked["pseudo_perplexity"] == pytest.approx(reference["pseudo_perplexity"], rel=1e-6)


def test_a_stride_gives_more_context_and_the_same_tokens() -> None:
    model, text = build("llama"), ["to be or not to be, that is the question" * 3]
    whole = score_causal(model, byte_tokenizer(), text, CPU, window=16)
    sliding = score_causal(model, byte_tokenizer(), text, CPU, window=16, stride=4)
    assert sliding["tokens"] == whole["tokens"]
    assert sliding["loss"] != whole["loss"]
    with pytest.raises(ValueError, match="stride: 17"):
        score_causal(model, byte_tokenizer(), text, CPU, window=16, stride=17)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert"])
def test_masked_scores_are_those_of_each_row_by_itself(architecture: str, sentences: list[str]) -> None:
    model, tokenizer = build(architecture), word_tokenizer()
    template, window = make_template(tokenizer), 20
    total, hits, count = 0.0, 0, 0
    for text, ids in encode(tokenizer, sentences):
        for row in masked_rows(text, ids, template, window):
            with torch.no_grad():
                logits = model(torch.from_numpy(row.input_ids[None].astype(np.int64))).logits[0].double()
            targets = torch.from_numpy(row.targets.astype(np.int64))
            total += float(F.cross_entropy(logits, targets, reduction="sum"))
            hits += int(((logits.argmax(-1) == targets) & (targets != -100)).sum())
            count += int((targets != -100).sum())
    scores = score_masked(model, tokenizer, sentences, CPU, window=window, sentences=0)
    assert scores["num_targets"] == count
    assert scores["loss"] == pytest.approx(total / count, rel=1e-6)
    assert scores["accuracy"] == hits / count
    assert "pseudo_perplexity" not in scores


def test_pseudo_log_likelihood_masks_each_token_once(sentences: list[str]) -> None:
    model, tokenizer = build("bert"), word_tokenizer()
    values, counts = pseudo_log_likelihoods(model, tokenizer, sentences[:3], CPU, max_tokens=10)
    for number, (_, ids) in enumerate(encode(tokenizer, sentences[:3])):
        expected, ids = 0.0, ids[:10]
        for place in range(len(ids)):
            hidden = torch.tensor([[2, *ids.tolist(), 3]])
            hidden[0, place + 1] = tokenizer.mask_token_id
            with torch.no_grad():
                expected += float(model(hidden).logits[0, place + 1].double().log_softmax(-1)[int(ids[place])])
        assert values[number] == pytest.approx(expected, rel=1e-6)
        assert counts[number] == len(ids)
    scores = score_masked(model, tokenizer, sentences[:3], CPU, window=24, sentences=50)
    values, counts = pseudo_log_likelihoods(
        model, tokenizer, [line for line in sentences[:3] if len(line) >= 20], CPU, max_tokens=22
    )
    assert scores["pseudo_perplexity"] == pytest.approx(math.exp(-values.sum() / counts.sum()))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert", "roberta", "modernbert"])
def test_only_the_targets_logits_are_made(architecture: str) -> None:
    model = build(architecture)
    made: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, output: made.append(output.shape[:-1].numel()))
    ids = torch.randint(5, 25, (3, 10), generator=torch.Generator().manual_seed(0))
    targets = torch.full((3, 10), -100)
    targets[0, 3], targets[2, 9] = 7, 8
    losses, hits = target_scores(model, {"input_ids": ids}, targets)
    assert made == [2]
    assert not model.get_output_embeddings()._forward_pre_hooks
    with torch.no_grad():
        logits = model(ids).logits
    chosen = torch.stack([logits[0, 3], logits[2, 9]])
    torch.testing.assert_close(losses, F.cross_entropy(chosen, torch.tensor([7, 8]), reduction="none").detach())
    assert hits.tolist() == (chosen.argmax(-1) == torch.tensor([7, 8])).tolist()


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        score_causal(build("gpt2"), byte_tokenizer(), ["", ""], CPU, window=8)
    with pytest.raises(ValueError, match="nothing to score"):
        score_masked(build("bert"), word_tokenizer(), [], CPU, window=8)
    with pytest.raises(ValueError, match="nothing to score"):
        evaluate_batches(build("gpt2"), [], device="cpu")


def test_progress_reaches_the_total(sentences: list[str]) -> None:
    told: list[tuple[str, int, int]] = []
    passes = Passes(torch.device("cpu"), None, 64, lambda *values: told.append(values))
    scores = score_masked(build("bert"), word_tokenizer(), sentences, passes, window=24, sentences=2)
    assert ("masked tokens", scores["num_targets"], scores["num_targets"]) in told
    assert told[-1][0] == "pseudo-perplexity"
    assert told[-1][1] == told[-1][2]


def test_unknown_tokens_are_counted() -> None:
    text = "the cat sat on a zebra and then the dog ran . " * 5
    assert score_masked(build("bert"), word_tokenizer(), [text], CPU, window=24, sentences=0)["unknown_tokens"] == 5


def test_bf16_is_near_fp32(sentences: list[str]) -> None:
    passes = Passes(torch.device("cpu"), torch.bfloat16)
    exact = score_causal(build("llama"), byte_tokenizer(), sentences[:4], CPU, window=32)
    near = score_causal(build("llama"), byte_tokenizer(), sentences[:4], passes, window=32)
    assert near["loss"] != exact["loss"]
    assert near["loss"] == pytest.approx(exact["loss"], rel=1e-2)
