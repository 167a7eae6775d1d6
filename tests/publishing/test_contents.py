"""What may leave: whole models alone, no pickle, no link that leads out, no secret."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest

from pretrain.files import ArtifactError, sha256_file
from pretrain.publishing.contents import look_into
from pretrain.publishing.leaks import secrets_in, without_secrets

SECRETS = {
    "hub": "hf_" + "AbCdEfGh" * 4,
    "github": "ghp_" + "a1B2" * 9,
    "aws": "AKIA" + "ABCDEFGH" * 2,
    "openai": "sk-proj-" + "a1B2" * 10,
    "url": "https://me:" + "hunter2222@example.org/x",
    "key": "-----BEGIN RSA " + "PRIVATE KEY-----",
}


def test_a_whole_model_goes(model: Path) -> None:
    (model / "manifest.json").write_text("{}")
    (model / ".git").mkdir()
    (model / ".git" / "config").write_text("x")
    (model / ".env").write_text("x")
    (model / ".eval_results").mkdir()
    (model / ".eval_results" / "a.yaml").write_text("x: 1")
    found = look_into(model)
    assert {piece.name for piece in found.pieces} == {
        ".eval_results/a.yaml",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    }
    assert set(found.stays) == {"manifest.json", ".git/", ".env"}
    for piece in found.pieces:
        assert (piece.size, piece.sha256) == (piece.path.stat().st_size, sha256_file(piece.path))


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
@pytest.mark.parametrize("place", ["README.md", "config.json", "tokenizer.json"])
def test_a_secret_does_not_leave_and_is_not_repeated(model: Path, secret: str, place: str) -> None:
    (model / place).write_text(f'{{"model_type": "bert", "note": "{secret}"}}')
    with pytest.raises(ArtifactError, match=place) as refused:
        look_into(model)
    assert secret not in str(refused.value)


def test_a_secret_in_the_header_of_weights_is_found(model: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    shard = model / "model-00001-of-00002.safetensors"
    save_file({"layer.0.weight": np.zeros(2, np.float32)}, shard, {"note": SECRETS["hub"]})
    with pytest.raises(ArtifactError, match="token"):
        look_into(model)


def test_secrets_of_the_environment_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert list(secrets_in("x 0123456789abcdef")) == ["the value of WANDB_API_KEY"]
    assert without_secrets("x 0123456789abcdef") == "x ***"
    assert not list(secrets_in("a tokenizer, some keys, hf_model, sk-learn"))


@pytest.mark.parametrize("form", ["suffix", "bare", "zipped"])
def test_a_pickle_does_not_leave(model: Path, form: str) -> None:
    data = pickle.dumps({"a": 1})
    if form == "suffix":
        (model / "pytorch_model.bin").write_bytes(b"anything")
    elif form == "bare":
        (model / "harmless.txt").write_bytes(data)
    else:
        with zipfile.ZipFile(model / "harmless.dat", "w") as opened:
            opened.writestr("archive/data.pkl", data)
    with pytest.raises(ArtifactError, match="pickle"):
        look_into(model)


def test_links_that_lead_out_are_refused(model: Path, tmp_path: Path) -> None:
    outside = tmp_path / "passwords.txt"
    outside.write_text("x")
    (model / "inside.txt").symlink_to(model / "config.json")
    assert "inside.txt" in {piece.name for piece in look_into(model).pieces}
    (model / "notes.txt").symlink_to(outside)
    with pytest.raises(ArtifactError, match="link"):
        look_into(model)
    (model / "notes.txt").unlink()
    (model / "folder").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="link"):
        look_into(model)


def test_what_is_no_file_is_refused(model: Path) -> None:
    os.mkfifo(model / "pipe")
    with pytest.raises(ArtifactError, match="no file"):
        look_into(model)


@pytest.mark.parametrize(
    "harm", ["torn", "longer", "no shard", "no weights", "no config", "no type", "altered", "gone"]
)
def test_a_model_that_is_not_whole_is_refused(model: Path, harm: str) -> None:
    digests = {path.name: sha256_file(path) for path in model.iterdir()}
    shard = model / "model-00002-of-00002.safetensors"
    if harm == "torn":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif harm == "longer":
        shard.write_bytes(shard.read_bytes() + b"x")
    elif harm == "no shard":
        shard.unlink()
    elif harm == "no weights":
        for path in model.glob("*.safetensors"):
            path.unlink()
    elif harm == "no config":
        (model / "config.json").unlink()
    elif harm == "no type":
        (model / "config.json").write_text("{}")
    elif harm == "altered":
        (model / "tokenizer.json").write_text("{}")
    else:
        (model / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError):
        look_into(model, digests)
