"""What an injected fault gave: the one form in which every fault reports."""

from __future__ import annotations

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
    reason belongs into `note`.
    """

    row: str
    fault: str
    promise: str
    inject: Callable[[Path], Outcome]
