"""Generation by every scheme of positions, with windows and grouped heads: what only saves time changes no token.

With a cache and without, of fixed size, in a padded batch, with a draft by another model: greedy, beams and samples of
a seed. Logits of single steps, stopping and likelihoods are in test_loom_models.py and test_loom_seq2seq_generation.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loom_builders import tiny_model, tokens
from seq2seq_builders import seq2seq_model
from torch import Tensor

SCHEMES: dict[str, dict[str, Any]] = {
    "learned": {"position_kind": "learned"},
    "sinusoidal": {"position_kind": "sinusoidal"},
    "rotary": {"position_kind": "rotary", "head_dim": 8, "partial_rotary_factor": 0.5},
    "alibi": {"position_kind": "alibi"},
    "relative": {"position_kind": "relative"},
    "none": {"position_kind": "none"},
    "windows": {"position_kind": "rotary", "attention_pattern": ["local", "global"], "local_window": 4},
    "grouped": {"position_kind": "rotary", "num_key_value_heads": 2, "qk_norm": "per_head"},
}
STYLES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "samples": {"do_sample": True, "top_k": 0},
}
LENGTHS = (5, 9)  # of the rows, the first of which is padded


@pytest.fixture(scope="module", params=SCHEMES)
def decoder(request: pytest.FixtureRequest) -> Any:
    keys = {"num_hidden_layers": 2} | SCHEMES[request.param]
    return tiny_model("llama", **keys), tiny_model("llama", seed=1, **keys)


@pytest.fixture(scope="module", params=SCHEMES)
def encoder_decoder(request: pytest.FixtureRequest) -> Any:
    keys = {"decoder_start_token_id": 2} | SCHEMES[request.param]
    return seq2seq_model("transformer", **keys), seq2seq_model("transformer", seed=1, **keys)


def batch(side: str = "left") -> dict[str, Tensor]:
    """Two rows of different lengths; positions that count from each row's first token are given."""
    ids, mask = tokens(len(LENGTHS), max(LENGTHS)), torch.ones(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, slice(0, max(LENGTHS) - length) if side == "left" else slice(length, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, Tensor], style: str = "greedy", **keys: Any) -> list[list[int]]:
    """Five new tokens for each row."""
    torch.manual_seed(5)
    made = model.generate(
        **inputs, **STYLES[style], max_new_tokens=5, min_new_tokens=5, eos_token_id=None, pad_token_id=0, **keys
    )
    return [row[-5:].tolist() for row in made]


def alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    real = inputs["attention_mask"][row] == 1
    return {"input_ids": inputs["input_ids"][row, real][None], "attention_mask": torch.ones(1, int(real.sum())).long()}


def check(model: Any, inputs: dict[str, Tensor]) -> None:
    """One batch by every style and cache; each row alone."""
    made = {}
    for style in STYLES:
        made[style] = generate(model, inputs, style)
        assert generate(model, inputs, style, use_cache=False) == made[style], style
        assert generate(model, inputs, style, cache_implementation="static") == made[style], f"static, {style}"
    assert made["samples"] != made["greedy"]
    for style in ("greedy", "beams"):
        rows = [generate(model, alone(inputs, row), style)[0] for row in range(len(LENGTHS))]
        assert rows == made[style], style


def check_drafts(model: Any, other: Any, inputs: dict[str, Tensor]) -> None:
    """A draft by the model itself is taken, one by another is mended."""
    single = alone(inputs, 1)
    expected = generate(model, single)
    assert generate(other, single) != expected
    for draft in (model, other):
        assert generate(model, single, assistant_model=draft) == expected


def test_decoders_generate_the_same_tokens_by_every_way(decoder: Any) -> None:
    check(decoder[0], batch())


def test_decoders_take_drafts(decoder: Any) -> None:
    check_drafts(*decoder, batch())
    single = alone(batch(), 1)
    assert generate(decoder[0], single, prompt_lookup_num_tokens=2) == generate(decoder[0], single)


def test_encoder_decoders_generate_the_same_tokens_by_every_way(encoder_decoder: Any) -> None:
    check(encoder_decoder[0], batch("right"))


def test_encoder_decoders_take_drafts(encoder_decoder: Any) -> None:
    check_drafts(*encoder_decoder, batch("right"))
