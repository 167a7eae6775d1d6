"""Classification and regression: losses as the stock class computes them, labels, scores, the baseline beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    ModernBertForSequenceClassification,
)

from pretrain.config import validated
from pretrain.config_task import TaskConfig, TuningConfig
from pretrain.ranks import Ranks
from pretrain.tasks import bag_of_words, make_task
from pretrain.tasks.base import prediction_lines
from pretrain.tasks.examples import TaskData
from pretrain.tasks.heads import install
from pretrain.tasks.reading import Parts
from pretrain.tasks.rows import Row
from pretrain.training.feed import without_targets
from tests.tasks.small_tokenizers import byte_bpe, config_of, drawn, wordpiece

TEXTS = ["The old cat sat", "a friend ran", "Who published the periodic table?", "cats", "jumping cats don't like"]


def task_of(**keys: Any) -> TaskConfig:
    keys = {"train": ["a"], "max_length": 32} | keys
    return validated(TuningConfig, {"name": "x", "task": keys}, "test").task


def rows_of(labels: Sequence[Any], **columns: Sequence[Any]) -> list[Row]:
    columns = {"text": (TEXTS * len(labels))[: len(labels)], "label": labels} | columns
    return [
        Row({name: values[place] for name, values in columns.items()}, f"a.tsv:{place + 2}")
        for place in range(len(labels))
    ]


MODELS = {
    "bert": (BertForSequenceClassification, wordpiece),
    "modernbert": (ModernBertForSequenceClassification, wordpiece),
    "gpt2": (GPT2ForSequenceClassification, byte_bpe),
}
KINDS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "single": ({"kind": "classification"}, ["a", "b", "c", "a", "b"]),
    "several": ({"kind": "classification", "multi_label": True}, ["a", "a,c", "", "b", "a,b,c"]),
    "number": ({"kind": "regression"}, ["1.5", "2", "5", "3.25", "4"]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_the_loss_is_that_of_the_class(model: str, kind: str) -> None:
    """A mean over the rows; of several labels over rows and labels, of numbers over their variance."""
    keys, labels = KINDS[kind]
    make, tokenizer = MODELS[model]
    rows = rows_of(labels)
    task = make_task(task_of(**keys), tokenizer(), causal=model == "gpt2")
    task.fit(rows)
    config = config_of(model)
    for key, value in task.model_keys().items():
        setattr(config, key, value)
    stock = drawn(make(config))
    examples = task.encode(rows, training=True)
    batch = {name: torch.from_numpy(array) for name, array in task.collate(examples).items()}
    theirs = stock(**{name: value for name, value in batch.items() if name in ("input_ids", "attention_mask")}, labels=
                   batch["labels"]).loss  # fmt: skip
    install(stock, task)
    count = int((batch["labels"] != -100).sum())
    ours = stock(**{name: value for name, value in batch.items() if name != "token_type_ids"}, num_items_in_batch=count)
    scale = task.spread**2 if kind == "number" else 1.0
    assert float(ours.loss) * scale == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_idle_rows_change_nothing(kind: str) -> None:
    keys, labels = KINDS[kind]
    rows = rows_of(labels)
    task = make_task(task_of(**keys), wordpiece(), causal=False)
    task.fit(rows)
    config = config_of("bert")
    for key, value in task.model_keys().items():
        setattr(config, key, value)
    model = drawn(BertForSequenceClassification(config))
    install(model, task)
    examples = task.encode(rows, training=True)

    def loss(chosen: Sequence[Any], idle: bool = False) -> Any:
        arrays = task.collate(chosen)
        if idle:
            arrays = without_targets(arrays)
        return model(**{name: torch.from_numpy(array) for name, array in arrays.items()}, num_items_in_batch=1).loss

    apart = sum(float(loss([example])) for example in examples)
    assert float(loss(examples)) == pytest.approx(apart, rel=1e-5)
    nothing = loss(examples, idle=True)
    nothing.backward()
    assert float(nothing) == 0.0
    assert all(parameter.grad is None or float(parameter.grad.abs().sum()) == 0.0 for parameter in model.parameters())


def test_any_finite_number_is_a_target() -> None:
    """-100 too, which among classes means that there is none: loss, counts and scores are those of all rows."""
    rows = rows_of(["-100", "0", "100", "-100"])
    task = make_task(task_of(kind="regression"), wordpiece(), causal=False)
    task.fit(rows)
    config = config_of("bert")
    for key, value in task.model_keys().items():
        setattr(config, key, value)
    model = drawn(BertForSequenceClassification(config))
    examples = task.encode(rows, training=True)
    inputs = {name: torch.from_numpy(array) for name, array in task.collate(examples).items() if name != "labels"}
    with torch.no_grad():
        errors = model(**inputs).logits.squeeze(-1) - torch.tensor([-100.0, 0.0, 100.0, -100.0])
    install(model, task)
    found = task.evaluate(model, rows, examples, torch.device("cpu"), Ranks.alone())
    assert found.scores["loss"] * task.spread**2 == pytest.approx(float(errors.pow(2).mean()), rel=1e-5)
    assert TaskData(examples, task.collate, 4, 0, {}).batch(0).num_targets == 4


def test_a_number_that_no_model_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a\.tsv:3: the label `1e39` .*too large"):
        make_task(task_of(kind="regression"), wordpiece(), causal=False).fit(rows_of(["1", "1e39"]))


def test_labels_by_name_number_and_file(tmp_path: Any) -> None:
    """Names are sorted, numbers as numbers; a file or list gives the order; a number may stand for a name."""
    found = make_task(task_of(kind="classification"), wordpiece(), causal=False)
    found.fit(rows_of(["10", "9", "2"]))
    assert found.labels == ["2", "9", "10"]
    (tmp_path / "names.txt").write_text("joy\nfear\nanger\n")
    named = make_task(
        task_of(kind="classification", labels="names.txt", root=str(tmp_path), multi_label=True),
        wordpiece(),
        causal=False,
    )
    rows = rows_of(["0,2", "fear", ""])
    named.fit(rows)
    assert [example.label.tolist() for example in named.encode(rows, training=True)] == [[1, 0, 1], [0, 1, 0], [0] * 3]
    hub = [
        Row({"text": "a", "label": name}, "hub", {"label": ["not_equal", "equal"]}) for name in ("equal", "not_equal")
    ]
    found.fit(hub)
    assert found.labels == ["not_equal", "equal"]  # the data set's own order: F1 is of the second
    with pytest.raises(ValueError, match="the label `-1` is none of the 2 known ones"):
        found.label_of(Row({"text": "a", "label": -1}, "hub", hub[0].names))
    with pytest.raises(ValueError, match="column `label` is empty"):
        found.label_of(Row({"text": "a", "label": None}, "a:1"))
    with pytest.raises(ValueError, match=r"a\.tsv:3: column `label` is empty; .* task\.ignore_labels"):
        make_task(task_of(kind="classification"), wordpiece(), causal=False).fit(rows_of(["a", " ", "b"]))
    with pytest.raises(ValueError, match=r"a\.tsv:2: the label `grief` is none of the 3 known ones"):
        named.encode(rows_of(["grief"]), training=False)
    with pytest.raises(ValueError, match=r"names\.txt2"):
        make_task(task_of(kind="classification", labels="names.txt2"), wordpiece(), causal=False).fit(rows)
    with pytest.raises(ValueError, match="needs two"):
        make_task(task_of(kind="classification"), wordpiece(), causal=False).fit(rows_of(["a", "a"]))
    with pytest.raises(ValueError, match=r"a\.tsv:3: the label `much` is no number"):
        make_task(task_of(kind="regression"), wordpiece(), causal=False).fit(rows_of(["1", "much"]))


def test_rows_without_an_agreed_label_are_left_out_and_counted() -> None:
    rows = rows_of(["a", "-", "b", "-"])
    task = make_task(task_of(kind="classification", ignore_labels=["-"]), wordpiece(), causal=False)
    task.fit(rows)
    assert task.labels == ["a", "b"]
    assert [example.row for example in task.encode(rows, training=False)] == [0, 2]
    assert task.notes == ["2 of 4 rows have a label of task.ignore_labels (-): left out"]


def test_a_row_that_is_left_out_has_no_prediction() -> None:
    """A line for every row, in order, with its number, where it stands, what it says and what the model says."""
    rows = rows_of(["a", "", "1", "-", "b"])
    task = make_task(
        task_of(kind="classification", labels=["a", "b"], ignore_labels=["", "-"]), wordpiece(), causal=False
    )
    task.fit(rows)
    examples = task.encode(rows, training=False)
    found = task.score(rows, examples, [0, 1, 1])
    lines = [json.loads(line) for line in prediction_lines(task, rows, found.predictions)]
    assert [(line["row"], line["where"]) for line in lines] == [(number, f"a.tsv:{number + 2}") for number in range(5)]
    assert [line["label"] for line in lines] == ["a", "", "b", "-", "b"]
    assert [line["prediction"] for line in lines] == ["a", None, "b", None, "b"]
    several = make_task(task_of(kind="classification", multi_label=True), wordpiece(), causal=False)
    several.fit(rows_of(["a,b", "c"]))
    assert several.answer_of(rows_of(["c,a"])[0]) == ["c", "a"]
    assert make_task(task_of(kind="regression"), wordpiece(), causal=False).answer_of(rows_of(["2.5"])[0]) == 2.5


def test_two_texts_are_told_apart_by_a_tokenizer_with_nothing_between() -> None:
    rows = rows_of(["a", "b"], text_pair=["its pair", "another"])
    parted = make_task(task_of(kind="classification", text_pair="text_pair"), byte_bpe(), causal=True)
    parted.fit(rows)
    ids = parted.encode(rows, training=True)[0].inputs["input_ids"]
    assert byte_bpe().decode(ids) == f"{TEXTS[0]}\nits pair"
    bert = make_task(task_of(kind="classification", text_pair="text_pair"), wordpiece(), causal=False)
    bert.fit(rows)
    inputs = bert.encode(rows, training=True)[0].inputs
    assert "\n" not in wordpiece().decode(inputs["input_ids"])
    assert set(inputs["token_type_ids"].tolist()) == {0, 1}


def test_scores_of_a_model_do_not_depend_on_batches() -> None:
    """All rows at once, or one at a time: the same predictions, in the order of the rows."""
    rows = rows_of(["a", "b", "c", "a", "b"] * 3)
    task = make_task(task_of(kind="classification"), wordpiece(), causal=False)
    task.fit(rows)
    config = config_of("bert")
    for key, value in task.model_keys().items():
        setattr(config, key, value)
    model = drawn(BertForSequenceClassification(config))
    install(model, task)
    examples = task.encode(rows, training=False)
    whole = task.evaluate(model, rows, examples, torch.device("cpu"), Ranks.alone())
    task.tokens_a_batch = 1
    single = task.evaluate(model, rows, examples, torch.device("cpu"), Ranks.alone())
    assert whole.predictions == single.predictions
    assert whole.scores == pytest.approx(single.scores, rel=1e-5)
    right = sum(said == row["label"] for said, row in zip(whole.predictions, rows, strict=True))
    assert whole.scores["accuracy"] == pytest.approx(right / len(rows))


def test_the_baseline_learns_words() -> None:
    """A word that decides the label is found; pairs by what they share; tags by the word."""
    good, bad = ["a good film", "good fun", "so good here"], ["a bad film", "bad luck", "so bad here"]
    labels = ["1"] * 3 + ["0"] * 3
    rows = rows_of(labels, text=good + bad)
    parts = Parts(rows * 3, rows, rows)
    scores = bag_of_words.score_baseline(task_of(kind="classification"), parts)
    assert scores["test"]["accuracy"] == 1.0
    pairs = rows_of(["2.0", "8.0"] * 4, text=["a b c d", "e f g h"] * 4, text_pair=["x y", "e f g h"] * 4)
    numbers = task_of(kind="regression", text_pair="text_pair")
    assert bag_of_words.score_baseline(numbers, Parts(pairs, pairs, []))["validation"]["pearson"] > 0.99
    tagged = [Row({"tokens": ["in", "Rome"], "tags": ["O", "B-place"]}, "a:1")] * 4
    tokens = task_of(kind="token-classification")
    assert bag_of_words.score_baseline(tokens, Parts(tagged, tagged, tagged))["test"]["f1"] == 1.0
    with pytest.raises(ValueError, match=r"task\.kind is text-to-text"):
        bag_of_words.score_baseline(task_of(kind="text-to-text"), parts)
    with pytest.raises(ValueError, match=r"task\.metric: there is no score `loss` of bag-of-words; there are accuracy"):
        bag_of_words.score_baseline(task_of(kind="classification", metric="-loss"), Parts(rows * 3, rows, rows))


def test_the_baseline_reads_words_as_the_model_does() -> None:
    """Words and tags in one text each, parted by spaces; and what a model is refused, the baseline is too."""
    tagged = [Row({"tokens": "in Rome today", "tags": "O B-place O"}, "a:1")] * 4
    section = task_of(kind="token-classification")
    scores = bag_of_words.score_baseline(section, Parts(tagged, tagged, tagged))
    assert scores["test"] == {"f1": 1.0, "precision": 1.0, "recall": 1.0, "accuracy": 1.0}
    short = [Row({"tokens": "in Rome today", "tags": "O B-place"}, "a:7")]
    with pytest.raises(ValueError, match="a:7: 3 words in `tokens` and 2 tags"):
        bag_of_words.score_baseline(section, Parts(tagged, short, []))
    plain = task_of(kind="token-classification", spans=True)
    dull = [Row({"tokens": ["a", "b"], "tags": ["X", "Y"]}, "a:1")]
    with pytest.raises(ValueError, match=r"task\.spans: true, but no tag"):
        bag_of_words.score_baseline(plain, Parts(dull, dull, []))


@pytest.mark.parametrize("kind", ["classification", "token-classification"])
def test_the_penalty_is_chosen_on_validation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a strength that learns nothing and one that does, the better one on validation scores the test rows."""
    if kind == "classification":
        rows = rows_of(["1", "1", "0", "0", "0"], text=["good a", "good b", "bad a", "bad b", "bad a"]) * 3
        metric = "accuracy"
    else:
        rows = [Row({"tokens": "in Rome we sat", "tags": "O B-place O O"}, "a:1")] * 6
        metric = "f1"
    found = []
    for strengths in ((1e-9,), (1e-9, 100.0), (100.0, 1e-9)):
        monkeypatch.setattr(bag_of_words, "_STRENGTHS", strengths)
        found.append(bag_of_words.score_baseline(task_of(kind=kind), Parts(rows, rows, rows))["test"][metric])
    assert found[0] < found[1] == found[2] == 1.0
