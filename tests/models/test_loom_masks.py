"""Padded = packed = alone, in every position scheme, with and without windows: a piece of text does not see its place.

Rows of padding give numbers, and every way to write one mask gives the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loom_builders import ARCHITECTURE_NAMES, HERE, documents, relative, tiny_config, tiny_model, tokens
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
PIECES = (11, 24)
LENGTH = 40

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
every_kind = pytest.mark.parametrize("design", ["bert", "gpt2"])
every_window = pytest.mark.parametrize("windows", [False, True], ids=["global", "windows"])
every_backend = pytest.mark.parametrize("attention", HERE)


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


@every_backend
@every_window
@every_scheme
@every_kind
def test_padded_is_packed_is_alone(design: str, scheme: str, windows: bool, attention: str) -> None:
    model = model_of(design, scheme, windows, attention)
    with torch.no_grad():
        alone = [model(input_ids=piece(number)).logits for number in (0, 1)]
        for order in ((0, 1, None), (1, 0, None), (None, 1, 0), (0, None, 1)):
            ids, packed, places = rows(*order)
            found = model(input_ids=ids, document_ids=packed).logits
            for number, place in places.items():
                assert relative(found[:, place], alone[number]) < 1e-5, (order, number)
        for number in (0, 1):
            for left in (False, True):
                empty = tokens(1, LENGTH - PIECES[number], seed=3)
                ids = torch.cat((empty, piece(number)) if left else (piece(number), empty), dim=1)
                mask = torch.cat((torch.zeros_like(empty), torch.ones_like(piece(number))), dim=1)
                mask = mask if left else mask.flip(1)
                positions = (mask.cumsum(1) - 1).clamp(min=0)  # as `generate` counts them
                found = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
                assert relative(found[:, mask[0] == 1], alone[number]) < 1e-5, (number, left)


@every_backend
@every_window
@every_scheme
@every_kind
def test_a_neighbour_gets_no_gradient(design: str, scheme: str, windows: bool, attention: str) -> None:
    model = model_of(design, scheme, windows, attention)
    ids, packed, places = rows(0, 1, None)
    mine = places[0]
    embedded = model.get_input_embeddings()(ids).detach()
    leaf = embedded.clone().requires_grad_()
    before = model.model(inputs_embeds=leaf, document_ids=packed).last_hidden_state[:, mine]
    (gradient,) = torch.autograd.grad(before.pow(2).sum(), leaf)
    assert gradient[:, mine].abs().sum() > 0
    assert gradient[:, mine.stop :].abs().sum() == 0
    changed = embedded.clone()
    changed[:, mine.stop :] += 3.0
    after = model.model(inputs_embeds=changed, document_ids=packed).last_hidden_state[:, mine]  # by the same kernels
    assert torch.equal(before, after)


def check_rows_of_padding(model: LoomPreTrainedModel) -> None:
    ids = tokens(3, 20)
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1] = 0
    square = (mask[:, None, None] > 0).expand(3, 1, 20, 20)
    lowest = torch.finfo(torch.float32).min
    for inputs in (
        {"attention_mask": mask},
        {"document_ids": mask.int()},
        {"attention_mask": square},
        {"attention_mask": torch.where(square, 0.0, lowest)},
        {"attention_mask": torch.where(square, 0.0, -torch.inf)},
    ):
        model.zero_grad()
        output = model(input_ids=ids, **inputs).logits
        output.sum().backward()  # the empty row's own gradient is finite too
        assert torch.isfinite(output).all()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@every_backend
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_rows_of_padding_alone_give_numbers(architecture: str, attention: str) -> None:
    check_rows_of_padding(tiny_model(architecture, attention=attention))


@every_backend
@every_scheme
@every_kind
def test_rows_of_padding_alone_give_numbers_in_every_scheme(design: str, scheme: str, attention: str) -> None:
    check_rows_of_padding(model_of(design, scheme, True, attention))


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


@every_backend
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scheme", [*ARCHITECTURE_NAMES, "alibi", "relative", "capped"])
def test_every_way_to_write_a_mask_is_the_same(scheme: str, padded: bool, attention: str) -> None:
    designs = ["bert", "gpt2"] if scheme in SCHEMES else [scheme]
    for design in designs:
        keys = SCHEMES[scheme] | WINDOWS if scheme in SCHEMES else {}
        model = tiny_model(design, attention=attention, **keys)
        ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
        if padded:
            mask[1, 13:] = 0
        real = mask == 1
        with torch.no_grad():
            expected = model(input_ids=ids, **({"attention_mask": mask} if padded else {})).logits
            for name, written in ways_to_write(mask, tiny_config(design).kind == "decoder").items():
                found = model(input_ids=ids, attention_mask=written).logits
                assert relative(found[real], expected[real]) < 1e-5, name
