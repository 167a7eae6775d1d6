"""A fault, what injecting it gave, and the injection: the one form in which every fault reports."""

from __future__ import annotations

import importlib
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """How often a fault was injected, how often the run came through as promised, and what it cost at worst."""

    tries: int
    survived: int
    lost: str
    note: str = ""


@dataclass(frozen=True)
class Fault:
    """A fault of the table: its row, what is done to the run, what must hold, and the function that does it.

    `inject` gets an empty folder. It raises nothing for a try that failed: that is a try not survived, and its first
    reason belongs into `note`. A fault that is `timed` promises something within seconds: no other one runs beside it.
    """

    row: str
    fault: str
    promise: str
    inject: Callable[[Path], Outcome]
    timed: bool = False


@dataclass(frozen=True)
class Line:
    """A fault, what came of it, and how long it took."""

    fault: Fault
    outcome: Outcome
    seconds: float


def inject_number(topic: str, number: int) -> tuple[Outcome, float]:
    """Outcome and seconds of a topic's fault; by its number, as its function need not travel to another process."""
    return inject(importlib.import_module(topic).FAULTS[number])


def inject(fault: Fault) -> tuple[Outcome, float]:
    """Run one fault in an empty folder, which is removed after; outcome and seconds."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fault-", ignore_cleanup_errors=True) as folder:
        try:
            outcome = fault.inject(Path(folder))
        except Exception as error:  # the table must name it, and the other rows must still run
            traceback.print_exc()
            outcome = Outcome(1, 0, "unknown", f"the injection failed: {type(error).__name__}: {error}")
    return outcome, time.perf_counter() - started
