"""lm-eval on an exported decoder: its bits per byte are those of `pretrain evaluate`, and where they differ, why."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem_builders import SENTENCES, make_tokenizer, publish, tiny
from transformers import AutoModelForCausalLM

from pretrain.evaluate import evaluate_model

lm_eval = pytest.importorskip("lm_eval")

LIKELIHOOD = """
task: our_bits
dataset_path: json
dataset_kwargs: {data_files: {test: TEXTS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""
CHOICES = """
task: our_choices
dataset_path: json
dataset_kwargs: {data_files: {test: TEXTS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{begin}}"
doc_to_choice: "{{ends}}"
doc_to_target: "{{right}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def harness(model: Path, root: Path, task: str, rows: list[dict[str, Any]], **keys: Any) -> dict[str, float]:
    """The scores of lm-eval's `hf` model on a task of rows."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    root.mkdir()
    texts = root / "rows.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "task.yaml").write_text(task.replace("TEXTS", str(texts)))
    name = task.split()[1]
    scored = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=3, **keys)
    manager = TaskManager(include_path=str(root), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=scored, tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    return {key.split(",")[0]: value for key, value in found["results"][name].items() if ",none" in key}


def ours(model: Path, texts: list[str], root: Path, **keys: Any) -> float:
    file = root / f"texts-{len(list(root.iterdir()))}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found: float = evaluate_model(model, [str(file)], device="cpu", **keys)["bits_per_byte"]
    return found


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock decoder: one whose tokenizer puts BOS before a text by itself, and one that does not."""
    root = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer(root / "tokenizer", request.param)
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) is (request.param == "llama")
    return publish(tiny(tokenizer, request.param), root / "model", root / "tokenizer")


def of_length(tokenizer: Any, divisor: int, windows: int) -> str:
    """A text of a number of tokens that `divisor` divides, longer than so many windows."""
    text = " ".join(SENTENCES)
    while len(tokenizer(text, add_special_tokens=False)["input_ids"]) % divisor:
        text = text[:-1]
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) > windows * divisor
    return text


def test_bits_per_byte_are_ours(model: Path, tmp_path: Path) -> None:
    """Documents within the window, and one of whole windows; each led by BOS once, white space and all counted."""
    tokenizer = make_tokenizer(model.parent / "tokenizer", "")
    texts = [*SENTENCES, "  spaces before and after  ", "caf\u00e9, \u6f22\u5b57\n", of_length(tokenizer, 64, 2)]
    theirs = harness(model, tmp_path / "task", LIKELIHOOD, [{"text": text} for text in texts], add_bos_token=False)
    assert theirs["bits_per_byte"] == pytest.approx(ours(model, texts, tmp_path), abs=1e-5)


@pytest.mark.slow
def test_where_bits_per_byte_differ(model: Path, tmp_path: Path) -> None:
    """lm-eval fills the last window of a long document with text that was scored before, and knows special tokens."""
    from lm_eval.utils import get_rolling_token_windows

    tokenizer = make_tokenizer(model.parent / "tokenizer", "")
    stock = AutoModelForCausalLM.from_pretrained(model).eval()

    def harness_bits(text: str, ids: list[int]) -> float:
        nats = 0.0
        for given, wanted in get_rolling_token_windows(ids, tokenizer.bos_token_id, 64, 1):
            with torch.no_grad():
                scores = stock(input_ids=torch.tensor([given])).logits[0, -len(wanted) :].log_softmax(-1)
            nats -= float(scores.double().gather(1, torch.tensor(wanted)[:, None]).sum())
        return nats / math.log(2) / len(text.encode())

    long = of_length(tokenizer, 64, 2)[:-9]
    for number, text in enumerate((long, f"a text with {tokenizer.eos_token} in it")):
        theirs = harness(model, tmp_path / str(number), LIKELIHOOD, [{"text": text}], add_bos_token=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert theirs["bits_per_byte"] == pytest.approx(harness_bits(text, ids), abs=1e-5)
        assert abs(theirs["bits_per_byte"] - ours(model, [text], tmp_path)) > 1e-4


@pytest.mark.slow
def test_choices_are_scored(model: Path, tmp_path: Path) -> None:
    """The end that the model finds likelier is the one that lm-eval counts as chosen."""
    tokenizer = make_tokenizer(model.parent / "tokenizer", "")
    stock = AutoModelForCausalLM.from_pretrained(model).eval()

    def score(begin: str, end: str) -> float:
        first, ids = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (begin, begin + end))
        with torch.no_grad():
            said = stock(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return float(said.gather(1, ids[0, 1:, None])[first.shape[1] - 1 :].sum())

    rows = []
    for sentence in SENTENCES:
        begin, ends = sentence[:20].rstrip(), [sentence[len(sentence[:20].rstrip()) :], " and the cat"]
        likelier = int(score(begin, ends[1]) > score(begin, ends[0]))
        rows.append({"begin": begin, "ends": ends, "right": likelier})
    assert harness(model, tmp_path / "task", CHOICES, rows)["acc"] == 1.0
