"""Libraries load a published directory, and transformers 4.57 reads it, in processes that cannot import this package.

What the libraries make of our models in detail stands in the other `test_ecosystem_*` files; here nothing of ours is
there to help.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import libraries_elsewhere as libraries
import load_elsewhere
import pytest
import torch
from ecosystem_builders import make_tokenizer, publish, tiny

from pretrain.evaluate import evaluate_model

# form -> (architecture, whether it comes with its code, keys of its config)
FORMS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "encoder": ("modernbert", False, {}),
    "encoder-with-code": ("modernbert", True, {"position_kind": "learned", "first_norm": True}),
    "decoder": ("llama", False, {}),
    "decoder-with-code": ("gpt2", True, {"position_kind": "alibi", "qk_norm": "per_head"}),
}
PACKAGES = {"sentences": "sentence_transformers", "adapters": "peft", "sft": "trl", "dpo": "trl"}
PACKAGES |= {"onnx": "onnxruntime", "harness": "lm_eval"}
OF_ENCODERS, OF_DECODERS = ("sentences", "adapters", "onnx"), ("adapters", "sft", "dpo", "harness")
CASES = {
    f"{form}-{library}": (form, library)
    for form in FORMS
    for library in (OF_ENCODERS if form.startswith("encoder") else OF_DECODERS)
}


def run(script: str, root: Path, cases: list[dict[str, Any]], path: str | None = None) -> dict[str, Any]:
    """What a script said to its cases, in a process of its own, with packages of another folder before the others."""
    (root / "cases.json").write_text(json.dumps(cases))
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    environment |= {} if path is None else {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-P", script, str(root)],
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
        cwd=root,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, Any] = json.loads((root / "said.json").read_text())
    return said


def published(root: Path, form: str) -> Path:
    architecture, _, keys = FORMS[form]
    if not (root / form).exists():
        tokenizer = make_tokenizer(root / f"tokenizer-{architecture}", architecture)
        publish(tiny(tokenizer, architecture, **keys), root / form, root / f"tokenizer-{architecture}")
    return root / form


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("fresh")
    cases = [
        {"name": name, "library": library, "directory": str(published(root, form)), "code": FORMS[form][1]}
        for name, (form, library) in CASES.items()
        if importlib.util.find_spec(PACKAGES[library]) is not None
    ]
    return root, run(libraries.__file__, root, cases)


@pytest.mark.slow  # the imports of all these libraries take most of a minute
@pytest.mark.parametrize("name", CASES)
def test_a_library_takes_the_directory(name: str, said: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    form, library = CASES[name]
    if importlib.util.find_spec(PACKAGES[library]) is None:
        pytest.skip(f"{PACKAGES[library]} is not installed")
    root, answers = said
    found = answers[name]
    assert isinstance(found, list), found
    assert all(math.isfinite(number) for number in found)
    if library in ("adapters", "sft", "dpo"):
        assert found[-1] < 0.95 * found[0]
    if library == "dpo":
        assert found[0] == pytest.approx(math.log(2), abs=1e-3)
    if library == "onnx":
        assert found[0] < 1e-4
    if library == "harness":
        text = tmp_path / "texts.jsonl"
        text.write_text("".join(json.dumps({"text": text}) + "\n" for text in libraries.TEXTS))
        assert found[0] == pytest.approx(
            evaluate_model(root / form, [str(text)], device="cpu")["bits_per_byte"], rel=1e-5
        )
    if library == "sentences":
        assert torch.allclose(torch.tensor(found), vector(root, form), atol=1e-5, rtol=1e-4)


def vector(root: Path, form: str) -> torch.Tensor:
    """The mean of the last hidden states of the first text."""
    architecture, _, keys = FORMS[form]
    tokenizer = make_tokenizer(root / f"tokenizer-{architecture}", architecture)
    model = tiny(tokenizer, architecture, **keys)
    with torch.no_grad():
        states: torch.Tensor = model.model(**tokenizer(libraries.TEXTS[0], return_tensors="pt")).last_hidden_state
    return states[0].mean(dim=0)


OLD = {
    "bert": "fill",
    "modernbert": "fill",
    "llama": "write_on",
    "gpt2": "write_on",
    "transformer": "translate",
    "t5": "translate",
}


@pytest.mark.slow
def test_pipelines_of_transformers_4_57_say_the_same(tmp_path: Path) -> None:
    """Masks filled, text continued, and the Auto classes of encoder-decoders, as by the transformers of here."""
    old = os.environ.get("PRETRAIN_TRANSFORMERS_457")
    if not old:
        pytest.skip("PRETRAIN_TRANSFORMERS_457 is not set: give it a directory that holds transformers 4.57")
    cases = []
    for architecture, task in OLD.items():
        place = tmp_path / f"tokenizer-{architecture}"
        directory = publish(tiny(make_tokenizer(place, architecture), architecture), tmp_path / architecture, place)
        cases.append({"name": architecture, "task": task, "directory": str(directory), "code": False})
    before = run(load_elsewhere.__file__, tmp_path, cases, old)
    now = run(load_elsewhere.__file__, tmp_path, cases)
    for name, answer in now.items():
        assert before[name].get("said") is not None, before[name]
        assert flat(before[name]["said"]) == pytest.approx(flat(answer["said"]), abs=1e-5, rel=1e-4), name


def flat(said: Any) -> list[Any]:
    """Numbers in nested lists; of texts, their letters' numbers."""
    if isinstance(said, str):
        return list(map(ord, said))
    return [number for part in said for number in flat(part)] if isinstance(said, list) else [said]
