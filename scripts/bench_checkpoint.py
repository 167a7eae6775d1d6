#!/usr/bin/env python
"""What a save costs: how long training waits, against a bare copy of the same bytes, and how long the rest takes.

    python scripts/bench_checkpoint.py --gigabytes 1 --out checkpoint.json
    torchrun --nproc_per_node 2 scripts/bench_checkpoint.py --gigabytes 1            # DDP, the first process writes
    torchrun --nproc_per_node 2 scripts/bench_checkpoint.py --gigabytes 1 --sharded  # DDP, each writes its share

A real run is made (a GPT-2 shape with AdamW, one update), and saved again and again. A round is a bare copy of every
tensor that this process saves into memory that was allocated and touched before; then a save beside the training, of
which the wait (`stall`) and the rest in the background are timed; then a save that training waits for. Rounds take
turns, so that a machine whose speed drifts slows all three. The first save allocates its buffers and is shown apart.
With several processes a time is that of the slowest one. Files go to `--folder`, on whose disk the rest depends.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pretrain.config import RunConfig, config_from_dict, config_to_dict  # noqa: E402
from pretrain.runtime import describe_machine  # noqa: E402
from pretrain.train import build_trainer  # noqa: E402
from pretrain.training.engines.job import close_job  # noqa: E402
from pretrain.training.progress import Progress  # noqa: E402
from pretrain.training.snapshots import KeptBuffers  # noqa: E402
from pretrain.training.trainer import Trainer  # noqa: E402
from tests.gpu.synthetic import make_run  # noqa: E402

_HIDDEN = 512
_VOCABULARY = 8192
_BYTES_A_PARAMETER = 12  # the weight and AdamW's two moments, fp32
_READY = "ready.json"


def prepared(folder: Path, gigabytes: float, *, sharded: bool) -> RunConfig:
    """The run, made by the first process."""
    if int(os.environ.get("RANK", 0)) == 0:
        layers = max(1, round((gigabytes * 1e9 / _BYTES_A_PARAMETER - _VOCABULARY * _HIDDEN) / (12 * _HIDDEN**2)))
        config = make_run(
            folder / "runs",
            vocab_size=_VOCABULARY,
            data={"sequence_length": 128},
            model={"hidden_size": _HIDDEN, "num_hidden_layers": layers, "num_attention_heads": 8},
            train={"steps": 10**6, "batch_tokens": 1024, "micro_batch": 1, "precision": "fp32"},
            checkpoint={"keep": 1, "every": 10, "shard_above_bytes": 1 if sharded else 10**15},
        )
        (folder / "config.json").write_text(json.dumps(config_to_dict(config)))
        (folder / "config.json").rename(folder / _READY)
    while not (folder / _READY).is_file():
        time.sleep(0.1)
    return config_from_dict(json.loads((folder / _READY).read_text()))


def make_state(trainer: Trainer) -> None:
    """One update, so that the optimizer has its moments."""
    torch.manual_seed(0)
    for parameter in trainer.engine.bare.parameters():
        parameter.grad = torch.randn_like(parameter)
    trainer.engine.optimizer.step()
    trainer.engine.drop()


class Stopwatch:
    """Times of the slowest process."""

    def __init__(self, trainer: Trainer) -> None:
        self._ranks = trainer.ranks
        self._device = trainer.device

    def __call__(self, function: Callable[[], object]) -> float:
        """Seconds of a call that all processes make together."""
        self._ranks.barrier()
        self._synchronize()
        started = time.perf_counter()
        function()
        self._synchronize()
        return float(max(self._ranks.gather(time.perf_counter() - started)))

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def measure(trainer: Trainer, rounds: int) -> dict[str, Any]:
    """Rounds of copy, save beside the training, save that training waits for."""
    saver, timed = trainer.saver, Stopwatch(trainer)
    progress = Progress(run_id="bench", total_steps=10**6)
    snapshot = saver._snapshots.take(copied=False)
    own = [tensor for tensor in snapshot.weights.values() if tensor.device.type != "meta"]
    own += snapshot.optimizer.tensors.values()
    live = {str(number): tensor for number, tensor in enumerate(own)}
    bare = KeptBuffers(locked=trainer.device.type == "cuda")

    def copy() -> None:
        for name, tensor in live.items():
            bare.copy(name, tensor)

    def save(*, last: bool) -> None:
        progress.step += 1
        assert saver.save(progress, last=last) is not None

    copy()
    first = timed(lambda: save(last=False))
    assert saver.wait()
    found: dict[str, list[float]] = {"copy": [], "stall": [], "background": [], "synchronous": []}
    for _ in range(rounds):
        found["copy"].append(timed(copy))
        found["stall"].append(timed(lambda: save(last=False)))
        found["background"].append(timed(saver.wait))
        found["synchronous"].append(timed(lambda: save(last=True)))
    ratios = [stall / copy for stall, copy in zip(found["stall"], found["copy"], strict=True)]
    sizes = trainer.ranks.gather(bare.nbytes)
    total = sum(sizes)
    return {
        "processes": trainer.ranks.world,
        "strategy": trainer.engine.name,
        "bytes": total,
        "bytes_of_the_largest_share": max(sizes),
        "first_stall": first,
        **{name: statistics.median(times) for name, times in found.items()},
        "ratio": statistics.median(ratios),
        "worst_ratio": max(ratios),
        "background_gigabytes_a_second": total / 1e9 / statistics.median(found["background"]),
        "times": found,
        "machine": describe_machine(trainer.device),
    }


def show(found: dict[str, Any], console: Console) -> None:
    """The numbers for people."""
    table = Table("what", "seconds", "note")
    note = f"{found['bytes'] / 1e9:.2f} GB, the largest share {found['bytes_of_the_largest_share'] / 1e9:.2f} GB"
    table.add_row("bare copy", f"{found['copy']:.3f}", note)
    table.add_row(
        "stall", f"{found['stall']:.3f}", f"{found['ratio']:.2f}x the copy (worst {found['worst_ratio']:.2f}x)"
    )
    table.add_row("stall of the first save", f"{found['first_stall']:.3f}", "allocates the buffers")
    rate = f"{found['background_gigabytes_a_second']:.2f} GB/s"
    table.add_row("background, after the stall", f"{found['background']:.3f}", f"{rate}: hash, write, flush, publish")
    table.add_row("synchronous save", f"{found['synchronous']:.3f}", f"{found['strategy']} x {found['processes']}")
    console.print(table)


def main() -> None:
    """Run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.6, help="weights and state together")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sharded", action="store_true", help="each process writes its share")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    arguments = parser.parse_args()
    folder = arguments.folder / f"bench-checkpoint-{os.environ.get('MASTER_PORT', os.getpid())}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        config = prepared(folder, arguments.gigabytes, sharded=arguments.sharded)
        trainer = build_trainer(config, evaluators={}, console=Console(quiet=True))
        make_state(trainer)
        found = measure(trainer, arguments.rounds)
        trainer.saver.close()
        if trainer.ranks.main:
            show(found, Console())
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(found, indent=2) + "\n")
        trainer.ranks.barrier()
        close_job()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
