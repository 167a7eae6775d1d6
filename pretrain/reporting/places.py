"""Where the parts of a run lie.

What lives here: finding them, whichever of them are there. What must not: what they mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pretrain.files import ArtifactError


@dataclass(frozen=True)
class Place:
    """Where a run lies; `train` holds its numbers."""

    root: Path
    train: Path


def places_of(path: Path) -> list[Place]:
    """The run in a directory, or of a fine-tuning the run of each seed.

    Raises:
        ArtifactError: when there is none; says what is there.
    """
    seeds = sorted(
        (seed for seed in path.glob("seed-*/train") if _is_training(seed)), key=lambda seed: _number(seed.parent.name)
    )
    if _is_training(path / "train"):
        return [Place(path, path / "train")]
    if seeds:
        return [Place(seed.parent, seed) for seed in seeds]
    if path.name == "train" and _is_training(path):
        return [Place(path.parent, path)]
    if (path / "metrics.jsonl").is_file():
        return [Place(path, path)]
    if not path.is_dir():
        raise ArtifactError(f"there is no directory `{path}`; give run directories, OUT/NAME each")
    inside = sorted(child for child in path.iterdir() if (child / "train").is_dir())
    hint = f"did you mean `{inside[0]}`?" if inside else "give the OUT/NAME of a run whose training has begun"
    raise ArtifactError(f"`{path}` is no run: train/metrics.jsonl and train/config.yaml are missing; {hint}")


def _is_training(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("metrics.jsonl", "config.yaml", "result.json"))


def _number(name: str) -> tuple[int, str]:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1, name


def names_of(places: Sequence[Place]) -> list[str]:
    """The last part of each path, and as many before it as tell them apart; of a seed at least two."""
    parts = [place.root.absolute().parts for place in places]
    names = ["/".join(path[-2:]) if path[-1].startswith("seed-") else path[-1] for path in parts]
    for number in range(2, max(map(len, parts))):
        if len(set(names)) == len(names):
            break
        names = [
            "/".join(path[-number:]) if names.count(name) > 1 else name for path, name in zip(parts, names, strict=True)
        ]
    return names


def model_directory(place: Place) -> Path | None:
    """The newest whole model of a run: what it exported, else a checkpoint's."""
    steps = sorted(place.train.glob("checkpoints/step-*/model"), reverse=True)
    candidates = [place.root / "export", *steps, place.root / "model", place.root]
    return next((path for path in candidates if (path / "config.json").is_file()), None)


def parameters_of(place: Place) -> int | None:
    """Numbers in the weights, each tensor once, as the headers of the files say."""
    directory = model_directory(place)
    total = 0
    try:
        for path in sorted(directory.glob("*.safetensors")) if directory is not None else ():
            with safe_open(path, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                    size = 1
                    for length in tensors.get_slice(name).get_shape():
                        size *= length
                    total += size
    except (OSError, SafetensorError):
        return None
    return total or None


def read_json(path: Path) -> dict[str, Any]:
    """An object in a file; empty where there is none, or it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
