"""The command line: instant help, errors that help, no torch before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pretrain.config import load_config


def pretrain(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pretrain", *arguments], capture_output=True, text=True, check=False)


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
