"""Tasks whose answer is a text that a model writes token by token.

What lives here: the loss on the tokens of an answer, of decoders and encoder-decoders, and answers written by a model.
What must not: how an input is put into words.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.config_task import TaskSection
from pretrain.evaluation.loading import LoadedModel, usable_positions
from pretrain.evaluation.outputs import write_encoded
from pretrain.evaluation.passes import Passes
from pretrain.tasks.base import Evaluated, Evaluation, Task
from pretrain.tasks.examples import IGNORED, Example, padded

_LOGITS = 1 << 26  # of a forward pass without gradients
_LEAST_TOKENS = 512


class WritingTask(Task):
    """What tasks share whose answer is written token by token.

    Labels are the ids of the answer: (targets,) of an encoder-decoder; of a decoder (length,), beside its inputs and
    -100 wherever nothing is to be learnt, so that position t predicts the label at t + 1.
    """

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"

    def __init__(self, section: TaskSection, tokenizer: Any, *, causal: bool) -> None:
        super().__init__(section, tokenizer, causal=causal)
        self.tokens_a_batch = max(_LEAST_TOKENS, min(self.tokens_a_batch, _LOGITS // max(1, len(tokenizer))))

    @property
    def head(self) -> str:
        """A decoder's class, or an encoder-decoder's."""
        return "AutoModelForCausalLM" if self.causal else self.auto_class

    @property
    def metric(self) -> str:
        """The mean loss: it needs no answers to be written."""
        return "-loss"

    def collate(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Examples as arrays, padded; a decoder's labels as wide as its inputs."""
        arrays = padded(examples, self.padding())
        short = arrays["input_ids"].shape[1] - arrays["labels"].shape[1]
        if self.causal and short:
            arrays["labels"] = np.pad(arrays["labels"], [(0, 0), (0, short)], constant_values=IGNORED)
        return arrays

    def given(self, model: Any, inputs: Mapping[str, Any], labels: Tensor) -> Mapping[str, Any]:
        """For an encoder-decoder also what its decoder reads: the targets one place later, as its class shifts them."""
        if self.causal:
            return inputs
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        shifted = shift(labels=labels) if shift is not None else _shifted(model.config, labels)
        return {**inputs, "decoder_input_ids": shifted}

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """Cross-entropy of every token of the answers."""
        logits, targets = self._aligned(outputs.logits, labels)
        wanted = targets != IGNORED
        return F.cross_entropy(logits[wanted].float(), targets[wanted], reduction="sum")

    def _aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, vocabulary) logits and (B, T) of the targets that they are of."""
        return (logits[:, :-1], labels[:, 1:]) if self.causal else (logits, labels)

    def predictions(self, outputs: Any, batch: Mapping[str, Tensor]) -> Sequence[Any]:
        """Of each example how many targets are the likeliest id where they stand, and how many there are."""
        logits, targets = self._aligned(outputs.logits, batch["labels"])
        wanted = targets != IGNORED
        right = (logits.argmax(-1) == targets) & wanted
        return list(zip(right.sum(1).tolist(), wanted.sum(1).tolist(), strict=True))

    def token_accuracy(self, predictions: Sequence[Any]) -> dict[str, float]:
        """The share of the targets that are the likeliest id where they stand, each after the right ones before it."""
        right, count = (sum(one[place] for one in predictions) for place in (0, 1))
        return {"token_accuracy": right / count} if count else {}

    def more_scores(self, asked: Evaluation, found: Evaluated) -> Evaluated:
        """The exponential of the loss too: the perplexity of a token of the answers."""
        perplexity = {"perplexity": math.exp(min(found.scores["loss"], 700.0))} if "loss" in found.scores else {}
        return Evaluated(found.scores | perplexity, found.predictions)

    def write(
        self,
        asked: Evaluation,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        stops: Collection[int] = (),
    ) -> list[str]:
        """What the model writes for each input: the likeliest answer, by beams if there are some."""
        kind: Any = "causal" if self.causal else "seq2seq"
        loaded = LoadedModel(asked.model, self.tokenizer, kind, "the fine-tuned model", "", asked.device)
        passes = Passes(
            asked.device, batch_tokens=self.tokens_a_batch, progress=lambda *_: asked.look(), ranks=asked.ranks
        )
        stopping = {*stops, self.tokenizer.eos_token_id} - {None}
        made = write_encoded(
            loaded, prompts, passes, num_beams=num_beams, max_new_tokens=max_new_tokens, stops=stopping
        )
        return made.texts


def check_room(model: Any, wanted: int, key: str) -> None:
    """Refuse rows that are longer than the model has positions.

    Raises:
        ValueError: names the key.
    """
    positions = usable_positions(model)
    if positions is not None and positions < wanted:
        raise ValueError(f"{key}: {wanted} tokens do not fit the {positions} positions of the model; lower it")


def _shifted(config: Any, labels: Tensor) -> Tensor:
    """(B, T) targets one place later, behind what an output begins with."""
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if start is None:
        raise ValueError(
            "decoder_start_token_id is not set: nothing says what an output begins with; set it in config.json"
        )
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED, start if pad is None else pad)


def decoder_example(ids: Sequence[int], learnt: np.ndarray, place: int, extra: Any) -> Example:
    """A decoder's example: the targets are the ids where `learnt` (length,) is true, but for the first position's.

    Nothing stands before the first position that could predict it.
    """
    row = np.array(ids, dtype=np.int64)
    label = np.where(learnt, row, IGNORED)
    label[0] = IGNORED
    return Example({"input_ids": row, "attention_mask": np.ones_like(row)}, label, place, extra)


def stop_at(model: Any, ids: Collection[int]) -> None:
    """Let whoever loads the model stop at these ids too when it writes."""
    config = model.generation_config
    before = config.eos_token_id
    known = set(before if isinstance(before, list) else [] if before is None else [before])
    if not set(ids) <= known:
        every = sorted({*known, *ids})
        config.eos_token_id = every if len(every) > 1 else every[0]
        config._from_model_config = False
