"""The loss of each objective, and its gradients, beside the definition on the slow reference."""

from __future__ import annotations

import pytest
from family_page import AGAIN, loss_case, read, written
from loss_cases import CASES, loss_errors


@pytest.mark.parametrize("case", CASES)
def test_a_loss_is_its_definition(case: str) -> None:
    loss, gradients = loss_errors(case)
    assert loss < 1e-9
    assert gradients < 1e-9
    shown = [name for name in read()["Objectives"] if loss_case(name) == case]
    assert shown
    for name in shown:
        assert loss <= written("Objectives", name, "loss"), AGAIN
        assert gradients <= written("Objectives", name, "gradients"), AGAIN
