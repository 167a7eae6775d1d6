"""Commands that send something away: only when they are told to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.options import app, console, end


@app.command()
def publish(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a run, fine-tuning, checkpoint or model directory")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub; made when it is not there")],
    revision: Annotated[str, typer.Option(help="the branch that it becomes")] = "main",
    public: Annotated[bool, typer.Option("--public", help="everybody may see it; default: private")] = False,
    steps: Annotated[bool, typer.Option("--steps", help="of a run: its checkpoints too, as revisions step-N")] = False,
    step_0: Annotated[bool, typer.Option("--step-0", help="of a run: the model before its first step too")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="replace another model that is there")] = False,
    also: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="files in MODEL that are left out, sent too: 'notes.txt'")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="send it; without this, it is only shown")] = False,
) -> None:
    """Show every file that would go to the Hub, and with --yes send it: one commit a revision, private by default.

    What goes is the model: the files in its manifest, or else those named as Hugging Face libraries name them, with
    card, licence and results. Whatever else lies in the directory is shown, and stays unless --also names it.

    The token is that of `hf auth login` or of the variable HF_TOKEN. Without --yes nothing is sent, and the exit code
    is 3. After a cut, the same command goes on.
    """
    from pretrain.publish import Wanted
    from pretrain.publish import publish as publish_model

    wanted = Wanted(
        repository, revision, public=public, steps=steps, step_0=step_0, replace=replace, also=tuple(also or ())
    )
    end(publish_model(model, wanted, yes=yes, console=console()))
