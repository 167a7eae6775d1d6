"""Whole or not there: atomic directories, digests of what was written, manifests, the safetensors writer."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
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
