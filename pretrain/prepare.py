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
from pretrain.data.batches import LoadedSplit, layout_of
from pretrain.data.executors import run_parts
from pretrain.data.parts import Plan, input_files, make_plan
from pretrain.data.sources import SourceFile, first_files
from pretrain.data.unfinished import (
    finish,
    is_finished,
    start_or_go_on,
    start_progress,
)
from pretrain.data.vocabulary import read_vocabulary
from pretrain.files import (
    ArtifactError,
    Manifest,
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
    "verify",
    "workers",
}
"""Keys of the data section that do not decide the shards; the weights of sources do not either."""


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
        ValueError: when the text cannot be read as configured, or a split would be empty; names the key.
    """
    directory, work = config.directory / "data", config.directory / "data.unfinished"
    if is_prepared(config, max_bytes=max_bytes, console=console):
        return directory
    if directory.exists():
        raise ArtifactError(
            f"`{directory}` holds data of another configuration, text or tokenizer; give another name=, or remove it"
        )
    tokenizer = config.directory / "tokenizer"
    manifest = read_manifest(tokenizer, "tokenizer")
    verify_manifest(tokenizer, manifest)
    vocabulary = read_vocabulary(tokenizer)
    files = input_files(config.data)
    seen = _seen(files)
    with _hashing(files, max_bytes, console) as told:
        plan = make_plan(
            config.data,
            files,
            tokenizer=str(tokenizer),
            tokenizer_digest=manifest.digest,
            vocab_size=vocabulary.vocab_size,
            max_bytes=max_bytes,
            told=told,
        )
    start_or_go_on(work, plan)
    finished = [number for number, part in enumerate(plan.parts) if is_finished(work, part)]
    if len(finished) < len(plan.parts):
        _work_on(work, plan, finished, _workers(config), console, report)
    made = finish(work, plan, vocabulary, config=_config_of(config, max_bytes), seen=seen)
    (work / "data").rename(directory)
    sync_directory(directory.parent)
    shutil.rmtree(work)
    _summarise(config, made, console)
    return directory


def is_prepared(config: RunConfig, *, max_bytes: int | None = None, console: Console | None = None) -> bool:
    """Whether the run's data is there and was made from this configuration, this text and this tokenizer.

    Files whose size and time are as they were are taken as unchanged; others are read again, and `console` shows it.
    """
    try:
        made = read_manifest(config.directory / "data", "data")
        tokenizer = read_manifest(config.directory / "tokenizer", "tokenizer").digest
    except ArtifactError:
        return False
    if made.config != _config_of(config, max_bytes) or made.inputs.get("tokenizer") != tokenizer:
        return False
    files = input_files(config.data)
    if made.facts["inputs_seen"] == _seen(files):
        return True
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
    return made.inputs == {**plan.inputs(), "tokenizer": tokenizer}


def _config_of(config: RunConfig, max_bytes: int | None) -> dict[str, Any]:
    """The keys that decide the shards, as JSON would give them back."""
    keys = config.data.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    for source in keys["train"]:
        if isinstance(source, dict):
            del source["weight"], source["max_epochs"]
    plain: dict[str, Any] = json.loads(json.dumps({**keys, "max_bytes": max_bytes}))
    return plain


def _seen(splits: Mapping[str, list[SourceFile]]) -> dict[str, str]:
    """Size and time of every input file."""
    seen = {}
    for file in chain.from_iterable(splits.values()):
        if file.format != "hub":
            status = os.stat(file.path)
            seen[file.name] = f"{status.st_size} {status.st_mtime_ns}"
    return seen


def _workers(config: RunConfig) -> int:
    """Cores to use."""
    if config.data.workers == "auto":
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.data.workers


# --- work and progress ----------------------------------------------------------------------------------------------


def _work_on(
    work: Path, plan: Plan, finished: list[int], cores: int, console: Console | None, report: Report | None
) -> None:
    """Run the unfinished parts and show how far they are."""
    progress = start_progress(work, plan, set(finished))
    total = sum(part.weight for part in plan.parts)
    shutil.rmtree(work / "logs", ignore_errors=True)
    with _shown(progress, total, console, report):
        run_parts(work, plan, finished, cores)


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
    progress: npt.NDArray[np.int64], total: int, console: Console | None, report: Report | None
) -> Iterator[None]:
    """Tell a bar and `report` how far the work is, a few times a second, from a thread."""
    stop = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=console is None)
    task = bar.add_task("preparing", total=total)

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
        plan = LoadedSplit(
            config.directory / "data",
            split,
            config.kind or layout_of(config.objective),
            config.data.sequence_length,
            config.data.max_documents_per_row,
        ).plan
        if console is not None:
            console.print(
                f"{split}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, "
                f"{facts['bytes'] / max(1, facts['tokens']):.2f} bytes a token; {plan.num_rows:,} rows of "
                f"{config.data.sequence_length}, {plan.utilisation:.2%} used",
                highlight=False,
            )
    bad = made.facts["bad"]
    if console is not None and bad["count"]:
        console.print(f"skipped {bad['count']:,} bad lines or rows; the first: {bad['named'][0]}", highlight=False)
