"""Peak arithmetic rates of devices, so that MFU can be told.

What lives here: the question to the driver. What must not: the table (`planning.gpus`), timing, or counting a model's
operations (the models do). A device that is not in the table has no peak, and then no MFU is reported.
"""

from __future__ import annotations

import torch

from pretrain.planning.gpus import gpu_of_driver


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak of `device` in FLOP/s, or None when it is not known (every CPU).

    Args:
        device: where the model computes.
        precision: "bf16" or "fp16"; anything else ("fp32", or Accelerate's "no") is fp32.
    """
    if device.type != "cuda":
        return None
    return named_peak_flops(torch.cuda.get_device_name(device), precision)


def named_peak_flops(device_name: str, precision: str) -> float | None:
    """As `peak_flops`, by the name that the driver gives the device."""
    gpu = gpu_of_driver(device_name)
    return None if gpu is None else gpu.peak(precision)
