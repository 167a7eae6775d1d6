"""Predicted bytes against the tensors that real steps keep alive."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.models import attention, cpu_kernels, loom_config, losses, mixers
from pretrain.planning import activations
from pretrain.planning import memory as planning
from pretrain.planning.activations import Pass
from pretrain.planning.facts import model_facts
from pretrain.planning.memory import Layout, memory, state
from pretrain.training import optim
from tests.planning.training_step import count_step

SMALL = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 2000}
# name: architecture, its sizes, rows, row length, and how the step is made
SHAPES: dict[str, tuple[str, dict[str, Any], int, int, dict[str, Any]]] = {
    "bert, fp32": (
        "bert",
        {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 3000},
        4,
        128,
        {},
    ),
    "bert, bf16, two micro-batches": (
        "bert",
        {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "vocab_size": 5000},
        8,
        64,
        {"bf16": True, "micro_steps": 2},
    ),
    "modernbert, bf16": (
        "modernbert",
        {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 2000},
        2,
        512,
        {"bf16": True},
    ),
    "modernbert, fp32, checkpointing": (
        "modernbert",
        {"hidden_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4, "vocab_size": 1000},
        4,
        128,
        {"checkpointing": True},
    ),
    "gpt2, fp32, wide vocabulary": (
        "gpt2",
        {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 20_000},
        1,
        256,
        {},
    ),
    "gpt2, bf16, checkpointing": (
        "gpt2",
        {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 1000},
        2,
        256,
        {"bf16": True, "checkpointing": True},
    ),
    "llama, bf16, Muon, few tokens": (
        "llama",
        {"hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 500},
        1,
        128,
        {"bf16": True, "optimizer": "muon"},
    ),
    "llama, fp32, grouped heads": (
        "llama",
        {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 2000,
        },
        2,
        256,
        {},
    ),
    "albert, bf16, one block for all": ("albert", SMALL | {"embedding_size": 32}, 4, 128, {"bf16": True}),
    "electra, fp32, a generator that shares its table": (
        "electra",
        SMALL | {"embedding_size": 32, "generator_size": 0.25},
        4,
        128,
        {},
    ),
    "electra, bf16, a generator of its own": (
        "electra",
        SMALL | {"generator_size": 0.5, "rtd_sharing": "none"},
        2,
        128,
        {"bf16": True},
    ),
    "transformer, fp32, a deeper decoder": ("transformer", SMALL | {"num_decoder_layers": 5}, 4, 128, {}),
    "transformer, bf16, checkpointing": ("transformer", SMALL, 8, 64, {"bf16": True, "checkpointing": True}),
    "t5, bf16": ("t5", SMALL | {"head_dim": 32}, 4, 128, {"bf16": True}),
    "llama, fp32, parallel, normed queries, windows": (
        "llama",
        SMALL
        | {
            "block_kind": "parallel_shared_norm",
            "qk_norm": "per_head",
            "attention_pattern": ["local", "global"],
            "local_window": 16,
        },
        2,
        128,
        {},
    ),
    "bert, fp32, StableAdamW": (
        "bert",
        {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 10_000},
        1,
        64,
        {"optimizer": "stable-adamw"},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_live_tensors_are_predicted_within_a_tenth(name: str) -> None:
    architecture, sizes, rows, length, how = SHAPES[name]
    facts, counted, planned = count_step(
        loom_config(architecture, max_position_embeddings=length, **sizes), rows, length, **how
    )
    predicted = memory(
        facts, planned(), optimizer=how.get("optimizer", "adamw"), accumulating=how.get("micro_steps", 1) > 1
    )
    assert predicted.tensors == pytest.approx(counted, rel=0.1), predicted


@pytest.mark.parametrize(("architecture", "bf16"), [("gpt2", True), ("gpt2", False), ("modernbert", True)])
def test_the_gpu_path_is_predicted_within_a_tenth(
    architecture: str, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code that a GPU takes (no joined products, the fused kernel, plain rotary), run on the CPU."""
    monkeypatch.setattr(attention, "fits_cpu_attention", lambda *arguments: False)
    monkeypatch.setattr(mixers, "FUSED_ROWS", 10**9)
    monkeypatch.setattr(losses, "CACHE_ELEMENTS", 10**12)

    def plain_rotary(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        first, second = states.float().chunk(2, dim=-1)
        turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
        return turned.to(states.dtype)

    monkeypatch.setattr(attention, "cpu_rotary", plain_rotary)
    sizes = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 1000}
    config = loom_config(architecture, max_position_embeddings=256, **sizes)
    facts, counted, planned = count_step(config, 2, 256, bf16=bf16)
    assert memory(facts, planned(device="cuda")).tensors == pytest.approx(counted, rel=0.1)


def test_numbers_that_the_models_choose_by_are_the_same_here() -> None:
    assert activations.CHUNK_ELEMENTS == losses.CHUNK_ELEMENTS
    assert activations.CACHE_ELEMENTS == losses.CACHE_ELEMENTS
    assert activations.LARGEST_SQUARE == cpu_kernels.LARGEST_SQUARE
    assert activations.SHORTEST_FLOAT32_ROW == cpu_kernels.SHORTEST_FLOAT32_ROW
    assert activations.CAUSAL_BLOCK == cpu_kernels.CAUSAL_BLOCK
    assert activations.FUSED_ROWS == mixers.FUSED_ROWS
    assert planning.STACK_ELEMENTS == optim._STACK_ELEMENTS


def _meta(architecture: str) -> Any:
    from pretrain.models import model_from_config

    with torch.device("meta"):
        return model_from_config(loom_config(architecture))


def test_sharding_divides_what_it_says() -> None:
    facts = model_facts(_meta("llama"))
    size = 4.0 * facts.size
    single = state(facts, Layout())
    assert (single.masters, single.gradients, single.optimizer) == (size, size, 2 * size)
    ddp = state(facts, Layout("ddp", 8))
    assert (ddp.masters, ddp.gradients + ddp.buffers, ddp.optimizer) == (size, size, 2 * size)
    zero1, zero2 = state(facts, Layout("zero1", 8, 8)), state(facts, Layout("zero2", 8, 8))
    assert zero1.optimizer == zero2.optimizer == pytest.approx(2 * size / 8)
    assert zero2.gradients == pytest.approx(size / 8)
    assert min(zero1.buffers, zero2.buffers) > size  # DeepSpeed keeps a whole set beside the part
    assert state(facts, Layout("zero3", 8, 8)).masters == pytest.approx(2 * size / 8)
    sharded = state(facts, Layout("fsdp2", 8, 8))
    assert sharded.masters + sharded.gradients + sharded.optimizer == pytest.approx(4 * size / 8, rel=0.01)
    hybrid = state(facts, Layout("fsdp2", 64, 8))
    assert hybrid.masters == sharded.masters
    offloaded = state(facts, Layout("fsdp2", 8, 8, "all"))
    assert (offloaded.masters, offloaded.optimizer) == (0.0, 0.0)
    assert offloaded.host == pytest.approx(4 * size / 8, rel=0.01)


def test_checkpointing_and_smaller_micro_batches_take_less() -> None:
    facts = model_facts(_meta("llama"))
    whole = memory(facts, Pass(8, 2048, 2))
    assert memory(facts, Pass(4, 2048, 2)).total < whole.total
    assert memory(facts, Pass(8, 2048, 2, checkpointing=True)).activations < 0.3 * whole.activations
    assert memory(facts, Pass(8, 2048, 2), accumulating=True).total > whole.total
    assert memory(facts, Pass(8, 2048, 2), context=1e9, waste=0.1).overhead == pytest.approx(1e9 + 0.1 * whole.tensors)
    eager = memory(facts, Pass(8, 2048, 2, eager_attention=True))
    assert eager.activations > 2 * whole.activations
