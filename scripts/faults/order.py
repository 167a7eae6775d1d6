"""What a power loss could undo, by the order of the system calls of a run.

What lives here: the rules, read off a log of strace. What must not: running anything.

A rename publishes. Before it, what it publishes must be on the disk: the bytes of every file, the entries of every
directory in it, and the directories above that were made on the way. After it, before the next name is changed, the
directory that got the new name must be flushed too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePath

from tracing import Call

_HANDLE = re.compile(r"\d+<([^>]*)>")
_NAME = re.compile(r'"((?:[^"\\]|\\.)*)"')
_CHANGES_A_NAME = ("rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir")


def violations(calls: Sequence[Call], directory: Path) -> tuple[int, list[str]]:
    """How many renames there were under `directory`, and what a power loss could have undone, in words."""
    unflushed: set[PurePath] = set()  # files with bytes, and directories with new entries, not on the disk yet
    holders: set[PurePath] = set()  # directories in which a directory was made
    waiting: set[PurePath] = set()  # directories that got a new name
    checked, broken = 0, []
    for call in calls:
        failed = re.search(r"= -1 E", call.text) is not None
        if failed or str(directory) not in call.text:
            continue
        if call.name in _CHANGES_A_NAME:
            broken += [f"{place} is not flushed before {call.name}({call.text[:80]}" for place in waiting]
            waiting.clear()
        names = [PurePath(name) for name in _NAME.findall(call.text)]
        handle = _HANDLE.search(call.text)
        if call.name in ("write", "pwrite64", "writev", "ftruncate") and handle is not None:
            unflushed.add(PurePath(handle[1]))
        elif call.name in ("fsync", "fdatasync") and handle is not None:
            for places in (unflushed, holders, waiting):
                places.discard(PurePath(handle[1]))
        elif call.name == "openat" and "O_CREAT" in call.text:
            unflushed.add(names[0].parent)
        elif call.name.startswith("mkdir"):
            unflushed.add(names[0].parent)
            holders.add(names[0].parent)
        elif call.name.startswith("rename"):
            source, target = names
            checked += 1
            inside = [place for place in unflushed if place == source or source in place.parents]
            above = [place for place in holders if place in target.parents and place != target.parent]
            broken += [f"{place} is not flushed before it is published as {target.name}" for place in inside + above]
            waiting.add(target.parent)
    broken += [f"{place} is not flushed at the end" for place in waiting]
    return checked, broken
