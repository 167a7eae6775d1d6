"""The backends that only a CUDA device has whole: flex and varlen, forward and backward, against sdpa."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.models import loom_config, model_from_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTH = 256
PIECES = ((0, 70), (70, 200), (200, 250))  # and padding
WINDOWS = {"global_attention_every": 2, "local_window": 64}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "modernbert": ("modernbert", {"local_window": 64}),
    "gpt2": ("gpt2", {}),
    "gpt2 with windows": ("gpt2", WINDOWS),
    "llama": ("llama", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 1, "head_dim": 64}),
}
BIASED: dict[str, tuple[str, dict[str, Any]]] = {
    "alibi": ("gpt2", {"position_kind": "alibi"}),
    "alibi, both ways": ("bert", WINDOWS | {"position_kind": "alibi"}),
    "relative": ("gpt2", {"position_kind": "relative"}),
    "relative, both ways": ("bert", {"position_kind": "relative"}),
    "capped": ("llama", {"attention_softcap": 5.0}),
    "capped, relative": ("gpt2", WINDOWS | {"attention_softcap": 5.0, "position_kind": "relative"}),
}
CASES = [("flex", name) for name in SHAPES | BIASED] + [("varlen", name) for name in SHAPES]
every_case = pytest.mark.parametrize(("backend", "shape"), CASES)


def model_of(shape: str) -> Any:
    architecture, keys = (SHAPES | BIASED)[shape]
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = model_from_config(loom_config(architecture, max_position_embeddings=LENGTH, **sizes | keys))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model.cuda().eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and document ids (3, LENGTH); the last row is padding alone."""
    ids = torch.randint(8, 512, (3, LENGTH), generator=torch.Generator().manual_seed(1)).cuda()
    packed = torch.zeros(3, LENGTH, dtype=torch.int32, device="cuda")
    for number, (start, stop) in enumerate(PIECES, start=1):
        packed[:2, start:stop] = number
    return ids, packed


def outputs(model: Any, backend: str, inputs: dict[str, Any], real: torch.Tensor, half: bool) -> list[torch.Tensor]:
    """Logits at tokens and the gradient of each parameter."""
    model.set_attn_implementation(backend)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        logits = model(**inputs).logits
    chosen = logits[real].float()
    chosen.pow(2).mean().backward()
    assert torch.isfinite(logits).all()
    return [chosen.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@every_case
@pytest.mark.parametrize("rows", ["packed", "padded", "open"])
def test_logits_and_gradients_are_those_of_sdpa(backend: str, shape: str, rows: str) -> None:
    model, (ids, packed) = model_of(shape), batch()
    real = packed != 0
    given = {"packed": {"document_ids": packed}, "padded": {"attention_mask": real.long()}, "open": {}}[rows]
    real = real if given else torch.ones_like(real)
    half = backend == "varlen"  # whose kernel has no float32
    expected = outputs(model, "sdpa", {"input_ids": ids} | given, real, half)
    found = outputs(model, backend, {"input_ids": ids} | given, real, half)
    bound = 3e-2 if half else 1e-3
    for first, second in zip(found, expected, strict=True):
        assert torch.isfinite(first).all()
        assert torch.linalg.norm(first - second) <= bound * torch.linalg.norm(second) + 1e-6


@every_case
def test_a_document_is_as_it_is_alone_and_a_neighbour_gets_no_gradient(backend: str, shape: str) -> None:
    model, (ids, packed) = model_of(shape), batch()
    model.set_attn_implementation(backend)
    half = backend == "varlen"
    start, stop = PIECES[1]
    leaf = model.get_input_embeddings()(ids[:1]).detach().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        mine = model.model(inputs_embeds=leaf, document_ids=packed[:1]).last_hidden_state[:, start:stop]
        alone = model.model(inputs_embeds=leaf[:, start:stop]).last_hidden_state
    (gradient,) = torch.autograd.grad(mine.float().pow(2).sum(), leaf)
    assert gradient[:, start:stop].abs().sum() > 0
    assert gradient[:, :start].abs().sum() == 0
    assert gradient[:, stop:].abs().sum() == 0
    bound = 2e-2 if half else 1e-4
    assert torch.linalg.norm((mine - alone).float()) < bound * torch.linalg.norm(alone.float())


@pytest.mark.parametrize("backend", ["flex", "varlen"])
def test_generation_goes_around_them(backend: str) -> None:
    model, (ids, _) = model_of("llama"), batch()
    keys = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    expected = model.generate(ids[:2, :20], **keys).tolist()
    model.set_attn_implementation(backend)
    assert model.generate(ids[:2, :20], **keys).tolist() == expected
