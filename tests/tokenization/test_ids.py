"""A bare vocabulary: each number is its own id, everywhere that a tokenizer goes, for encoders and decoders."""

from __future__ import annotations

import json
import struct
from array import array
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from data_builders import forget_servers, run_config
from transformers import AutoTokenizer

from pretrain.config import RunConfig, TokenizerConfig, config_from_dict, config_to_dict
from pretrain.config_text import ConfigError
from pretrain.data.batches import LoadedSplit
from pretrain.data.vocabulary import ReadyIds, read_vocabulary
from pretrain.export import export_model
from pretrain.files import read_manifest
from pretrain.prepare import prepare_data
from pretrain.tokenization import bare_tokenizer, write_tokenizer
from pretrain.tokenizer import is_trained, train_tokenizer
from pretrain.train import build_trainer

LINES = [" ".join(str((number * 3 + place) % 50) for place in range(5 + number % 9)) for number in range(200)]


def written(directory: Path, architecture: str, **keys: Any) -> Any:
    config = TokenizerConfig(algorithm="ids", **keys)
    directory.mkdir()
    write_tokenizer(directory, bare_tokenizer(config, architecture), model_max_length=64)
    return AutoTokenizer.from_pretrained(directory)


def ids_run(tmp_path: Path, architecture: str, name: str, vocab_size: int = 50, **data: Any) -> RunConfig:
    plain = config_to_dict(run_config(tmp_path, architecture, name, **data))
    plain["tokenizer"] = {"algorithm": "ids", "vocab_size": vocab_size}
    plain["model"] |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return config_from_dict(plain)


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "gpt2", "llama"])
def test_numbers_are_their_own_ids(tmp_path, architecture: str) -> None:
    tokenizer = written(tmp_path / "t", architecture, vocab_size=100, special_tokens=("<x>",))
    assert tokenizer("12 7  99\n0", add_special_tokens=False).input_ids == [12, 7, 99, 0]
    assert tokenizer.decode([12, 7, 99]) == "12 7 99"
    assert len(tokenizer) == 128
    assert min(tokenizer.all_special_ids) == 100
    unknown = tokenizer.unk_token_id
    assert tokenizer("100 007 x -1", add_special_tokens=False).input_ids == [unknown] * 4
    assert "<x>" in tokenizer.get_vocab()
    facts = read_vocabulary(tmp_path / "t")
    assert facts.vocab_size == 128
    assert list(facts.replaceable) == list(range(100)), "special tokens and padding stand in for nothing"
    assert ReadyIds.of(tmp_path / "t").numbers == 100
    if architecture == "bert":
        assert tokenizer("1 [MASK] 2").input_ids == [
            tokenizer.cls_token_id, 1, tokenizer.mask_token_id, 2, tokenizer.sep_token_id
        ]  # fmt: skip


def test_keys_of_learning_are_refused() -> None:
    with pytest.raises(ValueError, match="`lowercase` has no effect with `algorithm: ids`"):
        TokenizerConfig(algorithm="ids", vocab_size=4, lowercase=True)
    with pytest.raises(ValueError, match=r"stands twice|also a reserved"):
        bare_tokenizer(TokenizerConfig(algorithm="ids", vocab_size=4, special_tokens=("3",)), "gpt2")


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_sequences_of_numbers_go_all_the_way(tmp_path, architecture: str) -> None:
    bad = ["3 50 1", "four", "1 2.5"]
    (tmp_path / "a.txt").write_text("\n".join([*LINES, *bad]) + "\n")
    config = ids_run(tmp_path, architecture, "run", train=[str(tmp_path / "a.txt")], document="line", workers=1)
    train_tokenizer(config)
    assert is_trained(config)
    directory = prepare_data(config)
    facts = read_manifest(directory, "data").facts
    assert facts["bad"]["count"] == 3
    assert "`50` is no number from 0 to 49" in facts["bad"]["named"][0]
    layout = "encoder" if architecture == "bert" else "decoder"
    stores = [LoadedSplit(directory, split, layout, 32, 8).store for split in facts["splits"]]
    found = [ids for store in stores for ids in documents_of(store)]
    assert sorted(found) == sorted([list(map(int, line.split())) for line in LINES])
    result = build_trainer(config).train()
    assert result.finished
    export_model(result.checkpoint, tmp_path / "export")
    assert AutoTokenizer.from_pretrained(tmp_path / "export")("7 8", add_special_tokens=False).input_ids == [7, 8]


def documents_of(store: Any) -> list[list[int]]:
    lengths = store.document_lengths()
    starts = np.cumsum(lengths) - lengths
    return [store.gather(np.array([a]), np.array([n])).tolist() for a, n in zip(starts, lengths, strict=True)]


def test_ready_ids_mean_themselves(tmp_path) -> None:
    """Bare ids of a file with a header of 32 bits, beyond what 16 bits hold."""
    tokens = [69_999, 5, 66_000]
    ends = struct.pack("<100Q", *range(3, 303, 3))
    (tmp_path / "a.ds").write_bytes(array("I", tokens * 100).tobytes())
    (tmp_path / "a.ds.index").write_bytes(ends)
    data = {"train": [str(tmp_path / "a.ds")], "validation": {"tail": 0.1}, "workers": 1}
    config = ids_run(tmp_path, "gpt2", "run", 70_000, **data)
    train_tokenizer(config)
    directory = prepare_data(config)
    found = documents_of(LoadedSplit(directory, "train", "decoder", 32, 8).store)
    assert found == [tokens] * 90


def test_nothing_is_read_to_make_it(tmp_path) -> None:
    config = ids_run(tmp_path, "gpt2", "run", train=[str(tmp_path / "not there yet.bin")])
    train_tokenizer(config)
    (tmp_path / "not there yet.bin").write_bytes(array("H", [1, 2]).tobytes())
    assert is_trained(config)


def test_ids_without_a_tokenizer_are_refused(tmp_path) -> None:
    (tmp_path / "a.bin").write_bytes(array("H", [1, 2]).tobytes())
    for data in ({"train": [str(tmp_path / "a.bin")]}, {"train": ["a.parquet"], "ids_field": "ids"}, {"from": "b"}):
        with pytest.raises(ValueError, match=r"no text to train one on; give tokenizer\.from"):
            train_tokenizer(run_config(tmp_path, **data))


def test_a_tokenizer_of_a_run_is_taken_byte_for_byte(tmp_path, monkeypatch) -> None:
    """From a directory and from a URL, so that its shards fit too."""
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    forget_servers()
    (tmp_path / "a.txt").write_text("\n".join(LINES))
    first = ids_run(tmp_path, "gpt2", "first", train=[str(tmp_path / "a.txt")], document="line", workers=1)
    train_tokenizer(first)
    prepare_data(first)
    url = f"memory://{tmp_path.name}"
    for path in first.directory.rglob("*"):
        if path.is_file():
            with fsspec.open(f"{url}/{path.relative_to(first.directory).as_posix()}", "wb") as file:
                file.write(path.read_bytes())
    for name, place in (("near", str(first.directory)), ("far", url)):
        plain = config_to_dict(run_config(tmp_path, "gpt2", name, **{"from": f"{place}/data"}))
        config = config_from_dict({**plain, "tokenizer": {"from": f"{place}/tokenizer"}})
        train_tokenizer(config)
        assert is_trained(config)
        digests = {read_manifest(run.directory / "tokenizer", "tokenizer").digest for run in (first, config)}
        assert len(digests) == 1
        made = read_manifest(prepare_data(config), "data")
        assert made.digest == read_manifest(first.directory / "data", "data").digest
        assert json.dumps(made.config).count(f"{place}/data") == 1
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)
    forget_servers()


def test_from_and_text_keys_do_not_go_together(tmp_path) -> None:
    for key, value in (("document", "line"), ("train", ["a.txt"]), ("dedup", "exact"), ("validation", {"tail": 0.1})):
        with pytest.raises(ConfigError, match=f"`{key}` has no effect"):
            run_config(tmp_path, **{"from": "runs/a/data", key: value})
    config = run_config(tmp_path, **{"from": "runs/a/data"})
    assert config_from_dict(config_to_dict(config)) == config_from_dict(config_to_dict(config))
    assert set(config_to_dict(config)["data"]) == {
        "from", "phases", "sequence_length", "max_documents_per_row", "workers", "verify"
    }  # fmt: skip
