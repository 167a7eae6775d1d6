"""Peak arithmetic rates of devices, so that MFU can be told.

What lives here: the dense peak table. What must not: timing, or counting a model's operations (the models do). A peak
that is not in the table is None, and then no MFU is reported, because a guessed peak makes a wrong one look exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """Dense peak of one device in FLOP/s, without sparsity. `half` is bf16 and fp16 with fp32 accumulation."""

    half: float
    fp32: float


# Matched in order against whole words of the device's name; figures are the vendor's, dense (a data sheet's "with
# sparsity" figure is twice as large), fp32 without TF32.
_PEAKS: tuple[tuple[str, Peak], ...] = (
    ("GB200", Peak(2500e12, 80e12)),  # NVIDIA GB200 NVL72 data sheet, per GPU
    ("B200", Peak(2250e12, 75e12)),  # NVIDIA DGX B200 data sheet, per GPU
    ("GH200", Peak(989.4e12, 67e12)),  # NVIDIA GH200 data sheet
    ("H200 NVL", Peak(835.5e12, 60e12)),  # NVIDIA H200 data sheet
    ("H200", Peak(989.4e12, 67e12)),  # NVIDIA H200 data sheet, SXM
    ("H100 NVL", Peak(835.5e12, 60e12)),  # NVIDIA H100 data sheet
    ("H100 PCIe", Peak(756e12, 51e12)),  # NVIDIA H100 data sheet, PCIe
    ("H100", Peak(989.4e12, 67e12)),  # NVIDIA H100 data sheet, SXM5
    ("H20", Peak(148e12, 44e12)),  # NVIDIA H20 specification
    ("A100", Peak(312e12, 19.5e12)),  # NVIDIA A100 data sheet
    ("A800", Peak(312e12, 19.5e12)),  # as A100, slower links
    ("L40S", Peak(362e12, 91.6e12)),  # NVIDIA L40S data sheet
    ("L40", Peak(181e12, 90.5e12)),  # NVIDIA L40 data sheet
    ("L4", Peak(121e12, 30.3e12)),  # NVIDIA L4 data sheet (242 with sparsity)
    ("A40", Peak(149.7e12, 37.4e12)),  # NVIDIA A40 data sheet
    ("A10G", Peak(70e12, 31.5e12)),  # NVIDIA A10G data sheet
    ("A10", Peak(125e12, 31.2e12)),  # NVIDIA A10 data sheet
    ("A6000", Peak(154.8e12, 38.7e12)),  # NVIDIA RTX A6000 data sheet (309.7 with sparsity)
    ("RTX 5090", Peak(209.5e12, 104.8e12)),  # NVIDIA RTX Blackwell architecture paper, fp32 accumulation
    ("RTX 4090", Peak(165.2e12, 82.6e12)),  # NVIDIA Ada architecture paper, appendix A, fp32 accumulation
    ("RTX 4080", Peak(97.5e12, 48.7e12)),  # NVIDIA Ada architecture paper, appendix A, fp32 accumulation
    ("RTX 3090 Ti", Peak(80e12, 40e12)),  # NVIDIA GA102 architecture paper, fp32 accumulation
    ("RTX 3090", Peak(71e12, 35.6e12)),  # NVIDIA GA102 architecture paper, fp32 accumulation
    ("RTX 3080", Peak(59.5e12, 29.8e12)),  # NVIDIA GA102 architecture paper, fp32 accumulation
    ("V100", Peak(125e12, 15.7e12)),  # NVIDIA V100 data sheet, SXM2; fp16 alone, no bf16
    ("T4", Peak(65e12, 8.1e12)),  # NVIDIA T4 data sheet; fp16 alone, no bf16
    ("MI300X", Peak(1307.4e12, 163.4e12)),  # AMD MI300X data sheet
    ("MI250X", Peak(191.5e12, 23.9e12)),  # AMD MI250X data sheet, one of two dies, which is what torch calls a device
)


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
    words = f" {device_name.replace('-', ' ').upper()} "
    for name, peak in _PEAKS:
        wanted = f" {name.upper()} "
        # What follows an RTX's number (Ti, SUPER, D, Laptop GPU) is another chip; elsewhere it is memory or a socket.
        if words.endswith(wanted) if name.startswith("RTX") else wanted in words:
            return peak.half if precision in ("bf16", "fp16") else peak.fp32
    return None
