"""strace on a command: every change that it makes to the disk counted; a kill, a signal or an error at any of them.

What lives here: attaching, injecting, and reading the log. What must not: which runs are injured, or what must hold.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from warm import Warm

CHANGES = (
    "write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,link,ftruncate"
)
"""Every system call that changes the disk; a file that was only created differs from nothing by its first write."""

_CALL = re.compile(r"(\d+) +(\w+)\((.*)")


def unavailable() -> str:
    """Why strace cannot be used here; empty when it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"strace is not permitted: {tried.stderr.strip()[:100]}"


@dataclass(frozen=True)
class Call:
    """A system call of the log: who made it, its name, its arguments and result as they were printed."""

    pid: int
    name: str
    text: str


def traced(
    warm: Warm, arguments: Sequence[str], folder: Path, *, inject: str = "", calls: str = CHANGES, paths: bool = False
) -> tuple[int, int, list[Call], str]:
    """Run a warm command under strace; returns its exit code, its process id, the log, and what it said.

    Args:
        warm: forks the command.
        arguments: of `pretrain`.
        folder: where the log may lie.
        inject: as strace's `-e inject=` takes it, such as `fsync:signal=SIGKILL:when=3`.
        calls: what to trace.
        paths: print the path behind each file descriptor.
    """
    log, said = folder / "strace.log", folder / "said.log"
    pid = warm.start(arguments, said, held=True)
    command = ["strace", "-f", "-p", str(pid), "-o", str(log), "-e", f"trace={calls}", "-e", "signal=none"]
    command += ["-y"] if paths else []
    command += ["-e", f"inject={inject}"] if inject else []
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    attached = tracer.stderr.readline()
    assert "attached" in attached, attached
    warm.let_go(pid)
    code = warm.wait(pid)
    tracer.communicate()
    text = log.read_text(encoding="utf-8", errors="replace")
    found = [Call(int(match[1]), match[2], match[3]) for match in map(_CALL.match, text.splitlines()) if match]
    return code, pid, found, said.read_text(encoding="utf-8", errors="replace")


def points(calls: Sequence[Call], pid: int, *, threads: bool = False) -> list[tuple[str, int]]:
    """Every call that the main thread of a command made, as (name, how manieth of that name), or any of its threads.

    strace counts the calls of each thread apart: with `threads`, a point is reached by whichever gets there first.
    """
    seen: Counter[tuple[int, str]] = Counter()
    found = []
    for call in calls:
        if threads or call.pid == pid:
            seen[call.pid, call.name] += 1
            found.append((call.name, seen[call.pid, call.name]))
    return list(dict.fromkeys(found))
