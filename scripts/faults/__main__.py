"""Injects every fault, one after another, and writes the table: `python scripts/faults OUT.md [--only 1,2] [--list]`.

What lives here: collecting the faults of the topics beside this file, running each in an empty folder (first those
that promise something within seconds, one at a time), the page. What must not: any fault. A topic that is not there is
left out; a fault that raises is a row with no try survived.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "scripts"), str(ROOT)]

from outcome import Fault, Line, inject_number  # noqa: E402

TOPICS = ("saving", "resume", "data", "training", "processes", "ranks", "worlds")


def collect(topics: Sequence[str] = TOPICS) -> list[tuple[Fault, str, int]]:
    """The faults of every topic that is there, each with its place there, in order of rows."""
    faults: list[tuple[Fault, str, int]] = []
    for topic in topics:
        if importlib.util.find_spec(topic) is not None:
            found = importlib.import_module(topic).FAULTS
            faults += [(fault, topic, number) for number, fault in enumerate(found)]
    return sorted(faults, key=lambda entry: _order(entry[0].row))


Cells = list[str]
"""A line of the table: row, fault, promise, tries, survived, work lost, note, seconds, commit."""


def cells_of(line: Line, commit: str) -> Cells:
    """A line of the table, as text."""
    outcome = line.outcome
    survived = f"{outcome.survived:,}"
    texts = [
        line.fault.row,
        line.fault.fault,
        line.fault.promise,
        f"{outcome.tries:,}",
        survived if outcome.survived == outcome.tries else f"**{survived}**",
        outcome.lost,
        outcome.note,
        f"{line.seconds:.0f}",
        commit,
    ]
    return [" ".join(text.replace("|", "\\|").split()) for text in texts]


def kept_of(page_text: str, again: Sequence[Cells]) -> list[Cells]:
    """The lines of an earlier page whose faults were not run again."""
    replaced = {(cells[0], cells[1]) for cells in again}
    rows = [line for line in page_text.splitlines() if line.startswith("| ") and line[2:3].isdigit()]
    earlier = [re.split(r"(?<!\\) \| ", row.removeprefix("| ").removesuffix(" |")) for row in rows]
    return [cells for cells in earlier if (cells[0], cells[1]) not in replaced]


def page(lines: Sequence[Cells], command: str) -> str:
    """The table as markdown, in order of rows."""
    tries, survived, seconds = (
        sum(int(cells[place].replace(",", "").strip("*")) for cells in lines) for place in (3, 4, 7)
    )
    text = [
        "# Faults",
        "",
        "What was done to real runs, and what they did. A try survives when everything in the column of promises held.",
        '"Exact": same rows, learning rate and loss at every step and the same final weights, bit for bit, as a run of',
        "the same configuration that was never interrupted. `--only` runs some rows again and leaves the others: each",
        "line names its commit.",
        "",
        f"- {survived:,} of {tries:,} tries survived",
        f"- command: `{command}`",
        f"- machine: {_machine()}",
        f"- {seconds / 60:.1f} minutes",
        "",
        "| row | fault | promise | tries | survived | work lost | note | seconds | commit |",
        "|---|---|---|---:|---:|---|---|---:|---|",
    ]
    text += ["| " + " | ".join(cells) + " |" for cells in sorted(lines, key=lambda cells: _order(cells[0]))]
    return "\n".join(text) + "\n"


def inject_all(faults: Sequence[tuple[Fault, str, int]], jobs: int) -> list[Line]:
    """What came of each fault, in order, `jobs` of them at a time."""
    lines = []
    # A fresh process for each worker: faults fork, set the environment and catch signals.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        made = pool.map(inject_number, *([entry[place] for entry in faults] for place in (1, 2)))
        for (fault, _, _), (outcome, seconds) in zip(faults, made, strict=True):
            line = Line(fault, outcome, seconds)
            lines.append(line)
            told = f"{line.outcome.survived}/{line.outcome.tries} in {line.seconds:.0f} s; {line.outcome.note}"
            sys.stderr.write(f"row {fault.row}, {fault.fault}: {told}\n")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the faults that are asked for; the exit code is 1 when a try was not survived."""
    parser = argparse.ArgumentParser(prog="python scripts/faults", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, help="the markdown file to write; standard output when left out")
    parser.add_argument("--only", default="", help="rows to run, separated by commas, such as 1,2,33")
    parser.add_argument("--topics", default=",".join(TOPICS), help="topics to collect, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time, each in a process of its own")
    parser.add_argument("--list", action="store_true", help="name the faults and run none")
    parsed = parser.parse_args(arguments)
    faults = collect(parsed.topics.split(","))
    wanted = set(filter(None, parsed.only.split(",")))
    if wanted:
        faults = [entry for entry in faults if entry[0].row in wanted]
        if missing := sorted(wanted - {fault.row for fault, _, _ in faults}):
            parser.error(f"no fault in row {', '.join(missing)}")
    if parsed.list:
        for fault, _, _ in faults:
            sys.stdout.write(f"{fault.row:>4}  {fault.fault}\n")
        return 0
    lines = inject_all([entry for entry in faults if entry[0].timed], 1)
    lines += inject_all([entry for entry in faults if not entry[0].timed], parsed.jobs)
    commit = _commit()
    cells = [cells_of(line, commit) for line in sorted(lines, key=lambda line: _order(line.fault.row))]
    if wanted and parsed.out is not None and parsed.out.is_file():
        cells += kept_of(parsed.out.read_text(encoding="utf-8"), cells)
    given = list(sys.argv[1:] if arguments is None else arguments)
    text = page(cells, os.environ.get("FAULTS_COMMAND") or shlex.join(["python", "scripts/faults", *given]))
    if parsed.out is None:
        sys.stdout.write(text)
    else:
        parsed.out.write_text(text, encoding="utf-8")
    return int(any(line.outcome.survived < line.outcome.tries for line in lines))


def _order(row: str) -> tuple[int, str]:
    digits = "".join(character for character in row if character.isdigit())
    return (int(digits) if digits else 0, row)


def _commit() -> str:
    """The commit's short name; `+ changes` when the tree is not clean."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        return name + (" + changes" if _git("status", "--porcelain", "--", "pretrain", "scripts") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _machine() -> str:
    import torch

    from pretrain.runtime import describe_machine

    return f"{describe_machine(torch.device('cpu'))}, {platform.system()} {platform.release()}"


if __name__ == "__main__":
    sys.exit(main())
