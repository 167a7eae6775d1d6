"""transformers' pipelines and Auto classes say what our models say, where this package cannot be imported.

Every head, as the stock class that holds it and as Loom's own with its code. Version 5 has no pipelines for answers,
choices and encoder-decoders any more: the Auto classes stand for those.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import load_elsewhere as elsewhere
import pytest
import torch
from ecosystem_builders import make_tokenizer, publish, tiny
from transformers import AutoModelForSequenceClassification

from pretrain.models import LoomEncoderConfig, LoomEncoderForSequenceClassification

# Shapes without a stock home.
HOMELESS: dict[str, dict[str, Any]] = {
    "modernbert": {"position_kind": "learned", "first_norm": True},
    "gpt2": {"position_kind": "alibi", "qk_norm": "per_head", "block_kind": "parallel"},
    "transformer": {"norm_placement": "pre", "position_kind": "relative"},
}
LABELS = {0: "no", 1: "yes", 2: "perhaps"}
# task of the class -> what is asked of it, with the keys of its config
ENCODER_HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fill": ("pretraining", "fill", {}),
    "stack": ("pretraining", "stack", {}),
    "embed": ("base", "embed", {}),
    "one-label": ("classification", "label", {"id2label": LABELS}),
    "several-labels": (
        "classification",
        "label",
        {"id2label": LABELS, "problem_type": "multi_label_classification"},
    ),
    "number": ("classification", "label", {"id2label": {0: "grade"}, "problem_type": "regression"}),
    "tag": ("token_classification", "tag", {"id2label": LABELS}),
    "answer": ("question_answering", "answer", {}),
    "choose": ("multiple_choice", "choose", {}),
}
DECODER_HEADS = {
    "write": ("pretraining", "write_on", {}),
    "stack": ENCODER_HEADS["stack"],
    "one-label": ENCODER_HEADS["one-label"],
    "tag": ENCODER_HEADS["tag"],
    "answer": ENCODER_HEADS["answer"],
}
SEQ2SEQ_HEADS = {"translate": ("pretraining", "translate", {})}
DESIGNS: list[tuple[str, bool, dict[str, tuple[str, str, dict[str, Any]]]]] = [
    ("bert", False, {head: ENCODER_HEADS[head] for head in ("fill", "one-label", "answer", "choose")}),
    ("modernbert", False, ENCODER_HEADS),
    ("llama", False, {"write": DECODER_HEADS["write"], "one-label": DECODER_HEADS["one-label"]}),
    ("gpt2", False, {"write": DECODER_HEADS["write"], "tag": DECODER_HEADS["tag"]}),
    ("transformer", False, SEQ2SEQ_HEADS),
    ("t5", False, SEQ2SEQ_HEADS),
    ("modernbert", True, ENCODER_HEADS),
    ("gpt2", True, DECODER_HEADS),
    ("transformer", True, SEQ2SEQ_HEADS),
]
CASES = {
    f"{architecture}-{'code' if code else 'stock'}-{head}": (architecture, code, *what)
    for architecture, code, heads in DESIGNS
    for head, what in heads.items()
}


class Answers:
    """Our models by case, their tokenizers, and what their directories said elsewhere."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models: dict[str, Any] = {}
        cases = [self._publish(name, *case) for name, case in CASES.items()]
        # Read here by the Auto class, as after fine-tuning, and saved again: the code must go along.
        directory = root / "modernbert-code-one-label"
        for registered in (LoomEncoderForSequenceClassification, LoomEncoderConfig):  # as in a process of its own
            registered._auto_class = None
        AutoModelForSequenceClassification.from_pretrained(directory).save_pretrained(root / "saved-again")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (root / "saved-again" / file).write_bytes((directory / file).read_bytes())
        cases.append({"name": "saved-again", "task": "label", "directory": str(root / "saved-again"), "code": True})
        (root / "cases.json").write_text(json.dumps(cases))
        environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            [sys.executable, "-P", elsewhere.__file__, str(root)],
            check=False,
            capture_output=True,
            text=True,
            timeout=400,
            cwd=root,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        self.said: dict[str, Any] = json.loads((root / "said.json").read_text())

    def tokenizer(self, architecture: str) -> Any:
        return make_tokenizer(self.root / f"tokenizer-{architecture}", architecture)

    def _publish(self, name: str, architecture: str, code: bool, task: str, ask: str, keys: dict[str, Any]) -> Any:
        shape = HOMELESS[architecture] if code else {}
        model = tiny(self.tokenizer(architecture), architecture, task, settings=keys, **shape)
        publish(model, self.root / name, self.root / f"tokenizer-{architecture}")
        self.models[name] = model
        return {"name": name, "task": ask, "directory": str(self.root / name), "code": code}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return Answers(tmp_path_factory.mktemp("elsewhere"))


@pytest.mark.parametrize("name", CASES)
def test_a_head_says_the_same_where_this_package_is_not_installed(name: str, answers: Answers) -> None:
    architecture, code, _, ask, _ = CASES[name]
    found = answers.said[name]
    assert "error" not in found, found
    assert found["module"].startswith("transformers_modules." if code else "transformers.models.")
    assert found["class"].startswith("Loom") is code
    with torch.no_grad():
        EXPECTED[ask](answers.models[name], answers.tokenizer(architecture), found["said"])


def test_a_model_that_was_read_and_saved_again_brings_its_code_along(answers: Answers) -> None:
    assert "error" not in answers.said["saved-again"], answers.said["saved-again"]
    again, before = answers.said["saved-again"], answers.said["modernbert-code-one-label"]
    assert again["module"].startswith("transformers_modules.")
    assert again["said"] == before["said"]


def near(said: Any, expected: torch.Tensor) -> None:
    assert torch.allclose(torch.tensor(said), expected, atol=1e-5, rtol=1e-4)


def _fill(model: Any, tokenizer: Any, said: Any) -> None:
    given = tokenizer(f"the small {tokenizer.mask_token} sat", return_tensors="pt")
    place = (given["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
    likeliest = model(**given).logits[0, place].softmax(-1).topk(3)
    assert [token for token, _ in said] == likeliest.indices.tolist()
    near([score for _, score in said], likeliest.values)


def _label(model: Any, tokenizer: Any, said: Any) -> None:
    logits = model(**tokenizer(elsewhere.TEXTS, padding=True, return_tensors="pt")).logits
    of_kind = {"multi_label_classification": torch.sigmoid, "regression": lambda logits: logits}
    scores = of_kind.get(model.config.problem_type, lambda logits: logits.softmax(-1))(logits)
    names = model.config.id2label.values()
    assert {frozenset(entries) for entries in said} == {frozenset(names)}
    near([[entries[name] for name in names] for entries in said], scores)


def _tag(model: Any, tokenizer: Any, said: Any) -> None:
    given = tokenizer(elsewhere.TEXTS[0], return_tensors="pt")
    special = tokenizer(elsewhere.TEXTS[0], return_special_tokens_mask=True)["special_tokens_mask"]
    scores, labels = model(**given).logits[0].softmax(-1).max(-1)
    places = [index for index, is_special in enumerate(special) if not is_special]
    assert [index for index, _, _ in said] == places
    assert [name for _, name, _ in said] == [LABELS[int(labels[index])] for index in places]
    near([score for _, _, score in said], scores[places])


def _stack(model: Any, tokenizer: Any, said: Any) -> None:
    near(said, model.model(**tokenizer(elsewhere.TEXTS[0], return_tensors="pt")).last_hidden_state[0])


def _embed(model: Any, tokenizer: Any, said: Any) -> None:
    near(said, model(**tokenizer(elsewhere.TEXTS[0], return_tensors="pt")).last_hidden_state)


def _write_on(model: Any, tokenizer: Any, said: Any) -> None:
    given = tokenizer(elsewhere.TEXTS[0], return_tensors="pt")
    ids = given["input_ids"]
    for _ in range(6):  # each time from the start, without a cache
        ids = torch.cat((ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    assert said == tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


def _answer(model: Any, tokenizer: Any, said: Any) -> None:
    given = tokenizer(elsewhere.QUESTION, elsewhere.CONTEXT, return_tensors="pt")
    output = model(**given)
    spans = {}
    places = [index for index, number in enumerate(given.sequence_ids(0)) if number == 1]
    for start in places:
        for end in places:
            if start <= end:
                text = elsewhere.CONTEXT[given.token_to_chars(start).start : given.token_to_chars(end).end]
                spans[text] = float(output.start_logits[0, start] + output.end_logits[0, end])
    text, score = said
    assert score == pytest.approx(max(spans.values()), abs=1e-4)
    assert spans[text] == pytest.approx(score, abs=1e-4)


def _choose(model: Any, tokenizer: Any, said: Any) -> None:
    # Each choice alone: what the others are and how far they are padded must not matter.
    for choice, score in zip(elsewhere.CHOICES, said, strict=True):
        given = tokenizer(elsewhere.TEXTS[0], choice, return_tensors="pt")
        near(score, model(**{name: tensor[None] for name, tensor in given.items()}).logits[0, 0])


def _translate(model: Any, tokenizer: Any, said: Any) -> None:
    given = tokenizer(elsewhere.TEXTS[0], return_tensors="pt")
    output = model.generate(given["input_ids"], max_new_tokens=8, num_beams=3)
    ids, logits = said
    assert ids == output[0].tolist()
    near(logits, model(**given, decoder_input_ids=torch.tensor([elsewhere.OUTPUT])).logits[0])


EXPECTED = {
    "fill": _fill,
    "label": _label,
    "tag": _tag,
    "embed": _embed,
    "write_on": _write_on,
    "answer": _answer,
    "choose": _choose,
    "translate": _translate,
    "stack": _stack,
}
