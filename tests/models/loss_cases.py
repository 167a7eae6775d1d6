"""What each objective minimises, written out in float64 on the slow reference's logits, gradients included.

Lives here: tiny models and batches of each objective, and the formulas. What must not: how a batch is made
(`tests/data`), what is allowed (`test_objective_losses.py`), or the page that shows the errors (`family_page.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from loom_builders import documents, randomize, relative, tokens
from reference import activation, linear, reference_logits, settings_of, stack, weights_of
from reference_seq2seq import smoothed_loss
from torch import Tensor
from variants import LENGTH, SIZES

from pretrain.models import LoomEncoderForReplacedTokenDetection, loom_config, model_class

PIECES = ([6, 3, -1], [LENGTH - 2, 2])
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model, what it is given, and the loss by definition from float64 weights."""

    model: Any
    batch: dict[str, Any]
    expected: Callable[[Weights], Tensor]


def _model(architecture: str, task: str = "pretraining", **keys: Any) -> Any:
    config = loom_config(architecture, **(SIZES | keys))
    model = model_class(config, task)(config)
    randomize(model)
    return model.double().train()


def _masked(ids: Tensor) -> Tensor:
    """(B, L) ids -> labels: every third place, -100 elsewhere."""
    places = torch.arange(ids.shape[1]).expand_as(ids)
    return torch.where(places % 3 == 1, (ids + 3) % SIZES["vocab_size"], -100)


def _mean(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """(B, L, vocabulary) and (B, L) -> the mean over targets."""
    chosen = labels != -100
    return smoothed_loss(logits[chosen], labels[chosen].tolist(), smoothing) / int(chosen.sum())


def masked_tokens() -> Case:
    """BERT's: the tokens at masked places."""
    model, ids, pieces = _model("bert"), tokens(2, LENGTH, vocabulary=SIZES["vocab_size"]), documents(*PIECES)
    labels = _masked(ids).masked_fill(pieces == 0, -100)
    batch = {"input_ids": ids, "document_ids": pieces, "labels": labels}

    def expected(weights: Weights) -> Tensor:
        return _mean(reference_logits(settings_of(model.config), weights, ids, documents=pieces), labels)

    return Case(model, batch, expected)


def pairs_of_sentences() -> Case:
    """BERT's and ALBERT's second term: two classes from each pair's [CLS], through a dense layer and tanh."""
    model = _model("bert", "sentence_pretraining")
    ids, pieces = tokens(2, LENGTH, vocabulary=SIZES["vocab_size"]), documents(*PIECES)
    types, labels = (ids % 2).masked_fill(pieces == 0, 0), _masked(ids).masked_fill(pieces == 0, -100)
    starts, answers = torch.tensor([[0, 6], [0, LENGTH - 2]]), torch.tensor([[1, 0], [1, 1]])
    batch = {"input_ids": ids, "document_ids": pieces, "token_type_ids": types, "labels": labels}
    batch |= {"sentence_positions": starts, "sentence_labels": answers}

    def expected(weights: Weights) -> Tensor:
        settings = settings_of(model.config)
        logits = reference_logits(settings, weights, ids, documents=pieces, token_types=types)
        given = zip(ids.tolist(), pieces.tolist(), types.tolist(), strict=True)
        states = [stack(settings, weights, "model.", *row, causal=False) for row in given]
        firsts = torch.stack([states[row][place] for row in (0, 1) for place in starts[row].tolist()])
        scores = linear(weights, "seq_relationship.", linear(weights, "pooler.dense.", firsts).tanh())
        return _mean(logits, labels) + _mean(scores[None], answers.view(1, -1))

    return Case(model, batch, expected)


def next_tokens() -> Case:
    """GPT's: each place says the next token of its document."""
    model, ids, pieces = _model("gpt2"), tokens(2, LENGTH, vocabulary=SIZES["vocab_size"]), documents(*PIECES)
    labels = torch.full_like(ids, -100)
    for row in range(2):
        for place in range(LENGTH - 1):
            if pieces[row, place] and pieces[row, place] == pieces[row, place + 1]:
                labels[row, place] = ids[row, place + 1]
    batch = {"input_ids": ids, "document_ids": pieces, "shift_labels": labels}

    def expected(weights: Weights) -> Tensor:
        return _mean(reference_logits(settings_of(model.config), weights, ids, documents=pieces), labels)

    return Case(model, batch, expected)


def outputs(architecture: str, smoothing: float) -> Case:
    """An encoder-decoder's: each place of the output says the next one, with label smoothing while it trains."""
    model = _model(architecture, label_smoothing=smoothing)
    ids, pieces = tokens(2, LENGTH, vocabulary=SIZES["vocab_size"]), documents(*PIECES)
    labels, out = tokens(2, 7, seed=1, vocabulary=SIZES["vocab_size"]), documents([2, 4, -1], [3, 4])
    written = labels.roll(1, dims=1)
    written[:, 0] = 0
    labels = labels.masked_fill(out == 0, -100)
    batch = {"input_ids": ids, "document_ids": pieces, "labels": labels}
    batch |= {"decoder_input_ids": written, "decoder_document_ids": out}

    def expected(weights: Weights) -> Tensor:
        settings = settings_of(model.config)
        logits = reference_logits(settings, weights, ids, documents=pieces, output_ids=written, output_documents=out)
        return _mean(logits, labels, smoothing)

    return Case(model, batch, expected)


def replaced_tokens() -> Case:
    """ELECTRA's detector: of every token, whether it is the original."""
    config = loom_config("electra", **SIZES, embedding_size=8)
    model = LoomEncoderForReplacedTokenDetection(config)
    randomize(model)
    model = model.double().train()
    ids, pieces = tokens(2, LENGTH, vocabulary=SIZES["vocab_size"]), documents(*PIECES)
    labels = (ids % 3 == 0).long().masked_fill(pieces == 0, -100)
    batch = {"input_ids": ids, "document_ids": pieces, "labels": labels}

    def expected(weights: Weights) -> Tensor:
        settings = settings_of(config)
        rows = zip(ids.tolist(), pieces.tolist(), strict=True)
        states = [stack(settings, weights, "model.", *row, None, causal=False) for row in rows]
        dense = [activation(config.hidden_act, linear(weights, "rtd_head.dense.", row)) for row in states]
        logits = torch.stack([linear(weights, "rtd_head.out.", row)[:, 0] for row in dense])
        sign = torch.where(labels == 1, 1.0, -1.0).double()
        return config.rtd_weight * torch.log1p(torch.exp(-sign * logits))[labels != -100].mean()

    return Case(model, batch, expected)


CASES: dict[str, Callable[[], Case]] = {
    "masked tokens": masked_tokens,
    "pairs of sentences": pairs_of_sentences,
    "next tokens": next_tokens,
    "replaced tokens": replaced_tokens,
    "outputs": lambda: outputs("t5", 0.0),
    "outputs, smoothed labels": lambda: outputs("transformer", 0.1),
}


def loss_errors(name: str) -> tuple[float, float]:
    """How far the loss, and the gradient of any parameter, lie from the definition, over the largest."""
    case = CASES[name]()
    weights = weights_of(case.model)
    expected = case.expected(weights)
    slopes = torch.autograd.grad(expected, list(weights.values()), allow_unused=True)
    loss = case.model(**case.batch).loss
    loss.backward()
    parameters = dict(case.model.named_parameters())
    largest = max(float(slope.abs().max()) for slope in slopes if slope is not None)
    errors = [0.0]
    for name, slope in zip(weights, slopes, strict=True):
        found = parameters[name].grad
        wanted = torch.zeros_like(weights[name]) if slope is None else slope
        found = torch.zeros_like(wanted) if found is None else found
        errors.append(float((found - wanted).abs().max()) / max(float(wanted.abs().max()), largest / 1000))
    return relative(loss[None], expected[None]), max(errors)
