"""When a run was started, and on what: `starts.jsonl`, a line for every call that trains.

What lives here: that record. What must not: deciding anything by it; it is for people to read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE = "starts.jsonl"


def record_start(directory: Path, step: int, about: Mapping[str, Any]) -> None:
    """Append the step that training goes on from, the time (UTC), and what it runs on. A full disk stops nothing.

    Nothing is ever taken out: of two lines, the later one may go on from an earlier step, when what lay between was not
    saved.
    """
    when = datetime.now(UTC).isoformat(timespec="seconds")
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / FILE).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, "time": when, **about}) + "\n")
