"""Names that come from outside lead nowhere outside: `../`, absolute paths, links, pointers, archives."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pretrain.config import config_from_dict
from pretrain.data.preparing.shared import take_artifact
from pretrain.data.reading.sources import resolve_sources
from pretrain.evaluation.loading import load_model
from pretrain.export import export_model
from pretrain.files import ArtifactError, check_inside, is_below, read_manifest, write_manifest
from pretrain.model_reading import read_config
from pretrain.tokenizer import take_tokenizer
from pretrain.training import checkpoint
from pretrain.training.checkpoint import pointer_bytes
from tests.security.conftest import run_config
from tests.security.hostile import change

OUTSIDE = ["../x", "a/../../x", "/etc/passwd", "..", ".", "", "a//b", "a/./b", "x\0y"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_below_a_directory(name: str) -> None:
    assert not is_below(name)
    assert is_below("a/b.safetensors")


@pytest.mark.parametrize("name", ["../tiny", "/tmp/tiny", "a/b", "..", ".hidden", "", "a b", "x\n"])
def test_the_name_of_a_run_is_a_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name"):
        config_from_dict(run_config(tmp_path, "text.txt", ("jsonl",)) | {"name": name})


# --- model directories ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["../{0}", "{1}", "sub/../../{0}"])
@pytest.mark.parametrize("key", ["the index", "transformers_weights"])
def test_weights_lie_in_the_directory(form: str, key: str, model: Path, models, tmp_path: Path) -> None:
    secret = Path(shutil.copytree(models["gpt2"], tmp_path / "secret"))
    name = f"{form.format(secret.name, secret)}/model.safetensors"
    if key == "the index":
        weights = load_file(model / "model.safetensors")
        (model / "model.safetensors").rename(model / "part.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        change(model, "config.json", transformers_weights=name)
    for read in (read_config, load_model):
        with pytest.raises(ArtifactError, match=r"names the weights .* what lies outside"):
            read(model)


def test_files_of_a_tokenizer_lie_in_its_directory(model: Path, tmp_path: Path) -> None:
    """`*_file` entries are old habits of `save_pretrained`; nothing opens what they name."""
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    opened: list[str] = []
    watching = [True]
    sys.addaudithook(lambda event, what: opened.append(str(what[0])) if watching and event == "open" else None)
    names = {key: str(secret) for key in ("vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file")}
    change(model, "tokenizer_config.json", **names, chat_template_file=str(secret), added_tokens_file="../secret.json")
    load_model(model, device="cpu")
    take_tokenizer(str(model), tmp_path / "model", objective="causal")
    watching.clear()
    assert any("tokenizer.json" in name for name in opened)
    assert not any("secret.json" in name for name in opened)
    change(model, "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.5.0.json"])
    with pytest.raises(ArtifactError, match="lies outside"):
        load_model(model, device="cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.txt", "chat_template.jinja"])
def test_links_that_lead_out_of_a_model_are_refused(name: str, model: Path, tmp_path: Path) -> None:
    """What they lead to would be read, and go out with an export."""
    secret = tmp_path / "secret"
    secret.write_bytes((model / name).read_bytes() if (model / name).exists() else b"{{ 'a private key' }}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    with pytest.raises(ArtifactError, match="leads outside"):
        load_model(model, device="cpu")
    with pytest.raises(ArtifactError, match="leads outside"):
        export_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_within_and_the_hubs_cache_are_fine(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "weights")
    (model / "model.safetensors").symlink_to("weights")
    load_model(model, device="cpu")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    load_model(snapshot, device="cpu")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../../etc/passwd")
    with pytest.raises(ArtifactError, match="leads outside"):
        check_inside(snapshot / "config.json")


# --- artifacts and checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside"])
def test_manifests_name_what_lies_below(name: str, tmp_path: Path) -> None:
    write_manifest(tmp_path, kind="tokenizer", config={}, files={name: "0" * 64})
    with pytest.raises(ArtifactError, match="names no file below"):
        read_manifest(tmp_path, "tokenizer")


def test_an_artifact_with_a_link_out_of_it_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a private key")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "tokenizer.json").symlink_to(tmp_path / "secret")
    write_manifest(tmp_path / "made", kind="tokenizer", config={})
    with pytest.raises(ArtifactError, match="leads outside"):
        take_artifact(str(tmp_path / "made"), tmp_path / "taken", "tokenizer")
    assert not (tmp_path / "taken" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp", "step-00000001/../../..", "step-1", "step-00000001/"])
@pytest.mark.parametrize("pointer", ["latest", "best"])
def test_pointers_lead_to_checkpoints_of_the_run(pointer: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "train" / "checkpoints"
    (folder / "step-00000001").mkdir(parents=True)
    (folder / f"{pointer}.json").write_bytes(pointer_bytes({"checkpoint": name, "step": 1, "run_id": "a"}))
    assert checkpoint.read_pointer(tmp_path / "train", pointer) is None


# --- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret", "/etc", "./here", "org/../../secret", "", "~/../x:train"])
def test_a_name_on_the_hub_is_no_path(name: str) -> None:
    with pytest.raises(ValueError, match="no name on the Hub"):
        resolve_sources([f"hub:{name}"])


def test_archives_are_not_unpacked(tmp_path: Path) -> None:
    """So no member of one has a place to escape to."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("../../escaped.txt", "text")
    with tarfile.open(tmp_path / "a.tar", "w") as bundled:
        member = tarfile.TarInfo("../../escaped.txt")
        member.size = 4
        bundled.addfile(member, io.BytesIO(b"text"))
    shutil.copyfile(tmp_path / "a.tar", tmp_path / "a.tgz")
    for name in ("a.zip", "a.tar", "a.tgz"):
        with pytest.raises(ValueError, match="format"):
            resolve_sources([str(tmp_path / name)])
        with pytest.raises(ValueError, match="chained"):
            resolve_sources([f"{name.rpartition('.')[2]}://*.txt::{(tmp_path / name).as_uri()}"])
    assert not list(tmp_path.rglob("escaped.txt"))
