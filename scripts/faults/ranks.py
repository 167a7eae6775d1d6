"""Faults of one rank among several: a loss that is not finite, a wrong gradient, copies that drift, a slow process.

What lives here: rows 27 and 29 to 31, and what must hold. What must not: how a rank is injured (`injured_ranks`).
"""

from __future__ import annotations

import math
from pathlib import Path

import tiny
import training
from injured_ranks import Found, Leg, train_all
from outcome import Fault, Outcome

KINDS = ("nan loss", "inf loss", "nan gradient", "inf gradient")
EVERY = 4
LONG = ("train.steps=22", "checkpoint.every=100", "evaluate.every=100")


def strategy(name: str, *more: str) -> tuple[str, ...]:
    """Overrides."""
    return (f"train.strategy={name}", *more)


def not_finite(folder: Path) -> Outcome:
    """Each kind on rank 1 alone, with ddp, fsdp2 and zero2; skip for all, stop for one kind."""
    made = tiny.make(folder / "made")
    wanted = [(name, kind, "skip") for name in ("ddp", "fsdp2", "zero2") for kind in KINDS]
    wanted += [(name, "nan loss", "stop") for name in ("ddp", "fsdp2", "zero2")]
    runs, legs = [], []
    for number, (name, kind, policy) in enumerate(wanted):
        runs.append(tiny.copy(made, folder / f"try-{number}"))
        overrides = strategy(name, f"train.on_nonfinite={policy}")
        legs.append(Leg(str(runs[-1].config), overrides, kind, rank=1, step=5))
    all_found = train_all(legs, folder / "job", processes=2)
    alone: dict[str, tiny.Run] = {}
    for kind in KINDS:  # rank 1's rows are the second micro-batch of one process
        alone[kind] = tiny.copy(made, folder / f"alone-{kind}")
        training.train(alone[kind], {(5, 1): kind}, on_nonfinite="skip")
    reasons = [
        reason and f"{' '.join(what)}: {reason}"
        for what, run, found in zip(wanted, runs, all_found, strict=True)
        for reason in [_why_not_skipped(run, found, what[2], alone[what[1]])]
    ]
    failed = [reason for reason in reasons if reason]
    note = "two processes, ddp, fsdp2 and zero2: NaN and inf in loss and gradient of rank 1; losses as of one process"
    lost = "the bad step's update (skip); back to the last checkpoint (stop)"
    return Outcome(len(wanted), len(wanted) - len(failed), lost, failed[0] if failed else note)


def _why_not_skipped(run: tiny.Run, found: list[Found], policy: str, alone: tiny.Run) -> str:
    """What broke the promise; empty when it held."""
    if policy == "stop":
        if not all(one.error.startswith("NonFiniteError") and "step 5:" in one.error for one in found):
            return f"not stopped on all ranks: {[one.error or one.code for one in found]}"
    elif [one.code for one in found] != [0, 0]:
        return f"ended with {[one.error or one.code for one in found]}"
    if not training.all_finite(run):
        return "a checkpoint holds values that are not finite"
    (entry,) = training.lines(run, "skipped.jsonl") or [{}]
    logged, expected = training.losses(run), training.losses(alone)
    if entry.get("step") != 5 or entry["rows"] != training.lines(alone, "skipped.jsonl")[0]["rows"]:
        return "skipped.jsonl does not name the rows of all ranks"
    if logged[5].get("skipped") != 1 or math.isfinite(logged[5]["grad_norm"]):
        return f"step 5 is logged as {logged[5]}"
    for step in logged:
        mine, its = logged[step]["loss"], expected[step]["loss"]
        if math.isfinite(its) != math.isfinite(mine) or abs(mine - its) > 1e-5 * abs(its):
            return f"loss of step {step}: {mine}, of one process {its}"
    return ""


def flipped_bit(folder: Path) -> Outcome:
    """Bits of a summed gradient on one of three ranks, and on one of two."""
    made = tiny.make(folder / "made")
    legs, runs = [], []
    for step in (3, 6):
        for bit in (14, 20, 30, 31):
            runs.append(tiny.copy(made, folder / f"try-{len(runs)}"))
            overrides = strategy("ddp", f"train.check_replicas={EVERY}", "checkpoint.every=100")
            legs.append(Leg(str(runs[-1].config), overrides, "flip", rank=1, step=step, bit=bit))
    reasons = []
    for processes in (3, 2):
        mine = legs if processes == 3 else [_elsewhere(leg, made, folder / f"two-{n}") for n, leg in enumerate(legs)]
        for leg, found in zip(mine, train_all(mine, folder / f"job-{processes}", processes=processes), strict=True):
            named = "rank 1 (" if processes == 3 else "cannot be told which"
            reason = _why_not_caught(leg, found, named)
            reasons.append(reason and f"{processes} processes, step {leg.step}, bit {leg.bit}: {reason}")
    failed = [reason for reason in reasons if reason]
    note = (
        f"ddp, compared every {EVERY} steps: of three ranks the odd one is named, of two that they differ; a bit that "
        "makes the norm infinite ends the step on all ranks instead (zero1 and zero2 spread a wrong update to all "
        "copies alike: there it is not seen)"
    )
    return Outcome(len(reasons), len(reasons) - len(failed), f"at most {EVERY} steps", failed[0] if failed else note)


def _elsewhere(leg: Leg, made: tiny.Run, folder: Path) -> Leg:
    return Leg(str(tiny.copy(made, folder).config), leg.overrides, leg.kind, leg.rank, leg.step, leg.bit)


def _why_not_caught(leg: Leg, found: list[Found], named: str) -> str:
    errors = {one.error for one in found}
    error = errors.pop()
    if errors:
        return f"the ranks ended differently: {[one.error or one.code for one in found]}"
    if error.startswith("NonFiniteError") and f"step {leg.step}:" in error and leg.bit == 30:
        return ""
    due = -(-leg.step // EVERY) * EVERY
    if not error.startswith("ReplicasDifferError") or f"step {due}:" not in error or named not in error:
        return f"not caught at step {due}, or not named: {error or found[0].code}"
    return "" if "is the first tensor that differs" in error else "no tensor is named"


def drift(folder: Path) -> Outcome:
    """A layer norm of rank 1 is moved by 1e-6: copies of ddp, and of fsdp2 with hybrid sharding."""
    made = tiny.make(folder / "made")
    legs = []
    for name, more in (("ddp", ()), ("fsdp2", ("train.shard_size=1",))):
        for step in (2, 5, 8):
            run = tiny.copy(made, folder / f"{name}-{step}")
            overrides = strategy(name, *more, f"train.check_replicas={EVERY}", "checkpoint.every=100")
            legs.append(Leg(str(run.config), overrides, "norm", rank=1, step=step))
    unharmed = tiny.copy(made, folder / "unharmed")
    overrides = strategy("ddp", "train.check_replicas=1", *LONG)
    legs.append(Leg(str(unharmed.config), overrides, "none", rank=1))
    *injured, well = train_all(legs, folder / "job", processes=2)
    reasons = [_why_not_caught(leg, found, "norm") for leg, found in zip(legs, injured, strict=False)]
    reasons.append("" if [one.code for one in well] == [0, 0] else f"a false alarm: {well[0].error}")
    failed = [reason for reason in reasons if reason]
    check, step_ms = well[0].check_ms, well[0].step_ms
    note = (
        f"named with the tensor at the next comparison; one takes {check:.1f} ms beside a step of {step_ms:.0f} ms: "
        f"{check / step_ms / 100:.2%} at every 100 steps"
    )
    return Outcome(len(reasons), len(reasons) - len(failed), f"at most {EVERY} steps", failed[0] if failed else note)


def slow_rank(folder: Path) -> Outcome:
    """50 ms on rank 1, in its forward pass or in its data, with ddp and zero1; and nothing at all."""
    made = tiny.make(folder / "made")
    legs = []
    for name in ("ddp", "zero1"):
        for kind in ("slow forward", "slow data"):
            run = tiny.copy(made, folder / f"{name}-{kind.split()[1]}")
            legs.append(Leg(str(run.config), strategy(name, *LONG), kind, rank=1))
    run = tiny.copy(made, folder / "fsdp2-data")
    legs.append(Leg(str(run.config), strategy("fsdp2", *LONG), "slow data", rank=1))
    run = tiny.copy(made, folder / "even")
    legs.append(Leg(str(run.config), strategy("ddp", *LONG), "none", rank=1))
    *injured, even = train_all(legs, folder / "job", processes=2)
    reasons = []
    for leg, found in zip(legs, injured, strict=False):
        said = [line for line in found[0].said.splitlines() if line.startswith("slow rank: rank 1 (")]
        part = leg.kind.split()[1]
        named = any(f"waiting in {part}" in line for line in said)
        reasons.append("" if named else f"{leg.overrides[0]}, {leg.kind}: not named in {found[0].said[-300:]!r}")
    reasons.append("" if "slow rank" not in even[0].said else f"a false alarm: {even[0].said[-300:]}")
    failed = [reason for reason in reasons if reason]
    cost = even[0].measure_ms / even[0].step_ms
    note = (
        f"named with its host and the part after 20 steps; measuring costs {even[0].measure_ms:.2f} ms a step, "
        f"{cost:.2%} of steps of {even[0].step_ms:.0f} ms (with fsdp2 and zero3 a slow forward pass cannot be told: "
        "the ranks meet in every layer)"
    )
    return Outcome(len(reasons), len(reasons) - len(failed), "none", failed[0] if failed else note)


FAULTS = [
    Fault(
        "27",
        "NaN or infinite loss or gradient on one of two ranks",
        "all ranks skip or stop alike; no parameter is touched; the rows of all ranks are written down; the losses are "
        "those of one process",
        not_finite,
    ),
    Fault(
        "29",
        "a flipped bit in one rank's gradient after it was summed",
        "the copies' hashes differ: caught at the next comparison, with the rank and the tensor",
        flipped_bit,
    ),
    Fault(
        "30",
        "a layer norm of one rank moved by 1e-6",
        "caught at the next comparison, for under 0.5%",
        drift,
        timed=True,
    ),
    Fault("31", "one rank is 50 ms slower", "named in the log within 20 steps, for under 1%", slow_rank, timed=True),
]
