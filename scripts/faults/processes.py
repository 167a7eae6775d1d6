"""Faults of processes: one of two dies, hangs, is told to stop; its loader dies; it fails at one step for ever; Slurm.

What lives here: rows 10 to 16 with two processes, and what must hold. What must not: how they are injured (`launched`).
"""

from __future__ import annotations

import json
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiny
from fake_slurm import asked, install
from launched import FAULT, lines
from outcome import Fault, Outcome

STEPS, EVERY = 24, 4
LAUNCHED = str(Path(__file__).resolve().parent / "launched.py")
SECTIONS: dict[str, dict[str, Any]] = {
    "train": {"steps": STEPS, "strategy": "ddp", "ddp_timeout": 60},
    "checkpoint": {"every": EVERY},
    "evaluate": {"every": 8},
}


class Tries:
    """Copies of a prepared run on two processes, each injured in its own way, against one that nothing injured."""

    def __init__(self, folder: Path, **train: Any) -> None:
        sections = {**SECTIONS, "train": {**SECTIONS["train"], **train}}
        self.prepared = tiny.make(folder / "prepared", **sections)
        self.folder = folder
        self.count = self.survived = self.lost = 0
        self.reason = ""
        self.whole = tiny.copy(self.prepared, folder / "whole")
        ended = self.launch(self.whole)
        if ended.code:
            raise RuntimeError(f"the run that nothing injures ended with code {ended.code}: {ended.output[-500:]}")

    def run(self) -> tiny.Run:
        """Another copy, not trained yet."""
        self.count += 1
        return tiny.copy(self.prepared, self.folder / f"try-{self.count}")

    def launch(self, run: tiny.Run, *options: str, fault: Mapping[str, Any] | None = None) -> tiny.Ended:
        """`pretrain train CONFIG --processes 2`, with a fault."""
        command = [sys.executable, LAUNCHED, "train", str(run.config), "--processes", "2", *options]
        return tiny.execute(command, environment={FAULT: json.dumps(fault)}, timeout=300)

    def settle(self, what: object, reason: str) -> None:
        """Count a try as survived when there is no reason against it."""
        self.survived += not reason
        self.reason = self.reason or (f"{what}: {reason}" if reason else "")

    def outcome(self, note: str, lost: str = "") -> Outcome:
        """The table's cells."""
        text = f"{note}; first failure: {self.reason}" if self.reason else note
        return Outcome(self.count, self.survived, lost or f"at most {self.lost} steps", text)

    def difference(self, run: tiny.Run) -> str:
        """Why a run is not the whole one: losses, rates and weights bit for bit, and the rows of each rank."""
        self.lost = max(self.lost, len(lines(run.directory / "moments-0.jsonl")) - STEPS)
        if text := tiny.trace(run).difference(tiny.trace(self.whole)):
            return text
        for rank in (0, 1):
            mine, whole = (
                {line["step"]: line["rows"] for line in lines(one.directory / f"moments-{rank}.jsonl")}
                for one in (run, self.whole)
            )
            if mine != whole:
                return f"rank {rank} saw other rows"
        return ""


def _recovered(run: tiny.Run) -> tuple[float, int]:
    """Seconds from the first injury to the end of the next start's first step, infinite without one; and the starts."""
    log = run.directory / "train" / "logs" / "rank-00001.log"
    starts = log.read_text(encoding="utf-8", errors="replace").count("--- started")
    injuries, moments = lines(run.directory / "injuries.jsonl"), lines(run.directory / "moments-0.jsonl")
    again = [line["time"] for line in moments if line["process"] != moments[0]["process"]]
    return (again[0] - injuries[0]["time"] if again and injuries else float("inf")), starts


def _found(run: tiny.Run, page: Path) -> str:
    """Why a hang was found too late: after twice the slowest step and 10 s, and the 2 s that stacks may take."""
    moments = [line["time"] for line in lines(run.directory / "moments-0.jsonl")]
    injury = lines(run.directory / "injuries.jsonl")[0]["time"]
    before = [moment for moment in moments if moment < injury]
    slowest = max(late - early for early, late in pairwise(before))
    took, allowed = page.stat().st_mtime - injury, 2 * slowest + 12
    return f"found after {took:.1f} s, {allowed:.1f} s are allowed" if took > allowed else ""


# --- rows 13, 14, 15: killed, hung, without a loader ----------------------------------------------------------------


def relaunched(
    kind: str, within: float, tries: int, *, stacks: bool = False, names: str = ""
) -> Callable[[Path], Outcome]:
    """Rank 1 is injured at random steps under `--supervise`; the run must end by itself, exact."""

    def inject(folder: Path) -> Outcome:
        generator = random.Random(13)
        all_tries = Tries(folder)
        slowest = 0.0
        for _ in range(tries):
            run, reason = all_tries.run(), ""
            first = 1 if kind in ("SIGKILL", "error") else 5  # a hang is known by the steps before it
            fault = {
                "rank": 1,
                "step": generator.randint(first, STEPS),
                "kind": kind,
                "delay": generator.uniform(0, 0.02),
            }
            ended = all_tries.launch(run, "--supervise", fault=fault)
            seconds, starts = _recovered(run)
            pages = list((run.directory / "train" / "logs").glob("stacks-*.txt"))
            found = _found(run, pages[0]) if stacks and pages else ""
            if ended.code:
                reason = f"code {ended.code}: {ended.output[-300:]}"
            elif (starts, len(lines(run.directory / "injuries.jsonl"))) != (2, 1):
                reason = f"{starts} starts"
            elif len(pages) != int(stacks):
                reason = f"{len(pages)} pages of stacks"
            elif names not in " ".join(ended.output.split()):
                reason = f"`{names}` is not said: {ended.output[-300:]}"
            else:
                slowest = max(slowest, seconds)
                late = f"{seconds:.1f} s from the injury to the next step" if seconds > within else ""
                reason = all_tries.difference(run) or found or late
            all_tries.settle(fault, reason)
        return all_tries.outcome(f"at most {slowest:.1f} s from the injury to the end of the first step after it")

    return inject


# --- row 16: a crash loop -------------------------------------------------------------------------------------------


def crash_loop(folder: Path) -> Outcome:
    """Rank 1 fails at one step for ever: three starts, then the step and its rows are named."""
    all_tries = Tries(folder)
    for step in (3, 17):
        run = all_tries.run()
        fault = {"rank": 1, "step": step, "kind": "error", "times": 99}
        ended = all_tries.launch(run, "--supervise", fault=fault)
        said = " ".join(ended.output.split())
        rows = [
            line["rows"]
            for rank in (0, 1)
            for line in lines(all_tries.whole.directory / f"moments-{rank}.jsonl")
            if line["step"] == step
        ]
        found, reason = re.search(r"its rows: (.*?); the processes' logs", said), ""
        if ended.code != 1:
            reason = f"code {ended.code}: {said[-300:]}"
        elif f"step {step} failed 3 times in a row" not in said or f"--step {step}` shows its rows" not in said:
            reason = f"the step is not named: {said[-500:]}"
        elif found is None or found[1] != ", ".join(str(row) for row in rows[0] + rows[1]):
            reason = f"its rows are not named: {said[-500:]}"
        elif len(lines(run.directory / "injuries.jsonl")) != 3:
            reason = "it was not started three times"
        elif all_tries.launch(run).code:
            reason = "a start without the fault does not go on"
        else:
            reason = all_tries.difference(run)
        all_tries.settle(step, reason)
    return all_tries.outcome("three starts, step and all rows named; without the fault it goes on exactly")


# --- rows 10 and 11: stop signals with two processes ----------------------------------------------------------------


def stopped(to: str, twice: bool, tries: int) -> Callable[[Path], Outcome]:
    """A stop signal to one rank or to both, once or twice, at a random moment."""

    def inject(folder: Path) -> Outcome:
        generator = random.Random(10 + twice)
        all_tries = Tries(folder, stop_signals=["SIGTERM", "SIGINT", "SIGUSR1"])
        slowest = 0.0
        for _ in range(tries):
            run, reason = all_tries.run(), ""
            name = generator.choice(["SIGTERM", "SIGUSR1"])
            fault: dict[str, Any] = {
                "rank": {"one": 1, "all": None}[to],
                "step": generator.randint(1, STEPS - 2),
                "kind": f"{name} twice" if twice else name,
                "delay": generator.uniform(0, 0.02),
                "times": 2 if to == "all" else 1,
            }
            ended = all_tries.launch(run, fault=fault)
            injured = [line["time"] for line in lines(run.directory / "injuries.jsonl")]
            moments = lines(run.directory / "moments-0.jsonl")
            if ended.code != 75:
                reason = f"code {ended.code}: {ended.output[-300:]}"
            elif moments[-1]["step"] > fault["step"] + 2:
                reason = f"it stopped at step {moments[-1]['step']} only"
            else:
                slowest = max(slowest, _mtime(run) - injured[0])
                saved = [path.name for path in run.checkpoints.glob("step-*")]
                if f"step-{moments[-1]['step']:08d}" not in saved:
                    reason = f"stopped after step {moments[-1]['step']}, saved {saved}"
                elif (again := all_tries.launch(run)).code:
                    reason = f"the same command does not go on: {again.output[-300:]}"
                else:
                    reason = all_tries.difference(run)
            all_tries.settle(fault, reason)
        return all_tries.outcome(f"exit code 75; at most {slowest:.1f} s from the signal to the last save")

    return inject


def _mtime(run: tiny.Run) -> float:
    return max(path.stat().st_mtime for path in run.checkpoints.glob("step-*/manifest.json"))


# --- row 12: the time limit of Slurm ----------------------------------------------------------------------------------


def requeued(tries: int) -> Callable[[Path], Outcome]:
    """`scripts/launch/slurm.sh` under programs that stand in for Slurm's; its signal comes at a random step."""

    def inject(folder: Path) -> Outcome:
        generator = random.Random(12)
        all_tries = Tries(folder)
        for number in range(tries):
            run, place = all_tries.run(), folder / f"slurm-{number}"
            environment = dict(install(place, tasks=2))
            # `python -m pretrain` of the script is the program that notes its steps.
            (place / "python").write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {LAUNCHED} "$@"\n')
            (place / "python").chmod(0o755)
            script = str(tiny.ROOT / "scripts" / "launch" / "slurm.sh")
            first = tiny.start(["bash", script, str(run.config)], environment=environment)
            step = generator.randint(1, STEPS - 2)
            deadline = time.monotonic() + 200
            while len(lines(run.directory / "moments-0.jsonl")) < step and time.monotonic() < deadline:
                time.sleep(0.005)
            first.send_signal(signal.SIGUSR1)
            output, _ = first.communicate(timeout=200)
            if (first.returncode, asked(place)) != (75, ["requeue 4242"]):
                reason = f"code {first.returncode}, scontrol {asked(place)}: {output[-300:]}"
            else:
                again = tiny.execute(["bash", script, str(run.config)], environment=environment)
                once = asked(place) == ["requeue 4242"]
                reason = "" if again.code == 0 and once else f"code {again.code}, {asked(place)}: {again.output[-300:]}"
                reason = reason or all_tries.difference(run)
            all_tries.settle(f"signal at step {step}", reason)
        return all_tries.outcome("exit code 75, one requeue, and the next job ends the run")

    return inject


KILLED = "rank 1 of 2 was ended by SIGKILL"
FAULTS = [
    Fault(
        "13",
        "SIGKILL to one of two ranks at random steps, supervised",
        "relaunched, computing < 15 s; exact",
        relaunched("SIGKILL", 15, 10, names=KILLED),
        timed=True,
    ),
    Fault(
        "14",
        "SIGSTOP to one of two ranks, supervised",
        "found in 2 slowest steps + 10 s, stacks, relaunched; exact",
        relaunched("SIGSTOP", 26, 4, stacks=True, names="rank 1 hangs"),
        timed=True,
    ),
    Fault(
        "15",
        "the loader's thread of a rank dies, supervised",
        "relaunched, computing < 30 s; exact",
        relaunched("loader dies", 30, 4),
        timed=True,
    ),
    Fault(
        "15",
        "the loader's thread of a rank hangs, supervised",
        "relaunched, computing < 30 s; exact",
        relaunched("loader hangs", 30, 3, stacks=True),
        timed=True,
    ),
    Fault("16", "a rank fails at one step for ever, supervised", "3 starts; step and rows named", crash_loop),
    Fault("12", "Slurm's signal before the time limit, two tasks", "requeued once; resumes; exact", requeued(2)),
    Fault(
        "11",
        "two signals to both of two ranks, 10 ms apart",
        "75, one valid checkpoint; exact",
        stopped("all", True, 2),
    ),
    Fault("10", "SIGTERM or SIGUSR1 to one of two ranks", "75, one save, no hang; exact", stopped("one", False, 4)),
    Fault("10", "SIGTERM or SIGUSR1 to both of two ranks", "75, one save, no hang; exact", stopped("all", False, 4)),
]
