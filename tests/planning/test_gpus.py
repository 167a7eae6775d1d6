"""The table of accelerators: found by any spelling, replaced by own numbers, one with that of MFU."""

from __future__ import annotations

import pytest

from pretrain.planning.assumptions import assumptions_for
from pretrain.planning.gpus import GIB, GPUS, find_gpu, gpu_of_driver
from pretrain.training.flops import named_peak_flops


@pytest.mark.parametrize("name", ["h200", "H200", "NVIDIA H200", "a100-40gb", "rtx_4090", "4090", "h100-pcie"])
def test_names_are_found_in_any_spelling(name: str) -> None:
    assert find_gpu(name).memory > GIB


def test_every_entry_is_whole_and_can_be_named() -> None:
    for gpu in GPUS:
        assert find_gpu(gpu.name.lower().replace(" ", "-")) == gpu
        assert gpu.half >= gpu.fp32 > 0
        assert min(gpu.memory, gpu.bandwidth, gpu.link, gpu.network, gpu.price) > 0
        assert gpu.source


def test_own_numbers_replace_the_tables() -> None:
    gpu = find_gpu("h100", memory_gib=40, peak_tflops=500, bandwidth=1000, link=100, network=800, price=9)
    assert (gpu.memory, gpu.half, gpu.bandwidth, gpu.link, gpu.network) == (40 * GIB, 5e14, 1e12, 1e11, 1e11)
    assert gpu.price == 9
    assert find_gpu("my-chip", memory_gib=64, peak_tflops=300).half == 3e14


def test_an_unknown_one_names_the_known_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"`h20o` is not.*known: .*h200.*--memory-gib and --peak-tflops"):
        find_gpu("h20o")
    with pytest.raises(ValueError, match="--gpu"):
        find_gpu("my-chip", memory_gib=64)


def test_mfu_and_plans_use_one_peak() -> None:
    found = gpu_of_driver("NVIDIA H100 80GB HBM3")
    assert found is not None
    assert found.peak("bf16") == named_peak_flops("NVIDIA H100 80GB HBM3", "bf16") == find_gpu("h100").half
    assert found.peak("fp32") == found.fp32


def test_assumptions_are_replaced_by_name() -> None:
    table = assumptions_for(find_gpu("h100"), ["waste=0.2", "mttf_hours=1e4"])
    assert (table["waste"].value, table["waste"].source) == (0.2, "yours")
    assert table["mttf_hours"].value == 1e4
    assert all(entry.source and entry.unit and entry.meaning for entry in table.values())
    for wrong in ("wast=0.2", "waste", "waste=much", "waste=-1", "waste=nan", "waste=inf"):
        with pytest.raises(ValueError, match="--assume"):
            assumptions_for(find_gpu("h100"), [wrong])
    with pytest.raises(ValueError, match="did you mean `waste`"):
        assumptions_for(find_gpu("h100"), ["wast=0.2"])
