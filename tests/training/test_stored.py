"""Checkpoints in a store: the marker last, kills between any two requests, going on elsewhere, other verbs."""

from __future__ import annotations

import io
import json
import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_checkpoint as toy
from rich.console import Console
from test_saving import saver_of, small_run, train

from pretrain import stores
from pretrain import train as verb
from pretrain.config import RunConfig
from pretrain.export import export_model, model_directory
from pretrain.files import ArtifactError, manifest_bytes, read_manifest
from pretrain.ranks import Ranks
from pretrain.run import run
from pretrain.stores import Store, StoreError
from pretrain.training import checkpoint, saving
from pretrain.training.checkpoint_files import Content
from pretrain.training.saving import NotSavedError
from pretrain.training.stored import Folder, Stored, stored_model

ALONE = Ranks.alone()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.0)


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}"


class Killed(BaseException):
    """Ends everything, as a kill would."""


def die_at(patched: pytest.MonkeyPatch, number: int) -> None:
    """Let the `number`th change to any store from now on be the end."""
    seen = 0

    def counted(plain: Any) -> Any:
        def change(self: Store, *arguments: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == number:
                raise Killed
            plain(self, *arguments)

        return change

    for change in ("put", "put_bytes", "delete"):
        patched.setattr(Store, change, counted(getattr(Store, change)))


# --- one checkpoint after another -----------------------------------------------------------------------------------


def place(url: str, directory: Path) -> Stored:
    return Stored(Store.at(url).below("toy"), directory, url)


def content(step: int, model: Any, optimizer: Any, run_id: str = "run-a") -> Content:
    state = checkpoint.optimizer_state_by_name(model, optimizer)
    written: dict[str, Any] = {"config": {"name": "toy"}}
    return Content(step, run_id, toy.writer(model), state, written, [checkpoint.capture_rng()])


def save(stored: Stored, step: int, model: Any, optimizer: Any, *, best: bool = False, keep: int = 2) -> None:
    made = content(step, model, optimizer)
    stored.write(made, ALONE, print)
    stored.settle(made, best=step if best else None, keep=keep)


def folders(stored: Stored) -> list[Folder]:
    """All that hold anything of a checkpoint, in order."""
    return sorted({folder for name in stored.store.list() if (folder := Folder.of(name))})


def test_the_newest_with_a_marker_is_fetched_and_old_ones_go(tmp_path: Path, url: str) -> None:
    model, optimizer = toy.make()
    stored = place(url, tmp_path / "here")
    assert stored.find(ALONE, print) is None
    for step in (1, 2, 3, 4):
        toy.train(model, optimizer, 1)
        save(stored, step, model, optimizer, best=step == 1)
    assert stored.steps() == [1, 3, 4], "two to keep, and the best one"
    assert stored.steps("another run") == []
    assert not list((tmp_path / "here").glob(".tmp-*"))
    found = place(url, tmp_path / "elsewhere").find(ALONE, print)
    assert found is not None
    loaded = checkpoint.load_checkpoint(found)
    assert (loaded.step, found.name) == (4, "step-00000004")
    other, other_optimizer = toy.make(seed=9)
    checkpoint.load_optimizer_state_by_name(other, other_optimizer, loaded.optimizer)
    stored.done(found)
    assert not found.exists()
    local = toy.save(tmp_path / "local", 4, model, optimizer)
    names = {name.partition("/")[2] for name in stored.store.list() if name.startswith("step-00000004")}
    assert names == set(toy.contents(local)), "the same files as on a disk"


def test_a_kill_between_any_two_requests_leaves_the_older_checkpoint(tmp_path: Path, url: str) -> None:
    model, optimizer = toy.make()
    stored = place(url, tmp_path)
    toy.train(model, optimizer, 1)
    save(stored, 1, model, optimizer)
    toy.train(model, optimizer, 1)
    save(stored, 2, model, optimizer)
    names = stored.store.list()
    kept = {name: stored.store.read(name) for name in names}
    toy.train(model, optimizer, 1)
    outcomes: list[str] = []
    for number in range(1, 100):
        for name in stored.store.list():
            stored.store.delete(name)
        for name, data in kept.items():
            assert data is not None
            stored.store.put_bytes(name, data)
        with pytest.MonkeyPatch.context() as patched:
            die_at(patched, number)
            try:
                save(stored, 3, model, optimizer)
                ended = True
            except Killed:
                ended = False
        found = place(url, tmp_path / "elsewhere").find(ALONE, print)
        assert found is not None
        outcomes.append(found.name)
        assert checkpoint.load_checkpoint(found).step in (2, 3)
        save(stored, 3, model, optimizer)  # what the same command does next
        assert stored.steps() == [2, 3]
        assert [folder.step for folder in folders(stored)] == [2, 3], "one of each step"
        if ended:
            break
    assert len(outcomes) > 8
    assert outcomes == sorted(outcomes), "the older one until the marker is there, the newer one from then on"
    assert {outcomes[0], outcomes[-1]} == {"step-00000002", "step-00000003"}


def test_a_step_that_is_saved_again_is_never_gone(tmp_path: Path, url: str) -> None:
    """With its scores, say, that a stop had left out: one to keep, and a kill between any two requests."""
    model, optimizer = toy.make()
    stored = place(url, tmp_path)
    save(stored, 3, model, optimizer, best=True, keep=1)
    kept = {name: stored.store.read(name) for name in stored.store.list()}
    toy.train(model, optimizer, 1)
    digests = []
    for number in range(1, 100):
        for name in stored.store.list():
            stored.store.delete(name)
        for name, data in kept.items():
            assert data is not None
            stored.store.put_bytes(name, data)
        with pytest.MonkeyPatch.context() as patched:
            die_at(patched, number)
            try:
                save(stored, 3, model, optimizer, best=True, keep=1)
                ended = True
            except Killed:
                ended = False
        found = place(url, tmp_path / "elsewhere").find(ALONE, print)
        assert found is not None, number
        assert found.name == "step-00000003"
        digests.append(checkpoint.load_checkpoint(found).manifest.digest)
        save(stored, 3, model, optimizer, best=True, keep=1)  # what the same command does next
        (whole,) = folders(stored)
        assert stored._pointer("latest")["checkpoint"] == stored._pointer("best")["checkpoint"] == whole.name
        if ended:
            break
    assert len(digests) > 8
    assert len(set(digests)) == 2, "the old one until the new one is whole"
    assert digests == sorted(digests, key=digests.index), "and from then on the new one"
    for step in (None, "step-00000003"):
        copied = place(url, tmp_path / "model").model(step)
        assert copied is not None
        assert copied.name == "step-00000003", "on a disk it has the name of any other"
    assert stored.model("step-00000004") is stored.model("../x") is None


def test_a_save_that_fails_leaves_the_one_of_the_same_step(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = toy.make()
    stored = place(url, tmp_path)
    save(stored, 3, model, optimizer, keep=1)

    def down(*arguments: Any) -> None:
        raise StoreError("the store is down")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "put", down)
        with pytest.raises(StoreError):
            save(stored, 3, model, optimizer, keep=1)
    assert stored.steps() == [3]
    assert stored.find(ALONE, print) is not None


def test_another_runs_checkpoint_of_the_same_step_stays(tmp_path: Path, url: str) -> None:
    model, optimizer = toy.make()
    stored, said = place(url, tmp_path), []
    stored.write(content(3, model, optimizer, "run-b"), ALONE, print)
    toy.train(model, optimizer, 1)
    for _ in range(2):
        made = content(3, model, optimizer)
        stored.write(made, ALONE, said.append)
        stored.settle(made, best=3, keep=1)
    assert "another run's checkpoint of step 3 lies in" in said[0]
    assert (stored.steps("run-a"), stored.steps("run-b")) == ([3], [3])
    assert [folder.name for folder in folders(stored)] == ["step-00000003", "step-00000003.3"]
    found = stored.find(ALONE, said.append)
    assert found is not None
    assert checkpoint.load_checkpoint(found).run_id == "run-a"
    stored.store.delete("best.json")
    stored.repair({"latest": 3, "best": 3}, "run-a", print)
    assert stored._pointer("best")["checkpoint"] == "step-00000003.3"


def test_names_that_lead_out_of_the_copy_are_refused(tmp_path: Path) -> None:
    """Who can write a store must not be able to write beside it, here."""
    model, optimizer = toy.make()
    stored = place(f"file://{tmp_path}/store", tmp_path / "here" / "train")
    save(stored, 1, model, optimizer)
    (tmp_path / "store" / "toy" / "x").write_text("theirs")
    step = tmp_path / "store" / "toy" / "step-00000001"
    manifest = read_manifest(step, "checkpoint")
    evil = replace(manifest, files=manifest.files | {"../x": "0" * 64, "model/../../x": "0" * 64})
    (step / "manifest.json").write_bytes(manifest_bytes(evil))
    with pytest.raises(ArtifactError, match="no checkpoint that can be used"):
        stored.find(ALONE, print)
    with pytest.raises(ArtifactError, match="names no file below"):
        stored.model()
    pointer = {"checkpoint": "../../../precious", "step": 1, "run_id": "run-a"}
    stored.store.put_bytes("latest.json", checkpoint.pointer_bytes(pointer))
    assert stored.model() is None
    assert [path for path in tmp_path.rglob("x") if path.parent.name != "toy"] == []


def test_newer_checkpoints_of_another_run_are_not_gone_on_from(tmp_path: Path, url: str) -> None:
    model, optimizer = toy.make()
    stored = place(url, tmp_path)
    save(stored, 2, model, optimizer)
    toy.save(tmp_path, 9, model, optimizer, run_id="run-b")
    with pytest.raises(ArtifactError, match=r"another run than .* holds those of run run-a; give another name="):
        stored.find(ALONE, print)
    toy.save(tmp_path, 1, model, optimizer)
    found = stored.find(ALONE, print)
    assert found is not None
    assert found.name == "step-00000002"


def test_a_store_that_does_not_answer_is_not_an_empty_one(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stored_run(tmp_path, url)
    (config.directory / "train").mkdir(exist_ok=True)
    before = toy.contents(config.directory)

    def down(self: Store) -> list[str]:
        raise StoreError("`memory://` could not be listed: 503")

    monkeypatch.setattr(Store, "list", down)
    with pytest.raises(StoreError, match="could not be listed"):
        run(config, fresh=True)
    assert toy.contents(config.directory) == before, "nothing was archived"
    with pytest.raises(StoreError, match="could not be listed"):
        verb.train(config, resume="never")
    monkeypatch.setattr(Stored, "write", lambda self, *arguments: self.store.list())
    monkeypatch.setattr(saving, "PATIENCE_SECONDS", 0.0)
    saver, said = saver_of(tmp_path / "saver", checkpoint={"to": url})
    assert saver._try(saving._Save(content(4, *toy.make()), None, last=False)) is None
    assert "which one is the newest cannot be told" in said.getvalue()
    with pytest.raises(NotSavedError, match="goes on from the newest checkpoint there"):
        saver._try(saving._Save(content(4, *toy.make()), None, last=True))


def test_what_is_damaged_in_the_store_is_passed_over(tmp_path: Path, url: str) -> None:
    model, optimizer = toy.make()
    stored, said = place(url, tmp_path), []
    for step in (1, 2, 3):
        toy.train(model, optimizer, 1)
        save(stored, step, model, optimizer, keep=9)
    stored.store.put_bytes("step-00000003/model/model.safetensors", b"rot")
    stored.store.delete("step-00000002/trainer.json")
    found = stored.find(ALONE, said.append)
    assert found is not None
    assert found.name == "step-00000001"
    assert [line.split()[1] for line in said] == ["step-00000003", "step-00000002"]
    stored.store.put_bytes("step-00000001/manifest.json", b"{")
    with pytest.raises(ArtifactError, match="no checkpoint that can be used"):
        stored.find(ALONE, said.append)


def test_another_runs_checkpoints_are_passed_over(tmp_path: Path, url: str) -> None:
    model, optimizer = toy.make()
    toy.train(model, optimizer, 1)
    stored = place(url, tmp_path)
    stored.write(content(9, model, optimizer, "run-b"), ALONE, print)
    save(stored, 2, model, optimizer)
    found = stored.find(ALONE, lambda line: None)
    assert found is not None
    assert found.name == "step-00000002"
    assert stored.steps("run-b") == [9], "and stay where they are"


# --- runs -----------------------------------------------------------------------------------------------------------


def stored_run(out: Path, url: str, **sections: Any) -> RunConfig:
    return small_run(out, **{**sections, "checkpoint": {"to": url} | sections.get("checkpoint", {})})


def test_a_run_goes_on_from_the_store_on_another_machine(tmp_path: Path, url: str) -> None:
    expected, _ = train(small_run(tmp_path / "oracle"))
    config = stored_run(tmp_path / "a", url)
    losses, said = train(config)
    assert losses == expected
    train_directory = config.directory / "train"
    assert not (train_directory / "checkpoints").exists(), "logs and records alone"
    assert not list(train_directory.glob(".tmp-*"))
    store = Store.at(url).below(config.name)
    for name in [name for name in store.list() if name.startswith("step-00000006")]:
        store.delete(name)  # so that it goes on from step 4
    elsewhere = stored_run(tmp_path / "b", url)
    losses, said = train(elsewhere)
    assert f"going on from step 4 of 6 ({url}/{config.name}/step-00000004)" in said
    assert losses[4:] == expected[4:]
    _, said = train(elsewhere)
    assert "finished already" in said


def test_a_store_that_fails_costs_a_save_and_the_last_one_is_an_error(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "PATIENCE_SECONDS", 0.0)
    plain, broken = Store.put, ["step-00000004"]

    def put(self: Store, name: str, path: Path) -> None:
        if name.startswith(tuple(broken)):
            raise StoreError("`memory` could not be written: reset by peer")
        plain(self, name, path)

    monkeypatch.setattr(Store, "put", put)
    config = stored_run(tmp_path / "a", url)
    _, said = train(config)
    assert "the checkpoint of step 4 was not saved: `memory` could not be written" in said
    store = Store.at(url).below(config.name)
    assert not [name for name in store.list() if name.startswith("step-00000004")], "what was left of it is gone"
    for name in store.list():
        store.delete(name)
    broken.append("step-00000006")
    shutil.rmtree(config.directory / "train")
    with pytest.raises(NotSavedError, match="Steps 3 to 6 are lost"):
        train(config)


def test_going_on_from_a_store_does_not_say_that_nothing_was_saved(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stored_run(tmp_path, url)
    directory = config.directory / "train"
    directory.mkdir()
    (directory / "config.yaml").write_text("")

    def build(*arguments: Any, **keywords: Any) -> None:
        raise Killed

    monkeypatch.setattr(verb, "build_trainer", build)
    for record, said_so in ((None, True), ({"to": url, "run": f"{url}/synthetic", "step": 4}, False)):
        if record is not None:
            (directory / "store.json").write_text(json.dumps(record))
        said = io.StringIO()
        with pytest.raises(Killed):
            verb.train(config, console=Console(file=said, width=10_000))
        assert ("ended before it saved anything" in said.getvalue()) == said_so


def test_moving_into_a_store_goes_on_from_the_disk(tmp_path: Path, url: str) -> None:
    local = small_run(tmp_path)
    train(local)
    shutil.rmtree(local.directory / "train" / "checkpoints" / "step-00000006")
    raw = local.model_copy(update={"checkpoint": local.checkpoint.model_copy(update={"to": url})})
    _, said = train(raw)
    assert "the run goes on from there" in said
    assert "going on from step 4" in said
    assert Stored(Store.at(url).below(raw.name), tmp_path, url).steps() == [6]


def test_a_run_never_starts_over_where_another_place_has_its_checkpoints(tmp_path: Path, url: str) -> None:
    config = stored_run(tmp_path, url)
    train(config)

    def into(to: str | None) -> RunConfig:
        return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"to": to})})

    for place in (None, f"memory://{uuid.uuid4().hex}"):
        with pytest.raises(ArtifactError, match=rf"lie in {url}/synthetic; give checkpoint\.to={url} again"):
            train(into(place))
    with pytest.raises(ValueError, match=rf"--fresh.* lie in {url}/synthetic"):
        run(config, fresh=True)
    checkpoints = config.directory / "train" / "checkpoints"
    Store.at(url).filesystem.get(f"{Store.at(url).root}/synthetic/", str(checkpoints), recursive=True)
    (config.directory / "train" / "store.json").unlink()
    _, said = train(into(None))
    assert "finished already" in said


def test_a_store_is_probed_before_step_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = stored_run(tmp_path, f"file://{tmp_path}/file")
    with pytest.raises(ValueError, match=r"checkpoint\.to.*cannot be used"):
        train(config)
    assert not (config.directory / "train" / "metrics.jsonl").exists()


def test_export_fetches_the_model(tmp_path: Path, url: str) -> None:
    config = stored_run(tmp_path, url)
    train(config)
    assert export_model(config.directory, tmp_path / "out").difference <= 1e-5
    copied = stored_model(config.directory / "train")
    assert copied is not None
    assert not (copied / "optimizer").exists()
    again = model_directory(config.directory)
    assert again == copied / "model"
    assert json.loads((config.directory / "train" / "store.json").read_text())["to"] == url
    store = Store.at(url).below(config.name)
    store.put_bytes("step-00000006/model/model.safetensors", b"rot")
    shutil.rmtree(copied)
    with pytest.raises(ArtifactError, match="altered"):
        model_directory(config.directory)
