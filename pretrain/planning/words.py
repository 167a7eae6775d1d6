"""A plan in words: lines and rows of text for a terminal or a page.

What lives here: how numbers are written. What must not: a number that is not in the plan, or printing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

# Columns of memory: heading -> parts of `memory.Parts` that it adds up.
COLUMNS: dict[str, tuple[str, ...]] = {
    "masters": ("masters",),
    "grads": ("gradients",),
    "optim": ("optimizer",),
    "buffers": ("buffers",),
    "gathered": ("gathered",),
    "casts": ("copies",),
    "activ.": ("activations",),
    "head": ("head",),
    "work": ("workspace",),
    "overhead": ("overhead",),
    "total": ("total",),
}


def count(number: float) -> str:
    """1234567 -> 1.23 M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """The two largest units of a time."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 5400:
        return f"{seconds / 60:.3g} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.3g} h"
    return f"{seconds / 86400:.3g} days"


def heading(plan: dict[str, Any]) -> list[str]:
    """What is planned: the model, the batch and the machine."""
    model, machine = plan["model"], plan["machine"]
    return [
        f"{plan['name']}: {model['architecture']}, {model['parameters']:,} parameters ({count(model['in_blocks'])} in "
        f"{model['layers']} blocks, {count(model['outside'])} outside), vocabulary {model['vocabulary']:,}, "
        f"{model['optimizer']}",
        f"batch {model['batch_tokens']:,} tokens = {model['batch_tokens'] // model['sequence_length']:,} rows of "
        f"{model['sequence_length']:,}",
        f"{machine['gpus']} x {machine['gpu']} on {machine['nodes']} node{'s' * (machine['nodes'] > 1)}: "
        f"{machine['memory_gib']:.1f} GiB, {machine['peak_tflops']:,.0f} TFLOP/s {machine['precision']}, "
        f"{machine['bandwidth_gbs']:,.0f} GB/s; {machine['link_gbs']:,.0f} GB/s inside a node, "
        f"{machine['network_gbps']:,.0f} Gb/s a GPU between nodes ({machine['source']})",
    ]


def memory_row(option: dict[str, Any]) -> list[str]:
    """Strategy, GiB by part, micro-batch and speed of one way to run."""
    cells = [sum(option["memory_gib"][name] for name in names) for names in COLUMNS.values()]
    row = [option["strategy"], *(f"{cell:.1f}" if cell >= 0.05 else "-" for cell in cells)]
    if not option["fits"]:
        return [*row, "does not fit", ""]
    steps = f" x {option['micro_steps']}" if option["micro_steps"] > 1 else ""
    return [*row, f"{option['micro_batch']}{steps}", f"{option['tokens_per_second']:,.0f}"]


def choice(plan: dict[str, Any]) -> list[str]:
    """What to take and what comes of it."""
    chosen = plan["chosen"]
    if chosen is None:
        return _nothing_fits(plan)
    model, budget, saved = plan["model"], plan["budget"], plan["checkpoint"]
    lines = [
        f"take {chosen['strategy']}, {_rows(chosen)} a forward pass: {chosen['reason']}",
        f"  set: {' '.join(chosen['set'])}",
        f"  {chosen['tokens_per_second']:,.0f} tokens/s, MFU {chosen['mfu']:.1%}, "
        f"{chosen['seconds_per_step']:.3g} s a step ({_spent(chosen)}); memory is highest at: {chosen['peak_at']}",
        f"  {count(budget['tokens'])} tokens in {budget['steps']:,.0f} steps, {budget['tokens_per_parameter']:.3g} a "
        f"parameter: {duration(budget['hours_of_training'] * 3600)} of training",
        f"  a checkpoint is {saved['bytes'] / 1e9:.3g} GB, {saved['bytes'] / model['parameters']:.3g} bytes a value; "
        f"each save holds training up for {duration(saved['stall_seconds'])}",
    ]
    for name, outcome in plan["outcome"].items():
        lines.append(
            f"  {name}: a failure every {duration(outcome['mttf_hours'] * 3600)}, {outcome['failures']:.2g} in all; "
            f"save every {duration(outcome['save_every_minutes'] * 60)}; goodput {outcome['goodput']:.1%}; "
            f"{duration(outcome['hours'] * 3600)}, cost {outcome['cost']:,.0f}"
        )
    if chosen["host_gib_per_node"] > 0:
        lines.append(f"  main memory: {chosen['host_gib_per_node']:.0f} GiB on each node for what is offloaded")
    other = plan["other_checkpointing"]
    state = "true" if other["gradient_checkpointing"] else "false"
    if other.get("fits"):
        lines.append(
            f"  with train.gradient_checkpointing={state}: {other['strategy']}, {_rows(other)}, "
            f"{other['memory_gib']['total']:.1f} GiB, {other['tokens_per_second']:,.0f} tokens/s"
        )
    else:
        lines.append(f"  with train.gradient_checkpointing={state}: nothing fits")
    return lines


def _rows(option: dict[str, Any]) -> str:
    return f"{option['micro_batch']} row{'s' * (option['micro_batch'] > 1)}"


def _spent(option: dict[str, Any]) -> str:
    """What a step's time goes into; a device that waits for its host hides what it computes."""
    spent, total = dict(option["spent"]), option["seconds_per_step"]
    computing = ("products", "attention", "traffic")
    hidden = ("host",) if sum(spent[name] for name in computing) > spent["host"] else computing
    shares = ((name, seconds / total) for name, seconds in spent.items() if name not in hidden)
    return ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005)


def _nothing_fits(plan: dict[str, Any]) -> list[str]:
    least = min(plan["options"], key=lambda option: float(option["memory_gib"]["total"]))
    other = plan["other_checkpointing"]
    lines = [
        f"nothing that the configuration allows fits: the least is {least['strategy']} with "
        f"{least['memory_gib']['total']:.1f} GiB of {plan['machine']['memory_gib']:.1f}"
    ]
    if other.get("fits") and other["gradient_checkpointing"]:
        lines.append(
            f"  train.gradient_checkpointing=true fits: {other['strategy']}, {_rows(other)}, "
            f"{other['tokens_per_second']:,.0f} tokens/s"
        )
    else:
        lines.append("  take more GPUs, train.strategy=auto, train.micro_batch=auto, or a smaller model")
    return lines


def assumption_rows(plan: dict[str, Any]) -> list[list[str]]:
    """Name, value, unit, meaning and source of every assumption."""
    return [
        [name, f"{entry['value']:g}", entry["unit"], entry["meaning"], entry["source"]]
        for name, entry in plan["assumptions"].items()
    ]


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """A table as lines, whatever the width of the terminal; columns in `left` start at one place, others end there."""
    table = [list(head), *map(list, rows)]
    widths = [max(len(row[number]) for row in table) for number in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
