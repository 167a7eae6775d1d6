"""The command line: one command a verb. Each imports its verb when it is called, so `--help` imports no torch."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from pretrain import __version__
from pretrain.config import RunConfig, json_schema, load_config
from pretrain.data.preparing.submitted import SubmittedError
from pretrain.files import lock_directory, write_bytes

app = typer.Typer(
    name="pretrain",
    help="Raw text in, a model that plain transformers loads out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigName = Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file, or the name of a shipped run")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted overrides")]
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
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="a Hugging Face model directory, or a Hub name")]
ModelDirectory = Annotated[Path, typer.Argument(metavar="MODEL", help="a Hugging Face model directory")]


def _rank() -> int:
    """Of this process in the job that a launcher started; 0 without one."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def _console() -> Console:
    """Where progress is shown: by one process of a job."""
    return Console(stderr=True, soft_wrap=True, quiet=_rank() != 0)


def _end(code: int) -> None:
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
def _going_on() -> Iterator[None]:
    """Ctrl-C outside the training loop, which saves first, ends a command with a word on how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        _console().print("interrupted; run the same command again to go on")
        raise typer.Exit(130) from None
    except SubmittedError as submitted:
        _console().print(str(submitted), markup=False, highlight=False)
        raise typer.Exit(75) from None


def _config(name: str, overrides: list[str] | None) -> RunConfig:
    return load_config(name, overrides or [])


def _own_config(name: str, overrides: list[str] | None, processes: int | None = None) -> RunConfig:
    """The configuration of a verb that writes into its run; a second process there is told before torch is loaded.

    Args:
        name: a YAML file, or the name of a shipped run.
        overrides: dotted.
        processes: what the command line says in place of `train.processes`, where that is set.
    """
    config = _config(name, overrides)
    if processes is not None and config.train.processes is not None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"processes": processes})})
    if config.directory.is_dir() and _rank() == 0:
        with lock_directory(config.directory):
            pass
    return config


def _launcher(
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
        console=_console(),
    )


def _supervision(supervise: bool, max_restarts: int, hang_seconds: float | None) -> tuple[int, float] | None:
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
    resolved = _config(config, overrides) if dry_run else _own_config(config, overrides, processes)
    supervision = _supervision(supervise, max_restarts, hang_seconds)
    launched = _launcher(config, overrides, resolved, processes, supervision, allow_change)
    from pretrain import run as verb

    with _going_on():
        if dry_run:
            verb.dry_run(resolved, console=_console())
        elif code := verb.run(
            resolved, fresh=fresh, allow_changes=allow_change or (), launch=launched, console=_console()
        ):
            raise typer.Exit(code)


@app.command()
def tokenizer(config: ConfigName, overrides: Overrides = None) -> None:
    """Train a tokenizer on the text: a directory that AutoTokenizer loads."""
    resolved = _own_config(config, overrides)
    from pretrain.tokenizer import train_tokenizer

    with _going_on():
        _console().print(f"tokenizer: {train_tokenizer(resolved, console=_console())}")


@app.command()
def prepare(config: ConfigName, overrides: Overrides = None) -> None:
    """Turn text into token shards."""
    resolved = _own_config(config, overrides)
    from pretrain.prepare import prepare_data

    with _going_on():
        _console().print(f"data: {prepare_data(resolved, console=_console())}")


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
    resolved, allowed = _own_config(config, overrides, processes), allow_change or ()
    supervision = _supervision(supervise, max_restarts, hang_seconds)
    if launched := _launcher(config, overrides, resolved, processes, supervision, allow_change):
        raise typer.Exit(launched(resume))
    from pretrain import train as verb
    from pretrain.training.engines.job import close_job

    with _going_on():
        code = verb.train(resolved, resume=resume, allow_changes=allowed, console=_console())
    close_job()
    _end(code)


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

    inspected = verb.inspect_step(_config(config, overrides), step, split=split)
    if html is None:
        verb.show(inspected, Console(), rows=rows)
    else:
        _console().print(f"{verb.write_page(inspected, html, rows=rows):,} rows: {html}", markup=False)


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
    resolved = _config(config, overrides)
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

    with _going_on():
        report = verb.report_data(_config(config, overrides), console=_console())
        if html is not None:
            verb.write_page(report, html)
        if as_json:
            sys.stdout.write(json.dumps(report, indent=2) + "\n")
        else:
            verb.show(report, Console())


Tokenizer = Annotated[str | None, typer.Option(help="another tokenizer: a directory or a Hub name")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one")]
TrustCode = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model")]


@app.command()
def evaluate(
    model: ModelName,
    data: Annotated[list[str], typer.Argument(metavar="TEXT...", help="files, globs, directories, python-stdlib")],
    kind: Annotated[str, typer.Option(help="auto, causal, mlm or seq2seq")] = "auto",
    text_field: Annotated[str, typer.Option(help="the field with the text; INPUT,REFERENCE of pairs")] = "text",
    document: Annotated[str, typer.Option(help="auto, row, file, line or paragraph")] = "auto",
    context: Annotated[int | None, typer.Option(help="tokens; default: the model's, at most 1024")] = None,
    stride: Annotated[int | None, typer.Option(help="causal: sliding context, new tokens a window")] = None,
    num_beams: Annotated[int | None, typer.Option(help="encoder-decoder: as of `pretrain generate`")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="encoder-decoder: of an output; default 100")] = None,
    bleu_tokenizer: Annotated[str, typer.Option(help="encoder-decoder: auto, 13a, intl, zh, char or none")] = "auto",
    max_bytes: Annotated[int | None, typer.Option(help="use about this much text; default: all of it")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16")] = "fp32",
    pseudo_perplexity: Annotated[int, typer.Option(help="masked: over this many sentences; 0 for none")] = 100,
    tokenizer: Tokenizer = None,
    device: Device = None,
    trust_remote_code: TrustCode = False,
    output: Annotated[Path | None, typer.Option(help="write the scores as JSON here")] = None,
) -> None:
    """Score any Hugging Face model on text: bits per byte, masked accuracy, or BLEU of outputs for pairs."""
    from pretrain.evaluate import evaluate_model, show_scores

    scores = evaluate_model(
        model,
        data,
        kind=kind,
        text_field=_fields(text_field),
        document=document,
        context=context,
        stride=stride,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        bleu_tokenizer=bleu_tokenizer,
        max_bytes=max_bytes,
        precision=precision,
        pseudo_perplexity=pseudo_perplexity,
        tokenizer=tokenizer,
        device=device,
        trust_remote_code=trust_remote_code,
        out=output,
        console=_console(),
    )
    show_scores(scores, Console(soft_wrap=True))


def _fields(text_field: str) -> str | tuple[str, str]:
    source, comma, target = text_field.partition(",")
    return (source, target) if comma else text_field


@app.command()
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(help="the text to go on from, or the input of an encoder-decoder")],
    max_new_tokens: Annotated[int | None, typer.Option(help="tokens to add at most; default: what fits")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token; default: 0.8, of an encoder-decoder 0")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="sample from the k likeliest")] = None,
    top_p: Annotated[float | None, typer.Option(help="sample from the likeliest that hold this much")] = None,
    num_beams: Annotated[int | None, typer.Option(help="keep so many outputs on the way to the likeliest")] = None,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    tokenizer: Tokenizer = None,
    device: Device = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Continue a text with any causal model, or answer it with any encoder-decoder."""
    from pretrain.generate import generate_text

    text = generate_text(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_beams=num_beams,
        seed=seed,
        tokenizer=tokenizer,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    sys.stdout.write(text + "\n")


@app.command()
def fill(
    model: ModelName,
    text: Annotated[str, typer.Argument(help="a text with one or more [MASK]")],
    top_k: Annotated[int, typer.Option(help="candidates for each mask")] = 5,
    tokenizer: Tokenizer = None,
    device: Device = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Fill the masks of a text with any masked model."""
    from pretrain.fill import fill_masks, show_candidates

    filled = fill_masks(
        model, text, top_k=top_k, tokenizer=tokenizer, device=device, trust_remote_code=trust_remote_code
    )
    show_candidates(filled, Console(soft_wrap=True))


@app.command()
def attention(
    model: ModelName,
    text: Annotated[str, typer.Argument(help="what it reads")],
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("attention.html"),
    target: Annotated[str | None, typer.Option(help="an encoder-decoder's output; default: what it generates")] = None,
    tokenizer: Tokenizer = None,
    device: Device = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Write a page that shows where a model looks: a map of every head, rollout, head importance."""
    from pretrain.attention import write_attention

    path = write_attention(
        model,
        text,
        out,
        target=target,
        tokenizer=tokenizer,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    _console().print(f"wrote {path}", highlight=False)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="a run directory, a checkpoint, or a model directory")],
    out: Annotated[Path, typer.Argument(help="the directory to make")],
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    max_shard_bytes: Annotated[
        int, typer.Option(help="larger models are split over files of this size")
    ] = 5_000_000_000,
    code: Annotated[bool, typer.Option("--code", help="our own form with its code, which holds any shape")] = False,
) -> None:
    """Write a model for publishing, and prove that stock transformers computes the same logits."""
    from pretrain.export import export_model

    proof = export_model(checkpoint, out, dtype=dtype, max_shard_bytes=max_shard_bytes, code=code)
    _console().print(proof.describe())


@app.command(name="import")
def import_(
    model: ModelDirectory,
    out: Annotated[Path, typer.Argument(help="the directory to make")],
) -> None:
    """Turn a stock directory of a design that we hold into a Loom one, and prove that the logits are equal."""
    from pretrain.export import import_model

    _console().print(import_model(model, out).describe())


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option(help="write it here instead of printing it")] = None,
) -> None:
    """The JSON schema of a run configuration, for editors."""
    text = json.dumps(json_schema(), indent=2) + "\n"
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
        told = getattr(error, "told_elsewhere", False) and _rank() != 0
        console = Console(stderr=True, soft_wrap=True, quiet=told)
        console.print("error:", style="bold red", end=" ")
        console.print(str(error), markup=False, highlight=False)
        _end(1 if isinstance(error, ConnectionError) else 2)
