"""Every number of a plan that is neither in the configuration nor in the table of accelerators, with its source.

What lives here: the defaults and how a user replaces one. What must not: a formula.

Sources: "published": a figure that somebody measured and published; "fitted": chosen once so that published training
speeds come out (`docs/plan.md` has the comparison); "derived": follows from this code or from another entry;
"assumed": a round number to replace with your own; "yours".
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pretrain.planning.gpus import Gpu


@dataclass(frozen=True)
class Assumption:
    """One number: what it is, its unit, and where it comes from."""

    value: float
    unit: str
    meaning: str
    source: str


_HOPPER = ("GB200", "B200", "GH200", "H200", "H100", "H20", "MI300X")


def assumptions_for(gpu: Gpu, given: Sequence[str] = ()) -> dict[str, Assumption]:
    """All assumptions for an accelerator, with the user's `name=value` in place of the defaults.

    Raises:
        ValueError: for an unknown name, with the nearest known one, or a value that is no number of at least 0.
    """
    table = _defaults(gpu)
    for text in given:
        name, separator, number = text.partition("=")
        if name not in table or not separator:
            near = difflib.get_close_matches(name, table, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise ValueError(f"--assume: `{text}` is no name=value of {', '.join(table)}{hint}")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"--assume: {name}: `{number}` is no number of at least 0; its unit is {table[name].unit}")
        table[name] = replace(table[name], value=value, source="yours")
    return table


def _defaults(gpu: Gpu) -> dict[str, Assumption]:
    hopper = gpu.name.startswith(_HOPPER)
    matmul, attention = (0.58, 0.27) if hopper else (0.75, 0.45)
    fitted = "fitted to published MFU on H100" if hopper else "fitted to published MFU on A100"
    if not hopper and not gpu.name.startswith(("A100", "A800")):
        fitted = "assumed, as on A100"
    llama = "published: Llama 3, 50,700 GPU-hours for each failure"
    return {
        "matmul_share": Assumption(matmul, "of peak", "speed of matrix products", fitted),
        "attention_share": Assumption(attention, "of peak", "speed of attention, the whole square counted", fitted),
        "memory_share": Assumption(0.8, "of bandwidth", "speed of all other operations", "assumed"),
        "passes": Assumption(
            5.0, "times", "what a kept byte is read and written", "derived: once made, four times used"
        ),
        "passes_compiled": Assumption(2.5, "times", "the same with train.compile", "assumed: half of it fused"),
        "logit_bytes": Assumption(
            40.0, "bytes", "traffic for each logit of head and loss", "derived from the fused head"
        ),
        "launch_us": Assumption(700.0, "us", "host time for each block of a micro-batch", "assumed: 100 launches"),
        "launch_us_compiled": Assumption(150.0, "us", "the same with train.compile", "assumed"),
        "overlap": Assumption(0.8, "share", "of computing time that hides communication", "assumed"),
        "link_share": Assumption(0.8, "of bandwidth", "speed of collectives", "assumed"),
        "scale_loss": Assumption(
            0.02, "share", "lost for each doubling above 8 GPUs", "published: 1.3-2.5%, llm-foundry"
        ),
        "context_gib": Assumption(0.8, "GiB", "context and libraries on each GPU", "assumed"),
        "nccl_gib": Assumption(1.0, "GiB", "communicators on each GPU, with several", "assumed"),
        "waste": Assumption(0.06, "share", "of the tensors' bytes lost to fragmentation", "assumed"),
        "mttf_hours": Assumption(50_700.0, "GPU-hours", "between failures", llama),
        "mttf_bad_hours": Assumption(
            10_000.0, "GPU-hours", "between failures on a bad cluster", "published: OPT, 11,900"
        ),
        "restart_seconds": Assumption(300.0, "s", "from a failure to the first step after it", "assumed"),
        "host_gbs": Assumption(20.0, "GB/s", "between a GPU and main memory, where something is offloaded", "assumed"),
        "copy_gbs": Assumption(10.0, "GB/s", "from a GPU to main memory, saving in the background", "assumed"),
        "write_gbs": Assumption(1.0, "GB/s", "from a node to its disk or store", "assumed"),
        "stall_seconds": Assumption(0.0, "s", "training waits for a save; 0: from copy_gbs or write_gbs", "derived"),
        "host_gib": Assumption(0.0, "GiB", "main memory of a node; 0: not looked at", "assumed"),
    }
