"""Packed, padded and lone pieces of text, in every position scheme, and how far a model tells them apart.

Lives here: the schemes, the rows and three measures. What must not: what is allowed (`test_loom_masks.py`), or the page
that shows the figures (`family_page.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from loom_builders import HERE, documents, relative, tiny_model, tokens
from torch import Tensor

from pretrain.models import LoomPreTrainedModel

SCHEMES: dict[str, dict[str, Any]] = {
    "learned": {"position_kind": "learned", "position_offset": 2},
    "sinusoidal": {"position_kind": "sinusoidal"},
    "rotary": {"position_kind": "rotary", "rope_theta": 100.0},
    "partly rotary": {"position_kind": "rotary", "rope_theta": 100.0, "head_dim": 8, "partial_rotary_factor": 0.5},
    "yarn": {
        "position_kind": "rotary",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "alibi": {"position_kind": "alibi"},
    "relative": {"position_kind": "relative", "relative_attention_max_distance": 24},
    "none": {"position_kind": "none"},
    "capped": {"position_kind": "relative", "attention_softcap": 3.0},
}
WINDOWS = {"global_attention_every": 2, "local_window": 6}
LARGEST = 1e-5
"""Of any error here, over the largest logit, in float32."""
PIECES = (11, 24)
LENGTH = 40


def model_of(design: str, scheme: str, windows: bool, attention: str) -> LoomPreTrainedModel:
    keys = SCHEMES[scheme] | (WINDOWS if windows else {})
    return tiny_model(design, attention=attention, num_hidden_layers=2, **keys)


def piece(number: int) -> Tensor:
    return tokens(1, PIECES[number], seed=number)


def rows(*order: int | None) -> tuple[Tensor, Tensor, dict[int, slice]]:
    """A row of pieces and paddings (None: five places), its document ids, and the place of each piece."""
    parts, lengths, places, start = [], [], {}, 0
    for number in order:
        part = tokens(1, 5, seed=9) if number is None else piece(number)
        parts.append(part)
        lengths.append(-5 if number is None else part.shape[1])
        if number is not None:
            places[number] = slice(start, start + part.shape[1])
        start += part.shape[1]
    return torch.cat(parts, dim=1), documents(lengths), places


def place_errors(model: LoomPreTrainedModel) -> dict[str, float]:
    """How far the logits of a piece lie from those of the piece alone: in packed rows, and padded on either side."""
    errors: dict[str, float] = {}
    with torch.no_grad():
        alone = [model(input_ids=piece(number)).logits for number in (0, 1)]
        for order in ((0, 1, None), (1, 0, None), (None, 1, 0), (0, None, 1)):
            ids, packed, places = rows(*order)
            found = model(input_ids=ids, document_ids=packed).logits
            for number, place in places.items():
                errors[f"{number} in {order}"] = relative(found[:, place], alone[number])
        for number in (0, 1):
            for left in (False, True):
                empty = tokens(1, LENGTH - PIECES[number], seed=3)
                ids = torch.cat((empty, piece(number)) if left else (piece(number), empty), dim=1)
                mask = torch.cat((torch.zeros_like(empty), torch.ones_like(piece(number))), dim=1)
                mask = mask if left else mask.flip(1)
                positions = (mask.cumsum(1) - 1).clamp(min=0)  # as `generate` counts them
                found = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
                side = "left" if left else "right"
                errors[f"{number} padded on the {side}"] = relative(found[:, mask[0] == 1], alone[number])
    return errors


def neighbour_gradient(model: LoomPreTrainedModel) -> float:
    """The largest slope of a piece's states over what comes behind it in the row; its own slopes are not zero."""
    ids, packed, places = rows(0, 1, None)
    mine = places[0]
    leaf = model.get_input_embeddings()(ids).detach().requires_grad_()
    states = model.model(inputs_embeds=leaf, document_ids=packed).last_hidden_state[:, mine]
    (gradient,) = torch.autograd.grad(states.pow(2).sum(), leaf)
    assert gradient[:, mine].abs().sum() > 0
    return float(gradient[:, mine.stop :].abs().max())


def ways_to_write(mask: Tensor, causal: bool) -> dict[str, Tensor]:
    """A (B, L) mask of ones and zeros in every form that a model takes."""
    length = mask.shape[1]
    square = (mask[:, None, None] > 0).expand(-1, 1, length, length)
    square = square.tril() if causal else square
    one_for_each_head = square.expand(-1, 4, length, length)
    return {
        "bool": mask.bool(),
        "int64": mask,
        "int32": mask.int(),
        "uint8": mask.to(torch.uint8),
        "float": mask.float(),
        "bool 4D": square,
        "bool 4D for each head": one_for_each_head,
        "additive 4D": torch.where(square, 0.0, torch.finfo(torch.float32).min),
        "additive 4D, infinite": torch.where(square, 0.0, -torch.inf),
        "additive 4D for each head": torch.where(one_for_each_head, 0.0, -torch.inf),
    }


def mask_errors(model: LoomPreTrainedModel, padded: bool) -> dict[str, float]:
    """How far the logits under each way to write one mask lie from the usual one; without padding, from no mask."""
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    if padded:
        mask[1, 13:] = 0
    real = mask == 1
    with torch.no_grad():
        expected = model(input_ids=ids, **({"attention_mask": mask} if padded else {})).logits
        return {
            name: relative(model(input_ids=ids, attention_mask=written).logits[real], expected[real])
            for name, written in ways_to_write(mask, model.config.kind == "decoder").items()
        }


def scheme_models(scheme: str) -> list[LoomPreTrainedModel]:
    """Every model of a scheme: encoder and decoder, with and without windows, on each backend of a CPU."""
    return [
        model_of(design, scheme, windows, attention)
        for design in ("bert", "gpt2")
        for windows in (False, True)
        for attention in HERE
    ]
