"""Small programs that stand in for the processes of a training, and what starts them.

What lives here: the beginning of every such program. What must not: checks.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pretrain.launching.processes import Bounds, Ending, Job, Signals, free_port

BEGINNING = """
import os, signal, sys, time
from pathlib import Path
from pretrain.heartbeat import Heartbeat
rank, place = int(os.environ["RANK"]), Path(os.environ["PLACE"])
heart = Heartbeat.from_environment(rank)

def starts():
    "How many times this rank was started, this one included."
    with (place / f"starts-{rank}").open("a") as file:
        file.write("x")
    return (place / f"starts-{rank}").stat().st_size

def steps(last, seconds=0.02, first=0):
    for step in range(first, last):
        heart.beat(step, "step")
        time.sleep(seconds)

def all_here(name):
    "Wait until every rank has come here."
    (place / f"{name}-{rank}").touch()
    while len(list(place.glob(f"{name}-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
"""
QUICK = Bounds(grace=0.3, terminate=0.3, save=1.5)


def command(program: str) -> list[str]:
    """What a rank runs."""
    return [sys.executable, "-c", BEGINNING + program]


def job(folder: Path, program: str, *, processes: int = 2) -> Job:
    """A job of such programs."""
    (folder / "beats").mkdir(exist_ok=True)
    return Job(command(program), processes, folder / "logs", folder / "beats", free_port())


def run(folder: Path, program: str, *, processes: int = 2, bounds: Bounds = QUICK) -> Ending:
    """Run a job to its end."""
    made = job(folder, program, processes=processes)
    with Signals() as signals:
        made.start()
        try:
            return made.wait(signals, bounds)
        finally:
            made.kill()
