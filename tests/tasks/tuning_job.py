"""Fine-tunings of two processes, one after another in the same job: the start of a job costs more than a tiny run.

What lives here: what a leg is, the job, and what each process of it runs. What must not: what is expected.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 900.0


@dataclass(frozen=True)
class Leg:
    """A fine-tuning.

    Attributes:
        model: directory.
        config: YAML file.
        overrides: `key=value`, as on the command line.
        stop_after: a stop signal comes to the last process within this step.
    """

    model: str
    config: str
    overrides: tuple[str, ...] = ()
    stop_after: int | None = None


def on_two_processes(legs: Sequence[Leg], folder: Path, *, seconds: float = SECONDS) -> list[int | str]:
    """The exit code of each leg, or what ended it otherwise, as the first process has it.

    Raises:
        RuntimeError: when the job ended otherwise than it should, or did not end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, found = folder / "legs.json", folder / "found.json"
    file.write_text(json.dumps([asdict(leg) for leg in legs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).resolve()), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # the launcher ends those that it started
                process.wait(60)
    if code != 0 or not found.is_file():
        text = (folder / "said.txt").read_text()[-8000:]
        raise RuntimeError(f"the job ended with {'no end' if code is None else code}:\n{text}")
    return list(json.loads(found.read_text()))


# --- in each process ------------------------------------------------------------------------------------------------


def _tune(leg: Leg) -> int | str:
    from rich.console import Console

    from pretrain.config_task import load_tuning
    from pretrain.finetune import finetune
    from pretrain.training.trainer import Trainer

    step = Trainer._step

    def watched(self: Trainer, progress: Any, *rest: Any) -> Any:
        if progress.step + 1 == leg.stop_after and self.ranks.rank == self.ranks.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, progress, *rest)

    Trainer._step = watched  # type: ignore[method-assign]
    try:
        return finetune(leg.model, load_tuning(leg.config, leg.overrides), console=Console(quiet=True))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Trainer._step = step  # type: ignore[method-assign]


def main() -> None:
    """Run every leg of the file; the first process writes what came of them beside it."""
    from pretrain.training.engines.job import close_job

    file = Path(sys.argv[1])
    found: list[int | str] = []
    for entry in json.loads(file.read_text()):
        leg = Leg(**{**entry, "overrides": tuple(entry["overrides"])})
        found.append(_tune(leg))
        if isinstance(found[-1], str):
            print(f"rank {os.environ['RANK']}, {leg.overrides}: {found[-1]}", flush=True)
            if found[-1].startswith(("RuntimeError", "LostRankError")):
                break  # the other one may wait somewhere else
    if os.environ["RANK"] == "0":
        (file.parent / "found.json").write_text(json.dumps(found))
    close_job()


if __name__ == "__main__":
    main()
