"""What only a CUDA device can show: backends agree, bf16 is close, compiled equals eager, the loop runs and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.models import CAPABILITIES, loom_config, model_from_config, pick_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES: dict[str, dict[str, int]] = {
    "bert": {"num_hidden_layers": 3},
    "modernbert": {"num_hidden_layers": 4},
    "gpt2": {"num_hidden_layers": 3},
    "llama": {"num_hidden_layers": 3, "num_key_value_heads": 2},
}
BACKENDS = [name for name, can in CAPABILITIES.items() if can.devices is None or "cuda" in can.devices]


def model_of(architecture: str) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 256}
    model = model_from_config(loom_config(architecture, **sizes, **SHAPES[architecture]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model.cuda().eval()


def packed_batch(architecture: str, rows: int = 4, length: int = 256) -> dict[str, torch.Tensor]:
    """Rows of three documents of different lengths and some padding, with targets."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, 512, (rows, length), generator=generator)
    document_ids = torch.zeros(rows, length, dtype=torch.int32)
    position_ids = torch.zeros(rows, length, dtype=torch.int64)
    for number, (start, stop) in enumerate(((0, 70), (70, 200), (200, 250)), start=1):
        document_ids[:, start:stop] = number
        position_ids[:, start:stop] = torch.arange(stop - start)
    targets = torch.where(document_ids > 0, ids.roll(-1, 1), -100)
    name = "labels" if architecture in ("bert", "modernbert") else "shift_labels"
    batch = {"input_ids": ids, "position_ids": position_ids, "document_ids": document_ids, name: targets}
    return {key: value.cuda() for key, value in batch.items()}


def loss_and_gradient(
    model: Any, batch: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> tuple[float, torch.Tensor]:
    model.train()
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        loss = model(**batch, num_items_in_batch=1000).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("architecture", sorted(SHAPES))
def test_backends_agree_in_fp32(architecture: str) -> None:
    model, batch = model_of(architecture), packed_batch(architecture)
    results = {}
    for name in BACKENDS:
        model.set_attn_implementation(name)
        results[name] = loss_and_gradient(model, batch, None)
    reference, gradient = results["eager"]
    for name, (loss, other) in results.items():
        assert loss == pytest.approx(reference, rel=1e-5), name
        assert torch.linalg.norm(other - gradient) < 1e-4 * torch.linalg.norm(gradient), name


@pytest.mark.parametrize("architecture", sorted(SHAPES))
def test_bf16_is_close_to_fp32(architecture: str) -> None:
    model, batch = model_of(architecture), packed_batch(architecture)
    model.set_attn_implementation(pick_backend(model.config, "cuda")[0])
    exact, gradient = loss_and_gradient(model, batch, None)
    rounded, other = loss_and_gradient(model, batch, torch.bfloat16)
    assert rounded == pytest.approx(exact, rel=1e-2)
    assert torch.nn.functional.cosine_similarity(other, gradient, dim=0) > 0.99


@pytest.mark.parametrize("architecture", sorted(SHAPES))
def test_compiled_equals_eager(architecture: str) -> None:
    model, batch = model_of(architecture), packed_batch(architecture)
    exact, gradient = loss_and_gradient(model, batch, None)
    model.compile()
    compiled, other = loss_and_gradient(model, batch, None)
    assert compiled == pytest.approx(exact, rel=1e-5)
    assert torch.linalg.norm(other - gradient) < 1e-4 * torch.linalg.norm(gradient)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("architecture", sorted(SHAPES))
def test_a_neighbour_is_never_seen(architecture: str, dtype: torch.dtype | None) -> None:
    """Changing the first document of a row moves no logit of the second, bit for bit."""
    model, batch = model_of(architecture), packed_batch(architecture)
    model.set_attn_implementation(pick_backend(model.config, "cuda")[0])
    inputs = {key: value for key, value in batch.items() if "labels" not in key}
    changed = inputs | {"input_ids": torch.where(inputs["document_ids"] == 1, 7, inputs["input_ids"])}
    with torch.no_grad(), torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        before, after = (model(**given).logits[:, 70:200] for given in (inputs, changed))
    assert torch.equal(before, after)


def test_the_loop_trains_and_resumes(tmp_path: Path) -> None:
    from pretrain.train import build_trainer
    from tests.gpu.synthetic import make_run

    whole = make_run(tmp_path / "whole", train={"steps": 8})
    build_trainer(whole).train()
    cut = make_run(tmp_path / "cut", train={"steps": 8}, checkpoint={"every": 4, "keep": 4})
    first = build_trainer(cut)
    first.train()
    for later in (cut.directory / "train" / "checkpoints").glob("step-00000008"):
        later.rename(tmp_path / "aside")
    again = build_trainer(cut)
    assert again.train().finished
    ours, theirs = (dict(made.engine.bare.named_parameters()) for made in (again, first))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns(tmp_path: Path, precision: str) -> None:
    from pretrain.train import build_trainer
    from tests.gpu.synthetic import make_run

    made = build_trainer(make_run(tmp_path, train={"steps": 30, "precision": precision}))
    made.train()
    import json

    losses = [json.loads(line) for line in (made.directory / "metrics.jsonl").read_text().splitlines()]
    values = [line["loss"] for line in losses if "loss" in line]
    assert values[-1] < values[0] - 0.3
