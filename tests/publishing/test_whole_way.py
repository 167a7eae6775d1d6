"""From a run to a repository and back, by the commands that a user types, loaded where there is no `pretrain`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.faults import tiny
from tests.local_hub import WRITER, LocalHub

REPO = "local/tiny"
HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.slow


def call(command: list[str], settings: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **tiny.ENVIRONMENT, **settings}
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_run_is_published_and_loaded_elsewhere(tmp_path: Path) -> None:
    """A rate of almost nothing keeps every weight, so that step 0, drawn again, must equal what was trained."""
    run = tiny.make(tmp_path, optimizer={"lr": 1e-30})
    assert tiny.train(run, recorded=False).code == 0
    with LocalHub(tmp_path / "hub", large_bytes=1000) as hub:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": WRITER,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
        }
        publish = [sys.executable, "-m", "pretrain", "publish", str(run.directory), REPO, "--steps", "--step-0"]
        shown = call(publish, settings, tmp_path)
        assert shown.returncode == 3, shown.stderr
        assert not hub.repositories.exists(REPO)
        done = call([*publish, "--yes"], settings, tmp_path)
        assert done.returncode == 0, done.stderr
        assert WRITER not in shown.stderr + shown.stdout + done.stderr + done.stdout
        steps = sorted(int(path.name.removeprefix("step-")) for path in run.checkpoints.glob("step-*"))
        assert {6, 8} <= set(steps)
        revisions = ["main", "step-0", *(f"step-{step}" for step in steps)]
        assert set(hub.repositories.read(REPO)["branches"]) == set(revisions)
        for revision, tokens in (("step-0", 0), ("step-6", 6 * 256), ("main", 8 * 256)):
            (commit, _) = hub.repositories.history(REPO, revision)
            assert f"{tokens:,} tokens seen" in commit["title"]
            record = json.loads(hub.repositories.open(commit["files"]["pretrain.json"]["sha256"]).read())
            assert record["tokens"] == tokens
        assert "README.md" in hub.repositories.resolve(REPO, "main")[1]["files"]
        loaded = call([sys.executable, str(HERE / "load_elsewhere.py"), REPO, *revisions], settings, tmp_path)
        assert loaded.returncode == 0, loaded.stderr
        found = json.loads(loaded.stdout.splitlines()[-1])
        assert len({weights for weights, _ in found.values()}) == 1
        assert all(ids == found["main"][1] for _, ids in found.values())
        again = call([*publish, "--yes"], settings, tmp_path)
        for revision in revisions:  # the card is made anew, by another process, with the same bytes
            assert f"({revision}): nothing new" in again.stderr, again.stderr
    assert not [path for path in run.directory.iterdir() if path.name.startswith(".tmp")]


def test_an_altered_checkpoint_is_refused(tmp_path: Path) -> None:
    run = tiny.make(tmp_path)
    assert tiny.train(run, recorded=False).code == 0
    weights = run.checkpoints / "step-00000006" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with LocalHub(tmp_path / "hub") as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HUB_OFFLINE": "0"}
        publish = [sys.executable, "-m", "pretrain", "publish", str(run.directory), REPO, "--steps", "--yes"]
        refused = call(publish, settings, tmp_path)
        assert refused.returncode == 2
        assert "altered" in refused.stderr
        assert not hub.repositories.exists(REPO)
