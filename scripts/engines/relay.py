"""Trainings of one run by several engines, one after another in the same processes: for the tests and the matrix.

What lives here: what a leg is, launching legs, and what each of them found. What must not: what is expected.

A job of W processes is started once and trains all of its legs in turn, so that a leg costs a second, not the start of
W processes. `python scripts/engines/relay.py LEGS.json` is what each process runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for place in (ROOT, ROOT / "scripts" / "faults"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

import tiny  # noqa: E402


@dataclass(frozen=True)
class Leg:
    """A training: from where the run stands to its end, or to the end of step `stop_after`.

    Attributes:
        run: YAML file of the run.
        overrides: `key=value`, as on the command line.
        stop_after: a stop signal comes within this step.
        stop_rank: the process that gets it.
        compare: whether what was loaded is compared with the checkpoint, every tensor bit for bit.
    """

    run: str
    overrides: tuple[str, ...] = ()
    stop_after: int | None = None
    stop_rank: int = 0
    compare: bool = False


@dataclass
class Found:
    """What a leg found.

    Attributes:
        code: exit code of `pretrain train`.
        error: what ended it otherwise.
        strategy: that ran.
        world: processes that ran it.
        losses, norms, rates: by step.
        rows: by step, a digest of each row's ids, inputs and targets, in the order of the global batch.
        compared: tensors that were compared.
        different: names of those that were not equal.
    """

    code: int | None = None
    error: str = ""
    strategy: str = ""
    world: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)
    rows: dict[int, list[str]] = field(default_factory=dict)
    compared: int = 0
    different: list[str] = field(default_factory=list)


def race(
    legs: Sequence[Leg], folder: Path, *, processes: int, environment: Mapping[str, str] | None = None, timeout: float
) -> list[Found]:
    """Train all legs in one job of so many processes.

    Raises:
        RuntimeError: when the job ended otherwise than it should, with what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    legs_file, found_file = folder / "legs.json", folder / "found.json"
    found_file.unlink(missing_ok=True)
    legs_file.write_text(json.dumps([asdict(leg) for leg in legs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(Path(__file__).resolve()), str(legs_file)]
    ended = tiny.execute(command, environment=environment, timeout=timeout)
    if ended.code != 0 or not found_file.is_file():
        raise RuntimeError(f"the job of {processes} processes ended with {ended.code}:\n{ended.output[-14000:]}")
    return [_found(entry) for entry in json.loads(found_file.read_text())]


def _found(entry: dict[str, Any]) -> Found:
    for key in ("losses", "norms", "rates", "rows"):
        entry[key] = {int(step): value for step, value in entry[key].items()}
    return Found(**entry)


# --- in each process ------------------------------------------------------------------------------------------------


def _train(leg: Leg) -> Found:
    from pretrain.config import load_config
    from pretrain.train import train
    from pretrain.training.trainer import Trainer

    found = Found()
    step, taken_up = Trainer._step, Trainer.__init__

    def watched(self: Trainer, progress: Any, micro_batches: Sequence[Any], *rest: Any) -> Any:
        number = progress.step + 1
        own = [line for batch in micro_batches for line in _rows(batch)]
        found.rows[number] = [line for lines in self.ranks.gather(own) for line in lines]
        if number == leg.stop_after and self.ranks.rank == leg.stop_rank % self.ranks.world:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, progress, micro_batches, *rest)

    def built(self: Trainer, *arguments: Any, **keywords: Any) -> None:
        taken_up(self, *arguments, **keywords)
        found.strategy, found.world = self.engine.name, self.ranks.world
        if leg.compare:
            self.saver.resume()
            _compare(self, found)

    Trainer._step, Trainer.__init__ = watched, built  # type: ignore[method-assign]
    try:
        config = load_config(leg.run, leg.overrides)
        found.code = train(config)
    except (ValueError, RuntimeError) as error:
        found.error = f"{type(error).__name__}: {error}"
        return found
    finally:
        Trainer._step, Trainer.__init__ = step, taken_up  # type: ignore[method-assign]
    for line in (config.directory / "train" / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "grad_norm" in entry:
            number = entry["step"]
            found.losses[number], found.norms[number] = entry["loss"], entry["grad_norm"]
            found.rates[number] = entry["lr"]
    return found


def _rows(batch: Any) -> list[str]:
    """A digest of each row that a rank has: its ids, inputs and targets."""
    lines = []
    for place, row in enumerate(batch.row_ids.tolist()):
        digest = hashlib.sha256(str(row).encode())
        for name in sorted(batch.arrays):
            digest.update(batch.arrays[name][place].tobytes())
        lines.append(digest.hexdigest()[:16])
    return lines


def _compare(trainer: Any, found: Found) -> None:
    """Every tensor that the engine holds against the newest checkpoint's, bit for bit."""
    import torch

    from pretrain.training import checkpoint

    path = checkpoint.list_checkpoints(trainer.directory)[-1]
    loaded = checkpoint.load_checkpoint(path)
    weights = trainer.saver.store.read(trainer.engine.bare, path / "model")
    seen = set()
    for name in trainer.engine.names():
        held = {name: trainer.engine.parameter(name)}
        held |= {f"{name}/{key}": value for key, value in trainer.engine.state(name).items()}
        for label, tensor in held.items():
            saved = weights[label] if label == name else loaded.optimizer.tensors[label]
            found.compared += 1
            if tensor.dtype != saved.dtype or not torch.equal(tensor.cpu(), saved):
                found.different.append(label)
        seen |= set(held)
    found.different += sorted((set(weights) | set(loaded.optimizer.tensors)) - seen)
    found.different = sorted({name for names in trainer.ranks.gather(found.different) for name in names})


def main() -> None:
    """Train the legs that a file names; the main process writes what they found."""
    legs_file = Path(sys.argv[1])
    legs = [Leg(**{**entry, "overrides": tuple(entry["overrides"])}) for entry in json.loads(legs_file.read_text())]
    from pretrain.training.engines.job import close_job

    all_found = [_train(leg) for leg in legs]
    if int(os.environ.get("RANK", 0)) == 0:
        (legs_file.parent / "found.json").write_text(json.dumps([asdict(found) for found in all_found]))
    close_job()


if __name__ == "__main__":
    main()
