"""Runs that are interrupted at a chosen place: the `pretrain` command in a forked child that sends itself a signal.

What lives here: the places, the child, and going on until a run is done. What must not: assertions, or what a run is
(`scripts/faults/tiny.py`).

A fork server imports everything once, so that a try costs a fraction of a second instead of the start of a process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from scripts.faults.tiny import ENVIRONMENT, Ended, Run, record_rows

STOPPED = 75
PRELOADED = ["scripts.faults.tiny", "tests.interrupted", "pretrain.cli", "pretrain.train", "torch", "transformers"]


@dataclass(frozen=True)
class Trap:
    """Where a run signals itself.

    Attributes:
        place: `micro` (before a micro-batch, counted in this process), `step` (after that step's update), `save`
            (between the model and the optimizer of that save of this process), `evaluation` (at the start of that
            evaluation of this process), `build` (before the model is built), `measure` (while the time of a step is
            measured), `load` (while the checkpoint's weights are read), or `start` (before the command).
        number: which one, from 1.
        signal: what is sent.
        delay: seconds from that place to the signal.
    """

    place: str
    number: int = 1
    signal: signal.Signals = signal.SIGTERM
    delay: float = 0.0

    def __str__(self) -> str:
        return f"{self.signal.name} in {self.place} {self.number}" + (f" + {self.delay:.3f} s" if self.delay else "")


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # no effect where the server runs already, as under tests/conftest.py
    return context


def train(
    run: Run, trap: Trap | None = None, *options: str, verb: str = "train", timeout: float = 120, hook: str = ""
) -> Ended:
    """`pretrain train` (or another verb) on the run, in a child of its own; what it said, and how it ended.

    The seconds are counted from the signal, where one was sent.

    Args:
        run: what is trained.
        trap: where it is interrupted; None for not at all.
        options: overrides and options of the command line.
        verb: the command.
        timeout: seconds; a child that takes longer is killed, with code -9.
        hook: `module:function`, called in the child before the command.
    """
    process, log, started = start(run, trap, *options, verb=verb, hook=hook)
    process.join(timeout)
    ended = time.time()
    if process.is_alive():
        process.kill()
        process.join()
        return Ended(-9, log.read_text(errors="replace") + f"\n(hung: killed after {timeout:.0f} s)", timeout)
    assert process.exitcode is not None
    fired = _fired(log)
    said = fired.read_text() if fired.is_file() else ""  # empty: the child ended between making and writing it
    since = float(said) if said else started
    return Ended(process.exitcode, log.read_text(errors="replace"), ended - since)


def start(
    run: Run, trap: Trap | None, *options: str, verb: str = "train", hook: str = ""
) -> tuple[ForkServerProcess, Path, float]:
    """The child, the file of what it says, and when it started."""
    os.environ.update(ENVIRONMENT)
    log = run.directory.parent / f"{run.directory.name}.log"
    log.write_text("")
    _fired(log).unlink(missing_ok=True)
    process = _context().Process(target=_child, args=(str(run.config), str(log), verb, trap, tuple(options), hook))
    started = time.time()
    process.start()
    return process, log, started


def _fired(log: Path) -> Path:
    """The file that says when the signal was sent."""
    return log.with_suffix(".fired")


def finish(run: Run, *options: str, tries: int = 3) -> Ended:
    """The same command again until the run is done; fails after some tries."""
    ended = train(run, None, *options)
    while ended.code == STOPPED and tries > 1:
        ended, tries = train(run, None, *options), tries - 1
    return ended


def _child(config: str, log: str, verb: str, trap: Trap | None, options: Sequence[str], hook: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import importlib

    import torch

    from pretrain.cli import main

    torch.set_num_threads(1)
    record_rows()
    if hook:
        module, _, function = hook.partition(":")
        getattr(importlib.import_module(module), function)()
    if trap is not None:
        _set(trap, _fired(Path(log)))
    sys.argv = ["pretrain", verb, config, *options]
    main()


def _set(trap: Trap, fired: Path) -> None:
    """Replace what stands at the trap's place by the same with a signal before it (or in the middle of it)."""
    import pretrain.train as verb
    from pretrain.published_store import PublishedStore
    from pretrain.training.feed import MicroBatch
    from pretrain.training.trainer import Trainer

    def signal_itself() -> None:
        fired.write_text(str(time.time()))
        os.kill(os.getpid(), trap.signal)

    def fire() -> None:
        if not trap.delay:
            return signal_itself()
        timer = threading.Timer(trap.delay, signal_itself)
        timer.daemon = True
        timer.start()

    def counted(original: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
        calls = 0

        def replaced(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == trap.number and not after:
                fire()
            result = original(*arguments, **keywords)
            if calls == trap.number and after:
                fire()
            return result

        return replaced

    if trap.place == "start":
        fire()
    elif trap.place == "step":
        original = Trainer._step

        def step(self: Trainer, progress: Any, *rest: Any) -> Any:
            result = original(self, progress, *rest)
            if progress.step == trap.number:
                fire()
            return result

        Trainer._step = step  # type: ignore[method-assign]
    elif trap.place == "evaluation":
        verb.evaluate_batches = counted(verb.evaluate_batches)
    else:
        owner, name, after = {
            "micro": (MicroBatch, "tensors", False),
            "save": (PublishedStore, "write", True),
            "build": (verb, "build_model", False),
            "measure": (Trainer, "measure_step", False),
            "load": (PublishedStore, "read", False),
        }[trap.place]
        setattr(owner, name, counted(getattr(owner, name), after=after))
