"""Stores behind URLs: what is put is there, broken connections are tried again, refusals name the remedy."""

from __future__ import annotations

import errno
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain import stores
from pretrain.stores import Store, StoreError


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.0)


@pytest.fixture(params=["memory", "file", "path"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    place = f"{tmp_path}/a store"
    url = {"memory": f"memory://{uuid.uuid4().hex}/a store", "file": f"file://{place}", "path": place}[request.param]
    return Store.at(url).below("run")


def test_what_is_put_is_listed_read_fetched_and_deleted(store: Store, tmp_path: Path) -> None:
    store.probe()
    assert store.list() == []
    (tmp_path / "f").write_bytes(bytes(3_000_000))
    store.put("step-1/model/f", tmp_path / "f")
    store.put_bytes("latest.json", b"{}")
    store.put_bytes("latest.json", b"{1}")
    assert store.list() == ["latest.json", "step-1/model/f"]
    assert store.read("latest.json") == b"{1}"
    assert store.read("best.json") is None
    store.get("step-1/model/f", tmp_path / "deep" / "g")
    assert (tmp_path / "deep" / "g").read_bytes() == bytes(3_000_000)
    for name in ("step-1/model/f", "latest.json", "never-there"):
        store.delete(name)
    assert store.list() == []


def failing(store: Store, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, times: int) -> list[int]:
    calls: list[int] = []
    plain: Callable[..., Any] = getattr(store.filesystem, name)

    def fail(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return plain(*arguments, **keywords)

    monkeypatch.setattr(store.filesystem, name, fail, raising=False)
    return calls


def test_a_broken_connection_is_tried_again(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"x")
    calls = failing(store, monkeypatch, "put_file", ConnectionResetError("reset by peer"), 3)
    store.put("f", tmp_path / "f")
    assert len(calls) == 4
    assert store.read("f") == b"x"


@pytest.mark.parametrize(
    ("error", "calls"),
    [(TimeoutError("timed out"), 5), (PermissionError("no"), 1), (OSError(errno.ENOSPC, "No space left"), 1)],
)
def test_what_does_not_pass_is_one_error(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, calls: int
) -> None:
    (tmp_path / "f").write_bytes(b"x")
    made = failing(store, monkeypatch, "put_file", error, 99)
    with pytest.raises(StoreError, match=rf"run/f` could not be written: .*{str(error)[-5:]}"):
        store.put("f", tmp_path / "f")
    assert len(made) == calls


@pytest.mark.parametrize(
    ("module", "name"),
    [("paramiko.ssh_exception", "SSHException"), ("smbprotocol.exceptions", "SMBException"), ("ftplib", "Error"),
     ("webdav4.client", "ClientError")],
)  # fmt: skip
def test_errors_of_backends_that_are_no_os_errors_are_known(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    foreign = type(name, (Exception,), {})
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: foreign}))  # type: ignore[arg-type]
    (tmp_path / "f").write_bytes(b"x")
    calls = failing(store, monkeypatch, "put_file", foreign("channel closed"), 2)
    store.put("f", tmp_path / "f")
    assert len(calls) == 3


@pytest.mark.parametrize("scheme", ["file://", ""])
def test_on_a_disk_a_file_is_whole_and_flushed_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    store = Store.at(f"{scheme}{tmp_path}/store").below("run")
    (tmp_path / "f").write_bytes(b"new and longer")
    target = tmp_path / "store" / "run" / "deep" / "f"
    flushed: list[int] = []
    plain = os.fsync

    def fsync(descriptor: int) -> None:
        plain(descriptor)
        flushed.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    for write in (lambda: store.put("deep/f", tmp_path / "f"), lambda: store.put_bytes("deep/f", b"new")):
        flushed.clear()
        write()
        places = {path: path.stat().st_ino for path in (target, target.parent)}
        assert flushed.index(places[target]) < len(flushed) - 1 - flushed[::-1].index(places[target.parent])
    assert {path.stat().st_ino for path in (tmp_path / "store", tmp_path)} & set(flushed) == set(), "they were there"
    flushed.clear()
    store.delete("deep/f")
    assert flushed == [target.parent.stat().st_ino]
    store.put_bytes("deep/f", b"old")

    def cut_short(source: str, place: str) -> None:
        Path(place).write_bytes(b"ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.filesystem, "put_file", cut_short, raising=False)
    with pytest.raises(StoreError, match="No space left"):
        store.put("deep/f", tmp_path / "f")
    assert store.list() == ["deep/f"]
    assert store.read("deep/f") == b"old"


def test_half_a_file_is_sent_again(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"whole")
    plain, sent = store.filesystem.put_file, []

    def half(source: str, target: str) -> None:
        sent.append(1)
        (tmp_path / "half").write_bytes(b"wh")
        plain(str(tmp_path / "half") if len(sent) == 1 else source, target)

    monkeypatch.setattr(store.filesystem, "put_file", half, raising=False)
    store.put("f", tmp_path / "f")
    assert store.read("f") == b"whole"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://user:secret@host/folder", r"only reads https"),
        ("s3://bucket/folder", r"pip install s3fs"),
        ("nothing://x", r"check the part before ://"),
        ("simplecache::memory://x", r"cannot be written"),
    ],
)
def test_a_url_that_cannot_be_written_is_refused(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        Store.at(url)
    assert "secret" not in str(refused.value)
    assert "checkpoint.to" in str(refused.value)


def test_a_store_that_may_not_be_written_is_refused_at_the_probe(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(ValueError, match=r"checkpoint\.to.*cannot be used.*credentials"):
        Store.at(f"file://{tmp_path}/file").below("run").probe()
