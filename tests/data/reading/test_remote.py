"""Remote files: whole or not there, noticed when they change, shared by runs, and no secret in any file."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from data_builders import forget_servers, run_config, write_tokenizer

from pretrain.config import dump_config
from pretrain.config_types import redacted
from pretrain.data.reading import remote
from pretrain.data.reading.documents import byte_ranges, read_documents, resolve_sources
from pretrain.data.vocabulary import ReadyIds
from pretrain.files import ArtifactError, read_manifest
from pretrain.prepare import is_prepared, prepare_data

ROWS = [{"text": f"row {number}: " + "grey wolves run at night " * (number % 9)} for number in range(300)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PRETRAIN_OFFLINE", raising=False)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    forget_servers()
    yield tmp_path / "cache"
    forget_servers()


@pytest.fixture
def memory(request) -> Iterator[str]:
    """The URL of a directory of its own on fsspec's memory filesystem."""
    filesystem = fsspec.filesystem("memory")
    place = "/" + re.sub(r"\W", "-", request.node.name)
    yield f"memory:/{place}"
    filesystem.rm(place, recursive=True)


def put(url: str, data: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(data)
    forget_servers()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by path; `faults` are taken one a request: drop (after half), short, long, 500, 503."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.ranges = True
        self.requests: list[tuple[str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        served = self.server
        served.requests.append((self.path, dict(self.headers)))
        data = served.files.get(self.path.partition("?")[0])
        wants_range = self.headers["Range"]
        fault = served.faults.pop(0) if served.faults else ""
        if data is None or fault.isdigit():
            self.send_error(404 if data is None else int(fault))
            return
        begin = int(wants_range.removeprefix("bytes=").partition("-")[0]) if wants_range and served.ranges else 0
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{hash(data)}"')
        promised = len(data) - begin + {"short": 100, "long": -100}.get(fault, 0)
        self.send_header("Content-Length", str(promised))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        with contextlib.suppress(OSError):  # the reader may have gone: it wanted the headers alone
            self.wfile.write(data[begin : begin + (len(data) - begin) // 2] if fault == "drop" else data[begin:])
        self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


def texts(url: str, **how: Any) -> list[str]:
    return [document.text for file in resolve_sources([url]) for document in read_documents(file, **how)]


def copies(cache: Path) -> list[Path]:
    return [path for path in (cache / "remote").rglob("*") if path.is_file() and not path.name.startswith(".")]


# --- what a URL names -----------------------------------------------------------------------------------------------


def test_every_format_and_compression_is_read_from_a_url(memory: str) -> None:
    put(f"{memory}/a.jsonl", JSONL)
    put(f"{memory}/deep/b.jsonl.gz", gzip.compress(JSONL))
    put(f"{memory}/c.txt", b"one\r\ntwo\xc3\xa9\n")
    put(f"{memory}/notes.pdf", b"no text")
    expected = [row["text"] for row in ROWS]
    assert texts(f"{memory}/a.jsonl") == texts(f"{memory}/deep/b.jsonl.gz") == expected
    assert texts(f"{memory}/c.txt") == ["one\r\ntwo\u00e9\n"]
    assert [file.name for file in resolve_sources([memory])] == [
        f"{memory}/a.jsonl", f"{memory}/c.txt", f"{memory}/deep/b.jsonl.gz"
    ]  # fmt: skip
    assert [file.name for file in resolve_sources([f"{memory}/*.jsonl"])] == [f"{memory}/a.jsonl"]


def test_ranges_of_the_copy_give_each_document_once(memory: str) -> None:
    put(f"{memory}/a.jsonl", JSONL)
    (file,) = resolve_sources([f"{memory}/a.jsonl"])
    ranges = byte_ranges(file, 4000)
    assert len(ranges) > 3
    read = [document.text for each in ranges for document in read_documents(file, byte_range=each)]
    assert read == [row["text"] for row in ROWS]


def test_a_file_url_is_a_path(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "with space.jsonl").write_bytes(JSONL)
    assert texts(f"file://{tmp_path}/with%20space.jsonl") == [row["text"] for row in ROWS]
    assert not cache.exists()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("memory://nothing/here.jsonl", ["memory://nothing/here.jsonl", "names no file"]),
        ("memory://nothing/*.jsonl", ["names no file"]),
        ("s3://bucket/a.jsonl", ["pip install s3fs"]),
        ("gs://bucket/a.jsonl", ["pip install gcsfs"]),
        ("nosuch://bucket/a.jsonl", ["nosuch"]),
        ("zip://a.jsonl::memory://b.zip", ["chained"]),
        ("http://127.0.0.1:9/*.jsonl", ["lists no files"]),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_url(
    url: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("s3fs", "gcsfs"):  # as where they are not installed
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"data\.train") as caught:
        resolve_sources([url])
    for word in words:
        assert word in str(caught.value)


def test_the_same_url_twice_is_refused(memory: str) -> None:
    put(f"{memory}/a.jsonl", JSONL)
    with pytest.raises(ValueError, match="comes twice"):
        resolve_sources([f"{memory}/a.jsonl", f"{memory}/*.jsonl"])


# --- downloads ------------------------------------------------------------------------------------------------------


def test_a_dropped_connection_is_gone_on_with(server: Server, cache: Path) -> None:
    server.files["/a.jsonl"] = JSONL
    server.faults = ["", "drop"]  # the first request asks for the state
    assert texts(f"{server.url}/a.jsonl") == [row["text"] for row in ROWS]
    assert server.requests[-1][1]["Range"] == f"bytes={len(JSONL) // 2}-"
    (copy,) = copies(cache)
    assert copy.read_bytes() == JSONL


def test_a_server_without_ranges_is_read_anew(server: Server) -> None:
    server.files["/a.jsonl"], server.ranges = JSONL, False
    server.faults = ["", "drop", "503"]
    assert texts(f"{server.url}/a.jsonl") == [row["text"] for row in ROWS]


def test_a_download_that_never_ends_whole_is_an_error_and_leaves_no_file(server: Server, cache: Path) -> None:
    server.files["/a.jsonl"], server.ranges = JSONL, False
    server.faults = [""] + ["drop"] * 50
    with pytest.raises(ValueError, match=rf"{server.url}/a.jsonl.*could not be downloaded: {remote.ATTEMPTS} attempts"):
        resolve_sources([f"{server.url}/a.jsonl"])
    assert len(server.requests) == 1 + 1 + remote.ATTEMPTS - 1
    assert not copies(cache)
    server.faults = []
    forget_servers()
    assert texts(f"{server.url}/a.jsonl") == [row["text"] for row in ROWS], "and the next call mends it"


def test_a_wrong_content_length_is_no_whole_file(server: Server, cache: Path) -> None:
    server.files["/a.jsonl"], server.ranges = JSONL, False
    server.faults = ["short"] * 50
    with pytest.raises(ValueError, match="attempts in a row"):
        resolve_sources([f"{server.url}/a.jsonl"])
    assert not copies(cache)


def test_a_missing_or_forbidden_file_is_not_asked_for_again(server: Server) -> None:
    with pytest.raises(ValueError, match="names no file"):
        resolve_sources([f"{server.url}/nothing.jsonl"])
    assert len(server.requests) == 1
    server.files["/a.jsonl"], server.faults = JSONL, ["403"]
    with pytest.raises(ValueError, match="may not be read"):
        resolve_sources([f"{server.url}/a.jsonl"])
    assert len(server.requests) == 2


def test_a_server_that_fails_for_a_while_is_waited_for(server: Server) -> None:
    server.files["/a.jsonl"], server.faults = JSONL, ["500", "503", "", "500"]
    assert len(texts(f"{server.url}/a.jsonl")) == len(ROWS)


def test_a_file_that_changes_while_it_is_read_is_refused(server: Server, cache: Path) -> None:
    server.files["/a.jsonl"] = JSONL
    (file,) = resolve_sources([f"{server.url}/a.jsonl"], download=False)
    server.files["/a.jsonl"] = JSONL[:-40]
    with pytest.raises(ValueError, match="changed while it was read"):
        remote.fetch([file.path])
    assert not copies(cache)


def test_a_cache_that_cannot_be_written_is_named(memory: str, cache: Path) -> None:
    put(f"{memory}/a.jsonl", JSONL)
    cache.write_text("a file in the way of the folder")
    with pytest.raises(ArtifactError, match="PRETRAIN_CACHE"):
        resolve_sources([f"{memory}/a.jsonl"])


# --- changes, and no network ----------------------------------------------------------------------------------------


def prepared(tmp_path: Path, url: str, name: str = "run", **data: Any):
    config = run_config(tmp_path, "gpt2", name, train=[url], workers=1, **data)
    if not (config.directory / "tokenizer").exists():
        write_tokenizer(config.directory / "tokenizer", "gpt2", " ".join(row["text"] for row in ROWS[:50]))
    return config, prepare_data(config)


def test_a_changed_remote_file_makes_the_shards_stale(tmp_path: Path, memory: str) -> None:
    url = f"{memory}/a.jsonl"
    put(url, JSONL)
    config, directory = prepared(tmp_path, url)
    forget_servers()
    assert is_prepared(config)
    put(url, JSONL)
    assert is_prepared(config), "written anew, with the same bytes"
    put(url, JSONL.replace(b"wolves", b"badger"))
    assert not is_prepared(config)
    with pytest.raises(ArtifactError, match="another configuration, text or tokenizer"):
        prepare_data(config)
    assert read_manifest(directory, "data").facts["splits"]["train"]["documents"] > 200


def test_a_whole_cache_needs_no_server(tmp_path: Path, server: Server, monkeypatch, caplog) -> None:
    server.files["/a.jsonl"] = JSONL
    url = f"{server.url}/a.jsonl"
    resolve_sources([url])
    server.faults = ["500"] * 100
    forget_servers()
    assert len(texts(url)) == len(ROWS)
    assert "what is in the cache is used" in caplog.text
    asked = len(server.requests)
    monkeypatch.setenv("PRETRAIN_OFFLINE", "1")
    forget_servers()
    config, _ = prepared(tmp_path, url)
    assert is_prepared(config)
    assert len(server.requests) == asked
    with pytest.raises(ValueError, match="has no copy of it"):
        resolve_sources([f"{server.url}/b.jsonl"])


def test_a_remote_token_file_comes_with_its_index(memory: str, cache: Path) -> None:
    put(f"{memory}/d.ds", np.arange(1, 6, dtype="<u2").tobytes())
    put(f"{memory}/d.ds.index", np.array([2, 5], dtype="<u8").tobytes())
    put(f"{memory}/n.bin", np.array([1, 0, 2], dtype="<u2").tobytes())
    ready = ReadyIds(vocab_size=10, separator=0)
    first, second = resolve_sources([memory, f"{memory}/n.bin"])
    found = [[list(np.frombuffer(document.ids, "<u4")) for document in read_documents(file, ready=ready)]
             for file in (first, second)]  # fmt: skip
    assert found == [[[1, 2], [3, 4, 5]], [[1], [2]]]
    put(f"{memory}/d.ds.index", np.array([3, 5], dtype="<u8").tobytes())
    changed, _ = resolve_sources([memory, f"{memory}/n.bin"])
    assert changed.version != first.version, "the index is a part of it"
    assert [len(document.ids) // 4 for document in read_documents(changed, ready=ready)] == [3, 2]
    fsspec.filesystem("memory").rm(f"/{memory.rpartition('/')[2]}/d.ds.index")
    forget_servers()
    with pytest.raises(ValueError, match=r"has no .*index"):
        resolve_sources([f"{memory}/d.ds"])


# --- secrets --------------------------------------------------------------------------------------------------------


def test_no_secret_is_written_anywhere(tmp_path: Path, server: Server, monkeypatch, caplog) -> None:
    server.files["/a.jsonl"] = JSONL
    url = server.url.replace("http://", "http://jane:pa55word@") + "/a.jsonl?api_token=s3cr3t&part=1"
    config, _ = prepared(tmp_path, url)
    assert server.requests[-1][1]["Authorization"].startswith("Basic ")
    assert server.requests[-1][0] == "/a.jsonl?api_token=s3cr3t&part=1"
    (tmp_path / "config.yaml").write_text(dump_config(config))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("part=1" in path.read_text(errors="replace") for path in files)
    for path in files:
        for secret in ("pa55word", "s3cr3t"):
            assert secret not in f"{path}\n{path.read_text(errors='replace')}", path
    server.faults = ["403"]
    forget_servers()
    with pytest.raises(ValueError, match="may not be read") as caught:
        resolve_sources([url])
    server.faults = ["", *["drop"] * 99]
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "another"))
    forget_servers()
    with pytest.raises(ValueError, match="attempts in a row") as again:
        resolve_sources([url])
    server.server_close()
    forget_servers()
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "third"))
    with pytest.raises(ValueError, match="cannot be reached") as unreachable:
        resolve_sources([url])
    said = f"{caught.value}{again.value}{unreachable.value}{caplog.text}"
    assert "pa55word" not in said
    assert "s3cr3t" not in said


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@h/x?token=abc&id=5", "https://***@h/x?token=***&id=5"),
        ("s3://KEY:SECRET@bucket/k", "s3://***@bucket/k"),
        ("https://h/x?X-Amz-Signature=ff&raw=1&sig=2", "https://h/x?X-Amz-Signature=***&raw=1&sig=***"),
        ("mail me@home.org", "mail me@home.org"),
        ("https://h/a@b/c", "https://h/a@b/c"),
    ],
)
def test_what_is_taken_out_of_a_url(url: str, shown: str) -> None:
    assert redacted(url) == shown


# --- shards that another run prepared -------------------------------------------------------------------------------


def store(directory: Path, url: str) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            put(f"{url}/{path.relative_to(directory).as_posix()}", path.read_bytes())


@pytest.fixture
def shards(tmp_path: Path, memory: str):
    put(f"{memory}/text/a.jsonl", JSONL)
    return prepared(tmp_path, f"{memory}/text/a.jsonl", "first")


def second(tmp_path: Path, place: str, name: str = "second", tokenizer: str = ""):
    config = run_config(tmp_path, "gpt2", name, **{"from": place})
    write_tokenizer(config.directory / "tokenizer", "gpt2", tokenizer or " ".join(row["text"] for row in ROWS[:50]))
    return config


@pytest.mark.parametrize("where", ["directory", "url"])
def test_prepared_shards_serve_another_run(tmp_path: Path, memory: str, shards, where: str) -> None:
    _, first = shards
    place = str(first) if where == "directory" else f"{memory}/shards"
    store(first, f"{memory}/shards")
    config = second(tmp_path, place)
    made = read_manifest(prepare_data(config), "data")
    original = read_manifest(first, "data")
    assert made.files == original.files
    assert made.digest == original.digest
    assert made.facts["splits"] == original.facts["splits"]
    assert is_prepared(config)
    shard = next(name for name in made.files if name.endswith(".ds"))
    assert np.array_equal(
        np.fromfile(config.directory / "data" / shard, "<u2"), np.fromfile(first / shard, "<u2")
    )  # fmt: skip


def test_altered_or_foreign_shards_are_refused(tmp_path: Path, memory: str, shards) -> None:
    _, first = shards
    store(first, f"{memory}/shards")
    with pytest.raises(ArtifactError, match="another tokenizer"):
        prepare_data(second(tmp_path, f"{memory}/shards", "foreign", tokenizer="other text entirely"))
    name = next(name for name in read_manifest(first, "data").files if name.endswith(".ds"))
    data = bytearray((first / name).read_bytes())
    data[10] ^= 1
    put(f"{memory}/shards/{name}", bytes(data))
    config = second(tmp_path, f"{memory}/shards")
    with pytest.raises(ArtifactError, match=f"{name}.*was altered"):
        prepare_data(config)
    assert not (config.directory / "data").exists()
    fsspec.filesystem("memory").rm(f"/{memory.rpartition('/')[2]}/shards/{name}")
    forget_servers()
    with pytest.raises(ValueError, match="names no file"):
        prepare_data(config)
    with pytest.raises(ArtifactError, match="holds no data"):
        prepare_data(second(tmp_path, f"{memory}/text", "none"))


def test_shards_that_changed_where_they_came_from_are_noticed(tmp_path: Path, memory: str, shards) -> None:
    _, first = shards
    store(first, f"{memory}/shards")
    config = second(tmp_path, f"{memory}/shards")
    prepare_data(config)
    manifest = json.loads((first / "manifest.json").read_text())
    manifest["files"]["files.jsonl"] = "0" * 64
    put(f"{memory}/shards/manifest.json", json.dumps(manifest).encode())
    assert not is_prepared(config)


def test_a_manifest_that_names_a_place_outside_is_refused(tmp_path: Path, shards) -> None:
    _, first = shards
    manifest = json.loads((first / "manifest.json").read_text())
    manifest["files"]["../../escaped"] = "0" * 64
    del manifest["checksum"]  # whoever means harm would write a fitting one
    (first / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="names no file below the directory"):
        prepare_data(second(tmp_path, str(first)))
