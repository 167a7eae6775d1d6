"""What a changed configuration touches: which stage each key decides, and the refusal to mix two configurations.

What lives here: the table of keys and stages, and the comparison with a saved copy. What must not: making anything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig, config_to_dict, difference
from pretrain.config_text import ConfigError, parse_yaml

STAGES = ("tokenizer", "data", "train", "evaluate", "export")

# The first stage that a key decides, longest prefix first; what follows a stage is touched with it. None: the key
# steers how a result is reached or shown, not the result.
_DECIDES: dict[str, str | None] = {
    "checkpoint": None,
    "data": "tokenizer",
    "data.max_documents_per_row": "train",
    "data.part_bytes": "data",
    "data.workers": None,
    "evaluate": None,
    "export": "export",
    "log": None,
    "model": "train",
    "model.architecture": "tokenizer",
    "model.from": "tokenizer",
    "name": None,
    "objective": "train",
    "optimizer": "train",
    "out": None,
    "schedule": "train",
    "tokenizer": "tokenizer",
    "train": "train",
    "train.micro_batch": None,
    "train.on_nonfinite": None,
    "train.stop_signals": None,
}


class ChangedConfigError(ConfigError):
    """Something of this name exists that another configuration made; lists the difference and what it touches."""


def first_stage(key: str) -> str | None:
    """The first stage that a dotted key decides; None when it decides none."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in _DECIDES:
            return _DECIDES[prefix]
    return STAGES[0]


def refuse_changed(config: RunConfig, saved: Path, *, until: str = STAGES[-1]) -> None:
    """Compare with the resolved copy that lies in the file `saved`; nothing is done when there is none.

    Args:
        config: the configuration that is wanted now.
        saved: the resolved copy, as `dump_config` wrote it.
        until: changes that touch only later stages are let through.

    Raises:
        ChangedConfigError: lists every key that differs, the stages that it touches, and the remedy.
    """
    if not saved.is_file():
        return
    old: dict[str, Any] = parse_yaml(saved.read_text(encoding="utf-8"), str(saved))
    new: dict[str, Any] = json.loads(json.dumps(config_to_dict(config)))
    lines = []
    for key, (before, after) in difference(old, new).items():
        stage = first_stage(key)
        if stage is not None and STAGES.index(stage) <= STAGES.index(until):
            touched = ", ".join(STAGES[STAGES.index(stage) :])
            lines.append(f"  {key}: {before!r} -> {after!r} (touches {touched})")
    if lines:
        raise ChangedConfigError(
            f"`{config.directory}` was made with another configuration:\n"
            + "\n".join(lines)
            + f"\nGive this one another name (name={config.name}-2), or archive the old one (`pretrain run --fresh`)."
        )
