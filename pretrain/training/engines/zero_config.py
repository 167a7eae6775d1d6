"""What DeepSpeed is told: its whole configuration, generated from ours, and a user's JSON merged underneath.

What lives here: the settings that are ours and those that are free, the comparison of both with a user's file, and the
Accelerator that carries the result. What must not: the engine at work, tensors.

Every setting that decides the arithmetic is said in full, because DeepSpeed's own defaults are other ones: unset, it
clips at 1.0, and its half-precision sections keep weights and reduce gradients in half. Here weights, reduction and
accumulation are fp32 and the arithmetic is autocast's, as on every engine.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

from pretrain.config_loop import LoopConfig
from pretrain.runtime import Precision
from pretrain.strategy import Launch

AUTOCAST: dict[str, str] = {"fp32": "bfloat16", "bf16": "bfloat16", "fp16": "float16"}
"""Our names of precisions -> autocast's dtype; with fp32, autocast is off and the dtype says nothing."""

FOREIGN = (
    "optimizer",
    "scheduler",
    "amp",
    "compression_training",
    "curriculum_learning",
    "data_efficiency",
    "data_types.param_dtype",
    "data_types.buffer_dtype",
    "eigenvalue",
    "elasticity",
    "pipeline",
    "progressive_layer_drop",
    "quantize_training",
    "sequence_parallel_size",
    "sparse_attention",
    "sparse_gradients",
    "tensor_parallel",
    "autotuning",
    "compile",
    "zero_optimization.cpu_offload",
    "zero_optimization.cpu_offload_param",
    "zero_optimization.cpu_offload_use_pin_memory",
    "zero_optimization.zenflow",
    "zero_optimization.mics_shard_size",
    "zero_optimization.zero_hpz_partition_size",
)
"""Settings of DeepSpeed that would change what is trained or how it is split; the run has its own, or none."""

_LAUNCHED = {
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "zero_optimization.offload_optimizer.device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "zero_optimization.offload_param.device",
}
"""What `accelerate launch` says by flags, as settings of DeepSpeed."""

_REMEDIES = {
    "gradient_clipping": "train.max_grad_norm decides it (0.0: off)",
    "train_batch_size": "train.batch_tokens decides the batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch decides it",
    "gradient_accumulation_steps": "train.batch_tokens and train.micro_batch decide it",
    "optimizer": "the `optimizer` section of the run decides it",
    "scheduler": "the `schedule` section of the run decides it",
    "zero_optimization.stage": "train.strategy decides it",
    "zero_optimization.offload_optimizer.device": "train.offload decides it",
    "zero_optimization.offload_param.device": "train.offload decides it",
    "fp16.enabled": "train.precision decides it (weights stay fp32, the arithmetic is autocast's)",
    "bf16.enabled": "train.precision decides it (weights stay fp32, the arithmetic is autocast's)",
}


@dataclass(frozen=True)
class ZeroSettings:
    """What a run wants of DeepSpeed.

    Attributes:
        stage: 1, 2 or 3.
        limit: of the gradient's norm; None when it is not clipped.
        precision: of the arithmetic.
        offload: None, "optimizer" or "all".
        world: processes of the job.
        pinned: whether main memory is pinned for copies to a GPU.
    """

    stage: int
    limit: float | None
    precision: Precision
    offload: str | None
    world: int
    pinned: bool


def owned_settings(settings: ZeroSettings) -> dict[str, Any]:
    """The settings that a run decides, by dotted key. Batch sizes are nominal: the engine is told every micro-batch."""
    offload = settings.offload is not None
    return {
        "train_batch_size": settings.world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": True,
        "gradient_clipping": settings.limit or 0.0,
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types.grad_accum_dtype": "fp32",
        "fp16.enabled": False,
        "bf16.enabled": False,
        "torch_autocast.enabled": settings.precision != "fp32",
        "torch_autocast.dtype": AUTOCAST[settings.precision],
        "torch_autocast.lower_precision_safe_modules": [],
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization.stage": settings.stage,
        "zero_optimization.offload_optimizer.device": "cpu" if offload else "none",
        "zero_optimization.offload_optimizer.ratio": 1.0,
        "zero_optimization.offload_param.device": "cpu" if settings.offload == "all" else "none",
        "zero_optimization.compute_grad_norm": True,
        "zero_optimization.elastic_checkpoint": False,
        "zero_optimization.zero_quantized_weights": False,
        "zero_optimization.zero_quantized_nontrainable_weights": False,
        "zero_optimization.zero_quantized_gradients": False,
    }


def free_settings(settings: ZeroSettings) -> dict[str, Any]:
    """Our choice where a user may have another one: what changes speed and memory alone."""
    return {
        # DeepSpeed's 5e8 elements are 2 GB of buffer in fp32, whatever the size of the model.
        "zero_optimization.reduce_bucket_size": 50_000_000,
        "zero_optimization.allgather_bucket_size": 50_000_000,
        "zero_optimization.offload_optimizer.pin_memory": settings.pinned,
        "zero_optimization.offload_param.pin_memory": settings.pinned,
        "timers.throughput.enabled": False,  # it waits for the device at every micro-batch
    }


def generate(settings: ZeroSettings, user: Mapping[str, Any], source: str) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        settings: what the run wants.
        user: a user's configuration; "auto", or what the run decides anyway, is fine everywhere.
        source: what to call it in an error.

    Raises:
        ValueError: when it sets what the run decides, to something else; names the key, both values and the remedy.
    """
    owned, free = owned_settings(settings), free_settings(settings)
    for foreign in FOREIGN:
        value = _get(user, foreign)
        if value not in (None, "auto", False) and not (isinstance(value, dict) and value.get("enabled") is False):
            remedy = _REMEDIES.get(foreign, "it has no place in this run")
            raise ValueError(f"{source}: {foreign}: {json.dumps(value)} is set; remove it: {remedy}")
    for key, value in owned.items():
        given = _get(user, key)
        if given not in (None, "auto", value):
            remedy = _REMEDIES.get(key, "the run decides it, so that precision and gradients mean one thing")
            raise ValueError(
                f"{source}: {key}: {json.dumps(given)} differs from the run's {json.dumps(value)}; remove it or set it "
                f'to "auto": {remedy}'
            )
    result: dict[str, Any] = {}
    for key, value in free.items():
        _put(result, key, value)
    for key, value in _leaves(user):
        if value != "auto" and not key.startswith(("fp16.", "bf16.", *FOREIGN)):
            _put(result, key, value)
    for key, value in owned.items():
        _put(result, key, value)
    return result


def _get(tree: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return None
        tree = tree[part]
    return tree


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    for part in above:
        tree = tree.setdefault(part, {})
    tree[last] = value


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def read_user_settings(path: str, source: str) -> dict[str, Any]:
    """A user's DeepSpeed JSON.

    Raises:
        ValueError: when it is not there or not a JSON object.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source}: {path} cannot be read as JSON ({error}); name a DeepSpeed configuration"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{source}: {path} holds no JSON object; name a DeepSpeed configuration")
    return found


def _user_settings(config: LoopConfig, launch: Launch) -> tuple[dict[str, Any], str]:
    """What a user says to DeepSpeed beside the run's configuration, and where it is said."""
    file, launched = config.train.deepspeed, launch.deepspeed
    if launched is not None:
        if file is not None and Path(file).resolve() != Path(launched).resolve():
            raise ValueError(
                f"train.deepspeed: {file} and accelerate launch's {launched} are two DeepSpeed files; give one of them"
            )
        return read_user_settings(launched, "accelerate launch"), f"accelerate launch, {launched}"
    if file is not None:
        return read_user_settings(file, "train.deepspeed"), f"train.deepspeed, {file}"
    flags: dict[str, Any] = {}
    for name, key in _LAUNCHED.items():
        value = os.environ.get(name, "none")
        if launch.wish is not None and value != "none":
            _put(flags, key, float(value) if key == "gradient_clipping" and value != "auto" else value)
    return flags, "accelerate launch"


def make_accelerator(
    config: LoopConfig, strategy: str, launch: Launch, precision: Precision, timeout: timedelta, *, cpu: bool
) -> Accelerator:
    """Accelerate's object for ZeRO, whose plugin carries DeepSpeed's whole configuration.

    It joins the processes. `ACCELERATE_MIXED_PRECISION` must not be set: Accelerate would turn a half section on.

    Raises:
        ValueError: when DeepSpeed is not installed, a user's DeepSpeed file says otherwise than the run, or a setting
            does not go with the stage.
    """
    settings = ZeroSettings(
        stage=int(strategy.removeprefix("zero")),
        limit=config.train.max_grad_norm,
        precision=precision,
        offload=config.train.offload,
        world=launch.world or 1,
        pinned=not cpu,
    )
    if config.train.compile and settings.stage == 3:
        raise ValueError(
            "train.compile: ZeRO-3 gathers weights in hooks of every module, which cut the compiled graph; set "
            "it to false, or use train.strategy zero2 or fsdp2"
        )
    content = generate(settings, *_user_settings(config, launch))
    load_deepspeed(strategy, cpu=cpu)
    # The file that was launched is read: Accelerate would read it once more, and complain of its own variables.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    plugin = DeepSpeedPlugin(hf_ds_config=content, zero3_init_flag=False)
    group = InitProcessGroupKwargs(backend="gloo" if cpu else None, timeout=timeout)
    accelerator = Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=[group])
    # transformers looks here to build models in shards; ours are built whole and split by the engine.
    plugin.dschf = None
    return accelerator


def load_deepspeed(strategy: str, *, cpu: bool) -> Any:
    """Import DeepSpeed for this machine.

    Raises:
        ValueError: when it is missing or cannot be imported, with the remedy.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f'train.strategy: {strategy} needs DeepSpeed, which is not installed; pip install "pretrain[deepspeed]", '
            "or use fsdp2"
        )
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cuda")
    try:
        with quiet():
            deepspeed = importlib.import_module("deepspeed")
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            f"train.strategy: {strategy} needs DeepSpeed, which cannot be imported here ({error}); repair it with "
            'pip install --force-reinstall --no-deps "deepspeed>=0.19", or use fsdp2'
        ) from error
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    # DeepSpeed calls functions that torch has given new names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if cpu:
        # Kernels for inference on a CPU: they would be compiled at start, and nothing here calls them.
        operators = importlib.import_module("deepspeed.ops")
        operators.__dict__["__compatible_ops__"] = {}
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    """A step without an update is told by the run's guard; DeepSpeed would call each an overflow."""
    return "OVERFLOW!" not in record.getMessage()


@contextmanager
def quiet(level: int = logging.ERROR) -> Iterator[None]:
    """Let DeepSpeed speak of errors alone; afterwards of warnings."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(logging.WARNING)
        for handler in logger.handlers:  # it writes among the results of a command otherwise
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
