"""Planted secrets are in no byte that a run writes, sends to a tracker, or says.

Six of them: two tokens in the environment, a password and a signature in a URL of the data, a value that is typed as an
override, and a token in the remote of the git repository that the run stands in. All but the tokens are used.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.config import ConfigError, config_from_dict, load_config
from pretrain.config_types import redacted
from pretrain.data.reading.sources import resolve_sources
from pretrain.stores import Store, StoreError
from tests.security.conftest import SECRETS, Made, run_config
from tests.security.hostile import ROOT


def bytes_below(place: Path) -> Iterator[tuple[str, bytes]]:
    """Every file's name and bytes, and what is in those that are compressed."""
    for path in sorted(place.rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        yield str(path.relative_to(place)), str(path).encode() + b"\n" + data
        for unpack in (gzip.decompress, lzma.decompress, zlib.decompress):
            try:
                yield f"{path.relative_to(place)} ({unpack.__module__})", unpack(data)
            except (OSError, EOFError, lzma.LZMAError, zlib.error):
                continue


def leaks(place: Path) -> list[str]:
    """Where a secret stands, in any usual writing."""
    found = []
    for name, data in bytes_below(place):
        for which, secret in SECRETS.items():
            forms = (secret.encode(), secret.encode("utf-16-le"), secret.encode().hex().encode())
            found += [f"{which} in {name}"] * any(form in data for form in forms)
    return found


def test_a_run_writes_and_says_no_secret(made: Made) -> None:
    assert not leaks(made.config.directory)
    assert not [secret for secret in SECRETS.values() if secret in made.said]
    kept = dict(bytes_below(made.config.directory))
    assert any(b"part=1" in data for data in kept.values()), "the URL itself is on record, without its secrets"
    assert len(kept) > 30


def test_the_cache_holds_the_text_and_no_secret(made: Made) -> None:
    assert any(made.cache.rglob("*"))
    assert not leaks(made.cache)


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(SECRETS["HF_TOKEN"].encode()))
    (tmp_path / "b").write_bytes(b"\0" + SECRETS["password"].encode() + b"\0")
    assert leaks(tmp_path) == ["HF_TOKEN in a.gz (gzip)", "password in b"]


def test_errors_of_a_configuration_say_no_secret(secret_url: str, tmp_path: Path) -> None:
    """Wrong keys, wrong types, wrong places: each message shows the value that is wrong."""
    said = []
    for path, value in (
        (("data", "train"), secret_url),
        (("data", "nothing"), secret_url),
        (("data", "train"), [{"name": "a", "files": secret_url}]),
        (("data", "train"), [secret_url, {"name": "a", "files": ["b"], "weight": 1.0}]),
        (("tokenizer", "from"), [secret_url]),
        (("train", "steps"), secret_url),
        (("model", "architecture"), secret_url),
        (("checkpoint", "to"), [secret_url]),
        (("name",), secret_url),
    ):
        raw = json.loads(json.dumps(run_config(tmp_path, "text.txt", ("jsonl",))))
        section = raw
        for key in path[:-1]:
            section = section.setdefault(key, {})
        section[path[-1]] = value
        with pytest.raises(ConfigError) as caught:
            config_from_dict(raw)
        said.append(str(caught.value))
    url = f"https://h/x?token={SECRETS['override']}&part=1"
    (tmp_path / "broken.yaml").write_text(f"name: a\ndata: {{train: [{secret_url}]}}\n")
    for name, override in (
        ("quickstart-gpt", f"name={url}"),
        ("quickstart-gpt", f"data.train=[{url}]"),  # no YAML: `?` begins a key there
        ("quickstart-gpt", f"data.{url}"),
        ("quickstart-gpt", f"name.deeper={url}"),
        (tmp_path / "broken.yaml", "train.steps=1"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(name, [override])
        said.append(str(caught.value))
    assert not [(secret, text) for secret in SECRETS.values() for text in said if secret in text]


def test_errors_of_servers_and_stores_say_no_secret(secret_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    for url in (
        secret_url.replace("jane", "joan"),  # refused by the server
        secret_url.replace("127.0.0.1", "localhost:1@127.0.0.1") + "&x",
        f"s3x://KEY:{SECRETS['password']}@bucket/x?token={SECRETS['signature']}",
        f"http://jane:{SECRETS['password']}@127.0.0.1:9/x?sig={SECRETS['signature']}",
        f"zip://a.txt::http://jane:{SECRETS['password']}@127.0.0.1:9/x.zip?sig={SECRETS['signature']}",
    ):
        monkeypatch.setattr("time.sleep", lambda _: None)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (its words are what is looked at)
            resolve_sources([url])
        said.append(str(caught.value))
        with pytest.raises((ValueError, StoreError)) as of_store:
            Store.at(url.replace("http://", "https://")).put_bytes("a", b"")
        said.append(str(of_store.value))
    assert not [(secret, text) for secret in SECRETS.values() for text in said if secret in text]


@pytest.mark.parametrize(
    "text",
    [
        "GET https://hf.co/x?X-Amz-Credential={0}&X-Amz-Signature={0} failed",
        "git+ssh://git:{0}@github.com/a/b",
        "see s3://{0}:{0}@bucket/k and gs://b/k?access_token={0}",
        "https://account.blob.core.windows.net/c?sv=1&sig={0}&se=2",
    ],
)
def test_what_is_shown_of_a_url(text: str) -> None:
    assert "planted" not in redacted(text.format("planted"))


@pytest.mark.slow
def test_a_whole_run_from_the_shell_with_every_tracker(secret_url: str, tmp_path: Path) -> None:
    """Imports torch and three trackers; the run stands in a git repository whose remote has a token."""
    home = tmp_path / "home"
    home.mkdir()
    remote = f"https://user:{SECRETS['remote']}@github.com/a/b.git"
    name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["remote", "add", "origin", remote], [*name, "commit", "-q", "--allow-empty", "-mx"]):
        subprocess.run(["git", *words], cwd=home, check=True, capture_output=True)
    raw = run_config(Path("runs"), secret_url, ("console", "jsonl", "wandb", "trackio", "tensorboard"))
    (home / "private.json").write_text(json.dumps(raw))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {name: SECRETS[name] for name in ("HF_TOKEN", "WANDB_API_KEY")}
    environment |= {"WANDB_MODE": "offline", "HOME": str(home), "TRACKIO_DIR": str(home / "trackio")}
    environment |= {"PRETRAIN_CACHE": str(home / "cache"), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    typed = f"data.validation=['{secret_url}&token={SECRETS['override']}']"
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "run", "private.json", typed],
        cwd=home, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert not [secret for secret in SECRETS.values() if secret in done.stdout + done.stderr]
    written = {name for name, _ in bytes_below(home)}
    for trace in (".wandb", "events.out.tfevents", ".db", "metrics.jsonl", "trainer.json", "scores.json"):
        assert any(trace in name for name in written), f"{trace} is there to be searched"
    (home / "private.json").unlink()  # what the user wrote, and git's own files, are not ours
    shutil.rmtree(home / ".git")
    assert not leaks(home)
    for verb in (["train", "private.json"], ["data", "private.json"], ["plan", "private.json"]):
        (home / "private.json").write_text(json.dumps(raw | {"optimizer": {"name": secret_url}}))
        failed = subprocess.run(
            [sys.executable, "-m", "pretrain", *verb],
            cwd=home, env=environment, capture_output=True, text=True, check=False, timeout=100,
        )  # fmt: skip
        assert failed.returncode != 0
        assert not [secret for secret in SECRETS.values() if secret in failed.stdout + failed.stderr], verb
