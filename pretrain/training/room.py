"""The room that a checkpoint needs, counted before there is one.

What lives here: bytes of one checkpoint, and bytes for reading. What must not: what a disk has (`places`).
"""

from __future__ import annotations

from pretrain.config_loop import LoopConfig
from pretrain.files import bytes_in
from pretrain.training.engines import Engine
from pretrain.training.optim import state_keys


def checkpoint_bytes(config: LoopConfig, engine: Engine) -> int:
    """At most what one checkpoint takes on the disk."""
    weights = {name: shape.nbytes for name, shape in engine.shapes().items()}
    state = 0
    tensors = len(weights)
    for group in engine.groups():
        keys = len(state_keys(group)) - 1  # all but the step, a number
        state += keys * sum(weights[name] for name in group["parameters"])
        tensors += (keys + 1) * len(group["parameters"])
    buffers = sum(buffer.nbytes for buffer in engine.bare.buffers())
    tokenizer = bytes_in(config.directory / "tokenizer")
    # Names and shapes, the random generators and the configuration as JSON, and half-filled blocks of the disk.
    generators = 20 * 1024 * engine.ranks.world
    slack = 400 * tensors + 192 * 1024 + generators + (sum(weights.values()) + state) // 100
    return sum(weights.values()) + state + buffers + tokenizer + slack


def amount(number: float) -> str:
    """Bytes, for reading."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} GiB"
