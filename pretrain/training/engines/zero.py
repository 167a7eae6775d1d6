"""The engine that splits optimizer state, gradients and weights over the ranks by DeepSpeed: ZeRO-1, 2 and 3.

What lives here: a step through DeepSpeed's engine. What must not: its configuration (`zero_config.py`) and its buffers
(`zero_state.py`).

DeepSpeed clips and updates inside one call. Between the norm and the update stands a question to the caller: the method
that computes the norm is wrapped, and a norm that is refused is handed on as one that overflowed, for which DeepSpeed
has a road of its own that changes neither weights nor state and clears the gradients.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.utils.hooks import RemovableHandle

from pretrain.training.engines.base import Engine, Judge
from pretrain.training.engines.zero_config import make_accelerator, quiet
from pretrain.training.engines.zero_state import ZeroStore, whole_shape
from pretrain.training.optim import MuonAdamW, StableAdamW
from pretrain.training.state import OptimizerState, Shape, fitting_state, group_records, parameter_names, put_state

__all__ = ["ZeroEngine", "make_accelerator"]

_SCALE, _GROWTH, _BACKOFF, _INTERVAL = 65536.0, 2.0, 0.5, 2000


def _groups() -> list[Any]:
    return list(distributed_c10d._world.pg_map)


class ZeroEngine(Engine):
    """Optimizer state (1), gradients (2) and weights (3) split over the ranks."""

    @property
    def readable(self) -> Any:
        """DeepSpeed's engine, whose forward pass gathers what it needs and knows the precision."""
        return self.model

    def _prepare(self) -> Any:
        self.stage = int(self.name.removeprefix("zero"))
        names = parameter_names(self.bare)
        self._members = [list(group["params"]) for group in self.optimizer.param_groups]
        self._content: dict[str, Any] = self.accelerator.state.deepspeed_plugin.deepspeed_config
        self._bound_bucket()
        transposed = frozenset(
            parameter
            for group in self.optimizer.param_groups
            for parameter, flag in zip(group["params"], group.get("transposed", ()), strict=False)
            if flag
        )
        self._without_gradient = {names[p] for members in self._members for p in members}
        self._watchers = [self._watch(p, names[p]) for members in self._members for p in members]
        self._engine = self._initialize()
        self._zero: Any = self._engine.optimizer
        self._store = ZeroStore(self._zero, self.stage, names, transposed, self.device)
        if isinstance(self.optimizer, MuonAdamW | StableAdamW):
            self.optimizer.layouts = {buffer.flat: buffer.layout for buffer in self._store.buffers}
        self._judge: Judge = lambda norm: True
        self._norm = math.nan
        self._ask_before_updates()
        self._good_steps = 0
        self._scale: float | None = None
        if self._content["torch_autocast"]["enabled"] and self._content["torch_autocast"]["dtype"] == "float16":
            # DeepSpeed's scaler is asked group by group and rank by rank; this one once, with the global norm.
            self._zero.torch_autocast_gradscaler = None
            self._set_scale(_SCALE)
        return self._engine

    def _bound_bucket(self) -> None:
        """A buffer for the gradients of more than the whole model is memory wasted."""
        section = self._content["zero_optimization"]
        elements = sum(parameter.numel() for members in self._members for parameter in members)
        section["reduce_bucket_size"] = min(int(section["reduce_bucket_size"]), elements)

    def _initialize(self) -> Any:
        # What an engine before this one in the process may have left.
        autocast: Any = importlib.import_module("deepspeed.runtime.torch_autocast")
        autocast.TORCH_AUTOCAST_INITIALIZED, autocast.TORCH_AUTOCAST_DTYPE = False, None
        before = set(_groups())
        with quiet():
            engine, _ = self.accelerator.prepare(self.bare, self.optimizer)
        for group in set(_groups()) - before:  # DeepSpeed's own groups would wait for half an hour
            distributed_c10d._set_pg_timeout(timedelta(seconds=self.config.ddp_timeout), group)
        return engine

    def _ask_before_updates(self) -> None:
        """Put the question to the caller between the norm and the update."""
        zero = self._zero
        if self.stage < 3:
            norm_of_all: Callable[[], Tensor] = zero.scaled_global_norm
            zero.scaled_global_norm = lambda *_, **__: self._asked(norm_of_all())
            return
        norms: Callable[[], Iterable[Any]] = zero._get_norm_groups
        combine = importlib.import_module("deepspeed.runtime.utils").combine_grad_norm_groups
        zero._get_norm_groups = lambda: [self._asked(combine(norms()))]

    def _asked(self, total: Tensor) -> Tensor:
        """The norm of the scaled gradient, or infinity where no update is to be made."""
        self._norm = float(total) / self._zero.loss_scale
        if self._norm < 0.0:  # DeepSpeed's word for what is not finite
            self._norm = math.inf
        update = self._judge(self._norm) and math.isfinite(self._norm)
        return total if update else torch.full_like(total, math.inf)

    def _watch(self, parameter: nn.Parameter, name: str) -> RemovableHandle:
        watched: Any = parameter
        handle: RemovableHandle = watched.register_hook(lambda _: self._without_gradient.discard(name))
        return handle

    # --- a step -----------------------------------------------------------------------------------------------------

    def backward(self, loss: Callable[[], Tensor], *, last: bool) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        value = loss()
        # The ranks' gradients are averaged; the sum is wanted.
        self._engine.backward(value * self.ranks.world if self.ranks.world > 1 else value, scale_wrt_gas=False)
        return value.detach()

    def update(self, limit: float | None, judge: Judge) -> float:
        self._refuse_unused()
        self._zero.clip_grad = limit or 0.0
        self._judge = judge
        self._engine.step()
        self._clear()
        if self._scale is not None:
            self._adapt_scale(finite=math.isfinite(self._norm))
        return self._norm

    @property
    def decides_on_device(self) -> bool:
        return False  # DeepSpeed reads the norm on the host

    def _refuse_unused(self) -> None:
        """Every parameter has to take part: a flat buffer is updated as a whole, and weight decay with it."""
        for watcher in self._watchers:
            watcher.remove()
        self._watchers = []
        if self._without_gradient:
            raise ValueError(
                f"train.strategy: {self.name}: `{min(self._without_gradient)}` is trained but got no gradient in the "
                "first step; freeze it (requires_grad False), use it, or train with single or fsdp2"
            )

    def drop(self) -> None:
        self._zero.zero_grad(set_to_none=True)
        if self.stage < 3:
            self._zero.micro_step_id = -1
            for kept in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
                for index in kept:
                    kept[index] = None
            if self._zero.cpu_offload:
                self._zero.reset_cpu_buffers()
                self._zero._offload_accumulated_param_ids = set()
        else:
            self._zero.averaged_gradients = {}
            if self._zero.offload_optimizer:
                self._zero.reset_cpu_buffers()
        self._clear()

    def _clear(self) -> None:
        if self.stage == 3:  # a parameter without a gradient would find the last step's
            self._zero.grad_partitions_flat_buffer.zero_()

    # --- the loss scale of fp16 -------------------------------------------------------------------------------------

    @property
    def scaled(self) -> bool:
        return self._scale is not None

    def _set_scale(self, scale: float) -> None:
        self._scale = scale
        with quiet():
            self._zero.override_loss_scale(scale)

    def _adapt_scale(self, *, finite: bool) -> None:
        """The rule of torch's GradScaler, asked once a step."""
        assert self._scale is not None
        self._good_steps = self._good_steps + 1 if finite else 0
        if not finite:
            self._set_scale(self._scale * _BACKOFF)
        elif self._good_steps == _INTERVAL:
            self._good_steps = 0
            self._set_scale(self._scale * _GROWTH)

    def scaler_state(self) -> dict[str, Any] | None:
        if self._scale is None:
            return None
        return {
            "scale": self._scale,
            "growth_factor": _GROWTH,
            "backoff_factor": _BACKOFF,
            "growth_interval": _INTERVAL,
            "_growth_tracker": self._good_steps,
        }

    def load_scaler_state(self, state: Mapping[str, Any] | None) -> None:
        if self._scale is not None and state:
            self._good_steps = int(state["_growth_tracker"])
            self._set_scale(float(state["scale"]))

    # --- weights and state, whole, by name --------------------------------------------------------------------------

    def shapes(self) -> dict[str, Shape]:
        return {
            name: Shape(whole_shape(parameter), parameter.dtype, parameter.requires_grad)
            for name, parameter in sorted(self._parameters.items())
        }

    def parameter(self, name: str) -> Tensor:
        return self._store.parameter(self._parameters[name])

    def state(self, name: str) -> dict[str, Tensor]:
        return self._store.state(name, self.optimizer.state)

    def groups(self) -> list[dict[str, Any]]:
        groups = [
            {**group, "params": members}
            for group, members in zip(self.optimizer.param_groups, self._members, strict=True)
        ]
        return group_records(groups, parameter_names(self.bare))

    def load(self, parameters: Mapping[str, Tensor] | None, state: OptimizerState) -> None:
        if parameters is not None:
            self.check_weights(parameters)
        wanted = fitting_state(self.groups(), self.shapes(), state)
        self._store.fit(wanted)
        if parameters is not None:
            self._store.load_weights(parameters)
        self._store.load_optimizer(
            self.optimizer, wanted, lambda group, flat, tensors: put_state(self.optimizer, group, flat, tensors)
        )

    def clear_state(self) -> None:
        self.optimizer.state.clear()
        self._store.relink()

    # --- as configured ----------------------------------------------------------------------------------------------

    def checks(self) -> list[tuple[str, Any, Any]]:
        engine, zero, config = self._engine, self._zero, self.config
        masters = {str(buffer.flat.dtype) for buffer in self._store.buffers}
        weights = {str(parameter.dtype) for parameter in self._parameters.values()}
        buckets = {str(dtype) for dtype in zero.ipg_buckets}
        batch = (
            engine.train_batch_size(),
            engine.train_micro_batch_size_per_gpu(),
            engine.gradient_accumulation_steps(),
        )
        offloads = bool(zero.offload_optimizer if self.stage == 3 else zero.cpu_offload)
        return [
            *super().checks(),
            ("DeepSpeed's ZeRO stage", self.stage, int(engine.zero_optimization_stage())),
            ("DeepSpeed's gradient_clipping", config.max_grad_norm or 0.0, float(zero.clip_grad)),
            ("DeepSpeed's batch (all, micro, accumulated)", (self.ranks.world, 1, 1), batch),
            ("DeepSpeed's processes", self.ranks.world, engine.dp_world_size),
            ("DeepSpeed's masters", {"torch.float32"}, masters),
            ("DeepSpeed's weights", {"torch.float32"}, weights),
            ("DeepSpeed's communication of gradients", {"torch.float32"}, buckets),
            ("DeepSpeed's accumulation of gradients", torch.float32, zero.gradient_accumulation_dtype),
            ("DeepSpeed's half-precision sections", (False, False), (engine.fp16_enabled(), engine.bfloat16_enabled())),
            ("DeepSpeed's autocast", self._content["torch_autocast"]["enabled"], engine.torch_autocast_enabled()),
            ("DeepSpeed's optimizer", type(self.optimizer).__name__, type(zero.optimizer).__name__),
            ("DeepSpeed's groups", len(self._members), len(zero.optimizer.param_groups)),
            ("train.offload of the optimizer", config.offload is not None, offloads),
        ]
