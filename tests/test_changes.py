"""What may change when a run goes on: every key has a rule, no change is silent, no learning rate jumps unannounced."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pretrain.changes import (
    RULES,
    STAGES,
    Change,
    ChangedConfigError,
    changed_keys,
    changes_at_resume,
    check_allowed,
    refuse_changed,
    rule_of,
)
from pretrain.config import (
    ConfigError,
    RunConfig,
    config_from_dict,
    config_to_dict,
    dump_config,
    known_keys,
    load_config,
)
from pretrain.config_loop import BUDGETS, ScheduleConfig
from pretrain.train import train
from pretrain.training.progress import Progress
from pretrain.training.resuming import take_up
from pretrain.training.schedule import learning_rate_scale
from pretrain.training.trainer import Trainer
from scripts.faults import tiny

OF_SOURCES = ("data.train.weight", "data.train.max_epochs", "data.train.license")
"""Keys within a list, which are named with their source."""
LEAVES = [
    key
    for key in known_keys()
    if key not in OF_SOURCES and not any(other.startswith(f"{key}.") for other in known_keys())
]
STEPS, STOP = 6, 3


# --- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", known_keys())
def test_every_key_has_a_rule(key: str) -> None:
    """No key of a section whose keys differ falls back on the section; what decides nothing may change, and so on."""
    mixed = {"data", "model", "objective", "optimizer", "schedule", "train"}
    if key in mixed:
        return
    assert not mixed & RULES.keys()
    assert any(key == prefix or key.startswith(f"{prefix}.") for prefix in RULES)
    rule = rule_of(key)
    assert rule.reason
    if rule.stage in (None, "evaluate", "export"):
        assert rule.resume == "safe"
    else:
        assert rule.stage in STAGES[:3]
        assert rule.resume == "refused" if rule.stage != "train" else rule.resume != "safe"


def config() -> RunConfig:
    raw: dict[str, Any] = {
        "name": "any",
        "data": {"train": ["x"], "sequence_length": 32},
        "model": {"architecture": "gpt2"},
        "objective": {"kind": "causal"},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "train": {"steps": 10, "batch_tokens": 256},
    }
    return config_from_dict(raw)


def with_another(plain: dict[str, Any], key: str) -> dict[str, Any]:
    """The same plain configuration with a value at `key` that it does not have."""
    changed = json.loads(json.dumps(plain))
    node = changed
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    node[last] = "another value"
    return changed


@pytest.mark.parametrize("key", LEAVES)
def test_a_changed_value_of_every_key_does_what_its_rule_says(key: str) -> None:
    """Safe: taken. Allow: refused with the option, taken with it or its section's. Refused: whatever is allowed."""
    now = config()
    old = with_another(config_to_dict(now), key)
    rule = rule_of(key)
    if rule.resume == "safe":
        assert [change.rule for change in changes_at_resume(old, now)] == [rule]
        return
    with pytest.raises(ChangedConfigError) as caught:
        changes_at_resume(old, now)
    assert "'another value'" in str(caught.value)
    assert rule.reason in str(caught.value)
    assert "name=any-2" in str(caught.value)
    assert "--fresh" in str(caught.value)
    if rule.resume == "allow":
        assert f"--allow-change {key}" in str(caught.value)
        assert changes_at_resume(old, now, [key])
        assert changes_at_resume(old, now, [key.split(".")[0]])
    else:
        with pytest.raises(ChangedConfigError, match="cannot change"):
            changes_at_resume(old, now, [key, key.split(".")[0]])


def test_a_key_that_nobody_placed_is_refused() -> None:
    assert rule_of("train.something_new").resume == "refused"
    assert rule_of("train.something_new").stage == STAGES[0]


def test_one_budget_replaces_another() -> None:
    changes = [Change("train.minutes", 2.0, None), Change("train.steps", None, 10)]
    for budget in BUDGETS:
        assert all(change.allowed_by([f"train.{budget}"]) for change in changes)
    assert not any(change.allowed_by(["train.precision"]) for change in changes)


def test_decay_comes_and_goes_with_the_kind_of_schedule() -> None:
    wsd = config().model_copy(update={"schedule": ScheduleConfig(kind="wsd")})
    assert len(changes_at_resume(config_to_dict(config()), wsd, ["schedule.kind"])) == 2


WEB = {"name": "web", "files": ["w.txt"], "weight": 0.5}
CODE = {"name": "code.2", "files": ["c.txt"], "weight": 0.5}


@pytest.mark.parametrize(
    ("train", "said", "stages"),
    [
        ([WEB | {"weight": 0.9}, CODE], ["data.train[web].weight: 0.5 -> 0.9"], ["train"]),
        (
            [WEB, CODE | {"weight": 0.2, "max_epochs": 2.0}],
            ["data.train[code.2].weight: 0.5 -> 0.2", "data.train[code.2].max_epochs: None -> 2.0"],
            ["train", "train"],
        ),
        ([WEB | {"encoding": "big5"}, CODE], ["data.train[web].encoding: None -> 'big5'"], ["tokenizer"]),
        ([WEB], ["data.train[code.2]: {'name': 'code.2', "], ["tokenizer"]),
        ([CODE, WEB], ["data.train: [{'name': 'web', "], ["tokenizer"]),
        (["w.txt"], ["data.train: [{'name': 'web', "], ["tokenizer"]),
    ],
)
def test_of_the_sources_the_part_that_differs_is_said(train: list[Any], said: list[str], stages: list[str]) -> None:
    old = json.loads(json.dumps(config_to_dict(changed(config(), data={"train": [WEB, CODE]}))))
    new = changed(config(), data={"train": train})
    changes = changed_keys(old, new)
    assert [change.rule.stage for change in changes] == stages
    assert all(str(change).startswith(start) for change, start in zip(changes, said, strict=True))
    with pytest.raises(ChangedConfigError, match="cannot change"):
        changes_at_resume(old, new, ["data.train"])


def test_other_weights_touch_the_text_only_of_a_trained_run(tmp_path: Path) -> None:
    old, new = (changed(config(), data={"train": [WEB | {"weight": weight}, CODE]}) for weight in (0.5, 0.9))
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_config(old))
    refuse_changed(new, saved, ["tokenizer", "data"])
    with pytest.raises(ChangedConfigError, match=r"data\.train\[web\]\.weight: 0\.5 -> 0\.9 \(touches train, "):
        refuse_changed(new, saved, ["tokenizer", "data"], trained_with=json.loads(json.dumps(config_to_dict(old))))


def test_only_keys_can_be_allowed() -> None:
    check_allowed(["train", "optimizer.lr"])
    with pytest.raises(ConfigError, match=r"no such key; did you mean optimizer\.lr\?"):
        check_allowed(["optimizer.lrr"])


def test_all_that_is_in_the_way_is_listed_with_one_command_for_it() -> None:
    old = with_another(with_another(config_to_dict(config()), "optimizer.lr"), "optimizer.eps")
    both = r"all of it: --allow-change optimizer\.lr --allow-change optimizer\.eps"
    with pytest.raises(ChangedConfigError, match=both):
        changes_at_resume(old, config())


# --- budgets and learning rates -------------------------------------------------------------------------------------


def taken(
    progress: Progress, old: RunConfig, new: RunConfig, *allow: str, rates: tuple[float, float] = (0.01, 0.01)
) -> list[str]:
    plain = json.loads(json.dumps(config_to_dict(old)))
    return take_up(progress, plain, new, num_rows=80, rates={"all": rates}, arithmetic="fp32 on cpu", allow=allow)


def changed(base: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    raw = json.loads(json.dumps(config_to_dict(base)))
    for section, keys in sections.items():
        raw[section] = {key: value for key, value in {**raw[section], **keys}.items() if value is not None}
    return config_from_dict(raw)


def at(step: int, total: int = 10, **values: Any) -> Progress:
    return Progress(run_id="x", total_steps=total, step=step, arithmetic="fp32 on cpu", **values)


def test_a_longer_cosine_says_both_learning_rates() -> None:
    progress, base = at(5), config()
    lines = taken(progress, base, changed(base, train={"steps": 20}), "train.steps")
    assert progress.total_steps == 20
    was, now = (0.01 * learning_rate_scale(5, total, base.schedule) for total in (10, 20))
    assert f"learning rate of step 6 jumps: all {was:.6g} -> {now:.6g}" in lines
    assert progress.changes == [{"step": 5, "key": "train.steps", "before": 10, "after": 20}]


@pytest.mark.parametrize("kind", ["wsd", "constant"])
def test_a_longer_budget_does_not_jump_where_the_schedule_is_flat(kind: str) -> None:
    base = changed(config(), schedule={"kind": kind, "warmup": 1})
    lines = taken(at(5), base, changed(base, train={"steps": 20}), "train.steps")
    assert "the budget is 20 steps now; it was 10" in lines
    assert not any("jumps" in line for line in lines)
    if kind == "wsd":  # in its decay it does
        assert any("jumps" in line for line in taken(at(9), base, changed(base, train={"steps": 20}), "train.steps"))


def test_the_same_budget_in_other_words_changes_nothing() -> None:
    progress, base = at(5), config()
    lines = taken(progress, base, changed(base, train={"steps": None, "tokens": 2560}), "train.tokens")
    assert progress.total_steps == 10
    assert not any("jumps" in line for line in lines)


def test_new_minutes_are_counted_at_the_pace_of_the_run() -> None:
    progress = at(5, total=100, seconds=10.0)
    base = changed(config(), train={"steps": None, "minutes": 3.0})
    taken(progress, base, changed(base, train={"minutes": 5.0}), "train.minutes")
    assert progress.total_steps == 150  # 300 s at 2 s a step
    taken(progress, base, changed(base, train={"minutes": None, "hours": 0.1}), "train")
    assert progress.total_steps == 180
    with pytest.raises(ChangedConfigError, match=r"give the new budget as train\.steps"):
        taken(at(0, total=100), base, changed(base, train={"minutes": 5.0}), "train.minutes")


def test_unchanged_minutes_stay_the_steps_that_they_were() -> None:
    progress = at(5, total=100, seconds=999.0)
    base = changed(config(), train={"steps": None, "minutes": 3.0})
    assert taken(progress, base, base) == []
    assert progress.total_steps == 100


def test_what_no_step_would_see_is_refused() -> None:
    base = config()
    with pytest.raises(ChangedConfigError, match=r"new budget is 4 steps, but `.*` has made 5"):
        taken(at(5), base, changed(base, train={"steps": 4}), "train.steps")
    finished = at(10, scored_at=10)
    with pytest.raises(ChangedConfigError, match=r"finished \(10 steps\).*optimizer.lr: 0.01 -> 0.02"):
        taken(finished, base, changed(base, optimizer={"lr": 0.02}), "optimizer.lr")
    assert taken(finished, base, changed(base, log={"every": 5})) == []
    assert finished.changes == []


def test_another_machine_is_said() -> None:
    progress, base = at(5), config()
    progress.arithmetic = "bf16 on cuda"
    line = "arithmetic: bf16 on cuda -> fp32 on cpu: the run goes on, but not bit for bit"
    assert taken(progress, base, base) == [line]
    assert progress.changes[0]["key"] == "arithmetic"
    assert taken(progress, base, base) == []


SPLITS = [
    ({"train": {"micro_batch": 4}}, "train.micro_batch: 'auto' -> 4"),
    ({"train": {"processes": 2}}, "train.processes: None -> 2"),
    ({"train": {"strategy": "fsdp2"}}, "train.strategy: 'auto' -> 'fsdp2'"),
    ({"train": {"attention": "eager"}}, "train.attention: 'auto' -> 'eager'"),
    ({"train": {"compile": True}}, "train.compile: False -> True"),
]


@pytest.mark.parametrize(("sections", "said"), SPLITS, ids=lambda value: str(value))
def test_what_attention_dropout_draws_by_needs_leave(sections: dict[str, Any], said: str) -> None:
    """Without it the same change is safe. The model may have it from a directory, where only the caller knows of it."""
    base = config()
    drawn = changed(base, model={"attention_dropout": 0.1})
    key = said.partition(":")[0]
    message = rf"{said}: attention dropout draws other masks .*; --allow-change {key} goes on with it"
    with pytest.raises(ChangedConfigError, match=message) as caught:
        taken(at(5), drawn, changed(drawn, **sections), key[:-1])
    assert "touches" not in str(caught.value)
    for allow in (key, "train"):
        lines = taken(at(5), drawn, changed(drawn, **sections), allow)
        assert any(line.startswith(f"{said}: from step 6 on; attention dropout draws") for line in lines)
    assert any(said in line for line in taken(at(5), base, changed(base, **sections)))
    plain = json.loads(json.dumps(config_to_dict(base)))
    with pytest.raises(ChangedConfigError, match=message):
        changes_at_resume(plain, changed(base, **sections), attention_dropout=0.1)
    assert changes_at_resume(plain, changed(base, **sections), attention_dropout=0.0)


def test_a_micro_batch_of_auto_stays_what_it_was_with_attention_dropout() -> None:
    drawn = changed(config(), model={"attention_dropout": 0.1}, train={"micro_batch": 4})
    assert taken(at(5), drawn, changed(drawn, train={"micro_batch": "auto"}))


def test_processes_that_a_launcher_chose_are_told_like_configured_ones() -> None:
    base = config()
    plain = json.loads(json.dumps(config_to_dict(base)))
    assert [str(change) for change in changes_at_resume(plain, base, processes=(2, 4))] == ["train.processes: 2 -> 4"]
    assert changes_at_resume(plain, base, processes=(2, 2), attention_dropout=0.1) == []
    with pytest.raises(
        ChangedConfigError, match=r"train.processes: 2 -> 4: attention dropout.*--allow-change train.pro"
    ):
        changes_at_resume(plain, base, processes=(2, 4), attention_dropout=0.1)
    both = changes_at_resume(plain, changed(base, train={"processes": 4}), processes=(2, 4))
    assert [str(change) for change in both] == ["train.processes: 2 -> 4"]


# --- real runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    """A masked model with dropout, stopped at step 3 of 6."""
    sections: dict[str, Any] = {"train": {"steps": STEPS}, "checkpoint": {"every": 100}, "evaluate": {"every": 100}}
    run = tiny.make(tmp_path_factory.mktemp("stopped"), name="stopped", **sections)
    step = Trainer._step

    def stopping(self: Trainer, progress: Progress, *rest: Any) -> None:
        step(self, progress, *rest)
        if progress.step == STOP:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", stopping)
        assert train(load_config(run.config), console=recorded()) == 75
    return run


@pytest.fixture(scope="module")
def unchanged(stopped: tiny.Run, tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    """The same run, gone on to its end as it was."""
    return go_on(stopped, tmp_path_factory.mktemp("unchanged"), [], [])[0]


def recorded() -> Console:
    return Console(file=io.StringIO(), width=400, soft_wrap=True)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def digests(directory: Path) -> dict[str, tuple[str, int]]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def lines_of(run: tiny.Run) -> dict[int, dict[str, Any]]:
    lines = (run.directory / "train" / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry for entry in map(json.loads, lines) if "loss" in entry}


def go_on(stopped: tiny.Run, folder: Path, overrides: list[str], allow: list[str]) -> tuple[tiny.Run, str]:
    run = tiny.copy(stopped, folder)
    console = recorded()
    assert train(load_config(run.config, overrides), allow_changes=allow, console=console) == 0
    return run, text_of(console)


@pytest.mark.parametrize(
    "override",
    [
        "log.every=2",
        "checkpoint.every=1",
        "checkpoint.keep=1",
        "evaluate.every=2",
        "evaluate.max_tokens=256",
        "export.dtype=bf16",
        "data.workers=1",
        "train.stop_signals=[SIGUSR1]",
        "train.on_nonfinite=skip",
        "train.spike_sigma=6.0",
    ],
)
def test_what_is_safe_is_announced_and_changes_no_weight(
    stopped: tiny.Run, unchanged: tiny.Run, tmp_path: Path, override: str
) -> None:
    run, said = go_on(stopped, tmp_path, [override], [])
    key = override.partition("=")[0]
    assert len([line for line in said.splitlines() if line.startswith(f"{key}: ")]) == 1
    assert f"from step {STOP + 1} on" in said
    assert tiny.weights(run, STEPS) == tiny.weights(unchanged, STEPS)
    record = json.loads((run.directory / "train" / "changes.json").read_text())
    assert [(entry["step"], entry["key"]) for entry in record] == [(STOP, "out"), (STOP, key)]


@pytest.mark.parametrize(
    "override",
    ["train.micro_batch=8", "train.micro_batch=3", "train.gradient_checkpointing=true", "train.attention=eager"],
)
def test_what_changes_rounding_alone_stays_within_it(tmp_path: Path, override: str) -> None:
    """With hidden dropout too: the batch split in another way, or the same arithmetic in another order."""
    sections: dict[str, Any] = {"model": {"hidden_dropout": 0.1}, "train": {"steps": 3}, "checkpoint": {"every": 3}}
    run = tiny.make(tmp_path, **sections)
    assert train(load_config(run.config), console=recorded()) == 0
    plain, _ = go_on(run, tmp_path / "plain", ["train.steps=6"], ["train.steps"])
    other, said = go_on(run, tmp_path / "other", ["train.steps=6", override], ["train.steps"])
    assert f"{override.partition('=')[0]}: " in said
    ours, theirs = lines_of(other), lines_of(plain)
    assert sorted(ours) == list(range(1, 7))
    for step in ours:
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-6)
        assert ours[step]["lr"] == theirs[step]["lr"]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.steps=8", "train.steps"),
        ("train.tokens=2048", "train.tokens"),
        ("optimizer.lr=0.005", "optimizer.lr"),
        ("optimizer.weight_decay=0.1", "optimizer.weight_decay"),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas"),
        ("schedule.kind=linear", "schedule.kind"),
        ("schedule.warmup=5", "schedule.warmup"),
        ("schedule.final=0.5", "schedule.final"),
        ("train.max_grad_norm=0.01", "train.max_grad_norm"),
        ("train.precision=bf16", "train.precision"),
        ("model.hidden_dropout=0.3", "model.hidden_dropout"),
        ("model.attention_dropout=0.3", "model.attention_dropout"),
    ],
)
def test_what_needs_leave_is_refused_without_and_takes_effect_with_it(
    stopped: tiny.Run, unchanged: tiny.Run, tmp_path: Path, override: str, key: str
) -> None:
    run = tiny.copy(stopped, tmp_path / "refused")
    before = digests(run.directory)
    with pytest.raises(ChangedConfigError, match=f"--allow-change {key}"):
        train(load_config(run.config, [override]), console=recorded())
    assert digests(run.directory) == before
    run, said = go_on(stopped, tmp_path / "changed", [override], [key])
    ours, theirs = lines_of(run), lines_of(unchanged)
    steps = 8 if key in ("train.steps", "train.tokens") else STEPS
    assert sorted(ours) == list(range(1, steps + 1))
    assert all(ours[step] == theirs[step] for step in range(1, STOP + 1))
    assert tiny.weights(run, steps) != tiny.weights(unchanged, STEPS)
    same_rate = ours[STOP + 1]["lr"] == pytest.approx(theirs[STOP + 1]["lr"], rel=1e-12)
    assert ("jumps" in said) == (not same_rate)
    state = json.loads((run.checkpoints / f"step-{steps:08d}" / "trainer.json").read_text())["state"]
    records = [entry["key"] for entry in state["progress"]["changes"]]
    assert key in records
    assert json.loads((run.directory / "train" / "result.json").read_text())["changes"] == state["progress"]["changes"]
    # The same command once more needs no leave: the last checkpoint holds the change.
    assert train(load_config(run.config, [override]), console=recorded()) == 0


@pytest.mark.parametrize(
    "override",
    [
        "train.seed=4",
        "train.batch_tokens=512",
        "model.hidden_size=32",
        "model.num_hidden_layers=2",
        "model.norm_eps=1e-3",
        "model.initializer_range=0.1",
        "data.sequence_length=16",
        "data.max_documents_per_row=3",
        "data.text_field=body",
        "objective.rate=0.3",
        "optimizer.name=stable-adamw",
        "tokenizer.vocab_size=256",
    ],
)
def test_what_cannot_change_is_refused_whatever_is_allowed(stopped: tiny.Run, tmp_path: Path, override: str) -> None:
    run = tiny.copy(stopped, tmp_path)
    before = digests(run.directory)
    key = override.partition("=")[0]
    with pytest.raises(ChangedConfigError, match=rf"(?s){key}: .*cannot change.*name=.*-2"):
        train(load_config(run.config, [override]), allow_changes=[key], console=recorded())
    assert digests(run.directory) == before


def test_the_checkpoint_decides_what_is_a_change(stopped: tiny.Run, tmp_path: Path) -> None:
    """Not the copy beside it: a start with a change that was killed before its first save binds nobody."""
    run = tiny.copy(stopped, tmp_path)
    (run.directory / "train" / "config.yaml").write_text("optimizer: {lr: 77.0}\n")
    assert train(load_config(run.config), console=recorded()) == 0


def test_a_finished_run_goes_on_to_a_longer_budget(tmp_path: Path) -> None:
    """With a flat schedule the two halves are the whole, bit for bit."""
    flat: dict[str, Any] = {"schedule": {"kind": "constant", "warmup": 2}, "evaluate": {"every": 100}}
    whole = tiny.make(tmp_path / "whole", **flat)
    assert train(load_config(whole.config), console=recorded()) == 0
    half = tiny.make(tmp_path / "half", train={"steps": 4}, **flat)
    assert train(load_config(half.config), console=recorded()) == 0
    assert train(load_config(half.config, ["train.steps=8"]), allow_changes=["train"], console=recorded()) == 0
    assert tiny.trace(half).difference(tiny.trace(whole)) == ""


def test_before_the_first_checkpoint_everything_may_change(stopped: tiny.Run, tmp_path: Path) -> None:
    run = tiny.copy(stopped, tmp_path)
    shutil.rmtree(run.checkpoints)
    (run.checkpoints.parent / "run.json").unlink()  # as where the first save was never reached
    console = recorded()
    assert train(load_config(run.config, ["optimizer.lr=0.5", "train.seed=9"]), console=console) == 0
    assert "starting at step 0" in text_of(console)
    assert sorted(lines_of(run)) == list(range(1, STEPS + 1))
