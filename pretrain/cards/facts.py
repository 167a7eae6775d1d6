"""What artifacts tell of a model and of the run that made it, as plain values for the sections of a card.

What lives here: reading small files of a model directory and of a run, most of which may be missing. What must not:
torch, weights, or wording.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from pretrain.cards.places import public
from pretrain.cards.scores import Score, scores_of_run
from pretrain.cards.tuned import MODEL, Tuning, tuning_around
from pretrain.config_text import parse_yaml
from pretrain.files import MANIFEST, ArtifactError
from pretrain.training.history import Curves, Scores, read_lines, read_metrics

GENERATOR = "generator"
_MOST_POINTS = 240
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Tokenizer:
    """What `tokenizer.json` and its config say."""

    algorithm: str
    size: int
    specials: Mapping[str, str]
    normalizer: tuple[str, ...] = ()
    pre_tokenizer: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A model directory.

    Attributes:
        config: its `config.json`.
        parameters: numbers in its weight files, tied ones once; None when they cannot be read.
        dtypes: safetensors' names of their types.
        tokenizer: None without a `tokenizer.json`.
        generator: the model in the folder of a detector's generator.
        sentences: whether it is laid out for sentence-transformers.
    """

    config: Mapping[str, Any]
    parameters: int | None = None
    dtypes: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None
    generator: Model | None = None
    sentences: bool = False

    @property
    def architecture(self) -> str:
        """The class that the weights belong to; empty when the config names none."""
        return str(next(iter(self.config.get("architectures") or ()), ""))

    @property
    def needs_code(self) -> bool:
        """Whether it comes with code of its own."""
        return bool(self.config.get("auto_map"))


@dataclass(frozen=True)
class Run:
    """A run directory, as far as it goes; every part may be empty.

    Attributes:
        config: the resolved configuration, as plain data.
        progress: where the described checkpoint stands: step, tokens, samples, seconds, arithmetic, split, ...
        result: what training wrote at its end, when the described checkpoint is that end.
        data: facts of the prepared data.
        made_from: the configuration that the data were made with, where it is not the run's own.
        tokenizer: facts of the tokenizer, as its manifest has them.
        starts: a line for every call that trained.
        curves: of training; `evaluations`: scores by step.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    progress: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    made_from: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    starts: tuple[Mapping[str, Any], ...] = ()
    curves: Curves = field(default_factory=Curves)
    evaluations: Scores = field(default_factory=dict)
    code_version: str | None = None
    base_is_local: bool = True

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the configuration; empty without one."""
        found = self.config.get(name)
        return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True)
class Facts:
    """Everything that a card is made of.

    Attributes:
        title: the model's name.
        place: how the lines of the card address it: a directory, or the name of a repository.
        model: its directory.
        run: the pretraining that made it; None when it is not known.
        tuning: the fine-tuning that made it, in place of a run.
        scores: of the run and of score files.
        license: of the model.
        languages: codes of the text.
        repository: its name on the Hub, when it is known.
        watts: power of a device, in place of an assumption.
        overhead: power usage effectiveness of the building, in place of an assumption.
    """

    title: str
    place: str
    model: Model
    run: Run | None = None
    tuning: Tuning | None = None
    scores: tuple[Score, ...] = ()
    license: str | None = None
    languages: tuple[str, ...] = ()
    repository: str | None = None
    watts: float | None = None
    overhead: float | None = None

    @property
    def objective(self) -> str | None:
        """What the run trained it for."""
        return None if self.run is None else self.run.section("objective").get("kind")


# --- the model directory --------------------------------------------------------------------------------------------


def read_model(directory: Path) -> Model:
    """What a model directory tells of itself.

    Raises:
        ArtifactError: when there is no model in it.
    """
    config = read_json(directory / "config.json")
    if config is None:
        raise ArtifactError(f"`{directory}` is no model directory: config.json is missing or cannot be read")
    parameters, dtypes = _weights(directory)
    generator = directory / GENERATOR
    return Model(
        config=config,
        parameters=parameters,
        dtypes=dtypes,
        tokenizer=_read_tokenizer(directory),
        generator=read_model(generator) if (generator / "config.json").is_file() else None,
        sentences=(directory / "modules.json").is_file(),
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None when it is missing, damaged, or no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # JSON or UTF-8 that is none
        return None
    return found if isinstance(found, dict) else None


def _weights(directory: Path) -> tuple[int | None, tuple[str, ...]]:
    """Numbers in the weight files and their types, by the headers alone."""
    total, dtypes = 0, set[str]()
    files = sorted(directory.glob("*.safetensors"))
    try:
        for path in files:
            for name, entry in _header(path).items():
                if name != "__metadata__":
                    total += prod(entry["shape"])
                    dtypes.add(str(entry["dtype"]))
    except (OSError, ValueError, KeyError, TypeError, struct.error):  # cut short, or something else
        return None, ()
    return (total, tuple(sorted(dtypes))) if files else (None, ())


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LONGEST_HEADER:
            raise ValueError(f"{path.name} is no safetensors file")
        found: dict[str, Any] = json.loads(file.read(length))
    return found


def _read_tokenizer(directory: Path) -> Tokenizer | None:
    whole = read_json(directory / "tokenizer.json")
    if whole is None or not isinstance(whole.get("model"), dict):
        return None
    model, settings = whole["model"], read_json(directory / "tokenizer_config.json") or {}
    pieces = {entry["id"] for entry in whole.get("added_tokens") or ()}
    vocabulary = model.get("vocab") or ()
    ids = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
    specials = {}
    for key, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            specials[key.removesuffix("_token")] = text
    pre_tokenizer = _kinds(whole.get("pre_tokenizer"))
    bytewise = model.get("type") == "BPE" and "ByteLevel" in pre_tokenizer
    return Tokenizer(
        algorithm="byte-level BPE" if bytewise else str(model.get("type", "unknown")),
        size=len(ids | pieces),
        specials=specials,
        normalizer=_kinds(whole.get("normalizer")),
        pre_tokenizer=pre_tokenizer,
    )


def _kinds(part: Any) -> tuple[str, ...]:
    """The names of a step of a tokenizer, or of those in its sequence."""
    if not isinstance(part, dict):
        return ()
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            return tuple(name for inner in part[key] for name in _kinds(inner))
    return (str(part.get("type", "unknown")),)


# --- the run --------------------------------------------------------------------------------------------------------


def read_run(directory: Path, checkpoint: Path | None = None) -> Run:
    """What a run directory tells; of one of its checkpoints, or of its end.

    Raises:
        ArtifactError: when it is no run directory, or the checkpoint is none.
    """
    train = directory / "train"
    result = read_json(train / "result.json") or {}
    if checkpoint is None and isinstance(result.get("checkpoint"), str):
        final = train / "checkpoints" / Path(str(result["checkpoint"])).name
        checkpoint = final if final.is_dir() else None
    elif checkpoint is not None and checkpoint.name != result.get("checkpoint"):
        result = {}
    saved = read_json(checkpoint / "trainer.json") if checkpoint is not None else {}
    if saved is None:
        raise ArtifactError(f"`{checkpoint}` is no checkpoint: trainer.json is missing or cannot be read")
    state = saved.get("state") or {}
    config = _read_config(directory) or state.get("config")
    if not config:
        raise ArtifactError(
            f"`{directory}` is no run directory: it holds no config.yaml; give one that `pretrain` made"
        )
    data = read_json(directory / "data" / MANIFEST) or {}
    facts = data.get("facts") or {}
    made_from = (facts.get("made_from") or {}).get("config") or {}
    progress = dict(state.get("progress") or {}) or {key: result[key] for key in _PROGRESS if key in result}
    curves, evaluations = read_metrics(train / "metrics.jsonl", most=_MOST_POINTS)
    return Run(
        config=config,
        progress=progress,
        result=result,
        data=facts,
        made_from=made_from,
        tokenizer=(read_json(directory / "tokenizer" / MANIFEST) or {}).get("facts") or {},
        starts=tuple(read_lines(train / "starts.jsonl")),
        curves=curves,
        evaluations=evaluations,
        code_version=saved.get("code_version"),
        base_is_local=_is_local((config.get("model") or {}).get("from"), directory, config),
    )


_PROGRESS = ("step", "tokens", "seconds", "run_id")


def _read_config(directory: Path) -> dict[str, Any] | None:
    for path in (directory / "config.yaml", directory / "train" / "config.yaml"):
        if path.is_file():
            found = parse_yaml(path.read_text(encoding="utf-8"), str(path))
            if isinstance(found, dict):
                return found
    return None


def _is_local(base: Any, directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether the model that a run started from was a directory, as far as can still be seen."""
    if not isinstance(base, str) or public(base) != base or base.count("/") > 1 or "://" in base:
        return True
    own = Path(str(config.get("out", "runs"))) / str(config.get("name", ""))
    whole = directory.resolve()
    at = Path.cwd() if own.is_absolute() or ".." in own.parts else whole.parents[len(own.parts) - 1]
    return any((place / base).exists() for place in (Path.cwd(), at))


def run_around(directory: Path) -> Path | None:
    """The run whose export a model directory is: `RUN/export`, or of a fine-tuning `RUN/model`; None elsewhere."""
    if (tuned := tuning_around(directory)) is not None:
        return tuned
    run = directory.resolve().parent
    return run if directory.resolve().name == "export" and (run / "train" / "result.json").is_file() else None


def origin_of(source: Path) -> tuple[Path | None, Path | None]:
    """The run and the checkpoint that a run directory, a checkpoint or the model in one stands for; None, None else.

    Of a run directory that is the checkpoint which its `latest` names.
    """
    whole = source.resolve()
    if (whole / "train" / "checkpoints").is_dir():
        latest = read_json(whole / "train" / "checkpoints" / "latest.json") or {}
        whole = whole / "train" / "checkpoints" / Path(str(latest.get("checkpoint", ""))).name
    whole = whole.parent if whole.name == "model" else whole
    if whole.parent.name != "checkpoints" or not (whole / "trainer.json").is_file():
        return None, None
    return whole.parents[2], whole


def gather(
    directory: Path,
    run: Path | None = None,
    *,
    checkpoint: Path | None = None,
    tuning: Tuning | None = None,
    repository: str | None = None,
    license: str | None = None,
    languages: Sequence[str] = (),
    scores: Sequence[Score] = (),
    watts: float | None = None,
    overhead: float | None = None,
) -> Facts:
    """Everything that is known of a model.

    Args:
        directory: the model directory.
        run: the run directory that it comes from.
        checkpoint: the one of the run that it is; None: the end of the run.
        tuning: what `run` is, when it is a fine-tuning.
        repository: its name on the Hub.
        license: of the model, in place of the run's `export.license`.
        languages: in place of the run's `export.language`.
        scores: further ones, beside those of the run.
        watts: power of a device, in place of an assumption.
        overhead: power usage effectiveness, in place of an assumption.

    Raises:
        ArtifactError: when the model or the run is not there.
    """
    model = read_model(directory)
    found = None if run is None or tuning is not None else read_run(run, checkpoint)
    export = {} if found is None else found.section("export")
    name = directory.resolve().name
    title = name
    place = name
    if found is not None and run is not None:
        title = str(found.config.get("name") or run.resolve().name)
        inside = directory.resolve().is_relative_to(run.resolve())
        place = f"{run.resolve().name}/{directory.resolve().relative_to(run.resolve()).as_posix()}" if inside else name
    elif tuning is not None and run is not None:
        inside = directory.resolve().parent == run.resolve()
        title, place = tuning.name, f"{tuning.name}/{MODEL}" if inside else name
    if repository is not None:
        title, place = repository.rpartition("/")[2], repository
    own = () if tuning is None else tuning.scores()
    if found is not None and run is not None:
        own = scores_of_run(run, found.config, found.progress, final=bool(found.result))
    return Facts(
        title=title,
        place=place,
        model=model,
        run=found,
        tuning=tuning,
        scores=(*own, *scores),
        license=license or export.get("license"),
        languages=tuple(languages or export.get("language") or ()),
        repository=repository,
        watts=watts,
        overhead=overhead,
    )
