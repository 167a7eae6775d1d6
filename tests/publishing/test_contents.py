"""What may leave: whole models alone, no pickle, no link that leads out, no secret."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest

from pretrain.files import ArtifactError, sha256_file
from pretrain.model_dir import _TOKENIZER_FILES
from pretrain.publishing.contents import look_into
from pretrain.publishing.leaks import secrets_in, without_secrets
from pretrain.publishing.selection import in_few_words, select

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
    assert set(found.selection.never) == {"manifest.json", ".git/", ".env"}
    assert found.selection.unknown == ()
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
def test_a_pickle_does_not_leave_even_when_it_is_asked_for(model: Path, form: str) -> None:
    data = pickle.dumps({"a": 1})
    name = {"suffix": "pytorch_model.bin", "bare": "harmless.txt", "zipped": "harmless.dat"}[form]
    if form == "suffix":
        (model / name).write_bytes(b"anything")
    elif form == "bare":
        (model / name).write_bytes(data)
    else:
        with zipfile.ZipFile(model / name, "w") as opened:
            opened.writestr("archive/data.pkl", data)
    assert look_into(model).selection.unknown == (name,)
    with pytest.raises(ArtifactError, match="pickle"):
        look_into(model, also=[name])


def test_a_pickle_by_the_name_of_a_models_file_does_not_leave(model: Path) -> None:
    (model / "vocab.txt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ArtifactError, match="pickle"):
        look_into(model)


def test_links_that_lead_out_are_refused(model: Path, tmp_path: Path) -> None:
    outside = tmp_path / "passwords.txt"
    outside.write_text("x")
    (model / "merges.txt").symlink_to(model / "config.json")
    assert "merges.txt" in {piece.name for piece in look_into(model).pieces}
    (model / "vocab.txt").symlink_to(outside)
    with pytest.raises(ArtifactError, match="link"):
        look_into(model)
    (model / "vocab.txt").unlink()
    (model / "adapter").symlink_to(tmp_path)
    (model / "notes.txt").symlink_to(outside)
    assert look_into(model).selection.unknown == ("adapter", "notes.txt")
    for name in ("adapter", "notes.txt"):
        with pytest.raises(ArtifactError, match="link"):
            look_into(model, also=[name])


def test_a_link_that_leads_nowhere_is_refused(model: Path) -> None:
    for target in ("gone", "vocab.txt"):
        (model / "vocab.txt").symlink_to(target)
        with pytest.raises(ArtifactError, match=r"vocab\.txt` is no file"):
            look_into(model)
        (model / "vocab.txt").unlink()


@pytest.mark.parametrize(
    ("name", "data"),
    [("tokenizer.json", b""), ("tokenizer.json", b'{"version'), ("vocab.txt", b""), ("1_Pooling/config.json", b"")],
)
def test_a_file_that_nothing_could_be_loaded_from_is_refused(model: Path, name: str, data: bytes) -> None:
    (model / "LICENSE").write_bytes(b"")  # of people: as they like
    (model / "notes.txt").write_bytes(b"")
    look_into(model, also=["notes.txt"])
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(data)
    if "/" in name:
        (model / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    with pytest.raises(ArtifactError, match=r"is empty|cannot be read"):
        look_into(model)


def test_what_is_no_file_is_refused(model: Path) -> None:
    os.mkfifo(model / "pipe")
    assert look_into(model).selection.unknown == ("pipe",)
    with pytest.raises(ArtifactError, match="no file"):
        look_into(model, also=["pipe"])


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


def test_the_adapters_alone_and_pickled_weights_alone_are_named(model: Path, tmp_path: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (model / name).unlink()
    (model / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="as a pickle alone"):
        look_into(model)
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text("{}")
    (adapters / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="adapters without their model"):
        look_into(adapters)


# --- which files ----------------------------------------------------------------------------------------------------

OF_MODELS = (
    *_TOKENIZER_FILES,
    *("config.json", "generation_config.json", "model.safetensors", "model-00001-of-00012.safetensors"),
    *("model.safetensors.index.json", "model.fp16.safetensors", "README.md", "LICENSE", "LICENSE.txt", "NOTICE"),
    *("training-curve.svg", ".eval_results/arc.yaml", ".gitattributes", "preprocessor_config.json", "source.spm"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"),
    *("2_Dense/model.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    *("adapter/tokenizer.json", "generator/config.json", "generator/model.safetensors"),
    *("additional_chat_templates/tools.jinja", "chat_template.json", "router_config.json", "LICENSE-APACHE"),
    *("query_0_Sparse/model.safetensors", "query_0_Sparse/config.json", "target_vocab.json", "vocab-src.json"),
)
OF_NO_MODEL = (
    *("notes.txt", "notes.md", "data.jsonl", "optimizer.pt", "optimizer.safetensors", "trainer_state.json"),
    *("training_args.bin", "pytorch_model.bin", "events.out.tfevents.1", "run.sh", "modeling.py", "secrets.json"),
    *("checkpoint-500/model.safetensors", "checkpoint-500/config.json", "logs/config.json", "onnx/model.onnx"),
    *("license.key", "LICENSE_KEY.json", "notice-to-self.txt", "3_Old/model.safetensors", "adapter/notes.txt"),
    *("consolidated.safetensors", "笔记.txt", "a b.txt", "README (1).md", "pretrain.log", "wandb/x.json"),
)


def put(directory: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}")


def test_a_directory_without_a_manifest_goes_by_the_names_of_the_libraries(tmp_path: Path) -> None:
    put(tmp_path, OF_MODELS + OF_NO_MODEL)
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "router_config.json").write_text('{"types": {"query_0_Sparse": "x.Y"}}')
    found = select(tmp_path, None)
    assert found.goes == tuple(sorted(OF_MODELS))
    assert found.unknown == tuple(sorted(OF_NO_MODEL))
    assert found.never == ()


def test_code_goes_where_a_configuration_names_it(tmp_path: Path) -> None:
    put(tmp_path, ("config.json", "model.safetensors", "modeling_mine.py", "layers.py", "tools/x.py"))
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["modeling_mine.Mine", null]}}')
    assert select(tmp_path, None).unknown == ("tools/x.py",)
    put(tmp_path, ("generator/modeling_mine.py",))
    assert select(tmp_path, None).unknown == ("generator/modeling_mine.py", "tools/x.py")
    (tmp_path / "generator" / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_mine.Mine"}}')
    assert select(tmp_path, None).unknown == ("tools/x.py",)


def test_the_code_of_a_generator_goes_with_it(model: Path) -> None:
    put(model, ("generator/modeling_mine.py",))
    (model / "generator" / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_mine.Mine"}}')
    assert "generator/modeling_mine.py" in {piece.name for piece in look_into(model).pieces}
    (model / "generator" / "modeling_mine.py").unlink()
    with pytest.raises(ArtifactError, match=r"code is in generator/modeling_mine\.py, which is not there"):
        look_into(model)


def test_a_module_whose_weights_are_a_pickle_alone_is_refused(model: Path) -> None:
    put(model, ("2_Dense/config.json",))
    (model / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    look_into(model)  # it may have none
    (model / "2_Dense" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="weights of `2_Dense` as a pickle alone"):
        look_into(model)
    shutil.copy(next(model.glob("*.safetensors")), model / "2_Dense" / "model.safetensors")
    look_into(model)
    (model / "modules.json").write_text(
        '[{"path": ""}, {"path": "2_Dense"}, {"path": "3_Normalize"}, {"path": "../x"}]'
    )
    assert "2_Dense/model.safetensors" in {piece.name for piece in look_into(model).pieces}


def test_shards_go_by_the_index_whatever_they_are_called(tmp_path: Path) -> None:
    put(tmp_path, ("config.json", "part-a.safetensors", "part-b.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "part-a.safetensors"}}')
    assert select(tmp_path, None).unknown == ("part-b.safetensors",)


def test_a_manifest_decides_and_what_is_written_later_goes_too(tmp_path: Path) -> None:
    known = ("config.json", "model.safetensors", "extra/odd.bin2")
    later = ("README.md", "LICENSE", "generation_config.json", "chat_template.jinja", ".eval_results/arc.yaml")
    strange = ("model-00001-of-00002.safetensors", "vocab.txt", "notes.txt", "modeling.py", "extra/more.txt")
    put(tmp_path, (*known, *later, *strange, "manifest.json", "pretrain.json"))
    found = select(tmp_path, known)
    assert found.goes == tuple(sorted((*known, *later)))
    assert found.unknown == tuple(sorted(strange))
    assert found.never == ("manifest.json", "pretrain.json")


def test_what_is_asked_for_goes_too_and_a_pattern_for_nothing_is_refused(model: Path) -> None:
    put(
        model, ("notes.txt", "more.txt", "figures/a.png", "figures/b.png", "figures/c.txt", ".env", "__pycache__/x.pyc")
    )
    before = look_into(model)
    found = look_into(model, also=["*.txt", "figures/a*"])
    assert {piece.name for piece in found.pieces} - {piece.name for piece in before.pieces} == {
        *("notes.txt", "more.txt", "figures/a.png")
    }
    assert found.selection.unknown == ("figures/b.png", "figures/c.txt")
    with pytest.raises(ArtifactError, match=r"--also notse.txt: no file"):
        look_into(model, also=["notse.txt"])
    for hidden in (".env", "__pycache__"):
        with pytest.raises(ArtifactError, match="never leaves"):
            look_into(model, also=[hidden])
    assert not {".env", "__pycache__/x.pyc"} & {piece.name for piece in look_into(model, also=["*"]).pieces}


def test_a_secret_in_what_is_asked_for_does_not_leave(model: Path) -> None:
    (model / "notes.txt").write_text(SECRETS["hub"])
    look_into(model)
    with pytest.raises(ArtifactError, match="token"):
        look_into(model, also=["notes.txt"])


def test_a_card_that_was_edited_after_its_manifest_goes(model: Path) -> None:
    """So does one that is gone; of other files the manifest is the word."""
    (model / "README.md").write_text("made")
    digests = {path.name: sha256_file(path) for path in model.iterdir()}
    (model / "README.md").write_text("edited")
    assert "README.md" in {piece.name for piece in look_into(model, digests).pieces}
    (model / "README.md").unlink()
    look_into(model, digests)


def test_folders_are_told_in_a_word() -> None:
    names = ["a.txt", "wandb/x", "wandb/run/y", "one/z", ".git/"]
    assert in_few_words(names) == [".git/", "a.txt", "one/ (1 file)", "wandb/ (2 files)"]
