"""What each process of tests/training/test_ranks_guard.py runs: runs that one rank injures, one after the other.

Called as `python ranks_job.py OUT.json FOLDER SCENARIO...`; rank 0 writes what every rank found.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from test_guard import Poisoned, skipped
from test_trainer import RaggedData, Rows, Store, config, lines

from pretrain.training import pending
from pretrain.training.engines.job import close_job
from pretrain.training.guard import NonFiniteError
from pretrain.training.optim import build_optimizer
from pretrain.training.replicas import ReplicasDifferError
from pretrain.training.trainer import Trainer

BAD_STEP, BAD_ROW = 2, 4  # batch from 0; the first row of rank 1


class OneBadRow(Poisoned):
    """NaN in the micro-batch that begins with one row of one step."""

    def __init__(self, *, bad: bool = True) -> None:
        super().__init__({})
        if bad:
            self.factors = {tuple(RaggedData().batch(BAD_STEP).arrays["input_ids"][BAD_ROW]): math.nan}


def make(folder: Path, model: Poisoned, *, data: Any = None, **sections: Any) -> Trainer:
    """A trainer of 12 steps of eight rows; one process makes two micro-batches of them, two make one each."""
    train = {"steps": 12, "micro_batch": 4, "on_nonfinite": "skip", **sections.pop("train", {})}
    configuration = config(folder, train=train, evaluate={"every": 100}, **sections)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Trainer(
        configuration,
        model=model,
        data=data or RaggedData(),
        optimizer=build_optimizer(model, configuration.optimizer),
        store=Store(),
        console=Console(file=StringIO(), width=80),
    )


def found_of(made: Trainer, error: str = "") -> dict[str, Any]:
    """What a run left behind: whole weights, whether all is finite, and its logs. All ranks call it."""
    whole = {name: made.engine.parameter(name).tolist() for name in made.engine.names()}
    tensors = [tensor for name in made.engine.names() for tensor in made.engine.state(name).values()]
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
    logged = [(line["step"], repr(line["loss"]), line.get("skipped")) for line in lines(made.directory)]
    return {
        "error": error,
        "finite": finite and all(math.isfinite(v) for w in whole.values() for v in torch.tensor(w).flatten().tolist()),
        "weights": whole,
        "logged": logged,
        "skipped": skipped(made.directory) if (made.directory / "skipped.jsonl").is_file() else [],
        "said": made.console.file.getvalue(),  # type: ignore[attr-defined]
    }


ESSENTIAL = (
    ("ddp", "adamw", False),
    ("ddp", "adamw", True),
    ("fsdp2", "adamw", False),
    ("fsdp2", "adamw", True),
    ("fsdp2", "muon", True),
    ("zero2", "adamw", False),
)
MORE = (
    ("ddp", "muon", False),
    ("ddp", "muon", True),
    ("ddp", "stable-adamw", False),
    ("ddp", "stable-adamw", True),
    ("fsdp2", "muon", False),
    ("fsdp2", "muon", True),
    ("fsdp2", "stable-adamw", False),
    ("fsdp2", "stable-adamw", True),
    ("zero1", "muon", False),
    ("zero3", "adamw", False),
)


def not_finite(folder: Path, runs: tuple[tuple[str, str, bool], ...] = ESSENTIAL) -> dict[str, Any]:
    """NaN in one micro-batch of rank 1, on every engine; on the torch engines by both roads."""
    found = {}
    road = pending.waits_for_no_step
    for strategy, optimizer, late in runs:
        pending.waits_for_no_step = lambda config, engine, late=late: late
        name = f"{strategy} {optimizer} {'late' if late else 'at once'}"
        keys = {"optimizer": {"name": optimizer, "lr": 0.01}, "train": {"strategy": strategy}}
        made = make(folder / name, OneBadRow(), **keys)
        made.train()
        found[name] = found_of(made)
    pending.waits_for_no_step = road
    return found


def not_finite_more(folder: Path) -> dict[str, Any]:
    return not_finite(folder, MORE)


def stop(folder: Path) -> dict[str, Any]:
    """The same with the policy stop: the same words on all ranks, and no weight that moved."""
    found = {}
    road = pending.waits_for_no_step
    for late in (False, True):
        pending.waits_for_no_step = lambda config, engine, late=late: late
        made = make(folder / str(late), OneBadRow(), train={"strategy": "ddp", "on_nonfinite": "stop"})
        try:
            made.train()
        except NonFiniteError as error:
            found[str(late)] = found_of(made, str(error))
    pending.waits_for_no_step = road
    return found


def replicas(folder: Path) -> dict[str, Any]:
    """A flipped bit of a gradient after the sum, and a moved layer norm, on rank 1; and nothing at all."""
    found = {}
    for name, strategy, keys, injure in (
        ("flip", "ddp", {}, flip_gradient),
        ("drift", "ddp", {}, move_norm),
        ("hybrid", "fsdp2", {"shard_size": 1}, move_norm),
        ("none", "ddp", {}, None),
        ("none zero2", "zero2", {}, None),
    ):
        train = {"strategy": strategy, "check_replicas": 4, **keys}
        made = make(folder / name, OneBadRow(bad=False), train=train, checkpoint={"every": 3, "keep": 9})
        error = ""
        if injure is not None and made.ranks.rank == 1:
            injure(made, at=5)
        try:
            made.train()
        except ReplicasDifferError as caught:
            error = str(caught)
        saved = sorted(path.name for path in (made.directory / "checkpoints").glob("step-*"))
        found[name] = {"error": error, "saved": saved}
    return found


def before_update(made: Trainer, at: int, injure: Callable[[], None]) -> None:
    update = made.road.update

    def injured(state: Any, sent: Any, *rest: Any) -> Any:
        if sent.step == at:
            injure()
        return update(state, sent, *rest)

    made.road.update = injured  # type: ignore[method-assign, assignment]


def flip_gradient(made: Trainer, at: int) -> None:
    def injure() -> None:
        gradient = made.engine.bare.embed.weight.grad
        bits = gradient.view(torch.int32).view(-1)
        place = int(gradient.abs().argmax())
        bits[place] ^= 1 << 20

    before_update(made, at, injure)


def move_norm(made: Trainer, at: int) -> None:
    def injure() -> None:
        weight = made.engine._parameters["norm.weight"].detach()
        part = weight.to_local() if hasattr(weight, "to_local") else weight
        part += 1e-6

    before_update(made, at, injure)


class SlowModel(OneBadRow):
    """A forward pass that takes 50 ms longer on one rank."""

    slow = False

    def forward(self, **batch: Any) -> Any:
        if self.slow:
            time.sleep(0.05)
        return super().forward(**batch)


class SlowData(RaggedData):
    """Rows that come 50 ms late on one rank."""

    def batch(self, step: int, rows: slice | None = None) -> Rows:
        if rows is not None and rows.start == BAD_ROW:
            time.sleep(0.05)
        return super().batch(step, rows)


def slow(folder: Path) -> dict[str, Any]:
    """50 ms on rank 1, in the forward pass and in the data."""
    found = {}
    for part in ("forward", "data"):
        model = SlowModel(bad=False)
        data = SlowData() if part == "data" else RaggedData()
        made = make(folder / part, model, data=data, train={"steps": 21, "strategy": "ddp"}, checkpoint={"every": 100})
        model.slow = part == "forward" and made.ranks.rank == 1
        made.train()
        found[part] = {"said": made.console.file.getvalue()}  # type: ignore[attr-defined]
    return found


def main() -> None:
    """Run the scenarios; the found of all ranks, by scenario."""
    out, folder = Path(sys.argv[1]), Path(sys.argv[2])
    from pretrain.ranks import Ranks

    scenarios = {one.__name__: one for one in (not_finite, not_finite_more, stop, replicas, slow)}
    found = {}
    for name in sys.argv[3:]:
        mine = scenarios[name](folder / name)
        found[name] = Ranks.of_job(timeout=60).gather(mine)
    if Ranks.of_job(timeout=60).main:
        out.write_text(json.dumps(found))
    close_job()


if __name__ == "__main__":
    main()
