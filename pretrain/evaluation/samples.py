"""Samples during training: what the model makes of a few fixed prompts, always the likeliest, so the same every time.

What lives here: the prompts as ids, the choice of tokens by plain forward passes (any engine can make those), the file
they are kept in. What must not: scores, randomness, or the training loop.

Every process of a job makes the same number of passes of the same shape, whatever the model writes: one that ended
earlier than the others would leave them waiting.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from pretrain.config import RunConfig
from pretrain.evaluation.loading import Kind, LoadedModel
from pretrain.evaluation.outputs import input_ids
from pretrain.evaluation.passes import bare
from pretrain.files import replace_file

FILE = "samples.jsonl"
NEW_TOKENS = 48
_CANDIDATES = 5
_LOGITS = 1 << 26  # of one forward pass, at most, where more than one row shares it
_GAP = re.compile(r"\[MASK\]|<mask>")
_KINDS: dict[str, Kind] = {"encoder": "mlm", "decoder": "causal", "seq2seq": "seq2seq"}

Sample = dict[str, Any]


class Sampler:
    """The prompts of a run, made ready for its model.

    Args:
        config: the run's; its tokenizer lies in the run directory.
        model: the module itself, not an engine around it.
        device: where it computes.

    Raises:
        ValueError: when a prompt is empty, too long for the model, or has no gap for a masked model to fill.
    """

    def __init__(self, config: RunConfig, model: nn.Module, device: torch.device) -> None:
        directory = config.directory / "tokenizer"
        kind = _KINDS[config.objective.model_kind or config.kind or _kind_of(model)]
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        self.prompts = config.evaluate.samples
        self.loaded = LoadedModel(model, tokenizer, kind, config.name, str(directory), device)
        self.rows = [self._ids(prompt) for prompt in self.prompts]
        longest = self.loaded.max_positions
        for prompt, row in zip(self.prompts, self.rows, strict=True):
            if longest is not None and len(row) > longest - (kind == "causal"):
                raise ValueError(
                    f"evaluate.samples: {prompt[:40]!r} has {len(row)} tokens, the model takes {longest}; shorten it"
                )
        before = max(map(len, self.rows)) if kind == "causal" else 0
        self.new_tokens = NEW_TOKENS if longest is None else min(NEW_TOKENS, longest - before)

    def _ids(self, prompt: str) -> list[int]:
        tokenizer, kind = self.loaded.tokenizer, self.loaded.kind
        if kind == "seq2seq":
            return input_ids(self.loaded, prompt)
        if kind == "mlm":
            mask = tokenizer.mask_token
            ids = [] if mask is None else list(tokenizer(_GAP.sub(lambda _: mask, prompt), verbose=False)["input_ids"])
            if not ids or tokenizer.mask_token_id not in ids:
                raise ValueError(f"evaluate.samples: {prompt[:40]!r} has no gap to fill; write one or more [MASK]")
            return ids
        ids = list(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
        bos = tokenizer.bos_token_id
        ids = [bos, *ids] if bos is not None and ids[:1] != [bos] else ids
        if not ids:
            raise ValueError("evaluate.samples: a prompt is empty, and the tokenizer has no BOS to start from")
        return ids

    def samples(self, model: nn.Module, stopping: Callable[[], bool]) -> list[Sample] | None:
        """What the model makes of every prompt; None when `stopping` says so before the end.

        Args:
            model: called as `model(input_ids=...)`, in eval mode and without gradients.
            stopping: asked after each forward pass, equally often in every process.
        """
        vocabulary = int(self.loaded.model.config.vocab_size)
        width = max(map(len, self.rows)) + self.new_tokens
        at_once = max(1, _LOGITS // (width * vocabulary))
        made: list[Sample] = []
        for first in range(0, len(self.rows), at_once):
            rows = self.rows[first : first + at_once]
            found = self._fill(model, rows) if self.loaded.kind == "mlm" else self._write(model, rows, stopping)
            if found is None or stopping():
                return None
            made += found
        return [{"prompt": prompt, **sample} for prompt, sample in zip(self.prompts, made, strict=True)]

    def _fill(self, model: nn.Module, rows: Sequence[list[int]]) -> list[Sample]:
        """The likeliest tokens of every gap, each by itself, and the text with the likeliest of all in place."""
        tokenizer, made = self.loaded.tokenizer, []
        for row in rows:  # without padding, so that no attention mask is needed
            ids = torch.tensor([row], device=self.loaded.device)  # (1, L)
            gaps = (ids[0] == tokenizer.mask_token_id).nonzero().squeeze(1)
            best = _logits(model, input_ids=ids)[0, gaps].float().softmax(-1).topk(_CANDIDATES)
            ids[0, gaps] = best.indices[:, 0]
            words = [
                [[tokenizer.decode([token]).strip(), round(chance, 4)] for token, chance in zip(*gap, strict=True)]
                for gap in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            made.append({"text": _spell(tokenizer, ids[0].tolist()), "candidates": words})
        return made

    def _write(self, model: nn.Module, rows: Sequence[list[int]], stopping: Callable[[], bool]) -> list[Sample] | None:
        """The likeliest next token again and again: a continuation, or what an encoder-decoder answers."""
        tokenizer, device = self.loaded.tokenizer, self.loaded.device
        answers = self.loaded.kind == "seq2seq"
        fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        asked, mask = _padded(rows, fill, 0 if answers else self.new_tokens, device)
        given: dict[str, Tensor] = {"input_ids": asked, "attention_mask": mask} if answers else {}
        starts = [[_start_of(self.loaded.model)]] * len(rows) if answers else rows
        # What stands behind a row's own end is not seen by it: attention is causal.
        written = _padded(starts, fill, self.new_tokens, device)[0] if answers else asked
        ends = torch.tensor([len(row) for row in starts], device=device)
        number = torch.arange(len(rows), device=device)
        for _ in range(self.new_tokens):
            given["decoder_input_ids" if answers else "input_ids"] = written
            written[number, ends] = _logits(model, **given)[number, ends - 1].argmax(-1)
            ends = ends + 1
            if stopping():
                return None
        made = []
        for row, start in zip(written.tolist(), starts, strict=True):
            new = row[len(start) : len(start) + self.new_tokens]
            if tokenizer.eos_token_id in new:
                new = new[: new.index(tokenizer.eos_token_id)]
            made.append({"text": _spell(tokenizer, new)})
        return made


def _logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    """One forward pass: (B, L, vocabulary). Compiled models run eagerly, as no other shape is worth a compilation."""
    extra = {"use_cache": False} if "use_cache" in inspect.signature(bare(model).forward).parameters else {}
    with torch.compiler.set_stance("force_eager"):
        output = model(**inputs, **extra)
    logits: Tensor | None = getattr(output, "prediction_logits", None)  # beside a head for pairs of segments
    return output.logits if logits is None else logits


def _padded(rows: Sequence[Sequence[int]], fill: int, room: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows in one tensor (B, L), with `room` places behind the longest, and 1 where a row has tokens."""
    width = max(map(len, rows)) + room
    ids = torch.full((len(rows), width), fill, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids.to(device), mask.to(device)


def _spell(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _start_of(model: Any) -> int:
    own = getattr(model.config, "decoder_start_token_id", None)
    if own is None:
        raise ValueError("evaluate.samples: the model's decoder_start_token_id is not set; leave the samples out")
    return int(own)


def _kind_of(model: Any) -> Literal["encoder", "decoder", "seq2seq"]:
    """By its class, where the configuration does not say it."""
    if getattr(model.config, "is_encoder_decoder", False):
        return "seq2seq"
    return "encoder" if "MaskedLM" in type(model).__name__ else "decoder"


def keep_samples(path: Path, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """Write a line a prompt: `step`, `prompt`, `text`, of a masked model `candidates` too.

    What an earlier call wrote about this step or later ones goes: the run went on from before it.
    """
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []  # a text may hold other line ends
    kept = [line for line in lines if _is_before(line, step)]
    kept += [json.dumps({"step": step, **sample}, ensure_ascii=False) for sample in samples]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(f"{line}\n" for line in kept).encode())


def _is_before(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] < step)
    except (ValueError, KeyError, TypeError):  # not ours, or damaged
        return False
