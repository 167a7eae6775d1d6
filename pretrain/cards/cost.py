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
"""Of a CPU whose power is not known: the mean that Lannelongue et al. 2021 (Green Algorithms) take."""
WATTS_OF_UNKNOWN_GPU = 400.0
OVERHEAD = 1.56
"""Power usage effectiveness: the mean that data centres reported in the Uptime Institute's survey of 2024."""
# Board power by the data sheets, in the order and by the names of `planning.gpus`.
WATTS: Mapping[str, float] = {
    "GB200": 1200,
    "B200": 1000,
    "GH200": 700,
    "H200 NVL": 600,
    "H200": 700,
    "H100 NVL": 400,
    "H100 PCIe": 350,
    "H100": 700,
    "H20": 400,
    "A100": 400,
    "A100 40GB": 400,
    "A800": 400,
    "L40S": 350,
    "L40": 300,
    "L4": 72,
    "A40": 300,
    "A10G": 300,
    "A10": 150,
    "A6000": 300,
    "RTX 5090": 575,
    "RTX 4090": 450,
    "RTX 4080": 320,
    "RTX 3090 Ti": 450,
    "RTX 3090": 350,
    "RTX 3080": 320,
    "V100": 300,
    "V100 32GB": 300,
    "T4": 70,
    "MI300X": 750,
    "MI250X": 280,
}


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
    gpu = gpu_of_driver(hardware.machines[0].partition(",")[0])
    known = None if gpu is None else WATTS.get(gpu.name)
    if known is None:
        return WATTS_OF_UNKNOWN_GPU, f"{WATTS_OF_UNKNOWN_GPU:g} W a GPU (assumed: its power is not known)"
    return known, f"{known:g} W a GPU (assumed: all of its board power, by the data sheet)"


def epochs_of(run: Run) -> Mapping[str, float]:
    """How often each source was read; the name of all text together is empty."""
    found: Any = run.result.get("epochs")
    return found if isinstance(found, Mapping) else {}
