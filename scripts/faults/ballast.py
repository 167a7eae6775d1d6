"""Evaluators that fill the disk under a run, so that its next save finds no room.

What lives here: callables for `evaluate.evaluators`, which are called right before a save. What must not: any check.
They are told what to do by the environment, since the run is a process of its own.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any


def fill(model: Any, context: Any) -> dict[str, float]:
    """At step BALLAST_FROM leave BALLAST_FREE bytes of the disk; from step BALLAST_UNTIL on leave it as it was.

    With BALLAST_SECONDS the room comes back by itself; with BALLAST_SIGNAL the process gets that signal besides.
    """
    place: Path = context.directory.parent / "ballast"
    if context.step == int(os.environ["BALLAST_FROM"]):
        _take(place, int(os.environ["BALLAST_FREE"]))
        if seconds := os.environ.get("BALLAST_SECONDS"):
            threading.Timer(float(seconds), place.unlink, kwargs={"missing_ok": True}).start()
        if name := os.environ.get("BALLAST_SIGNAL"):
            signal.raise_signal(signal.Signals[name])
    elif context.step >= int(os.environ["BALLAST_UNTIL"]):
        place.unlink(missing_ok=True)
    return {}


def _take(place: Path, leave: int) -> None:
    """Write zeros until `leave` bytes are free."""
    status = os.statvfs(place.parent)
    size = status.f_bavail * status.f_frsize - leave
    with place.open("wb") as file:
        file.write(bytes(max(0, size)))
