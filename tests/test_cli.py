"""The command line: instant help, errors that help, no torch before it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pretrain import cli
from pretrain.cli import options, running
from pretrain.config import RunConfig, load_config
from pretrain.launch import Supervision
from pretrain.strategy import read_launch, resolve_strategy


def pretrain(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nsys.argv = ['pretrain', '--help']\nfrom pretrain.cli import app\n"
        "try:\n    app()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("tokenizer", "prepare", "train", "evaluate", "generate", "fill", "export", "import", "run", "schema"):
        assert verb in done.stdout


def test_a_mistake_is_one_message_and_exit_code_2() -> None:
    done = pretrain("train", "quickstart-gpt", "train.minuts=3")
    assert done.returncode == 2
    assert "train.minuts" in done.stderr
    assert "train.minutes" in done.stderr
    assert "Traceback" not in done.stderr


def test_schema_accepts_what_the_loader_accepts() -> None:
    schema = json.loads(pretrain("schema").stdout)
    config = load_config("quickstart-gpt")
    assert set(schema["properties"]) == set(type(config).model_fields)
    assert schema["properties"]["name"]["type"] == "string"
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_flags(flag: str) -> None:
    assert pretrain(flag).returncode == 0


def test_options_of_launching() -> None:
    """They are for a process that nothing else launched; the deepspeed launcher puts its own before the verb."""
    variables = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    for words in (["--processes", "2"], ["--supervise"]):
        done = pretrain("train", "quickstart-gpt", *words, environment=variables)
        assert done.returncode == 2
        assert "another launcher has started this process" in done.stderr
    done = pretrain("run", "quickstart-gpt", environment=variables)
    assert done.returncode == 2
    assert "pretrain run CONFIG --processes N" in " ".join(done.stderr.split())
    done = pretrain("--local_rank=0", "train", "quickstart-gpt", "train.minuts=3")
    assert "train.minuts" in done.stderr
    assert "local_rank" not in pretrain("--help").stdout


def test_missing_data_are_said_before_anything_is_launched(tmp_path: Path) -> None:
    done = pretrain("train", "quickstart-gpt", f"out={tmp_path}", "--processes", "2")
    assert done.returncode == 2
    assert "holds no tokenizer" in done.stderr
    assert not list(tmp_path.iterdir())


def test_launching_needs_no_torch() -> None:
    code = "import sys, pretrain.launch; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("given", "configured", "launched"),
    [
        (None, None, None),
        (1, None, None),
        (1, 2, None),
        (2, None, (2, [])),
        (None, 3, (3, [])),
        (2, 3, (2, ["train.processes=2"])),
    ],
)
def test_how_many_processes_are_launched(
    given: int | None,
    configured: int | None,
    launched: tuple[int, list[str]] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    asked: list[tuple[int, list[str]]] = []

    def launch(config: object, command: Callable[[str], list[str]], *, processes: int, **rest: object) -> int:
        words = command("auto")
        asked.append((processes, [word for word in words if "processes" in word]))
        return 0

    monkeypatch.setattr("pretrain.launch.launch", launch)
    overrides = [] if configured is None else [f"train.processes={configured}"]
    config = options.own_config("quickstart-gpt", [*overrides, f"out={tmp_path}"], given)
    assert config.train.processes == (configured and (given or configured)), "what is not launched trains with it, too"
    found = running.launcher("quickstart-gpt", [], config, given, None, None)
    if found is not None:
        found("auto")
    assert asked == ([] if launched is None else [launched])


def test_one_process_in_place_of_the_configured_two_trains_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    asked: list[RunConfig] = []

    def train(config: RunConfig, **rest: object) -> int:
        asked.append(config)
        return 0

    monkeypatch.setattr("pretrain.train.train", train)
    words = ["train", "quickstart-gpt", "train.processes=2", f"out={tmp_path}", "--processes", "1"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    assert [resolve_strategy(config, read_launch(os.environ)) for config in asked] == ["single"]


def test_hang_seconds_are_for_supervision(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="add --supervise"):
        running.supervision_of(False, 10, 60.0)
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    asked: list[Supervision] = []

    def launch(config: object, command: object, *, supervision: Supervision, **rest: object) -> int:
        asked.append(supervision)
        return 0

    monkeypatch.setattr("pretrain.launch.launch", launch)
    config = load_config("quickstart-gpt")
    for seconds in (None, 60.0):
        found = running.launcher("quickstart-gpt", [], config, None, running.supervision_of(True, 3, seconds), None)
        assert found is not None
        found("auto")
    assert [(one.max_restarts, one.hang_seconds) for one in asked] == [(3, 0.0), (3, 60.0)]
