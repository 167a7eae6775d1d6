#!/usr/bin/env python
"""What pushing checkpoints beside the training costs a step, with a Hub that hangs, is dead, or works.

    python scripts/bench_publish.py --pairs 12 --server hang --out publish.json

Steps of a small GPT-2 are timed in windows of half a minute, by turns without and with: at the begin of every second
window a checkpoint is put aside and the process that sends it is started, as after a save (`checkpoint.publish`), and
as often as it ever is. A window is the mean of some medians of its steps; the result is the median over pairs of
windows of the one over the other, so that a machine whose speed drifts slows both.

Also timed: `take`, which the thread that saves calls, `look`, which the loop calls at every step, and the processor's
time that the process took (at the lowest priority): over the seconds between two saves and the cores, that is the most
that a push can take from a machine that has nothing idle.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SERVER = """
import sys, time
from pathlib import Path
from tests.local_hub import Fault, LocalHub
hub = LocalHub(Path(sys.argv[1])).start()
if sys.argv[2] == "hang":
    hub.faults.add(Fault("hang", times=None))
print(hub.url, flush=True)
time.sleep(10**6)
"""


def main() -> None:
    """Measure, and print a line for each pair."""
    parser = argparse.ArgumentParser(description="What pushing checkpoints costs a step.")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--parts", type=int, default=5, help="of a window, each of about 6 s")
    parser.add_argument("--server", choices=("hang", "dead", "works"), default="hang")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", SERVER, str(Path(folder) / "hub"), given.server]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9" if given.server == "dead" else url
            found = measure(Path(folder), given)
        finally:
            server.kill()
            server.wait()
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=2) + "\n")


def measure(folder: Path, given: argparse.Namespace) -> dict[str, object]:
    """The pairs and their medians."""
    import torch
    from rich.console import Console

    from pretrain.publishing.background import Publisher, Target
    from pretrain.train import build_trainer
    from pretrain.training.checkpoint import checkpoint_path
    from pretrain.training.progress import Progress
    from tests.gpu.synthetic import make_run
    from tests.local_hub import WRITER

    os.environ |= {"HF_TOKEN": WRITER, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home")}
    torch.set_num_threads(given.threads)
    config = make_run(
        folder / "runs",
        model={"hidden_size": given.hidden, "num_hidden_layers": 4, "num_attention_heads": 4},
        train={"steps": 1000, "batch_tokens": 1024, "micro_batch": 8, "precision": "fp32"},
    )
    trainer = build_trainer(config, console=Console(quiet=True))
    trainer.saver.save(Progress(run_id="bench", total_steps=1000, step=1))
    saved = checkpoint_path(trainer.directory, 1)
    publisher = Publisher(trainer.directory / "publish", Target("local/bench"), None, 1.0, lambda line: None)
    ratios, takes, looks, processors = [], [], [], []
    trainer.measure_step()
    for number in range(given.pairs):
        seconds = {}
        for pushed in (False, True) if number % 2 else (True, False):
            if pushed:
                started = time.perf_counter()
                publisher.take(saved, step=1, tokens=2048, run_id="bench", total_steps=1)
                takes.append(time.perf_counter() - started)
                started = time.perf_counter()
                for _ in range(1000):
                    publisher.look()
                looks.append((time.perf_counter() - started) / 1000)
            seconds[pushed] = statistics.fmean(trainer.measure_step() for _ in range(given.parts))
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            publisher.give_up()
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if pushed:
                processors.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        ratios.append(seconds[True] / seconds[False])
        sys.stderr.write(f"{1e3 * seconds[False]:.1f} ms, {1e3 * seconds[True]:.1f} ms, ratio {ratios[-1]:.4f}\n")
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "server": given.server,
        "pairs": given.pairs,
        "threads": given.threads,
        "model_bytes": (saved / "model" / "model.safetensors").stat().st_size,
        "ratio": {"median": middle, "quartiles": [low, high]},
        "take_seconds": {"median": statistics.median(takes), "worst": max(takes)},
        "processor_seconds_of_a_push": statistics.median(processors),
        "look_microseconds": 1e6 * statistics.median(looks),
    }


if __name__ == "__main__":
    main()
