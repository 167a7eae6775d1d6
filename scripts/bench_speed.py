#!/usr/bin/env python
"""Tokens a second beside transformers' Trainer: the same shape, weights, batches, optimizer and schedule on both sides.

    python scripts/bench_speed.py --out speed.json              # all four architectures, fp32 and bf16
    python scripts/bench_speed.py --architectures gpt2 --precisions bf16 --rounds 6

The peer is transformers' Trainer with the stock class, dropout 0, sdpa attention, fused AdamW, as people run it. Ours
is `pretrain`'s Trainer with the Loom class that holds the same weights, and what `pretrain train` sets besides:
attention backend and allocator. Each side lives in a process of its own and trains in windows that take turns (peer,
ours, peer, ours, ...), so that a machine whose speed drifts slows both. Rows are full and unpadded, and lie in memory.

What both sides are stands in `side_by_side.py`; `tests/test_equality_with_trainer.py` shows that their losses agree.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from side_by_side import ARCHITECTURES, Shape, make_rows, our_model, our_trainer, peer_trainer, run_config, stock_model
from transformers import TrainerCallback

from pretrain.files import replace_file
from pretrain.runtime import describe_machine, keep_freed_memory

PRECISIONS = ("fp32", "bf16")
_BATCHES_IN_MEMORY = 16
_WARMUP_STEPS = 3
_QUIET = 0.12  # cores that other processes may use before a window counts as disturbed


# --- a side in its own process --------------------------------------------------------------------------------------


class Windows:
    """Called after every step: answers a request for a window of seconds on stdin with its step times on stdout."""

    def __init__(self) -> None:
        self.left = _WARMUP_STEPS
        self.until: float | None = None
        self.times: list[float] = []
        self.own = self.busy = 0.0
        self.started = self.last = time.perf_counter()

    def __call__(self) -> None:
        """Note a step; at the end of a window answer, and wait for the next request."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.left:
            self.left -= 1
            if self.left == 0:
                self._answer({"ready": True})
            return
        self.times.append(now - self.last)
        self.last = now
        if self.until is not None and now >= self.until:
            seconds = now - self.started
            others = (_busy_seconds() - self.busy - (time.process_time() - self.own)) / seconds
            self._answer({"times": self.times, "others": max(0.0, others)})

    def _answer(self, answer: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        request = sys.stdin.readline()
        if not request.strip():
            raise SystemExit
        self.times, self.own, self.busy = [], time.process_time(), _busy_seconds()
        self.started = self.last = time.perf_counter()
        self.until = self.started + float(request)


def _busy_seconds() -> float:
    """Processor seconds that all processes of this machine have used, by Linux's count; 0 elsewhere."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    user, nice, system = stat.read_text().split("\n", 1)[0].split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


class _StepCallback(TrainerCallback):
    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.windows()


def run_side(side: str, architecture: str, precision: str, shape: Shape) -> None:
    """Train until stdin ends, window by window."""
    run = run_config(architecture, shape, steps=1_000_000, precision=precision, lr=1e-3, warmup="5%", log=[])
    rows = make_rows(architecture, shape, _BATCHES_IN_MEMORY * shape.rows)
    stock = stock_model(architecture, shape)
    windows = Windows()
    with tempfile.TemporaryDirectory() as folder:
        if side == "peer":
            peer = peer_trainer(stock, rows, run, Path(folder))
            peer.add_callback(_StepCallback(windows))
            peer.train()
        else:
            keep_freed_memory()
            ours = our_trainer(our_model(stock), rows, run, Path(folder), Console(stderr=True, quiet=True))
            ours.on_step = windows
            ours.train()


# --- the race -------------------------------------------------------------------------------------------------------


def race(
    architecture: str, precision: str, shape: Shape, *, rounds: int, seconds: float, threads: int
) -> dict[str, Any]:
    """Windows of both sides in turn; tokens a second by the median step, and the ratio of each round."""
    tokens = shape.rows * shape.length
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    sides: dict[str, subprocess.Popen[str]] = {}
    speeds: dict[str, list[float]] = {"peer": [], "ours": []}
    others: list[float] = []
    try:
        for side in speeds:  # one after the other, so that no warm-up disturbs the other side
            command = [sys.executable, __file__, "--side", side, "--architectures", architecture]
            command += ["--precisions", precision, "--shape", json.dumps(asdict(shape))]
            sides[side] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            _read(sides[side])
        for _ in range(rounds):
            for side, process in sides.items():
                assert process.stdin is not None
                process.stdin.write(f"{seconds}\n")
                process.stdin.flush()
                answer = _read(process)
                speeds[side].append(tokens / statistics.median(answer["times"]))
                others.append(answer["others"])
    finally:
        for process in sides.values():
            _end(process)
    ratios = [ours / peer for peer, ours in zip(speeds["peer"], speeds["ours"], strict=True)]
    return {
        "architecture": architecture,
        "precision": precision,
        "peer_tokens_per_second": speeds["peer"],
        "ours_tokens_per_second": speeds["ours"],
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "others_cores": others,
    }


def _end(process: subprocess.Popen[str]) -> None:
    """Let a side end by itself, which it does between two steps when nobody asks for more."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _read(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of JSON that a side prints; libraries may print lines of their own before it."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            answer: dict[str, Any] = json.loads(line)
            return answer
    raise RuntimeError(f"a side of the race ended early with exit code {process.wait()}; see its message above")


def show(results: list[dict[str, Any]], console: Console) -> None:
    """One line a race: median tokens a second of both sides, the ratio of each round, and disturbances."""
    table = Table(title="tokens/s: transformers' Trainer and ours, windows in turn")
    for column in ("architecture", "precision", "peer", "ours", "ratio", "rounds", "others, cores"):
        table.add_column(column, justify="left" if column in ("architecture", "precision") else "right")
    for result in results:
        peer, ours = (statistics.median(result[f"{side}_tokens_per_second"]) for side in ("peer", "ours"))
        worst = max(result["others_cores"])
        table.add_row(
            result["architecture"],
            result["precision"],
            f"{peer:,.0f}",
            f"{ours:,.0f}",
            f"{result['ratio']:.2f}",
            " ".join(f"{ratio:.2f}" for ratio in result["ratios"]),
            f"{worst:.2f}" + ("  disturbed" if worst > _QUIET else ""),
        )
    console.print(table)


def main() -> None:
    """Race the chosen architectures and precisions, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=4, help="windows of each side")
    parser.add_argument("--seconds", type=float, default=12.0, help="a window")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    parser.add_argument("--shape", type=json.loads, default={}, help="sizes as JSON, for a quick try")
    parser.add_argument("--side", choices=("peer", "ours"), help="be one side of a race (it starts them itself)")
    options = parser.parse_args()
    shape = Shape(**options.shape)
    if options.side:
        run_side(options.side, options.architectures[0], options.precisions[0], shape)
        return
    console = Console()
    results = []
    for architecture in options.architectures:
        for precision in options.precisions:
            console.print(f"{architecture} {precision} ...", highlight=False)
            pace = {"rounds": options.rounds, "seconds": options.seconds, "threads": options.threads}
            results.append(race(architecture, precision, shape, **pace))
    show(results, console)
    if options.out is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        facts = {
            "machine": describe_machine(device),
            "threads": options.threads,
            "transformers": transformers.__version__,
            "shape": asdict(shape),
            "seconds_a_window": options.seconds,
            "results": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(options.out, (json.dumps(facts, indent=2) + "\n").encode())
        console.print(f"figures in {options.out}", highlight=False)


if __name__ == "__main__":
    main()
