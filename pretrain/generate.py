"""`pretrain generate MODEL "text"`: a causal model goes on from a text, an encoder-decoder answers it.

What lives here: the choice of the next token, in the terms of `transformers.generate`. What must not: loading rules, or
printing; text is returned, and handed out piece by piece to a callback while it grows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from pretrain.evaluation.loading import LoadedModel, load_model
from pretrain.evaluation.outputs import DEFAULT_NEW_TOKENS, generation_config, input_ids, output_room
from pretrain.model_dir import DTYPES
from pretrain.runtime import resolve_precision

_DEFAULT_TEMPERATURE = 0.8  # of a causal model; an encoder-decoder writes the likeliest output
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def generate_text(
    model: str | Path | LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int | None = None,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    precision: str = "fp32",
    trust_remote_code: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Continue `prompt` and return it with what was added; of an encoder-decoder, return its output for that input.

    The prompt stands at the start of a document: BOS comes before it where the tokenizer has one. The input of an
    encoder-decoder ends in EOS. Generation ends at EOS or after `max_new_tokens`. The same arguments on the same
    machine give the same text.

    Args:
        model: a directory, a Hub name, or a model that `load_model` gave.
        prompt: any text, also none where the tokenizer has a BOS.
        max_new_tokens: tokens to add at most; default 100, or as many as the model's positions leave.
        temperature: divides the logits before sampling; 0 takes the likeliest token each time. None: 0.8 for a causal
            model without beams or a choice of tokens, else 0.
        top_k: sample from the k likeliest tokens (Fan et al. 2018); None for all.
        top_p: sample from the likeliest tokens that together hold this probability (Holtzman et al. 2019).
        num_beams: outputs that are kept on the way to the likeliest whole one; None: as many as the directory of an
            encoder-decoder asks for, else 1.
        seed: of the sampling; torch's global state is left alone.
        tokenizer: where the tokenizer lies, when it is not in `model`.
        device: default CUDA where there is one.
        precision: "fp32", "bf16", "fp16" (CUDA) or "auto".
        trust_remote_code: run the code that the directory carries.
        on_text: called with every further piece of text as it comes; with beams once, at the end.

    Raises:
        ValueError: when the model fills masks, the text does not fit its positions, or an option is out of range.
    """
    _check_options(max_new_tokens, temperature, top_k, top_p, num_beams)
    if not isinstance(model, LoadedModel):
        model = load_model(model, tokenizer=tokenizer, device=device, trust_remote_code=trust_remote_code)
    if model.kind == "mlm":
        raise ValueError(f"`{model.source}` is a masked language model; fill its masks with `pretrain fill`")
    answers = model.kind == "seq2seq"
    ids = input_ids(model, prompt) if answers else _prompt_ids(model, prompt)
    room = output_room(model, len(ids), max_new_tokens) if answers else _room(model, len(ids), max_new_tokens)
    options = generation_config(model, room, _choice(model, temperature, top_k, top_p, num_beams))
    streamer = _Pieces(model.tokenizer, on_text) if on_text is not None and options.num_beams == 1 else None
    inputs = torch.tensor([ids], device=model.device)  # (1, prompt tokens)
    dtype = DTYPES[resolve_precision(precision, model.device)]
    mixed = torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), mixed:
        torch.manual_seed(seed)
        output = model.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), generation_config=options, streamer=streamer
        )
    made = output[0] if answers else output[0, len(ids) :]
    text = str(model.tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    if on_text is not None and streamer is None:
        on_text(text)
    return text if answers else prompt + text


def _check_options(
    max_new_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    num_beams: int | None,
) -> None:
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens} must be at least 1")
    if temperature is not None and temperature < 0:
        raise ValueError(f"temperature: {temperature} must be 0 (the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: {top_k} must be at least 1; leave it out to sample from all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p} must lie above 0 and be at most 1")
    if temperature == 0 and (top_k is not None or top_p is not None):
        name = "top_k" if top_k is not None else "top_p"
        raise ValueError(
            f"{name} has no effect with temperature 0, which takes the likeliest token; remove one of them"
        )
    if num_beams is not None and num_beams < 1:
        raise ValueError(f"num_beams: {num_beams} must be at least 1")
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    if num_beams is not None and num_beams > 1 and (given := [name for name, value in sampling.items() if value]):
        raise ValueError(
            f"num_beams: {num_beams} looks for the likeliest output, {given[0]} samples; remove one of them"
        )


def _prompt_ids(model: LoadedModel, prompt: str) -> list[int]:
    ids = list(model.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
    bos = model.tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    if not ids:
        raise ValueError("the prompt is empty and the tokenizer has no bos_token to start from; give some text")
    return ids


def _choice(
    model: LoadedModel, temperature: float | None, top_k: int | None, top_p: float | None, num_beams: int | None
) -> dict[str, Any]:
    """How a token is chosen, in the words of `transformers.generate`."""
    answers = model.kind == "seq2seq"
    own = getattr(model.model, "generation_config", None)
    narrowed = top_k is not None or top_p is not None
    if temperature is None:
        temperature = _DEFAULT_TEMPERATURE if narrowed or not (answers or num_beams) else 0.0
    if temperature > 0:
        sampled = {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
        return {"do_sample": True, "num_beams": 1, **sampled}
    beams = num_beams or (getattr(own, "num_beams", None) if answers else None) or 1
    return {"do_sample": False, "num_beams": beams}


def _room(model: LoadedModel, prompt_tokens: int, max_new_tokens: int | None) -> int:
    longest = model.max_positions
    # The last token that is generated needs no position of its own.
    room = None if longest is None else longest + 1 - prompt_tokens
    if room is not None and room < (max_new_tokens or 1):
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and max_new_tokens: {max_new_tokens or 1} do not fit the {longest} "
            f"positions of `{model.source}`; "
            + (f"at most {room} new tokens do" if room > 0 else "give a shorter prompt")
        )
    if max_new_tokens is not None:
        return max_new_tokens
    return DEFAULT_NEW_TOKENS if room is None else min(DEFAULT_NEW_TOKENS, room)


class _Pieces(BaseStreamer):
    """Hands out the text that a new token completes, and holds back half a character."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._ids: list[int] = []
        self._given = 0
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt's ids first, then one new id at a time."""
        if self._prompt:
            self._prompt = False
            return
        self._ids += value.reshape(-1).tolist()
        text = self._decode()
        if not text.endswith(_REPLACEMENT):
            self._give(text)

    def end(self) -> None:
        """Give what was held back."""
        self._give(self._decode())

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _give(self, text: str) -> None:
        if len(text) > self._given:
            self._on_text(text[self._given :])
            self._given = len(text)
