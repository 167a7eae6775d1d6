"""A tracker that does not answer, and disks that are full: the steps go on, and what can be kept is kept."""

from __future__ import annotations

import importlib.machinery
import json
import logging
import os
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import PartialState
from rich.console import Console

from pretrain.training import metrics
from pretrain.training.metrics import Metrics, open_metrics
from tests.security.conftest import SECRETS
from tests.security.hostile import ROOT

VALUES = {"loss": 1.0, "tokens_per_second": 1000.0}


def opened(destinations: tuple[str, ...], directory: Path, **more: Any) -> Metrics:
    """The sinks of a run of three steps."""
    PartialState()
    settings: dict[str, Any] = {"project": "test", "name": "run", "run_id": "abc123", "directory": directory}
    settings |= {"config": {"train": {"steps": 3}}, "first_step": 0, "total_steps": 3, "console": Console(stderr=True)}
    return open_metrics(destinations, **(settings | more))


class Tracker:
    """In place of a tracker's library."""

    faults: ClassVar[set[str]] = set()
    seen: ClassVar[list[str]] = []

    def __init__(self, project: str, **keywords: Any) -> None:
        self.mode = keywords.get("mode", "online")

    def _say(self, what: str) -> None:
        self.seen.append(f"{what} {self.mode}")
        if what in self.faults and self.mode == "online":
            raise OSError(f"https://api/x?api_key={SECRETS['WANDB_API_KEY']} does not answer")

    def start(self) -> None:
        self._say("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._say("configuration")

    def log(self, values: dict[str, Any], step: int) -> None:
        self._say("log")

    def finish(self) -> None:
        self._say("finish")


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> type[Tracker]:
    pytest.importorskip("wandb")
    monkeypatch.setattr(Tracker, "faults", set())
    monkeypatch.setattr(Tracker, "seen", [])
    monkeypatch.setitem(metrics.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["WANDB_API_KEY"])
    library = types.ModuleType("wandb")
    library.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    library.teardown = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", library)
    return Tracker


def test_a_tracker_that_does_not_answer_at_the_start_is_offline(tmp_path: Path, tracker, caplog) -> None:
    tracker.faults = {"start"}
    words = ["pretrain", f"data.train=[https://u:{SECRETS['password']}@h/x]"]
    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with opened(("jsonl", "wandb"), tmp_path) as sinks:
            sinks.write(1, VALUES)
        assert sys.argv is words
    assert tracker.seen == ["start online", "start offline", "configuration offline", "log offline", "finish offline"]
    assert "logged offline" in caplog.text
    assert not [secret for secret in SECRETS.values() if secret in caplog.text]
    assert os.environ["WANDB_INIT_TIMEOUT"] == "30"
    assert os.environ["WANDB_FINISH_TIMEOUT"] == "120", "its own is without end"


def test_a_tracker_that_fails_later_costs_no_step(tmp_path: Path, tracker) -> None:
    tracker.faults = {"log", "finish"}
    with opened(("wandb", "jsonl"), tmp_path) as sinks:
        for step in (1, 2, 3):
            sinks.write(step, VALUES)
    assert tracker.seen.count("log online") == 3
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from rich.console import Console
from tests.security.test_trackers_down import VALUES, opened
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
place = Path(sys.argv[1])
with opened(("tensorboard", "jsonl", "console"), place, console=Console(file=open("/dev/full", "w"))) as sinks:
    sinks.write(1, VALUES)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))  # as a full disk: no write beyond
    for step in range(2, 200):
        sinks.write(step, VALUES | {{"validation/loss": 1.0}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sinks.write(200, VALUES)
print("went on")
"""


@pytest.mark.slow
def test_full_disks_cost_no_step_and_no_line(tmp_path: Path) -> None:
    """The console's file is full from the start, the others' disk for a while. A process of its own has the limit."""
    done = subprocess.run(
        [sys.executable, "-c", FULL.format(root=str(ROOT)), str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert "went on" in done.stdout, done.stderr[-2000:]
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 201))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["refuses", "hangs"])
def test_wandb_itself_without_its_server(way: str, tmp_path: Path) -> None:
    """Its own library waits for its own time limit at the start; no step waits.

    A write may take 2% of a step of a tenth of a second. The clock, not the processor's time: waiting is the fault.
    """
    pytest.importorskip("wandb")
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    if way == "hangs":
        server.listen(50)
    code = (
        f"import statistics, sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
        "from tests.security.test_trackers_down import VALUES, opened\n"
        "taken = []\n"
        "with opened(('jsonl', 'wandb'), Path(sys.argv[1])) as sinks:\n"
        "    for step in range(1, 201):\n"
        "        start = time.perf_counter()\n"
        "        sinks.write(step, VALUES)\n"
        "        taken.append(time.perf_counter() - start)\n"
        "print('went on', statistics.median(taken))\n"
    )
    environment = os.environ | {"WANDB_API_KEY": "a" * 40, "HOME": str(tmp_path), "WANDB_INIT_TIMEOUT": "5"}
    environment |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False, timeout=250, cwd=ROOT,
    )  # fmt: skip
    server.close()
    assert "went on" in done.stdout, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < 0.002
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb")), "what `wandb sync` sends later"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 200
