"""Signs of life: what is written is read, in place, for next to nothing, and never a reason to fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain import heartbeat
from pretrain.heartbeat import Heartbeat, read_beats


@pytest.fixture(autouse=True)
def _own_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The handler of a test process's own writers is taken back."""
    monkeypatch.setattr(heartbeat, "_stacks", {})
    yield
    if heartbeat.STACKS_SIGNAL is not None:
        heartbeat.faulthandler.unregister(heartbeat.STACKS_SIGNAL)


def test_what_is_beaten_is_read(tmp_path: Path) -> None:
    first, second = Heartbeat(tmp_path, 0), Heartbeat(tmp_path, 1)
    assert {rank: beat.phase for rank, beat in read_beats(tmp_path).items()} == {0: "start", 1: "start"}
    for step in range(1000):
        first.beat(step, "step")
    second.beat(7, "save")
    beats = read_beats(tmp_path)
    assert (beats[0].step, beats[0].phase, beats[0].beat) == (999, "step", 1001)
    assert (beats[1].step, beats[1].phase, beats[1].beat) == (7, "save", 2)
    assert abs(beats[0].time - time.monotonic()) < 60
    assert len((tmp_path / "rank-00000").read_bytes().splitlines()) == 1


def test_the_slowest_step_is_a_normal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling at first, an evaluation and a save between steps do not count as steps."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    writer = Heartbeat(tmp_path, 0)
    said = []
    for seconds, step, phase in [
        (50, 0, "step"),
        (90, 1, "step"),
        (3, 2, "step"),
        (4, 3, "step"),
        (60, 3, "evaluate"),
        (60, 3, "save"),
        (60, 3, "step"),
        (2, 4, "step"),
        (30, 30, "step"),
    ]:
        now[0] += seconds
        writer.beat(step, phase)  # type: ignore[arg-type]
        said.append(read_beats(tmp_path)[0].slowest)
    assert said == [None, None, None, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]


def test_without_a_directory_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(heartbeat.ENVIRONMENT, raising=False)
    monkeypatch.chdir(tmp_path)
    Heartbeat.from_environment(0).beat(1, "step")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(heartbeat.ENVIRONMENT, str(tmp_path / "beats"))
    Heartbeat.from_environment(3).beat(1, "step")
    assert list(read_beats(tmp_path / "beats")) == [3]


def test_a_disk_that_takes_nothing_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    Heartbeat(tmp_path / "file" / "beats", 0).beat(1, "step")  # no directory can be made there
    full = tmp_path / "full"
    full.mkdir()
    (full / "rank-00000").symlink_to("/dev/full")
    Heartbeat(full, 0).beat(1, "step")
    assert read_beats(full) == {}


def test_what_is_no_beat_is_left_out(tmp_path: Path) -> None:
    Heartbeat(tmp_path, 0)
    for name, text in {"rank-00001": "", "rank-00002": '{"step": 1', "rank-00003": "[]", "rank-x": "{}"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "rank-00004").write_text('{"step": 1, "phase": "sleep", "beat": 1, "time": 1.0}')
    assert list(read_beats(tmp_path)) == [0]
    assert read_beats(tmp_path / "nowhere") == {}


@pytest.mark.skipif(heartbeat.STACKS_SIGNAL is None, reason="no real-time signals here")
def test_stacks_on_a_signal(tmp_path: Path) -> None:
    program = (
        "import threading, time\n"
        "from pretrain.heartbeat import Heartbeat\n"
        "Heartbeat.from_environment(0).beat(3, 'step')\n"
        "def beside():\n    time.sleep(60)\n"
        "threading.Thread(target=beside, daemon=True).start()\n"
        "print('ready', flush=True)\n"
        "def stuck():\n    time.sleep(60)\n"
        "stuck()\n"
    )
    environment = {**os.environ, heartbeat.ENVIRONMENT: str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.1)
        assert heartbeat.STACKS_SIGNAL is not None
        for _ in range(2):
            process.send_signal(heartbeat.STACKS_SIGNAL)
            time.sleep(0.2)
        assert process.poll() is None, "asking for stacks ends nothing"
        process.send_signal(signal.SIGKILL)
    text = (tmp_path / "stack-00000").read_text()
    assert text.count("in stuck") == 2
    assert text.count("in beside") == 2


def test_no_torch(tmp_path: Path) -> None:
    code = "import sys, pretrain.heartbeat; assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
