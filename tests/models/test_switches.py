"""Every switch against the slow float64 reference: logits, and the gradient of each parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_page import AGAIN, LARGEST, written
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import alibi_slope, rotary_frequencies, t5_bucket
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention
from variants import CASES, KINDS, LOCAL, SIZES, YARN, Variant, case_name, measure, measure_config, title_of

from pretrain.models import LoomConfig, loom_config, model_class
from pretrain.models.mixers import Geometry
from pretrain.models.positions import alibi_slopes, relative_buckets, rotary_tables


@pytest.mark.parametrize(("variant", "kind"), CASES, ids=case_name)
def test_a_variant_equals_its_definition(variant: Variant, kind: str) -> None:
    errors = measure(variant, kind)
    assert errors.logits < LARGEST.logits
    assert errors.gradients < LARGEST.gradients
    assert errors.float32 < LARGEST.float32
    for column in ("logits", "gradients", "float32"):
        assert getattr(errors, column) <= written(title_of(variant), variant.name, column), AGAIN


@st.composite
def configurations(draw) -> LoomConfig:
    """Any combination of switches that fits together."""

    def one(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    kind = one("encoder", "decoder", "seq2seq")
    keys: dict[str, Any] = {
        "num_attention_heads": one(2, 4),
        "num_key_value_heads": one(1, 2),
        "head_dim": one(4, 6),
        "num_hidden_layers": one(2, 3),
        "attention_bias": one(True, False),
        "attention_scale": one(None, 0.3),
        "attention_softcap": one(None, 2.0),
        "qk_norm": one("none", "per_head", "full_width"),
        "position_kind": one("learned", "sinusoidal", "rotary", "alibi", "relative", "none"),
        "mlp_kind": one("plain", "gated"),
        "mlp_bias": one(True, False),
        "hidden_act": one("gelu", "gelu_new", "silu", "relu", "relu2"),
        "norm_kind": one("layer_norm", "rms_norm"),
        "norm_placement": one("pre", "post"),
        "embedding_norm": one(True, False),
        "embedding_size": one(16, 10),
        "embedding_scale": one(1.0, 2.0),
        "residual_scale": one(1.0, 0.7),
        "output_scale": one(1.0, 0.5),
        "logit_softcap": one(None, 3.0),
        "head_transform": one(True, False),
        "head_bias": one(True, False),
        "head_dense_bias": one(True, False),
        "tie_word_embeddings": one(True, False),
    }
    keys["norm_bias"] = keys["norm_kind"] == "layer_norm" and one(True, False)
    if keys["embedding_size"] != 16 and keys["tie_word_embeddings"]:
        keys["head_transform"] = True
    if one(True, False):
        keys |= {"attention_pattern": one(["local", "global"], ["global", "local", "local"]), "local_window": one(2, 5)}
    if keys["position_kind"] in ("learned", "sinusoidal"):
        keys["position_offset"] = one(0, 2)
    if keys["position_kind"] == "rotary":
        keys |= {"rope_theta": 50.0, "partial_rotary_factor": one(1.0, 4 / keys["head_dim"])}
        keys["rope_scaling"] = one(None, {"rope_type": "linear", "factor": 2.0}, YARN)
    if kind != "seq2seq":
        first_norm = keys["norm_placement"] == "post" or one(True, False)
        blocks = ["sequential", *(["parallel"] if keys["norm_placement"] == "pre" else [])]
        keys |= {"first_norm": first_norm, "block_kind": one(*blocks), "type_vocab_size": one(0, 2)}
        if first_norm:
            keys["num_hidden_groups"] = one(1, keys["num_hidden_layers"])
    return loom_config(KINDS[kind], **(SIZES | keys))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(configurations())
def test_switches_go_together(config: LoomConfig) -> None:
    errors = measure_config(config, {}, "together")
    assert errors.logits < 1e-9
    assert errors.gradients < 1e-9
    assert errors.float32 < 3e-5  # three layers of capped, scaled and unnormed values


@pytest.mark.parametrize("both_sides", [True, False])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (32, 100), (8, 9), (16, 64), (64, 1000)])
def test_buckets_are_t5_s(both_sides: bool, buckets: int, longest: int) -> None:
    distances = torch.arange(-1200, 1201)
    keys = {"num_buckets": buckets, "max_distance": longest}
    theirs = T5Attention._relative_position_bucket(distances, bidirectional=both_sides, **keys)
    assert torch.equal(relative_buckets(distances, both_sides=both_sides, **keys), theirs)
    for distance in (*range(-40, 41), -99, -100, -101, 63, 64, 65, 127, 128, 129, 1000, 1200):
        slow = t5_bucket(distance, buckets, longest, both_sides=both_sides)
        assert slow == int(theirs[distance + 1200]), distance


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 16, 20])
def test_slopes_are_bloom_s(heads: int) -> None:
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]  # the summand of place 1
    assert torch.allclose(torch.tensor(alibi_slopes(heads)), theirs, rtol=1e-6)
    assert [alibi_slope(head, heads) for head in range(heads)] == pytest.approx(alibi_slopes(heads), rel=1e-12)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        YARN | {"original_max_position_embeddings": 2048},
        YARN | {"original_max_position_embeddings": 512, "beta_fast": 8.0, "beta_slow": 2.0},
        YARN | {"original_max_position_embeddings": 512, "attention_factor": 1.5},
        YARN | {"factor": 1.0},
        YARN | {"beta_fast": 8.0, "beta_slow": 2.0},  # no plane turns so often: the ramp is upside down
    ],
)
@pytest.mark.parametrize("width", [8, 64])
def test_scaled_angles_are_those_of_transformers(scaling: dict[str, Any], width: int) -> None:
    stock = LlamaConfig(head_dim=width, rope_parameters=scaling | {"rope_theta": 10_000.0})
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](stock, torch.device("cpu"))
    positions = torch.arange(50)[None]
    cosine, sine = rotary_tables(positions, width, 10_000.0, scaling)
    angles = positions[..., None] * frequencies
    assert torch.allclose(cosine[:, :, 0], angles.cos() * magnitude, atol=1e-5)
    assert torch.allclose(sine[:, :, 0], angles.sin() * magnitude, atol=1e-5)
    slow, size = rotary_frequencies(width, 10_000.0, scaling)
    assert slow == pytest.approx(frequencies.tolist(), rel=1e-5)
    assert size == pytest.approx(magnitude)


def test_ntk_is_the_base_that_transformers_takes_for_a_row_of_that_length() -> None:
    # Its dynamic form stretches by (factor * length / context) - (factor - 1): 4 for factor 3 at twice the context.
    stock = LlamaConfig(
        head_dim=16,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10_000.0},
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](stock, torch.device("cpu"), seq_len=128)
    config = loom_config("llama", head_dim=16, rope_scaling={"rope_type": "ntk", "factor": 4.0})
    assert config.rope_scaling is None
    slow, _ = rotary_frequencies(16, config.rope_theta, None)
    assert slow == pytest.approx(frequencies.tolist(), rel=1e-5)
    first, last = slow[0], slow[-1]
    assert (first, last) == pytest.approx((1.0, 10_000.0 ** (-14 / 16) / 4))


def test_rotary_bases_of_local_layers_are_not_stretched() -> None:
    keys = LOCAL | {"position_kind": "rotary", "rope_theta": 50.0, "local_rope_theta": 50.0}
    plain = model_class(loom_config("gpt2", **SIZES, **keys))
    both = [
        plain(loom_config("gpt2", **SIZES, **keys, rope_scaling=scaling)).model.mixer_inputs(
            Geometry(torch.arange(9)[None], length=9, past_length=0, key_length=9)
        )
        for scaling in (None, {"rope_type": "linear", "factor": 2.0})
    ]
    assert torch.equal(both[0]["local"].rotary[0], both[1]["local"].rotary[0])
    assert not torch.equal(both[0]["global"].rotary[0], both[1]["global"].rotary[0])
