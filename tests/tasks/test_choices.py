"""Each choice is scored beside the others of its row, whatever their number, by encoders and by decoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForMultipleChoice, AutoModelForSequenceClassification, ModernBertForMaskedLM

from pretrain.config_task import MultipleChoiceTask, load_tuning
from pretrain.finetune import finetune
from pretrain.ranks import Ranks
from pretrain.tasks import make_task
from pretrain.tasks.choices import Choices
from pretrain.tasks.examples import IGNORED
from pretrain.tasks.heads import install
from pretrain.tasks.rows import Row
from tests.tasks.small_tokenizers import byte_bpe, config_of, drawn, wordpiece

ENDINGS = [["on the mat", "periodic"], ["a tree", "the war", "cats running and jumping", "1869"], ["a dog", "a", "ran"]]


def rows_of(*labels: Any) -> list[Row]:
    return [
        Row({"question": "The old cat sat", "choices": endings, "label": label}, f"x:{number}")
        for number, (endings, label) in enumerate(zip(ENDINGS, labels, strict=False), start=1)
    ]


def task_of(tokenizer: Any, rows: list[Row], *, causal: bool = False, **keys: Any) -> Choices:
    task = make_task(MultipleChoiceTask(kind="multiple-choice", train=("x",), **keys), tokenizer, causal=causal)
    assert isinstance(task, Choices)
    task.fit(rows)
    return task


def batch_of(task: Choices, rows: list[Row]) -> dict[str, torch.Tensor]:
    made = task.collate(task.encode(rows, training=True))
    return {name: torch.from_numpy(array) for name, array in made.items()}


def model_of(task: Choices, architecture: str) -> Any:
    auto: Any = AutoModelForSequenceClassification if task.causal else AutoModelForMultipleChoice
    assert task.auto_class == auto.__name__
    config = config_of(architecture, **task.model_keys())
    if architecture == "modernbert":
        config.classifier_pooling = "mean"
    return drawn(auto.from_config(config))


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_the_loss_is_that_of_the_stock_class(architecture: str) -> None:
    rows = [Row({**row.values, "choices": row["choices"][:2]}, row.where) for row in rows_of(0, 1, 1)]
    task = task_of(wordpiece(), rows)
    batch = batch_of(task, rows)
    if architecture == "modernbert":
        batch.pop("token_type_ids")
    labels = batch.pop("labels")
    model = model_of(task, architecture)
    stock = model(**batch, labels=torch.tensor([0, 1, 1])).loss
    install(model, task)
    assert (labels != IGNORED).sum() == len(rows)
    torch.testing.assert_close(model(**batch, labels=labels, num_items_in_batch=3).loss, stock)


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "gpt2", "llama"])
def test_rows_of_unlike_numbers_of_choices_do_not_touch_each_other(architecture: str) -> None:
    causal = architecture in ("gpt2", "llama")
    tokenizer = byte_bpe() if causal else wordpiece()
    rows = rows_of(1, 3, 0)
    task = task_of(tokenizer, rows, causal=causal)
    model = model_of(task, architecture)
    install(model, task)
    batch = batch_of(task, rows)
    together = model(**batch, num_items_in_batch=1).loss.detach()
    alone = [model(**batch_of(task, [row]), num_items_in_batch=1).loss.detach() for row in rows]
    torch.testing.assert_close(together, sum(alone))
    labels = batch.pop("labels")
    logits = model(**batch).logits
    assert logits.shape == labels.shape == (3, 4)
    assert torch.isfinite(logits).all()
    found = task.evaluate(model, rows, task.encode(rows, training=False), torch.device("cpu"), Ranks.alone())
    counts = [len(row["choices"]) for row in rows]
    assert found.predictions == [int(one[:count].argmax()) for one, count in zip(logits, counts, strict=True)]
    assert found.scores["loss"] == pytest.approx(float(together) / 3, rel=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_decoder_scores_each_choice_at_its_last_token(architecture: str) -> None:
    rows = rows_of(0, 0)
    task = task_of(byte_bpe(), rows, causal=True)
    model = model_of(task, architecture)
    single = [
        float(model(**byte_bpe()("The old cat sat", "\n" + ending, return_tensors="pt")).logits.detach())
        for row in rows
        for ending in row["choices"]
    ]
    install(model, task)
    batch = batch_of(task, rows)
    batch.pop("labels")
    logits = model(**batch).logits
    assert [*logits[0, :2].tolist(), *logits[1].tolist()] == pytest.approx(single, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "right"),
    [
        ((0, 3, 2), [0, 3, 2]),
        (("1", "0", "2"), [1, 0, 2]),
        (("A", "d", "C"), [0, 3, 2]),
        (("periodic", "1869", "a"), [1, 3, 1]),
        ((["a tree", "on the mat"], ["the war"], ["ran", "a dog"]), [0, 1, 2]),
    ],
)
def test_labels_are_read_as_numbers_letters_or_texts(labels: Any, right: list[int]) -> None:
    task = task_of(wordpiece(), rows_of(*labels))
    examples = task.encode(rows_of(*labels), training=True)
    assert [int((example.label != IGNORED).argmax()) for example in examples] == right
    assert [int(example.label.max()) for example in examples] == [2, 4, 3]


def test_choices_may_be_columns_or_bring_their_names() -> None:
    columns = [Row({"p": "x", "asked": "cause", "one": "a", "two": "b", "label": name}, "x") for name in ("one", "two")]
    task = task_of(wordpiece(), columns, question=("p", "asked"), choices=("one", "two"))
    examples = task.encode(columns, training=True)
    assert [int((example.label != IGNORED).argmax()) for example in examples] == [0, 1]
    assert examples[0].inputs["input_ids"][1].tolist() == wordpiece()("x cause", "b")["input_ids"]
    named = Row({"question": "x", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "label": "2"}, "x")
    assert task_of(wordpiece(), [named]).encode([named], training=True)[0].extra == [1]


def test_a_batch_without_targets_has_no_loss_but_gradients() -> None:
    task = task_of(wordpiece(), rows_of(0, 1))
    model = model_of(task, "bert")
    install(model, task)
    batch = batch_of(task, rows_of(0, 1))
    loss = model(**batch | {"labels": torch.full_like(batch["labels"], IGNORED)}, num_items_in_batch=1).loss
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not model.classifier.weight.grad.any()


def test_any_right_label_counts() -> None:
    rows = rows_of(["on the mat", "periodic"])
    task = task_of(wordpiece(), rows)
    example = task.encode(rows, training=False)
    assert task.score(rows, example, [[0.0, 1.0]]).scores["accuracy"] == 1.0


def test_a_long_row_is_cut() -> None:
    rows = [Row({"question": "cat " * 50, "choices": ["on the mat", "a"], "label": 0}, "x")]
    inputs = task_of(wordpiece(), rows, max_length=20).encode(rows, training=True)[0].inputs
    assert inputs["input_ids"].shape == (2, 20)
    ending = wordpiece()("on the mat", add_special_tokens=False)["input_ids"]
    assert inputs["input_ids"][0].tolist()[-len(ending) - 1 : -1] == ending


def test_rows_that_cannot_be_meant_are_refused_by_their_place() -> None:
    with pytest.raises(ValueError, match=r"x:2: the label 4 is no number of the 4 choices \(numbers are from 0"):
        task_of(wordpiece(), rows_of("0", 4))
    task = task_of(wordpiece(), rows_of(0, 1))
    with pytest.raises(ValueError, match="x:1: the label -1 is no number of its 2 choices"):
        task.encode(rows_of(-1), training=False)
    for choices in ("a", ["a"], [1, 2]):
        with pytest.raises(ValueError, match=r"x: the choices are .*two texts or more"):
            task_of(wordpiece(), [Row({"question": "q", "choices": choices, "label": 0}, "x")])


@pytest.mark.parametrize("name", ["superglue-copa", "superglue-record"])
def test_shipped_tasks_are_read(name: str) -> None:
    assert load_tuning(name).task.kind == "multiple-choice"


def test_a_tiny_model_is_trained_and_scored(tmp_path: Path) -> None:
    lines = [json.dumps({"question": "cat", "choices": ENDINGS[one % 3], "label": one % 2}) for one in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    ModernBertForMaskedLM(config_of("modernbert")).save_pretrained(tmp_path / "model")
    wordpiece().save_pretrained(tmp_path / "model")
    (tmp_path / "choice.yaml").write_text(
        "name: choice\ntask: {kind: multiple-choice, train: [rows.jsonl], validation: [rows.jsonl]}\n"
    )
    overrides = [f"task.root={tmp_path}", f"out={tmp_path}", "train.steps=4", "train.batch_size=4"]
    config = load_tuning(tmp_path / "choice.yaml", overrides)
    assert finetune(tmp_path / "model", config, console=Console(quiet=True)) == 0
    result = json.loads((tmp_path / "choice" / "result.json").read_text())
    assert set(result["summary"]) == {"validation/accuracy", "validation/loss"}
    AutoModelForMultipleChoice.from_pretrained(tmp_path / "choice" / "model")
