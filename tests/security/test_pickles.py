"""No pickle is ever loaded: a payload in every kind of file that is opened makes no marker, and nothing unpickles."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pretrain.building import build_model
from pretrain.config import load_config
from pretrain.data.packing import read_plan
from pretrain.data.preparing.unfinished import load_array
from pretrain.data.reading.documents import load_hub, read_documents
from pretrain.data.reading.sources import resolve_sources
from pretrain.data.reading.token_files import token_ranges
from pretrain.evaluation.loading import load_model
from pretrain.export import export_model
from pretrain.files import read_manifest, sha256_file, write_manifest
from pretrain.model_reading import read_loom, read_stock
from pretrain.published_store import PublishedStore
from pretrain.stores import Store
from pretrain.tokenizer import take_tokenizer
from pretrain.training import checkpoint
from pretrain.training.checkpoint_files import load_checkpoint
from pretrain.training.engines.zero_config import read_user_settings
from pretrain.training.records import newest_state, newest_stored
from tests.security.conftest import Made
from tests.security.hostile import Bomb, Marker, change

REFUSED = (ValueError, OSError, KeyError, TypeError, SafetensorError)


@pytest.fixture(autouse=True)
def unpicklers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which unpicklers were asked for a file's bytes, safe ones too."""
    asked: list[str] = []

    def forbid(module: Any, name: str) -> None:
        def refuse(*_: Any, **__: Any) -> Any:
            asked.append(f"{module.__name__}.{name}")
            raise AssertionError(asked[-1])

        monkeypatch.setattr(module, name, refuse)

    for name in ("load", "loads", "Unpickler"):
        forbid(pickle, name)
    forbid(torch, "load")
    return asked


def test_the_payload_works(marker: Marker, monkeypatch: pytest.MonkeyPatch) -> None:
    data = marker.pickled
    monkeypatch.undo()
    pickle.loads(data)
    assert marker.made()
    assert not marker.made()


# --- model directories ----------------------------------------------------------------------------------------------


def _index(directory: Path, name: str) -> None:
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _plant(directory: Path, way: str, payload: bytes) -> None:
    """Put the payload where a reader of model directories could open it."""
    if way in ("a shard of the index", "a shard outside"):
        place = directory / "evil.bin" if way == "a shard of the index" else directory.parent / "evil.bin"
        place.write_bytes(payload)
        _index(directory, place.name if place.parent == directory else f"../{place.name}")
    elif way == "transformers_weights":
        (directory / "adapter_model.bin").write_bytes(payload)
        change(directory, "config.json", transformers_weights="adapter_model.bin")
    elif way == "an adapter":
        (directory / "adapter_model.bin").write_bytes(payload)
        entries = {"peft_type": "LORA", "r": 1, "target_modules": ["c_attn"], "base_model_name_or_path": "gpt2"}
        change(directory, "adapter_config.json", **entries)
    elif way == "old weights alone":
        (directory / "model.safetensors").unlink()
        (directory / "pytorch_model.bin").write_bytes(payload)
    elif way == "an old index alone":
        (directory / "model.safetensors").unlink()
        (directory / "pytorch_model.bin").write_bytes(payload)
        index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "pytorch_model.bin"}}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    elif way == "files of other programs":
        for name in ("pytorch_model.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt", "scaler.pt", ".metadata"):
            (directory / name).write_bytes(payload)
        for name in ("training_args.bin", "model.ckpt", "adapter_model.bin", "vocab.pkl", "__0_0.distcp", "a.npy"):
            (directory / name).write_bytes(payload)
        (directory / "global_step1").mkdir()
        (directory / "global_step1" / "mp_rank_00_model_states.pt").write_bytes(payload)
    elif way == "the tokenizer's other files":
        for name in ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "tokenizer.pkl"):
            (directory / name).write_bytes(payload)
    else:
        (directory / way).write_bytes(payload)


WAYS = ["a shard of the index", "a shard outside", "transformers_weights", "an adapter", "old weights alone"]
WAYS += ["an old index alone", "files of other programs", "the tokenizer's other files"]
WAYS += ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


def readers(directory: Path, out: Path) -> dict[str, Callable[[], object]]:
    """Whatever opens a model directory."""
    (out / "tokenizer").mkdir(parents=True)
    return {
        "evaluate, generate, fill, attention": lambda: load_model(directory, device="cpu"),
        "model.from": lambda: read_loom(directory),
        "model.from, class: stock; resume": lambda: read_stock(directory),
        "tokenizer.from": lambda: take_tokenizer(str(directory), out / "tokenizer", objective="causal"),
        "export": lambda: export_model(directory, out / "export"),
    }


@pytest.mark.parametrize("way", WAYS)
def test_no_reader_of_a_model_unpickles(way: str, model: Path, tmp_path: Path, marker: Marker, unpicklers) -> None:
    _plant(model, way, marker.pickled)
    said = []
    for name, read in readers(model, tmp_path / "out").items():
        try:
            read()
        except REFUSED as error:
            said.append(f"{name}: {error}")
        assert not unpicklers, f"{name}, {way}"
        assert not marker.made(), f"{name}, {way}"
    if way in WAYS[:6]:
        assert len(said) >= 4, "weights that are no safetensors are refused, not passed over"
    if way == "files of other programs":
        assert not said, "what is not opened does no harm"


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(made: Made, tmp_path: Path) -> Path:
    """A copy of a run's training directory."""
    return Path(shutil.copytree(made.config.directory / "train", tmp_path / "train"))


def _newest(directory: Path) -> Path:
    return max((directory / "checkpoints").glob("step-*"))


def _sign(step: Path) -> None:
    """Whoever can write a checkpoint can write its digests."""
    manifest = read_manifest(step, checkpoint.KIND)
    files = {name: sha256_file(step / name) for name in manifest.files}
    (step / "manifest.json").unlink()
    facts = {"config": manifest.config, "inputs": manifest.inputs, "files": files, "facts": manifest.facts}
    write_manifest(step, kind=checkpoint.KIND, **facts)


def test_no_file_of_a_checkpoint_is_unpickled(made: Made, saved: Path, marker: Marker, unpicklers) -> None:
    step = _newest(saved)
    files = sorted(path.relative_to(step) for path in step.rglob("*") if path.is_file())
    assert {"trainer.json", "manifest.json", "model", "optimizer"} <= {path.parts[0] for path in files}
    model = build_model(made.config)
    for file in files:
        whole = (step / file).read_bytes()
        (step / file).write_bytes(marker.pickled)
        if file.name != "manifest.json":
            _sign(step)
        for read in (
            lambda: load_checkpoint(step),
            lambda: load_checkpoint(step, verify=False),
            lambda: dict(PublishedStore().read(model, step / "model")),
            lambda: newest_state(saved),
        ):
            with suppress(*REFUSED):
                read()
            assert not unpicklers, file
            assert not marker.made(), file
        (step / file).write_bytes(whole)
        _sign(step)
    load_checkpoint(step)


def test_records_pointers_and_what_others_leave_in_a_checkpoint(saved: Path, marker: Marker, unpicklers) -> None:
    step = _newest(saved)
    for name in ("rng_state_0.pth", "scaler.pt", "random_states_0.pkl", "model/pytorch_model.bin", "optimizer/o.bin"):
        (step / name).write_bytes(marker.pickled)
    load_checkpoint(step)
    for name in ("latest", "best"):
        (saved / "checkpoints" / f"{name}.json").write_bytes(marker.pickled)
        with pytest.raises(ValueError, match="altered"):
            checkpoint.read_pointer(saved, name)
    for name in ("store.json", "budget.json", "result.json"):
        (saved / name).write_bytes(marker.pickled)
    assert newest_stored(saved) is None
    assert not unpicklers
    assert not marker.made()


def test_files_of_a_store_are_bytes(tmp_path: Path, marker: Marker, unpicklers) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "latest.json").write_bytes(marker.pickled)
    store = Store.at((tmp_path / "store").as_uri())
    assert store.read("latest.json") == marker.pickled
    store.get("latest.json", tmp_path / "here" / "latest.json")
    assert not unpicklers
    assert not marker.made()


# --- data -----------------------------------------------------------------------------------------------------------


def test_arrays_of_objects_are_refused(made: Made, tmp_path: Path, marker: Marker, unpicklers) -> None:
    objects = io.BytesIO()
    np.save(objects, np.array([Bomb(marker.path)], dtype=object), allow_pickle=True)
    (plan,) = (path.parent for path in made.config.directory.glob("data/train/*/rows.npy"))
    for name in ("rows.npy", "pieces.npy"):
        for payload in (objects.getvalue(), marker.pickled):
            copy = shutil.copytree(plan, tmp_path / "plan", dirs_exist_ok=True)
            (copy / name).write_bytes(payload)
            with pytest.raises(ValueError, match=r"(?i)pickle|object|magic|cannot"):
                read_plan(copy, spec=None)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=r"(?i)pickle|object|magic|cannot"):
                load_array(copy / name)
    archive = io.BytesIO()
    np.savez(archive, allow_pickle=True, a=np.array([Bomb(marker.path)], dtype=object))
    (tmp_path / "a.npy").write_bytes(archive.getvalue())
    with pytest.raises((ValueError, AttributeError)):
        load_array(tmp_path / "a.npy")
    assert not unpicklers
    assert not marker.made()


def test_token_files_of_others_are_numbers(tmp_path: Path, marker: Marker, unpicklers) -> None:
    for name, beside in (("a.bin", "a.idx"), ("b.bin", None), ("c.ds", "c.ds.index"), ("d.ds", "d.ds.metadata")):
        (tmp_path / name).write_bytes(marker.pickled)
        if beside is not None:
            (tmp_path / beside).write_bytes(marker.pickled)
        with suppress(*REFUSED):
            for file in resolve_sources([str(tmp_path / name)]):
                token_ranges(file, 1_000_000)
    assert not unpicklers
    assert not marker.made()


def test_text_files_and_tables_are_text(tmp_path: Path, marker: Marker, unpicklers) -> None:
    field = pyarrow.field(
        "text",
        pyarrow.binary(),
        metadata={
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": marker.pickled,
        },
    )
    table = pyarrow.table({"text": pyarrow.array([marker.pickled], pyarrow.binary())}, schema=pyarrow.schema([field]))
    pyarrow.parquet.write_table(table, tmp_path / "typed.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a text"]}), tmp_path / "plain.parquet")
    for name in ("a.txt", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.txt.gz", "a.jsonl.zst", "a.txt.xz"):
        (tmp_path / name).write_bytes(marker.pickled)
    (tmp_path / "b.jsonl").write_text('{"text": "a", "py/object/apply": "os.system", "__reduce__": ["x"]}\n')
    for path in sorted(tmp_path.glob("?*.*")):
        with suppress(*REFUSED):
            for file in resolve_sources([str(path)]):
                list(read_documents(file))
        assert not marker.made(), path
    assert not unpicklers


def test_configurations_are_plain_data(tmp_path: Path, marker: Marker, unpicklers) -> None:
    for tag in ("!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"):
        (tmp_path / "run.yaml").write_text(f"name: {tag} [{marker.path}]\n")
        with pytest.raises(ValueError, match=r"run\.yaml"):
            load_config(tmp_path / "run.yaml")
        with pytest.raises(ValueError, match="name"):
            load_config("quickstart-gpt", [f"name={tag} [{marker.path}]"])
    (tmp_path / "run.yaml").write_bytes(marker.pickled)
    with pytest.raises(ValueError, match=r"run\.yaml"):
        load_config(tmp_path / "run.yaml")
    (tmp_path / "deepspeed.json").write_bytes(marker.pickled)
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_user_settings(str(tmp_path / "deepspeed.json"), "train.deepspeed")
    assert not unpicklers
    assert not marker.made()


def test_datasets_run_no_script_and_no_pickle_in_an_archive(tmp_path: Path, marker: Marker, monkeypatch) -> None:
    """Through `datasets`, as `hub:NAME` is read; here from a directory, as a repository lies in the cache."""
    monkeypatch.undo()  # datasets hashes with dill of its own; the marker tells
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    scripted = tmp_path / "scripted"
    scripted.mkdir()
    (scripted / "scripted.py").write_text(marker.python)
    (scripted / "data.pkl").write_bytes(marker.pickled)
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "train.tar", "w") as archive:
        objects = io.BytesIO()
        np.save(objects, np.array([Bomb(marker.path)], dtype=object), allow_pickle=True)
        torches = io.BytesIO()
        torch.save({"a": Bomb(marker.path)}, torches)
        contents = {"0.npy": objects.getvalue(), "0.pth": torches.getvalue(), "0.pkl": marker.pickled}
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    monkeypatch.chdir(tmp_path.parent)
    for place in (scripted, packed):
        (file,) = resolve_sources([f"hub:{tmp_path.name}/{place.name}"])
        for how in ({}, {"streaming": True}):
            with pytest.raises((*REFUSED, RuntimeError, pickle.UnpicklingError)):
                list(load_hub(file.path, file.name, **how))
            assert not marker.made(), place


def test_weights_with_a_payload_in_their_header_are_data(tmp_path: Path, model: Path, marker: Marker) -> None:
    weights = load_file(model / "model.safetensors")
    save_file(weights, model / "model.safetensors", {"format": "pt", "__reduce__": repr(marker.pickled)})
    load_model(model, device="cpu")
    assert not marker.made()
