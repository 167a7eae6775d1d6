"""The run configuration: one YAML file describes a whole run. This file reads as the manual of its keys.

What lives here: the schema, dotted overrides, the resolved copy and the JSON schema for editors (`config_text.py`
reads YAML and words the errors). What must not: torch, or anything that takes long to import, or any reading of data.

Precedence: defaults below < the YAML file < `key=value` overrides. Unknown keys, wrong types and impossible
combinations are refused before anything is touched, and each message names the key, the value, the nearest known
key and the remedy.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, StrictBool, ValidationError, model_validator

from pretrain.config_data import SHARDS_KEYS, DataConfig, ValidationSplit
from pretrain.config_evaluate import MeasuresConfig
from pretrain.config_loop import BUDGETS, LoopCheckpointConfig, LoopConfig, LoopEvaluateConfig, LoopTrainConfig
from pretrain.config_model import GENERATOR_KEYS, HOME_KINDS, KINDS, ModelConfig, StockHome
from pretrain.config_objective import ObjectiveConfig
from pretrain.config_text import ConfigError, describe_errors, dump_yaml, parse_yaml
from pretrain.config_types import ImportPath, Interval, Place, Positive, Section, redacted

Schema = TypeVar("Schema", bound=LoopConfig)

LEARNING_KEYS = ("min_frequency", "max_bytes", "seed")
"""Keys of `tokenizer` that also mean something when an existing one is extended."""


class TokenizerConfig(Section):
    """How the vocabulary is made, or where an existing one lies."""

    from_: Place | None = Field(
        None, alias="from", description="existing tokenizer: a Hub name, a directory, or the URL of a run's tokenizer"
    )
    algorithm: Literal["byte-bpe", "bpe", "wordpiece", "unigram", "bytes", "ids"] = Field(
        "byte-bpe", description="ids: the text is token ids in decimal, or the data has ready ids; nothing is trained"
    )
    vocab_size: Positive = Field(
        32_768,
        description="ids in all, special tokens and padding included; algorithm ids: how many numbers, 0 ... N - 1, "
        "before them",
    )
    pad_to_multiple: Positive = Field(64, description="the vocabulary is padded up to a multiple of this")
    lowercase: StrictBool = Field(False, description="uncased: lower case before splitting")
    strip_accents: StrictBool = False
    normalize: Literal["none", "nfc", "nfkc"] = "none"
    digits: Literal["together", "single", "threes"] = Field("together", description="how runs of digits split")
    chinese_characters: StrictBool = Field(False, description="each Chinese character is a word of its own")
    special_tokens: tuple[str, ...] = Field((), description="further special tokens, after the architecture's own")
    min_frequency: Positive = 2
    max_bytes: Positive = Field(1_000_000_000, description="larger corpora are sampled down to this, by seed")
    seed: int = 0
    extend: Positive | None = Field(
        None, description="teach an existing tokenizer up to this many more pieces, learnt from this text"
    )

    @model_validator(mode="after")
    def _existing_or_trained(self) -> Self:
        taken = {"from_", "extend", *(LEARNING_KEYS if self.extend is not None else ())}
        if self.from_ is not None and (given := sorted(self.model_fields_set - taken)):
            raise ValueError(f"`from` takes a tokenizer as it is, so `{given[0]}` has no effect; remove one of them")
        return self

    @model_validator(mode="after")
    def _ids_learn_nothing(self) -> Self:
        kept = {"from_", "algorithm", "vocab_size", "pad_to_multiple", "special_tokens"}
        changed = [
            name
            for name in sorted(self.model_fields_set - kept)
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.algorithm == "ids" and changed:
            raise ValueError(f"`{changed[0]}` has no effect with `algorithm: ids`, which learns nothing; remove it")
        return self


class TrainConfig(LoopTrainConfig):
    """The loop of a pretraining. Exactly one budget of tokens, steps, epochs, minutes and hours."""

    batch_tokens: Positive = Field(description="token positions an optimizer step, over all processes")


class PublishConfig(Section):
    """Checkpoints pushed to a Hub beside the training, as revisions step-N; nothing of it can stop a run."""

    to: str = Field(description="OWNER/NAME; the token is that of HF_TOKEN or `hf auth login`, never written here")
    every: Interval | None = Field(
        None, description="steps, or a share of the run: the first checkpoint after each, and the last; none: all"
    )
    private: StrictBool = Field(True, description="false: everybody may see it; true leaves a public one alone")
    wait: Positive = Field(120, description="seconds that the end of the run waits for what is not sent yet")

    @model_validator(mode="after")
    def _names_a_repository(self) -> Self:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", self.to) or redacted(self.to) != self.to:
            raise ValueError("`to` is OWNER/NAME, no URL and no token; the token is taken from HF_TOKEN or the login")
        return self


class CheckpointConfig(LoopCheckpointConfig):
    """When the run is saved, and what is kept. `latest` and `best` are always spared."""

    every: Interval = "10%"
    publish: PublishConfig | None = Field(None, description="push checkpoints to a Hub beside the training")

    @model_validator(mode="after")
    def _pushed_from_a_disk(self) -> Self:
        if self.publish is not None and self.to is not None:
            raise ValueError(
                f"publish pushes checkpoints that lie on a disk, and to: {redacted(self.to)} is a store; leave one "
                "out, and publish a finished run with `pretrain publish`"
            )
        return self


class EvaluateConfig(MeasuresConfig, LoopEvaluateConfig):
    """Validation during training, at step 0 and every so often; further measures at chosen steps."""

    max_tokens: Positive | None = Field(None, description="at most this many token positions of each set")
    evaluators: tuple[ImportPath, ...] = Field((), description="further evaluators, my_module:my_function")
    samples: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), max_length=8, description="prompts, each completed (a masked model: [MASK] filled) at every evaluation"
    )

    def also_at(self, step: int, total_steps: int) -> bool:
        """Whether measures want a step that `every` does not name."""
        return self.has_measures and self.measures_at(step, total_steps)


class ExportConfig(Section):
    """The published form."""

    to: Literal["auto", "code"] | StockHome = Field(
        "auto", description="stock architecture, by its model_type; code: our own form with its code, for any shape"
    )
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    max_shard_bytes: Positive = 5_000_000_000
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")] | None = Field(
        None, description="of the model, for its card: an identifier of the Hub such as apache-2.0"
    )
    language: tuple[Annotated[str, Field(pattern=r"^([a-z]{2,3}|code|multilingual)$")], ...] | None = Field(
        None, description="of the text, for the card: codes of ISO 639 such as en, or code or multilingual"
    )


class RunConfig(LoopConfig):
    """A whole run: text, tokenizer, data, model, objective, training, export."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        architecture, length = self.model.architecture, self.data.sequence_length
        wanted = self.objective.model_kind
        if architecture is not None and wanted not in (None, KINDS[architecture]):
            fitting = ", ".join(name for name, kind in KINDS.items() if kind == wanted)
            an = "an" if wanted == "encoder" else "a"
            raise ValueError(
                f"objective.kind: {self.objective.kind} needs {an} {wanted} ({fitting}), not `{architecture}`"
            )
        if self.tokenizer.extend is not None and self.tokenizer.from_ is None and self.model.from_ is None:
            raise ValueError("tokenizer.extend teaches an existing tokenizer; name it: tokenizer.from, or model.from")
        self._data_fit()
        self._model_has_the_heads()
        self._samples_fit()
        self.evaluate.check_objective(self.objective.kind)
        positions = self.model.max_position_embeddings
        if positions is not None and positions < length:
            raise ValueError(
                f"data.sequence_length: {length} is longer than model.max_position_embeddings: {positions}; "
                "raise the one or lower the other"
            )
        if self.train.batch_tokens % length:
            lower = max(1, self.train.batch_tokens // length) * length
            raise ValueError(
                f"train.batch_tokens: {self.train.batch_tokens} is not a whole number of rows of "
                f"data.sequence_length: {length}; the nearest that fit are {lower} and {lower + length}"
            )
        steps, warmup = self.train.steps, self.schedule.warmup
        if steps is not None and isinstance(warmup, int) and warmup > steps:
            raise ValueError(f"schedule.warmup: {warmup} steps are more than train.steps: {steps}; lower the one")
        if isinstance(self.data.validation, tuple) and not self.data.validation:
            raise ValueError("data.validation: the list is empty; name files, or use {fraction: 0.01}")
        if architecture is not None and HOME_KINDS.get(self.export.to, KINDS[architecture]) != KINDS[architecture]:
            raise ValueError(f"export.to: {self.export.to} does not hold a `{architecture}` model; use auto")
        return self

    def _model_has_the_heads(self) -> None:
        """Refuse heads that the objective does not train, and classes that do not have those it does."""
        objective, model = self.objective, self.model
        given = [key for key in GENERATOR_KEYS if getattr(model, key)]
        if given and objective.kind != "rtd" and not objective.is_own:
            raise ValueError(f"model.{given[0]} belongs to objective.kind: rtd and has no effect with {objective.kind}")
        if objective.kind == "rtd" and model.grow is not None:
            raise ValueError("model.grow tiles one stack, and objective.kind: rtd trains two; grow from another model")
        needs = "objective.kind: rtd" if objective.kind == "rtd" else f"objective.sentences: {objective.sentences}"
        if model.class_ == "stock" and self.export.to == "code":
            raise ValueError("export.to: code is for our own classes; a model of class: stock is saved as it is")
        if model.class_ == "stock" and (objective.kind == "rtd" or objective.sentences != "none"):
            raise ValueError(f"{needs} trains heads that model.class: stock does not have; use class: loom")

    def _samples_fit(self) -> None:
        """Refuse prompts that the model can make nothing of."""
        if self.evaluate.samples and self.objective.kind == "rtd":
            raise ValueError("evaluate.samples: a detector of replaced tokens writes nothing; leave them out")
        if self.objective.model_kind != "encoder":
            return
        for text in self.evaluate.samples:
            if "[MASK]" not in text and "<mask>" not in text:
                raise ValueError(f"evaluate.samples: {text!r} has no gap for the model to fill; write [MASK] in it")

    def _data_fit(self) -> None:
        """Refuse data that the objective cannot be made of, or keys of them that have no effect with it."""
        kind, data = self.objective.kind, self.data
        if kind == "translation" and data.from_ is None and isinstance(data.text_field, str):
            raise ValueError(
                f"data.text_field: {data.text_field} is one text, and objective.kind: translation needs two; give "
                "[source, target], the columns or keys of the two sides"
            )
        if kind != "translation" and not isinstance(data.text_field, str):
            raise ValueError(
                f"data.text_field: {list(data.text_field)} are the two sides of objective.kind: translation; "
                f"{kind} takes one text"
            )
        paired = self.objective.model_kind == "seq2seq"
        if data.target_length is not None and not paired:
            raise ValueError(f"data.target_length: {data.target_length} has no effect with objective.kind: {kind}")
        if kind == "translation" and self.tokenizer.algorithm == "ids":
            raise ValueError("objective.kind: translation needs text; tokenizer.algorithm: ids learns no words of it")
        key = "whole_words" if self.objective.whole_words else "sentences"
        if self.objective.needs_marks and (data.ids_field is not None or self.tokenizer.algorithm == "ids"):
            raise ValueError(f"objective.{key} needs text, whose words are known; ready ids do not say where words end")

    @property
    def row_tokens(self) -> int:
        """Token positions of a row: `data.sequence_length`."""
        return self.data.sequence_length

    @property
    def rows_per_batch(self) -> int:
        """Rows of `data.sequence_length` token positions an optimizer step, over all processes."""
        return self.train.batch_tokens // self.data.sequence_length

    @property
    def tokens_per_step(self) -> int:
        """Token positions an optimizer step, over all processes: `train.batch_tokens`."""
        return self.train.batch_tokens

    @property
    def save_every(self) -> str | int:
        """`checkpoint.every`."""
        return self.checkpoint.every

    @property
    def attention_dropout(self) -> float:
        """Of the model, as the configuration says; 0 where it says nothing."""
        return self.model.attention_dropout or 0.0

    @property
    def kind(self) -> Literal["encoder", "decoder", "seq2seq"] | None:
        """What the architecture is; None when the model comes from elsewhere."""
        return None if self.model.architecture is None else KINDS[self.model.architecture]

    def as_dict(self) -> dict[str, Any]:
        """The resolved configuration as plain data; budgets and sizes that were not given are left out."""
        plain: dict[str, Any] = self.model_dump(mode="json", by_alias=True)
        for section in ("train", "model", "evaluate", "optimizer"):
            plain[section] = {key: value for key, value in plain[section].items() if value is not None}
        plain["tokenizer"] = _only_effective(plain["tokenizer"], from_=self.tokenizer.from_)
        if not self.model.optimizer_state:
            plain["model"].pop("optimizer_state", None)
        plain["objective"] = self.objective.effective()
        if self.data.target_length is None:
            plain["data"].pop("target_length")
        if self.schedule.kind != "wsd":
            plain["schedule"].pop("decay")
        if self.optimizer.name != "muon":
            plain["optimizer"].pop("momentum")
        if self.data.from_ is not None:
            plain["data"] = {key: value for key, value in plain["data"].items() if key in SHARDS_KEYS | {"from"}}
            return plain
        plain["data"].pop("from")
        if isinstance(self.data.validation, ValidationSplit):
            plain["data"]["validation"] = self.data.validation.model_dump(exclude_none=True)
        return plain


# --- reading and writing a configuration ---------------------------------------------------------------------------


def shipped_directory() -> Path:
    """Where the shipped recipes lie: the checkout's root, or the copy inside an installed wheel."""
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "configs" / "runs").is_dir():
        return checkout
    return Path(str(resources.files("pretrain") / "_recipes"))


def find_config(name_or_path: str | Path, folder: str = "runs") -> Path:
    """Resolve a path, or the bare name of a shipped run (or task) such as `quickstart-gpt`.

    Raises:
        ConfigError: when neither exists; names the nearest shipped one.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = shipped_directory() / "configs" / folder
    candidate = shipped / f"{name_or_path}.yaml"
    if path.name == str(name_or_path) and candidate.is_file():
        return candidate
    names = sorted(entry.stem for entry in shipped.glob("*.yaml"))
    near = difflib.get_close_matches(path.stem, names, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    raise ConfigError(
        f"no configuration `{name_or_path}`: give a YAML file, or the name of a shipped one ({', '.join(names)}){hint}"
    )


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run configuration from a YAML file, or a shipped run by name, with dotted overrides `key=value`.

    Raises:
        ConfigError: on unknown keys, wrong types, impossible combinations.
    """
    return load_as(RunConfig, "runs", name_or_path, overrides)


def load_as(schema: type[Schema], folder: str, name_or_path: str | Path, overrides: Sequence[str] = ()) -> Schema:
    """Read a configuration of a kind; `folder` of the shipped ones holds those that a bare name means.

    Raises:
        ConfigError: on unknown keys, wrong types, impossible combinations.
    """
    path = find_config(name_or_path, folder)
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys such as `name: ...`, found {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override)
    return validated(schema, raw, str(path))


def config_from_dict(raw: Mapping[str, Any], origin: str = "configuration") -> RunConfig:
    """Validate plain data, as YAML gives it.

    Raises:
        ConfigError: on unknown keys, wrong types, impossible combinations.
    """
    return validated(RunConfig, raw, origin)


def validated(schema: type[Schema], raw: Mapping[str, Any], origin: str) -> Schema:
    """Plain data as a configuration.

    Raises:
        ConfigError: on unknown keys, wrong types, impossible combinations.
    """
    try:
        return schema.model_validate(_tuples(raw))
    except ValidationError as error:
        lines = describe_errors(error, known_keys(schema))
        raise ConfigError("\n".join(f"{origin}: {redacted(line)}" for line in lines)) from None


def _tuples(value: Any) -> Any:
    """YAML lists to tuples, whole floats stay floats: pydantic's strict mode takes tuples for frozen fields."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*", key):
        raise ConfigError(
            f"override `{redacted(override)}`: write it as section.key=value, for example train.steps=100"
        )
    value = parse_yaml(text, f"override `{redacted(override)}`")
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(redacted(f"override `{override}`: `{parent}` is {child!r}, not a section with keys"))
        node = child
    if parents == ["train"] and last in BUDGETS:
        for budget in BUDGETS:  # one budget holds: the command line's replaces the file's
            node.pop(budget, None)
    node[last] = value


def dump_config(config: LoopConfig) -> str:
    """The resolved configuration as YAML: every key, defaults included; `load_config` reads it back unchanged."""
    return dump_yaml(config_to_dict(config))


def config_to_dict(config: LoopConfig) -> dict[str, Any]:
    """The resolved configuration as plain data (budgets and sizes that were not given are left out)."""
    return config.as_dict()


def _only_effective(tokenizer: dict[str, Any], *, from_: str | None) -> dict[str, Any]:
    learning = {key: tokenizer[key] for key in ("extend", *LEARNING_KEYS)} if tokenizer["extend"] else {}
    if from_ is not None:
        return {"from": from_, **learning}
    return learning or {key: value for key, value in tokenizer.items() if key not in ("from", "extend")}


def json_schema(kind: type[LoopConfig] = RunConfig) -> dict[str, Any]:
    """The JSON schema of a configuration, for editors."""
    schema = kind.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = f"pretrain {'run' if kind is RunConfig else 'task'} configuration"
    return schema


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, as key -> (old, new); a missing value is None."""
    changed: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys((*old, *new)):
        before, after, path = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed |= difference(before, after, f"{path}.")
        elif before != after:
            changed[path] = (before, after)
    return changed


def known_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        keys.append(path)
        for inner in _sections_in(field.annotation):
            keys += known_keys(inner, f"{path}.")
    return keys


def _sections_in(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        for option in typing.get_args(annotation):
            yield from _sections_in(option)
