"""Padded = packed = alone, in every position scheme, with and without windows: a piece of text does not see its place.

Rows of padding give numbers, and every way to write one mask gives the same.
"""

from __future__ import annotations

import pytest
import torch
from family_page import AGAIN, written
from loom_builders import ARCHITECTURE_NAMES, HERE, tiny_model, tokens
from mask_cases import LARGEST, SCHEMES, WINDOWS, mask_errors, model_of, neighbour_gradient, place_errors, rows

from pretrain.models import LoomPreTrainedModel

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
every_kind = pytest.mark.parametrize("design", ["bert", "gpt2"])
every_window = pytest.mark.parametrize("windows", [False, True], ids=["global", "windows"])
every_backend = pytest.mark.parametrize("attention", HERE)


@every_backend
@every_window
@every_scheme
@every_kind
def test_padded_is_packed_is_alone(design: str, scheme: str, windows: bool, attention: str) -> None:
    model = model_of(design, scheme, windows, attention)
    for case, error in place_errors(model).items():
        assert error < LARGEST, case
        assert error <= written("Masks", scheme, "place"), f"{case}: {AGAIN}"


@every_backend
@every_window
@every_scheme
@every_kind
def test_a_neighbour_gets_no_gradient(design: str, scheme: str, windows: bool, attention: str) -> None:
    model = model_of(design, scheme, windows, attention)
    ids, packed, places = rows(0, 1, None)
    mine = places[0]
    embedded = model.get_input_embeddings()(ids).detach()
    before = model.model(inputs_embeds=embedded, document_ids=packed).last_hidden_state[:, mine]
    changed = embedded.clone()
    changed[:, mine.stop :] += 3.0
    after = model.model(inputs_embeds=changed, document_ids=packed).last_hidden_state[:, mine]  # by the same kernels
    assert torch.equal(before, after)
    assert neighbour_gradient(model) == 0


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


@every_backend
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scheme", [*ARCHITECTURE_NAMES, "alibi", "relative", "capped"])
def test_every_way_to_write_a_mask_is_the_same(scheme: str, padded: bool, attention: str) -> None:
    designs = ["bert", "gpt2"] if scheme in SCHEMES else [scheme]
    for design in designs:
        keys = SCHEMES[scheme] | WINDOWS if scheme in SCHEMES else {}
        model = tiny_model(design, attention=attention, **keys)
        for name, error in mask_errors(model, padded).items():
            assert error < LARGEST, name
