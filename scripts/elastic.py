"""Save with any engine, go on with any other: every pair of engines at 1 and 2 processes, as a table.

    python scripts/elastic.py docs/elastic.md

Each of the 11 states (one process; DDP, FSDP2, ZeRO-1, 2 and 3 at 1 and at 2 processes) trains a run to its middle and
saves it. Each state then goes on from each of the 11 checkpoints: what it has loaded is gathered and compared with the
checkpoint bit for bit, and the steps to the end are compared with a run that one process made without a stop: rows,
masks and learning rates must be equal, losses within 1e-5. A relay of four engines with another micro-batch each, and a
run of every engine from its first step to its last, stand below the table.

What lives here: what is raced against what, and the page. What must not: running it (`engines/relay.py`).
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for place in (ROOT / "scripts" / "engines", ROOT / "scripts" / "faults"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

import relay  # noqa: E402
import tiny  # noqa: E402

BOUND = 1e-5
NORM_BOUND = 1e-4  # of the gradient norm, relative, where the loss must agree within BOUND
BF16_BOUND = 2e-3  # two numbers that are neighbours in bf16 lie 0.8% apart
STEPS, MIDDLE, LONG = 12, 6, 50
SECTIONS: dict[str, dict[str, Any]] = {
    "model": {
        "architecture": "gpt2",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "hidden_dropout": 0.1,
        "embedding_dropout": 0.1,
    },
    "optimizer": {"name": "muon", "lr": 1e-2},
    "train": {
        "steps": STEPS,
        "batch_tokens": 320,  # 10 rows: no power of two, and uneven over micro-batches
        "micro_batch": 4,
        "precision": "fp32",
        "seed": 3,
        "max_grad_norm": 0.5,  # below the norms of most steps
    },
    "checkpoint": {"every": MIDDLE, "keep": 2},
    "evaluate": {"every": MIDDLE, "max_tokens": 512},
}


@dataclass(frozen=True)
class State:
    """An engine at a number of processes."""

    strategy: str
    processes: int

    def __str__(self) -> str:
        return self.strategy if self.strategy == "single" else f"{self.strategy} x{self.processes}"

    @property
    def folder(self) -> str:
        """A name for the disk."""
        return f"{self.strategy}-{self.processes}"


SPLIT = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
STATES = (State("single", 1), *(State(strategy, count) for strategy in SPLIT for count in (1, 2)))


def leg(run: tiny.Run, state: State, *overrides: str, **keys: Any) -> relay.Leg:
    """A leg of a run by an engine."""
    return relay.Leg(str(run.config), (f"train.strategy={state.strategy}", *overrides), **keys)


def race(legs: Sequence[tuple[State, relay.Leg]], folder: Path, *, timeout: float = 1500) -> list[relay.Found]:
    """Train the legs, those of equally many processes in one job; what each found, in the given order."""
    found: dict[int, relay.Found] = {}
    for processes in sorted({state.processes for state, _ in legs}):
        places = [place for place, (state, _) in enumerate(legs) if state.processes == processes]
        job = relay.race([legs[place][1] for place in places], folder, processes=processes, timeout=timeout)
        found |= dict(zip(places, job, strict=True))
    return [found[place] for place in range(len(legs))]


Parity = dict[tuple[str, str], dict[State, tuple[float, str]]]
"""By optimizer and precision: of each state the largest difference of a loss, and what is wrong, if anything is."""


@dataclass(frozen=True)
class Pair:
    """How going on from one state's checkpoint by another went."""

    saved_by: State
    resumed_by: State
    loss: float
    compared: int
    problem: str = ""


def judge(
    found: relay.Found, straight: relay.Found, *, first: int, state: State | None = None, bound: float = BOUND
) -> tuple[float, str]:
    """The largest difference of a loss from the straight run's, and what is wrong, if anything is."""
    steps = range(first, max(straight.losses) + 1)
    if found.error or found.code != 0:
        return float("nan"), found.error or f"exit code {found.code}"
    if found.different:
        return float("nan"), f"{len(found.different)} tensors differ, such as {found.different[0]}"
    if state is not None and (found.strategy, found.world) != (state.strategy, state.processes):
        return float("nan"), f"{found.strategy} ran on {found.world} processes"
    for step in steps:
        if step not in found.losses:
            return float("nan"), f"step {step} was not trained"
        if found.rates[step] != straight.rates[step]:
            return float("nan"), f"learning rate of step {step}"
        if found.rows.get(step) != straight.rows[step]:
            return float("nan"), f"rows of step {step}"
        if not math.isclose(found.norms[step], straight.norms[step], rel_tol=NORM_BOUND * bound / BOUND):
            return float("nan"), f"gradient norm of step {step}"
    gaps = [abs(found.losses[step] - straight.losses[step]) for step in steps]
    loss = max(gaps) if all(map(math.isfinite, gaps)) else float("nan")
    return loss, "" if loss <= bound else f"loss differs by {loss:.1e}"


def pairs(folder: Path, chosen: Sequence[tuple[State, State]]) -> list[Pair]:
    """Save by the first of each pair, go on by the second."""
    base = tiny.make(folder / "base", **SECTIONS)
    savers = list(dict.fromkeys(saver for saver, _ in chosen))
    runs = {saver: tiny.copy(base, folder / f"saved-{saver.folder}") for saver in savers}
    single = STATES[0]
    whole = tiny.copy(base, folder / "straight")
    first = [(single, leg(whole, single))]
    first += [(saver, leg(runs[saver], saver, stop_after=MIDDLE)) for saver in savers]
    straight, *saved = race(first, folder / "saving")
    for saver, found in zip(savers, saved, strict=True):
        if found.code != 75:
            raise RuntimeError(f"{saver} did not stop and save: {found.error or found.code}")
    resumed = []
    for saver, resumer in chosen:
        copied = tiny.copy(runs[saver], folder / f"{saver.folder}-to-{resumer.folder}")
        resumed.append((resumer, leg(copied, resumer, compare=True)))
    made = []
    for (saver, resumer), found in zip(chosen, race(resumed, folder / "resuming"), strict=True):
        loss, problem = judge(found, straight, first=MIDDLE + 1, state=resumer)
        made.append(Pair(saver, resumer, loss, found.compared, problem))
    return made


RELAY = ((State("zero3", 2), 4), (State("fsdp2", 2), 3), (State("ddp", 2), 2), (STATES[0], 5))


def relayed(folder: Path, *, steps: int = 20, runners: Sequence[tuple[State, int]] = RELAY) -> tuple[float, str]:
    """`steps` steps of each state, with its rows in a micro-batch, against one run; the difference, the fault."""
    base = tiny.make(folder / "relay", **{**SECTIONS, "train": {**SECTIONS["train"], "steps": len(runners) * steps}})
    single, whole = STATES[0], tiny.copy(base, folder / "relay-straight")
    (straight,) = race([(single, leg(whole, single))], folder / "relay-job")
    rows: dict[int, list[str]] = {}
    for number, (state, micro_batch) in enumerate(runners, start=1):
        stop = None if number == len(runners) else number * steps
        runner = leg(base, state, f"train.micro_batch={micro_batch}", stop_after=stop, compare=number > 1)
        (found,) = race([(state, runner)], folder / "relay-job")
        if found.error or found.code != (0 if stop is None else 75) or found.different:
            return float("nan"), f"{state}: {found.error or found.code}, {len(found.different)} tensors differ"
        rows |= found.rows
    found.rows = rows
    return judge(found, straight, first=1)


COMBINATIONS = (("muon", "fp32"), ("adamw", "fp32"), ("muon", "bf16"), ("adamw", "bf16"))


def parity(
    folder: Path, combinations: Sequence[tuple[str, str]] = COMBINATIONS, *, states: Sequence[State] = STATES
) -> Parity:
    """Each engine from the first step to the last, with micro-batches of 3 rows, against one process with 4."""
    legs: list[tuple[State, relay.Leg]] = []
    for optimizer, precision in combinations:
        sections = {**SECTIONS, "train": {**SECTIONS["train"], "steps": LONG, "precision": precision}}
        sections["optimizer"] = {"name": optimizer, "lr": 1e-2 if optimizer == "muon" else 3e-3}
        sections["checkpoint"] = {"every": LONG}
        base = tiny.make(folder / f"{optimizer}-{precision}", **sections)
        runs = {state: tiny.copy(base, folder / f"{optimizer}-{precision}-{state.folder}") for state in states}
        legs.append((STATES[0], leg(base, STATES[0])))
        legs += [(state, leg(run, state, "train.micro_batch=3")) for state, run in runs.items()]
    found = iter(race(legs, folder / "parity-job"))
    results: Parity = {}
    for optimizer, precision in combinations:
        straight, bound = next(found), BOUND if precision == "fp32" else BF16_BOUND
        results[optimizer, precision] = {
            state: judge(next(found), straight, first=1, state=state, bound=bound) for state in states
        }
    return results


# --- the page -------------------------------------------------------------------------------------------------------


def page(made: Sequence[Pair], relay_found: tuple[float, str], runs: Parity) -> str:
    """The page, in Markdown."""
    by_pair = {(pair.saved_by, pair.resumed_by): pair for pair in made}
    whole = [pair for pair in made if not pair.problem]
    lines = [
        "# Any engine goes on from any other",
        "",
        f"Written by `python scripts/elastic.py docs/elastic.md` at commit {_commit()}, {_machine()}; "
        f"{time.strftime('%Y-%m-%d')}.",
        "",
        "A row saved a run after step 6 of 12, a column went on from it. The number is the largest difference of a",
        "loss of steps 7 to 12 from that of a run that one process made without a stop. Rows of every step, inputs and",
        "masks (digests) and learning rates were equal in every pair, and so was every tensor of weights and optimizer",
        f"state that was loaded ({made[0].compared} a pair), bit for bit, gathered from all processes. The run: GPT-2,",
        "tied, 2 x 32, Muon with AdamW, fp32, hidden and embedding dropout 0.1, clipping at 0.5, 10 rows a step in",
        "micro-batches of 4.",
        "",
        f"**{len(whole)} of {len(made)} pairs** hold the bound of {BOUND:g}; the largest difference is "
        f"{max((pair.loss for pair in whole), default=float('nan')):.1e}.",
        "",
        "| saved by / resumed by | " + " | ".join(map(str, STATES)) + " |",
        "|---" * (len(STATES) + 1) + "|",
    ]
    for saver in STATES:
        cells = [by_pair[saver, resumer] for resumer in STATES]
        lines.append(f"| {saver} | " + " | ".join(cell.problem or f"{cell.loss:.1e}" for cell in cells) + " |")
    loss, problem = relay_found
    relay_words = problem or f"losses differ by {loss:.1e} at most, rows and rates are equal"
    lines += [
        "",
        "## A relay",
        "",
        "20 steps each of zero3 x2, fsdp2 x2, ddp x2 and one process, with micro-batches of 4, 3, 2 and 5 rows,",
        f"against 80 steps of one process: {relay_words}.",
        "",
        "## From the first step to the last",
        "",
        f"{LONG} steps of each engine with micro-batches of 3 rows against one process with micro-batches of 4; the",
        f"largest difference of a loss. The bound is {BOUND:g} in fp32, {BF16_BOUND:g} in bf16, whose rounding makes",
        "other micro-batches sum up otherwise.",
        "",
        "| | " + " | ".join(map(str, STATES)) + " |",
        "|---" * (len(STATES) + 1) + "|",
    ]
    for (optimizer, precision), found in runs.items():
        cells_text = [why or f"{value:.1e}" for value, why in (found[state] for state in STATES)]
        lines.append(f"| {optimizer}, {precision} | " + " | ".join(cells_text) + " |")
    return "\n".join(lines) + "\n"


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _machine() -> str:
    import torch

    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, gloo"


def main() -> int:
    """Write the page; the exit code says whether every pair and every run held its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the page to write")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory(prefix="elastic-") as name:
        folder = Path(name)
        made = pairs(folder, [(saver, resumer) for saver in STATES for resumer in STATES])
        found = relayed(folder)
        runs = parity(folder)
    out.write_text(page(made, found, runs), encoding="utf-8")
    problems = [pair for pair in made if pair.problem]
    wrong = [why for results in runs.values() for _, why in results.values() if why]
    return 1 if problems or found[1] or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
