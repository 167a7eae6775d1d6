"""The run configuration: YAML 1.2, strictness, overrides, messages, round trips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.changes import RULES, rule_of
from pretrain.config import (
    ModelConfig,
    RunConfig,
    difference,
    dump_config,
    find_config,
    known_keys,
    load_config,
    shipped_directory,
)
from pretrain.config_loop import BUDGETS
from pretrain.config_model import GENERATOR_KEYS, KINDS
from pretrain.config_task import TuningConfig
from pretrain.config_text import ConfigError, dump_yaml, parse_yaml
from pretrain.config_types import amount_in_steps
from pretrain.models import DETECTION_KEYS

TEXT = """
name: small
data: {train: [python-stdlib], sequence_length: 256}
model: {architecture: gpt2, hidden_size: 256}
objective: {kind: causal}
optimizer: {name: muon, lr: 2e-2}
train: {minutes: 2, batch_tokens: 8_192}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(TEXT)
    return file


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("8_192", 8192),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2%", "2%"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        (".5", 0.5),
        ("-1.5e+3", -1500.0),
        ("[1, no, 1e2]", [1, "no", 100.0]),
    ],
)
def test_yaml_scalars_follow_version_1_2(text: str, value: Any) -> None:
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_key_that_stands_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"line 2: key `a` stands twice"):
        parse_yaml("a: 1\na: 2\n")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.minuts=3", ["train.minuts", "3", "did you mean `train.minutes`"]),
        ("optimzer.lr=3", ["optimzer", "did you mean `optimizer`"]),
        ("train.batch_tokens=abc", ["train.batch_tokens", "whole number", "'abc'"]),
        ("train.batch_tokens=1000", ["768", "1024"]),
        ("model.architecture=gtp2", ["did you mean `gpt2`", "'gtp2'"]),
        ("data.document={strat: a}", ["data.document.strat", "did you mean `data.document.start`"]),
        ("data.document={start: '('}", ["data.document", "regular expression"]),
        ("data.validation={fraction: 2}", ["data.validation.fraction", "1", "(value 2)"]),
        ("data.validation={fraction: 0.1, tail: 0.2}", ["exactly one of fraction and tail"]),
        ("data.train=[{name: a, fils: [x]}]", ["data.train[0].fils"]),
        ("data.train=[]", ["data.train"]),
        ("objective.kind=mlm", ["objective.kind", "bert, modernbert", "gpt2"]),
        ("objective.kind=clm", ["objective", "mlm, causal"]),
        ("objective.rate=0.2", ["rate", "remove it"]),
        ("optimizer.name=adamw optimizer.momentum=0.9", ["momentum", "muon"]),
        ("optimizer.lr=no", ["optimizer.lr", "number", "'no'"]),
        ("schedule.warmup=2x", ["schedule.warmup", "2%", "'2x'"]),
        ("schedule.decay=10%", ["decay", "wsd"]),
        ("log.to=[consol]", ["log.to[0]", "did you mean `console`"]),
        ("tokenizer.lowercase=no", ["tokenizer.lowercase", "true or false"]),
        ("model.max_position_embeddings=128", ["256", "128"]),
        ("model.from=x model.hidden_size=3", ["from", "remove one"]),
        ("model.optimizer_state=true", ["optimizer_state", "name a checkpoint's model"]),
        ("model={from: x, grow: {hidden_size: 64}, optimizer_state: true}", ["optimizer_state", "without `grow`"]),
        ("export.to=bert", ["export.to", "bert", "gpt2"]),
        ("export.to=lama", ["export.to", "did you mean `llama`"]),
        ("checkpoint.every=0", ["checkpoint.every", "at least 1 step"]),
        ("schedule.kind=wsd schedule.warmup=60% schedule.decay=60%", ["more than the whole run"]),
        ("train.steps=5 schedule.warmup=9", ["schedule.warmup", "train.steps"]),
        ("data.validation=[]", ["data.validation", "empty"]),
        ("data.validation={fraction: 1.0}", ["data.validation.fraction", "1"]),
        ("data.train=[{name: a, files: []}]", ["data.train[0].files", "at least 1 item"]),
        ("train.steps", ["section.key=value"]),
        ("name.x=1", ["`name` is 'small'"]),
        ("name=a/b", ["name", "matches"]),
    ],
)
def test_mistakes_are_named_with_a_remedy(path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, override.split(" ") if "{" not in override and "[" not in override else [override])
    for word in words:
        assert word in str(caught.value)


def test_one_budget_holds(path: Path) -> None:
    config = load_config(path, ["train.steps=100"])
    assert config.train.steps == 100
    assert config.train.minutes is None
    path.write_text(TEXT.replace("minutes: 2", "minutes: 2, steps: 3"))
    with pytest.raises(ConfigError, match="exactly one budget"):
        load_config(path)
    path.write_text(TEXT.replace("minutes: 2, ", ""))
    with pytest.raises(ConfigError, match="given: none"):
        load_config(path)


def test_the_resolved_copy_reads_back_unchanged(path: Path, tmp_path: Path) -> None:
    overrides = ["train.tokens=1_000_000", "schedule.kind=wsd", "data.validation=[{name: news, files: [a.txt]}]"]
    for config in (load_config(path), load_config(path, overrides)):
        copy = tmp_path / "copy.yaml"
        copy.write_text(dump_config(config))
        assert load_config(copy) == config


@pytest.mark.parametrize(
    "file", sorted((shipped_directory() / "configs" / "runs").glob("*.yaml")), ids=lambda f: f.stem
)
def test_shipped_runs_load_and_are_found_by_name(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    assert find_config(file.stem) == file
    assert config.name == file.stem
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


def test_an_unknown_run_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean `quickstart-gpt`"):
        find_config("quickstart-gtp")


def test_a_configuration_cannot_be_changed(path: Path) -> None:
    config = load_config(path)
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("text", ["1e5", "8_192", "true", "~", "no", "0x10", "1:30", "2%", "ünï", "a: b"])
def test_texts_that_look_like_numbers_survive_the_copy(text: str) -> None:
    assert parse_yaml(dump_yaml({"key": text})) == {"key": text}


def test_every_key_says_what_it_decides() -> None:
    """A new key must be placed: a change that nobody placed would count as touching everything."""
    known = {*known_keys(RunConfig), *known_keys(TuningConfig)}
    assert {prefix.split(".")[0] for prefix in RULES} == {key.split(".")[0] for key in known}
    of_sources = {"data.train.weight", "data.train.max_epochs", "data.train.license"}  # keys of the entries of a list
    assert set(RULES) <= {*known, *of_sources}
    placed = {key for key in known if rule_of(key).reason != "no rule says what it touches"}
    assert known - placed <= {key.split(".")[0] for key in known}  # sections themselves


def test_model_keys_are_the_models_own() -> None:
    from pretrain.models import ARCHITECTURES, config_keys

    assert {name: design.kind for name, design in ARCHITECTURES.items()} == KINDS
    keys = set(ModelConfig.model_fields) - {"architecture", "from_", "class_", "grow", "optimizer_state"}
    assert keys <= {key for architecture in KINDS for key in config_keys(architecture)}


@given(st.integers(1, 10**9), st.floats(0, 100))
def test_amounts(total: int, percent: float) -> None:
    assert amount_in_steps(7, total) == 7
    assert 0 <= amount_in_steps(f"{percent:.3f}%", total) <= total


def test_difference_lists_dotted_keys() -> None:
    assert difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}, "d": 4}) == {"a.b": (1, 3), "d": (None, 4)}


def test_every_key_of_the_contract_is_known() -> None:
    keys = set(known_keys(RunConfig))
    assert {f"train.{budget}" for budget in BUDGETS} <= keys
    for key in ("tokenizer.from", "model.from", "data.validation.fraction", "data.document.start", "objective.rate"):
        assert key in keys


def test_keys_of_detection_are_the_same_for_runs_and_models() -> None:
    assert GENERATOR_KEYS == DETECTION_KEYS
