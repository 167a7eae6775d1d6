"""Checkpoints: whole or not there, verified, exact, never fewer than one, in order of steps."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.config_loop import OptimizerConfig
from pretrain.files import ArtifactError, HashingWriter, write_bytes, write_safetensors
from pretrain.training import checkpoint
from pretrain.training.optim import build_optimizer
from pretrain.training.state import OptimizerState, tensor_bytes

NAMES = ("adamw", "stable-adamw", "muon")


class Toy(nn.Module):
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 4)])
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.zeros(3))
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers[1](torch.tanh(self.layers[0](self.embed(ids)))))


def make(name: str = "adamw", seed: int = 0) -> tuple[Toy, torch.optim.Optimizer]:
    model = Toy(seed)
    return model, build_optimizer(model, OptimizerConfig(name=name, lr=0.01, weight_decay=0.1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Each step draws its batch from torch's generator, so that the generator's state matters."""
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 7, (8,))
        loss = nn.functional.cross_entropy(model(ids).float(), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def writer(model: nn.Module) -> Callable[[Path], dict[str, str]]:
    def write(directory: Path) -> dict[str, str]:
        tensors = [(name, tensor_bytes(parameter)) for name, parameter in model.named_parameters()]
        return {
            "model.safetensors": write_safetensors(directory / "model.safetensors", tensors),
            "config.json": write_bytes(directory / "config.json", b"{}\n"),
        }

    return write


def save(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run_id: str = "run-a",
    **keys: object,
) -> Path:
    arguments = {"write_model": writer(model), "state": {"config": {"name": "toy"}, "best": None}, **keys}
    state = checkpoint.optimizer_state_by_name(model, optimizer)
    return checkpoint.save_checkpoint(directory, step=step, run_id=run_id, optimizer=state, **arguments)


def load_model(model: nn.Module, path: Path) -> None:
    model.load_state_dict(load_file(path / "model" / "model.safetensors"), strict=False)


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# --- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_going_on_equals_never_having_stopped(tmp_path: Path, name: str) -> None:
    model, optimizer = make(name)
    train(model, optimizer, 4)
    path = save(tmp_path, 4, model, optimizer)
    straight = train(model, optimizer, 5)

    other, other_optimizer = make(name, seed=9)
    train(other, other_optimizer, 2)
    loaded = checkpoint.load_checkpoint(path)
    load_model(other, path)
    checkpoint.load_optimizer_state_by_name(other, other_optimizer, loaded.optimizer)
    checkpoint.restore_rng(loaded.rng)
    assert train(other, other_optimizer, 5) == straight
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_save_load_save_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    model, optimizer = make(name)
    train(model, optimizer, 3)
    first = save(tmp_path / "one", 3, model, optimizer)
    other, other_optimizer = make(name, seed=9)
    loaded = checkpoint.load_checkpoint(first)
    load_model(other, first)
    checkpoint.load_optimizer_state_by_name(other, other_optimizer, loaded.optimizer)
    checkpoint.restore_rng(loaded.rng)
    second = save(tmp_path / "two", 3, other, other_optimizer, state=loaded.state)
    assert contents(first) == contents(second)
    assert first.name == "step-00000003"
    names = set(contents(first))
    assert {"manifest.json", "trainer.json", "optimizer/optimizer-00001-of-00001.safetensors"} <= names
    # What was loaded is the optimizer's own: training on does not reach into the file.
    train(other, other_optimizer, 2)
    assert contents(first) == contents(second)


def test_state_by_name(tmp_path: Path) -> None:
    model, optimizer = make("muon")
    train(model, optimizer, 2)
    state = checkpoint.load_checkpoint(save(tmp_path, 2, model, optimizer)).optimizer
    assert set(state.tensors) == {
        "embed.weight/exp_avg",
        "embed.weight/exp_avg_sq",
        "embed.weight/step",
        *(f"layers.{i}.weight/{key}" for i in (0, 1) for key in ("momentum_buffer", "step")),
        *(f"layers.{i}.bias/{key}" for i in (0, 1) for key in ("exp_avg", "exp_avg_sq", "step")),
    }
    assert state.stateless == ("unused",)
    groups = {group["name"]: group["parameters"] for group in state.groups}
    assert groups["muon"] == ["layers.0.weight", "layers.1.weight"]
    assert state.tensors["embed.weight/step"] == 2
    live = checkpoint.optimizer_state_by_name(nn.DataParallel(model), optimizer)
    assert set(live.tensors) == set(state.tensors)
    assert live.tensors["embed.weight/exp_avg"] is optimizer.state[model.embed.weight]["exp_avg"]


def test_state_before_the_first_step(tmp_path: Path) -> None:
    model, optimizer = make("muon")
    loaded = checkpoint.load_checkpoint(save(tmp_path, 0, model, optimizer))
    assert not loaded.optimizer.tensors
    train(model, optimizer, 1)
    checkpoint.load_optimizer_state_by_name(model, optimizer, loaded.optimizer)
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4)])
def test_tensors_of_every_kind_survive(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    write_safetensors(tmp_path / "t.safetensors", [("t", tensor_bytes(tensor))])
    loaded = load_file(tmp_path / "t.safetensors")["t"]
    assert loaded.dtype == dtype
    assert torch.equal(loaded, tensor)


def test_a_tensor_is_not_copied_and_a_transposed_one_keeps_its_order() -> None:
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    view = np.frombuffer(tensor_bytes(tensor).data, dtype=np.uint16)
    assert view.__array_interface__["data"][0] == tensor.data_ptr()
    assert bytes(tensor_bytes(tensor.T).data) == bytes(tensor_bytes(tensor.T.contiguous()).data)
    with pytest.raises(ValueError, match="complex64"):
        tensor_bytes(torch.zeros(2, dtype=torch.complex64))


def test_random_generators() -> None:
    random.gauss(0, 1)  # leaves a second value in store
    np.random.standard_normal()
    state = json.loads(json.dumps(checkpoint.capture_rng()))

    def draw() -> list[float]:
        from_numpy = [np.random.standard_normal(), np.random.rand()]
        return [random.gauss(0, 1), random.random(), *from_numpy, torch.rand(()).item()]

    expected = draw()
    draw()
    checkpoint.restore_rng(state)
    assert draw() == expected
    del state["numpy"]
    before = checkpoint.capture_rng()
    with pytest.raises(ArtifactError, match="numpy"):
        checkpoint.restore_rng(state)
    assert checkpoint.capture_rng() == before


# --- what does not fit ----------------------------------------------------------------------------------------------


def without(state: OptimizerState, name: str) -> OptimizerState:
    tensors = {key: tensor for key, tensor in state.tensors.items() if key != name}
    return OptimizerState(tensors, state.groups, state.stateless)


def test_missing_left_over_and_misshapen_state_is_named() -> None:
    model, optimizer = make()
    train(model, optimizer, 2)
    state = checkpoint.optimizer_state_by_name(model, optimizer)
    state = OptimizerState({name: t.clone() for name, t in state.tensors.items()}, state.groups, state.stateless)

    def refused(changed: OptimizerState, match: str) -> None:
        before = {key: tensor.clone() for key, tensor in optimizer.state[model.embed.weight].items()}
        with pytest.raises(ArtifactError, match=match):
            checkpoint.load_optimizer_state_by_name(model, optimizer, changed)
        for key, tensor in before.items():
            assert torch.equal(tensor, optimizer.state[model.embed.weight][key]), "changed before it was refused"

    name = "layers.1.weight/exp_avg"
    refused(without(state, name), f"lacks `{name}`")
    refused(OptimizerState({**state.tensors, "x/exp_avg": torch.zeros(1)}, state.groups, state.stateless), "x/exp_avg")
    changed = {**state.tensors, name: state.tensors[name].bfloat16()}
    refused(OptimizerState(changed, state.groups, state.stateless), f"{name}.*bfloat16.*float32")
    changed = {**state.tensors, name: torch.zeros(2, 2)}
    refused(OptimizerState(changed, state.groups, state.stateless), rf"{name}.*\(2, 2\).*\(4, 6\)")
    checkpoint.load_optimizer_state_by_name(model, optimizer, state)


def test_another_optimizer_or_model_is_refused() -> None:
    model, optimizer = make("adamw")
    train(model, optimizer, 1)
    state = checkpoint.optimizer_state_by_name(model, optimizer)
    muon_model, muon = make("muon")
    with pytest.raises(ArtifactError, match=r"`layers.0.weight` was saved in optimizer group adam_decay.*muon"):
        checkpoint.load_optimizer_state_by_name(muon_model, muon, state)
    other = Toy()
    other.layers.append(nn.Linear(4, 4))
    bigger = build_optimizer(other, OptimizerConfig(lr=0.1))
    with pytest.raises(ArtifactError, match=r"no parameter `layers\.2\.weight`"):
        checkpoint.load_optimizer_state_by_name(other, bigger, state)
    bigger_state = checkpoint.optimizer_state_by_name(other, bigger)
    with pytest.raises(ArtifactError, match=r"`layers\.2\.bias`, which the model does not have"):
        checkpoint.load_optimizer_state_by_name(model, optimizer, bigger_state)


def test_every_altered_or_missing_file_is_found_and_the_older_one_used(tmp_path: Path) -> None:
    model, optimizer = make()
    train(model, optimizer, 1)
    old = save(tmp_path, 1, model, optimizer)
    new = save(tmp_path, 2, model, optimizer)
    checkpoint.point(tmp_path, "latest", 2)
    generator = random.Random(0)
    originals = contents(new)
    assert checkpoint.find_resumable(tmp_path) == new
    for name, original in originals.items():
        path = new / name
        flips = [generator.randrange(len(original)) for _ in range(8)]
        damaged = [original[:i] + bytes([original[i] ^ 0x40]) + original[i + 1 :] for i in flips]
        for data in (*damaged, original[:-1], b"", None):
            path.unlink()
            if data is not None:
                path.write_bytes(data)
            lines: list[str] = []
            assert checkpoint.find_resumable(tmp_path, report=lines.append) == old, (name, data)
            assert len(lines) == 1
            assert "step-00000002" in lines[0]
            assert "\n" not in lines[0]
            if data is None or name != "manifest.json":
                assert path.name in lines[0]
            path.write_bytes(original)
    assert checkpoint.find_resumable(tmp_path) == new


def test_every_byte_of_the_manifest_and_of_a_pointer_counts(tmp_path: Path) -> None:
    """They have no digest in another file: each flip must be found by what they say of themselves."""
    path = save(tmp_path, 1, *make())
    checkpoint.point(tmp_path, "latest", 1)
    manifest, pointer = path / "manifest.json", path.parent / "latest.json"
    for file, read in (
        (manifest, lambda: checkpoint.load_checkpoint(path)),
        (pointer, lambda: checkpoint.read_pointer(tmp_path, "latest")),
    ):
        original = file.read_bytes()
        for place in range(len(original)):
            file.write_bytes(original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :])
            with pytest.raises(ArtifactError):
                read()
        file.write_bytes(original)
        read()


def test_a_bad_write_is_found_because_the_digest_is_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk, or a driver, that stores another byte than it was given."""
    plain = HashingWriter.write

    def write(self: HashingWriter, data: bytes | bytearray | memoryview) -> None:
        plain(self, data)
        if self.path.suffix == ".safetensors":
            self._file.seek(-1, 2)
            self._file.write(b"\xa5")

    with monkeypatch.context() as patched:
        patched.setattr(HashingWriter, "write", write)
        path = save(tmp_path, 1, *make())
    with pytest.raises(ArtifactError, match=r"safetensors` was altered"):
        checkpoint.load_checkpoint(path)


def test_whitespace_in_the_manifest_is_an_alteration_too(tmp_path: Path) -> None:
    path = save(tmp_path, 1, *make())
    manifest = path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"  ", b"\t", 1))
    with pytest.raises(ArtifactError, match=r"manifest\.json.*altered"):
        checkpoint.load_checkpoint(path)


def test_nothing_starts_over_in_silence(tmp_path: Path) -> None:
    assert checkpoint.find_resumable(tmp_path) is None
    path = save(tmp_path, 1, *make())
    (path / "trainer.json").unlink()
    with pytest.raises(ArtifactError, match="none of the 1 checkpoints"):
        checkpoint.find_resumable(tmp_path, report=lambda line: None)
    assert checkpoint.list_checkpoints(tmp_path) == []


# --- interruptions --------------------------------------------------------------------------------------------------


def test_an_exception_in_a_save_leaves_the_older_one(tmp_path: Path) -> None:
    model, optimizer = make()
    old = save(tmp_path, 1, model, optimizer)

    def fail(directory: Path) -> dict[str, str]:
        write_bytes(directory / "model.safetensors", b"half")
        raise OSError(28, "No space left on device")

    for step in (1, 2):
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, step, model, optimizer, write_model=fail)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [old.name]
    assert checkpoint.find_resumable(tmp_path) == old


_KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_checkpoint as t
from pretrain.files import write_bytes
model, optimizer = t.make()
def die(directory):
    write_bytes(directory / "model.safetensors", b"half")
    os._exit(9)
t.save(Path({directory!r}), {step}, model, optimizer, write_model=die)
"""


@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_in_a_save_leaves_the_older_one(tmp_path: Path, step: int) -> None:
    model, optimizer = make()
    old = save(tmp_path, 1, model, optimizer)
    code = _KILLED.format(tests=str(Path(__file__).parent), directory=str(tmp_path), step=step)
    root = str(Path(checkpoint.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 9
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert checkpoint.list_checkpoints(tmp_path) == [old]
    assert checkpoint.find_resumable(tmp_path) == old
    assert list((tmp_path / "checkpoints").iterdir()) == [old], "leftovers are removed"


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, 1, *make())
    path.rename(path.with_name(".tmp-old-step-00000001-0a1b2c3d"))
    (path.parent / ".tmp-step-00000001-ffffffff").mkdir()
    assert checkpoint.find_resumable(tmp_path) == path
    assert list(path.parent.iterdir()) == [path]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    model, optimizer = make()
    save(tmp_path, 1, model, optimizer)
    train(model, optimizer, 1)
    path = save(tmp_path, 1, model, optimizer)
    assert checkpoint.load_checkpoint(path).optimizer.tensors
    assert list(path.parent.iterdir()) == [path]


def test_a_writer_must_account_for_every_file(tmp_path: Path) -> None:
    model, optimizer = make()

    def forgetful(directory: Path) -> dict[str, str]:
        write_bytes(directory / "extra.txt", b"x")
        return {}

    with pytest.raises(ArtifactError, match=r"no digest for `model/extra\.txt`"):
        save(tmp_path, 1, model, optimizer, write_model=forgetful)


# --- order, pointers, rotation --------------------------------------------------------------------------------------


def test_order_is_by_step_never_by_clock(tmp_path: Path) -> None:
    model, optimizer = make()
    paths = [save(tmp_path, step, model, optimizer) for step in (5, 20, 100_000_000, 9)]
    for age, path in enumerate(paths):
        os.utime(path, (10_000 - age, 10_000 - age))
    assert checkpoint.list_checkpoints(tmp_path) == [paths[0], paths[3], paths[1], paths[2]]
    assert checkpoint.find_resumable(tmp_path) == paths[2]


def test_another_runs_checkpoints_are_passed_over_and_kept(tmp_path: Path) -> None:
    model, optimizer = make()
    foreign = save(tmp_path, 90, model, optimizer, run_id="run-b")
    own = [save(tmp_path, step, model, optimizer) for step in (10, 20, 30)]
    with pytest.raises(ArtifactError, match=r"runs run-a, run-b, and no pointer"):
        checkpoint.find_resumable(tmp_path, report=lambda line: None)
    checkpoint.point(tmp_path, "latest", 30)
    assert checkpoint.newest_config(tmp_path) == {"name": "toy"}
    lines: list[str] = []
    assert checkpoint.find_resumable(tmp_path, report=lines.append) == own[2]
    assert len(lines) == 1
    assert "run-b" in lines[0]
    assert checkpoint.rotate(tmp_path, keep=1) == own[:2]
    assert checkpoint.list_checkpoints(tmp_path) == [own[2], foreign]
    assert checkpoint.list_checkpoints(tmp_path, run_id="run-b") == [foreign]


def test_rotation_spares_what_is_pointed_at(tmp_path: Path) -> None:
    model, optimizer = make()
    paths = [save(tmp_path, step, model, optimizer) for step in (1, 2, 3, 4, 5)]
    assert checkpoint.rotate(tmp_path, keep=1) == [], "without a latest, nothing goes"
    checkpoint.point(tmp_path, "latest", 5)
    checkpoint.point(tmp_path, "best", 2)
    assert checkpoint.rotate(tmp_path, keep=2) == [paths[0], paths[2]]
    assert checkpoint.list_checkpoints(tmp_path) == [paths[1], paths[3], paths[4]]
    assert checkpoint.read_pointer(tmp_path, "best") == paths[1]
    assert checkpoint.rotate(tmp_path, keep=2) == []
    (paths[4] / "trainer.json").unlink()
    assert checkpoint.rotate(tmp_path, keep=1) == [], "the latest is not whole"


def test_another_runs_checkpoint_in_the_way_is_moved_aside(tmp_path: Path) -> None:
    model, optimizer = make()
    foreign = save(tmp_path, 1, model, optimizer, run_id="run-b")
    before = contents(foreign)
    aside = checkpoint.move_foreign_aside(tmp_path, 1, "run-a")
    assert aside is not None
    assert (contents(aside), foreign.exists()) == (before, False)
    save(tmp_path, 1, model, optimizer)
    assert checkpoint.move_foreign_aside(tmp_path, 1, "run-a") is None
    assert checkpoint.move_foreign_aside(tmp_path, 2, "run-a") is None


def test_rotation_does_not_count_what_lies_beyond_the_latest(tmp_path: Path) -> None:
    """A checkpoint that was passed over as damaged, say: it must not push a good one out."""
    model, optimizer = make()
    paths = [save(tmp_path, step, model, optimizer) for step in (1, 2, 3, 9)]
    checkpoint.point(tmp_path, "latest", 3)
    assert checkpoint.rotate(tmp_path, keep=2) == [paths[0]]
    assert checkpoint.list_checkpoints(tmp_path) == paths[1:]


def test_making_room_keeps_the_newest_and_the_best_and_nothing_without_a_whole_one(tmp_path: Path) -> None:
    model, optimizer = make()
    paths = [save(tmp_path, step, model, optimizer) for step in (1, 2, 3, 4)]
    checkpoint.point(tmp_path, "best", 2)
    weights = paths[3] / "model" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(bytes(len(good)))
    with pytest.raises(ArtifactError, match="altered"):
        checkpoint.make_room(tmp_path, run_id="run-a")
    assert checkpoint.list_checkpoints(tmp_path) == paths
    weights.write_bytes(good)
    assert checkpoint.make_room(tmp_path, run_id="run-a") == [paths[0], paths[2]]
    assert checkpoint.list_checkpoints(tmp_path) == [paths[1], paths[3]]


def test_making_room_relies_on_the_latest_and_spares_the_best_of_the_run(tmp_path: Path) -> None:
    """What lies beyond the latest was passed over as damaged; a pointer to the best one may not have been moved."""
    model, optimizer = make()
    paths = [save(tmp_path, step, model, optimizer) for step in (1, 2, 3, 4, 9)]
    checkpoint.point(tmp_path, "latest", 4)
    checkpoint.point(tmp_path, "best", 1)
    (paths[4] / "model" / "model.safetensors").write_bytes(b"rot")
    assert checkpoint.make_room(tmp_path, run_id="run-a", best=2) == [paths[2]]
    assert checkpoint.list_checkpoints(tmp_path) == [paths[0], paths[1], paths[3], paths[4]]


def test_a_pointer_to_another_folder_is_none(tmp_path: Path) -> None:
    model, optimizer = make()
    save(tmp_path / "other", 1, model, optimizer)
    save(tmp_path / "here", 1, model, optimizer)
    pointer = {"checkpoint": "../../other/checkpoints/step-00000001", "step": 1, "run_id": "run-a"}
    (tmp_path / "here" / "checkpoints" / "latest.json").write_bytes(checkpoint.pointer_bytes(pointer))
    assert checkpoint.read_pointer(tmp_path / "here", "latest") is None


def test_pointers(tmp_path: Path) -> None:
    assert checkpoint.read_pointer(tmp_path, "latest") is None
    with pytest.raises(ArtifactError):
        checkpoint.point(tmp_path, "latest", 1)
    path = save(tmp_path, 1, *make())
    checkpoint.point(tmp_path, "latest", 1)
    assert checkpoint.read_pointer(tmp_path, "latest") == path
    pointer = path.parent / "latest.json"
    for text in (json.dumps({"checkpoint": "../../elsewhere"}), "{", "", "[]"):
        pointer.write_text(text)
        with pytest.raises(ArtifactError, match=r"latest\.json"):
            checkpoint.read_pointer(tmp_path, "latest")
    lines: list[str] = []
    assert checkpoint.find_resumable(tmp_path, report=lines.append) == path
    assert len(lines) == 1
