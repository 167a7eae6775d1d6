"""Tiny prepared runs to injure, the command that trains them, and what an uninterrupted run of them gives.

What lives here: making a run of synthetic tokens without text tools or network, running `pretrain` on it in a process
of its own, and the trace that a run leaves (loss, learning rate and rows of each step, the final weights' hash). What
must not: any fault.

    run = tiny.make(folder)                     # tokenizer and shards; 8 steps, a save every 2
    ended = tiny.train(run)                     # `pretrain train CONFIG`, as a user types it
    tiny.trace(run) == tiny.oracle(folder)      # bit for bit

A run of this file itself is the `pretrain` command with a record of the rows that each step saw (`rows.jsonl` in the
run's directory): `python scripts/faults/tiny.py train CONFIG`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# What a resumed run must draw again is switched on: dropout and masks, both from the seed and the row. Attention
# dropout alone draws from torch's generator: runs that are about it set it.
SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"sequence_length": 32},
    "model": {
        "architecture": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "hidden_dropout": 0.1,
    },
    "objective": {"kind": "mlm"},
    "optimizer": {"name": "adamw", "lr": 1e-2},
    "schedule": {"kind": "cosine", "warmup": 2},
    "train": {"steps": 8, "batch_tokens": 256, "micro_batch": 4, "precision": "fp32", "seed": 3},
    "checkpoint": {"every": 2, "keep": 2},
    "evaluate": {"every": 4, "max_tokens": 512},
    "log": {"to": ["jsonl"]},
}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Run:
    """A prepared run: its YAML file, and where its artifacts lie."""

    config: Path
    directory: Path

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints lie."""
        return self.directory / "train" / "checkpoints"


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (negative: the signal), everything that it said, and how long it took."""

    code: int
    output: str
    seconds: float


@dataclass(frozen=True)
class Trace:
    """What an exact resume must reproduce. `losses` and `rates` by step; `rows` only of commands that record them."""

    losses: dict[int, float]
    rates: dict[int, float]
    weights: str
    rows: dict[int, str]

    def difference(self, other: Trace) -> str:
        """The first difference, in words; empty when there is none. Rows are compared where both recorded them."""
        for name in ("losses", "rates"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for step in sorted({*mine, *theirs}):
                if mine.get(step) != theirs.get(step):
                    return f"{name} at step {step}: {mine.get(step)} against {theirs.get(step)}"
        for step in sorted({*self.rows} & {*other.rows}):
            if self.rows[step] != other.rows[step]:
                return f"rows of step {step} differ"
        return "" if self.weights == other.weights else "the final weights differ"


def make(folder: Path, *, name: str = "tiny", tokens: int = 20_000, **sections: Mapping[str, Any]) -> Run:
    """Write tokenizer, shards and config of a run under `folder`; `sections` change `SECTIONS` key by key."""
    from pretrain.config import dump_config
    from tests.gpu.synthetic import make_run

    merged = {section: {**keys, **sections.get(section, {})} for section, keys in SECTIONS.items()}
    if merged["model"]["architecture"] not in ("bert", "modernbert") and "objective" not in sections:
        merged["objective"] = {"kind": "causal"}
    made = make_run(folder / "runs", tokens=tokens, vocab_size=128, **merged)
    config = made.model_copy(update={"name": name})
    made.directory.rename(config.directory)
    path = folder / f"{name}.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return Run(path, config.directory)


def copy(run: Run, folder: Path) -> Run:
    """The run as it stands, under another folder: config, artifacts and all."""
    folder.mkdir(parents=True, exist_ok=True)
    directory = folder / "runs" / run.directory.name
    shutil.copytree(run.directory, directory, symlinks=True)
    path = folder / run.config.name
    text = run.config.read_text(encoding="utf-8")
    path.write_text(text.replace(str(run.directory.parent), str(directory.parent)), encoding="utf-8")
    return Run(path, directory)


def command(run: Run, *overrides: str, verb: str = "train", recorded: bool = False) -> list[str]:
    """The command line, as a user types it; `recorded` adds the record of rows."""
    program = [str(Path(__file__).resolve())] if recorded else ["-m", "pretrain"]
    return [sys.executable, *program, verb, str(run.config), *overrides]


def start(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command with its own process group; what it says comes out of `stdout`."""
    return subprocess.Popen(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env={**os.environ, **ENVIRONMENT, **(environment or {})},
        start_new_session=True,
    )


def execute(command: Sequence[str], *, environment: Mapping[str, str] | None = None, timeout: float = 300) -> Ended:
    """Run a command to its end."""
    started = time.perf_counter()
    process = start(command, environment=environment)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        output += f"\n(killed after {timeout:.0f} s)"
    return Ended(process.returncode, output, time.perf_counter() - started)


def train(run: Run, *overrides: str, recorded: bool = True, timeout: float = 300) -> Ended:
    """`pretrain train` on the run, in a process of its own."""
    return execute(command(run, *overrides, recorded=recorded), timeout=timeout)


def oracle(folder: Path, **sections: Mapping[str, Any]) -> Trace:
    """The trace of the same run (the same `sections`), never interrupted."""
    run = make(folder, **sections)
    ended = train(run)
    assert ended.code == 0, ended.output
    return trace(run)


def trace(run: Run) -> Trace:
    """What the run left behind. A step that was trained twice must have given the same both times.

    Raises:
        ValueError: when it did not, or when nothing is there.
    """
    losses: dict[int, float] = {}
    rates: dict[int, float] = {}
    for entry in _lines(run.directory / "train" / "metrics.jsonl"):
        if "loss" in entry:
            losses[entry["step"]], rates[entry["step"]] = entry["loss"], entry["lr"]
    rows: dict[int, str] = {}
    for entry in _lines(run.directory / "rows.jsonl"):
        if rows.setdefault(entry["step"], entry["rows"]) != entry["rows"]:
            raise ValueError(f"step {entry['step']} saw other rows when it was trained again")
    return Trace(losses, rates, weights(run), rows)


def weights(run: Run, step: int | None = None) -> str:
    """SHA-256 of a checkpoint's weights; of the last one when no step is given."""
    found = sorted(run.checkpoints.glob("step-*" if step is None else f"step-{step:08d}"))
    if not found:
        raise ValueError(f"no checkpoint in {run.checkpoints}")
    return hashlib.sha256((found[-1] / "model" / "model.safetensors").read_bytes()).hexdigest()


def _lines(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON; one that a kill cut off is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def record_rows() -> None:
    """Let every training step of this process append the rows and inputs that it used to `rows.jsonl`."""
    from pretrain.training.trainer import Trainer

    original = Trainer._step

    def step(self: Trainer, progress: Any, micro_batches: Sequence[Any], *rest: Any) -> Any:
        number = progress.step + 1
        result = original(self, progress, micro_batches, *rest)
        digest = hashlib.sha256()
        for batch in micro_batches:
            digest.update(batch.row_ids.tobytes())
            for name in sorted(batch.arrays):
                digest.update(batch.arrays[name].tobytes())
        ids = [str(row) for batch in micro_batches for row in batch.row_ids.tolist()]
        line = {"step": number, "rows": f"{' '.join(ids)} {digest.hexdigest()}"}
        with (self.directory.parent / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return result

    Trainer._step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    from pretrain.cli import main

    record_rows()
    main()
