#!/usr/bin/env python
"""From text to a repository and back, on this machine alone: a rehearsal of everything up to the upload.

    python scripts/text_to_hub.py small-bert-en 'data.train=[path/to/books.jsonl.gz]'
    python scripts/text_to_hub.py small-gpt-zh 'data.train=[novels.jsonl.gz]' --repo gpt --folder hub --text '山[MASK]'

What `pretrain run` is given (a configuration and overrides) is trained, or taken as it is where it is made already; the
run and every checkpoint that it keeps go by `pretrain publish` to a Hub of this machine; from there plain transformers
loads them, in a process that cannot import `pretrain` and has an empty cache. The table at the end says for each
revision whether it computes the same bits as the files of the run.

It ends with 0 when all is equal and the card is good, 1 when anything differs, and with the code of the command that
failed otherwise (75: training was stopped, and goes on when this is run again).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from pretrain.config import RunConfig, load_config
from pretrain.publishing.hub import check_repository_name
from tests.cards.hub_rules import problems
from tests.local_hub import READER, WRITER, LocalHub

ROOT = Path(__file__).resolve().parents[1]
OWNER = "local"
_OF_HUB = re.compile(r"(HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS)_\w+")  # where caches and tokens lie, and what is off


class FailedError(Exception):
    """A command did not end well.

    Attributes:
        code: its exit code.
    """

    def __init__(self, words: str, code: int) -> None:
        super().__init__(words)
        self.code = code


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s CONFIG [KEY=VALUE...] [--repo NAME] [--folder DIR] [--text TEXT]",
        description="From text to a repository on this machine, and back.",
    )
    of_run = "a YAML file or the name of a shipped run, then overrides, as `pretrain run` takes them"
    parser.add_argument("words", metavar="CONFIG", nargs="+", help=of_run)
    parser.add_argument("--repo", metavar="NAME", help="of the repository; default: the run's name")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keeps the repositories; default: a passing one")
    parser.add_argument("--text", help="what the model is asked, with a [MASK]; a decoder gets what stands before it")
    given = parser.parse_intermixed_args(words)
    if given.text is not None and "[MASK]" not in given.text:
        parser.error(f"--text {given.text!r} has no [MASK]")
    given.config, *given.overrides = given.words
    return given


def repository_of(given: str | None, config: RunConfig) -> str:
    """`local/NAME`: the one user of a Hub of this machine is `local`.

    Raises:
        ValueError: when it is another's, or no name.
    """
    owner, slash, name = (given or config.name).rpartition("/")
    if slash and owner != OWNER:
        raise ValueError(
            f"--repo {given}: the user of a Hub on this machine is `{OWNER}`; give {OWNER}/{name}, or {name}"
        )
    return check_repository_name(f"{OWNER}/{name}")


def call(command: Sequence[str], *, environment: Mapping[str, str], what: str) -> None:
    """Run a command that shows what it does.

    Raises:
        FailedError: when it fails.
    """
    code = subprocess.run(list(command), env=dict(environment), check=False).returncode
    if code:
        raise FailedError(f"{what} ended with code {code}; nothing after it was done", code)


def pretrain(*words: str) -> list[str]:
    """The command line of the project's own commands, installed or from this checkout."""
    return [sys.executable, "-Pm", "pretrain", *words]


def own_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """For commands of the project."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": paths, **(more or {})}


def at_hub(hub: LocalHub, token: str) -> dict[str, str]:
    """What makes huggingface_hub speak to this one, past any proxy."""
    direct = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1")))
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return settings | {"NO_PROXY": direct, "no_proxy": direct}


def revisions_of(directory: Path, hub: LocalHub, repository: str) -> dict[str, Path]:
    """What each revision that was published now must equal."""
    found = {"main": directory / "export"}
    for checkpoint in sorted((directory / "train" / "checkpoints").glob("step-*")):
        revision = f"step-{int(checkpoint.name.removeprefix('step-'))}"
        if revision in hub.repositories.read(repository)["branches"]:
            found[revision] = checkpoint / "model"
    return found


def load_back(hub: LocalHub, repository: str, revisions: Mapping[str, Path], text: str | None) -> dict[str, Any]:
    """What a process without the project finds in a repository.

    Raises:
        FailedError: when it cannot load it.
    """
    with tempfile.TemporaryDirectory(prefix="text-to-hub-") as folder:
        environment = {name: value for name, value in os.environ.items() if not _OF_HUB.fullmatch(name)}
        environment.pop("PYTHONPATH", None)
        environment |= at_hub(hub, READER) | {"HF_HOME": folder}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        program = [sys.executable, "-P", str(ROOT / "scripts" / "from_hub.py"), repository]
        pairs = [f"{revision}={directory.resolve()}" for revision, directory in revisions.items()]
        asked = [] if text is None else ["--text", text]
        done = subprocess.run(
            [*program, *pairs, *asked], env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, check=False
        )
    if done.returncode:
        raise FailedError(f"{repository} cannot be loaded back: {program[2]} ended with {done.returncode}", 1)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table_of(repository: str, found: Mapping[str, Any], wrong_card: Sequence[str]) -> Table:
    """A row for each revision."""
    title = f"{repository}, {found['revisions']['main']['class']}, loaded back without pretrain"
    table = Table(title=title, title_justify="left")
    for name in ("revision", "commit"):
        table.add_column(name)
    for name in ("files", "bytes"):
        table.add_column(name, justify="right")
    for name in ("logits", "card"):
        table.add_column(name)
    for revision, row in found["revisions"].items():
        card = ("valid, runs" if not wrong_card else "WRONG") if revision == "main" else ""
        logits = "equal" if row["equal"] else "DIFFERENT"
        table.add_row(revision, row["commit"][:12], f"{row['files']:,}", f"{row['bytes']:,}", logits, card)
    return table


def go(given: argparse.Namespace, console: Console) -> int:
    """There and back; return the exit code.

    Raises:
        FailedError: when a command fails.
        ValueError: when the configuration, or the name, is none.
    """
    config = load_config(given.config, given.overrides)
    repository = repository_of(given.repo, config)
    if config.export.to == "code":
        raise ValueError(
            "export.to=code: such a model is loaded only by running its code, and this rehearsal runs none; leave the "
            "key out, so that a stock class is found for it"
        )
    call(pretrain("run", given.config, *given.overrides), environment=own_environment(), what="pretrain run")
    with tempfile.TemporaryDirectory(prefix="text-to-hub-") as passing, LocalHub(given.folder or Path(passing)) as hub:
        send = pretrain("publish", str(config.directory), repository, "--steps", "--yes")
        call(send, environment=own_environment(at_hub(hub, WRITER)), what="pretrain publish")
        revisions = revisions_of(config.directory, hub, repository)
        found = load_back(hub, repository, revisions, given.text)
    wrong_card = [*problems(found["card"]), *filter(None, [found["lines"]])]
    console.print(table_of(repository, found, wrong_card))
    console.print(found["says"], markup=False, highlight=False, soft_wrap=True)
    for problem in wrong_card:
        console.print(f"card: {problem}", markup=False, highlight=False, soft_wrap=True)
    if given.folder is not None:
        again = f"`python scripts/local_hub.py 8765 {given.folder}` serves it again"
        console.print(again, markup=False, highlight=False, soft_wrap=True)
    return 0 if not wrong_card and all(row["equal"] for row in found["revisions"].values()) else 1


def main() -> int:
    """There and back; errors as one line."""
    try:
        return go(arguments(), Console())
    except FailedError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.code
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to go on\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
