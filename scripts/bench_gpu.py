"""Training speed on one GPU: tokens/s, MFU and memory of the shipped shapes, packed rows, bf16, through the trainer.

    python scripts/bench_gpu.py --out speed.json [--budget SECONDS] [--steps N]

MFU = (6 x multiplied parameters + 12 L T d) x tokens/s over the device's dense peak. The median of the steps after the
first five is reported. Each case is run eager and compiled, one shape by every
engine with one process, and cases are left out, by name, when the budget is spent.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.config import load_config
from pretrain.train import build_trainer
from tests.gpu.synthetic import make_run

# name of a shipped run, rows a forward pass, rows a step
CASES = (("gpt2-small", 32, 64), ("modernbert-base", 32, 64), ("bert-base", 64, 128), ("llama-350m", 8, 16))
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def measure(
    name: str, micro_batch: int, rows: int, *, compiled: bool, steps: int, strategy: str = "single"
) -> dict[str, Any]:
    """Train some steps of a shipped shape on synthetic tokens; numbers of the median step."""
    shipped = load_config(name)
    length = shipped.data.sequence_length
    vocab_size = shipped.tokenizer.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        config = make_run(
            Path(folder),
            tokens=400_000,
            vocab_size=vocab_size,
            data={"sequence_length": length},
            model={"architecture": shipped.model.architecture},
            objective=shipped.objective.model_dump(include={"kind", "rate"} if shipped.kind == "encoder" else {"kind"}),
            optimizer={"name": shipped.optimizer.name, "lr": 1e-4},
            train={
                "steps": steps,
                "batch_tokens": rows * length,
                "micro_batch": micro_batch,
                "precision": "bf16",
                "compile": compiled,
                "strategy": strategy,
            },
            checkpoint={"every": 10**9},
        )
        # Unsized in the shipped file: the published base model.
        config = config.model_copy(update={"model": shipped.model})
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        trainer = build_trainer(config, evaluators={})
        trainer.train()
        lines = [json.loads(line) for line in (config.directory / "train" / "metrics.jsonl").read_text().splitlines()]
    settled = lines[5:]
    return {
        "run": name,
        "compiled": compiled,
        "strategy": strategy,
        "parameters": sum(math.prod(shape.shape) for shape in trainer.engine.shapes().values()),
        "sequence_length": length,
        "micro_batch": micro_batch,
        "batch_tokens": rows * length,
        "attention": trainer.engine.bare.config._attn_implementation,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in settled),
        "mfu": statistics.median(line.get("mfu", float("nan")) for line in settled),
        "data_wait": statistics.median(line["data_wait"] for line in settled),
        "memory_gib": settled[-1]["memory_gib"],
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        "seconds": time.perf_counter() - started,
    }


def main() -> int:
    """Run every case that the budget allows; print a table; write JSON after each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=500.0, help="seconds in all")
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    began = time.perf_counter()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit or os.environ.get("GIT_COMMIT", ""),
        "cases": [],
        "left_out": [],
    }
    cases = [(*case, compiled, "single") for compiled in (True, False) for case in CASES]
    cases += [(*CASES[0], False, strategy) for strategy in ENGINES]
    for name, micro_batch, rows, compiled, strategy in cases:
        label = f"{name}, {'compiled' if compiled else 'eager'}, {strategy}"
        if time.perf_counter() - began > arguments.budget * 0.8:
            report["left_out"].append(label)
            continue
        try:
            case = measure(name, micro_batch, rows, compiled=compiled, steps=arguments.steps, strategy=strategy)
        except (torch.OutOfMemoryError, ImportError, ValueError) as error:
            case = {"run": name, "compiled": compiled, "strategy": strategy, "error": str(error)}
        report["cases"].append(case)
        speed, mfu = case.get("tokens_per_second", 0.0), case.get("mfu", 0.0)
        sys.stdout.write(f"{label:36} {speed:12,.0f} tokens/s  MFU {mfu:.3f}  {case.get('memory_gib', 0):.1f} GiB\n")
        sys.stdout.flush()
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
