"""Taking up a run from a checkpoint: weights, optimizer, random generators, and where it stood.

What lives here: the way from files whose digests were compared into a live run. What must not: finding them (`places`),
what a changed configuration does (`resuming`), or saving.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.config_loop import LoopConfig
from pretrain.files import ArtifactError
from pretrain.runtime import set_seed
from pretrain.training import checkpoint
from pretrain.training.engines import Engine
from pretrain.training.feed import Data
from pretrain.training.progress import Progress
from pretrain.training.resuming import take_up


def restore(
    found: Path,
    config: LoopConfig,
    *,
    engine: Engine,
    data: Data,
    read_model: Callable[[Path], Mapping[str, Tensor]],
    arithmetic: str,
    allow: Collection[str] = (),
) -> tuple[Progress, list[str]]:
    """Put a checkpoint into the engine and the data plane; all ranks call it together.

    Args:
        found: the checkpoint, whose digests were compared.
        config: the configuration that is wanted now.
        engine: gets weights and optimizer state.
        data: gets the length of the run, and is compared with what the checkpoint saw.
        read_model: the weights of a model directory by the engine's names.
        arithmetic: precision and device as they are resolved now.
        allow: keys, or whole sections, that may differ from the checkpoint's.

    Returns:
        Where the run stands, and what to announce.

    Raises:
        ChangedConfigError: when the configuration differs in a way that is not allowed.
        ArtifactError: when what is there cannot be used.
        ValueError: when the data is not what the checkpoint saw.
    """
    loaded = checkpoint.load_checkpoint(found, verify=False)
    saved = loaded.state["progress"]
    if unknown := sorted(set(saved) - {known.name for known in fields(Progress)}):
        raise ArtifactError(f"`{found}` holds `{unknown[0]}`, which this version does not know; use a newer one")
    progress = Progress(**saved)
    budget_before = progress.total_steps
    ranks = engine.ranks
    notes = take_up(
        progress,
        loaded.state["config"],
        config,
        num_rows=data.num_rows,
        rates=_rates(loaded.optimizer.groups, engine.groups()),
        arithmetic=arithmetic,
        allow=allow,
        attention_dropout=getattr(getattr(engine.bare, "config", None), "attention_dropout", None),
        processes=(len(loaded.rngs), ranks.world),
    )
    told = data.for_run(progress.total_steps)
    data.check(loaded.state["data"])
    engine.load(read_model(found / "model"), loaded.optimizer)
    if len(loaded.rngs) == ranks.world or ranks.main:
        checkpoint.restore_rng(loaded.rngs[ranks.rank])
    else:  # another number of processes: what is drawn without a key starts anew
        set_seed(config.train.seed + ranks.rank + progress.step * ranks.world)
    engine.load_scaler_state(loaded.state["scaler"])
    return progress, [*notes, *(told if progress.total_steps != budget_before else ())]


def _rates(saved: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Peak learning rates by optimizer group: (the checkpoint's, the one wanted now)."""
    before = {str(group.get("name")): float(group["initial_lr"]) for group in saved}
    now = {str(group.get("name")): float(group["initial_lr"]) for group in wanted}
    return {name: (before[name], rate) for name, rate in now.items() if name in before}
