"""What a changed configuration does: which stage each key decides, and whether it may change when a run goes on.

What lives here: one table of every key, the comparison with what was made or saved, and the refusals. What must not:
making anything, or the arithmetic of a resumed run (`training.resuming`).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pretrain.config import RunConfig, config_to_dict, difference, known_keys
from pretrain.config_loop import BUDGETS, LoopConfig
from pretrain.config_text import ConfigError, parse_yaml

STAGES = ("tokenizer", "data", "train", "evaluate", "export")


@dataclass(frozen=True)
class Rule:
    """What a change of a key does.

    Attributes:
        stage: the first stage that the key decides; what follows it is touched too. None: the key steers how a result
            is reached or shown, not the result.
        resume: whether a run that has a checkpoint goes on with another value: it does (safe), it does when it is
            told to (`--allow-change KEY`), or it does not (refused).
        reason: why, in words that end a message.
    """

    stage: str | None
    resume: Literal["safe", "allow", "refused"]
    reason: str


_SHAPE = """
hidden_size embedding_size intermediate_size num_hidden_layers num_decoder_layers num_hidden_groups num_attention_heads
num_key_value_heads head_dim max_position_embeddings type_vocab_size embedding_norm position_kind position_offset
relative_attention_num_buckets mixer attention_bias qk_norm block_kind mlp_kind mlp_bias norm_kind norm_bias first_norm
tie_word_embeddings head_transform head_dense_bias head_bias
"""
_MEANING = """
embedding_scale sinusoidal_layout rope_theta local_rope_theta rope_scaling partial_rotary_factor
relative_attention_max_distance local_window global_attention_every attention_pattern attention_scale attention_softcap
hidden_act norm_eps norm_placement residual_scale output_scale logit_softcap
"""

_PREDICTED = "kind rate final_rate random keep whole_words span sentences"


def _rules() -> dict[str, Rule]:
    """Each line: a section and its keys (none: the whole section), the stage, what a resumed run does, and why."""
    table: list[tuple[str, str, str | None, Literal["safe", "allow", "refused"], str]] = [
        ("name", "", None, "safe", "it says where the run lies"),
        ("out", "", None, "safe", "it says where the run lies"),
        ("tokenizer", "", "tokenizer", "refused", "the data were prepared with this tokenizer"),
        ("data", "train document text_field ids_field encoding", "tokenizer", "refused", "the shards hold this text"),
        ("data", "train.weight train.max_epochs", "train", "refused", "it decides which rows each step sees"),
        ("data", "train.license", None, "safe", "it is for the model card"),
        ("data", "from", "data", "refused", "the rows are packed from these shards"),
        ("data", "filters dedup decontaminate", "data", "refused", "it chose the text"),
        ("data", "on_error max_bad_share", None, "safe", "it decides whether text is taken, not what comes of it"),
        ("data", "validation", "tokenizer", "refused", "documents would change sides between training and validation"),
        ("data", "sequence_length target_length", "train", "refused", "the rows are packed to this length"),
        ("data", "part_bytes", "data", "refused", "it decides the order of the shards"),
        ("data", "phases", "train", "refused", "it decides which rows each step sees"),
        ("data", "max_documents_per_row", "train", "refused", "the rows are packed by it"),
        ("data", "executor workers verify", None, "safe", "it steers the work, not what comes out"),
        ("model", "architecture from class grow", "tokenizer", "refused", "the weights are of that model"),
        ("model", "optimizer_state", "train", "refused", "the first step was made with it, or without"),
        ("model", _SHAPE, "train", "refused", "the weights have this shape"),
        ("model", _MEANING, "train", "refused", "the weights have learned with it"),
        ("model", "initializer initializer_range", "train", "refused", "the first weights were drawn with it"),
        ("model", "hidden_dropout attention_dropout embedding_dropout", "train", "allow", "it changes each later step"),
        ("model", "label_smoothing rtd_weight", "train", "allow", "it changes each later step"),
        ("model", "generator_size generator rtd_sharing", "train", "refused", "the weights have this shape"),
        # Another mask rate would need no other rows, but then the batch of a step is no function of (data, seed, step).
        ("objective", _PREDICTED, "train", "refused", "it decides what every step of the run predicts"),
        ("optimizer", "name", "train", "refused", "the saved state is that optimizer's"),
        ("optimizer", "lr adam_lr", "train", "allow", "the learning rate jumps"),
        ("optimizer", "weight_decay betas eps momentum", "train", "allow", "it changes each later step"),
        ("schedule", "kind warmup decay final", "train", "allow", "the learning rate may jump"),
        ("train", " ".join(BUDGETS), "train", "allow", "the schedule stretches with the budget"),
        ("train", "batch_tokens", "train", "refused", "step s sees the s-th batch of this size"),
        ("train", "seed", "train", "refused", "it decides the order of the rows"),
        ("train", "precision max_grad_norm", "train", "allow", "it changes each later step"),
        # The same rows, targets, learning rate and dropout of hidden states; other rounding. See also `_DRAWN`.
        ("train", "micro_batch attention compile gradient_checkpointing", None, "safe", "it changes rounding alone"),
        ("train", "strategy processes shard_size offload deepspeed", None, "safe", "it splits the same work otherwise"),
        ("train", "ddp_timeout check_replicas stop_signals", None, "safe", "it steers the work, not what comes out"),
        ("train", "on_nonfinite spike_sigma spike_window on_spike", None, "safe", "it guards the steps to come"),
        ("checkpoint", "", None, "safe", "it says what is saved"),
        ("evaluate", "", None, "safe", "it says what is measured"),
        ("evaluate", "patience", "train", "refused", "it decides where the run ends"),
        ("log", "", None, "safe", "it says what is shown"),
        ("export", "", "export", "safe", "it comes after training"),
        ("task", "", "train", "refused", "it decides the examples and what is predicted"),
        ("task", "root", None, "safe", "the rows are compared by their content"),
        ("task", "metric", "train", "refused", "the best checkpoint was chosen by it"),
        ("train", "batch_size", "train", "refused", "step s sees the s-th batch of this size"),
        ("train", "seeds", None, "safe", "each is a run of its own"),
        ("model", "weights lora classifier_pooling", "train", "refused", "the weights are of that model"),
        ("export", "license language", None, "safe", "it is for the model card"),
    ]
    return {
        f"{section}.{key}" if key else section: Rule(stage, resume, reason)
        for section, keys, stage, resume, reason in table
        for key in keys.split() or [""]
    }


RULES = _rules()
"""The rule of every key, by the longest prefix."""

_UNKNOWN = Rule(STAGES[0], "refused", "no rule says what it touches")
# Attention dropout draws from a generator, in the order of the forward passes; hidden dropout by the row alone.
_DRAWN = Rule(None, "allow", "attention dropout draws other masks in another split or by another kernel")
_DRAWS = frozenset(f"train.{key}" for key in ("micro_batch", "processes", "strategy", "attention", "compile"))
# Where rows meet in a forward pass, which of them do is part of the loss.
_MEETING = Rule("train", "refused", "the other rows of a process's micro-batch are part of the loss")
_MEETS = frozenset({"train.micro_batch", "train.processes"})
# Keys that come and go with another one are allowed with it.
_COMPANIONS = {"schedule.decay": "schedule.kind"}


class ChangedConfigError(ConfigError):
    """Something of this name exists that another configuration made; lists the difference and what it touches."""


@dataclass(frozen=True)
class Change:
    """A key that differs; None stands for a key that is not given.

    `drawn` says that the model has attention dropout, whose draws depend on more keys than its training does, and
    `meets` that a row's loss depends on the others of its micro-batch.
    """

    key: str
    before: Any
    after: Any
    drawn: bool = False
    meets: bool = False

    @property
    def rule(self) -> Rule:
        """What the change does. A micro-batch of `auto` is the checkpoint's, but where rows meet it is refused too."""
        if self.meets and self.key in _MEETS and None not in (self.before, self.after):
            return _MEETING
        kept = self.key == "train.micro_batch" and self.after == "auto"
        return _DRAWN if self.drawn and self.key in _DRAWS and not kept else rule_of(self.key)

    def allowed_by(self, allow: Collection[str]) -> bool:
        """Whether a resumed run takes it, when the keys (or whole sections) of `allow` may change."""
        names = {self.key, _COMPANIONS.get(self.key, self.key)}
        if self.key in _BUDGET_KEYS:
            names |= _BUDGET_KEYS  # one budget replaces another
        named = any(name == key or name.startswith(f"{key}.") for name in names for key in allow)
        return self.rule.resume == "safe" or (self.rule.resume == "allow" and named)

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.after!r}"


_BUDGET_KEYS = frozenset(f"train.{budget}" for budget in BUDGETS)


def rule_of(key: str) -> Rule:
    """The rule of a dotted key; a key without one touches everything."""
    parts = re.sub(r"\[[^\]]*\]", "", key).split(".")  # a source's name, as in data.train[web].weight, may hold dots
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((RULES[prefix] for prefix in prefixes if prefix in RULES), _UNKNOWN)


def changed_keys(old: Mapping[str, Any], config: LoopConfig, attention_dropout: float | None = None) -> list[Change]:
    """What differs between the plain data of a saved configuration and the one that is wanted now.

    `attention_dropout` is the model's, where it is known; else the configuration's.
    """
    drawn = _is_drawn(config, attention_dropout)
    new: dict[str, Any] = json.loads(json.dumps(config_to_dict(config)))
    changes = difference(old, new)
    if "data.train" in changes:
        changes |= _changed_sources(*changes.pop("data.train"))
    return [Change(key, before, after, drawn, config.rows_meet) for key, (before, after) in changes.items()]


def _is_drawn(config: LoopConfig, attention_dropout: float | None) -> bool:
    return bool(config.attention_dropout if attention_dropout is None else attention_dropout)


def _changed_sources(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """What differs between two lists of named sources, as `difference` says it; of other lists, all of them.

    Text is numbered in the order of the sources, so sources in another order differ as a whole.
    """
    named: list[dict[str, Any]] = []
    for entries in (old, new):
        if not isinstance(entries, list) or not all(isinstance(entry, dict) and "name" in entry for entry in entries):
            return {"data.train": (old, new)}
        named.append({f"data.train[{entry['name']}]": entry for entry in entries})
    before, after = named
    if [name for name in before if name in after] != [name for name in after if name in before]:
        return {"data.train": (old, new)}
    return difference(before, after)


def check_allowed(keys: Iterable[str], schema: type[LoopConfig] = RunConfig) -> None:
    """Refuse an `--allow-change` that names no key.

    Raises:
        ConfigError: names the nearest key.
    """
    known = known_keys(schema)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(f"--allow-change {key}: no such key" + (f"; did you mean {near[0]}?" if near else ""))


def changes_at_resume(
    old: Mapping[str, Any],
    config: LoopConfig,
    allow: Collection[str] = (),
    *,
    attention_dropout: float | None = None,
    processes: tuple[int, int] | None = None,
) -> list[Change]:
    """What a run goes on with that its checkpoint did not have.

    Args:
        old: the configuration in the checkpoint, as plain data.
        config: the configuration that is wanted now.
        allow: keys, or whole sections, that may change.
        attention_dropout: the model's, where it is known; else the configuration's.
        processes: how many there were and are, where it is known: a launcher may say it in place of the configuration.

    Raises:
        ChangedConfigError: when a change is not allowed; lists them all, with the remedy of each.
    """
    changes = changed_keys(old, config, attention_dropout)
    if processes is not None and processes[0] != processes[1]:
        changes = [change for change in changes if change.key != "train.processes"]
        changes.append(Change("train.processes", *processes, _is_drawn(config, attention_dropout), config.rows_meet))
    _refuse([change for change in changes if not change.allowed_by(allow)], config)
    return changes


def refuse_changed(
    config: RunConfig,
    saved: Path,
    stages: Collection[str],
    *,
    trained_with: Mapping[str, Any] | None = None,
    allow: Collection[str] = (),
) -> None:
    """Refuse what contradicts the artifacts of a run: all of it in one message.

    Args:
        config: the configuration that is wanted now.
        saved: the resolved copy beside the artifacts, as `dump_config` wrote it.
        stages: those whose artifacts are there; a change of a key that decides one of them is refused.
        trained_with: the configuration in the newest checkpoint; None when there is none.
        allow: keys that a resumed training may change.

    Raises:
        ChangedConfigError: lists every key in the way, the stages that it touches, and the remedy.
    """
    old: dict[str, Any] = parse_yaml(saved.read_text(encoding="utf-8"), str(saved)) if saved.is_file() else {}
    made = [change for change in changed_keys(old, config) if old and change.rule.stage in stages]
    trained = [] if trained_with is None else changed_keys(trained_with, config)
    refused = [*made, *(change for change in trained if not change.allowed_by(allow))]
    _refuse(list({change.key: change for change in refused}.values()), config)


def _refuse(changes: list[Change], config: LoopConfig) -> None:
    if not changes:
        return
    lines = []
    for change in changes:
        rule = change.rule
        touched = ", ".join(STAGES[STAGES.index(rule.stage) :] if rule.stage is not None else ())
        if rule.resume == "allow":
            remedy = f"{rule.reason}; --allow-change {change.key} goes on with it"
        else:
            remedy = f"it cannot change: {rule.reason}" if rule.resume == "refused" else "it is made already"
        lines.append(f"  {change}{f' (touches {touched})' if touched else ''}: {remedy}")
    options = [f"--allow-change {change.key}" for change in changes if change.rule.resume == "allow"]
    all_of_them = f"To go on with all of it: {' '.join(options)}. " if len(options) == len(changes) > 1 else ""
    raise ChangedConfigError(
        f"`{config.directory}` was made with another configuration:\n"
        + "\n".join(lines)
        + f"\n{all_of_them}Otherwise give this one another name (name={config.name}-2), or archive the old one "
        "(`pretrain run --fresh`)."
    )
