"""The guides keep their word: each runs from top to bottom, small; what is not run parses, and names what is there.

How a page is run stands in `scripts/guide.py`, which a reader can call as well.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from pretrain.cli import app
from pretrain.config import RunConfig, known_keys, load_config
from pretrain.config_task import (
    ClassificationTask,
    EmbeddingTask,
    InstructionTask,
    MultipleChoiceTask,
    QuestionAnsweringTask,
    RegressionTask,
    TextTask,
    TokenTask,
    TuningConfig,
    load_tuning,
)
from scripts import guide

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs" / "guide").glob("*.md"))
GUIDES = [page for page in PAGES if page.name != "README.md"]
SECTIONS = (*RunConfig.model_fields, "task")
TASKS = (
    ClassificationTask,
    RegressionTask,
    TokenTask,
    QuestionAnsweringTask,
    MultipleChoiceTask,
    TextTask,
    InstructionTask,
    EmbeddingTask,
)
KEYS = {
    *known_keys(RunConfig),
    *known_keys(TuningConfig),
    *(f"task.{key}" for task in TASKS for key in known_keys(task)),
}
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]


def named(page: Path) -> str:
    return page.stem


def lines(block: guide.Block) -> list[str]:
    return [line.strip() for line in block.text.replace("\\\n", " ").splitlines()]


def write_files(page: Path, folder: Path, *, tiny: bool) -> None:
    """The files that a reader of the page saves, as they stand or as the page's test writes them."""
    for block in guide.blocks(page):
        if block.file is not None:
            (folder / block.file).write_text(block.file_text() if tiny else block.text, encoding="utf-8")


@pytest.mark.parametrize("page", GUIDES, ids=named)
@pytest.mark.parametrize("tiny", [False, True], ids=["as it stands", "tiny"])
def test_every_command_and_file_is_accepted(
    page: Path, tiny: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(page, tmp_path, tiny=tiny)
    seen = 0
    for block in guide.blocks(page):
        overrides = block.tiny if tiny else []
        for line in lines(block) if block.language == "bash" else []:
            if not line.startswith("pretrain "):
                continue
            seen += 1
            words = shlex.split(line.removesuffix("&"), comments=True)[1:]
            command = COMMANDS[words[0]]
            context = command.make_context(words[0], [*words[1:], *(overrides if words[0] in guide.CONFIGURED else [])])
            if "config" in context.params:
                load = load_tuning if words[0] == "finetune" else load_config
                load(context.params["config"], context.params["overrides"] or [])
    assert seen >= 2


def test_every_command_that_reads_a_configuration_can_be_made_small() -> None:
    taking = {name for name, command in COMMANDS.items() if any(part.name == "overrides" for part in command.params)}
    assert taking == set(guide.CONFIGURED)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_bash_can_read_every_block(page: Path) -> None:
    for block in guide.blocks(page):
        if block.language == "bash":
            done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
            assert (done.returncode, done.stderr) == (0, ""), f"line {block.line}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_key_exists(page: Path) -> None:
    """What stands in backticks as section.key, alone or with a value, but for the column of other programs' names."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    rows = (line.split(" | ", 1)[1] if line.startswith("| ") and " | " in line else line for line in text.splitlines())
    pattern = re.compile(rf"`'?((?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+)(?=['=:`])")
    keys = {key for row in rows for key in pattern.findall(row)}
    assert keys <= KEYS, sorted(keys - KEYS)
    if page.stem == "coming-from":
        assert len(keys) >= 60


def test_the_table_of_flags_names_keys_and_commands_on_its_right() -> None:
    """No row without an answer: a key, a command, an option, by itself, or nothing and what to do."""
    page = ROOT / "docs" / "guide" / "coming-from.md"
    rows = [line.strip("| ").split(" | ") for line in page.read_text(encoding="utf-8").splitlines() if "| " in line]
    rows = [row for row in rows if row[-1] != "here" and not row[0].startswith("---")]
    assert len(rows) >= 80
    for theirs, ours in rows:
        keys = [word for word in re.findall(r"`([a-z_.]+)`", ours) if word in KEYS]
        verbs = [word for word in re.findall(r"`pretrain ([a-z]+)", ours) if word in COMMANDS]
        assert keys or verbs or re.match(r"by itself|nothing: ", ours), f"{theirs}: {ours}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_option_and_link_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    options = {word for command in COMMANDS.values() for part in command.params for word in part.opts}
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    if page.stem != "coming-from":
        prose = re.sub(r"`--show`", "", prose)  # of scripts/guide.py
        assert set(re.findall(r"`(--[a-z-]+)", prose)) <= options


@pytest.mark.parametrize("page", GUIDES, ids=named)
def test_what_is_not_run_says_why(page: Path) -> None:
    """And a page that is run has blocks that are; comments are spelled as the script reads them."""
    found = guide.blocks(page)
    assert any(block.language == "bash" and "not run" not in block.marks for block in found)
    for block in found:
        assert len(block.marks.get("not run", "a reason")) > 5
    comments = re.findall(r"<!-- (.*?):", page.read_text(encoding="utf-8"))
    assert len(comments) == sum(len(block.marks) for block in found)


def test_the_index_names_every_guide() -> None:
    text = (ROOT / "docs" / "guide" / "README.md").read_text(encoding="utf-8")
    for page in GUIDES:
        assert f"]({page.name})" in text


PAGE = """\
<!-- tiny: train.steps=2 'model.generator={a: 1}' -->
```yaml
# it.yaml
name: it
train: {steps: 1_000}
```

<!-- tiny: a.b=[1,2] 'c.d=x y' -->
```bash
pretrain train it.yaml
pretrain fill it "text"
```

<!-- not run: it would end this -->
```bash
exit 9
```

<!-- ends with: 3 -->
```bash
bash -c 'exit 3'
```

```bash
cat it.yaml
```
"""


def test_a_page_is_run_as_the_script_says(tmp_path: Path) -> None:
    """With a `pretrain` that says what it was told: overrides go to files and to commands that read a configuration."""
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "pretrain"
    stand_in.write_text('#!/bin/bash\nprintf "<%s>" "$@"; echo\n')
    stand_in.chmod(0o755)
    (tmp_path / "work").mkdir()
    environment = {**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}"}

    def run() -> subprocess.CompletedProcess[str]:
        command = ["bash", "-c", guide.script(page)]
        return subprocess.run(
            command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True, check=False
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert "<train><it.yaml><a.b=[1,2]><c.d=x y>" in done.stdout, "shell words, as on a command line"
    assert "<fill><it><text>\n" in done.stdout
    assert "steps: 2\n" in done.stdout
    assert "page.md: done" in done.stdout
    page.write_text(PAGE.replace("ends with: 3", "ends with: 4"), encoding="utf-8")
    (tmp_path / "work").rename(tmp_path / "before")
    (tmp_path / "work").mkdir()
    done = run()
    assert done.returncode != 0, "an exit code that is another one ends it"
    assert "steps:" not in done.stdout


@pytest.mark.slow  # a minute or two each: a dozen commands, each a process that imports torch
@pytest.mark.parametrize("page", GUIDES, ids=named)
def test_a_guide_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    done = guide.run(page, tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    assert f"{page.name}: done" in done.stdout
    assert "Traceback" not in done.stdout
