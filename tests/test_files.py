"""Whole or not there: atomic directories, digests of what was written, manifests, the safetensors writer."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pretrain.files import (
    ArtifactError,
    HashingWriter,
    commit_directory,
    lock_directory,
    manifest_bytes,
    read_manifest,
    remove_leftovers,
    replace_file,
    verify_manifest,
    write_bytes,
    write_manifest,
    write_safetensors,
)
from pretrain.training.state import tensor_bytes


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with commit_directory(target) as temporary:
        write_bytes(temporary / "a", b"1")
        assert not target.exists()
    assert (target / "a").read_bytes() == b"1"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_leaves_what_was(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with commit_directory(target) as temporary:
        write_bytes(temporary / "a", b"old")
    with pytest.raises(RuntimeError), commit_directory(target, replace=True) as temporary:  # noqa: PT012
        write_bytes(temporary / "a", b"new")
        raise RuntimeError
    assert (target / "a").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(ArtifactError, match="exists already"), commit_directory(target):
        pass


def test_a_kill_leaves_what_was_and_leftovers_can_be_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom pretrain.files import commit_directory, write_bytes\n"
        "with commit_directory(Path(sys.argv[1]), replace=True) as temporary:\n"
        "    write_bytes(temporary / 'a', b'new')\n    os._exit(9)\n"
    )
    target = tmp_path / "made"
    with commit_directory(target) as temporary:
        write_bytes(temporary / "a", b"old")
    assert subprocess.run([sys.executable, "-c", code, str(target)], check=False).returncode == 9
    assert (target / "a").read_bytes() == b"old"
    assert len(remove_leftovers(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == [target]


@given(parts=st.lists(st.binary(max_size=50), max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_digest_is_of_what_was_written(tmp_path: Path, parts: list[bytes]) -> None:
    with HashingWriter(tmp_path / "file") as writer:
        for part in parts:
            writer.write(part)
    whole = b"".join(parts)
    assert writer.digest == hashlib.sha256(whole).hexdigest()
    assert (writer.size, (tmp_path / "file").read_bytes()) == (len(whole), whole)


def test_replacing_a_file_leaves_no_other(tmp_path: Path) -> None:
    replace_file(tmp_path / "a", b"1")
    replace_file(tmp_path / "a", b"2")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"2")]


def test_a_failure_of_the_last_rename_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "made"
    with commit_directory(target) as temporary:
        write_bytes(temporary / "a", b"old")
    plain = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if self.name.startswith(".tmp-made"):
            raise OSError(28, "No space left on device")
        return plain(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="No space"), commit_directory(target, replace=True) as temporary:
        write_bytes(temporary / "a", b"new")
    assert (target / "a").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_replacing_a_file_on_a_full_disk_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(tmp_path / "a", b"1")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "a", b"2")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"1")]


_HOLD = """
import sys
from pathlib import Path
from pretrain.files import lock_directory
with lock_directory(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_owner_at_a_time_and_a_killed_one_is_none(tmp_path: Path) -> None:
    place = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ArtifactError, match=rf"process {holder.pid} on .* works in .*name="), lock_directory(place):
            pass
        holder.kill()
    assert (place / ".lock").exists()
    with lock_directory(place), lock_directory(place):  # the second block is the same owner's
        write_bytes(place / "made", b"1")
        assert f"process {os.getpid()} " in (place / ".lock").read_text()
    assert [path.name for path in place.iterdir()] == ["made"]


def test_a_lock_leaves_no_empty_directory(tmp_path: Path) -> None:
    with lock_directory(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_finds_every_change(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"one")
    (tmp_path / "inner").mkdir()
    write_bytes(tmp_path / "inner" / "b", b"two")
    manifest = write_manifest(tmp_path, kind="thing", config={"x": 1}, inputs={"text": "abc"})
    assert read_manifest(tmp_path, "thing") == manifest
    assert set(manifest.files) == {"a", "inner/b"}
    verify_manifest(tmp_path, manifest)
    (tmp_path / "inner" / "b").write_bytes(b"twO")
    with pytest.raises(ArtifactError, match="inner/b` was altered"):
        verify_manifest(tmp_path, manifest)
    (tmp_path / "inner" / "b").unlink()
    with pytest.raises(ArtifactError, match="inner/b` is missing"):
        verify_manifest(tmp_path, manifest)


def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no thing.*make it first"):
        read_manifest(tmp_path, "thing")
    write_manifest(tmp_path, kind="thing", config={})
    with pytest.raises(ArtifactError, match="holds a thing, not a model"):
        read_manifest(tmp_path, "model")
    raw = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(raw | {"format_version": 99}))
    with pytest.raises(ArtifactError, match="format version 99"):
        read_manifest(tmp_path, "thing")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_manifest(tmp_path, "thing")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "..", ".", "", "a//b", "a/./b", "a/", "x\0y"])
def test_a_manifest_that_names_what_lies_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    """It may have come from a store that somebody else can write."""
    manifest = write_manifest(tmp_path, kind="data", config={}, files={"a/b..c": "0" * 64})
    assert list(read_manifest(tmp_path, "data").files) == ["a/b..c"]
    evil = replace(manifest, files={name: "0" * 64})
    (tmp_path / "manifest.json").write_bytes(manifest_bytes(evil))
    with pytest.raises(ArtifactError, match="names no file below the directory"):
        read_manifest(tmp_path, "data")


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.arange(4),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "transposed": torch.randn(4, 6).T,
    }
    digest = write_safetensors(tmp_path / "t.safetensors", [(k, tensor_bytes(v)) for k, v in tensors.items()])
    loaded = load_file(tmp_path / "t.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert digest == hashlib.sha256((tmp_path / "t.safetensors").read_bytes()).hexdigest()
