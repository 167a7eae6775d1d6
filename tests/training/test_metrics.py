"""Sinks: lines that survive a kill, trackers that work offline and go on as the same run, a missing package."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from rich.console import Console

from pretrain.training import metrics
from pretrain.training.metrics import JsonLines, open_metrics


def opened(destinations: tuple[str, ...], directory: Path, **more: Any) -> metrics.Metrics:
    PartialState()
    settings: dict[str, Any] = {
        "project": "test",
        "name": "run",
        "run_id": "abc123",
        "directory": directory,
        "config": {"train": {"steps": 3}, "log": {"to": ["wandb"]}},
        "first_step": 0,
        "total_steps": 3,
        "console": Console(file=io.StringIO()),
    }
    return open_metrics(destinations, **(settings | more))


def required(package: str) -> None:
    """Skip by name where a package is missing, unless everything is required."""
    if os.environ.get("PRETRAIN_REQUIRE") != "all":
        pytest.importorskip(package)


def test_resuming_cuts_off_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    sink = JsonLines(path, first_step=2)
    sink.write(3, {"loss": math.nan})
    sink.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert math.isnan(lines[-1]["loss"])


def test_an_evaluation_that_a_kill_left_unsaved_goes_and_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 1, "validation/loss": 3.1}', '{"step": 2, "loss": 2.0}']
    path.write_text("\n".join([*lines, '{"step": 2, "validation/loss": 2.1}']) + "\n")
    JsonLines(path, first_step=2, scored=True).close()
    assert len(path.read_text().splitlines()) == 4
    JsonLines(path, first_step=2, scored=False).close()
    assert path.read_text().splitlines() == lines


def test_wandb_offline_keeps_the_run_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    required("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for first_step in (0, 2):  # a run, and its continuation
        with opened(("wandb",), tmp_path, first_step=first_step) as sinks:
            sinks.write(first_step + 1, {"loss": 1.0})
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    # offline-run-TIME-ID, and a counter beside it when both began in one second
    assert all("abc123" in name.split("-") for name in runs)


def test_tensorboard_writes_beside_the_run(tmp_path: Path) -> None:
    required("tensorboard")
    with opened(("tensorboard",), tmp_path) as sinks:
        sinks.write(1, {"loss": 1.0})
    assert list((tmp_path / "tensorboard").rglob("events.out.*"))


def test_trackio_writes_where_its_dashboard_looks(tmp_path: Path) -> None:
    required("trackio")
    code = (
        "import sys\nfrom pathlib import Path\nsys.path.insert(0, 'tests/training')\n"
        "from test_metrics import opened\n"
        "with opened(('trackio',), Path(sys.argv[1])) as sinks:\n    sinks.write(1, {'loss': 1.0})\n"
    )
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment, capture_output=True)
    assert list((tmp_path / "trackio").glob("*.db"))


def test_a_missing_package_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"log.to: wandb needs a package.*pip install 'pretrain\[wandb\]'"):
        opened(("wandb",), tmp_path)


def test_the_console_tells_how_long_it_will_take(tmp_path: Path) -> None:
    text = io.StringIO()
    with opened(("console",), tmp_path, console=Console(file=text, width=200)) as sinks:
        sinks.write(0, {"validation/loss": 2.5})
        sinks.write(3, {"loss": 1.5, "tokens_per_second": 1234.0})
    assert "validation/loss 2.5000" in text.getvalue()
    assert "1,234 tokens/s" in text.getvalue()
    assert "ETA" in text.getvalue()
