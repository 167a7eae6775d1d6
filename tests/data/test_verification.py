"""What a run would train on is compared with what was prepared: every injury is found, and named with both digests."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from data_builders import run_config, write_tokenizer

from pretrain.data.loader import DataPlane
from pretrain.data.shards import ShardWriter
from pretrain.data.verification import bytes_to_verify, verify_data, verify_inputs, verify_run, verify_tokenizer
from pretrain.files import ArtifactError, read_manifest, sha256_file, write_manifest
from pretrain.prepare import prepare_data
from pretrain.train import train


def write_text(folder: Path) -> list[dict]:
    for name in ("one", "two"):
        rows = [json.dumps({"text": f"{name} document {number} " + "fox " * (number % 9)}) for number in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return [{"name": name, "files": [str(folder / f"{name}.jsonl")]} for name in ("one", "two")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    config = run_config(folder, train=write_text(folder), validation={"fraction": 0.2}, workers=1)
    write_tokenizer(config.directory / "tokenizer", "gpt2", "one document two fox 0123456789")
    prepare_data(config)
    DataPlane.from_config(config)
    return config


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run, to injure; its text lies beside it."""
    config = run_config(tmp_path, train=write_text(tmp_path), validation={"fraction": 0.2}, workers=1)
    shutil.copytree(made.directory / "tokenizer", config.directory / "tokenizer")
    prepare_data(config)
    DataPlane.from_config(config)
    return config


def test_whole_data_passes(run):
    told = []
    verify_data(run.directory / "data", full=True, told=told.append)
    verify_data(run.directory / "data", full=False)
    verify_run(run)
    manifests = sum(path.stat().st_size for path in (run.directory / "data").rglob("manifest.json"))
    assert sum(told) == bytes_to_verify(run.directory / "data") - manifests


def test_every_injury_of_any_file_is_found(made, tmp_path):
    directory = tmp_path / "data"
    shutil.copytree(made.directory / "data", directory)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
    assert {"manifest.json", "rows.npy", "pieces.npy", "part-00000.ds", "part-00000.ds.index"} <= {
        f.name for f in files
    }
    source = random.Random(0)
    for number in range(200):
        path = files[number % len(files)]
        whole = path.read_bytes()
        injured = injure(source, whole)
        path.write_bytes(injured)
        with pytest.raises(ArtifactError) as caught:
            verify_data(directory, full=True)
        assert str(path if path.parent.name[:7] != "packing" or path.name != "manifest.json" else path.parent) in str(
            caught.value
        )
        path.write_bytes(whole)
    verify_data(directory, full=True)


def injure(source: random.Random, data: bytes) -> bytes:
    """One bit flipped, a block zeroed, or the end cut off."""
    kind, at = source.choice(["flip", "zero", "cut"]), source.randrange(len(data))
    if kind == "cut":
        return data[:at]
    zeroed = data[:at] + bytes(len(data[at : at + 16])) + data[at + 16 :]
    if kind == "zero" and zeroed != data:
        return zeroed
    return data[:at] + bytes([data[at] ^ 1 << source.randrange(8)]) + data[at + 1 :]


def test_an_altered_shard_is_named_with_both_digests(run):
    path = run.directory / "data" / "train-one" / "part-00000.ds"
    was = sha256_file(path)
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    expected = f"`{path}` was altered: its SHA-256 is {sha256_file(path)}, and was {was}; prepare the data again"
    with pytest.raises(ArtifactError, match=re.escape(expected)):
        verify_data(run.directory / "data", full=True)
    verify_data(run.directory / "data", full=False)  # the size is as it was
    with pytest.raises(ArtifactError, match="was altered"):
        train(run)
    assert not (run.directory / "train").exists()
    path.write_bytes(data[:-2])
    with pytest.raises(ArtifactError, match="cut off or altered"):
        verify_data(run.directory / "data", full=False)
    path.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        verify_data(run.directory / "data", full=False)


@pytest.mark.parametrize("suffix", [".ds", ".ds.index"])
def test_swapped_shards_are_found(run, suffix):
    one, two = (run.directory / "data" / f"train-{name}" / f"part-00000{suffix}" for name in ("one", "two"))
    held = one.read_bytes()
    assert held != two.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(held)
    with pytest.raises(ArtifactError, match=r"train-one/part-00000\.ds.*\n.*train-two/part-00000\.ds"):
        verify_data(run.directory / "data", full=True)


def test_a_plan_under_another_name_is_found(run):
    (plan,) = (run.directory / "data" / "train-one").glob("packing-*")
    (other,) = (run.directory / "data" / "train-two").glob("packing-*")
    shutil.rmtree(plan)
    shutil.copytree(other, plan)
    with pytest.raises(ArtifactError, match="is the plan of other rows or shards; remove it"):
        verify_data(run.directory / "data", full=False)
    shutil.rmtree(plan)
    DataPlane.from_config(run)  # which makes it again
    verify_data(run.directory / "data", full=True)


def test_an_id_beyond_the_vocabulary_is_found_and_never_written(tmp_path):
    lengths = np.array([3], dtype=np.int64)
    with (
        pytest.raises(ValueError, match="id 9, beyond its vocabulary of 9"),
        ShardWriter(tmp_path / "train" / "part-00000", "train/part-00000", 9) as writer,
    ):
        writer.add(np.array([1, 9, 2], dtype=np.uint32), lengths, 3)
    with ShardWriter(tmp_path / "train" / "part-00000", "train/part-00000", 10) as writer:
        writer.add(np.array([1, 9, 2], dtype=np.uint32), lengths, 3)
    splits = {"train": {"documents": 1, "tokens": 3, "bytes": 3, "shards": [asdict(writer.facts())]}}
    for size in (10, 9):
        (tmp_path / "manifest.json").unlink(missing_ok=True)
        write_manifest(tmp_path, kind="data", config={}, facts={"tokenizer": {"vocab_size": size}, "splits": splits})
        if size == 10:
            verify_data(tmp_path, full=True)
            continue
        with pytest.raises(ArtifactError, match=r"part-00000\.ds` holds id 9, beyond the vocabulary of 9"):
            verify_data(tmp_path, full=True)


def test_an_altered_tokenizer_is_refused(run):
    path = run.directory / "tokenizer" / "tokenizer.json"
    was = sha256_file(path)
    raw = json.loads(path.read_text())
    raw["model"]["merges"] = raw["model"]["merges"][::-1]
    path.write_text(json.dumps(raw))
    expected = f"`{path}` was altered: its SHA-256 is {sha256_file(path)}, and was {was}"
    with pytest.raises(ArtifactError, match=re.escape(expected)):
        verify_tokenizer(run.directory / "tokenizer")
    with pytest.raises(ArtifactError, match="was altered"):
        verify_run(run)


def test_another_tokenizer_is_refused(run):
    before = read_manifest(run.directory / "tokenizer", "tokenizer").digest
    shutil.rmtree(run.directory / "tokenizer")
    now = write_tokenizer(run.directory / "tokenizer", "gpt2", "other words", vocab_size=300).digest
    with pytest.raises(ArtifactError, match=rf"another tokenizer \({before[:12]}\) .* \({now[:12]}\)"):
        verify_run(run)


def changed(run, *, full: bool = True, **data) -> str:
    config = run if not data else run_config(run.directory.parents[1], **data)
    with pytest.raises(ArtifactError) as caught:
        verify_inputs(config.data, run.directory / "data", full=full)
    return str(caught.value)


def test_changed_text_is_listed(run):
    path = run.directory.parents[1] / "one.jsonl"
    whole = path.read_bytes()
    was = sha256_file(path)
    path.write_bytes(whole)  # another time, the same bytes
    verify_inputs(run.data, run.directory / "data", full=True)
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
    assert f"changed: `{path}`, its SHA-256 is {sha256_file(path)}, and was {was}" in changed(run)
    verify_inputs(run.data, run.directory / "data", full=False)  # the size is as it was
    path.write_bytes(whole + b'{"text": "more"}\n')
    assert f"changed: `{path}`, {len(whole) + 17:,} bytes, and had {len(whole)}" in changed(run, full=False)
    path.unlink()
    assert f"removed: `{path}`" in changed(run)
    (path.parent / "two.jsonl").unlink()
    verify_inputs(run.data, run.directory / "data", full=True)  # the shards were carried elsewhere


def test_other_files_and_keys_are_listed(tmp_path, made):
    (tmp_path / "text").mkdir()
    write_text(tmp_path / "text")
    keys = {"train": [str(tmp_path / "text")], "validation": {"fraction": 0.2}, "workers": 1}
    config = run_config(tmp_path, **keys)
    shutil.copytree(made.directory / "tokenizer", config.directory / "tokenizer")
    prepare_data(config)
    verify_inputs(config.data, config.directory / "data", full=True)
    assert "data.document: 'auto' -> 'row'" in changed(config, **keys, document="row")
    assert "data.train: " in changed(config, **{**keys, "train": [str(tmp_path / "text" / "one.jsonl")]})
    (tmp_path / "text" / "three.jsonl").write_text('{"text": "new"}\n')
    assert f"added: `{tmp_path / 'text' / 'three.jsonl'}`" in changed(config)
