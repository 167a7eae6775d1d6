"""The verb `prepare`: text and a tokenizer in, token shards with train and validation splits out.

What lives here: the work on parts, who does it, how far it is, and the artifact at the end. What must not: how text
is read, cut or packed (`pretrain.data`). This is the door to datatrove: its executor runs our reader and our writer.

Each part is written whole or not at all, and marked when it is finished. A preparation that was stopped goes on with
the parts that are not, whatever the number of workers; the shards' bytes depend on the text and the configuration
alone. Unfinished work lies in `<out>/<name>/data.unfinished`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import types
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datatrove.data import Document as PipelineDocument
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger as datatrove_logger
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
from tokenizers import Tokenizer

from pretrain.config import RunConfig
from pretrain.data.documents import ReadReport, read_documents
from pretrain.data.loader import LoadedSplit, layout_of
from pretrain.data.parts import Part, Piece, Plan, input_files, make_plan
from pretrain.data.shards import ShardWriter
from pretrain.data.sources import SourceFile, first_files
from pretrain.data.unfinished import (
    NAMED_PROBLEMS,
    finish,
    is_finished,
    marker,
    open_progress,
    start_or_go_on,
    start_progress,
)
from pretrain.data.vocabulary import read_vocabulary
from pretrain.files import (
    ArtifactError,
    Manifest,
    read_manifest,
    replace_file,
    sync_directory,
    verify_manifest,
)

Report = Callable[[int, int], None]
"""Called with (done, total) while parts are worked on, in bytes of input (rows of Hub datasets)."""

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 8192


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
    keys = config.data.model_dump(mode="json", exclude={"sequence_length", "max_documents_per_row", "workers"})
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


@lru_cache(maxsize=1)
def _read_plan(path: str, digest: str) -> Plan:
    return Plan.from_json(json.loads(Path(path).read_text(encoding="utf-8")))


@lru_cache(maxsize=1)
def _load_tokenizer(directory: str, digest: str) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A text that spells a special token gets the ids of its characters, not the special id.
    tokenizer.encode_special_tokens = True
    return tokenizer


# --- the pipeline of a part -----------------------------------------------------------------------------------------


class _PartStep(PipelineStep):  # type: ignore[misc]
    """A step that finds its part in the plan on the disk: rank r works on part r. Small, as it travels to workers."""

    def __init__(self, work: Path, plan: Plan) -> None:
        super().__init__()
        self.work, self.digest = str(work), plan.digest

    def plan_and_part(self, rank: int) -> tuple[Plan, Part]:
        plan = _read_plan(str(Path(self.work) / "plan.json"), self.digest)
        return plan, plan.parts[rank]


class ReadPart(_PartStep):
    """Yields the documents of a part, each with the split it goes to and its file."""

    name = "read"
    type = "reader"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[PipelineDocument]:
        """Read the part's pieces in order."""
        plan, part = self.plan_and_part(rank)
        progress = open_progress(Path(self.work))
        done = size = 0
        for piece in part.pieces:
            if plan.max_bytes is not None and size >= plan.max_bytes:
                break
            file = plan.files[piece.file]
            read = ReadReport()
            split_of = plan.split_of(part, piece)
            documents = read_documents(
                file,
                document=plan.document,
                text_field=plan.text_field,
                byte_range=piece.byte_range,
                report=read,
                max_bytes=None if plan.max_bytes is None else plan.max_bytes - size,
            )
            for whole in documents:
                for split, document in split_of(whole):
                    metadata = {"split": split, "file": piece.file}
                    yield PipelineDocument(document.text, f"{file.name}:{document.position}", metadata=metadata)
                progress[rank] = done + read.consumed
                size += len(whole.text.encode()) if plan.max_bytes is not None else 0
            done += _weight(plan, piece)
            progress[rank] = done
            yield PipelineDocument("", "", metadata={"read": read, "file": piece.file})


def _weight(plan: Plan, piece: Piece) -> int:
    if piece.byte_range is not None:
        return piece.byte_range[1] - piece.byte_range[0]
    size = plan.files[piece.file].bytes
    return size if plan.max_bytes is None else min(size, plan.max_bytes)


class WriteShards(_PartStep):
    """Encodes documents in batches, without special tokens, and writes one shard a split; then marks the part."""

    name = "tokenise and write"
    type = "writer"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[PipelineDocument]:
        """Write the part, and mark it as finished. Yields nothing."""
        plan, part = self.plan_and_part(rank)
        tokenizer = _load_tokenizer(plan.tokenizer, plan.tokenizer_digest)
        work = Path(self.work)
        counts = _Counts(plan)
        writers: dict[str, ShardWriter] = {}
        with ExitStack() as stack:
            for batch in _batches(data, counts):
                for split, encoded in _encode(tokenizer, batch, counts).items():
                    if split not in writers:
                        name = f"{split}/part-{part.number:05d}"
                        writer = ShardWriter(work / "data" / name, name, plan.vocab_size)
                        writers[split] = stack.enter_context(writer)
                    ids = np.frombuffer(encoded.ids, dtype=np.uint32)
                    writers[split].add(ids, np.array(encoded.lengths, dtype=np.int64), encoded.bytes)
        shards = [asdict(writer.facts()) for writer in writers.values()]
        mark = {"shards": shards, "files": counts.files, "bad": counts.named}
        replace_file(marker(work, part), json.dumps(mark).encode())
        yield from ()


@dataclass
class _Encoded:
    """Documents of a split: their ids one after another, how many each has, and their UTF-8 bytes."""

    ids: array[int] = field(default_factory=lambda: array("I"))
    lengths: list[int] = field(default_factory=list)
    bytes: int = 0


def _encode(tokenizer: Tokenizer, batch: list[PipelineDocument], counts: _Counts) -> dict[str, _Encoded]:
    encodings = tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
    splits: dict[str, _Encoded] = {}
    for document, encoding in zip(batch, encodings, strict=True):
        split, ids = document.metadata["split"], encoding.ids
        text = document.text
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
        encoded = splits.setdefault(split, _Encoded())
        encoded.ids.fromlist(ids)
        encoded.lengths.append(len(ids))
        encoded.bytes += size
        counts.add(document.metadata["file"], split, len(ids), size)
    return splits


class _Counts:
    """Documents, tokens, bytes, and what was bad, by file of a part."""

    def __init__(self, plan: Plan) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self.named: list[str] = []
        self._plan = plan

    def _of(self, file: int) -> dict[str, Any]:
        return self.files.setdefault(self._plan.files[file].name, {"bad": 0, "empty": 0, "splits": {}})

    def add(self, file: int, split: str, tokens: int, size: int) -> None:
        counts = self._of(file)["splits"].setdefault(split, {"documents": 0, "tokens": 0, "bytes": 0})
        counts["documents"] += 1
        counts["tokens"] += tokens
        counts["bytes"] += size

    def note(self, file: int, read: ReadReport) -> None:
        counts = self._of(file)
        counts["bad"] += read.bad
        counts["empty"] += read.empty
        self.named.extend(read.named[: NAMED_PROBLEMS - len(self.named)])


def _batches(documents: Iterator[PipelineDocument], counts: _Counts) -> Iterator[list[PipelineDocument]]:
    """Documents in lists that keep the tokenizer's threads busy; the reports between them go to `counts`."""
    batch: list[PipelineDocument] = []
    size = 0
    for document in documents:
        if "read" in document.metadata:
            counts.note(document.metadata["file"], document.metadata["read"])
            continue
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --- workers --------------------------------------------------------------------------------------------------------


class _Executor(LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's local executor, quiet, with the cores shared out between processes and the tokenizer's threads."""

    def __init__(self, work: Path, plan: Plan, finished: list[int], cores: int) -> None:
        steps = [ReadPart(work, plan), WriteShards(work, plan)]
        processes = min(cores, len(plan.parts) - len(finished))
        super().__init__(steps, tasks=len(plan.parts), workers=processes, logging_dir=str(work / "logs"))
        self.threads = cores // processes
        for number in finished:  # by our own marks and digests; what datatrove noted of an earlier run was removed
            self.mark_rank_as_completed(number)

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        datatrove_logger.disable("datatrove")
        with _environment(
            TOKENIZERS_PARALLELISM="true" if self.threads > 1 else "false", RAYON_NUM_THREADS=str(self.threads)
        ):
            return super()._run_for_rank(rank, local_rank, node_rank)


def _work_on(
    work: Path, plan: Plan, finished: list[int], cores: int, console: Console | None, report: Report | None
) -> None:
    """Run the unfinished parts and show how far they are."""
    progress = start_progress(work, plan, set(finished))
    total = sum(part.weight for part in plan.parts)
    shutil.rmtree(work / "logs", ignore_errors=True)
    executor = _Executor(work, plan, finished, cores)
    with _shown(progress, total, console, report), _without_main_module():
        datatrove_logger.disable("datatrove")
        try:
            executor.run()
        finally:
            datatrove_logger.enable("datatrove")


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Hide the main module while workers start: they import this file, and must not run the caller's script again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


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
