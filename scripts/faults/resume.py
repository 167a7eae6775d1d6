"""Faults of going on: stop signals everywhere, cuts in an epoch and in a step, changed keys, finished runs.

What lives here: one function a row of the table, and what it demands. What must not: the tools (`tiny`, and
`tests/interrupted.py` for commands that signal themselves), or the page.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tiny
from outcome import Fault, Outcome
from state_surgery import Case, operate

from tests.interrupted import STOPPED, Trap, finish, train

KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
# Before training begins there is nothing to save: the usual codes of a process that a signal ended.
ENDED_BY: dict[signal.Signals, set[int]] = {TERM: {STOPPED, -15, 143}, INT: {STOPPED, 130}, KILL: {-9}}
CAUSAL: dict[str, Any] = {
    "model": {"architecture": "gpt2", "attention_dropout": 0.1},
    "optimizer": {"name": "muon", "lr": 0.02},
    "schedule": {"kind": "wsd", "warmup": 2, "decay": "25%"},
}
KINDS: dict[str, dict[str, Any]] = {"masked": {}, "causal": CAUSAL}


class Tries:
    """Copies of a prepared run, each injured in its own way and compared with one that nothing interrupted."""

    def __init__(self, folder: Path, **sections: Mapping[str, Any]) -> None:
        self.prepared = tiny.make(folder / "prepared", **sections)
        self.whole = tiny.copy(self.prepared, folder / "whole")
        ended = train(self.whole, timeout=400)
        if ended.code != 0:
            raise ValueError(f"the run that nothing interrupts ended with code {ended.code}: {ended.output[-300:]}")
        self.folder = folder
        self.count = self.survived = self.lost = 0
        self.slowest = 0.0
        self.reason = ""

    def run(self) -> tiny.Run:
        """Another copy, not trained yet."""
        self.count += 1
        return tiny.copy(self.prepared, self.folder / f"try-{self.count}")

    def settle(self, what: object, reason: str) -> None:
        """Count a try as survived when there is no reason against it."""
        self.survived += not reason
        self.reason = self.reason or (f"{what}: {reason}" if reason else "")

    def outcome(self, note: str, lost: str = "") -> Outcome:
        """The table's cells."""
        text = f"{note}; first failure: {self.reason}" if self.reason else note
        return Outcome(self.count, self.survived, lost or f"at most {self.lost} steps", text)

    def cut(self, *traps: Trap, codes: Mapping[signal.Signals, set[int]] = ENDED_BY) -> None:
        """Interrupt a copy at each trap in turn, let it go on to its end, and compare."""
        run, reason = self.run(), ""
        for trap in traps:
            ended = train(run, trap, timeout=400)
            self.slowest = max(self.slowest, ended.seconds if trap.signal != KILL else 0.0)
            done = f"step-{self._steps():08d}" in ended.output  # the signal came when the run had ended
            if ended.code not in codes[trap.signal] and not (ended.code == 0 and done):
                reason = reason or f"code {ended.code}: {ended.output[-200:]}"
            self.lost = max(self.lost, _lost(run))
        ended = finish(run)
        if not reason and ended.code != 0:
            reason = f"going on ended with code {ended.code}: {ended.output[-200:]}"
        if not reason:
            reason = difference(run, self.whole)
        self.settle(" then ".join(map(str, traps)), reason)

    def _steps(self) -> int:
        return max(tiny.trace(self.whole).losses)


def difference(run: tiny.Run, whole: tiny.Run) -> str:
    """Why a run is not the other one, bit for bit; empty when it is. Each step stands once in its metrics."""
    if text := tiny.trace(run).difference(tiny.trace(whole)):
        return text
    ours, theirs = ([_unmeasured(line) for line in _metrics(one)] for one in (run, whole))
    return "" if ours == theirs else "metrics.jsonl has other lines"


def _metrics(run: tiny.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.directory / "train" / "metrics.jsonl").read_text().splitlines()]


def _unmeasured(line: dict[str, Any]) -> dict[str, Any]:
    measured = {"seconds", "tokens_per_second", "data_wait", "memory_gib"}
    return {key: value for key, value in line.items() if key not in measured}


def _lost(run: tiny.Run) -> int:
    """Steps that were logged and lie in no checkpoint."""
    path = run.directory / "train" / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    steps = [int(step) for step in re.findall(r'^\{"step": (\d+), "loss"', text, re.MULTILINE)]
    saved = [int(found.name[5:]) for found in run.checkpoints.glob("step-*")]
    return max(0, max(steps, default=0) - max(saved, default=0))


# --- row 10: stop signals -------------------------------------------------------------------------------------------


def signals_in(folder: Path, traps: Callable[[random.Random], Trap], tries: int, **sections: Any) -> Outcome:
    """Stop signals at random times of a phase."""
    generator = random.Random(10)
    all_tries = Tries(folder, **sections)
    for _ in range(tries):
        all_tries.cut(traps(generator))
    return all_tries.outcome(f"slowest end {all_tries.slowest:.1f} s after the signal")


def _which(generator: random.Random) -> signal.Signals:
    return generator.choice([TERM, INT])


def in_a_step(generator: random.Random) -> Trap:
    return Trap("micro", generator.randint(1, 16), _which(generator), generator.uniform(0, 0.01))


def in_a_save(generator: random.Random) -> Trap:
    return Trap("save", generator.randint(1, 4), _which(generator), generator.uniform(0, 0.01))


def in_an_evaluation(generator: random.Random) -> Trap:
    return Trap("evaluation", generator.randint(1, 3), _which(generator), generator.uniform(0, 0.005))


def in_the_start(generator: random.Random) -> Trap:
    return Trap("start", 1, _which(generator), generator.uniform(0, 0.3))


def in_the_compiler(generator: random.Random) -> Trap:
    return Trap("micro", 1, _which(generator), generator.uniform(0, 4))


def while_measured(folder: Path) -> Outcome:
    """The length of the run is found out while the signal comes: only what is trained must fit what was fixed."""
    generator = random.Random(10)
    schedule = {"warmup": "10%"}
    tries = Tries(folder, train={"steps": None, "minutes": 2e-3}, schedule=schedule)
    for number in range(10):
        run, reason = tries.run(), ""
        ended = train(run, Trap("measure", 1, _which(generator), generator.uniform(0, 0.2)))
        tries.slowest = max(tries.slowest, ended.seconds)
        again = finish(run)
        fixed = json.loads((run.directory / "train" / "budget.json").read_text())["steps"]
        if ended.code not in (STOPPED, 0) or again.code != 0:
            reason = f"codes {ended.code} and {again.code}: {again.output[-200:]}"
        else:
            whole = tiny.make(folder / f"counted-{number}", train={"steps": fixed}, schedule=schedule)
            reason = difference(run, whole) if train(whole).code == 0 else "the run of as many steps failed"
        tries.settle("measuring", reason)
    return tries.outcome(f"slowest end {tries.slowest:.1f} s after the signal")


# --- rows 17, 20, 23: exact -----------------------------------------------------------------------------------------


def cuts_in_an_epoch(folder: Path) -> Outcome:
    """Three to five cuts of any sort in each run, over the end of an epoch; every row counted."""
    generator = random.Random(17)
    places = [in_a_step, in_a_save, in_an_evaluation]
    outcomes = []
    for name, sections in KINDS.items():
        tries = Tries(folder / name, train={"steps": 8}, **sections)
        for _ in range(8):
            traps = [generator.choice(places)(generator) for _ in range(generator.randint(3, 5))]
            kinds = [generator.choice([KILL, TERM, INT]) for _ in traps]
            tries.cut(*(Trap(t.place, min(t.number, 4), kind, t.delay) for t, kind in zip(traps, kinds, strict=True)))
        outcomes.append(tries)
    first, second = outcomes
    note = "masked and causal, one packed source"
    reason = first.reason or second.reason
    return Outcome(
        first.count + second.count,
        first.survived + second.survived,
        f"at most {max(first.lost, second.lost)} steps",
        f"{note}; first failure: {reason}" if reason else note,
    )


def random_generators(folder: Path) -> Outcome:
    """Dropout and masks: exact after a cut, for each optimizer; a generator that is missing is an error."""
    count = survived = 0
    reason = ""
    for optimizer in ("adamw", "stable-adamw", "muon"):
        tries = Tries(folder / optimizer, optimizer={"name": optimizer, "lr": 0.01})
        tries.cut(Trap("step", 3))
        tries.cut(Trap("micro", 11, KILL))
        run = tries.run()
        train(run, Trap("step", 2))
        for found in run.checkpoints.glob("step-*"):
            operate(found, Case("without", "trainer.json", "rng"))
        ended = train(run)
        said = ended.code == 2 and "random state" in ended.output
        tries.settle("without torch's generator", "" if said else f"code {ended.code}: {ended.output[-200:]}")
        count, survived, reason = count + tries.count, survived + tries.survived, reason or tries.reason
    note = "dropout 0.1, masks; adamw, stable-adamw, muon"
    return Outcome(count, survived, "at most 2 steps", f"{note}; first failure: {reason}" if reason else note)


def cuts_in_an_accumulation(folder: Path) -> Outcome:
    """kill -9 before each micro-batch of the whole run."""
    tries = Tries(folder, train={"micro_batch": 2, "steps": 6})
    for number in range(1, 25):
        tries.cut(Trap("micro", number, KILL))
    return tries.outcome("4 micro-batches a step, killed before each of 24")


# --- rows 21, 22, 26 ------------------------------------------------------------------------------------------------

CHANGES = {
    "safe": "checkpoint.every=1 checkpoint.keep=1 evaluate.every=2 evaluate.max_tokens=256 log.every=2 data.workers=1 "
    "train.on_nonfinite=skip train.spike_sigma=6.0 train.stop_signals=[SIGUSR1] train.attention=eager "
    "export.dtype=bf16",
    "allow": "train.steps=10 train.tokens=2560 train.epochs=0.2 train.minutes=0.01 optimizer.lr=0.005 "
    "schedule.final=0.5 schedule.kind=linear schedule.warmup=5 optimizer.weight_decay=0.1 optimizer.betas=[0.8,0.9] "
    "optimizer.eps=1e-6 train.max_grad_norm=0.01 train.precision=bf16 model.hidden_dropout=0.3",
    "refused": "train.seed=4 train.batch_tokens=512 model.hidden_size=32 model.num_hidden_layers=2 model.norm_eps=1e-3 "
    "data.sequence_length=16 data.max_documents_per_row=3 data.text_field=body objective.rate=0.3 "
    "optimizer.name=stable-adamw tokenizer.vocab_size=256",
}


def changed_keys(folder: Path) -> Outcome:
    """Each key in a run that was stopped: what is declared happens, and no learning rate jumps unannounced."""
    tries = Tries(folder)
    stopped = tiny.copy(tries.prepared, folder / "stopped")
    train(stopped, Trap("step", 3))
    due = tiny.trace(tries.whole).rates
    for policy, overrides in CHANGES.items():
        for override in overrides.split():
            tries.count += 1
            run, key = tiny.copy(stopped, folder / f"changed-{tries.count}"), override.partition("=")[0]
            tries.settle(override, _changed(run, override, key, policy, due))
    note = ", ".join(f"{len(overrides.split())} {policy}" for policy, overrides in CHANGES.items())
    return tries.outcome(f"{note}; all keys by the table's test", "0")


def _changed(run: tiny.Run, override: str, key: str, policy: str, due: Mapping[int, float]) -> str:
    """Why the changed key did not do what is declared of it."""
    before = _digests(run)
    ended = train(run, None, override)
    if policy != "safe":
        if ended.code != 2 or f"{key}: " not in ended.output:
            return f"not refused: code {ended.code}"
        if _digests(run) != before:
            return "files were changed by a refusal"
        ended = train(run, None, override, "--allow-change", key)
        if policy == "refused":
            return "" if ended.code == 2 and "cannot change" in ended.output else f"allowed: code {ended.code}"
    if ended.code != 0 or f"{key}: " not in ended.output:
        return f"not taken, or not said: code {ended.code}: {ended.output[-200:]}"
    rates = tiny.trace(run).rates
    step = 4 if 4 in rates else min(rates.keys() - {1, 2, 3})  # with log.every not every step is there
    jumps = abs(rates[step] - due[step]) > 1e-12 * due[step]
    return "" if jumps == ("learning rate of step 4 jumps" in ended.output) else f"a rate of {rates[step]} unannounced"


def _digests(run: tiny.Run) -> dict[Path, tuple[str, int]]:
    files = (path for path in run.directory.rglob("*") if path.is_file() and path.name != "rows.jsonl")
    return {path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def other_micro_batches(folder: Path) -> Outcome:
    """The split of the batch changed at resume: the same rows, rates and dropout, losses and norms within rounding."""
    tries = Tries(folder, train={"micro_batch": 8})
    whole, worst = tiny.trace(tries.whole), 0.0
    for cut in (1, 3, 5):
        for micro_batch in (8, 4, 3, 1):
            run = tries.run()
            train(run, Trap("step", cut))
            ended = train(run, None, f"train.micro_batch={micro_batch}")
            made = tiny.trace(run) if ended.code == 0 else whole
            norms = [
                abs(ours["grad_norm"] / theirs["grad_norm"] - 1)
                for ours, theirs in zip(_metrics(run), _metrics(tries.whole), strict=True)
                if "loss" in ours
            ]
            gap = max([abs(made.losses[step] / whole.losses[step] - 1) for step in whole.losses])
            worst = max(worst, gap)
            ids = [{step: rows.rpartition(" ")[0] for step, rows in trace.rows.items()} for trace in (made, whole)]
            same = ended.code == 0 and made.rates == whole.rates and ids[0] == ids[1]
            reason = (
                "" if same and gap < 1e-6 and max(norms) < 1e-5 else f"code {ended.code}, losses differ by {gap:.1e}"
            )
            tries.settle(f"{micro_batch} rows from step {cut}", reason)
    return tries.outcome(f"8x1, 4x2, 3+3+2, 1x8 rows; losses within {worst:.0e}", "0")


def finished_runs(folder: Path) -> Outcome:
    """The same command three times more: nothing is trained, said so, exit code 0, no file touched."""
    count = survived = 0
    reason = ""
    for name, sections in KINDS.items():
        tries = Tries(folder / name, **sections)
        before = _digests(tries.whole)
        for _ in range(3):
            tries.count += 1
            ended = train(tries.whole)
            idle = ended.code == 0 and "finished already" in ended.output and _digests(tries.whole) == before
            tries.settle("again", "" if idle else f"code {ended.code}, or files changed")
        count, survived, reason = count + tries.count, survived + tries.survived, reason or tries.reason
    note = "bytes and times of every file compared"
    return Outcome(count, survived, "0", f"{note}; first failure: {reason}" if reason else note)


_STOPS = "saved and exit code 75, or nothing to save yet; exact"

FAULTS = [
    Fault("10", "stop signal in a step", _STOPS, lambda f: signals_in(f, in_a_step, 30)),
    Fault("10", "stop signal in a save", _STOPS, lambda f: signals_in(f, in_a_save, 20)),
    Fault("10", "stop signal in an evaluation", _STOPS, lambda f: signals_in(f, in_an_evaluation, 20)),
    Fault("10", "stop signal while it starts", _STOPS, lambda f: signals_in(f, in_the_start, 20)),
    Fault("10", "stop signal while the budget is measured", _STOPS, while_measured),
    Fault(
        "10",
        "stop signal while it compiles",
        _STOPS,
        lambda f: signals_in(f, in_the_compiler, 3, train={"compile": True, "steps": 4}),
    ),
    Fault("17", "three to five cuts in a run", "0 rows lost, 0 doubled, exact", cuts_in_an_epoch),
    Fault("20", "dropout and masks; a random generator missing", "exact; missing is an error", random_generators),
    Fault("21", "a changed key at resume", "safe, by leave or refused; no rate jumps unannounced", changed_keys),
    Fault("22", "another micro-batch at resume", "same rows, losses within 1e-6", other_micro_batches),
    Fault("23", "kill -9 inside an accumulation", "from the step's start, exact", cuts_in_an_accumulation),
    Fault("26", "a finished run again", "nothing trained, exit code 0, files unchanged", finished_runs),
]
