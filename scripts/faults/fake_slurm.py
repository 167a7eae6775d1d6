"""Programs that stand in for Slurm's `srun` and `scontrol`: they start tasks here, and write down what was asked.

What lives here: as much of Slurm as `scripts/launch/slurm.sh` uses. What must not: pretrain.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

_SRUN = """#!{python}
import os, signal, subprocess, sys
words = sys.argv[1:]
while words and words[0].startswith("--"):
    words.pop(0)
tasks = int(os.environ["SLURM_NTASKS"])
nodes = int(os.environ["SLURM_NNODES"])
running = []
# A signal that comes while tasks are started reaches all of them, as Slurm's does.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
for number in range(tasks):
    own = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number % (tasks // nodes))}
    start = lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGTERM})
    running.append(subprocess.Popen(words, env={**os.environ, **own}, preexec_fn=start))
def forward(number, frame):
    for task in running:
        task.send_signal(number)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, forward)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGTERM})
codes = [task.wait() for task in running]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
_SCONTROL = """#!/bin/sh
echo "$@" >> "{place}/scontrol.log"
if [ "$1" = show ]; then
    echo 127.0.0.1
fi
"""


def install(place: Path, *, tasks: int, nodes: int = 1, job: int = 4242) -> Mapping[str, str]:
    """Write the programs into a folder; return the environment of a batch script there."""
    place.mkdir(parents=True, exist_ok=True)
    srun = _SRUN.replace("{python}", sys.executable)
    for name, text in {"srun": srun, "scontrol": _SCONTROL.format(place=place)}.items():
        path = place / name
        path.write_text(text, encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {
        "PATH": f"{place}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NTASKS": str(tasks),
        "SLURM_NNODES": str(nodes),
    }


def asked(place: Path) -> list[str]:
    """What `scontrol` was asked for, besides names of nodes."""
    log = place / "scontrol.log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return [line for line in lines if not line.startswith("show ")]
