"""The command that shows runs side by side, on a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.options import app, console, going_on


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run directories, OUT/NAME")],
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("report.html"),
    text: Annotated[
        list[str] | None,
        typer.Option(help="a sentence for attention maps (repeat); default: held-out text, samples"),
    ] = None,
    attention: Annotated[bool, typer.Option(help="load the models, on the CPU, for attention maps")] = True,
) -> None:
    """Write one page about runs, side by side: curves, samples, data, attention, configuration. Needs no network."""
    from pretrain.report import write_report

    with going_on():
        path = write_report(runs, out, texts=text or (), attention=attention, console=console())
    console().print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)", markup=False, highlight=False)
