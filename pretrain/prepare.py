"""The verb `prepare`: text and a tokenizer in, token shards with train and validation splits out.

What lives here: when there is work, how far it is, and the artifact at the end. What must not: how text is read, kept,
cut or packed, and by whom (`pretrain.data`).

Each part is written whole or not at all, and marked when it is finished. A preparation that was stopped goes on with
the parts that are not, whatever the number of workers; the shards' bytes depend on the text and the configuration
alone. Unfinished work lies in `<out>/<name>/data.unfinished`.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pretrain.config import RunConfig
from pretrain.config_data import Executor
from pretrain.data.batches import LoadedSplit
from pretrain.data.keeping.decontamination import evaluation_files
from pretrain.data.keeping.kept_out import describe
from pretrain.data.keeping.sieve import DECONTAMINATE, check_steps, inputs_of, with_steps
from pretrain.data.objectives import evaluation_objective
from pretrain.data.preparing.executors import check_executor, run_parts
from pretrain.data.preparing.parts import Plan, input_files, is_training, make_plan
from pretrain.data.preparing.passes import Pass, finished_parts, make_ready, passes_of
from pretrain.data.preparing.shared import is_unchanged, take_data
from pretrain.data.preparing.unfinished import (
    finish,
    start_or_go_on,
    start_progress,
)
from pretrain.data.reading.problems import describe_problems
from pretrain.data.reading.sources import SourceFile, fetch_files, first_files, state_of
from pretrain.data.reading.token_files import refuse_text_steps
from pretrain.data.vocabulary import read_vocabulary
from pretrain.files import (
    ArtifactError,
    Manifest,
    owning_directory,
    read_manifest,
    sync_directory,
    verify_manifest,
)

Report = Callable[[int, int], None]
"""Called with (done, total) while parts are worked on, in bytes of input (rows of Hub datasets)."""

_WITHOUT_EFFECT = {
    "executor",
    "max_bad_share",
    "max_documents_per_row",
    "on_error",
    "phases",
    "sequence_length",
    "target_length",
    "verify",
    "workers",
}
"""Keys of the data section that do not decide the shards; the weights of sources do not either."""


@owning_directory
def prepare_data(
    config: RunConfig, *, max_bytes: int | None = None, console: Console | None = None, report: Report | None = None
) -> Path:
    """Turn the run's text into token shards under `<out>/<name>/data`; return that directory.

    What is there and unchanged is kept. What an earlier call left unfinished is gone on with.

    Args:
        config: the run configuration; `data` and the run's tokenizer decide the result.
        max_bytes: for trials: read about the first `max_bytes` of each split's text and no more of it, and hold out
            the end of every document.
        console: where progress and a summary are shown; None is silent.
        report: called with (done, total) besides.

    Raises:
        ArtifactError: when the tokenizer is missing or altered, or the directory holds data of another configuration.
        SubmittedError: when the work was handed to Slurm; the same call collects the result.
        ChildProcessError: when a worker was killed; names the part and the remedy.
        ValueError: when the text cannot be read as configured, or a split would be empty; names the key.
    """
    directory, work = config.directory / "data", config.directory / "data.unfinished"
    if is_prepared(config, max_bytes=max_bytes, console=console):
        return directory
    if directory.exists():
        raise ArtifactError(
            f"`{directory}` holds data of another configuration, text or tokenizer; give another name=, or remove it"
        )
    check_data(config)
    tokenizer = config.directory / "tokenizer"
    manifest = read_manifest(tokenizer, "tokenizer")
    verify_manifest(tokenizer, manifest)
    if config.data.from_ is not None:
        deciding = _config_of(config, max_bytes)
        made = take_data(config.data.from_, directory, tokenizer=manifest.digest, config=deciding, console=console)
        _summarise(config, made, console)
        return directory
    vocabulary = read_vocabulary(tokenizer)
    files = input_files(config.data, download=False)
    refuse_text_steps(config.data, chain.from_iterable(files.values()))
    _fetch(files, max_bytes, console)
    seen = _seen({**files, DECONTAMINATE: evaluation_files(config.data.decontamination)})
    with _hashing(files, max_bytes, console) as told:
        plan = make_plan(
            config.data,
            files,
            tokenizer=str(tokenizer),
            tokenizer_digest=manifest.digest,
            vocab_size=vocabulary.vocab_size,
            max_bytes=max_bytes,
            marks=config.objective.needs_marks,
            told=told,
        )
        plan = with_steps(plan, config.data, told)
    start_or_go_on(work, plan)
    for one in passes_of(plan):
        make_ready(work, plan, one, evaluation_files(config.data.decontamination))
        finished = finished_parts(work, plan, one)
        if len(finished) < len(plan.parts):
            _work_on(work, plan, one, finished, config, console, report)
    made = finish(work, plan, vocabulary, config=_config_of(config, max_bytes), seen=seen)
    (work / "data").rename(directory)
    sync_directory(directory.parent)
    shutil.rmtree(work)
    _summarise(config, made, console)
    return directory


def check_data(config: RunConfig) -> None:
    """Refuse what cannot work before anything is made: filters, evaluation files, the executor and its options.

    Raises:
        ValueError: names the key.
    """
    check_steps(config.data)
    check_executor(_executor(config))


def _executor(config: RunConfig) -> Executor:
    wanted = config.data.executor
    return Executor(kind=wanted) if isinstance(wanted, str) else wanted


def is_prepared(config: RunConfig, *, max_bytes: int | None = None, console: Console | None = None) -> bool:
    """Whether the run's data is there and was made from this configuration, this text and this tokenizer.

    Files whose size and time are as they were are taken as unchanged; others are read again, and `console` shows it.
    """
    try:
        made = read_manifest(config.directory / "data", "data")
        tokenizer = read_manifest(config.directory / "tokenizer", "tokenizer").digest
    except ArtifactError:
        return False
    wanted = _config_of(config, max_bytes)
    kept = {"marks": True} if "marks" in made.config else {}  # that the shards say more than is asked does no harm
    if made.config != wanted | kept or made.inputs.get("tokenizer") != tokenizer:
        return False
    if config.data.from_ is not None:
        return is_unchanged(config.data.from_, made.inputs["from"])
    files = input_files(config.data, download=False)
    if made.facts["inputs_seen"] == _seen({**files, DECONTAMINATE: evaluation_files(config.data.decontamination)}):
        return True
    _fetch(files, max_bytes, console)
    with _hashing(files, max_bytes, console) as told:
        plan = make_plan(
            config.data,
            files,
            tokenizer="",
            tokenizer_digest=tokenizer,
            vocab_size=0,
            max_bytes=max_bytes,
            told=told,
        )
        plan = with_steps(plan, config.data, told)
    return made.inputs == {**inputs_of(plan), "tokenizer": tokenizer}


def _config_of(config: RunConfig, max_bytes: int | None) -> dict[str, Any]:
    """The keys that decide the shards, as JSON would give them back."""
    keys = config.data.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    keys["train"] = config.data.text_sources
    for name, whole in (("dedup", config.data.deduplication), ("decontaminate", config.data.decontamination)):
        keys[name] = whole.model_dump(mode="json") if whole is not None else None  # its short form is the same
    marks = {"marks": True} if config.objective.needs_marks and config.data.from_ is None else {}
    plain: dict[str, Any] = json.loads(json.dumps({**keys, "max_bytes": max_bytes, **marks}))
    return plain


def _seen(splits: Mapping[str, list[SourceFile]]) -> dict[str, str]:
    """Size and time of every input file, or what its server says of it."""
    return {file.name: state_of(file) for file in chain.from_iterable(splits.values()) if file.format != "hub"}


def _fetch(splits: Mapping[str, list[SourceFile]], max_bytes: int | None, console: Console | None) -> None:
    """Download the remote files that will be read."""
    for files in splits.values():
        fetch_files(files if max_bytes is None else first_files(files, max_bytes), console)


def _workers(config: RunConfig) -> int:
    """Cores to use."""
    if config.data.workers == "auto":
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.data.workers


# --- work and progress ----------------------------------------------------------------------------------------------


def _work_on(
    work: Path,
    plan: Plan,
    one: Pass,
    finished: list[int],
    config: RunConfig,
    console: Console | None,
    report: Report | None,
) -> None:
    """Run the unfinished parts of a pass and show how far they are.

    Raises:
        ChildProcessError: when parts are not finished after it.
    """
    progress = start_progress(work, plan, set(finished))
    total = sum(part.weight for part in plan.parts)
    with _shown(progress, total, console, report, one.title):
        executor = _executor(config) if plan.max_bytes is None else Executor(kind="local")  # a trial is done at once
        run_parts(work, plan, one, finished, _workers(config), executor)
    if left := set(range(len(plan.parts))) - set(finished_parts(work, plan, one, thorough=False)):
        first = plan.parts[min(left)].name
        raise ChildProcessError(
            f"{len(left)} of {len(plan.parts)} parts are not finished, the first is `{first}`; "
            f"see `{work / 'logs'}`, and run the same command again to go on"
        )


@contextmanager
def _hashing(
    splits: Mapping[str, list[SourceFile]], max_bytes: int | None, console: Console | None
) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes of input that are hashed; gives what to call with the number of them."""
    groups = [files if max_bytes is None else first_files(files, max_bytes) for files in splits.values()]
    sizes = [file.bytes if max_bytes is None else min(file.bytes, max_bytes) for file in chain.from_iterable(groups)]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    quiet = console is None or not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet, transient=True) as bar:
        task = bar.add_task("hashing the text", total=sum(sizes))
        yield lambda size: bar.advance(task, size)


@contextmanager
def _shown(
    progress: npt.NDArray[np.int64], total: int, console: Console | None, report: Report | None, title: str
) -> Iterator[None]:
    """Tell a bar and `report` how far the work is, a few times a second, from a thread."""
    stop = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=console is None)
    task = bar.add_task(title, total=total)

    def show() -> None:
        while True:
            last = stop.wait(0.2)
            done = min(int(progress.sum()), total)
            bar.update(task, completed=done)
            if report is not None:
                report(done, total)
            if last:
                return

    thread = threading.Thread(target=show, name="progress", daemon=True)
    with bar:
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _summarise(config: RunConfig, made: Manifest, console: Console | None) -> None:
    """Plan the rows of the run's own length now, so that training starts at once, and show what came out."""
    for split, facts in made.facts["splits"].items():
        objective = config.objective if is_training(split) else evaluation_objective(config.objective)
        plan = LoadedSplit.of(config, split, objective=objective).plan
        if console is not None:
            ratio = f", {facts['bytes'] / facts['tokens']:.2f} bytes a token" if facts["bytes"] else ""
            console.print(
                f"{split}: {facts['documents']:,} documents, {facts['tokens']:,} tokens{ratio}; {plan.num_rows:,} rows "
                f"of {config.data.sequence_length}, {plan.utilisation:.2%} used"
                + (f"; {plan.left_out:,} pairs are too long for a row, and left out" if plan.left_out else ""),
                highlight=False,
            )
    if console is not None:
        for step in made.facts["kept_out"]:
            console.print(describe(step), highlight=False)
    bad = made.facts["bad"]
    if console is not None and bad["count"]:
        console.print(describe_problems(bad), highlight=False, markup=False)
