"""What a training took: arithmetic, hours of hardware, and an estimate of energy with every assumption beside it.

What lives here: the arithmetic and its assumptions. What must not: wording beyond that of an assumption, or measuring.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.cards.facts import Facts, Run
from pretrain.planning.gpus import gpu_of_driver

WATTS_A_CORE = 12.0
"""Of a CPU whose power is not known: the entry "Any" of the table TDP_cpu.csv of Green Algorithms (Lannelongue et al.
2021, github.com/GreenAlgorithms/green-algorithms-tool)."""
WATTS_OF_UNKNOWN_GPU = 400.0  # nobody's figure: that of an A100, the middle of the table below
OVERHEAD = 1.56
"""Power usage effectiveness: the mean that operators reported of their largest data centre in the Uptime Institute's
Global Data Center Survey 2024; the default of Green Algorithms too (defaults_PUE.csv, which cites the report)."""
# The highest board power that is published for each, by the names and in the order of `planning.gpus`. Read in the
# makers' own papers where one is named without "as told by"; the others were found in pages that quote them.
WATTS: Mapping[str, float] = {
    "GB200": 1200,  # NVIDIA Blackwell architecture brief, as told by glennklockwood.com: up to 1,200 W a GPU
    "B200": 1000,  # the same: 1,000 W on an HGX B200; also docs.vultr.com
    "GH200": 700,
    "H200 NVL": 600,  # NVIDIA H200 data sheet, as told by onestopsystems.com
    "H200": 700,  # NVIDIA's submission to MLPerf Inference 4.1 (H200-SXM-141GBx8): "H200 TGP 700W"
    "H100 NVL": 400,  # NVIDIA H100 data sheet, as told by onestopsystems.com
    "H100 PCIe": 350,  # NVIDIA product brief PB-11133-001
    "H100": 700,  # NVIDIA H100 data sheet, as told by runpod.io: SXM
    "H20": 400,  # huggingface.co/hardware/h20
    "A100": 400,  # NVIDIA A100 data sheet (1758950), as told by github.com/mlco2/impact: SXM, either memory
    "A100 40GB": 400,
    "A800": 400,
    "L40S": 350,  # NVIDIA L40S data sheet, as told by sellers; so are the next two
    "L40": 300,
    "L4": 72,
    "A40": 300,  # NVIDIA A40 data sheet, as told by sellers
    "A10G": 300,
    "A10": 150,
    "A6000": 300,  # techpowerup.com, as told by github.com/mlco2/impact
    "RTX 5090": 575,  # NVIDIA's specification, as told by gamingpcadvice.com; so are the next two
    "RTX 4090": 450,
    "RTX 4080": 320,
    "RTX 3090 Ti": 450,  # tomshardware.fr
    "RTX 3090": 350,  # techpowerup.com, as told by github.com/mlco2/impact; so is the next one
    "RTX 3080": 320,
    "V100": 300,  # NVIDIA at ISC 2017, as told by hwupgrade.it: SXM2
    "V100 32GB": 300,
    "T4": 70,  # NVIDIA T4 data sheet (951643), as told by github.com/mlco2/impact
    "MI300X": 750,  # AMD's submission to MLPerf Inference 4.1: "MI300X-NPS1-SPX-192GB-750W"
    "MI250X": 280,  # AMD, as told by zexron.com: 560 W for two dies, each of which torch calls a device
}
WATTS_ON_PCIE: Mapping[str, float] = {
    "A100": 300,  # NVIDIA product brief PB-10577-001, as told by Green Algorithms: 80 GB
    "A100 40GB": 250,  # NVIDIA A100 data sheet, as told by Green Algorithms
    "V100": 250,  # as that of the SXM2
    "V100 32GB": 250,
}
"""Of cards that draw less than the modules of the same name."""
WITHOUT_SOURCE = frozenset({"GH200", "A800", "A10G", "A10"})
"""Whose power was found nowhere: that of their likes, or, of GH200, a guess at the GPU's share of its module."""


@dataclass(frozen=True)
class Flops:
    """Operations of a whole training, and how they were counted."""

    total: float
    how: str


@dataclass(frozen=True)
class Hardware:
    """How many processes there were, their hours together, the machines in turn, threads of a process."""

    processes: tuple[int, ...]
    hours: float
    machines: tuple[str, ...]
    on_gpu: bool | None
    threads: int | None


@dataclass(frozen=True)
class Energy:
    """An estimate in kWh, and what it rests on."""

    kilowatt_hours: float
    assumptions: str


def flops_of(facts: Facts) -> Flops | None:
    """Forward and backward operations of the tokens seen; None when too little is known."""
    run = facts.run
    tokens = None if run is None else run.progress.get("tokens")
    if run is None or not tokens:
        return None
    each = run.result.get("flops_per_token")
    if each:
        return Flops(each * tokens, f"{each:,.0f} a token position, counted from the architecture, attention included")
    if facts.model.parameters is None or facts.model.generator is not None:
        return None
    how = "6 × parameters × tokens, a rule of thumb (Kaplan et al. 2020): the run kept no count of its own"
    return Flops(6.0 * facts.model.parameters * tokens, how)


def hardware_of(run: Run) -> Hardware | None:
    """Time in training steps over all processes; evaluations, saves and what a crash lost are not in it."""
    hours = _process_hours(run)
    if hours is None:
        return None
    machines = tuple(dict.fromkeys(str(start["machine"]) for start in run.starts if start.get("machine")))
    threads = {start.get("threads") for start in run.starts}
    return Hardware(
        processes=tuple(dict.fromkeys(_processes(run))),
        hours=hours,
        machines=machines,
        on_gpu=_on_gpu(run),
        threads=threads.pop() if len(threads) == 1 else None,
    )


def _processes(run: Run) -> list[int]:
    """Of every start; of a run without a record of them, of its end: a split is written as `ddp x4 on cpu`."""
    found = [start["processes"] for start in run.starts if isinstance(start.get("processes"), int)]
    last = re.search(r" x(\d+)\b", str(run.progress.get("split", "")))
    return found or ([int(last[1])] if last else [])


def _process_hours(run: Run) -> float | None:
    """Seconds of training steps, each as often as there were processes then; None when that is not known."""
    seconds, processes = run.progress.get("seconds"), _processes(run)
    if not seconds or not processes:
        return None
    if len(set(processes)) == 1:
        return float(processes[0] * seconds / 3600.0)
    steps, clock = run.curves.along.get("step"), run.curves.along.get("seconds")
    if steps is None or clock is None or len(processes) != len(run.starts):
        return None
    begins = [float(start["step"]) for start in run.starts]
    # A start from an earlier step makes anew what came after it, and the clock of the run counts that once.
    last = float(run.progress.get("step", steps[-1]))
    ends = [min([*begins[number + 1 :], last]) for number in range(len(begins))]
    at = np.concatenate(([0.0], steps)), np.concatenate(([0.0], clock))
    lengths = np.maximum(0.0, np.interp(ends, *at) - np.interp(begins, *at))
    return float(np.dot(processes, lengths) / 3600.0)


def _on_gpu(run: Run) -> bool | None:
    """Whether it computed on GPUs, by what its steps were made with; None when that is not known."""
    found = re.search(r" on (\w+)", str(run.progress.get("arithmetic") or run.progress.get("split") or ""))
    return None if found is None else found[1] != "cpu"


def energy_of(facts: Facts, hardware: Hardware) -> Energy | None:
    """Watts a device x its hours x the overhead of the building; None when devices are unknown, or of several kinds."""
    found = _watts(facts, hardware)
    if found is None:
        return None
    watts, of_device = found
    overhead = OVERHEAD if facts.overhead is None else facts.overhead
    given = "given" if facts.overhead is not None else "assumed: the mean of the Uptime Institute's survey of 2024"
    building = f"power usage effectiveness {overhead:g} ({given})"
    return Energy(watts * hardware.hours * overhead / 1000.0, f"{of_device}; {building}; nothing was metered")


def _watts(facts: Facts, hardware: Hardware) -> tuple[float, str] | None:
    if facts.watts is not None:
        return facts.watts, f"{facts.watts:g} W a process (given)"
    if hardware.on_gpu is None or len(hardware.machines) != 1:
        return None
    if not hardware.on_gpu:
        if hardware.threads is None:
            return None
        watts = WATTS_A_CORE * hardware.threads
        return watts, (
            f"{watts:g} W a process (assumed: {WATTS_A_CORE:g} W a thread, here {hardware.threads}, as Green "
            "Algorithms takes a core whose power is not known)"
        )
    device = hardware.machines[0].partition(",")[0].upper()
    gpu = gpu_of_driver(device)
    if gpu is None or gpu.name not in WATTS:
        return WATTS_OF_UNKNOWN_GPU, f"{WATTS_OF_UNKNOWN_GPU:g} W a GPU (assumed: its power is not known)"
    watts = WATTS[gpu.name]
    if "PCIE" in device:
        sized = f"{gpu.name} 40GB" if "40GB" in device else gpu.name
        watts = WATTS_ON_PCIE.get(sized, watts)
    if gpu.name in WITHOUT_SOURCE:
        return watts, f"{watts:g} W a GPU (assumed: nothing published was found of its power)"
    return watts, f"{watts:g} W a GPU (assumed: all of the board power that is published for it)"


def epochs_of(run: Run) -> Mapping[str, float]:
    """How often each source was read; the name of all text together is empty."""
    found: Any = run.result.get("epochs")
    return found if isinstance(found, Mapping) else {}
