"""Fixtures: a marker, tiny model directories, and one tiny run made with secrets all around it."""

from __future__ import annotations

import base64
import http.server
import io
import logging
import os
import random
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pretrain import run as verb
from pretrain.config import RunConfig, config_from_dict
from tests.evaluation.tiny_models import build, byte_tokenizer, word_tokenizer
from tests.security.hostile import Marker

SECRETS = {
    "HF_TOKEN": "hf_plantedPLANTEDplantedPLANTEDplant1",
    "WANDB_API_KEY": "0123456789abcdefplanted0123456789abcdef2",
    "password": "planted-pa55word-3",
    "signature": "planted-s1gnature-4",
    "override": "planted-0verride-5",
    "remote": "ghp_plantedPLANTEDplantedPLANTEDplant6",
}


@pytest.fixture
def marker(tmp_path: Path) -> Marker:
    return Marker(tmp_path / "code-ran")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """architecture -> a complete model directory."""
    made = {}
    for architecture in ("gpt2", "bert"):
        made[architecture] = tmp_path_factory.mktemp(architecture)
        build(architecture).save_pretrained(made[architecture])
        tokenizer = byte_tokenizer() if architecture == "gpt2" else word_tokenizer()
        tokenizer.save_pretrained(made[architecture])
    return made


@pytest.fixture
def model(models: dict[str, Path], tmp_path: Path) -> Path:
    """A decoder's directory of one's own to spoil."""
    return Path(shutil.copytree(models["gpt2"], tmp_path / "model"))


class _Pages(http.server.BaseHTTPRequestHandler):
    """Gives one text to whoever knows the password and the signature."""

    text = b""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        login = base64.b64encode(f"jane:{SECRETS['password']}".encode()).decode()
        known = self.headers.get("Authorization") == f"Basic {login}" and SECRETS["signature"] in self.path
        self.send_response(200 if known else 403)
        self.send_header("Content-Length", str(len(self.text) if known else 0))
        self.end_headers()
        if body and known:
            self.wfile.write(self.text)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="session")
def secret_url() -> Iterator[str]:
    """The URL of a small text, with a password and a signature in it."""
    draw = random.Random(0)
    words = ["river", "stone", "bridge", "wood", "sea", "over", "and", "the", "a", "runs", "under", "to"]
    lines = (" ".join(draw.choices(words, k=draw.randint(5, 40))) for _ in range(1500))
    _Pages.text = "\n\n".join(lines).encode()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield (
        f"http://jane:{SECRETS['password']}@127.0.0.1:{server.server_port}/text.txt"
        f"?X-Amz-Signature={SECRETS['signature']}&part=1"
    )
    server.shutdown()
    server.server_close()


@dataclass(frozen=True)
class Made:
    """A finished run: its configuration, all that it said, and where its cache lies."""

    config: RunConfig
    said: str
    cache: Path


def run_config(out: Path, url: str, log: tuple[str, ...]) -> dict[str, Any]:
    """A tiny run on a text that a URL with secrets gives."""
    return {
        "name": "tiny",
        "out": str(out),
        "tokenizer": {"algorithm": "byte-bpe", "vocab_size": 320},
        "data": {"train": [url], "document": "paragraph", "sequence_length": 32, "workers": 1},
        "model": {"architecture": "gpt2", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "objective": {"kind": "causal"},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "train": {"steps": 4, "batch_tokens": 128, "precision": "fp32"},
        "checkpoint": {"every": 2},
        "evaluate": {"every": 4, "max_tokens": 256},
        "log": {"to": log},
    }


@pytest.fixture(scope="session")
def made(secret_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """A finished run, made in this process."""
    folder, heard = tmp_path_factory.mktemp("tiny"), io.StringIO()
    console, listener = Console(file=heard, width=200, soft_wrap=True), logging.StreamHandler(heard)
    variables = {name: SECRETS[name] for name in ("HF_TOKEN", "WANDB_API_KEY")}
    variables |= {"PRETRAIN_CACHE": str(folder / "cache")}
    logging.getLogger().addHandler(listener)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setitem(os.environ, name, value)
        config = config_from_dict(run_config(folder / "runs", secret_url, ("console", "jsonl", "tensorboard")))
        assert verb.run(config, console=console) == 0
        yield Made(config, heard.getvalue(), folder / "cache")
    logging.getLogger().removeHandler(listener)
