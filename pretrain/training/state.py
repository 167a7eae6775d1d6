"""Training state as plain tensors by name: optimizer state and random generators, in and out.

What lives here: the way from a live optimizer to named tensors and back, tensors as bytes, random-generator states as
plain data. What must not: files and directories (`checkpoint.py`), the loop.

The names are `<parameter>/<key>`, such as `embed_tokens.weight/exp_avg`: they say nothing of groups, ranks or
engines, so any of them can read what another one wrote.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.files import ArtifactError, LateBytes, TensorBytes
from pretrain.training.optim import state_keys

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


def tensor_bytes(tensor: Tensor) -> TensorBytes:
    """A tensor as safetensors holds it. A contiguous tensor in main memory is not copied.

    Raises:
        ValueError: for a dtype that safetensors does not have.
    """
    if tensor.dtype not in _DTYPE_NAMES:
        raise ValueError(f"a tensor of dtype {tensor.dtype} cannot be saved; convert it to a plain dtype first")
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    # numpy knows no bfloat16, but every dtype's bytes; `view` shares the memory.
    data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    return TensorBytes(_DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), data)


def late_bytes(like: Tensor, make: Callable[[], Tensor]) -> LateBytes:
    """A tensor as safetensors holds it, made when it is written.

    Args:
        like: of its shape and dtype; it may hold no data (the meta device).
        make: gives the tensor.

    Raises:
        ValueError: for a dtype that safetensors does not have.
    """
    if like.dtype not in _DTYPE_NAMES:
        raise ValueError(f"a tensor of dtype {like.dtype} cannot be saved; convert it to a plain dtype first")
    size = like.numel() * like.dtype.itemsize
    return LateBytes(_DTYPE_NAMES[like.dtype], tuple(like.shape), size, lambda: tensor_bytes(make()).data)


# --- optimizer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer as plain data.

    Attributes:
        tensors: by `<parameter>/<key>`.
        groups: for each group its name, hyper-parameters and `parameters`, the names of its members in order.
        stateless: parameters that were never updated and so have no state yet.
    """

    tensors: Mapping[str, Tensor]
    groups: list[dict[str, Any]] = field(default_factory=list)
    stateless: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shape:
    """What is known of a parameter without touching it: its whole shape, its dtype, and whether it is trained."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Every parameter's name, a tied one once, without what wrappers (DDP, torch.compile) add to it."""
    names: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters():
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        names[parameter] = plain.removeprefix("module.")
    return names


def optimizer_state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerState:
    """The state of `optimizer` by the names of `model`'s parameters; the tensors are the live ones, not copies.

    Raises:
        ValueError: when the optimizer holds a parameter that is not the model's.
    """
    names = parameter_names(model)
    tensors = {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    return whole_state(group_records(optimizer.param_groups, names), tensors)


def whole_state(groups: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> OptimizerState:
    """Groups as `group_records` gives them, and tensors by `<parameter>/<key>`."""
    known = {name.rpartition("/")[0] for name in tensors}
    stateless = (name for group in groups for name in group["parameters"] if name not in known)
    return OptimizerState(dict(sorted(tensors.items())), groups, tuple(sorted(stateless)))


def group_records(param_groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str]) -> list[dict[str, Any]]:
    """An optimizer's groups as plain data: hyper-parameters, and `parameters`, the names of the members in order.

    Raises:
        ValueError: when a group holds a parameter without a name.
    """
    records: list[dict[str, Any]] = []
    for group in param_groups:
        # The schedule makes the learning rate of each step anew: the one of the last step is no state.
        left_out = ("params", "lr") if "initial_lr" in group else ("params",)
        plain = {key: _plain(value) for key, value in sorted(group.items()) if key not in left_out}
        records.append({**plain, "parameters": _member_names(group, names)})
    return records


def load_optimizer_state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer, state: OptimizerState) -> None:
    """Put saved state into `optimizer`, bit for bit. All of it is checked before anything is changed.

    Hyper-parameters stay as the optimizer was built: they come from the configuration.

    Raises:
        ArtifactError: when a parameter moved to another group, or a tensor is missing, left over, or of another shape
            or dtype; names the first of them.
    """
    names = parameter_names(model)
    shapes = {name: Shape(tuple(p.shape), p.dtype, p.requires_grad) for p, name in names.items()}
    wanted = fitting_state(group_records(optimizer.param_groups, names), shapes, state)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            put_state(optimizer, group, parameter, wanted[names[parameter]])


def put_state(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor, tensors: Mapping[str, Tensor]
) -> None:
    """Give a parameter of `group` this state, copied and laid out as a live optimizer makes it."""
    step_on_device = group.get("fused") or group.get("capturable")
    optimizer.state.pop(parameter, None)
    for key, tensor in tensors.items():
        device = parameter.device if key != "step" or step_on_device else torch.device("cpu")
        optimizer.state[parameter][key] = own_copy(tensor, parameter, device)


def fitting_state(
    groups: Sequence[Mapping[str, Any]], shapes: Mapping[str, Shape], state: OptimizerState
) -> dict[str, dict[str, Tensor]]:
    """The saved tensors of each parameter by key, checked; empty for a parameter that was never updated.

    Args:
        groups: of the live optimizer, as `group_records` gives them.
        shapes: of the live parameters, by name.
        state: what was saved.

    Raises:
        ArtifactError: when a parameter moved to another group, or a tensor is missing, left over, or of another shape
            or dtype; names the first of them.
    """
    saved_groups = {name: group.get("name") for group in state.groups for name in group["parameters"]}
    stateless = set(state.stateless)
    wanted: dict[str, dict[str, Tensor]] = {}
    left_over = set(state.tensors)
    for group in groups:
        for name in group["parameters"]:
            if name not in saved_groups:
                raise ArtifactError(f"the saved optimizer state has no parameter `{name}`; it is another model's")
            if saved_groups[name] != group.get("name"):
                raise ArtifactError(
                    f"`{name}` was saved in optimizer group {saved_groups[name]} and is now in {group.get('name')}; "
                    "resume with the optimizer and model that the run was started with"
                )
            keys = () if name in stateless else state_keys(dict(group))
            left_over -= {f"{name}/{key}" for key in keys}
            wanted[name] = {key: _fitting(state.tensors, f"{name}/{key}", shapes[name]) for key in keys}
    if unknown := sorted(set(saved_groups) - set(shapes)):
        raise ArtifactError(f"the saved optimizer state holds `{unknown[0]}`, which the model does not have")
    if left_over:
        raise ArtifactError(f"the saved optimizer state holds `{min(left_over)}`, which this optimizer does not use")
    return wanted


def _member_names(group: Mapping[str, Any], names: Mapping[Tensor, str]) -> list[str]:
    missing = [parameter for parameter in group["params"] if parameter not in names]
    if missing:
        raise ValueError(f"the optimizer holds a parameter of shape {tuple(missing[0].shape)} that is not the model's")
    return [names[parameter] for parameter in group["params"]]


def _fitting(tensors: Mapping[str, Tensor], name: str, parameter: Shape) -> Tensor:
    if name not in tensors:
        raise ArtifactError(f"the saved optimizer state lacks `{name}`; it is incomplete, or another optimizer's")
    tensor = tensors[name]
    shape, dtype = parameter.shape, parameter.dtype
    if name.endswith("/step"):
        shape, dtype = (), torch.float32
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ArtifactError(
            f"the saved `{name}` is {tensor.dtype} {tuple(tensor.shape)}, the optimizer needs {dtype} {shape}"
        )
    return tensor


def own_copy(tensor: Tensor, parameter: Tensor, device: torch.device) -> Tensor:
    """A copy laid out as the parameter is, as a live optimizer makes its state: the kernels want equal strides."""
    like = parameter if tensor.shape == parameter.shape else tensor
    return torch.empty_like(like, dtype=tensor.dtype, device=device, requires_grad=False).copy_(tensor)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


# --- random generators ----------------------------------------------------------------------------------------------


def capture_rng() -> dict[str, Any]:
    """The state of every random generator of this process (python, numpy, torch, its GPU), as plain data."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": {
            "version": version,
            "state": np.asarray(internal, dtype="<u4").tobytes().hex(),
            "gauss": gauss,
        },
        "numpy": {
            "name": str(name),
            "state": np.asarray(keys, dtype="<u4").tobytes().hex(),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gauss": float(cached),
        },
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": None,
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put the generators where `capture_rng` found them.

    A state without a GPU leaves the GPU's generator as it is, and a GPU's state is left out where there is none.

    Raises:
        ArtifactError: when a generator is missing or unreadable; nothing is changed then.
    """
    try:
        python, numpy = state["python"], state["numpy"]
        python_state = (
            python["version"],
            tuple(np.frombuffer(bytes.fromhex(python["state"]), dtype="<u4").tolist()),
            python["gauss"],
        )
        numpy_state = (
            numpy["name"],
            np.frombuffer(bytes.fromhex(numpy["state"]), dtype="<u4"),
            numpy["position"],
            numpy["has_gauss"],
            numpy["cached_gauss"],
        )
        torch_state = _generator_state(state["torch"])
        cuda_state = None if state["cuda"] is None else _generator_state(state["cuda"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"the saved random state cannot be used ({error!r}); the run cannot go on exactly from it"
        ) from error
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch_state)
    if cuda_state is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda_state)


def _generator_state(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
