"""What a run directory tells of a run: its length, the numbers of a step, what was found in it.

What lives here: reading small files of `<run>/train`, any of which may be missing, while a run writes them. What must
not: torch, or writing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config_loop import LoopConfig
from pretrain.files import ArtifactError
from pretrain.training.progress import budget_minutes, steps_of


@dataclass(frozen=True)
class Length:
    """Steps of a whole run, and what says so."""

    steps: int
    said_by: str


def newest_state(directory: Path) -> dict[str, Any] | None:
    """What the newest checkpoint in a training directory knows: `progress`, `data`, `config`. None without one."""
    for path in sorted(directory.glob("checkpoints/step-*/trainer.json"), key=_step_of, reverse=True):
        try:
            state = json.loads(path.read_text(encoding="utf-8"))["state"]
        except (OSError, ValueError, KeyError):  # it has just been removed, or is damaged: the one before will do
            continue
        if isinstance(state, dict):
            return state
    return None


def newest_stored(directory: Path) -> tuple[int, str] | None:
    """The step and the store of the newest checkpoint that a run has uploaded; None when it keeps none in a store.

    The step is 0 where the record does not say it.
    """
    try:
        record = json.loads((directory / "store.json").read_text(encoding="utf-8"))
        return int(record.get("step", 0)), str(record["run"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or damaged: going on refuses it
        return None


def _step_of(trainer_json: Path) -> int:
    digits = trainer_json.parent.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def length_of_run(
    config: LoopConfig, directory: Path, num_rows: int, state: Mapping[str, Any] | None = None
) -> Length | None:
    """How many steps a run has: as its newest checkpoint, its fixed budget, or its configuration says.

    Args:
        config: the run configuration.
        directory: its training directory.
        num_rows: rows an epoch, for a budget in epochs.
        state: what `newest_state` gave.

    Returns:
        None for a budget of time that was not measured yet.

    Raises:
        ArtifactError: when `budget.json` is asked and cannot be read.
    """
    if state is not None:
        return Length(int(state["progress"]["total_steps"]), "the newest checkpoint")
    if not budget_minutes(config):
        return Length(steps_of(config, num_rows, None), "the configuration")
    steps = fixed_steps(config, directory)
    return None if steps is None else Length(steps, "budget.json")


def fixed_steps(config: LoopConfig, directory: Path) -> int | None:
    """The steps that a budget of time was fixed as, by `budget.json`; None when it was not, or for another budget.

    Raises:
        ArtifactError: when the file cannot be read, or lacks an entry.
    """
    path = directory / "budget.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        fixed, steps = (known["minutes"], known["batch_tokens"]), int(known["steps"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"`{path}` cannot be read ({error!r}); remove it, and it is measured again") from error
    return steps if fixed == (budget_minutes(config), config.tokens_per_step) else None


def numbers_of_step(directory: Path, step: int) -> dict[str, Any] | None:
    """The line of `metrics.jsonl` that training step `step` wrote; None when there is none."""
    found = [line for line in _lines_of_step(directory / "metrics.jsonl", step) if "loss" in line]
    return found[-1] if found else None


def findings_of_step(directory: Path, step: int) -> list[dict[str, Any]]:
    """The lines of `skipped.jsonl` about a step: why, whether it was skipped, loss, grad_norm, rows."""
    return list(_lines_of_step(directory / "skipped.jsonl", step))


def _lines_of_step(path: Path, step: int) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    mark = f'"step": {step},'
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if mark not in line:  # most lines need not be parsed
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError:  # a line that is being written
                continue
            if isinstance(values, dict) and values.get("step") == step:
                yield values
