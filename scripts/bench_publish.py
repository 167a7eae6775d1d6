#!/usr/bin/env python
"""What pushing checkpoints beside the training costs a step, with a Hub that hangs, is dead, or works.

    python scripts/bench_publish.py --steps 400 --server hang --out publish.json      # what the trainer's thread does
    python scripts/bench_publish.py --pairs 12 --server hang --out publish.json       # what the machine feels

With `--steps` a whole run trains, saving every 20 steps and pushing each save, and every call of the hook is measured
in the thread that makes it: by the clock, and by the processor's time of that thread, which a busy machine hardly
lengthens. The result is the hook's share of the training thread's own time (the bar: below 2%), and apart from it that
of the thread that saves. Nothing is compared with another run, so little noise remains. What the process beside takes
from a machine that has no idle core is in neither: that is the processor's seconds of a push, and `--pairs`.

With `--pairs`, two ways of running are compared by the clock.

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
import threading
import time
from pathlib import Path
from typing import Any

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
    parser.add_argument(
        "--steps", type=int, help="measure the hook itself in a run of so many steps, in place of pairs"
    )
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
            found = measure_hook(Path(folder), given) if given.steps else measure(Path(folder), given)
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


class Watched:
    """A publisher whose calls are timed: by thread, in seconds of the clock and of the processor."""

    def __init__(self, publisher: Any) -> None:
        self.publisher = publisher
        self.calls: dict[tuple[str, bool], list[tuple[float, float]]] = {}

    def _timed(self, name: str, *arguments: Any, **keys: Any) -> Any:
        own = threading.current_thread() is threading.main_thread()
        clock, processor = time.perf_counter(), time.thread_time()
        try:
            return getattr(self.publisher, name)(*arguments, **keys)
        finally:
            spent = time.perf_counter() - clock, time.thread_time() - processor
            self.calls.setdefault((name, own), []).append(spent)

    def look(self) -> None:
        """As the publisher's."""
        self._timed("look")

    def take(self, *arguments: Any, **keys: Any) -> None:
        """As the publisher's."""
        self._timed("take", *arguments, **keys)

    def give_up(self) -> list[str]:
        """As the publisher's."""
        return list(self.publisher.give_up())

    def spent(self, name: str, *, own: bool) -> dict[str, float]:
        """How often it was called in the training thread, or in another one, and what that took together."""
        found = self.calls.get((name, own), [])
        return {
            "calls": len(found),
            "seconds": sum(clock for clock, _ in found),
            "worst_seconds": max((clock for clock, _ in found), default=0.0),
            "processor_seconds": sum(processor for _, processor in found),
        }


def measure_hook(folder: Path, given: argparse.Namespace) -> dict[str, object]:
    """What a run's own threads spend in the hook."""
    import torch
    from rich.console import Console

    from pretrain.publishing.background import Publisher, Target
    from pretrain.train import build_trainer
    from tests.gpu.synthetic import make_run
    from tests.local_hub import WRITER

    os.environ |= {"HF_TOKEN": WRITER, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home")}
    torch.set_num_threads(given.threads)
    config = make_run(
        folder / "runs",
        model={"hidden_size": given.hidden, "num_hidden_layers": 4, "num_attention_heads": 4},
        train={"steps": given.steps, "batch_tokens": 1024, "micro_batch": 8, "precision": "fp32"},
        checkpoint={"every": 20, "keep": 2},
        evaluate={"every": given.steps, "max_tokens": 1024},
    )
    trainer = build_trainer(config, console=Console(quiet=True))
    publisher = Publisher(trainer.directory / "publish", Target("local/bench"), None, 1.0, lambda line: None)
    watched = Watched(publisher)
    trainer.saver.publisher = watched  # type: ignore[assignment]
    clock, processor = time.perf_counter(), time.thread_time()
    trainer.train()
    clock, processor = time.perf_counter() - clock, time.thread_time() - processor
    trainer.saver.close()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    publisher.give_up()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = [watched.spent(name, own=True) for name in ("look", "take")]
    return {
        "server": given.server,
        "steps": given.steps,
        "threads": given.threads,
        "training_thread": {
            "seconds": clock,
            "processor_seconds": processor,
            "look": own[0],
            "take": own[1],
            "percent_of_the_clock": 100 * sum(one["seconds"] for one in own) / clock,
            "percent_of_its_processor_time": 100 * sum(one["processor_seconds"] for one in own) / processor,
        },
        "saving_thread": {"take": watched.spent("take", own=False)},
        "processor_seconds_of_all_pushes": after.ru_utime + after.ru_stime,
        "processor_seconds_of_the_last_push": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


if __name__ == "__main__":
    main()
