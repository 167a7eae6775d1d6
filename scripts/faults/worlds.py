"""Faults of the world a run goes on in: another number of processes, another engine.

What lives here: rows 18 and 19. What must not: the matrix of all pairs (`scripts/elastic.py`), whose parts these use.
"""

from __future__ import annotations

from pathlib import Path

import elastic
from elastic import State
from outcome import Fault, Outcome

RELAYS = (("single", "ddp", "single"), ("ddp", "single", "ddp"))
SHARED = ("fsdp2", "zero1", "zero2", "zero3")


def other_world(folder: Path) -> Outcome:
    """One process, two, one; and two, one, two: with other micro-batches each, against a run without a stop."""
    survived, largest, reason = 0, 0.0, ""
    for names in RELAYS:
        states = [State(name, 1 if name == "single" else 2) for name in names]
        runners = tuple(zip(states, (4, 3, 5), strict=True))
        loss, problem = elastic.relayed(folder / "-".join(names), steps=6, runners=runners)
        survived += not problem
        largest = max(largest, 0.0 if problem else loss)
        reason = reason or (f"; first failure: {problem}" if problem else "")
    note = f"1 to 2 to 1 and 2 to 1 to 2 processes, 6 steps each; losses within {largest:.0e}{reason}"
    return Outcome(len(RELAYS), survived, "0", note)


def other_engine(folder: Path) -> Outcome:
    """Each sharded engine from 2 processes to 1 and from 1 to 2, and both ways between FSDP2 and ZeRO-3."""
    chosen = [(State(name, first), State(name, 3 - first)) for name in SHARED for first in (1, 2)]
    chosen += [(State("fsdp2", 2), State("zero3", 2)), (State("zero3", 2), State("fsdp2", 2))]
    made = elastic.pairs(folder, chosen)
    whole = [pair for pair in made if not pair.problem]
    reasons = [
        f"; first failure: {pair.saved_by} to {pair.resumed_by}: {pair.problem}" for pair in made if pair.problem
    ]
    loss = max((pair.loss for pair in whole), default=float("nan"))
    note = f"{made[0].compared} tensors a pair equal bit for bit, losses within {loss:.0e}; all pairs: docs/elastic.md"
    return Outcome(len(made), len(whole), "0", note + "".join(reasons[:1]))


FAULTS = [
    Fault("18", "another number of processes at resume", "same rows and masks, losses within 1e-5", other_world),
    Fault("19", "a sharded run goes on elsewhere", "optimizer tensors bit-equal after gathering", other_engine),
]
