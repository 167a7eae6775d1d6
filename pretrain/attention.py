"""`pretrain attention MODEL "text"`: where a model looks, as one page.

What lives here: the passes that give probabilities and slopes, and rollout. What must not: how the page looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from pretrain.data.looking.spelling import Spelling
from pretrain.evaluation.loading import LoadedModel, load_model
from pretrain.files import replace_file
from pretrain.pages.attention import Floats, Stack, attention_page


def write_attention(
    model: str | Path | LoadedModel,
    text: str,
    out: str | Path,
    *,
    target: str | None = None,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a self-contained HTML page with the attention of every layer and head to a text; return its path.

    Args:
        model: a directory, a Hub name, or a model that `load_model` gave: masked, causal or encoder-decoder.
        text: what it reads.
        out: the file.
        target: an encoder-decoder's output; by default what it generates.
        tokenizer: where the tokenizer lies, when it is not in `model`.
        device: default CUDA where there is one.
        trust_remote_code: run the code that the directory carries.

    Raises:
        ValueError: when the text is empty or too long, `target` is given to another kind of model, or the model gives
            no attention; names the remedy.
    """
    if not isinstance(model, LoadedModel):
        model = load_model(model, tokenizer=tokenizer, device=device, trust_remote_code=trust_remote_code)
    if target is not None and model.kind != "seq2seq":
        raise ValueError(f"--target is for an encoder-decoder, `{model.source}` is none; leave it out")
    stacks = attention_of(model, text, target=target)
    replace_file(Path(out), attention_page(model.source, text, stacks).encode())
    return Path(out)


def attention_of(model: LoadedModel, text: str, *, target: str | None = None) -> list[Stack]:
    """The attention of every stack, with head importance and rollout; see `write_attention`."""
    encoded = model.tokenizer(text, return_tensors="pt", verbose=False).to(model.device)
    ids: Tensor = encoded["input_ids"]
    longest = model.max_positions
    if not ids.shape[1]:
        raise ValueError("the text gives no token; give some words")
    if longest is not None and ids.shape[1] > longest:
        raise ValueError(f"the text has {ids.shape[1]} tokens, `{model.source}` takes {longest}; give a shorter one")
    if model.kind == "seq2seq":
        return _of_pair(model, ids, target)
    with torch.enable_grad():
        output = _run(model, input_ids=ids)
        targets = ids[0, 1:] if model.kind == "causal" else ids[0]
        logits = output.logits[0, :-1] if model.kind == "causal" else output.logits[0]
        loss = functional.cross_entropy(logits.float(), targets) if len(targets) else logits.float().sum()
        maps, importance = _measure(model, output.attentions, loss)
    tokens = _spell(model, ids)
    return [Stack("self-attention", tokens, tokens, maps, importance, rollout(maps))]


def _of_pair(model: LoadedModel, ids: Tensor, target: str | None) -> list[Stack]:
    """Encoder, decoder and cross-attention."""
    start = model.model.config.decoder_start_token_id
    if target is None:
        decoded = model.model.generate(input_ids=ids, max_new_tokens=64, do_sample=False)
    else:
        made: Tensor = model.tokenizer(text_target=target, return_tensors="pt", verbose=False)["input_ids"]
        decoded = torch.cat((made.new_full((1, 1), start), made), dim=1).to(model.device)
    inputs, targets = decoded[:, :-1], decoded[0, 1:]
    with torch.enable_grad():
        output = _run(model, input_ids=ids, decoder_input_ids=inputs)
        loss = functional.cross_entropy(output.logits[0].float(), targets)
        read = _measure(model, output.encoder_attentions, loss)
        written = _measure(model, output.decoder_attentions, loss)
        across = _measure(model, output.cross_attentions, loss)
    asked, answered = _spell(model, ids), _spell(model, inputs)
    return [
        Stack("the encoder's self-attention", asked, asked, *read, rollout(read[0])),
        Stack("the decoder's self-attention", answered, answered, *written, rollout(written[0])),
        Stack("the decoder's attention to the encoder", answered, asked, *across),
    ]


def _run(model: LoadedModel, **inputs: Tensor) -> Any:
    """A forward pass by the backend that gives probabilities; the model's own is put back."""
    before = model.model.config._attn_implementation
    if before != "eager":
        model.model.set_attn_implementation("eager")
    try:
        return model.model(**inputs, output_attentions=True, use_cache=False)
    finally:
        if before != "eager":
            model.model.set_attn_implementation(before)


def _measure(model: LoadedModel, attentions: Sequence[Tensor] | None, loss: Tensor) -> tuple[Floats, Floats | None]:
    """Maps (layers, heads, Q, K), and the mean of |probability x slope| of each head where slopes are known."""
    if not attentions:
        raise ValueError(f"`{model.source}` ({type(model.model).__name__}) gives no attention probabilities")
    maps = torch.stack([layer.detach()[0] for layer in attentions]).float().cpu().numpy()
    known = [layer for layer in attentions if layer.requires_grad]
    if len(known) != len(attentions):
        return maps, None
    slopes = torch.autograd.grad(loss, known, retain_graph=True, allow_unused=True)
    if any(slope is None for slope in slopes):
        return maps, None
    moved = [(layer * slope).abs().mean(dim=(0, 2, 3)) for layer, slope in zip(known, slopes, strict=True)]
    return maps, torch.stack(moved).detach().float().cpu().numpy()


def rollout(maps: Floats) -> Floats:
    """How much of each input token reaches each place: (layers, heads, L, L) -> (L, L), rows sum to 1.

    The product over layers of half the mean over heads and half the identity, which stands for the residual (Abnar and
    Zuidema 2020, arXiv 2005.00928).
    """
    length = maps.shape[-1]
    reached = np.eye(length, dtype=np.float32)
    for layer in maps.mean(axis=1):
        step = 0.5 * layer + 0.5 * np.eye(length, dtype=np.float32)
        reached = (step / step.sum(-1, keepdims=True)) @ reached
    return reached.astype(np.float32)


def _spell(model: LoadedModel, ids: Tensor) -> list[str]:
    """The text of each token; as the vocabulary writes it where the tokenizer has no fast form."""
    tokenizer: Any = model.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return [str(token) for token in tokenizer.convert_ids_to_tokens(ids[0].tolist())]
    return Spelling.of(backend, len(tokenizer), tokenizer.all_special_ids).spell(ids[0].tolist())
