"""The peak table: found by the driver's names, dense figures, None where it is not known."""

from __future__ import annotations

import pytest
import torch

from pretrain.training.flops import named_peak_flops, peak_flops


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H200", 989.4e12, 67e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA GeForce RTX 3090", 71e12, 35.6e12),
        ("NVIDIA GeForce RTX 3090 Ti", 80e12, 40e12),
        ("Tesla V100-SXM2-16GB", 125e12, 15.7e12),
    ],
)
def test_known_devices(name: str, bf16: float, fp32: float) -> None:
    assert named_peak_flops(name, "bf16") == named_peak_flops(name, "fp16") == bf16
    assert named_peak_flops(name, "fp32") == named_peak_flops(name, "no") == fp32


def test_unknown_devices_have_no_peak() -> None:
    assert named_peak_flops("NVIDIA Z9000", "bf16") is None
    for name in ("RTX 4090 D", "RTX 4090 Laptop GPU", "RTX 3080 Ti", "RTX 4080 SUPER"):
        assert named_peak_flops(f"NVIDIA GeForce {name}", "bf16") is None
    assert peak_flops(torch.device("cpu"), "bf16") is None
