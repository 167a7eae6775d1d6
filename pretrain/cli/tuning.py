"""Commands that fine-tune a model on a task."""

from __future__ import annotations

from typing import Annotated

import typer

from pretrain.cli.options import ModelName, Overrides, TrustCode, app, console, end, going_on

TaskName = Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file, or the name of a shipped task")]


@app.command()
def finetune(
    model: ModelName,
    config: TaskName,
    overrides: Overrides = None,
    resume: Annotated[str, typer.Option(help="auto: go on from what is there; never: refuse if there is something")] = (
        "auto"
    ),
    allow_change: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="go on although this key differs (repeat)")
    ] = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Fine-tune any model on a task: a run a seed, the best checkpoint of each scored once on the test rows."""
    from pretrain.config_task import load_tuning

    resolved = load_tuning(config, overrides or [])
    from pretrain import finetune as verb
    from pretrain.training.engines.job import close_job

    with going_on():
        code = verb.finetune(
            model,
            resolved,
            resume=resume,
            allow_changes=allow_change or (),
            trust_remote_code=trust_remote_code,
            console=console(),
        )
    close_job()
    end(code)
