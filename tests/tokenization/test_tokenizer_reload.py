"""The directory: `AutoTokenizer` of transformers 5 and 4.57 loads it, and saving changes no byte of tokenizer.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sample_texts import ALGORITHMS, ARCHITECTURES, trained
from transformers import AutoTokenizer

from pretrain.tokenization import special_tokens_for, write_tokenizer

TEXTS = ["Walking the café, 天地玄黄。", "  two  spaces\n12345", "[MASK] talking <|mine|>", "😀 Ω"]

# Runs in both versions, and in a process that never imports the package.
_RELOAD = """
import json, sys
from transformers import AutoTokenizer, __version__
texts, result = json.loads(sys.argv[1]), {}
for directory in sys.argv[3:]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    saved = directory + "-saved-" + __version__
    tokenizer.save_pretrained(saved)
    again = AutoTokenizer.from_pretrained(saved)
    result[directory] = {
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "ids_again": [again(text)["input_ids"] for text in texts],
        "decoded": [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in texts],
        "length": len(tokenizer),
        "max_length": tokenizer.model_max_length,
        "names": list(tokenizer.model_input_names),
        "specials": {role: getattr(tokenizer, role) for role in sys.argv[2].split(",")},
        "same_bytes": open(directory + "/tokenizer.json", "rb").read() == open(saved + "/tokenizer.json", "rb").read(),
        "same_values": json.load(open(directory + "/tokenizer.json")) == json.load(open(saved + "/tokenizer.json")),
        "cleans_up": tokenizer.clean_up_tokenization_spaces,
    }
assert "pretrain" not in sys.modules
json.dump({"version": __version__, "result": result}, sys.stdout)
"""
_ROLES = "pad_token,unk_token,cls_token,sep_token,mask_token,bos_token,eos_token"


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for algorithm in ALGORITHMS:
        for architecture in ARCHITECTURES:
            directory = tmp_path_factory.mktemp(f"{algorithm}-{architecture}-")
            write_tokenizer(
                directory, trained(algorithm, architecture, special_tokens=("<|mine|>",)), model_max_length=77
            )
            made.append(directory)
    return made


def reload(directories: list[Path], extra_path: str | None = None) -> dict[str, object]:
    path = os.pathsep.join(filter(None, (extra_path, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", _RELOAD, json.dumps(TEXTS), _ROLES, *map(str, directories)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def check(directories: list[Path], answer: dict[str, object]) -> None:
    result = answer["result"]
    assert isinstance(result, dict)
    for directory in directories:
        got = result[str(directory)]
        architecture = directory.name.split("-")[-2]
        here = AutoTokenizer.from_pretrained(directory)
        assert got["ids"] == [here(text)["input_ids"] for text in TEXTS]
        assert got["ids_again"] == got["ids"]
        assert got["same_values"]
        assert (got["max_length"], got["cleans_up"]) == (77, False)
        assert got["length"] % 64 == 0
        assert ("token_type_ids" in got["names"]) == (architecture == "bert")
        roles = special_tokens_for(architecture).roles
        assert {role: token for role, token in got["specials"].items() if role in roles} == dict(roles)
        if "wordpiece" not in directory.name:
            assert got["decoded"][0] == TEXTS[0]
            assert got["decoded"][1] == TEXTS[1]
            assert got["decoded"][3] == TEXTS[3]


def test_this_version(directories: list[Path]) -> None:
    answer = reload(directories)
    check(directories, answer)
    assert all(got["same_bytes"] for got in answer["result"].values())  # type: ignore[attr-defined]


@pytest.mark.skipif(
    "PRETRAIN_TRANSFORMERS_457" not in os.environ,
    reason="transformers 4.57 is not here: PRETRAIN_TRANSFORMERS_457 names no directory with it",
)
def test_transformers_4_57(directories: list[Path]) -> None:
    answer = reload(directories, os.environ["PRETRAIN_TRANSFORMERS_457"])
    assert str(answer["version"]).startswith("4.57")
    check(directories, answer)


def test_pairs_and_padding(directories: list[Path]) -> None:
    for directory in directories:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        batch = tokenizer(["walk", "walking talking jumps"], padding=True, return_tensors="np")
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["input_ids"][0, -1] == tokenizer.pad_token_id
        if "-bert-" in directory.name:
            assert set(tokenizer("walk", "talk")["token_type_ids"]) == {0, 1}


def test_the_class_is_one_that_both_versions_know(directories: list[Path]) -> None:
    for directory in directories:
        written = json.loads((directory / "tokenizer_config.json").read_text())
        assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "token_type_ids" not in written["model_input_names"] or "-bert-" in directory.name
