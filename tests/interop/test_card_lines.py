"""The lines of a model card load the model and use it, in a process where this package cannot be imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ecosystem_builders import make_tokenizer, publish, tiny

from pretrain.card import CARD, readdressed, write_card
from pretrain.cards.facts import GENERATOR

# name -> (architecture, keys of its config); those without a stock home come with their code
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "encoder": ("bert", {}),
    "decoder": ("llama", {}),
    "encoder-decoder": ("transformer", {}),
    "t5": ("t5", {}),
    "detector": ("electra", {"generator_size": 0.5}),
    "encoder-with-code": ("modernbert", {"position_kind": "learned", "first_norm": True}),
    "decoder-with-code": ("gpt2", {"position_kind": "alibi", "qk_norm": "per_head", "block_kind": "parallel"}),
    "encoder-decoder-with-code": ("transformer", {"norm_placement": "pre", "position_kind": "relative"}),
    "detector-with-code": ("modernbert", {"position_kind": "alibi", "generator_size": 0.5}),
}
HEADS = {
    "classifier": ("bert", "classification"),
    "tagger": ("bert", "token_classification"),
    "answerer": ("bert", "question_answering"),
    "chooser": ("bert", "multiple_choice"),
    "stack": ("modernbert", "base"),
}
# Runs every piece of code it is given, each in names of its own, and says what it printed or how it failed.
RUNNER = """
import contextlib, io, json, sys
sys.modules["pretrain"] = None  # an import of it fails
said = {}
for name, code in json.load(open("cases.json")).items():
    out, names = io.StringIO(), {}
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(code, name, "exec"), names)
        said[name] = [type(names["model"]).__name__, out.getvalue()]
    except Exception as error:  # whatever it is, the test of this card tells it
        said[name] = [repr(error), None]
json.dump(said, open("said.json", "w"))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By form: the class that the lines of its card loaded, and what they printed."""
    root = tmp_path_factory.mktemp("cards")
    cases = {name: _code(_published(root / name, *what)) for name, what in FORMS.items()}
    for name, (architecture, task) in HEADS.items():
        cases[name] = _code(_published(root / name, architecture, {}, task))
    (root / "cases.json").write_text(json.dumps(cases))
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-P", "-c", RUNNER]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MISSING" not in done.stderr, done.stderr[-3000:]  # so does transformers tell of weights that it had to draw
    found: dict[str, list[Any]] = json.loads((root / "said.json").read_text())
    return found


def _published(directory: Path, architecture: str, keys: dict[str, Any], task: str = "pretraining") -> Path:
    place = directory.parent / f"tokenizer-{architecture}"
    task = "replaced_token_detection" if "generator_size" in keys else task
    model = tiny(make_tokenizer(place, architecture), architecture, task, **keys)
    if "generator_size" not in keys:
        return publish(model, directory, place)
    detector, generator = model.published_parts()
    publish(generator, publish(detector, directory, place) / GENERATOR, place)
    return directory


def _code(directory: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)\n```", write_card(directory).read_text(), re.DOTALL)
    return str(code)


@pytest.mark.parametrize(
    ("form", "loaded"),
    [
        ("encoder", "BertForMaskedLM"),
        ("decoder", "LlamaForCausalLM"),
        ("encoder-decoder", "MarianMTModel"),
        ("t5", "T5ForConditionalGeneration"),
        ("detector", "ElectraForPreTraining"),
        ("encoder-with-code", "LoomEncoderForMaskedLM"),
        ("decoder-with-code", "LoomDecoderForCausalLM"),
        ("encoder-decoder-with-code", "LoomSeq2SeqForConditionalGeneration"),
        ("detector-with-code", "LoomEncoderForReplacedTokenDetection"),
        ("classifier", "BertForSequenceClassification"),
        ("tagger", "BertForTokenClassification"),
        ("answerer", "BertForQuestionAnswering"),
        ("chooser", "BertForMultipleChoice"),
        ("stack", "ModernBertModel"),
    ],
)
def test_the_lines_of_a_card_run_as_they_stand(form: str, loaded: str, said: dict[str, list[Any]]) -> None:
    assert said[form][0] == loaded
    assert said[form][1] is not None
    assert said[form][1].endswith("\n")


def test_a_card_can_be_given_the_name_of_a_repository(tmp_path: Path) -> None:
    directory = _published(tmp_path / "model", "bert", {})
    write_card(directory)
    card = (directory / CARD).read_text()
    assert 'place = "model"\n' in card
    assert 'place = "me/it"\n' in readdressed(card, "me/it")
    assert write_card(directory, repository="me/it", overwrite=True).read_text().count('place = "me/it"') == 1
