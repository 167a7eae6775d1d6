"""A run over a mixture: losses by source, the best checkpoint by their mean, and going on exactly across a phase."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pretrain.config import RunConfig, config_from_dict, config_to_dict
from pretrain.data.loader import DataPlane
from pretrain.files import ArtifactError
from pretrain.prepare import prepare_data
from pretrain.tokenizer import train_tokenizer
from pretrain.train import build_trainer

PHASES = [{"until": "50%", "weights": {"sea": 3.0, "hill": 1.0}}, {"weights": {"hill": 1.0}}]


def mixture(root: Path, name: str, **train: Any) -> RunConfig:
    sources = [{"name": word, "files": [str(root / f"{word}.jsonl")]} for word in ("sea", "hill")]
    return config_from_dict(
        {
            "name": name,
            "out": str(root / "runs"),
            "tokenizer": {"algorithm": "byte-bpe", "vocab_size": 300},
            "data": {"train": sources, "phases": PHASES, "sequence_length": 32, "validation": {"fraction": 0.2}},
            "model": {
                "architecture": "gpt2",
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "hidden_dropout": 0.1,
            },
            "objective": {"kind": "causal"},
            "optimizer": {"lr": 1e-2},
            "train": {"steps": 12, "batch_tokens": 128, "precision": "fp32", **train},
            "checkpoint": {"every": 2, "keep": 9},
            "evaluate": {"every": 4, "max_tokens": 512},
            "log": {"to": ["jsonl"]},
        }
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    for word in ("sea", "hill"):
        rows = ({"text": f"the {word} number {number} " * (1 + number % 9)} for number in range(120))
        (folder / f"{word}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trained(config: RunConfig, root: Path, stop_at: int | None = None, allow_changes: Sequence[str] = ()) -> Any:
    """Train, or stop as a signal would once `stop_at` steps are done."""
    if not (config.directory / "data").exists():
        train_tokenizer(config)
        prepare_data(config)
    trainer = build_trainer(config, console=Console(file=io.StringIO()))
    if stop_at is not None:
        step = trainer._step

        def stopping(progress: Any, *rest: Any) -> Any:
            result = step(progress, *rest)
            if progress.step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        trainer._step = stopping  # type: ignore[method-assign]
    return trainer.train(allow_changes=allow_changes)


def lines(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.directory / "train/metrics.jsonl").read_text().splitlines()]


def weights_of(config: RunConfig) -> str:
    path = config.directory / "train/checkpoints/step-00000012/model/model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_mixture_goes_on_exactly_across_its_phases(root: Path) -> None:
    whole, stopped = mixture(root, "whole"), mixture(root, "stopped")
    trained(whole, root)
    for at in (3, 6, 7, 11):
        assert not trained(stopped, root, stop_at=at).finished
    assert trained(stopped, root).finished
    assert weights_of(stopped) == weights_of(whole)
    kept = [[(row["step"], row["loss"], row["lr"]) for row in lines(run) if "loss" in row] for run in (whole, stopped)]
    assert kept[0] == kept[1]


def test_each_source_has_a_loss_and_their_mean_decides_what_is_best(root: Path) -> None:
    config = mixture(root, "judged")
    result = trained(config, root)
    scores = [row for row in lines(config) if "validation-sea/loss" in row]
    assert [row["step"] for row in scores] == [0, 4, 8, 12]
    means = {row["step"]: (row["validation-sea/loss"] + row["validation-hill/loss"]) / 2 for row in scores[1:]}
    assert result.progress.best == {"step": min(means, key=means.__getitem__), "loss": min(means.values())}


def test_what_is_still_to_come_of_a_mixture_may_change_and_what_was_seen_may_not(root: Path) -> None:
    config = mixture(root, "longer")
    trained(config, root, stop_at=3)
    longer = mixture(root, "longer", steps=20)
    result = trained(longer, root, allow_changes=["train.steps"])
    assert result.finished
    assert result.progress.step == 20
    again = mixture(root, "later")
    trained(again, root, stop_at=8)
    with pytest.raises(ValueError, match=r"mixture was .*give `until` in steps"):
        trained(mixture(root, "later", steps=20), root, allow_changes=["train.steps"])


def test_checkpoints_that_were_taken_away_are_missed(root: Path) -> None:
    config = mixture(root, "robbed")
    trained(config, root, stop_at=5)
    shutil.rmtree(config.directory / "train" / "checkpoints")
    with pytest.raises(ArtifactError, match="had checkpoints, and there is none now"):
        trained(config, root)


def test_repetition_is_told_again_when_the_budget_grows(root: Path) -> None:
    config = mixture(root, "grown")
    trained(config, root, stop_at=3)
    console = Console(file=io.StringIO(), width=300)
    trainer = build_trainer(mixture(root, "grown", steps=600), console=console)
    assert trainer.saver.resume(["train.steps"]) is not None
    assert "source hill is read" in console.file.getvalue()


def test_phases_choose_among_sources_that_another_run_prepared(root: Path) -> None:
    first = mixture(root, "first")
    trained(first, root, stop_at=1)
    plain = config_to_dict(first)
    plain["name"] = "second"
    plain["tokenizer"] = {"from": str(first.directory / "tokenizer")}
    plain["data"] = {"from": str(first.directory / "data"), "sequence_length": 32, "phases": [{"weights": {"hill": 1}}]}
    second = config_from_dict(plain)
    train_tokenizer(second)
    prepare_data(second)
    data = DataPlane.from_config(second)
    assert {data.sources[source] for source in data.batch(3).row_ids[:, 0]} == {"hill"}
