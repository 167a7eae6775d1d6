#!/usr/bin/env python
"""Runs a guide of `docs/guide` from top to bottom on this machine, small, in a fresh folder.

    python scripts/guide.py docs/guide/gpt.md               # run it
    python scripts/guide.py docs/guide/gpt.md --show        # print what would be run

What lives here: a page of Markdown as one bash script. What must not: any command of a guide.

A page's ```bash blocks are run in order, by one shell, as they stand. A ```yaml block whose first line is
`# NAME.yaml` is written as that file first. Comments before a block, which the rendered page does not show, say what
is different on a small machine:

    <!-- tiny: KEY=VALUE ... -->    a file: it is written with these keys; commands: those that read a run's or a task's
                                    configuration get them as further overrides
    <!-- not run: WHY -->           the block is left out (its syntax, options, files and keys are tested all the same)
    <!-- ends with: CODE -->        the block's one command must end with this exit code
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain.config_text import dump_yaml, parse_yaml

ROOT = Path(__file__).resolve().parents[1]
CONFIGURED = ("run", "tokenizer", "prepare", "train", "inspect", "plan", "data", "finetune")
"""Commands that read a configuration and take overrides of it."""
SMALL = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "COLUMNS": "120",
}
_BLOCK = re.compile(r"((?:^<!--.*?-->\n)*)^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"<!-- (tiny|not run|ends with): (.*?) -->", re.DOTALL)
_FILE = re.compile(r"# ([\w.-]+\.yaml)\b")
_HEAD = """\
set -euo pipefail
mkdir .bin
cat > .bin/pretrain <<'END OF FILE'
#!/usr/bin/env bash
case ${{1-}} in
    {configured}) [ -z "$TINY" ] || mapfile -t tiny <<< "$TINY" ;;
esac
PATH=${{PATH#*:}} exec pretrain "$@" "${{tiny[@]}}"
END OF FILE
chmod +x .bin/pretrain
export PATH="$PWD/.bin:$PATH" TINY
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text, the line that it begins at, and what the comments say of it."""

    language: str
    text: str
    line: int
    marks: Mapping[str, str] = field(default_factory=dict)

    @property
    def file(self) -> str | None:
        """The file that a yaml block is, if its first line names one."""
        found = _FILE.match(self.text) if self.language == "yaml" else None
        return found[1] if found else None

    @property
    def tiny(self) -> list[str]:
        """Overrides for a small machine."""
        return shlex.split(self.marks.get("tiny", ""))

    def file_text(self) -> str:
        """What is written as the file: the block as it stands, or with the keys of `tiny`."""
        if not self.tiny:
            return self.text
        raw = parse_yaml(self.text, f"line {self.line}")
        for override in self.tiny:
            key, _, value = override.partition("=")
            *parents, last = key.split(".")
            node = raw
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = parse_yaml(value, override)
        return dump_yaml(raw)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            found[2],
            found[3],
            text.count("\n", 0, found.start(2)) + 1,
            {name: " ".join(value.split()) for name, value in _MARK.findall(found[1])},
        )
        for found in _BLOCK.finditer(text)
    ]


def script(page: Path) -> str:
    """The page as one bash script.

    Raises:
        ValueError: a block that is marked with an exit code has more than one command.
    """
    parts = [_HEAD.format(configured="|".join(CONFIGURED))]
    for block in blocks(page):
        place = f"{page.name}, line {block.line}"
        if "not run" in block.marks:
            parts.append(f"# {place}: not run: {block.marks['not run']}\n")
        elif block.file is not None:
            parts.append(f"cat > {block.file} <<'END OF FILE'\n{block.file_text()}END OF FILE\n")
        elif block.language == "bash":
            code, text = block.marks.get("ends with"), block.text
            if code is not None:
                if len(text.replace("\\\n", " ").strip().splitlines()) != 1:
                    raise ValueError(f"{place}: `ends with` is for a block of one command")
                text = f"code=0\n{text.strip()} || code=$?\n[ $code = {int(code)} ]\n"
            tiny = shlex.quote("\n".join(block.tiny))
            parts.append(f'echo "=== {place} (after $SECONDS s)"\nTINY={tiny}\n{text}')
    return "\n".join([*parts, f'echo "=== {page.name}: done in $SECONDS s"\n'])


def prepare_folder(folder: Path) -> None:
    """What a clone has and the guides use."""
    for name in ("scripts", "configs"):
        (folder / name).symlink_to(ROOT / name, target_is_directory=True)


def run(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a page in a fresh folder; its output is shown as it comes where this is a program, else returned."""
    prepare_folder(folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    inherited = {name: value for name, value in os.environ.items() if name not in ("HF_ENDPOINT", "HF_TOKEN")}
    environment = {**inherited, **SMALL, "PATH": path, "PRETRAIN_CACHE": str(folder / "cache")}
    capture = subprocess.PIPE if __name__ != "__main__" else None
    return subprocess.run(
        ["bash", "-c", script(page)],
        cwd=folder,
        env={**environment, "HF_HOME": str(folder / "hf")},
        stdin=subprocess.DEVNULL,
        stdout=capture,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def main() -> int:
    """Run the page that the command line names, or show its script."""
    parser = argparse.ArgumentParser(description="Run a guide, small, in a fresh folder.")
    parser.add_argument("page", type=Path, help="docs/guide/NAME.md")
    parser.add_argument("--show", action="store_true", help="print the script, run nothing")
    given = parser.parse_args()
    if given.show:
        sys.stdout.write(script(given.page))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return run(given.page, Path(folder)).returncode


if __name__ == "__main__":
    sys.exit(main())
