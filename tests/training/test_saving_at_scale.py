"""Saves beside the training, and saves that several processes share."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_checkpoint as toy
import torch
from rich.console import Console
from safetensors import safe_open
from test_saving import saver_of, small_run, train, weights
from transformers import AutoModelForCausalLM

from pretrain.config import RunConfig, dump_config
from pretrain.files import HashingWriter, LateBytes, write_safetensors
from pretrain.ranks import Ranks
from pretrain.train import build_trainer
from pretrain.training import checkpoint, places, saving
from pretrain.training.checkpoint_files import together
from pretrain.training.saving import NotSavedError, Saver
from pretrain.training.snapshots import KeptBuffers, share_out
from tests.two_ranks import ThreadRanks, two_ranks

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0


def checkpoints(config: RunConfig) -> list[str]:
    return [path.name for path in checkpoint.list_checkpoints(config.directory / "train")]


class Gate:
    """Holds the first bytes of the checkpoint of a step back until it is opened; `entered` says that a thread waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        self.entered, self._open = threading.Event(), threading.Event()
        self.error: OSError | None = None
        plain = HashingWriter.write

        def write(writer: HashingWriter, data: bytes | bytearray | memoryview) -> None:
            if f"step-{step:08d}" in str(writer.path):
                self.entered.set()
                assert self._open.wait(PATIENCE)
                if self.error is not None:
                    raise self.error
            plain(writer, data)

        monkeypatch.setattr(HashingWriter, "write", write)

    def open(self) -> None:
        self._open.set()


def at_steps(monkeypatch: pytest.MonkeyPatch, **actions: Callable[[], object]) -> None:
    """Do something right after the update of a step: at_steps(monkeypatch, s3=gate.open)."""
    from pretrain.training.trainer import Trainer

    plain = Trainer._step

    def step(self: Trainer, progress: Any, *rest: Any) -> None:
        plain(self, progress, *rest)
        actions.get(f"s{progress.step}", lambda: None)()

    monkeypatch.setattr(Trainer, "_step", step)


# --- beside the training --------------------------------------------------------------------------------------------


def test_a_slow_save_holds_what_was_there_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save of step 3 writes its first byte when step 6 is done, and its bytes are those of a save that waits."""
    evaluate = {"evaluate": {"every": 6}}
    waits = small_run(tmp_path / "waits", checkpoint={"every": 3, "keep": 9, "asynchronous": False}, **evaluate)
    expected, _ = train(waits)
    beside = small_run(tmp_path / "beside", checkpoint={"every": 3, "keep": 9}, **evaluate)
    gate = Gate(monkeypatch, 3)
    seen: list[list[str]] = []
    at_steps(monkeypatch, s6=lambda: (seen.append(checkpoints(beside)), gate.open()))
    losses, _ = train(beside)
    assert gate.entered.is_set()
    assert seen == [[]], "nothing is published before every byte is there"
    assert losses == expected
    assert weights(beside) == weights(waits)
    of = lambda config: toy.contents(config.directory / "train" / "checkpoints" / "step-00000003")  # noqa: E731
    tensors = [name for name in of(beside) if name.endswith(".safetensors")]
    assert len(tensors) == 2
    assert all(of(beside)[name] == of(waits)[name] for name in tensors)


def test_the_next_save_waits_for_the_one_before_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_WORTH_SAYING", 0.05)
    config = small_run(tmp_path, evaluate={"every": 6})
    gate = Gate(monkeypatch, 2)
    at_steps(monkeypatch, s4=lambda: threading.Timer(0.3, gate.open).start())
    _, said = train(config)
    assert "s for the save of step 2" in said
    assert "raise checkpoint.every" in said
    assert checkpoints(config)[-1] == "step-00000006"


@pytest.mark.parametrize("policy", ["keep-going", "stop"])
def test_a_failure_beside_the_training_surfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """With keep-going one line, and `best` as it was; with stop an error at the boundary of the next step."""
    monkeypatch.setattr(saving, "PATIENCE_SECONDS", 0.0)
    config = small_run(tmp_path, train={"steps": 12}, checkpoint={"every": 2, "keep": 9, "on_error": policy})
    gate = Gate(monkeypatch, 4)
    gate.error = OSError(28, "No space left on device")
    made: list[int] = []

    def wait_for_the_failure() -> None:
        gate.open()
        thread = next(thread for thread in threading.enumerate() if thread.name.startswith("save"))
        assert thread.is_alive()
        deadline = time.monotonic() + PATIENCE
        while trainer.saver._flight is not None and not trainer.saver._flight.future.done():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    at_steps(
        monkeypatch,
        s5=wait_for_the_failure,
        **{f"s{step}": lambda step=step: made.append(step) for step in (6, 7)},  # type: ignore[misc]
    )
    said = io.StringIO()
    trainer = build_trainer(config, console=Console(file=said, width=10_000))
    if policy == "keep-going":
        trainer.train()
        assert "checkpoint of step 4 was not saved: No space left" in said.getvalue()
        assert "step-00000004" not in checkpoints(config)
        assert checkpoints(config)[-1] == "step-00000012"
    else:
        with pytest.raises(NotSavedError, match="Steps 3 to 4 are lost"):
            trainer.train()
        assert made == [], "no step is made after it is known"
        assert checkpoints(config) == ["step-00000002"]


def test_a_stop_waits_for_the_save_in_flight_and_makes_a_failed_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM comes in the save of step 4, which then fails once: it is made again before the process ends."""
    config = small_run(tmp_path, evaluate={"every": 6})
    gate = Gate(monkeypatch, 4)
    gate.error = OSError(28, "No space left on device")

    def free() -> None:
        assert gate.entered.wait(PATIENCE)
        os.kill(os.getpid(), signal.SIGTERM)
        gate.open()
        time.sleep(0.2)
        gate.error = None

    plain = saving.Saver.save

    def save(self: Any, progress: Any, **keys: Any) -> Any:
        if progress.step == 4 and not gate.entered.is_set():
            threading.Thread(target=free).start()
        return plain(self, progress, **keys)

    monkeypatch.setattr(saving.Saver, "save", save)
    said = io.StringIO()
    trainer = build_trainer(config, console=Console(file=said, width=10_000))
    result = trainer.train()
    assert result.stopped_by == "SIGTERM"
    assert checkpoints(config)[-1] == f"step-{result.progress.step:08d}"


def test_a_guard_that_stops_the_run_lets_the_save_in_flight_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run(tmp_path, train={"steps": 12}, evaluate={"every": 12})
    gate = Gate(monkeypatch, 2)

    def fail() -> None:
        threading.Timer(0.2, gate.open).start()
        raise RuntimeError("the machine is on fire")

    at_steps(monkeypatch, s3=fail)
    with pytest.raises(RuntimeError, match="on fire"):
        train(config)
    assert checkpoints(config) == ["step-00000002"]
    assert checkpoint.read_pointer(config.directory / "train", "latest") is not None


@pytest.mark.parametrize("asked", [False, True])
def test_while_an_error_waits_for_a_save_the_launcher_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """A silence so long is a hang in the phase of a step, and would end the save. `asked`: for an error's text."""
    config = small_run(tmp_path, train={"steps": 12}, evaluate={"every": 12})
    trainer = build_trainer(config, console=Console(quiet=True))
    beats: list[tuple[int, str]] = []
    at_close: list[tuple[int, str]] = []
    plain = Saver.close

    def close(self: Saver) -> None:
        if self._flight is not None:
            at_close.append(beats[-1])
        plain(self)

    monkeypatch.setattr(Saver, "close", close)
    monkeypatch.setattr(trainer.heartbeat, "beat", lambda step, phase: beats.append((step, phase)))
    gate = Gate(monkeypatch, 2)

    def fail() -> None:
        assert beats[-1][1] == "step"
        threading.Timer(0.2, gate.open).start()
        raise ValueError(trainer._next_call(SimpleNamespace(step=3, run_id=None)) if asked else "no rows")

    at_steps(monkeypatch, s3=fail)
    with pytest.raises(ValueError, match="from checkpoint step-00000002" if asked else "no rows"):
        trainer.train()
    assert at_close == [(3, "save")]


def test_a_save_and_a_look_may_last_longer_than_a_step_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that have ended their share wait for the others, whatever `train.ddp_timeout` is; all end at once."""
    longer = 1.5
    settled: list[float] = []

    class Far:
        def find(self, ranks: Ranks, report: Any) -> None:
            ranks.on_main(lambda: time.sleep(longer))

        def write(self, content: Any, ranks: Ranks, report: Any) -> str:
            together(ranks, lambda: time.sleep(longer * ranks.rank))
            return "there"

        def settle(self, content: Any, *, best: int | None, keep: int) -> None:
            time.sleep(0.3)
            settled.append(time.monotonic())

    monkeypatch.setattr(saving, "replace", lambda save, **changes: save)

    def work(ranks: ThreadRanks) -> Any:
        saver, _ = saver_of(tmp_path / str(ranks.rank), ranks=ranks, train={"ddp_timeout": 1})
        saver.place = Far()  # type: ignore[assignment]
        content: Any = SimpleNamespace(rngs=[], step=1)
        return saver.resume(), saver._try(saving._Save(content, None, last=True)), time.monotonic()

    found = two_ranks(work, timeout=1.0)
    assert [rank[:2] for rank in found] == [(None, "there")] * 2
    assert min(rank[2] for rank in found) >= settled[0]


def test_kept_buffers_are_allocated_once_and_never_shared() -> None:
    buffers = KeptBuffers()
    live = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones((), dtype=torch.bfloat16), "c": torch.empty(0, 4)}
    first = {name: buffers.copy(name, tensor) for name, tensor in live.items()}
    assert buffers.nbytes == 24 + 2
    live["a"].zero_()
    assert first["a"].sum() == 15
    again = buffers.copy("a", live["a"].t().contiguous().t())
    assert again.data_ptr() == first["a"].data_ptr()
    assert again.is_contiguous()


# --- shares ---------------------------------------------------------------------------------------------------------


def test_shares_are_even_whole_and_keep_together_what_is_joined() -> None:
    sizes = {f"w{number}": number for number in range(1, 60)}
    joined = [["w50", "w1", "w7"], ["w20", "w21"]]
    joined += [[name] for name in sizes if name not in {one for names in joined for one in names}]
    shares = share_out(sizes, {name: 2 * size for name, size in sizes.items()}, joined, 4)
    for parts in (shares.weights, shares.state):
        assert sorted(name for names in parts for name in names) == sorted(sizes)
    for names in joined:
        assert len([own for own in shares.weights if own & set(names)]) == 1
    loads = [
        sum(sizes[name] for name in weights) + 2 * sum(sizes[name] for name in state)
        for weights, state in zip(shares.weights, shares.state, strict=True)
    ]
    assert max(loads) - min(loads) < 0.01 * max(loads)
    assert shares == share_out(dict(reversed(sizes.items())), {n: 2 * s for n, s in sizes.items()}, joined[::-1], 4)


def test_tensors_are_brought_one_at_a_time(tmp_path: Path) -> None:
    held = most = 0

    def make(number: int) -> memoryview:
        nonlocal held, most
        held, most = number, most + 1
        return memoryview(bytes([number]) * 8)

    late = [(f"t{number}", LateBytes("U8", (8,), 8, lambda number=number: make(number))) for number in (1, 2, 3)]
    write_safetensors(tmp_path / "t.safetensors", late)
    assert (held, most) == (3, 3)
    with safe_open(tmp_path / "t.safetensors", framework="pt") as opened:
        assert opened.get_tensor("t2").tolist() == [2] * 8


def test_a_failure_of_one_rank_is_everybodys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, [None, ["No space left on device", True]]])
    with pytest.raises(OSError, match="rank 1: No space left"):
        together(Ranks(rank=0, world=2), lambda: "fine")
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, [None, ["no digest", False]]])
    with pytest.raises(ValueError, match="rank 1: no digest"):
        together(Ranks(rank=0, world=2), lambda: "fine")


def test_a_rank_that_sees_another_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "SEEN_SECONDS", 0.0)
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [["node-a", True], ["node-b", False]])
    monkeypatch.setattr(Ranks, "broadcast", lambda self, value: "token")
    monkeypatch.setattr(Ranks, "on_main", lambda self, function: function())
    with pytest.raises(ValueError, match=r"rank 1 on node-b does not see.*rank 0 on node-a.*checkpoint\.to="):
        places.Shared(tmp_path).check(Ranks(rank=0, world=2))
    assert list(tmp_path.iterdir()) == []


_SIGNALS_ITSELF = """
import os, signal, sys
from pretrain.cli import main
from pretrain.training.trainer import Trainer
plain = Trainer._step
def step(self, progress, *rest):
    plain(self, progress, *rest)
    if progress.step == 4 and self.ranks.rank == 1:  # the ranks agree on it in step 5
        os.kill(os.getpid(), signal.SIGTERM)
Trainer._step = step
sys.argv = ["pretrain", "train", *sys.argv[1:]]
main()
"""


def test_two_processes_write_their_shares_and_one_goes_on(tmp_path: Path) -> None:
    """DDP above `shard_above_bytes`, SIGTERM on the second rank, saved at step 5, then one process to the end."""
    sections: dict[str, Any] = {
        "train": {"micro_batch": 2},
        "checkpoint": {"every": 2, "shard_above_bytes": 1000},
        "evaluate": {"every": 6},
    }
    alone, config = small_run(tmp_path / "alone", **sections), small_run(tmp_path / "two", **sections)
    expected, _ = train(alone)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--no-python"]
    command = [*launcher, sys.executable, "-c", _SIGNALS_ITSELF, str(tmp_path / "run.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert "stopped by SIGTERM at step 5 of 6; saved in" in done.stderr, done.stderr[-3000:]
    newest = config.directory / "train" / "checkpoints" / "step-00000005"
    manifest = json.loads((newest / "manifest.json").read_text())
    assert {f"{kind}-0000{number}-of-00002.safetensors" for kind in ("model/model", "optimizer/optimizer")
            for number in (1, 2)} < set(manifest["files"])  # fmt: skip
    shares = [(newest / "model" / f"model-0000{number}-of-00002.safetensors").stat().st_size for number in (1, 2)]
    assert min(shares) > 0.2 * max(shares)
    _, report = AutoModelForCausalLM.from_pretrained(newest / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not list(config.directory.rglob(".tmp-*"))
    losses, _ = train(config)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert "model.safetensors" in {path.name for path in (newest.parent / "step-00000006" / "model").iterdir()}
