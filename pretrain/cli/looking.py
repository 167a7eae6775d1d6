"""Commands that look at a run and change nothing: a batch, the plan, the data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pretrain.cli.options import ConfigName, Overrides, app, config_of, console, going_on


@app.command()
def inspect(
    config: ConfigName,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(help="as the log counts, from 1")] = 1,
    rows: Annotated[str | None, typer.Option(metavar="A:B", help="rows A to B - 1; default: the first few")] = None,
    split: Annotated[
        str, typer.Option(help="train-NAME: rows of that source alone; validation: batch STEP of its pass")
    ] = "train",
    html: Annotated[Path | None, typer.Option(help="write the rows as a page here, instead of printing them")] = None,
) -> None:
    """Show the batch of a training step: text, token borders, documents, targets, sources. Changes nothing."""
    from pretrain import inspect as verb

    inspected = verb.inspect_step(config_of(config, overrides), step, split=split)
    if html is None:
        verb.show(inspected, Console(), rows=rows)
    else:
        console().print(f"{verb.write_page(inspected, html, rows=rows):,} rows: {html}", markup=False)


@app.command()
def plan(
    config: ConfigName,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="h200, a100-40gb, rtx-4090, ...; an unknown name lists them all")] = "h100",
    gpus: Annotated[int | None, typer.Option(help="of all nodes together; default: train.processes, else 1")] = None,
    nodes: Annotated[int, typer.Option(help="that the GPUs are spread over")] = 1,
    memory_gib: Annotated[float | None, typer.Option(min=0.1, help="of a GPU")] = None,
    peak_tflops: Annotated[float | None, typer.Option(min=0.001, help="dense, bf16")] = None,
    bandwidth_gbs: Annotated[float | None, typer.Option(min=0.1, help="of a GPU's memory, GB/s")] = None,
    link_gbs: Annotated[float | None, typer.Option(min=0.001, help="between GPUs of a node, one way, GB/s")] = None,
    network_gbps: Annotated[float | None, typer.Option(min=0.001, help="between nodes, a GPU's share, Gb/s")] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="of a GPU an hour")] = None,
    assume: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="another assumption, as the plan lists them (repeat)")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="write the plan as JSON here, too")] = None,
) -> None:
    """Memory, speed, time, cost and failures of a run on GPUs that are not here. Needs no data; changes nothing."""
    resolved = config_of(config, overrides)
    from pretrain import plan as verb
    from pretrain.planning.gpus import find_gpu

    found = find_gpu(
        gpu,
        memory_gib=memory_gib,
        peak_tflops=peak_tflops,
        bandwidth=bandwidth_gbs,
        link=link_gbs,
        network=network_gbps,
        price=price,
    )
    wanted = gpus if gpus is not None else resolved.train.processes or 1
    machine = verb.Machine.of(found, wanted, nodes, assume or ())
    made = verb.make_plan(resolved, machine)
    if output is not None:
        verb.write_plan(made, output)
    verb.show(made, Console(soft_wrap=True))
    if made["chosen"] is None:
        raise typer.Exit(1)


@app.command()
def data(
    config: ConfigName,
    overrides: Overrides = None,
    html: Annotated[Path | None, typer.Option(help="write the report as a page here, too")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
) -> None:
    """Report on the prepared data: documents, lengths, packing, sources, repetition, vocabulary, what was left out."""
    from pretrain import data_report as verb

    with going_on():
        report = verb.report_data(config_of(config, overrides), console=console())
        if html is not None:
            verb.write_page(report, html)
        if as_json:
            sys.stdout.write(json.dumps(report, indent=2) + "\n")
        else:
            verb.show(report, Console())
