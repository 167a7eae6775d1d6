"""Optimizers: groups are complete and disjoint; updates agree with independent references."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pretrain.config_loop import OptimizerConfig
from pretrain.training import optim
from pretrain.training.optim import MuonAdamW, build_optimizer, name_groups, orthogonalize


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.relative = nn.Embedding(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(self.query(x))))) + self.relative.weight.sum()


class Toy(nn.Module):
    """Embedding, stack of layers, a matrix outside the stack, a head that may be tied."""

    def __init__(self, *, tied: bool = True, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.dense = nn.Linear(width, width)
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.dense(x))


def muon(**keys: object) -> OptimizerConfig:
    return OptimizerConfig(name="muon", **{"lr": 0.02, **keys})


def backward(model: nn.Module, seed: int) -> None:
    ids = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        backward(model, step)
        optimizer.step()


# --- groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["adamw", "stable-adamw", "muon"])
def test_every_trainable_parameter_stands_in_one_group(name: str, tied: bool) -> None:
    model = Toy(tied=tied)
    model.dense.bias.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=1e-3, weight_decay=0.1))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}
    for group in optimizer.param_groups:
        assert group["lr"] == group["initial_lr"]
        assert group["weight_decay"] == (0.0 if group["name"] == "adam_no_decay" else 0.1)


def test_which_parameter_goes_where() -> None:
    groups = name_groups(Toy(tied=False, layers=1), matrices=True)
    assert groups == {
        "muon": ["layers.0.query.weight", "layers.0.up.weight", "layers.0.down.weight"],
        "adam_decay": ["dense.weight", "head.weight"],
        "adam_no_decay": [
            "embed_tokens.weight",
            "layers.0.norm.weight",
            "layers.0.norm.bias",
            "layers.0.query.bias",
            "layers.0.relative.weight",
            "dense.bias",
        ],
    }
    assert "head.weight" not in str(name_groups(Toy(tied=True), matrices=True))
    assert "muon" not in name_groups(Toy(), matrices=False)


def test_learning_rates_of_the_groups() -> None:
    rates = {g["name"]: g["initial_lr"] for g in build_optimizer(Toy(), muon(adam_lr=5e-4)).param_groups}
    assert rates == {"muon": 0.02, "adam_decay": 5e-4, "adam_no_decay": 5e-4}
    rates = {g["name"]: g["initial_lr"] for g in build_optimizer(Toy(), muon()).param_groups}
    assert rates["adam_no_decay"] == optim.DEFAULT_ADAM_LR


def test_stock_gpt2_matrices_are_known_to_be_transposed() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8)
    optimizer = build_optimizer(transformers.GPT2LMHeadModel(config), muon())
    group = next(g for g in optimizer.param_groups if g["name"] == "muon")
    assert len(group["params"]) == 4
    assert group["transposed"] == [True] * 4


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(Toy().requires_grad_(False), OptimizerConfig(lr=1e-3))
    with pytest.raises(ValueError, match=r"optimizer\.name: muon"):
        build_optimizer(nn.Linear(3, 3), muon())


# --- AdamW ----------------------------------------------------------------------------------------------------------


def test_adamw_is_torchs_bit_for_bit() -> None:
    config = OptimizerConfig(lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-7)
    ours, theirs = Toy(), Toy()
    theirs.load_state_dict(ours.state_dict())
    matrices = [p for p in theirs.parameters() if p.ndim > 1 and p.shape != (11, 8) and p.shape != (8, 2)]
    chosen = {id(p) for p in matrices}
    others = [p for p in theirs.parameters() if id(p) not in chosen]
    reference = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        lr=3e-3,
        weight_decay=0.1,
        betas=(0.9, 0.98),
        eps=1e-7,
        fused=True,
    )
    train(ours, build_optimizer(ours, config), 5)
    train(theirs, reference, 5)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_adam_part_of_muon_is_torchs_bit_for_bit() -> None:
    ours = Toy()
    for layer in ours.layers:
        layer.query.weight.requires_grad_(False)
        layer.up.weight.requires_grad_(False)
        layer.down.weight.requires_grad_(False)
    theirs = copy.deepcopy(ours)
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad], "name": "adam_decay", "lr": 3e-3}
        for model in (ours, theirs)
    ]
    train(ours, MuonAdamW([{**groups[0], "weight_decay": 0.1}], fused=True), 5)
    train(theirs, torch.optim.AdamW(groups[1]["params"], 3e-3, (0.9, 0.95), 1e-8, 0.1, fused=True), 5)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_stable_adamw_against_float64() -> None:
    config = OptimizerConfig(name="stable-adamw", lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
    generator = np.random.default_rng(0)
    model = nn.Linear(5, 3, bias=False)
    optimizer = build_optimizer(model, config)
    weight = model.weight.detach().numpy().astype(np.float64)
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    clipped = 0
    for step in range(1, 8):
        gradient = generator.normal(size=weight.shape) * (30.0 if step == 5 else 1.0)  # one far too large
        model.weight.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        # The debiased rates of the paper's algorithm 2.
        beta1 = 0.9 * (1 - 0.9 ** (step - 1)) / (1 - 0.9**step)
        beta2 = 0.99 * (1 - 0.99 ** (step - 1)) / (1 - 0.99**step)
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        rms = np.sqrt(np.mean(gradient**2 / np.maximum(second, 1e-16)))
        clipped += rms > 1.5
        lr = 1e-2 / max(1.0, rms)
        weight = weight - lr * 0.1 * weight - lr * first / (np.sqrt(second) + 1e-8)
    assert clipped == 1
    np.testing.assert_allclose(model.weight.detach().numpy(), weight, rtol=1e-5, atol=1e-6)


# --- Muon -----------------------------------------------------------------------------------------------------------


def reference_orthogonal(matrix: np.ndarray) -> np.ndarray:
    """The quintics on the singular values themselves, in float64."""
    u, singular, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    singular = singular / np.linalg.norm(singular)
    for a, b, c in optim.COEFFICIENTS:
        singular = a * singular + b * singular**3 + c * singular**5
    return u * singular @ v


@pytest.mark.parametrize("shape", [(6, 6), (6, 8), (6, 24), (1, 5), (48, 192)])
def test_orthogonalize_against_singular_values(shape: tuple[int, int]) -> None:
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(stack)
    for matrix, direction in zip(stack.numpy(), result.numpy(), strict=True):
        np.testing.assert_allclose(direction, reference_orthogonal(matrix), atol=2e-4)
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(1, 16, 64)))
    assert singular.min() > 0.5
    assert singular.max() < 1.5


def test_orthogonalize_whatever_the_scale_and_rank() -> None:
    matrix = torch.randn(1, 12, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalize(matrix * 1e-8), orthogonalize(matrix), rtol=1e-4, atol=1e-4)
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 9)), torch.zeros(2, 3, 9))
    low_rank = torch.randn(1, 12, 2) @ torch.randn(1, 2, 40)
    assert torch.linalg.matrix_norm(orthogonalize(low_rank), ord=2).max() < 1.5
    in_bf16 = orthogonalize(matrix, torch.bfloat16)
    assert in_bf16.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(in_bf16.float().flatten(), orthogonalize(matrix).flatten(), 0) > 0.99


def test_muon_against_float64() -> None:
    model = Toy()
    optimizer = build_optimizer(model, muon(weight_decay=0.1, momentum=0.9))
    names = name_groups(model, matrices=True)["muon"]
    parameters = dict(model.named_parameters())
    weights = {name: parameters[name].detach().numpy().astype(np.float64) for name in names}
    means = {name: np.zeros_like(weight) for name, weight in weights.items()}
    for step in range(4):
        backward(model, step)
        for name in names:
            gradient = parameters[name].grad.numpy().astype(np.float64)
            means[name] = 0.9 * means[name] + 0.1 * gradient
            direction = reference_orthogonal(0.1 * gradient + 0.9 * means[name])
            scale = max(1.0, direction.shape[0] / direction.shape[1]) ** 0.5
            weights[name] = weights[name] * (1 - 0.02 * 0.1) - 0.02 * scale * direction
        optimizer.step()
        for name in names:  # the next gradient is taken at these weights
            np.testing.assert_allclose(parameters[name].detach().numpy(), weights[name], atol=1e-4)
            weights[name] = parameters[name].detach().numpy().astype(np.float64)


def test_a_transposed_matrix_gets_the_transposed_update() -> None:
    straight = nn.Parameter(torch.randn(6, 24))
    turned = nn.Parameter(straight.detach().T.clone())
    gradient = torch.randn(6, 24)
    straight.grad, turned.grad = gradient, gradient.T.clone()
    for parameter, flag in ((straight, False), (turned, True)):
        MuonAdamW([{"params": [parameter], "name": "muon", "lr": 0.1, "transposed": [flag]}]).step()
    torch.testing.assert_close(turned.T, straight)


def test_stacking_does_not_depend_on_the_memory_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, one_by_one = Toy(), Toy()
    one_by_one.load_state_dict(at_once.state_dict())
    train(at_once, build_optimizer(at_once, muon()), 3)
    monkeypatch.setattr(optim, "_STACK_ELEMENTS", 1)
    train(one_by_one, build_optimizer(one_by_one, muon()), 3)
    for a, b in zip(at_once.parameters(), one_by_one.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_parameters_without_gradient_are_left_alone() -> None:
    model = Toy()
    optimizer = build_optimizer(model, muon(weight_decay=0.1))
    backward(model, 0)
    model.layers[0].up.weight.grad = None
    model.dense.weight.grad = None
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert torch.equal(model.layers[0].up.weight, before["layers.0.up.weight"])
    assert torch.equal(model.dense.weight, before["dense.weight"])
    assert not torch.equal(model.layers[1].up.weight, before["layers.1.up.weight"])
    assert model.dense.weight not in optimizer.state


@pytest.mark.parametrize("name", ["adamw", "stable-adamw", "muon"])
def test_the_loss_falls(name: str) -> None:
    torch.manual_seed(0)
    model = Toy(tied=False)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=0.01))
    ids = torch.arange(10).reshape(2, 5)
    losses = []
    for _ in range(60):
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
