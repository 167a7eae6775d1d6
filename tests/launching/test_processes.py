"""Processes of a job: their environment, how one ending ends the others, signals, and nobody left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.launching import processes
from pretrain.launching.processes import Bounds, Ending, Job, Signals, free_port, is_free
from tests.launching.ranks import job, run

pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_environment_output_and_a_good_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ending = run(tmp_path, "print({k: os.environ[k] for k in sorted(os.environ)}, flush=True)")
    assert (ending.code, ending.first, ending.why) == (0, None, "")
    said = {0: capfd.readouterr().out, 1: (tmp_path / "logs" / "rank-00001.log").read_text()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for rank, text in said.items():
        for name, value in {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": max(1, cores // 2),
        }.items():
            assert f"'{name}': '{value}'" in text
    assert said[0].count("MASTER_PORT") == said[1].count("MASTER_PORT") == 1


def test_threads_that_were_chosen_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert job(tmp_path, "").environment(1)["OMP_NUM_THREADS"] == "7"


def test_one_that_fails_ends_the_others(tmp_path: Path) -> None:
    ending = run(
        tmp_path,
        "all_here('a')\nif rank == 1: sys.exit('lost')\nif rank == 2: sys.exit(0)\ntime.sleep(60)",
        processes=3,
    )
    assert ending.codes == {0: -signal.SIGTERM, 1: 1, 2: 0}
    assert (ending.first, ending.code) == (1, 1)


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nall_here('a')\nif rank == 1: sys.exit(4)\ntime.sleep(60)"
    ending = run(tmp_path, program)
    assert ending.codes == {0: -signal.SIGKILL, 1: 4}
    assert (ending.first, ending.code) == (1, 4)
    assert "killed" in ending.why


def test_others_may_end_by_themselves_first(tmp_path: Path) -> None:
    program = "all_here('a')\nif rank == 1: os.kill(os.getpid(), 9)\ntime.sleep(0.2)\nsys.exit(9)"
    ending = run(tmp_path, program, bounds=Bounds(grace=20.0))
    assert ending.codes == {0: 9, 1: -9}
    assert (ending.first, ending.code) == (1, 137)


def test_of_two_that_end_at_once_the_one_that_a_signal_ended_is_named() -> None:
    assert Ending({0: 1, 1: -11}, 1).code == 139
    assert Ending({0: 75, 1: 75}, None).code == 75
    assert Ending({0: 0, 1: 75}, None).code == 1
    assert Ending({0: 2, 1: 2}, 0).code == 2


STOPS = """
got = []
for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT"):
    signal.signal(signal.Signals[name], lambda number, frame: got.append(signal.Signals(number).name))
all_here('ready')
if rank == 1:
    os.kill(os.getppid(), signal.Signals[os.environ["SEND"]])
while not got:
    time.sleep(0.01)
time.sleep(0.5)  # saves
(place / f"got-{rank}").write_text(" ".join(got))
sys.exit(75)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_a_stop_signal_reaches_all_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("SEND", name)
    number = signal.Signals[name]
    before = signal.signal(number, signal.SIG_DFL)  # nohup and background jobs of a shell ignore some
    try:
        assert run(tmp_path, STOPS).code == 75
    finally:
        signal.signal(number, before)
    assert [(tmp_path / f"got-{rank}").read_text() for rank in range(2)] == [name, name]


def test_one_that_does_not_end_after_a_stop_signal_is_killed(tmp_path: Path) -> None:
    program = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nall_here('a')\n"
        "if rank == 1: os.kill(os.getppid(), 15); time.sleep(60)\ntime.sleep(0.5); sys.exit(75)"
    )
    started = time.monotonic()
    ending = run(tmp_path, program)
    assert ending.codes == {0: 75, 1: -9}
    assert (ending.first, ending.code) == (1, 137)
    assert "SIGTERM was passed on" in ending.why
    assert time.monotonic() - started < 20


def test_one_that_ends_well_just_before_it_would_be_killed_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process goes on for the dump of its stacks, or a save ends in the very last moment."""
    plain = Job.kill

    def kill_late(made: Job) -> None:
        for process in made.running.values():
            process.wait()
        plain(made)

    monkeypatch.setattr(Job, "kill", kill_late)
    for number, (code, program, hangs) in enumerate(
        [
            (0, "all_here('a')", True),
            (75, "got = []\nsignal.signal(15, lambda *_: got.append(1))\nall_here('a')\n"
             "if rank == 1: os.kill(os.getppid(), 15)\nwhile not got: time.sleep(0.01)\ntime.sleep(0.5)\nsys.exit(75)",
             False),
        ]
    ):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.setenv("PLACE", str(folder))
        made = job(folder, program)
        with Signals() as signals:
            made.start()
            ending = made.wait(signals, Bounds(save=0.0), hangs=lambda hangs=hangs: hangs)
        assert (ending.codes, ending.code, ending.first, ending.why) == ({0: code, 1: code}, code, None, "")


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ending = run(tmp_path, "all_here('a')\nif rank: os.kill(os.getppid(), signal.SIGHUP)\ntime.sleep(0.3)")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ending.code == 0


def test_nobody_outlives_a_killed_launcher(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path\nfrom tests.launching.ranks import run\n"
        f"run(Path({str(tmp_path)!r}), '''Path(place / f\"pid-{{rank}}\").write_text(str(os.getpid()))\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nall_here('a')\ntime.sleep(60)''')"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2]) as launcher:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("a-*"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(2)]
        assert all(is_alive(pid) for pid in pids)
        launcher.kill()
    deadline = time.monotonic() + 5
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killing_ends_what_the_processes_started_too(tmp_path: Path) -> None:
    made = job(
        tmp_path,
        "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\n(place / 'child').write_text(str(child.pid))\n"
        "all_here('a')\nos.kill(os.getpid(), signal.SIGSTOP)",
        processes=1,
    )
    made.start()
    while not list(tmp_path.glob("a-*")):
        time.sleep(0.02)
    child = int((tmp_path / "child").read_text())
    assert is_alive(child)
    made.kill()
    assert made.codes == {0: -9}
    deadline = time.monotonic() + 5
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_command_that_is_none(tmp_path: Path) -> None:
    made = job(tmp_path, "")
    made.command = [str(tmp_path / "nothing")]
    with pytest.raises(FileNotFoundError):
        made.start()


def test_logs_go_on_and_stay_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOG_BYTES", 20_000)
    monkeypatch.setattr(processes, "_KEPT_BYTES", 4_000)
    monkeypatch.setattr(processes, "_LOG_SECONDS", 0.0)
    log = tmp_path / "logs" / "rank-00001.log"
    run(tmp_path, "print('old words')")
    made = job(tmp_path, "")
    made.start()
    made.wait(Signals(), Bounds())
    assert not any("old words" in line for line in made.last_lines(1)), "these are of the job before"
    assert "old words" in log.read_text()
    made = job(tmp_path, "for number in range(3000):\n    print('line', number, flush=True); time.sleep(1e-4)")
    made.start()
    assert made.wait(Signals(), Bounds()).code == 0
    text = log.read_text()
    assert len(text) < 30_000
    assert "old words" not in text
    assert made.last_lines(1)[-1] == "line 2999"
    assert "\0" not in text


def test_ports() -> None:
    port = free_port()
    assert is_free(port)
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        assert not is_free(port)
    assert is_free(port)
