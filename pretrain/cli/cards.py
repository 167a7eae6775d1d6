"""The command that writes a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.options import ModelDirectory, app, console


@app.command()
def card(
    model: ModelDirectory,
    run: Annotated[Path | None, typer.Option(help="it comes from; default: the one it lies in")] = None,
    repo: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="its name on the Hub")] = None,
    license: Annotated[str | None, typer.Option(help="of the model; default: the run's export.license")] = None,
    language: Annotated[list[str] | None, typer.Option(help="of the text; default: the run's export.language")] = None,
    scores: Annotated[list[Path] | None, typer.Option(help="JSON of `pretrain evaluate` or lm-eval")] = None,
    watts: Annotated[float | None, typer.Option(min=0.0, help="of a process's device, for the energy")] = None,
    overhead: Annotated[float | None, typer.Option(min=1.0, help="power usage effectiveness, for the energy")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a README.md that is there")] = False,
) -> None:
    """Write a model's README.md for the Hub, from what its run left."""
    from pretrain.card import write_card
    from pretrain.cards.facts import run_around

    found = run if run is not None else run_around(model)
    path = write_card(
        model,
        found,
        repository=repo,
        license=license,
        languages=language or (),
        scores=scores or (),
        watts=watts,
        overhead=overhead,
        overwrite=overwrite,
    )
    of = f", of the run {found}" if found is not None else "; no run is known, so it says what the directory tells"
    console().print(f"wrote {path}{of}", highlight=False)
