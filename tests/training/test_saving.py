"""Saving that cannot hurt: kills at every change to the disk, a full disk, too little room, pointers, nothing pickled.

The sweeps with real system calls, kill -9 and full file systems are `scripts/faults.sh`; a dozen of its kills run here.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import pickletools
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_checkpoint as toy
import torch
from rich.console import Console
from test_trainer import config as toy_config

from pretrain.config import RunConfig
from pretrain.files import ArtifactError, HashingWriter
from pretrain.publishing.background import Publisher, Target, waiting_in
from pretrain.ranks import LostRankError, Ranks
from pretrain.train import build_trainer
from pretrain.training import checkpoint, saving
from pretrain.training.checkpoint_files import Content
from pretrain.training.metrics import JsonLines
from pretrain.training.places import Shared
from pretrain.training.saving import NotSavedError, Saver, _Save
from tests.gpu.synthetic import make_run

ROOT = Path(__file__).resolve().parents[2]
FULL = OSError(28, "No space left on device")
DiskUsage = namedtuple("DiskUsage", "total used free")


def small_run(out: Path, **sections: dict[str, Any]) -> RunConfig:
    plain: dict[str, dict[str, Any]] = {
        "data": {"sequence_length": 32},
        "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "train": {"steps": 6, "batch_tokens": 128, "precision": "fp32"},
        "checkpoint": {"every": 2, "keep": 2},
        "evaluate": {"every": 2, "max_tokens": 256},
    }
    merged = {name: keys | sections.get(name, {}) for name, keys in plain.items()}
    return make_run(out, tokens=6000, vocab_size=64, **merged)


def train(config: RunConfig) -> tuple[list[Any], str]:
    """Train in this process; the losses of all steps, and what was said."""
    said = io.StringIO()
    console = Console(file=said, width=10_000)
    build_trainer(config, console=console).train()
    lines = (config.directory / "train" / "metrics.jsonl").read_text().splitlines()
    losses = {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}
    return [losses.get(step) for step in range(1, 7)], said.getvalue()


def weights(config: RunConfig) -> bytes:
    newest = checkpoint.list_checkpoints(config.directory / "train")[-1]
    return (newest / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], bytes]:
    """Losses and final weights of the run that nothing happened to."""
    config = small_run(tmp_path_factory.mktemp("oracle"))
    losses, _ = train(config)
    return losses, weights(config)


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], bool]], None]:
    """Let writes to files that a predicate names fail as on a full disk; nobody waits for room."""
    monkeypatch.setattr(saving, "PATIENCE_SECONDS", 0.0)
    plain = HashingWriter.write

    def at(full: Callable[[Path], bool]) -> None:
        def write(self: HashingWriter, data: bytes | bytearray | memoryview) -> None:
            if full(self.path):
                raise FULL
            plain(self, data)

        monkeypatch.setattr(HashingWriter, "write", write)

    return at


# --- kills ----------------------------------------------------------------------------------------------------------


def die_at(number: int) -> None:
    """End this process, as kill -9 would, right before its `number`th change to the disk."""
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os._exit(9)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            count()

    plain = os.fsync

    def fsync(descriptor: int) -> None:
        count()
        plain(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_anywhere_in_a_save_or_a_rotation_loses_at_most_that_save(tmp_path: Path, keep: int) -> None:
    model, optimizer = toy.make()
    for step in (1, 2):
        toy.train(model, optimizer, 1)
        toy.save(tmp_path / "start", step, model, optimizer)
        checkpoint.point(tmp_path / "start", "latest", step)
    toy.train(model, optimizer, 1)

    def save(directory: Path) -> None:
        toy.save(directory, 3, model, optimizer)
        checkpoint.point(directory, "latest", 3)
        checkpoint.rotate(directory, keep=keep)

    shutil.copytree(tmp_path / "start", tmp_path / "whole")
    save(tmp_path / "whole")
    expected = toy.contents(tmp_path / "whole")
    survived = 0
    for number in range(1, 200):
        place = tmp_path / str(number)
        shutil.copytree(tmp_path / "start", place)
        pid = os.fork()
        if not pid:
            try:
                die_at(number)
                save(place)
            finally:
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        visible = sorted((place / "checkpoints").glob("step-*"))
        for path in visible:
            checkpoint.load_checkpoint(path)  # nothing that has its final name is ever half
        assert visible, number
        found = checkpoint.find_resumable(place)
        assert found is not None
        assert found.name in ("step-00000002", "step-00000003"), number
        assert not list(place.rglob(".tmp-*")), number
        save(place)  # what the same command does next
        assert toy.contents(place) == expected, number
        shutil.rmtree(place)
        if code == 0:
            break
        assert code == 9
        survived += 1
    assert survived > 30, "the save has that many places to be killed at"


def faults() -> Any:
    """The tools of scripts/faults."""
    if str(ROOT / "scripts" / "faults") not in sys.path:
        sys.path.insert(0, str(ROOT / "scripts" / "faults"))
    import saving as rows

    return rows


def test_kill_minus_nine_at_a_dozen_system_calls(tmp_path: Path) -> None:
    """Some 20 s: each try is a run of its own, killed through strace and started again."""
    rows = faults()
    if why := rows.tracing.unavailable():
        pytest.skip(f"strace: {why}")
    outcome = rows.kill_everywhere(tmp_path, keep=1, sample=12)
    assert (outcome.tries, outcome.survived) == (12, 12), outcome.note


# --- a full disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.json", "trainer.json", "manifest.json"])
def test_a_full_disk_costs_one_save(
    tmp_path: Path, oracle: tuple[list[Any], bytes], fill: Callable[[Callable[[Path], bool]], None], file: str
) -> None:
    config = small_run(tmp_path)
    fill(lambda path: path.name == file and "step-00000004" in str(path))
    losses, said = train(config)
    line = next(line for line in said.splitlines() if "was not saved" in line)
    assert "step 4 was not saved: No space left on device" in line
    assert "KiB are free" in line or "GiB are free" in line
    assert "newest whole one is step-00000002" in line
    assert "Training goes on; the next save tries again" in line
    assert (losses, weights(config)) == oracle
    names = sorted(path.name for path in (config.directory / "train" / "checkpoints").iterdir())
    assert names == ["best.json", "latest.json", "step-00000002", "step-00000006"], "nothing half is left"


def test_the_policy_stop_and_the_last_save_are_errors_that_say_what_is_lost(
    tmp_path: Path, oracle: tuple[list[Any], bytes], fill: Callable[[Callable[[Path], bool]], None]
) -> None:
    for name, sections, step in (("stop", {"checkpoint": {"on_error": "stop"}}, 4), ("last", {}, 6)):
        config = small_run(tmp_path / name, **sections)
        mark = f"step-{step:08d}"
        fill(lambda path, mark=mark: mark in str(path))
        with pytest.raises(NotSavedError, match=rf"Steps {step - 1} to {step} are lost.*from step {step - 2}"):
            train(config)
        fill(lambda path: False)
        losses, _ = train(config)
        assert (losses[-2:], weights(config)) == (oracle[0][-2:], oracle[1])


def test_the_last_save_makes_room_among_its_own(
    tmp_path: Path, oracle: tuple[list[Any], bytes], fill: Callable[[Callable[[Path], bool]], None]
) -> None:
    config = small_run(tmp_path, evaluate={"every": 6}, checkpoint={"every": 2, "keep": 3})
    first = config.directory / "train" / "checkpoints" / "step-00000002"
    fill(lambda path: "step-00000006" in str(path) and first.exists())
    losses, said = train(config)
    assert "removed step-00000002 to make room for the last checkpoint" in said
    assert (losses, weights(config)) == oracle


def waiting_push(config: RunConfig, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Publisher:
    """A publisher whose Hub takes nothing, with one model that waits since an earlier start."""
    monkeypatch.setattr(Publisher, "_start", lambda self, **_: None)
    publisher = Publisher(config.directory / "train" / "publish", Target("a/b"), None, 0.0, said.append)
    folder = publisher.spool / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x")
    mark = {"step": 1, "tokens": 1, "run_id": "before", "digests": {}}
    folder.with_suffix(".json").write_text(json.dumps(mark))
    return publisher


def test_what_waits_to_be_published_makes_room_for_a_checkpoint(
    tmp_path: Path,
    oracle: tuple[list[Any], bytes],
    fill: Callable[[Callable[[Path], bool]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Hub that is away costs no save: the disk is full as long as the model of step 1 waits."""
    config = small_run(tmp_path)
    said = io.StringIO()
    trainer = build_trainer(config, console=Console(file=said, width=10_000))
    trainer.saver.publisher = waiting_push(config, [], monkeypatch)
    first = trainer.saver.publisher.spool / "step-00000001"
    fill(lambda path: "step-00000004" in str(path) and first.exists())
    trainer.train()
    assert "step 4 was not saved: No space left on device" in said.getvalue()
    assert "removed step-00000001 of what waits to be published to make room for a checkpoint" in said.getvalue()
    assert weights(config) == oracle[1]
    whole = [path.name for path in checkpoint.list_checkpoints(config.directory / "train")]
    assert "step-00000004" in whole, "the save was tried again at once"
    waiting = [one.step for one in waiting_in(trainer.saver.publisher.spool)]
    assert waiting == [4, 6], "what is saved later waits again"


def test_too_little_room_is_refused_before_step_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run(tmp_path)
    trainer = build_trainer(config, console=Console(quiet=True))
    one = trainer.saver.checkpoint_bytes()
    for free, refused in ((3 * one - 1, True), (3 * one, False)):  # 2 to keep and the one being written, no best of 3
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: DiskUsage(10 * one, 0, free))
        if refused:
            with pytest.raises(ArtifactError, match=r"the checkpoints need .* 3 of .*checkpoint.keep: 2.*Free .*out="):
                trainer.train()
            assert not (config.directory / "train" / "metrics.jsonl").exists()
        else:
            trainer.train()
    monkeypatch.undo()
    sizes = [
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        for path in checkpoint.list_checkpoints(config.directory / "train")
    ]
    assert max(sizes) <= one <= max(sizes) + 300_000, "the estimate is above what is written, and not by much"


def test_lines_that_a_full_disk_refused_are_written_later(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl", first_step=0)
    sink.write(1, {"loss": 1.0})
    full = os.open("/dev/full", os.O_WRONLY)
    kept = os.dup(sink._file.fileno())
    os.dup2(full, sink._file.fileno())
    for step in range(2, 400):
        with pytest.raises(OSError, match="No space"):
            sink.write(step, {"loss": math.nan})
    os.dup2(kept, sink._file.fileno())
    sink.write(400, {"loss": 0.5})
    sink.close()
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 401))
    os.close(full)
    os.close(kept)


# --- what is not a disk's failure, and what a disk's failure leaves ---------------------------------------------------


def toy_content(step: int) -> Content:
    model, optimizer = toy.make()
    toy.train(model, optimizer, 1)
    state = checkpoint.optimizer_state_by_name(model, optimizer)
    return Content(step, "run-a", toy.writer(model), state, {"config": {"name": "toy"}}, [checkpoint.capture_rng()])


def saver_of(tmp_path: Path, **parts: Any) -> tuple[Saver, io.StringIO]:
    said = io.StringIO()
    job: Any = SimpleNamespace(ranks=parts.pop("ranks", Ranks.alone()))
    config = toy_config(tmp_path / "run", **parts)
    nothing: Any = None
    saver = Saver(config, tmp_path / "train", nothing, nothing, nothing, job, Console(file=said, width=10_000))
    saver.checkpoint_bytes = lambda: 1000  # type: ignore[method-assign]
    return saver, said


def test_a_rank_that_is_lost_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`LostRankError` is an OSError; the first process must not make room for a save that nobody can end."""
    saver, said = saver_of(tmp_path)
    for step in (1, 2, 3):
        assert saver._try(_Save(toy_content(step), None, last=False)) is not None
    before = saver.place.steps()

    def lost(*arguments: Any) -> str:
        raise LostRankError("rank 0 lost the other processes of the job")

    monkeypatch.setattr(Shared, "write", lost)
    with pytest.raises(LostRankError):
        saver._try(_Save(toy_content(4), None, last=True))
    assert saver.place.steps() == before == [2, 3]
    assert said.getvalue() == ""


@pytest.mark.parametrize("kind", ["disk", "store"])
def test_a_best_checkpoint_stays_though_its_pointer_could_not_be_moved(
    tmp_path: Path, fill: Callable[[Callable[[Path], bool]], None], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    saver, said = saver_of(
        tmp_path, checkpoint={"keep": 2, "to": f"file://{tmp_path}/store" if kind == "store" else None}
    )
    place: Any = saver.place
    old, best = {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}
    saver._try(_Save(toy_content(1), old, last=False))
    fill(lambda path: "latest.json" in path.name)
    with monkeypatch.context() as full:

        def pipe_file(target: str, data: bytes) -> None:
            raise FULL

        if kind == "store":
            full.setattr(place.store.filesystem, "pipe_file", pipe_file, raising=False)
        assert saver._try(_Save(toy_content(2), best, last=False)) is not None
    assert "could not move the pointers" in said.getvalue()
    fill(lambda path: False)
    for step in (3, 4, 5):
        saver._try(_Save(toy_content(step), best, last=False))
    assert place.steps() == [2, 4, 5]
    if kind == "store":
        assert place._pointer("best")["step"] == 2
    else:
        named = checkpoint.read_pointer(saver.directory, "best")
        assert named is not None
        assert named.name == "step-00000002"


# --- going on from what is there ------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> RunConfig:
    config = small_run(tmp_path)
    train(config)
    return config


@pytest.mark.parametrize("name", ["latest", "best"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"{")])
def test_a_pointer_that_is_gone_or_altered_is_put_right(
    finished: RunConfig, name: str, damage: Callable[[Path], object]
) -> None:
    pointer = finished.directory / "train" / "checkpoints" / f"{name}.json"
    before = pointer.read_bytes()
    damage(pointer)
    _, said = train(finished)
    assert pointer.read_bytes() == before
    assert len([line for line in said.splitlines() if line.startswith(f"the pointer to the {name} checkpoint")]) == 1


def test_weights_of_another_precision_are_refused_by_name(finished: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = faults()
    from state_surgery import WEIGHTS, Case, operate

    assert rows.FAULTS
    for path in checkpoint.list_checkpoints(finished.directory / "train"):
        operate(path, Case("cast", WEIGHTS, "transformer.wpe.weight"))
    with pytest.raises(ArtifactError, match=r"wpe\.weight.*bfloat16.*float32"):
        train(finished)


def test_saving_what_was_loaded_gives_the_same_bytes_and_dtypes(finished: RunConfig) -> None:
    newest = checkpoint.list_checkpoints(finished.directory / "train")[-1]
    before = toy.contents(newest)
    for seed in (1, 2):
        trainer = build_trainer(finished, console=Console(quiet=True))
        torch.manual_seed(seed)
        progress = trainer.saver.resume()
        assert progress is not None
        state = trainer.engine.optimizer.state
        assert {tensor.dtype for values in state.values() for tensor in values.values()} == {torch.float32}
        trainer.saver.save(progress)
        assert toy.contents(newest) == before


# --- nothing is pickled ---------------------------------------------------------------------------------------------

_AUDITED = """
import sys
import pretrain.train
from pretrain.cli import main
found = []
sys.addaudithook(lambda event, arguments: found.append(arguments) if event == "pickle.find_class" else None)
sys.argv = ["pretrain", "train", sys.argv[1]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(f"unpickled: {found}")
"""


def is_pickle(data: bytes) -> bool:
    """Whether every byte belongs to an opcode, up to the one that ends a pickle."""
    try:
        return [place + 1 for opcode, _, place in pickletools.genops(data) if opcode.name == "STOP"] == [len(data)]
    except (ValueError, IndexError, KeyError):
        return False


def test_what_a_pickle_is() -> None:
    for protocol in range(6):
        assert is_pickle(pickle.dumps({"a": [1, Path("x")]}, protocol=protocol))
    assert not is_pickle(b"")
    assert not is_pickle(b"{}\n")


def test_a_run_writes_and_reads_no_pickle(finished: RunConfig, tmp_path: Path) -> None:
    """Every file of a finished run is neither a zip archive, as torch makes them, nor a pickle; a resume reads none."""
    files = [path for path in finished.directory.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        data = path.read_bytes()
        assert not zipfile.is_zipfile(path), path
        assert not is_pickle(data), path
    shutil.rmtree(finished.directory / "train" / "checkpoints" / "step-00000006")  # so that it goes on from step 4
    from pretrain.config import dump_config

    (tmp_path / "run.yaml").write_text(dump_config(finished))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _AUDITED, str(tmp_path / "run.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "going on from step 4" in done.stderr
    assert "unpickled: []" in done.stdout, done.stdout + done.stderr
