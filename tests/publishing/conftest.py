"""A local Hub that this process speaks to, without waiting between tries, and a model directory to send there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.utils import _http
from safetensors.numpy import save_file

from pretrain.publishing import hub as our_hub
from tests.local_hub import WRITER, LocalHub


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited between tries."""
    waited: list[float] = []
    clock = SimpleNamespace(sleep=waited.append)
    monkeypatch.setattr(our_hub, "time", clock)
    monkeypatch.setattr(_http, "time", clock)
    return waited


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[LocalHub]:
    """A Hub; large files begin at 1,000 bytes, and come in parts from 20,000."""
    with LocalHub(tmp_path / "hub", large_bytes=1000, part_bytes=20_000) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        close_session()
        yield running
        close_session()


def write_model(directory: Path, seed: int = 0, shards: int = 2) -> Path:
    """A directory with the files of a small BERT; its tensors are drawn, and nobody loads them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    generator = np.random.default_rng(seed)
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    for number, name in enumerate(names):
        tensors = {f"layer.{number}.weight": generator.normal(size=(40, 40)).astype(np.float32)}
        save_file(tensors, directory / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {f"layer.{number}.weight": name for number, name in enumerate(names)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory of two shards of about 6.5 kB."""
    return write_model(tmp_path / "model")


def copy_of(model: Path, place: Path) -> Path:
    """The same files elsewhere."""
    return Path(shutil.copytree(model, place))
