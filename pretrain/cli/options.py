"""What all commands share: the application, the options that several take, where progress is shown, how they end.

What lives here: no command. Each room of commands beside this file imports its verbs when one is called, so that
`--help` imports no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pretrain.config import RunConfig, load_config
from pretrain.data.preparing.submitted import SubmittedError
from pretrain.files import lock_directory

app = typer.Typer(
    name="pretrain",
    help="Raw text in, a model that plain transformers loads out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigName = Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file, or the name of a shipped run")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted overrides")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="a Hugging Face model directory, or a Hub name")]
ModelDirectory = Annotated[Path, typer.Argument(metavar="MODEL", help="a Hugging Face model directory")]
Tokenizer = Annotated[str | None, typer.Option(help="another tokenizer: a directory or a Hub name")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one")]
TrustCode = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model")]


def rank_of_process() -> int:
    """Of this process in the job that a launcher started; 0 without one."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def console() -> Console:
    """Where progress is shown: by one process of a job."""
    return Console(stderr=True, soft_wrap=True, quiet=rank_of_process() != 0)


def end(code: int) -> None:
    """End with an exit code; one process of several without the interpreter's clearing up.

    Everything is written and closed by then, and the threads of a process group that its last references outlive can
    abort a process that has done its work.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


@contextmanager
def going_on() -> Iterator[None]:
    """Ctrl-C outside the training loop, which saves first, ends a command with a word on how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        console().print("interrupted; run the same command again to go on")
        raise typer.Exit(130) from None
    except SubmittedError as submitted:
        console().print(str(submitted), markup=False, highlight=False)
        raise typer.Exit(75) from None


def config_of(name: str, overrides: list[str] | None) -> RunConfig:
    return load_config(name, overrides or [])


def own_config(name: str, overrides: list[str] | None, processes: int | None = None) -> RunConfig:
    """The configuration of a verb that writes into its run; a second process there is told before torch is loaded.

    Args:
        name: a YAML file, or the name of a shipped run.
        overrides: dotted.
        processes: what the command line says in place of `train.processes`, where that is set.
    """
    config = config_of(name, overrides)
    if processes is not None and config.train.processes is not None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"processes": processes})})
    if config.directory.is_dir() and rank_of_process() == 0:
        with lock_directory(config.directory):
            pass
    return config
