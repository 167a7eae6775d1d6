"""Commands that make a run: all of it, its tokenizer, its data, its training.

What lives here: also in which processes a training runs. What must not: how any stage works.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated

import typer

from pretrain.cli.options import ConfigName, Overrides, app, config_of, console, end, going_on, own_config
from pretrain.config import RunConfig

AllowChange = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-change", metavar="KEY", help="go on from a checkpoint although this key differs from its own (repeat)"
    ),
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="training processes on this machine; default: train.processes, else 1")
]
Supervise = Annotated[
    bool,
    typer.Option(
        "--supervise", help="start training again when a process fails or hangs; three failures at one step end it"
    ),
]
MaxRestarts = Annotated[int, typer.Option(min=0, help="--supervise: in a row without a newer checkpoint")]
HangSeconds = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="--supervise: no shorter silence is a hang; default: a step hangs after twice the slowest and 10 s",
        show_default=False,
    ),
]


def launcher(
    name: str,
    overrides: list[str] | None,
    config: RunConfig,
    processes: int | None,
    supervision: tuple[int, float] | None,
    allow_change: list[str] | None,
) -> Callable[[str], int] | None:
    """What trains in processes of their own, given a value of `--resume`; None to train in this one.

    Args:
        name: of the configuration, as it was given.
        overrides: as they were given.
        config: of the run, with `train.processes` as the command line has it.
        processes: as they were given.
        supervision: `--max-restarts` and `--hang-seconds`; None: no supervision.
        allow_change: as they were given.

    Raises:
        ValueError: when processes, or a supervisor, are asked for where another launcher has started this process.
    """
    from pretrain import launch as verb

    if verb.started_by_launcher():
        if processes is not None or supervision is not None:
            raise ValueError("--processes and --supervise: another launcher has started this process; leave them out")
        return None
    number = processes or config.train.processes or 1
    if number == 1 and supervision is None:
        return None
    words = list(overrides or ())
    if processes is not None and config.train.processes is not None:
        words.append(f"train.processes={number}")
    return lambda resume: verb.launch(
        config,
        lambda resume: verb.train_command(name, words, resume=resume, allow_changes=allow_change or ()),
        processes=number,
        resume=resume,
        supervision=None if supervision is None else verb.Supervision(*supervision),
        console=console(),
    )


def supervision_of(supervise: bool, max_restarts: int, hang_seconds: float | None) -> tuple[int, float] | None:
    if hang_seconds is not None and not supervise:
        raise ValueError(f"--hang-seconds {hang_seconds:g}: nobody looks for a hang; add --supervise")
    return (max_restarts, hang_seconds or 0.0) if supervise else None


@app.command()
def run(
    config: ConfigName,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="archive what lies under this name, and start anew")] = False,
    dry_run: Annotated[bool, typer.Option(help="one step of everything; print memory and ETA; leave nothing")] = False,
    allow_change: AllowChange = None,
    processes: Processes = None,
    supervise: Supervise = False,
    max_restarts: MaxRestarts = 10,
    hang_seconds: HangSeconds = None,
) -> None:
    """All stages: tokenizer, data, training, evaluation, export. What is made and unchanged is skipped."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "run makes its stages in one process, and was launched as several; use `pretrain run CONFIG "
            "--processes N`, or launch `pretrain train CONFIG` once the data are prepared"
        )
    resolved = config_of(config, overrides) if dry_run else own_config(config, overrides, processes)
    supervision = supervision_of(supervise, max_restarts, hang_seconds)
    launched = launcher(config, overrides, resolved, processes, supervision, allow_change)
    from pretrain import run as verb

    with going_on():
        if dry_run:
            verb.dry_run(resolved, console=console())
        elif code := verb.run(
            resolved, fresh=fresh, allow_changes=allow_change or (), launch=launched, console=console()
        ):
            raise typer.Exit(code)


@app.command()
def tokenizer(config: ConfigName, overrides: Overrides = None) -> None:
    """Train a tokenizer on the text: a directory that AutoTokenizer loads."""
    resolved = own_config(config, overrides)
    from pretrain.tokenizer import train_tokenizer

    with going_on():
        console().print(f"tokenizer: {train_tokenizer(resolved, console=console())}")


@app.command()
def prepare(config: ConfigName, overrides: Overrides = None) -> None:
    """Turn text into token shards."""
    resolved = own_config(config, overrides)
    from pretrain.prepare import prepare_data

    with going_on():
        console().print(f"data: {prepare_data(resolved, console=console())}")


@app.command()
def train(
    config: ConfigName,
    overrides: Overrides = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on from the newest checkpoint; never: refuse if there is one")
    ] = "auto",
    allow_change: AllowChange = None,
    processes: Processes = None,
    supervise: Supervise = False,
    max_restarts: MaxRestarts = 10,
    hang_seconds: HangSeconds = None,
) -> None:
    """Pretrain on the prepared shards. Goes on where an earlier call stopped."""
    resolved, allowed = own_config(config, overrides, processes), allow_change or ()
    supervision = supervision_of(supervise, max_restarts, hang_seconds)
    if launched := launcher(config, overrides, resolved, processes, supervision, allow_change):
        raise typer.Exit(launched(resume))
    from pretrain import train as verb
    from pretrain.training.engines.job import close_job

    with going_on():
        code = verb.train(resolved, resume=resume, allow_changes=allowed, console=console())
    close_job()
    end(code)
