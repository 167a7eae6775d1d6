"""The verb `tokenizer`, the recipes, and taking over an existing tokenizer."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pretrain.config import RunConfig, config_from_dict
from pretrain.data.vocabulary import read_vocabulary
from pretrain.files import ArtifactError, read_manifest, verify_manifest
from pretrain.tokenizer import is_trained, take_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "tokenizer").glob("*.yaml"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    lines = [f"the {number} small words of document {number % 13}, and of 天地" for number in range(400)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


def run_config(tmp_path: Path, text: Path, **changes: Any) -> RunConfig:
    plain: dict[str, Any] = {
        "name": "try",
        "out": str(tmp_path / "runs"),
        "tokenizer": {"algorithm": "byte-bpe", "vocab_size": 320, "pad_to_multiple": 16},
        "data": {"train": [str(text)], "sequence_length": 32},
        "model": {"architecture": "gpt2"},
        "objective": {"kind": "causal"},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1, "batch_tokens": 64},
    }
    return config_from_dict(plain | changes)


def test_it_makes_the_artifact_once(tmp_path: Path, text: Path) -> None:
    config = run_config(tmp_path, text)
    assert not is_trained(config)
    directory = train_tokenizer(config)
    assert directory == tmp_path / "runs" / "try" / "tokenizer"
    manifest = read_manifest(directory, "tokenizer")
    verify_manifest(directory, manifest)
    facts = manifest.facts
    assert (facts["vocab_size"], facts["learnt"]) == (320, 320)
    assert facts["special_ids"] == {"bos": 0, "eos": 0, "pad": 1}
    assert facts["all_special_ids"] == [0, 1]
    assert facts["corpus"]["documents"] < 400, "validation documents are held out"
    report = json.loads((directory / "report.json").read_text())
    assert report["total"]["exact_share"] == 1.0
    assert report["peak_rss_bytes"] > 10_000_000
    assert (directory / "report.md").read_text().startswith("# Tokenizer: byte-bpe, 320 ids")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (len(tokenizer), tokenizer.model_max_length) == (320, 32)
    before = (directory / "manifest.json").stat().st_mtime_ns
    assert is_trained(config)
    assert train_tokenizer(config) == directory
    assert (directory / "manifest.json").stat().st_mtime_ns == before
    assert sorted(path.name for path in directory.parent.iterdir()) == ["tokenizer"]


def test_the_same_twice(tmp_path: Path, text: Path) -> None:
    first, second = run_config(tmp_path, text), run_config(tmp_path, text, name="again")
    one, two = (read_manifest(train_tokenizer(config), "tokenizer") for config in (first, second))
    assert one.digest == two.digest


def test_changed_text_makes_it_anew(tmp_path: Path, text: Path) -> None:
    config = run_config(tmp_path, text)
    directory = train_tokenizer(config)
    old = read_manifest(directory, "tokenizer")
    os.utime(text, ns=(1, 1))
    assert is_trained(config), "another time, the same text"
    text.write_text(text.read_text() + json.dumps({"text": "and quite another text " * 20}) + "\n")
    assert not is_trained(config)
    train_tokenizer(config)
    assert is_trained(config)
    assert read_manifest(directory, "tokenizer").inputs != old.inputs


def test_another_configuration_is_refused(tmp_path: Path, text: Path) -> None:
    directory = train_tokenizer(run_config(tmp_path, text))
    other = run_config(tmp_path, text, tokenizer={"algorithm": "byte-bpe", "vocab_size": 384, "pad_to_multiple": 16})
    with pytest.raises(ArtifactError, match="vocab_size: 320 -> 384"):
        train_tokenizer(other)
    assert read_manifest(directory, "tokenizer").config["vocab_size"] == 320


def test_weights_do_not_decide_it_and_what_is_read_does(tmp_path: Path, text: Path) -> None:
    source: dict[str, Any] = {"name": "web", "files": [str(text)], "weight": 1.0}

    def with_data(more: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
        data = {"train": [source | changes], "sequence_length": 32}
        return run_config(tmp_path, text, data=data | (more or {}))

    train_tokenizer(with_data())
    assert is_trained(with_data(weight=0.3, max_epochs=2.0))
    for config, said in (
        (with_data({"encoding": "utf-8"}), "text.encoding: 'auto' -> 'utf-8'"),
        (with_data({"ids_field": "text"}), "text.ids_field: None -> 'text'"),
        (with_data(encoding="utf-8"), "text.train: "),
    ):
        assert not is_trained(config)
        with pytest.raises(ArtifactError, match=re.escape(f"another configuration ({said}")):
            train_tokenizer(config)


def test_text_that_is_all_bad_is_named_with_what_it_may_be(tmp_path: Path) -> None:
    file = tmp_path / "old.txt"
    file.write_bytes("\n".join(["天地玄黄宇宙洪荒日月盈昃辰宿列张"] * 30).encode("gb18030"))
    data = {"train": [str(file)], "sequence_length": 32, "encoding": "utf-8", "document": "line"}
    for algorithm in ("byte-bpe", "bytes"):
        with pytest.raises(ValueError, match="there is no text in the files given") as caught:
            train_tokenizer(run_config(tmp_path, file, data=data, tokenizer={"algorithm": algorithm}))
        said = str(caught.value)
        assert "30 lines or rows are bad" in said
        assert f"{file}:1: not UTF-8" in said
        assert "say so with data.encoding: gb18030" in said
    data["encoding"] = "shift_jis"
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"\x81\n" * 12)
    with pytest.raises(ValueError, match=r"12 lines or rows are bad(?s:.*)broken\.txt:1: .*shift_jis(?s:.*)\nMend"):
        train_tokenizer(run_config(tmp_path, broken, data=data | {"train": [str(broken)]}))


def test_altered_files_are_noticed(tmp_path: Path, text: Path) -> None:
    config = run_config(tmp_path, text)
    directory = train_tokenizer(config)
    (directory / "tokenizer_config.json").write_text("{}")
    assert not is_trained(config)
    train_tokenizer(config)
    assert is_trained(config)


@pytest.mark.parametrize("tail_of", ["row", "file"])
def test_held_out_text_is_not_learnt_from(tmp_path: Path, tail_of: str) -> None:
    file = tmp_path / ("text.jsonl" if tail_of == "row" else "text.txt")
    lines = ["seen words here"] * 90 + ["zzyzx"] * 10
    body = "".join(json.dumps({"text": line}) + "\n" for line in lines) if tail_of == "row" else "\n".join(lines)
    file.write_text(body)
    data = {"train": [str(file)], "sequence_length": 32, "validation": {"tail": 0.2}}
    directory = train_tokenizer(run_config(tmp_path, file, data=data))
    vocabulary = AutoTokenizer.from_pretrained(directory).get_vocab()
    assert "Ġwords" in vocabulary
    assert not any("zz" in token for token in vocabulary)


def test_an_existing_tokenizer_is_taken_over(tmp_path: Path, text: Path) -> None:
    source = train_tokenizer(run_config(tmp_path, text))
    config = run_config(tmp_path, text, name="taken", tokenizer={"from": str(source)})
    directory = train_tokenizer(config)
    assert (directory / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((directory / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert read_manifest(directory, "tokenizer").facts["vocab_size"] == 320
    assert read_vocabulary(directory) == read_vocabulary(source)
    assert is_trained(config)
    (source / "tokenizer.json").write_text((source / "tokenizer.json").read_text() + "\n")
    assert not is_trained(config)


def test_a_tokenizer_that_does_not_serve_is_refused(tmp_path: Path, text: Path) -> None:
    source = train_tokenizer(run_config(tmp_path, text))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ValueError, match=r"no mask_token, which objective\.kind: mlm needs"):
        take_tokenizer(str(source), out, objective="mlm")
    with pytest.raises(ValueError, match=r"tokenizer\.from: .* cannot be loaded"):
        take_tokenizer(str(tmp_path / "nothing"), out, objective="mlm")
    assert not list(out.iterdir())


def taken(source: Path, out: Path, **needs: Any) -> list[str]:
    out.mkdir()
    take_tokenizer(str(source), out, **needs)
    return sorted(path.name for path in out.iterdir())


def with_roles(tmp_path: Path, text: Path, name: str, *roles: str) -> Path:
    """A tokenizer with special tokens for these roles and no others."""
    trained = Tokenizer.from_file(str(train_tokenizer(run_config(tmp_path, text)) / "tokenizer.json"))
    named = {f"{role}_token": f"[{role}]" for role in roles}
    fast = PreTrainedTokenizerFast(tokenizer_object=trained, **named)  # type: ignore[no-untyped-call]
    fast.save_pretrained(tmp_path / name)
    return tmp_path / name


def test_what_a_taken_tokenizer_needs_goes_by_the_architecture(tmp_path: Path, text: Path) -> None:
    encoder = with_roles(tmp_path, text, "encoder", "cls", "sep", "pad", "mask")
    assert "tokenizer.json" in taken(encoder, tmp_path / "own", objective="mine:fn", kind="encoder")
    assert "tokenizer.json" in taken(encoder, tmp_path / "elsewhere", objective="mine:fn")
    with pytest.raises(ValueError, match="has no eos_token, which a decoder needs"):
        taken(encoder, tmp_path / "decoder", objective="mine:fn", kind="decoder")
    without = with_roles(tmp_path, text, "without", "bos", "eos", "mask")
    for kind in ("encoder", None):
        with pytest.raises(ValueError, match="has no cls_token and sep_token, which an encoder needs"):
            taken(without, tmp_path / f"refused-{kind}", objective="mlm", kind=kind)


def test_an_encoder_with_an_objective_of_ones_own_takes_a_tokenizer(tmp_path: Path, text: Path) -> None:
    source = with_roles(tmp_path, text, "encoder", "cls", "sep", "pad", "mask")
    changes: dict[str, Any] = {"model": {"architecture": "bert"}, "objective": {"kind": "mine:fn"}}
    config = run_config(tmp_path, text, name="own", tokenizer={"from": str(source)}, **changes)
    assert read_vocabulary(train_tokenizer(config)).cls is not None


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="needs Linux's counters")
@pytest.mark.parametrize(
    ("algorithm", "validation"),
    [("byte-bpe", {"fraction": 0.02}), ("byte-bpe", {"tail": 0.1}), ("bytes", {"tail": 0.1})],
)
def test_a_trial_reads_the_first_bytes(
    tmp_path: Path, text: Path, algorithm: str, validation: dict[str, float]
) -> None:
    def bytes_read() -> int:
        return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])

    large = tmp_path / "large.txt"
    large.write_bytes(text.read_bytes())
    os.truncate(large, 400_000_000)  # zeros that take no room on the disk
    config = run_config(
        tmp_path,
        large,
        data={"train": [str(large), str(text)], "sequence_length": 32, "validation": validation},
        tokenizer={"algorithm": algorithm, "vocab_size": 320, "pad_to_multiple": 16, "min_frequency": 2},
    )
    before = bytes_read()
    directory = train_tokenizer(config, max_bytes=8000)
    assert bytes_read() - before < 60_000_000
    facts = read_manifest(directory, "tokenizer").facts
    assert facts["corpus"]["bytes"] == 6000, "a quarter of each text is held out"
    assert is_trained(config, max_bytes=8000)
    assert not is_trained(config), "a trial's tokenizer is not the run's"


def test_a_model_brings_its_own_tokenizer(tmp_path: Path, text: Path) -> None:
    source = train_tokenizer(run_config(tmp_path, text))
    config = run_config(tmp_path, text, name="model", model={"from": str(source)}, tokenizer={})
    assert read_manifest(train_tokenizer(config), "tokenizer").config["from"] == str(source)
    other = run_config(tmp_path, text, name="other", model={"from": str(source)}, tokenizer={"vocab_size": 500})
    with pytest.raises(ValueError, match="has its own vocabulary"):
        train_tokenizer(other)


def test_bytes_need_no_corpus_of_any_size(tmp_path: Path, text: Path) -> None:
    config = run_config(tmp_path, text, tokenizer={"algorithm": "bytes", "pad_to_multiple": 1})
    directory = train_tokenizer(config)
    assert read_manifest(directory, "tokenizer").facts["vocab_size"] == 258
    text.write_text(text.read_text() * 2)
    assert is_trained(config), "the text does not decide it"


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipes() -> ModuleType:
    specification = importlib.util.spec_from_file_location("train_recipe", ROOT / "tokenizer" / "train.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # pydantic looks annotations up there
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs(recipes: ModuleType, recipe: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "tokenizer"
    assert recipes.main([str(recipe), "--files", str(text), "--out", str(out), "min_frequency=3"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == json.loads((out / "report.json").read_text())["vocab_size"]
    assert "small" in tokenizer.decode(tokenizer("the small words")["input_ids"])


def test_recipes_are_refused_with_reasons(
    recipes: ModuleType, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(RECIPES[0]), "--files", str(text), "--out", str(tmp_path / "out")]
    assert recipes.main([*command, "vocab_sise=5"]) == 2
    assert "tokenizer.vocab_sise" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
