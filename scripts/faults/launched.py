"""The `pretrain` command whose training processes injure themselves: `python scripts/faults/launched.py train CONFIG`.

What lives here: the command's program, and the injuries. What must not: what must hold after (`processes`).

The launcher starts this file again for each rank. There, FAULT in the environment says what to do: a JSON object with
`rank` (null: every rank), `step` (as the log counts), `kind`, `times` and `delay`. Each rank notes the moment of every
step in `moments-RANK.jsonl` of the run directory, and of every injury in `injuries.jsonl`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

FAULT = "FAULT"


class Injury:
    """What this process does to itself, and when."""

    def __init__(self, *, rank: int | None, step: int, kind: str, times: int = 1, delay: float = 0.0) -> None:
        self.mine = rank is None or rank == int(os.environ["RANK"])
        self.step = step
        self.kind = kind
        self.times = times
        self.delay = delay

    def at_step(self, step: int, directory: Path) -> None:
        """A signal, or an error, as a step begins or shortly after."""
        if self._due(step, directory) and self.kind.startswith("SIG"):
            self._note(directory)
            name, *again = self.kind.split()
            # At its moment the process is wherever it is: computing, waiting for the other, writing.
            for delay in (self.delay, *(self.delay + 0.01 for _ in again)):
                threading.Timer(delay, os.kill, [os.getpid(), signal.Signals[name]]).start()
        elif self._due(step, directory) and self.kind == "error":
            self._note(directory)
            raise RuntimeError("an error that was injected")

    def at_batch(self, step: int, directory: Path) -> None:
        """The thread that makes the batches dies, or never comes back."""
        if self.kind.startswith("loader") and self._due(step, directory):
            self._note(directory)
            if self.kind == "loader hangs":
                time.sleep(3600)
            raise RuntimeError("the loader died")

    def _due(self, step: int, directory: Path) -> bool:
        return self.mine and step == self.step and len(lines(directory / "injuries.jsonl")) < self.times

    def _note(self, directory: Path) -> None:
        note(directory / "injuries.jsonl", {"time": time.time() + self.delay, "rank": os.environ["RANK"]})


def note(path: Path, value: dict[str, Any]) -> None:
    """Append a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line; the last may have been cut."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        if line.endswith("}"):
            found.append(json.loads(line))
    return found


def injure() -> None:
    """Let this process note its steps, and do what FAULT says."""
    from pretrain.data.loader import DataPlane
    from pretrain.training.trainer import Trainer

    wish = json.loads(os.environ.get(FAULT) or "null")
    injury = Injury(**wish) if wish else None
    original, original_batch = Trainer._step, DataPlane.batch
    place: list[Path] = []

    def step(self: Trainer, progress: Any, micro_batches: Any, *rest: Any) -> Any:
        place[:] = [self.directory.parent]
        number = progress.step + 1
        if injury is not None:
            injury.at_step(number, place[0])
        result = original(self, progress, micro_batches, *rest)
        rows = [row for batch in micro_batches for row in batch.row_ids.tolist()]
        moment = {"step": number, "time": time.time(), "process": os.getpid(), "rows": rows}
        note(place[0] / f"moments-{os.environ['RANK']}.jsonl", moment)
        return result

    def batch(self: DataPlane, number: int, rows: slice | None = None) -> Any:
        if injury is not None and place and threading.current_thread() is not threading.main_thread():
            injury.at_batch(number + 1, place[0])
        return original_batch(self, number, rows)

    Trainer._step = step  # type: ignore[method-assign]
    DataPlane.batch = batch  # type: ignore[method-assign]


def start_this_file() -> None:
    """Let the launcher start this file for each rank, instead of the package."""
    import pretrain.launch

    original = pretrain.launch.train_command

    def command(*arguments: Any, **options: Any) -> list[str]:
        return [sys.executable, str(Path(__file__).resolve()), *original(*arguments, **options)[3:]]

    pretrain.launch.train_command = command


if __name__ == "__main__":
    from pretrain.cli import main

    if "RANK" in os.environ:
        injure()
    else:
        start_this_file()
    main()
