"""What `result.json` of a fine-tuning tells: its task, its recipe, the scores of its seeds, which of them was kept.

What lives here: reading that file. What must not: wording, or the model's directory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pretrain.cards.places import HUB_PREFIX, hub_name, is_hub_name, public
from pretrain.cards.scores import Score
from pretrain.config_text import parse_yaml
from pretrain.files import MANIFEST, ArtifactError, read_manifest, sha256_file

RESULT, MODEL = "result.json", "model"
TEST, VALIDATION = "test", "validation"
_SECTIONS = ("optimizer", "schedule", "train")
_WEIGHTS = ("adapter/adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
_NEEDED = frozenset({"task", "model", "rows", "seeds", "summary", "best_seed"})
# Parts of a path that say nothing of which model lies there.
_STRUCTURE = frozenset({"model", "export", "train", "checkpoints"})
KINDS: Mapping[str, tuple[str, str]] = {
    "classification": ("text-classification", "Text classification"),
    "regression": ("text-classification", "Scores of texts"),
    "token-classification": ("token-classification", "Token classification"),
    "question-answering": ("question-answering", "Question answering"),
    "multiple-choice": ("multiple-choice", "Multiple choice"),
    "instructions": ("text-generation", "Instructions"),
    "embeddings": ("sentence-similarity", "Sentence similarity"),
}
"""The Hub's name of a task's kind, and ours; that of `text-to-text` depends on its scores."""


@dataclass(frozen=True)
class Tuning:
    """A fine-tuning that came to its end.

    Attributes:
        name: of its directory.
        result: what its `result.json` holds.
        settings: `optimizer`, `schedule` and `train` of its configuration.
    """

    name: str
    result: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> Mapping[str, Any]:
        """The section `task`."""
        found: Mapping[str, Any] = self.result["task"]
        return found

    @property
    def kind(self) -> str:
        """`task.kind`."""
        return str(self.task["kind"])

    @property
    def of_hub(self) -> tuple[str, str]:
        """The Hub's name of its task, and ours."""
        if self.kind != "text-to-text":
            return KINDS.get(self.kind, ("other", self.kind))
        scores = set(self.task.get("scores") or ())
        if "rouge" in scores:
            return "summarization", "Summarization"
        if scores & {"bleu", "chrf"}:
            return "translation", "Translation"
        return "text-generation", "Text from a text"

    @property
    def seeds(self) -> Sequence[Mapping[str, Any]]:
        """The result of each seed."""
        return tuple(self.result["seeds"])

    @property
    def own(self) -> Mapping[str, Any]:
        """The result of the seed whose model was kept."""
        return next(seed for seed in self.seeds if seed["seed"] == self.result["best_seed"])

    @property
    def pretrained(self) -> bool:
        """Whether it began with the base model's weights."""
        return bool(self.result["model"].get("weights", "pretrained") == "pretrained")

    @property
    def lora(self) -> Mapping[str, Any] | None:
        """The adapters that were trained, if they were."""
        found = self.result["model"].get("lora")
        return {"rank": found} if isinstance(found, int) else found

    @property
    def hub_base(self) -> str | None:
        """The Hub's name of the base model; None for a directory."""
        base = str(self.result["model"].get("from") or "")
        local = self.result.get("base_is_local")
        if local is None:  # of a result that does not say
            local = Path(base).exists()
        return base if not local and is_hub_name(base) else None

    @property
    def base(self) -> str:
        """The base model as a stranger may read it: its name on the Hub, of a directory the part that says which."""
        if self.hub_base is not None:
            return self.hub_base
        path = PurePosixPath(str(self.result["model"].get("from") or "").replace("\\", "/"))
        parts = [part for part in path.parts if part not in _STRUCTURE and part != path.root]
        several = len(parts) > 1 and re.fullmatch(r"step-\d+", parts[-1])
        return public("/".join(parts[-2:] if several else parts[-1:])) if parts else "a model without a name"

    @property
    def measured(self) -> str:
        """The part whose scores count: `test`, or without test rows `validation`."""
        return TEST if self.own.get(TEST) else VALIDATION

    def scores(self) -> tuple[Score, ...]:
        """What the kept model itself scored on the test rows; without them, on the validation rows."""
        part = self.measured
        files = self.task.get(part)
        held_out = isinstance(files, Mapping)
        entries = [str(file) for file in (self.task.get("train") if held_out else files) or ()]
        names = {hub_name(entry) for entry in entries}
        dataset = names.pop() if len(names) == 1 else None
        place, _, split = entries[0].removeprefix(HUB_PREFIX).partition(":") if dataset and entries else ("", "", "")
        shown = dataset or ", ".join(dict.fromkeys(PurePosixPath(public(entry)).name for entry in entries)) or part
        return tuple(
            Score(
                str(metric),
                float(value),
                shown + (", held out" if held_out else ""),
                self.of_hub,
                dataset=dataset,
                config="/".join(place.split("/")[2:]) or None,
                split=split or part,
                note=f"{self.result['rows'][part]:,} rows, seed {self.result['best_seed']}",
            )
            for metric, value in self.own[part].items()
        )


def read_tuning(directory: Path, result: Mapping[str, Any] | None = None) -> Tuning | None:
    """The fine-tuning in a directory; None when it holds none.

    Args:
        directory: OUT/NAME.
        result: what its `result.json` will hold, when that is not written yet.

    Raises:
        ArtifactError: when its `result.json` says too little, or it is one seed of a fine-tuning.
    """
    whole = result if result is not None else _read_json(directory / RESULT)
    around = directory.resolve().parent
    if directory.resolve().name.startswith("seed-") and "best_seed" in (_read_json(around / RESULT) or {}):
        raise ArtifactError(f"`{directory}` is one seed of a fine-tuning: give `{around}`, whose model has a card")
    if whole is None or "best_seed" not in whole:
        return None
    if not set(whole) >= _NEEDED or whole["best_seed"] not in [seed.get("seed") for seed in whole["seeds"]]:
        raise ArtifactError(
            f"`{directory / RESULT}` is no whole result of a fine-tuning; run `pretrain finetune` again"
        )
    settings = {name: whole[name] for name in _SECTIONS if name in whole}
    if not settings:
        settings = _settings_of(directory / f"seed-{whole['best_seed']}" / "train" / "config.yaml")
    return Tuning(directory.resolve().name, whole, settings)


def tuning_around(directory: Path) -> Path | None:
    """The fine-tuning whose model a directory is: OUT/NAME of OUT/NAME/model; None for other places."""
    whole = directory.resolve()
    found = _read_json(whole.parent / RESULT) if whole.name == MODEL else None
    return whole.parent if found is not None and "best_seed" in found else None


def refuse_another_model(directory: Path, run: Path, tuning: Tuning) -> None:
    """Refuse a model directory that holds other weights than those that a fine-tuning kept, as far as can be seen.

    Raises:
        ArtifactError: when the weights differ.
    """
    checkpoint = run / f"seed-{tuning.result['best_seed']}" / str(tuning.own.get("checkpoint", ""))
    if directory.resolve() == (run / MODEL).resolve() or not (checkpoint / MANIFEST).is_file():
        return
    known = read_manifest(checkpoint, "checkpoint").files
    for name in _WEIGHTS:
        written = known.get(f"{MODEL}/{name.rpartition('/')[2]}")
        if written is not None and (directory / name).is_file() and sha256_file(directory / name) != written:
            raise ArtifactError(
                f"`{directory}` is not the model of `{run}`, which is `{run / MODEL}`: `{name}` differs; give the "
                "fine-tuning that it comes from"
            )


def _settings_of(path: Path) -> dict[str, Any]:
    found = parse_yaml(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else {}
    return {name: found[name] for name in _SECTIONS if name in found} if isinstance(found, dict) else {}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # JSON or UTF-8 that is none
        return None
    return found if isinstance(found, dict) else None
