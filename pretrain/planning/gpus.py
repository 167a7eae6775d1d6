"""Accelerators and their numbers: arithmetic peaks, memory, links, network, price.

What lives here: one table, which planning and the MFU of a running job share. What must not: anything that asks the
driver. Peaks are dense (a data sheet's "with sparsity" figure is twice as large), `half` is bf16 and fp16 with fp32
accumulation, fp32 is without TF32. Memory is what a program is offered, which lies below the number on the box.
Prices are rough rents an hour and differ by a factor of three between sellers: give your own.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclass(frozen=True)
class Gpu:
    """One accelerator, as torch counts devices.

    Attributes:
        name: words of the driver's name, by which it is found.
        half: dense FLOP/s in bf16 or fp16.
        fp32: FLOP/s in fp32.
        memory: bytes that a program can have.
        bandwidth: of that memory, bytes/s.
        link: bytes/s in one direction to the other devices of the node.
        network: bytes/s in one direction to other nodes, a device's share.
        price: an hour.
        bf16: whether bf16 arithmetic is native.
        source: where peak and bandwidth come from.
    """

    name: str
    half: float
    fp32: float
    memory: float
    bandwidth: float
    link: float
    network: float
    price: float
    source: str
    bf16: bool = True

    def peak(self, precision: str) -> float:
        """Dense FLOP/s in "bf16", "fp16"; anything else is fp32."""
        return self.half if precision in ("bf16", "fp16") else self.fp32


def _gpu(
    name: str,
    tflops: tuple[float, float],
    memory: tuple[float, float],
    links: tuple[float, float],
    price: float,
    source: str,
    *,
    bf16: bool = True,
) -> Gpu:
    """(half, fp32) in TFLOP/s, (GiB, GB/s), (link GB/s, network Gb/s a device), price an hour."""
    half, fp32 = tflops
    size, bandwidth = memory
    link, network = links
    return Gpu(
        name,
        half * TERA,
        fp32 * TERA,
        size * GIB,
        bandwidth * GIGA,
        link * GIGA,
        network * GIGA / 8,
        price,
        source,
        bf16,
    )


# Matched in order against whole words of the device's name. Cards without NVLink talk over PCIe: 25 GB/s for
# generation 4, 50 for 5, 12 for 3. Network: what machines of that kind are commonly rented with.
GPUS: tuple[Gpu, ...] = (
    _gpu("GB200", (2500, 80), (184, 8000), (900, 400), 7.0, "NVIDIA GB200 NVL72 data sheet, per GPU"),
    _gpu("B200", (2250, 75), (178, 8000), (900, 400), 5.5, "NVIDIA DGX B200 data sheet, per GPU"),
    _gpu("GH200", (989.4, 67), (94.5, 4000), (450, 400), 3.0, "NVIDIA GH200 data sheet"),
    _gpu("H200 NVL", (835.5, 60), (139.8, 4800), (450, 200), 3.5, "NVIDIA H200 data sheet"),
    _gpu("H200", (989.4, 67), (139.8, 4800), (450, 400), 3.8, "NVIDIA H200 data sheet, SXM"),
    _gpu("H100 NVL", (835.5, 60), (93.1, 3900), (300, 200), 2.8, "NVIDIA H100 data sheet"),
    _gpu("H100 PCIe", (756, 51), (79.2, 2000), (50, 200), 2.4, "NVIDIA H100 data sheet, PCIe"),
    _gpu("H100", (989.4, 67), (79.2, 3350), (450, 400), 3.0, "NVIDIA H100 data sheet, SXM5"),
    _gpu("H20", (148, 44), (95.1, 4000), (450, 400), 2.0, "NVIDIA H20 specification"),
    _gpu("A100", (312, 19.5), (79.2, 2039), (300, 200), 1.8, "NVIDIA A100 data sheet, 80 GB"),
    _gpu("A100 40GB", (312, 19.5), (39.4, 1555), (300, 100), 1.3, "NVIDIA A100 data sheet, 40 GB"),
    _gpu("A800", (312, 19.5), (79.2, 2039), (200, 200), 1.6, "as A100, slower links"),
    _gpu("L40S", (362, 91.6), (44.4, 864), (25, 100), 1.2, "NVIDIA L40S data sheet"),
    _gpu("L40", (181, 90.5), (44.4, 864), (25, 100), 1.0, "NVIDIA L40 data sheet"),
    _gpu("L4", (121, 30.3), (22.0, 300), (25, 50), 0.7, "NVIDIA L4 data sheet (242 with sparsity)"),
    _gpu("A40", (149.7, 37.4), (44.4, 696), (25, 100), 0.6, "NVIDIA A40 data sheet"),
    _gpu("A10G", (70, 31.5), (22.1, 600), (25, 50), 1.0, "NVIDIA A10G data sheet"),
    _gpu("A10", (125, 31.2), (22.1, 600), (25, 50), 0.8, "NVIDIA A10 data sheet"),
    _gpu("A6000", (154.8, 38.7), (47.4, 768), (25, 100), 0.6, "NVIDIA RTX A6000 data sheet (309.7 with sparsity)"),
    # The RTX peaks: NVIDIA's architecture papers, tensor cores with fp32 accumulation.
    _gpu("RTX 5090", (209.5, 104.8), (31.4, 1792), (50, 25), 0.7, "NVIDIA RTX Blackwell architecture paper"),
    _gpu("RTX 4090", (165.2, 82.6), (23.6, 1008), (25, 25), 0.4, "NVIDIA Ada architecture paper, appendix A"),
    _gpu("RTX 4080", (97.5, 48.7), (15.7, 717), (25, 25), 0.3, "NVIDIA Ada architecture paper, appendix A"),
    _gpu("RTX 3090 Ti", (80, 40), (23.7, 1008), (25, 25), 0.3, "NVIDIA GA102 architecture paper"),
    _gpu("RTX 3090", (71, 35.6), (23.7, 936), (25, 25), 0.25, "NVIDIA GA102 architecture paper"),
    _gpu("RTX 3080", (59.5, 29.8), (9.7, 760), (25, 25), 0.2, "NVIDIA GA102 architecture paper"),
    _gpu("V100", (125, 15.7), (15.8, 900), (150, 25), 0.8, "NVIDIA V100 data sheet, SXM2, 16 GB", bf16=False),
    _gpu("V100 32GB", (125, 15.7), (31.7, 900), (150, 100), 1.0, "NVIDIA V100 data sheet, SXM2, 32 GB", bf16=False),
    _gpu("T4", (65, 8.1), (14.6, 320), (12, 25), 0.35, "NVIDIA T4 data sheet", bf16=False),
    _gpu("MI300X", (1307.4, 163.4), (191.7, 5300), (448, 400), 2.8, "AMD MI300X data sheet"),
    # One of the two dies, which is what torch calls a device.
    _gpu("MI250X", (191.5, 23.9), (63.9, 1638), (200, 100), 1.0, "AMD MI250X data sheet, one of two dies"),
)


def find_gpu(
    name: str,
    *,
    memory_gib: float | None = None,
    peak_tflops: float | None = None,
    bandwidth: float | None = None,
    link: float | None = None,
    network: float | None = None,
    price: float | None = None,
) -> Gpu:
    """The accelerator of this name (`h200`, `a100-40gb`, `rtx-4090`), with own numbers in place of the table's.

    An unknown name is taken when memory and peak are given.

    Args:
        name: in any case, with blanks, hyphens or underscores.
        memory_gib: in GiB.
        peak_tflops: dense TFLOP/s in bf16.
        bandwidth: of the memory, GB/s.
        link: within a node, one direction, GB/s.
        network: between nodes, a device's share, Gb/s.
        price: an hour.

    Raises:
        ValueError: for an unknown name without own numbers; lists the known ones.
    """
    known = {gpu.name.lower(): gpu for gpu in GPUS}
    wanted = " ".join(name.replace("-", " ").replace("_", " ").lower().split())
    found = known.get(wanted) or known.get(wanted.removeprefix("nvidia ").removeprefix("geforce "))
    if found is None and f"rtx {wanted}" in known:
        found = known[f"rtx {wanted}"]
    if found is None:
        if memory_gib is None or peak_tflops is None:
            near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
            hint = f" (did you mean `{_dashed(near[0])}`?)" if near else ""
            names = ", ".join(_dashed(gpu) for gpu in known)
            raise ValueError(
                f"--gpu: `{name}` is not in the table{hint}; known: {names}. For another one give --memory-gib and "
                "--peak-tflops (dense, bf16), and if you know them --bandwidth-gbs, --link-gbs, --network-gbps, --price"
            )
        found = _gpu(name, (peak_tflops, peak_tflops / 8), (memory_gib, 1000), (25, 100), 0.0, "yours; links assumed")
    return replace(
        found,
        half=found.half if peak_tflops is None else peak_tflops * TERA,
        memory=found.memory if memory_gib is None else memory_gib * GIB,
        bandwidth=found.bandwidth if bandwidth is None else bandwidth * GIGA,
        link=found.link if link is None else link * GIGA,
        network=found.network if network is None else network * GIGA / 8,
        price=found.price if price is None else price,
    )


def gpu_of_driver(device_name: str) -> Gpu | None:
    """The accelerator that a driver's device name means, or None: a guessed peak would make a wrong MFU look exact."""
    words = f" {device_name.replace('-', ' ').upper()} "
    for gpu in GPUS:
        wanted = f" {gpu.name.upper()} "
        # What follows an RTX's number (Ti, SUPER, D, Laptop GPU) is another chip; elsewhere it is memory or a socket.
        if words.endswith(wanted) if gpu.name.startswith("RTX") else wanted in words:
            return gpu
    return None


def _dashed(name: str) -> str:
    return name.lower().replace(" ", "-")
