"""The machine under the run: device, precision, seeds, memory, stop signals.

What lives here: everything that asks what the hardware is or what the operating system wants. What must not: models,
data, processes, or the loop.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import random
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch

from pretrain import __version__

Precision = Literal["fp32", "bf16", "fp16"]

EXIT_STOPPED = 75
"""Exit code of a run that a signal stopped after it was saved: run the same command again (sysexits' EX_TEMPFAIL)."""

MIXED: dict[str, str] = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Our names of precisions -> Accelerate's."""


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 arithmetic is native: Ampere or newer on CUDA, AVX-512 BF16 or AMX or Armv8.6 BF16 on a CPU."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not Path("/proc/cpuinfo").is_file():
        return False
    text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    flags = {flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()}
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def resolve_precision(requested: str, device: torch.device) -> Precision:
    """The precision of the arithmetic: `auto` is bf16 where the processor or GPU has it natively, else fp32.

    Raises:
        ValueError: for fp16 without CUDA, where torch runs no mixed fp16.
    """
    if requested == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    if requested == "fp16" and device.type != "cuda":
        raise ValueError(f"train.precision: fp16 needs a CUDA device, this one is {device.type}; use bf16 or fp32")
    if requested not in MIXED:
        raise ValueError(f"train.precision: {requested} is unknown; use auto, fp32, bf16 or fp16")
    return requested  # type: ignore[return-value]


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next step instead of giving it back to the kernel.

    A training step on a CPU frees and takes the same hundreds of megabytes again and again; by default every one of
    those pages is faulted in anew (measured: 1.3 to 1.6 times the step rate without). Returns whether it took.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mmap_max, top_pad, trim_threshold = -4, -2, -1
    libc = ctypes.CDLL("libc.so.6")
    took = [libc.mallopt(mmap_max, 0), libc.mallopt(trim_threshold, -1), libc.mallopt(top_pad, 256 << 20)]
    return all(took)


def set_seed(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def describe_machine(device: torch.device) -> str:
    """One line that says where a number was measured."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def versions() -> dict[str, str]:
    """What a number or a model was made with."""
    names = ("torch", "transformers", "tokenizers", "accelerate", "safetensors")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"pretrain": __version__, "python": platform.python_version(), **found}


class StopSignals:
    """Turns signals into a flag that the loop reads between steps. A context manager; handlers are put back after.

    A second SIGINT interrupts at once, for a person who cannot wait for the save.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.received: str | None = None
        self._names = tuple(names)
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received == "SIGINT" and name == "SIGINT":
            raise KeyboardInterrupt
        self.received = name

    def __enter__(self) -> Self:
        for name in self._names:
            number = signal.Signals[name]
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: the embedding program owns the signals
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
