"""Faults of saving: kills, a full disk, damage, power loss, clocks, two jobs, signals, state that is not there.

What lives here: one function a row of the table, and what it demands (rows 3 and 4: `full_disk`). What must not: the
tools (`tiny`, `warm`, `tracing`, `trial`), or the page.

A try survives when the same command, started again, ends by itself with the trace of the run that was never
interrupted, and whatever else the row promises held on the way.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import tiny
import tracing
from damage import damaged, damages
from full_disk import disk_full, disk_full_at_the_end, too_small_a_disk
from order import violations
from outcome import Fault, Outcome
from trial import (
    CHECKPOINT,
    EVERY,
    EXIT_STOPPED,
    SECTIONS,
    STEPS,
    TRAIN,
    Tally,
    against,
    go_on,
    not_run,
    repeated,
    spread,
    whole,
)
from warm import Warm

# --- rows 1 and 2: kills ----------------------------------------------------------------------------------------------


def kill_everywhere(folder: Path, *, keep: int, sample: int | None = None, beside: bool = False) -> Outcome:
    """kill -9 at every change to the disk of a whole run: its saves, pointers, rotations, logs and end.

    With `beside`, the saves are made by a thread beside the training, and the calls of all threads count.
    """
    if why := tracing.unavailable():
        return not_run(why)
    sections = {**SECTIONS, "checkpoint": {**CHECKPOINT, "keep": keep, "asynchronous": beside}}
    template = tiny.make(folder / "template", **sections)
    tally = Tally()

    def work(warm: Warm, share: Sequence[tuple[str, int]]) -> None:
        for name, number in share:
            place = folder / f"{name}-{number}"
            run = tiny.copy(template, place)
            inject = f"{name}:signal=SIGKILL:when={number}"
            code, _, _, _ = tracing.traced(warm, [TRAIN, str(run.config)], place, inject=inject, calls=name)
            missed = code == 0 and beside  # which thread comes to a call first is not the same every time
            wrong = against(run, oracle) if missed else _after_kill(warm, run, oracle, code, f"{name} {number}", beside)
            tally.add(wrong, repeated=repeated(run))
            shutil.rmtree(place)

    with Warm() as warm:
        unhurt = tiny.copy(template, folder / "unhurt")
        code, pid, calls, said = tracing.traced(warm, [TRAIN, str(unhurt.config)], folder)
        assert code == 0, said
        oracle, points = tiny.trace(unhurt), tracing.points(calls, pid, threads=beside)
        if sample is not None:
            work(warm, random.Random(0).sample(points, min(sample, len(points))))
    if sample is None:
        spread(points, work)
    kinds = ", ".join(sorted({name for name, _ in points}))
    how = "saves beside the training; " if beside else ""
    return tally.outcome(f"{how}keep={keep}; every {kinds} of a run with {STEPS // EVERY} saves")


def _after_kill(warm: Warm, run: tiny.Run, oracle: tiny.Trace, code: int, point: str, beside: bool) -> str:
    """One whole checkpoint must be there as soon as one was, and the same command must go on to the same end.

    A save beside the training is whole when the next one begins.
    """
    if code != -9:
        return f"{point}: not killed, exit {code}"
    trained = [line["step"] for line in tiny._lines(run.directory / "rows.jsonl")]
    steps = whole(run)
    if max(trained, default=0) > (2 * EVERY if beside else EVERY) and not steps:
        return f"{point}: no whole checkpoint is left"
    wrong = go_on(warm, run, oracle)
    return f"{point}: {wrong}" if wrong else ""


def kill_real_command(folder: Path, *, tries: int = 8) -> Outcome:
    """The same with the command as a user starts it, a process of its own from the interpreter on."""
    if why := tracing.unavailable():
        return not_run(why)
    sections = {**SECTIONS, "checkpoint": {**CHECKPOINT, "keep": 1}}
    oracle = tiny.oracle(folder / "oracle", **sections)
    template = tiny.make(folder / "template", **sections)
    tally = Tally()
    # The fsyncs and renames of a run are the borders of what can be seen; the count is that of the sweep.
    kinds = [("fsync", number) for number in (12, 24, 36, 48)] + [("rename", number) for number in (5, 7, 9, 12)]
    for name, number in kinds[:tries]:
        run = tiny.copy(template, folder / f"{name}-{number}")
        strace = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={name}"]
        inject = ["-e", f"inject={name}:signal=SIGKILL:when={number}"]
        command = tiny.command(run, recorded=True)
        killed = tiny.execute([*strace, *inject, *command])
        if killed.code not in (-9, 137):
            tally.add(f"{name} {number}: not killed, exit {killed.code}: {killed.output[-200:]}")
            continue
        ended = tiny.train(run)
        wrong = f"exit {ended.code}: {ended.output[-300:]}" if ended.code else against(run, oracle)
        tally.add(f"{name} {number}: {wrong}" if wrong else "", repeated=repeated(run))
    return tally.outcome("`pretrain train` from the interpreter on, keep=1")


# --- rows 5 and 6: damage -------------------------------------------------------------------------------------------


def _finished(folder: Path) -> tuple[tiny.Run, tiny.Trace]:
    run = tiny.make(folder, **SECTIONS)
    ended = tiny.train(run)
    assert ended.code == 0, ended.output
    return run, tiny.trace(run)


def damage(folder: Path, *, kinds: Sequence[str], tries: int) -> Outcome:
    """Damage files of the newest checkpoint and the pointers; the same command must notice, and end exact."""
    template, oracle = _finished(folder / "template")
    plan = damages(template, kinds=kinds, tries=tries, newest=STEPS)
    tally = Tally()

    def work(warm: Warm, share: Sequence[tuple[str, str, int]]) -> None:
        for file, kind, seed in share:
            place = folder / f"{Path(file).name}-{kind}-{seed}"
            run = tiny.copy(template, place)
            damaged(run.checkpoints / file, kind, seed)
            ended = warm.execute([TRAIN, str(run.config)])
            said = [line for line in ended.output.splitlines() if "is not used" in line or "pointer" in line]
            wrong = against(run, oracle) if ended.code == 0 else f"exit {ended.code}: {ended.output[-300:]}"
            if not wrong and len(said) != 1:
                wrong = f"{len(said)} lines say so: {ended.output[-300:]}"
            tally.add(f"{kind} of {file}: {wrong}" if wrong else "", repeated=repeated(run))
            shutil.rmtree(place)

    spread(plan, work)
    files = len({file for file, _, _ in plan})
    return tally.outcome(f"{', '.join(kinds)} over {files} files: the newest checkpoint's and both pointers")


# --- rows 7, 8, 9, 11 -----------------------------------------------------------------------------------------------


def power_loss(folder: Path) -> Outcome:
    """In the order of system calls: flushed before the rename, and the directory after it."""
    if why := tracing.unavailable():
        return not_run(why)
    tally = Tally()
    with Warm() as warm:
        for keep, beside in ((1, False), (2, False), (1, True), (2, True)):
            sections = {**SECTIONS, "checkpoint": {**CHECKPOINT, "keep": keep, "asynchronous": beside}}
            place = folder / f"keep-{keep}-{beside}"
            run = tiny.make(place, **sections)
            calls = f"{tracing.CHANGES},openat,close"
            code, pid, log, said = tracing.traced(warm, [TRAIN, str(run.config)], place, calls=calls, paths=True)
            assert code == 0, said
            checked, broken = violations([call for call in log if beside or call.pid == pid], run.directory)
            for _ in range(checked - len(broken)):
                tally.add("")
            for reason in broken:
                tally.add(reason)
    return tally.outcome("each rename of a run: its bytes and entries flushed before, its directory after", lost="-")


def clocks_and_strangers(folder: Path) -> Outcome:
    """File times that say the opposite of the steps, and another run's higher steps in the folder."""
    template, oracle = _finished(folder / "template")
    stranger = tiny.make(folder / "stranger", train={"steps": 40, "seed": 9}, checkpoint={"every": 20, "keep": 2})
    assert tiny.train(stranger).code == 0
    tally = Tally()
    with Warm() as warm:
        for hours in (-2, 2):
            for foreign in (False, True):
                run = tiny.copy(template, folder / f"{hours}-{foreign}")
                shutil.rmtree(run.checkpoints / f"step-{STEPS:08d}" / "optimizer")  # so that there is work to do
                for number, path in enumerate(sorted(run.checkpoints.rglob("*"))):
                    when = time.time() + hours * 3600 - number * 60
                    os.utime(path, (when, when))
                if foreign:
                    for path in stranger.checkpoints.glob("step-*"):
                        shutil.copytree(path, run.checkpoints / path.name)
                wrong = go_on_with_strangers(warm, run, oracle, foreign=foreign)
                tally.add(f"{hours:+} h: {wrong}" if wrong else "", repeated=repeated(run))
    return tally.outcome("times +/- 2 h against the order of steps, with and without another run's steps 20 and 40")


def go_on_with_strangers(warm: Warm, run: tiny.Run, oracle: tiny.Trace, *, foreign: bool) -> str:
    """Go on, then see that the other run's checkpoints were neither used nor removed."""
    before = set(whole(run))
    ended = warm.execute([TRAIN, str(run.config)])
    if ended.code:
        return f"exit {ended.code}: {ended.output[-300:]}"
    if foreign and not {20, 40} <= set(whole(run)) & before:
        return "another run's checkpoint is gone"
    for step in (20, 40):
        shutil.rmtree(run.checkpoints / f"step-{step:08d}", ignore_errors=True)
    return against(run, oracle)


def two_jobs(folder: Path) -> Outcome:
    """Start every verb that writes into a run while another process holds it; kill -9 the holder; start again."""
    sections = {**SECTIONS, "train": {"steps": 100_000}, "checkpoint": {"every": 50_000}}
    run = tiny.make(folder, **sections)
    tally, slowest = Tally(), 0.0
    holder = tiny.start(tiny.command(run))
    try:
        deadline = time.monotonic() + 60
        while not (run.directory / "train" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        for verb in ("train", "prepare", "tokenizer", "run"):
            second = tiny.execute(tiny.command(run, verb=verb))
            slowest = max(slowest, second.seconds)
            said = " ".join(second.output.split())
            refused = second.code == 2 and f"process {holder.pid} on" in said and second.seconds < 5
            tally.add("" if refused else f"{verb}: exit {second.code} after {second.seconds:.1f} s: {said[-200:]}")
    finally:
        os.killpg(holder.pid, 9)
        holder.communicate()
    ended = tiny.train(run, "train.steps=2", "checkpoint.every=1", "schedule.warmup=0", recorded=False)
    tally.add("" if ended.code == 0 else f"after kill -9: exit {ended.code}: {ended.output[-300:]}")
    return tally.outcome(f"all four verbs refused in {slowest:.1f} s at most, by process and machine", lost="-")


def signals_in_a_save(folder: Path) -> Outcome:
    """A stop signal at some flush of a run, and a second one right after, in the save that the first asked for."""
    if why := tracing.unavailable():
        return not_run(why)
    oracle = tiny.oracle(folder / "oracle", **SECTIONS)
    beside = {**SECTIONS, "checkpoint": {**CHECKPOINT, "asynchronous": True}}
    templates = [tiny.make(folder / "waits", **SECTIONS), tiny.make(folder / "beside", **beside)]
    tally = Tally()
    names = ("SIGTERM", "SIGINT")
    plan = [(name, number, 0) for name in names for number in range(14, 44, 2)]
    plan += [(name, number, 1) for name in names for number in range(2, 32, 2)]

    def work(warm: Warm, share: Sequence[tuple[str, int, int]]) -> None:
        for name, number, which in share:
            place = folder / f"{name}-{number}-{which}"
            run = tiny.copy(templates[which], place)
            inject = f"fsync:signal={name}:when={number}..{number + 1}"
            code, _, _, said = tracing.traced(warm, [TRAIN, str(run.config)], place, inject=inject, calls="fsync")
            wrong = ""
            if code not in (0, EXIT_STOPPED, 130, 143):
                wrong = f"exit {code}: {said[-300:]}"
            elif code == EXIT_STOPPED and not whole(run):
                wrong = "said that it saved, but nothing is whole"
            elif len(whole(run)) != len(list(run.checkpoints.glob("step-*"))):
                wrong = "a half checkpoint is left"
            wrong = wrong or (go_on(warm, run, oracle) if code else against(run, oracle))
            tally.add(f"{name} at fsync {number}: {wrong}" if wrong else "", repeated=repeated(run))
            shutil.rmtree(place)

    spread(plan, work)
    return tally.outcome("SIGTERM twice, SIGINT twice, at two flushes of the disk one after another")


# --- rows 24 and 25 --------------------------------------------------------------------------------------------------


def missing_state(folder: Path) -> Outcome:
    """Each kind of tensor of a checkpoint left out, or in another dtype, with every digest made right again."""
    from state_surgery import cases, operate

    template, _ = _finished(folder / "template")
    tally = Tally()
    with Warm() as warm:
        for number, case in enumerate(cases(template.checkpoints / f"step-{STEPS:08d}")):
            run = tiny.copy(template, folder / str(number))
            for step in (STEPS, STEPS - EVERY):
                operate(run.checkpoints / f"step-{step:08d}", case)
            before = tiny.weights(run)
            ended = warm.execute([TRAIN, str(run.config)])
            said = " ".join(ended.output.split())
            named = case.tensor.split("/")[0] in said or (case.tensor == "rng" and "random state" in said)
            wrong = "" if ended.code == 2 and named and tiny.weights(run) == before else f"{said[-300:]}"
            tally.add(f"{case.what} {case.tensor}: exit {ended.code}: {wrong}" if wrong else "")
    return tally.outcome("left out or cast: weights, both moments, step counts, random generators: an error names it")


def save_and_load(folder: Path) -> Outcome:
    """Save, load, save, load, save: the three must be the same bytes."""
    from state_surgery import three_saves

    tally = Tally()
    for name in ("adamw", "stable-adamw", "muon"):
        tally.add(three_saves(folder / name, name))
    return tally.outcome("three saves of AdamW, StableAdamW and Muon: the same bytes in every file", lost="-")


FAULTS = [
    Fault(
        "1",
        "kill -9 at every change to the disk of a run",
        "goes on by itself, exact",
        lambda f: kill_everywhere(f, keep=2),
    ),
    Fault(
        "1",
        "the same, saves beside the training",
        "goes on by itself, exact",
        lambda f: kill_everywhere(f, keep=2, beside=True),
    ),
    Fault("1", "the same, the command as typed", "goes on by itself, exact", kill_real_command),
    Fault(
        "2",
        "kill -9 in saves and rotation, one checkpoint kept",
        "never fewer than one whole; exact",
        lambda f: kill_everywhere(f, keep=1),
    ),
    Fault("3", "disk full in a save", "older one whole, said with numbers, goes on, exact", disk_full),
    Fault("3", "disk full in the last save", "nonzero exit says what is lost; exact later", disk_full_at_the_end),
    Fault("4", "less space than the checkpoints need", "refused before step 1", too_small_a_disk),
    Fault(
        "5",
        "flipped byte, zeroed block",
        "found, previous one used, one line says so; exact",
        lambda f: damage(f, kinds=("flip", "zero"), tries=200),
    ),
    Fault(
        "6",
        "truncated or missing file",
        "found, previous one used, one line says so; exact",
        lambda f: damage(f, kinds=("cut", "missing"), tries=60),
    ),
    Fault("7", "power loss after a rename", "files, then directory flushed", power_loss),
    Fault("8", "clocks, another run's checkpoints", "order by step and run id; exact", clocks_and_strangers),
    Fault(
        "9", "two jobs, one folder", "second refused under 5 s; a killed one's lock clears itself", two_jobs, timed=True
    ),
    Fault("11", "a second stop signal in the save", "no half checkpoint; exact", signals_in_a_save),
    Fault("24", "state missing or of another dtype", "an error names it, nothing is overwritten", missing_state),
    Fault("25", "save, load, save, load, save", "same bytes", save_and_load),
]
