"""What the loop and the saver ask of an engine, and the engine of one process and of DDP.

What lives here: gradients of a global batch, the update, and weights and optimizer state as whole tensors by name.
What must not: the order of things in a step, checkpoints, other engines.

The engine hides how a model is split: the loop sees a loss and a norm, the saver sees whole tensors by name. A loss
that is handed to `backward` is this rank's share of the mean over the global batch, and the gradient is the sum of all
shares, on every engine and however the batch is cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pretrain.config_loop import LoopTrainConfig
from pretrain.files import ArtifactError
from pretrain.ranks import Ranks
from pretrain.training.optim import withholds
from pretrain.training.sharded_optim import local
from pretrain.training.state import OptimizerState, Shape, fitting_state, group_records, parameter_names, put_state

Judge = Callable[[float], bool]
"""Told the norm of the global gradient before clipping; says whether the update is made. The same on every rank."""


class Engine:
    """One process, or several that each hold all of the model (DDP).

    Args:
        name: the strategy, resolved.
        config: the `train` section.
        accelerator: made by `runtime.make_accelerator` for this strategy.
        ranks: the processes of the job.
        model: not wrapped.
        optimizer: over the model's parameters.
    """

    def __init__(
        self,
        name: str,
        config: LoopTrainConfig,
        accelerator: Accelerator,
        ranks: Ranks,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.name = name
        self.config = config
        self.accelerator = accelerator
        self.ranks = ranks
        self.device: torch.device = accelerator.device
        self.bare = model
        self.optimizer = optimizer
        self.model = self._prepare()
        self._parameters = {name: parameter for parameter, name in parameter_names(self.bare).items()}

    def _prepare(self) -> Any:
        model, self._stepper = self.accelerator.prepare(self.bare, self.optimizer)
        return model

    @property
    def readable(self) -> Any:
        """What evaluators are given: the model itself wherever its forward pass can be called without the engine."""
        return self.bare

    # --- a step -----------------------------------------------------------------------------------------------------

    def backward(self, loss: Callable[[], Tensor], *, last: bool) -> Tensor:
        """Add the gradient of one micro-batch; `last` marks the last one before `update`. Returns the loss, detached.

        Args:
            loss: runs the forward pass and gives this rank's share of the global mean.
            last: the gradients of all ranks are summed at the last one.
        """
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            value = loss()
            self.accelerator.backward(value * self.ranks.world if self.ranks.world > 1 else value)
        return value.detach()

    def update(self, limit: float | None, judge: Judge) -> float:
        """Clip the gradient at `limit`, ask `judge`, update if it says so, and throw the gradient away.

        Returns:
            The norm of the global gradient before clipping.
        """
        self.accelerator.unscale_gradients()
        norm = float(self._clip(limit))
        if judge(norm):
            self._stepper.step()
        elif self.accelerator.scaler is not None:  # it has seen the gradients: let it find its scale
            self.accelerator.scaler.update()
        self.drop()
        return norm

    @property
    def decides_on_device(self) -> bool:
        """Whether `update_on_device` is there: no loss scaler, everything on the device, an optimizer that can."""
        return not self.scaled and self.config.offload is None and withholds(self.optimizer)

    def update_on_device(self, limit: float | None, withhold: Callable[[Tensor], Tensor]) -> None:
        """As `update`, for an answer that lies on the device: the host waits for nothing.

        Args:
            limit: as of `update`.
            withhold: told the norm of the global gradient before clipping, 0-d; gives 1 where no update is to be made
                and 0 elsewhere, 0-d float32 on the device, the same on every rank.
        """
        optimizer: Any = self.optimizer
        optimizer.found_inf = withhold(self._clip(limit))
        self._stepper.step()
        del optimizer.found_inf
        self.drop()

    def _clip(self, limit: float | None) -> Tensor:
        """Clip the gradient at `limit`; the norm of the global gradient before, 0-d."""
        trained = [parameter for parameter in self._parameters.values() if parameter.grad is not None]
        total = self._whole(get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None]))
        if limit is not None:
            clip_grads_with_norm_(trained, limit, total)
        return total

    def evaluated(self) -> None:
        """Called by all ranks after forward passes without a backward pass."""

    def drop(self) -> None:
        """Throw the gradient away."""
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def scaled(self) -> bool:
        """Whether a loss scaler is at work."""
        return self.accelerator.scaler is not None

    # --- weights and state, whole, by name --------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Every parameter once, in order, without what wrappers add."""
        return sorted(self._parameters)

    def shapes(self) -> dict[str, Shape]:
        """Every parameter's whole shape, by name in order."""
        return {
            name: Shape(tuple(self._parameters[name].shape), self._parameters[name].dtype, self._trained(name))
            for name in self.names()
        }

    def _trained(self, name: str) -> bool:
        return self._parameters[name].requires_grad

    def parameter(self, name: str) -> Tensor:
        """A whole parameter in full precision, on every rank. All ranks call it together; it is not to be written."""
        return self._whole(self._parameters[name].detach())

    def state(self, name: str) -> dict[str, Tensor]:
        """The whole optimizer state of a parameter, on every rank; empty when it was never updated. Called together."""
        state = self.optimizer.state.get(self._parameters[name], {})
        return {key: self._whole(state[key]) for key in sorted(state)}

    @property
    def meets_in_forward(self) -> bool:
        """Whether the ranks meet in a forward pass, so that none is faster than another."""
        return self.name in ("fsdp2", "zero3")

    @property
    def part(self) -> int:
        """Which part of the weights this rank holds: ranks that hold the same part hold the same bits."""
        return 0

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds of each weight, and of the optimizer's state where it is kept as the weights are."""
        for name in self.names():
            parameter = self._parameters[name]
            yield name, local(parameter)
            for key, tensor in sorted(self.optimizer.state.get(parameter, {}).items()):
                yield f"{name}/{key}", local(tensor)

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups as plain data: hyper-parameters and the names of their members."""
        return group_records(self.optimizer.param_groups, self._names())

    def _names(self) -> dict[Tensor, str]:
        """The name of each parameter that the optimizer holds. (A sharded module shows others while it computes.)"""
        return {parameter: name for name, parameter in self._parameters.items()}

    def load(self, parameters: Mapping[str, Tensor] | None, state: OptimizerState) -> None:
        """Take up weights and optimizer state, whole tensors by name, bit for bit. Called by all ranks together.

        All of it is checked before anything is changed.

        Args:
            parameters: None leaves the weights as they are.
            state: of the optimizer.

        Raises:
            ArtifactError: names the first tensor that is missing, left over, or of another shape or dtype.
        """
        if parameters is not None:
            self.check_weights(parameters)
        wanted = fitting_state(self.groups(), self.shapes(), state)
        if parameters is not None:
            for name in self.names():
                self._write(self._parameters[name], parameters[name])
        names = self._names()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                tensors = wanted[names[parameter]]
                put_state(
                    self.optimizer, group, parameter, {key: self._part(parameter, key, t) for key, t in tensors.items()}
                )

    def check_weights(self, parameters: Mapping[str, Tensor]) -> None:
        """Refuse weights that are not this model's.

        Raises:
            ArtifactError: names the first that is missing, left over, or of another shape or dtype.
        """
        shapes = self.shapes()
        if missing := sorted(set(shapes) - set(parameters)):
            raise ArtifactError(f"the saved weights lack `{missing[0]}`; they are another model's")
        if left_over := sorted(set(parameters) - set(shapes)):
            raise ArtifactError(f"the saved weights hold `{left_over[0]}`, which the model does not have")
        for name, known in shapes.items():
            tensor = parameters[name]
            if tuple(tensor.shape) != known.shape or tensor.dtype != known.dtype:
                raise ArtifactError(
                    f"the saved `{name}` is {tensor.dtype} {tuple(tensor.shape)}, the run trains {known.dtype} "
                    f"{known.shape}; a checkpoint holds the full precision: put the whole one back"
                )

    def clear_state(self) -> None:
        """Forget the optimizer's state, as if no update was ever made."""
        self.optimizer.state.clear()

    def scaler_state(self) -> dict[str, Any] | None:
        """The loss scaler's state as plain data; None without one."""
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler else None

    def load_scaler_state(self, state: Mapping[str, Any] | None) -> None:
        """Put the loss scaler where it was."""
        if self.accelerator.scaler and state:
            self.accelerator.scaler.load_state_dict(dict(state))

    def checks(self) -> list[tuple[str, Any, Any]]:
        """Settings as (what, ours, the engine's own): compared at start."""
        return [
            ("train.strategy", self.name, self.name),
            ("processes", self.ranks.world, self.accelerator.num_processes),
        ]

    # --- what another split does otherwise --------------------------------------------------------------------------

    def _whole(self, tensor: Tensor) -> Tensor:
        """A tensor of which this rank may hold a part, whole."""
        return tensor

    def _write(self, parameter: Tensor, whole: Tensor) -> None:
        """Write a whole tensor into what this rank holds of a parameter."""
        with torch.no_grad():
            parameter.copy_(whole)

    def _part(self, parameter: Tensor, key: str, whole: Tensor) -> Tensor:
        """What this rank holds of a whole state tensor of `parameter`."""
        return whole


def with_autocast(forward: Callable[..., Any], device: torch.device, precision: str) -> Callable[..., Any]:
    """A forward pass under autocast, as Accelerate wraps it for an engine that it prepares ("no": as it is)."""
    if precision == "no":
        return forward
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    @functools.wraps(forward)
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        # Without autocast's cache, which would keep a copy of every weight while its layer is not gathered.
        with torch.autocast(device.type, dtype=dtype, cache_enabled=False):
            return forward(*arguments, **keywords)

    return wrapped


def refuse_differences(checks: Iterable[tuple[str, Any, Any]]) -> None:
    """Compare an engine's effective settings with ours.

    Raises:
        ValueError: names every setting that differs.
    """
    found: Sequence[str] = [
        f"{what}: {ours!r} was asked for, the engine has {its!r}" for what, ours, its in checks if ours != its
    ]
    if found:
        raise ValueError(
            f"the engine does not run as configured: {'; '.join(found)}. Remove the setting that overrides it (an "
            "accelerate or DeepSpeed configuration, or an environment variable), or configure it alike"
        )
