"""Where the numbers of a run go: the console, `metrics.jsonl`, and experiment trackers.

What lives here: sinks for one dictionary of numbers a step, the progress bar, and the door to wandb, trackio and
tensorboard (through Accelerate's tracker classes). What must not: deciding what is measured; the trainer does that.

Non-finite numbers are written as they are (`NaN`), never as 0.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pretrain.config_types import redacted
from pretrain.files import replace_file

TRACKERS = ("wandb", "trackio", "tensorboard")
_SECONDS_BETWEEN_LINES = 15.0
_WANDB_WAITS = {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "120"}  # seconds; its own: 90, and no end
_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Something that takes the numbers of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` as they stand after `step` steps."""

    def close(self) -> None:
        """Flush and let go."""


class JsonLines:
    """`metrics.jsonl`: one JSON object a line, flushed line by line. On resume, what came after is cut off first."""

    def __init__(self, path: Path, *, first_step: int, scored: bool = True) -> None:
        """`scored` says that the evaluation of `first_step` is made: else its line, which a kill left, goes too."""
        self.path = path
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines() if first_step else []
            kept = [line for line in lines if _step_of(line) <= first_step]
            if not scored:
                kept = [line for line in kept if _step_of(line) < first_step or not _has_scores(line)]
            replace_file(path, "".join(f"{line}\n" for line in kept).encode())
        path.parent.mkdir(parents=True, exist_ok=True)
        # What a full disk refuses waits in the buffer and is written with the next line: room for some thousand lines.
        self._file = path.open("a", encoding="utf-8", buffering=1 << 20)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # lines that a full disk has refused to the end
            self._file.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):  # a line that was cut off by a kill
        return math.inf


def _has_scores(line: str) -> bool:
    """Whether it is the line of an evaluation: its keys are `name/score`."""
    return any("/" in key for key in json.loads(line))


class ConsoleProgress:
    """A progress bar with ETA on a terminal; elsewhere (a log file) a line every so often."""

    def __init__(self, console: Console, name: str, *, total: int, completed: int) -> None:
        self._console = console
        self._name = name
        self._total = total
        self._last_line = 0.0
        self._started, self._first = time.monotonic(), completed
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=total, completed=completed, numbers="")
        self._progress.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of a training step, or print a line for those of an evaluation."""
        if "loss" in values:
            numbers = f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tokens/s"
            self._progress.update(self._task, completed=step, numbers=numbers)
            now = time.monotonic()
            if not self._console.is_terminal and (
                now - self._last_line > _SECONDS_BETWEEN_LINES or step == self._total
            ):
                self._last_line = now
                seconds = (now - self._started) / max(1, step - self._first) * (self._total - step)
                self._console.print(
                    f"{self._name}: step {step:,} of {self._total:,}  {numbers}  ETA {seconds / 60:.1f} min",
                    highlight=False,
                )
        else:
            shown = "  ".join(f"{key} {value:.4f}" for key, value in values.items() if isinstance(value, float))
            self._console.print(f"{self._name}: at step {step:,}  {shown}", highlight=False)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._progress.stop()


class TrackerSink:
    """An experiment tracker. wandb resumes the same run by its id, and works offline when there is no account."""

    def __init__(self, kind: str, *, project: str, name: str, run_id: str, directory: Path, config: dict[str, Any]):
        if importlib.util.find_spec(kind) is None:
            raise ValueError(f"log.to: {kind} needs a package that is missing; pip install 'pretrain[{kind}]'")
        directory.mkdir(parents=True, exist_ok=True)
        if kind == "wandb":
            keywords: dict[str, Any] = {"id": run_id, "resume": "allow", "name": name, "dir": str(directory)}
            self._tracker = _start_wandb(project, keywords)
        elif kind == "trackio":
            self._tracker = LOGGER_TYPE_TO_CLASS["trackio"](project, name=f"{name}-{run_id}", resume="allow")
            self._tracker.start()
        else:
            self._tracker = LOGGER_TYPE_TO_CLASS["tensorboard"](name, logging_dir=str(directory / "tensorboard"))
            self._tracker.start()
        self._tracker.store_init_configuration(config if kind != "tensorboard" else _flat(config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        self._tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the tracker's run."""
        self._tracker.finish()


def _start_wandb(project: str, keywords: dict[str, Any]) -> Any:
    """A run of wandb; an offline one when there is no account, or its server does not answer."""
    for name, seconds in _WANDB_WAITS.items():
        os.environ.setdefault(name, seconds)
    offline = not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") or _has_wandb_login())
    tracker = LOGGER_TYPE_TO_CLASS["wandb"](project, **keywords | ({"mode": "offline"} if offline else {}))
    with _argv_without_secrets():
        try:
            tracker.start()
        except _tracker_errors() as error:
            reason = redacted(" ".join(str(error).split()))
            _log.warning("wandb cannot be reached (%s); this run is logged offline: `wandb sync` sends it", reason)
            sys.modules["wandb"].teardown()  # its service still holds the run that did not start
            tracker = LOGGER_TYPE_TO_CLASS["wandb"](project, **keywords, mode="offline")
            tracker.start()
    return tracker


@contextmanager
def _argv_without_secrets() -> Iterator[None]:
    """wandb records the command line; overrides in it may hold URLs with passwords."""
    before = sys.argv
    sys.argv = [redacted(word) for word in before]
    try:
        yield
    finally:
        sys.argv = before


def _tracker_errors() -> tuple[type[BaseException], ...]:
    """What a tracker can raise when its server or its disk fails."""
    foreign = getattr(sys.modules.get("wandb.errors"), "Error", None)
    return (OSError, *([foreign] if foreign is not None else []))


def _has_wandb_login() -> bool:
    netrc = Path.home() / ".netrc"
    return netrc.is_file() and "wandb.ai" in netrc.read_text(encoding="utf-8", errors="replace")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Dotted keys with scalar values, as tensorboard's hyper-parameters want them."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool) else json.dumps(value)
    return flat


class Metrics:
    """All sinks of a run, as one. A context manager."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Give the numbers of a step to every sink."""
        for sink in self._sinks:
            with suppress(*_tracker_errors()):  # a full disk, or a tracker without network, must not end the training
                sink.write(step, values)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            with suppress(*_tracker_errors()):
                sink.close()


def open_metrics(
    destinations: tuple[str, ...],
    *,
    project: str,
    name: str,
    run_id: str,
    directory: Path,
    config: dict[str, Any],
    first_step: int,
    total_steps: int,
    console: Console,
    scored: bool = True,
) -> Metrics:
    """Open every sink that `log.to` names, for a run that starts or goes on at `first_step`, evaluated there or not.

    Raises:
        ValueError: when a tracker's package is missing; names the remedy.
    """
    sinks: list[Sink] = []
    for kind in destinations:
        if kind == "jsonl":
            sinks.append(JsonLines(directory / "metrics.jsonl", first_step=first_step, scored=scored))
        elif kind in TRACKERS:
            keywords: dict[str, Any] = {"project": project, "name": name, "run_id": run_id, "config": config}
            sinks.append(TrackerSink(kind, directory=directory, **keywords))
    if "console" in destinations:
        sinks.append(ConsoleProgress(console, name, total=total_steps, completed=first_step))
    return Metrics(sinks)
