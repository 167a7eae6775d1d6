"""Optimizers: AdamW, StableAdamW, and Muon for the hidden matrices with AdamW for everything else.

What lives here: which parameter goes into which group, and the update rules. What must not: learning-rate schedules
(they scale `initial_lr` from outside), saving, models, and where the parts of a split parameter lie
(`sharded_optim.py`): the rules hold for whole parameters, shards and flat buffers alike.

Groups, by name:
    muon           2-D weights of linear layers inside the stack of layers (only with `name: muon`)
    adam_decay     other matrices: an untied head, a pooler, a classifier; with AdamW the stack's matrices too
    adam_no_decay  embeddings (and a head tied to them), norms, biases: decay would pull rare tokens' rows and the
                   norms' scales to zero for no gain

State, a tensor for each parameter: `step`, and `exp_avg`, `exp_avg_sq` (Adam) or `momentum_buffer` (Muon).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from pretrain.config_loop import OptimizerConfig
from pretrain.training.sharded_optim import FlatLayout, Matrix, local, matrices_of, sum_of_parts

MUON, ADAM_DECAY, ADAM_NO_DECAY = "muon", "adam_decay", "adam_no_decay"
DEFAULT_ADAM_LR = 3e-3

# Jordan et al. 2024, "Muon: An optimizer for hidden layers": the odd quintic a x + b x^3 + c x^5 with the steepest
# slope at 0, five times; singular values end between 0.7 and 1.2. Polar Express (Amsel et al. 2025), whose quintics end
# nearer to 1, gave a validation loss higher by 0.007 at the same cost (4 x 128, 1.5 M characters, two seeds).
COEFFICIENTS: Final = ((3.4445, -4.7750, 2.0315),) * 5
_STACK_ELEMENTS = 1 << 26
"""At most this many elements are orthogonalized at once, which bounds the extra memory."""


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, compute_dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """Make the optimizer that the configuration names, over every trainable parameter of `model`.

    Args:
        model: a tied parameter counts once; frozen parameters are left out.
        config: the `optimizer` section.
        compute_dtype: the arithmetic of Muon's Newton-Schulz; float32 in an fp32 run, bfloat16 under autocast.

    Raises:
        ValueError: when nothing is trainable, or when Muon finds no matrix to work on.
    """
    named = name_groups(model, matrices=config.name == "muon")
    if not named:
        raise ValueError("the model has no trainable parameter; unfreeze some before building an optimizer")
    if config.name == "muon" and MUON not in named:
        raise ValueError("optimizer.name: muon finds no linear layer inside a stack of layers; use adamw")
    parameters = dict(model.named_parameters())
    transposed = _transposed_weights(model)
    groups: list[dict[str, Any]] = []
    for name, members in named.items():
        lr = config.lr if config.name != "muon" or name == MUON else config.adam_lr or DEFAULT_ADAM_LR
        group: dict[str, Any] = {
            "params": [parameters[member] for member in members],
            "name": name,
            "lr": lr,
            "initial_lr": lr,
            "weight_decay": 0.0 if name == ADAM_NO_DECAY else config.weight_decay,
        }
        if name == MUON:
            group["transposed"] = [id(parameters[member]) in transposed for member in members]
        groups.append(group)
    # The fused kernels exist for these devices; elsewhere (meta, for one) torch chooses.
    fused = True if all(p.device.type in ("cpu", "cuda") for p in parameters.values()) else None
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    if config.name == "stable-adamw":
        return StableAdamW(groups, betas=config.betas, eps=config.eps)
    return MuonAdamW(
        groups,
        betas=config.betas,
        eps=config.eps,
        momentum=config.momentum,
        compute_dtype=compute_dtype,
        fused=fused,
    )


def name_groups(model: nn.Module, *, matrices: bool) -> dict[str, list[str]]:
    """Sort the names of all trainable parameters into groups; each stands in exactly one, and none is empty.

    With `matrices`, the linear weights inside a stack of layers (below an `nn.ModuleList`) make the group "muon".
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    stacks: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.ModuleList):
            stacks.append(f"{path}.")
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((f"{path}.", module))
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    groups: dict[str, list[str]] = {MUON: [], ADAM_DECAY: [], ADAM_NO_DECAY: []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        holders = owners[id(parameter)]
        if parameter.ndim < 2 or "embed" in name or any(isinstance(m, nn.Embedding) for _, m in holders):
            groups[ADAM_NO_DECAY].append(name)
        elif (
            matrices
            and parameter.ndim == 2
            and all(_is_linear(module) and module is not head for _, module in holders)
            and all(any(path.startswith(stack) for stack in stacks) for path, _ in holders)
        ):
            groups[MUON].append(name)
        else:
            groups[ADAM_DECAY].append(name)
    return {name: members for name, members in groups.items() if members}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed_linear(module)


def _is_transposed_linear(module: nn.Module) -> bool:
    """Transformers' Conv1D (stock GPT-2): a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _transposed_weights(model: nn.Module) -> set[int]:
    return {id(module._parameters["weight"]) for module in model.modules() if _is_transposed_linear(module)}


class MuonAdamW(torch.optim.Optimizer):
    """Muon on the group named "muon", AdamW on all others; one class, so that every engine can wrap it.

    Muon (Jordan et al. 2024): EMA of the gradient, Nesterov, the nearest semi-orthogonal matrix by five Newton-Schulz
    steps, scaled by sqrt(max(1, out / in)), decoupled weight decay. AdamW is torch's own kernel, bit for bit.

    A parameter may be split over ranks: shards (DTensor) are known by themselves, of a flat buffer an engine says in
    `layouts` what it is made of. Momentum and AdamW stay with the part; each matrix is gathered for Newton-Schulz.

    Args:
        params: groups with `name`, `lr`, `weight_decay`; a "muon" group holds 2-D parameters alone, and may hold
            `transposed`, a flag for each: whether its weight is (in, out) rather than torch's (out, in).
        betas: Adam's decay rates.
        eps: Adam's term beside the root.
        momentum: Muon's decay rate.
        compute_dtype: the arithmetic of Newton-Schulz.
        fused: torch's fused AdamW kernel; None lets torch choose.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
        compute_dtype: torch.dtype = torch.float32,
        fused: bool | None = None,
    ) -> None:
        defaults = {"betas": betas, "eps": eps, "momentum": momentum, "weight_decay": 0.0, "fused": fused}
        super().__init__(params, defaults)
        self.compute_dtype = compute_dtype
        self.layouts: dict[Tensor, FlatLayout] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["name"] == MUON and parameter.ndim != 2:
                    raise ValueError(f"Muon takes matrices alone, not a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["name"] == MUON:
                self._muon(group)
            else:
                self._adam(group)
        return loss

    def _adam(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:  # an engine may hand over one group at a time
            return
        states = [self._adam_state(parameter, group) for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            [local(parameter) for parameter in parameters],
            [local(parameter.grad) for parameter in parameters],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _adam_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state |= adam_state(parameter, step_device=parameter.device if group["fused"] else None)
        return state

    def _muon(self, group: dict[str, Any]) -> None:
        flags = group.get("transposed") or [False] * len(group["params"])
        decay = 1.0 - group["lr"] * group["weight_decay"]
        for chunk in _alike(self._matrices(group, flags)):
            gathered = [(matrix, matrix.whole(self._look_ahead(matrix, group["momentum"]))) for matrix in chunk]
            held = [(matrix, update) for matrix, update in gathered if update is not None]
            if not held:  # other ranks' matrices
                continue
            stack = torch.stack([update.mT if _is_tall(update.shape) else update for _, update in held])  # (K, M, N)
            directions = orthogonalize(stack, self.compute_dtype)
            for (matrix, _), direction in zip(held, directions, strict=True):
                fan_out, fan_in = reversed(matrix.shape) if matrix.transposed else matrix.shape
                upright = direction.mT if _is_tall(matrix.shape) else direction
                rate = group["lr"] * math.sqrt(max(1.0, fan_out / fan_in))
                moved = _draft(matrix.weight, self.found_inf)
                moved.mul_(decay).add_(matrix.part(upright.to(matrix.weight.dtype)), alpha=-rate)
                _settle(matrix.weight, moved, self.found_inf)

    def _matrices(self, group: dict[str, Any], flags: list[bool]) -> list[Matrix]:
        """The matrices of a group that have a gradient; their step is counted."""
        found: list[Matrix] = []
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["step"] = torch.zeros((), device=parameter.device if group["fused"] else None)
            state["step"] += _one(self.found_inf)
            layout = self.layouts.get(parameter)
            transposed = layout is None and flags[index]
            found += matrices_of(parameter, parameter.grad, state["momentum_buffer"], transposed, layout)
        return found

    def _look_ahead(self, matrix: Matrix, momentum: float) -> Tensor:
        """Advance the running mean of the gradient; return it with Nesterov's look ahead."""
        mean = _draft(matrix.mean, self.found_inf)
        _settle(matrix.mean, mean.lerp_(matrix.gradient, 1.0 - momentum), self.found_inf)
        return matrix.gradient.lerp(matrix.mean, momentum)


def withholds(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an update can be withheld by a tensor on the device: by the optimizer's attribute `found_inf`.

    That is the attribute by which torch's GradScaler tells an optimizer that a gradient overflowed: 0-d float32, 1
    where the step is to leave weights and state as they are. Fused kernels read it, and the optimizers of this file.
    """
    if isinstance(optimizer, StableAdamW):
        return True
    return isinstance(optimizer, MuonAdamW | torch.optim.AdamW) and all(g["fused"] for g in optimizer.param_groups)


def _draft(target: Tensor, found_inf: Tensor | None) -> Tensor:
    """Where the new value of `target` is made: in its place, or beside it while it may yet be withheld."""
    return target if found_inf is None else target.clone()


def _settle(target: Tensor, draft: Tensor, found_inf: Tensor | None) -> None:
    """Let `target` be its draft, unless the update is withheld."""
    if found_inf is not None:
        torch.where(found_inf > 0.0, target, draft, out=target)


def _one(found_inf: Tensor | None) -> Tensor | float:
    """What is added to a count of steps: 0 where the update is withheld."""
    return 1.0 if found_inf is None else 1.0 - found_inf


def _is_tall(shape: Sequence[int]) -> bool:
    return shape[0] > shape[1]


def _alike(matrices: list[Matrix]) -> Iterator[list[Matrix]]:
    """Lists of matrices that can be stacked (same sides, dtype, device), each within the memory bound."""
    by_shape: dict[tuple[Any, ...], list[Matrix]] = {}
    for matrix in matrices:
        key = (*sorted(matrix.shape), matrix.weight.dtype, matrix.weight.device)
        by_shape.setdefault(key, []).append(matrix)
    for alike in by_shape.values():
        count = max(1, _STACK_ELEMENTS // math.prod(alike[0].shape))
        for start in range(0, len(alike), count):
            yield alike[start : start + count]


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest semi-orthogonal matrix to each of a stack, roughly: U V^T of U S V^T with singular values near 1.

    In fp32, long matrices iterate on their small Gram matrix alone: the polynomial of X X^T is built first and meets
    X once (1.75 times as fast at 1 x 4). In bf16 that loses the small singular values, so X itself is iterated.

    Args:
        matrices: (K, M, N) with M <= N.
        dtype: the arithmetic.

    Returns:
        (K, M, N) in `dtype`; a zero matrix stays zero.
    """
    # The Frobenius norm is at least the largest singular value; always taken in fp32.
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=torch.float32)  # (K, 1, 1)
    x: Tensor = matrices.to(dtype) / norms.clamp_min(1e-12).to(dtype)
    if dtype == torch.float32 and 2 * x.shape[-1] > 3 * x.shape[-2]:
        return _gram_newton_schulz(x)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _gram_newton_schulz(x: Tensor) -> Tensor:
    """Newton-Schulz through Q(X X^T) X. All factors are polynomials of one symmetric matrix, so they commute."""
    gram = x @ x.mT  # (K, M, M)
    product = gram  # of the factors so far; replaced by the first one
    for index, (a, b, c) in enumerate(COEFFICIENTS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if index == 0 else factor @ product
        if index + 1 < len(COEFFICIENTS):
            gram = factor @ (gram @ factor)
    return product @ x


class StableAdamW(torch.optim.Optimizer):
    """AdamW whose step shrinks when a gradient is larger than its second moment expects.

    Each parameter's learning rate is divided by max(1, RMS(g / sqrt(v))), the update clipping of Adafactor (Shazeer
    and Stern 2018, section 5). Source: Wortsman et al. 2023, "Stable and low-precision training for large-scale
    vision-language models", algorithm 2. The moments are stored as AdamW's, not bias-corrected.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, params: Iterable[dict[str, Any]], *, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"betas": betas, "eps": eps, "weight_decay": 0.0})

        self.layouts: dict[Tensor, FlatLayout] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= adam_state(parameter)
        beta1, beta2 = group["betas"]
        weight, gradient = local(parameter), local(gradient)
        first, second = local(state["exp_avg"]), local(state["exp_avg_sq"])
        new_first, new_second = _draft(first, self.found_inf), _draft(second, self.found_inf)
        _settle(first, new_first.lerp_(gradient, 1.0 - beta1), self.found_inf)
        _settle(second, new_second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2), self.found_inf)
        rest1, rest2 = self._count(state, gradient.device, beta1, beta2)
        first, second = first / rest1, second / rest2
        excess = gradient.square() / second.clamp_min(group["eps"] ** 2)
        update = first.div_(second.sqrt_().add_(group["eps"]))
        layout = self.layouts.get(parameter)
        if layout is None:
            square = sum_of_parts(excess.sum(), parameter) / parameter.numel()
            self._move(weight, update, square, group)
            return
        sums = layout.sum(torch.stack([piece.of_flat(excess).sum() for piece in layout.pieces]))
        for piece, total in zip(layout.pieces, sums, strict=True):
            square = total / math.prod(piece.shape)
            self._move(piece.of_flat(weight), piece.of_flat(update), square, group)

    def _count(
        self, state: dict[str, Tensor], device: torch.device, beta1: float, beta2: float
    ) -> tuple[Tensor | float, Tensor | float]:
        """Count a step; what the two moments lack of their sums' weight."""
        if self.found_inf is None:
            state["step"] += 1
            step = state["step"].item()  # on the CPU: no wait for the device
            return 1.0 - beta1**step, 1.0 - beta2**step
        state["step"] = state["step"].to(device)
        state["step"] += _one(self.found_inf)
        exponent = state["step"].double()  # a step that is withheld divides by 0, and nothing of it is written
        return 1.0 - torch.pow(beta1, exponent), 1.0 - torch.pow(beta2, exponent)

    def _move(self, weight: Tensor, update: Tensor, square: Tensor, group: dict[str, Any]) -> None:
        """Make the update of one parameter, given the mean square of its gradient over what is expected."""
        lr = group["lr"] / square.sqrt().clamp_min(1.0)  # 0-d, on the device
        moved = _draft(weight, self.found_inf)
        _settle(weight, moved.mul_(1.0 - lr * group["weight_decay"]).sub_(update.mul_(lr)), self.found_inf)


def adam_state(parameter: Tensor, step_device: torch.device | None = None) -> dict[str, Tensor]:
    """Fresh Adam state as torch makes it; `step` lies on the CPU unless the fused kernel reads it."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=step_device or torch.device("cpu")),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def state_keys(group: dict[str, Any]) -> tuple[str, ...]:
    """The names of the state tensors that each parameter of a group has once it was updated."""
    return ("momentum_buffer", "step") if group.get("name") == MUON else ("exp_avg", "exp_avg_sq", "step")
