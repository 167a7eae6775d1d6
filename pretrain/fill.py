"""`pretrain fill MODEL "… [MASK] …"`: what a masked language model would put in the gaps.

What lives here: finding the gaps, and the likeliest tokens for each. What must not: loading rules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pretrain.evaluation.loading import LoadedModel, load_model

_SPELLINGS = ("[MASK]", "<mask>")


@dataclass(frozen=True)
class Candidate:
    """A token for a gap: its probability there, and the text with it in this gap (other gaps stay open)."""

    token: str
    token_id: int
    probability: float
    text: str


def fill_masks(
    model: str | Path | LoadedModel,
    text: str,
    *,
    top_k: int = 5,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> list[list[Candidate]]:
    """The `top_k` likeliest tokens for every gap of `text`, the likeliest first; gaps in the order of the text.

    Each gap is filled for itself, all other gaps open.

    Args:
        model: a directory, a Hub name, or a model that `load_model` gave.
        text: with one or more gaps, written as the tokenizer's mask token, `[MASK]` or `<mask>`.
        top_k: candidates a gap.
        tokenizer: where the tokenizer lies, when it is not in `model`.
        device: default CUDA where there is one.
        trust_remote_code: run the code that the directory carries.

    Raises:
        ValueError: when the model is no masked language model, the tokenizer has no mask token, or the text has no
            gap or is longer than the model takes; names the remedy.
    """
    if top_k < 1:
        raise ValueError(f"top_k: {top_k} must be at least 1")
    if not isinstance(model, LoadedModel):
        model = load_model(model, tokenizer=tokenizer, device=device, trust_remote_code=trust_remote_code)
    if model.kind != "mlm":
        what = "a causal language model; let it go on from a text"
        if model.kind == "seq2seq":
            what = "an encoder-decoder; let it answer an input"
        raise ValueError(f"`{model.source}` is {what} with `pretrain generate`")
    mask = model.tokenizer.mask_token
    if mask is None:
        raise ValueError(
            f"the tokenizer of `{model.tokenizer_source}` has no mask_token; give the model's own with --tokenizer"
        )
    pieces = re.split("|".join(re.escape(spelling) for spelling in dict.fromkeys((mask, *_SPELLINGS))), text)
    if len(pieces) == 1:
        raise ValueError(f"there is no gap in the text; mark one or more with {mask}")
    encoded = model.tokenizer(mask.join(pieces), return_tensors="pt", verbose=False).to(model.device)
    length, longest = encoded["input_ids"].shape[1], model.max_positions
    if longest is not None and length > longest:
        raise ValueError(f"the text has {length} tokens, `{model.source}` takes {longest}; give a shorter one")
    places = (encoded["input_ids"][0] == model.tokenizer.mask_token_id).nonzero().squeeze(1)
    if len(places) != len(pieces) - 1:
        raise ValueError(
            f"the tokenizer of `{model.tokenizer_source}` does not keep {mask} whole: {len(pieces) - 1} gaps became "
            f"{len(places)}; give the model's own tokenizer with --tokenizer"
        )
    with torch.no_grad():
        logits = model.model(input_ids=encoded["input_ids"]).logits  # (1, L, vocabulary)
    chances = logits[0, places].float().softmax(-1)
    best = chances.topk(min(top_k, chances.shape[-1]))
    return [
        [
            _candidate(model.tokenizer, pieces, gap, mask, token_id, probability)
            for token_id, probability in zip(ids.tolist(), values.tolist(), strict=True)
        ]
        for gap, (values, ids) in enumerate(zip(best.values, best.indices, strict=True))
    ]


def _candidate(tokenizer: Any, pieces: list[str], gap: int, mask: str, token_id: int, probability: float) -> Candidate:
    token = str(tokenizer.convert_ids_to_tokens(token_id))
    word = str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
    before, after = mask.join(pieces[: gap + 1]), mask.join(pieces[gap + 1 :])
    if token.startswith("##"):  # WordPiece: a piece that goes on with the word before it
        before, word = before.rstrip(), word.removeprefix("##")
    elif before.endswith(" ") or not before:
        word = word.removeprefix(" ")
    return Candidate(token, token_id, probability, before + word + after)


def show_candidates(filled: list[list[Candidate]], console: Console) -> None:
    """A table for each gap."""
    for number, candidates in enumerate(filled, start=1):
        table = Table(title=f"gap {number} of {len(filled)}" if len(filled) > 1 else None)
        table.add_column("probability", justify="right")
        table.add_column("token")
        table.add_column("text")
        for candidate in candidates:
            table.add_row(f"{candidate.probability:.4f}", Text(candidate.token), Text(candidate.text))
        console.print(table)
