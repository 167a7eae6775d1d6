"""The README keeps its word: every command parses against the real command line, every path that it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from pretrain.cli import app
from pretrain.config import load_config
from pretrain.config_task import load_tuning

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md", "tokenizer/README.md")),
    *(ROOT / "docs").rglob("*.md"),
]


def bash_lines(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = (line.strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


COMMANDS = [  # those of the guides read files of their own: tests/test_guides.py
    (page, line)
    for page in PAGES
    if page.parent.name != "guide"
    for line in bash_lines(page)
    if line.startswith("pretrain ")
]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[line[:60] for _, line in COMMANDS])
def test_every_command_parses(page: Path, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    group: Any = get_command(app)
    command = group.commands[words[0]]
    context = command.make_context(words[0], words[1:])
    if "config" in context.params:
        load = load_tuning if words[0] == "finetune" else load_config
        load(context.params["config"], context.params["overrides"] or [])


def test_there_are_commands() -> None:
    assert len([line for page, line in COMMANDS if page.name == "README.md"]) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:pretrain|tests|docs|scripts|configs|tokenizer)/[\w./-]*)", text)
    named += [
        word for line in bash_lines(page) for word in line.split() if re.match(r"(scripts|tests|tokenizer)/", word)
    ]
    for name in named:
        assert (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_is_empty_or_half_filled(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text) > 300
    assert not re.search(r"\b[A-Z]+_(OUTPUT|TABLE|NOTE)\b|\bHASH\b", text)


def test_scripts_of_the_two_commands_are_executable() -> None:
    for name in ("scripts/quickstart.sh", "scripts/test.sh", "scripts/gpu.sh", ".ci/run"):
        assert (ROOT / name).stat().st_mode & 0o111, name
