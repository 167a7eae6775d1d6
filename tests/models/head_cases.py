"""Task heads written out: what each family puts before its labels, as formulas in float64 on the stack's states.

Lives here: models, batches and the formulas. What must not: what is allowed (`test_loom_heads.py`), or the page that
shows the errors (`family_page.py`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from loom_builders import relative, tiny_config, tiny_model, tokens
from torch import Tensor
from torch.nn import functional

from pretrain.models import model_class

SMALL = {"num_hidden_layers": 2, "num_labels": 3, "pad_token_id": 0}
ENCODER_FAMILIES = ["bert", "roberta", "electra", "albert", "modernbert", "eurobert"]
DECODER_FAMILIES = ["gpt2", "llama", "qwen3", "modernbert-decoder"]
ENCODER_TASKS = ["classification", "token_classification", "question_answering", "multiple_choice"]
DECODER_TASKS = ["classification", "token_classification", "question_answering"]


def head_model(architecture: str, task: str, **keys: Any) -> Any:
    labels = keys.pop("num_labels", 3)
    sizes = {key: value for key, value in SMALL.items() if key != "num_labels"}
    if architecture == "modernbert-decoder":
        sizes["local_window"] = 8
    config = tiny_config(architecture, **(sizes | keys))
    config.num_labels = labels
    model = model_class(config, task)(config)
    like = tiny_model(architecture, **(sizes | keys))  # for its random weights
    randomized = dict(like.named_parameters())
    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
            source = randomized.get(name)
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 if source is None else source)
    return model.double().eval()


def head_batch(task: str, rows: int = 4, length: int = 9) -> dict[str, Tensor]:
    """A padded batch and its targets; one row is shorter."""
    shape = (rows, 2, length) if task == "multiple_choice" else (rows, length)
    ids = tokens(math.prod(shape[:-1]), length).view(shape)
    mask = torch.ones(shape, dtype=torch.long)
    mask[1, ..., length - 3 :] = 0
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    if task == "token_classification":
        batch["labels"] = (tokens(rows, length, seed=3) % 3).masked_fill(mask == 0, -100)
    elif task == "question_answering":
        batch |= {"start_positions": torch.arange(rows) % 4, "end_positions": torch.arange(rows) % 4 + 2}
    elif task == "multiple_choice":
        batch["labels"] = torch.arange(rows) % 2
    elif task == "sentence_pretraining":
        batch["labels"] = tokens(rows, length, seed=3).masked_fill(tokens(rows, length, seed=4) % 3 != 0, -100)
        batch["next_sentence_label"] = torch.arange(rows) % 2
    else:
        batch["labels"] = torch.arange(rows) % 3
    return batch


def logits_of(output: Any) -> Tensor:
    if "start_logits" in output:
        return torch.stack((output.start_logits, output.end_logits), dim=-1)
    return output.logits if "logits" in output else output.seq_relationship_logits


def linear(model: Any, name: str, states: Tensor) -> Tensor:
    module = model.get_submodule(name)
    return states @ module.weight.T + (0 if module.bias is None else module.bias)


def act(name: str, states: Tensor) -> Tensor:
    return functional.gelu(states, approximate="tanh" if name == "gelu_new" else "none") if "gelu" in name else states


def normed(model: Any, states: Tensor) -> Tensor:
    centred = states - states.mean(-1, keepdim=True)
    norm = model.head.norm
    out = centred / (centred.pow(2).mean(-1, keepdim=True) + model.config.norm_eps).sqrt() * norm.weight
    return out if norm.bias is None else out + norm.bias


def written_logits(model: Any, family: str, task: str, batch: dict[str, Tensor]) -> Tensor:
    """The logits of an encoder's head.

    Dense layer and tanh or gelu for rows, nothing for tokens; ModernBERT's transform for both; EuroBERT's mean.
    """
    ids, mask = (batch[name].flatten(0, -2) for name in ("input_ids", "attention_mask"))
    of_rows = task in ("classification", "multiple_choice")
    states = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    late = family == "eurobert"
    states = states[:, 0] if of_rows and not late else states
    if family == "modernbert":
        states = normed(model, act("gelu", linear(model, "head.dense", states)))
    elif of_rows:
        states = linear(model, "pooler.dense", states)
        states = states.tanh() if family in ("bert", "roberta", "albert") else act("gelu", states)
    wanted = linear(model, "qa_outputs" if task == "question_answering" else "classifier", states)
    if of_rows and late:
        wanted = (wanted * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return wanted


def written_decoder_logits(model: Any, family: str, task: str, batch: dict[str, Tensor]) -> Tensor:
    """The logits of a decoder's head: of the last real token for rows, of each one otherwise."""
    mask = batch["attention_mask"]
    states = model.model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    if task == "classification":
        states = states[torch.arange(len(mask)), mask.sum(1) - 1]
    if family == "modernbert-decoder" and task == "classification":
        states = normed(model, act("gelu", linear(model, "head.dense", states)))
    last = {"classification": "score", "token_classification": "classifier", "question_answering": "qa_outputs"}[task]
    return linear(model, last, states)


def logits_error(family: str, task: str) -> float:
    """How far a head's logits lie from the formula, over the largest; padding is left out."""
    model, batch = head_model(family, task), head_batch(task)
    written = written_decoder_logits if model.config.kind == "decoder" else written_logits
    with torch.no_grad():
        found, wanted = logits_of(model(**batch)), written(model, family, task, batch)
    real = batch["attention_mask"] == 1
    found = found.view_as(wanted)
    return relative(found[real], wanted[real]) if wanted.shape[:2] == real.shape else relative(found, wanted)


def written_loss(task: str, logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The summed loss and the number of labels, in words of log-softmax."""

    def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
        chosen = scores.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return -(chosen * (labels != -100)).sum()

    if task == "question_answering":
        starts, ends = logits.unbind(-1)
        both = cross_entropy(starts, batch["start_positions"]) + cross_entropy(ends, batch["end_positions"])
        return both / 2, logits.shape[0]
    return cross_entropy(logits, batch["labels"]), int((batch["labels"] != -100).sum())


def loss_error(family: str, task: str) -> float:
    """How far a head's loss lies from its definition on its own logits."""
    model, batch = head_model(family, task), head_batch(task)
    with torch.no_grad():
        output = model(**batch)
        total, count = written_loss(task, logits_of(output), batch)
    return abs(output.loss.item() * count / total.item() - 1)


PROBLEMS: dict[str, tuple[int, Tensor]] = {
    "regression": (1, torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "regression of three numbers": (3, torch.randn(4, 3, generator=torch.Generator().manual_seed(0))),
    "one label of three": (3, torch.tensor([0, 2, 1, 1])),
    "any of three labels": (3, torch.tensor([[0.0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])),
}
"""Kinds of labels of a row: how many numbers, and the labels of four rows."""


def problem_error(family: str, problem: str) -> float:
    """How far the loss of a classifier of rows lies from its definition."""
    num_labels, labels = PROBLEMS[problem]
    model, batch = head_model(family, "classification", num_labels=num_labels), head_batch("classification")
    batch["labels"] = labels
    if problem.startswith("regression"):
        model.config.problem_type = "regression"
    with torch.no_grad():
        output = model(**batch)
    logits, wanted = output.logits, labels.double().view(len(labels), -1)
    if problem.startswith("regression"):
        expected = (logits - wanted).pow(2).mean()
    elif problem == "any of three labels":
        expected = -(wanted * logits.sigmoid().log() + (1 - wanted) * (1 - logits.sigmoid()).log()).mean()
    else:
        chosen = [logits[row, label] - logits[row].exp().sum().log() for row, label in enumerate(labels.tolist())]
        expected = -torch.stack(chosen).mean()
    return abs(output.loss.item() / expected.item() - 1)
