"""The command line: one command a verb, in rooms by what they do."""

# ruff: noqa: I001 (each room adds its commands, and their order is that of the help)

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from pretrain import __version__
from pretrain.cli import running, looking, reporting, scoring, tuning, models, cards, publishing  # noqa: F401
from pretrain.cli.options import app, end, rank_of_process
from pretrain.config import RunConfig, json_schema
from pretrain.config_task import TuningConfig
from pretrain.files import write_bytes


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option(help="write it here instead of printing it")] = None,
    task: Annotated[bool, typer.Option("--task", help="of a fine-tuning's configuration")] = False,
) -> None:
    """The JSON schema of a run configuration, or a task's, for editors."""
    text = json.dumps(json_schema(TuningConfig if task else RunConfig), indent=2) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        write_bytes(output, text.encode())


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"pretrain {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    if local_rank is not None:  # the deepspeed launcher puts it before the verb
        os.environ.setdefault("LOCAL_RANK", str(local_rank))


def main() -> None:
    """Run the command line; a mistake of the user's, or a disk that fails, is one message and exit code 2.

    A stop signal outside the training loop, where there is nothing to save, ends it with 130 (SIGINT) or 143 (SIGTERM).
    With PRETRAIN_DEBUG=1 in the environment the traceback is shown instead.
    """
    owner = os.getpid()
    stopped: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        if os.getpid() == owner:  # a worker that was forked says nothing
            # Straight to the descriptor: the console's library may be half imported when the signal comes.
            os.write(2, f"{signal.Signals(number).name}; run the same command again to go on\n".encode())
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        if stopped:  # the signal came within an import, and a library made an error of its own of it
            sys.exit(128 + stopped[0])
        if isinstance(error, ImportError) or os.environ.get("PRETRAIN_DEBUG"):
            raise
        # Rank 0 says what the others did, too: where they write, nobody may be looking.
        told = getattr(error, "told_elsewhere", False) and rank_of_process() != 0
        console = Console(stderr=True, soft_wrap=True, quiet=told)
        console.print("error:", style="bold red", end=" ")
        console.print(str(error), markup=False, highlight=False)
        end(1 if isinstance(error, ConnectionError) else 2)
