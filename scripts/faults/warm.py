"""A `pretrain` command without the seconds of importing torch: a process that has it all imported, and forks.

What lives here: the server, its client, and holding a forked command still until somebody has attached to it. What must
not: any fault. Each command is a process of its own with the whole of `pretrain.cli.main` still before it, so whatever
is done to it is done to what a user runs, from the first line of the command on.

    with Warm() as warm:
        ended = warm.execute(["train", str(run.config)])          # as `pretrain train CONFIG`
        pid = warm.start(["train", str(run.config)], log, held=True)
        ...                                                       # attach strace to `pid`
        warm.let_go(pid)
        code = warm.wait(pid)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tiny


class Warm:
    """The client: one request at a time. A context manager."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **tiny.ENVIRONMENT},
        )
        self._gates: dict[int, Path] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self._count = 0
        self._ask()  # says when it is ready

    def start(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        held: bool = False,
        recorded: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Fork a command; what it says goes into `log`. One that is held does nothing until `let_go`."""
        self._count += 1
        gate = Path(self._folder.name) / f"gate-{self._count}"
        if held:
            os.mkfifo(gate)
        request = {
            "start": list(arguments),
            "log": str(log),
            "gate": str(gate) if held else None,
            "record": recorded,
            "environment": dict(environment or {}),
        }
        pid = int(self._ask(request))
        self._gates[pid] = gate
        return pid

    def let_go(self, pid: int) -> None:
        """Let a held command run."""
        self._gates[pid].write_bytes(b"!")

    def wait(self, pid: int, *, timeout: float = 120.0) -> int:
        """Its exit code; negative: the signal that ended it. After `timeout` seconds it is killed."""
        return int(self._ask({"wait": pid, "timeout": timeout}))

    def execute(
        self, arguments: Sequence[str], *, recorded: bool = True, environment: Mapping[str, str] | None = None
    ) -> tiny.Ended:
        """Run a command to its end."""
        started = time.perf_counter()
        log = Path(self._folder.name) / "log"
        code = self.wait(self.start(arguments, log, recorded=recorded, environment=environment))
        return tiny.Ended(code, log.read_text(encoding="utf-8", errors="replace"), time.perf_counter() - started)

    def _ask(self, request: dict[str, Any] | None = None) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        if request is not None:
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
        line = self._server.stdout.readline()
        assert line, "the warm server ended"
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
        self._folder.cleanup()


def serve() -> None:
    """Answer requests on standard input until it is closed."""
    import pretrain.cli
    import pretrain.train  # noqa: F401 (this is what takes the seconds)

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer: Any = "ready"
    while True:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        answer = _fork(request) if "start" in request else _wait(request["wait"], request["timeout"])


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if request["gate"]:
            gate = os.open(request["gate"], os.O_RDONLY)
            os.read(gate, 1)
            os.close(gate)
        os.environ.update(request["environment"])
        code = _command(request["start"], record=request["record"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _command(arguments: list[str], *, record: bool) -> int:
    from pretrain.cli import main

    sys.argv = ["pretrain", *arguments]
    if record:
        tiny.record_rows()
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # as the interpreter would show it
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


def _wait(pid: int, timeout: float) -> int:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return -1000


if __name__ == "__main__":
    serve()
