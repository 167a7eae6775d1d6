"""Pushes beside the training: put aside before rotation, sent by another process; no failure ends or holds a run."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from pretrain.config import ConfigError, load_config
from pretrain.files import sha256_file, write_manifest
from pretrain.publishing.background import MOST, Publisher, Target, waiting_in
from scripts.faults import tiny
from tests.local_hub import WRITER, Fault, LocalHub
from tests.publishing.conftest import write_model

REPO = "local/run"


def save(train: Path, step: int) -> Path:
    """A directory that looks like a checkpoint."""
    path = train / "checkpoints" / f"step-{step:08d}"
    write_model(path / "model", seed=step, shards=1)
    write_manifest(path, kind="checkpoint", config={}, facts={"step": step, "run_id": "run1"})
    return path


def publisher(train: Path, lines: list[str], **changes: object) -> Publisher:
    made = {"every": None, "wait": 20.0} | changes
    return Publisher(train / "publish", Target(REPO), say=lines.append, **made)  # type: ignore[arg-type]


def take(made: Publisher, path: Path, step: int, total: int = 100) -> None:
    made.take(path, step=step, tokens=10 * step, run_id="run1", total_steps=total)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is started: what is put aside stays."""
    monkeypatch.setattr(Publisher, "_start", lambda self, **_: None)


@pytest.fixture
def environment(server: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalHub:
    """The Hub, for other processes too."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return server


# --- the spool ------------------------------------------------------------------------------------------------------


def test_what_is_put_aside_outlives_its_checkpoint(tmp_path: Path, still: None) -> None:
    lines: list[str] = []
    path = save(tmp_path, 5)
    take(publisher(tmp_path, lines), path, 5)
    weights = path / "model" / "model-00001-of-00001.safetensors"
    digest = sha256_file(weights)
    (waiting,) = waiting_in(tmp_path / "publish")
    assert os.stat(weights).st_nlink == 2  # no copy
    shutil.rmtree(path)
    assert (waiting.step, waiting.tokens, waiting.run_id) == (5, 50, "run1")
    assert sha256_file(waiting.folder / weights.name) == digest == waiting.digests[weights.name]
    assert not lines


def test_a_disk_without_links_gets_copies(tmp_path: Path, still: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    take(publisher(tmp_path, []), save(tmp_path, 5), 5)
    (waiting,) = waiting_in(tmp_path / "publish")
    assert {path.name for path in waiting.folder.iterdir()} == set(waiting.digests)


@pytest.mark.parametrize(
    ("every", "sent"), [(None, [10, 20, 30, 40]), (20, [20, 40]), (25, [30]), ("30%", [30]), (1000, [])]
)
def test_every_says_which_are_sent(tmp_path: Path, still: None, every: str | int | None, sent: list[int]) -> None:
    made = publisher(tmp_path, [], every=every)
    for step in (10, 20, 30, 40):
        take(made, save(tmp_path, step), step)
    assert [waiting.step for waiting in waiting_in(tmp_path / "publish")] == sent
    take(publisher(tmp_path, [], every=every), save(tmp_path, 100), 100)
    assert waiting_in(tmp_path / "publish")[-1].step == 100  # the last one always


def test_no_more_than_some_wait(tmp_path: Path, still: None) -> None:
    lines: list[str] = []
    made = publisher(tmp_path, lines)
    for step in range(1, MOST + 3):
        take(made, save(tmp_path, step), step)
    assert [waiting.step for waiting in waiting_in(tmp_path / "publish")] == list(range(3, MOST + 3))
    assert len(lines) == 2
    assert "step 1 is given up" in lines[0]
    assert len(made.give_up()) == MOST
    assert not waiting_in(tmp_path / "publish")


def test_a_checkpoint_that_cannot_be_put_aside_is_a_line(tmp_path: Path) -> None:
    lines: list[str] = []
    made = publisher(tmp_path, lines)
    take(made, tmp_path / "nothing", 5)
    (tmp_path / "publish").mkdir(exist_ok=True)
    shutil.rmtree(tmp_path / "publish")
    (tmp_path / "publish").write_text("a file where the spool should be")
    take(made, save(tmp_path, 6), 6)
    made.look()
    made.close()
    assert len(lines) == 2
    assert all("training goes on" in line for line in lines)


# --- the process ----------------------------------------------------------------------------------------------------


def test_checkpoints_arrive_and_leave_the_disk(
    environment: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first try meets a wrong token, the second one a server that works: both checkpoints arrive."""
    (tmp_path / "pretrain.py").write_text("raise SystemExit('this stood in for the package')\n")
    monkeypatch.chdir(tmp_path)  # what lies in the working directory is not what is started
    lines: list[str] = []
    made = publisher(tmp_path, lines, wait=60.0)
    environment.tokens.clear()
    take(made, save(tmp_path, 5), 5)
    deadline = time.monotonic() + 60
    while not lines and time.monotonic() < deadline:
        time.sleep(0.05)
        made.look()
    assert "401" in lines[0]
    assert WRITER not in "".join(lines)
    environment.tokens[WRITER] = "write"
    take(made, save(tmp_path, 100), 100)
    assert made._process is None  # it has just run, and is not started at every save
    made.finished = True
    made.close()
    assert not waiting_in(tmp_path / "publish")
    assert [line for line in lines if "step 100 is on local/run (step-100): 5 files" in line]
    repository = environment.repositories.read(REPO)
    assert repository["private"] is True
    assert set(repository["branches"]) == {"main", "step-5", "step-100"}
    (newest, first) = environment.repositories.history(REPO, "step-100")
    assert newest["title"] == "bert: step 100, 1,000 tokens seen"
    assert set(first["files"]) == {".gitattributes"}
    record = environment.repositories.open(newest["files"]["pretrain.json"]["sha256"]).read()
    assert json.loads(record)["tokens"] == 1000


@pytest.mark.slow
def test_a_server_that_hangs_holds_nobody(environment: LocalHub, tmp_path: Path) -> None:
    lines: list[str] = []
    environment.faults.add(Fault("hang", times=None))
    made = publisher(tmp_path, lines, wait=1.0)
    started = time.monotonic()
    take(made, save(tmp_path, 5), 5)
    took = time.monotonic() - started
    assert took < 1.0
    made.finished = True
    made.close()
    assert time.monotonic() - started < took + 5
    assert "not sent yet: step 5" in lines[-1]
    assert [waiting.step for waiting in waiting_in(tmp_path / "publish")] == [5]


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", "token", "hang"])
def test_a_run_ends_as_it_would_without(environment: LocalHub, tmp_path: Path, fault: str) -> None:
    """The same losses and weights whatever the Hub does; with a Hub that works, what rotation removed is there."""
    plain = tiny.make(tmp_path / "runs", name="plain")
    pushed = tiny.copy(plain, tmp_path / "pushed")
    wanted = f"checkpoint.publish={{to: {REPO}, wait: {60 if fault == 'none' else 3}}}"
    settings = {"HF_ENDPOINT": environment.url, "HF_TOKEN": WRITER, "HF_HUB_OFFLINE": "0"}
    if fault == "token":
        settings["HF_TOKEN"] = "hf_" + "wrong" * 7
    if fault == "hang":
        environment.faults.add(Fault("hang", times=None))
    assert tiny.train(plain).code == 0
    ended = tiny.execute(tiny.command(pushed, wanted), environment=settings)
    assert ended.code == 0, ended.output
    assert tiny.trace(plain).difference(tiny.trace(pushed)) == ""
    assert "hf_" not in ended.output
    if fault == "none":
        assert set(environment.repositories.read(REPO)["branches"]) >= {"main", "step-4", "step-6", "step-8"}
        assert not waiting_in(pushed.directory / "train" / "publish")
    else:
        assert "not sent yet" in ended.output
        environment.faults.clear()
        settings |= {"HF_ENDPOINT": environment.url, "HF_TOKEN": WRITER}
        again = tiny.execute(tiny.command(pushed, wanted.replace("wait: 3", "wait: 60")), environment=settings)
        assert again.code == 0
        assert set(environment.repositories.read(REPO)["branches"]) >= {"main", "step-8"}, again.output


# --- the configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        f"checkpoint.publish={{to: {WRITER}/x}}",
        f"checkpoint.publish={{to: https://me:{WRITER}@huggingface.co/a/b}}",
        "checkpoint.publish={to: name-alone}",
        f"checkpoint.publish={{to: a/b, token: {WRITER}}}",
    ],
)
def test_a_token_in_the_configuration_is_refused_and_not_repeated(override: str) -> None:
    with pytest.raises(ConfigError, match="publish") as refused:
        load_config("quickstart-gpt", [override])
    assert WRITER not in str(refused.value)


def test_a_store_and_a_hub_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="store"):
        load_config("quickstart-gpt", ["checkpoint.publish={to: a/b}", "checkpoint.to=s3://bucket/x"])
