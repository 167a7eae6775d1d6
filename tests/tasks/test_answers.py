"""Windows are those of the field, answers come back as they stand, and scores are those of the sets' own scripts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModel, AutoModelForQuestionAnswering, LlamaForCausalLM

from pretrain.config_task import QuestionAnsweringTask, load_tuning
from pretrain.finetune import finetune
from pretrain.tasks import make_task
from pretrain.tasks.answer_scores import of_characters, of_words
from pretrain.tasks.answers import Answers, likeliest_span
from pretrain.tasks.examples import IGNORED
from pretrain.tasks.heads import install
from pretrain.tasks.rows import Row
from tests.tasks.small_tokenizers import TEXT, byte_bpe, config_of, drawn, unigram, wordpiece

CONTEXT = " ".join(TEXT)
ASKED = [("Who published the periodic table?", "Dmitri Mendeleev"), ("Where?", "圣彼得堡"), ("Who sat?", "The old cat")]


def row_of(question: str, *answers: tuple[str, int], context: str = CONTEXT, **more: Any) -> Row:
    texts, starts = [text for text, _ in answers], [start for _, start in answers]
    return Row(
        {"question": question, "context": context, "answers": {"text": texts, "answer_start": starts}, **more}, "x:1"
    )


def rows_of() -> list[Row]:
    return [row_of(question, (answer, CONTEXT.index(answer))) for question, answer in ASKED]


def task_of(tokenizer: Any, rows: list[Row], *, causal: bool = False, **keys: Any) -> Answers:
    section = QuestionAnsweringTask(kind="question-answering", train=("x",), **keys)
    task = make_task(section, tokenizer, causal=causal)
    assert isinstance(task, Answers)
    task.fit(rows)
    return task


def said_of(task: Answers, examples: Any, **sure: float) -> list[Any]:
    """What a model says that knows where each window's answer is, and is surest where there is one.

    Args:
        task: of the examples.
        examples: its windows.
        sure: of the first context token of a window, by its number.
    """
    said = []
    for number, example in enumerate(examples):
        starts, ends = torch.zeros(2, 1, len(example.inputs["input_ids"]))
        size = 1.0 if example.label[0] == example.extra.null else 5.0
        starts[0, example.label[0]] = ends[0, example.label[1]] = size
        for logits in (starts, ends):
            logits[0, example.extra.first] += sure.get(f"window_{number}", 0.0)
        outputs = SimpleNamespace(start_logits=starts, end_logits=ends)
        batch = {name: torch.from_numpy(array) for name, array in task.collate([example]).items()}
        said += json.loads(json.dumps(task.predictions(outputs, batch)))  # processes exchange JSON
    return said


@pytest.mark.parametrize(("max_length", "stride"), [(40, 8), (64, 20), (512, 128)])
def test_windows_are_those_that_the_tokenizer_cuts(max_length: int, stride: int) -> None:
    task = task_of(wordpiece(), rows_of(), max_length=max_length, stride=stride)
    examples = task.encode(rows_of(), training=True)
    stock = wordpiece()(
        [row["question"] for row in rows_of()],
        [row["context"] for row in rows_of()],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
    )
    assert [example.row for example in examples] == stock.pop("overflow_to_sample_mapping")
    for name in stock:
        assert [example.inputs[name].tolist() for example in examples] == stock[name]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokenizer", [wordpiece, byte_bpe, unigram])
@pytest.mark.parametrize("max_length", [48, 512])
def test_answers_come_back_as_they_stand(tokenizer: Any, max_length: int, causal: bool) -> None:
    task = task_of(tokenizer(), rows_of(), causal=causal, max_length=max_length, stride=24, max_answer_length=40)
    examples = task.encode(rows_of(), training=False)
    assert all(len(example.inputs["input_ids"]) <= max_length for example in examples)
    found = task.score(rows_of(), examples, said_of(task, examples))
    answers = [said["answer"] for said in found.predictions]
    assert answers == [answer for _, answer in ASKED]
    assert found.scores == {"exact_match": 1.0, "f1": 1.0}


def test_each_window_is_told_of_the_answer_only_if_it_holds_it_whole() -> None:
    rows = rows_of()
    task = task_of(wordpiece(), rows, max_length=40, stride=8)
    for example in task.encode(rows, training=True):
        answer = rows[example.row]["answers"]["text"][0]
        start = rows[example.row]["answers"]["answer_start"][0]
        window = example.extra
        holds = window.offsets[0, 0] <= start and window.offsets[-1, 1] >= start + len(answer)
        assert (example.label[0] != window.null) == holds
        if holds:
            first, last = example.label - window.first
            assert window.offsets[first, 0] == start
            assert window.offsets[last, 1] == start + len(answer)


def test_an_answer_that_stands_elsewhere_is_found_nearest_and_one_that_stands_nowhere_is_left_out() -> None:
    context = "cat and dog and cat and tree and cat"
    rows = [
        row_of("q", ("cat", 18), context=context),
        row_of("q", ("bird", 3), context=context),
        row_of("q", ("bird", 3), ("tree", 24), context=context),
    ]
    task = task_of(wordpiece(), rows)
    examples = task.encode(rows, training=True)
    assert [example.row for example in examples] == [0, 2]
    window, label = examples[0].extra, examples[0].label
    assert window.offsets[label[0] - window.first].tolist() == [16, 19]
    assert task.notes == [
        "1 of 3 training answers do not stand at their answer_start: taken where they stand nearest to it",
        "1 of 3 training questions have answers that do not stand in the context: left out",
    ]
    scored = task.encode(rows, training=False)
    assert [example.row for example in scored] == [0, 1, 2]
    assert (scored[1].label == IGNORED).all()
    assert task.score(rows, scored, [[0.0, 0, 0, 0.0]] * 3).scores["exact_match"] < 1.0


def test_the_likeliest_span_is_the_best_of_all() -> None:
    drawing = np.random.default_rng(0)
    for _ in range(50):
        size, longest = int(drawing.integers(1, 30)), int(drawing.integers(1, 12))
        starts, ends = drawing.normal(size=(2, size))
        spans = [(first, last) for first in range(size) for last in range(first, min(size, first + longest))]
        best = max(spans, key=lambda span: starts[span[0]] + ends[span[1]])
        score, found = likeliest_span(starts, ends, longest)
        assert found == best
        assert score == pytest.approx(starts[best[0]] + ends[best[1]])


def test_the_surest_window_answers_and_none_does_where_all_say_so() -> None:
    rows = [row_of("Who?", ("Dmitri Mendeleev", CONTEXT.index("Dmitri"))), row_of("Why?"), row_of("Who?", ("cats", 0))]
    task = task_of(wordpiece(), rows, max_length=40, stride=8)
    assert task.unanswerable
    examples = task.encode(rows, training=False)
    found = task.score(rows, examples, said_of(task, examples))
    assert [said["answer"] for said in found.predictions][:2] == ["Dmitri Mendeleev", ""]
    assert found.scores["unanswerable_accuracy"] == 1.0
    assert found.scores["answerable_f1"] == 1.0
    window = next(place for place, example in enumerate(examples) if example.row == 1)
    sure = said_of(task, examples, **{f"window_{window}": 9.0})  # one window is sure of an answer: it wins
    assert task.score(rows, examples, sure).predictions[1]["answer"] != ""
    answerable = task_of(wordpiece(), [rows[0], rows[2]], max_length=40, stride=8)
    assert answerable.score(rows, examples, said_of(task, examples)).predictions[1]["answer"] != ""


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "gpt2", "llama"])
def test_the_loss_is_that_of_the_stock_class(architecture: str) -> None:
    causal = architecture in ("gpt2", "llama")
    task = task_of(byte_bpe() if causal else wordpiece(), rows_of(), causal=causal, max_length=60, stride=10)
    made = task.collate(task.encode(rows_of(), training=True))
    arrays = {name: torch.from_numpy(array) for name, array in made.items()}
    if architecture != "bert":
        arrays.pop("token_type_ids", None)
    labels = arrays.pop("labels")
    shown = {name: array for name, array in arrays.items() if name != "window"}
    model = drawn(AutoModelForQuestionAnswering.from_config(config_of(architecture)))
    stock = model(**shown, start_positions=labels[:, 0], end_positions=labels[:, 1]).loss
    install(model, task)
    ours = model(**arrays, labels=labels, num_items_in_batch=(labels != IGNORED).sum()).loss
    torch.testing.assert_close(ours, stock)
    said = task.predictions(model(**arrays), arrays)
    assert len(said) == len(labels)
    assert [len(one) for one in said] == [4] * len(said)


def test_a_decoder_says_no_answer_where_it_has_seen_the_window() -> None:
    rows = [row_of("Why?"), *rows_of()]
    task = task_of(byte_bpe(), rows, causal=True, max_length=60, stride=10)
    for example in task.encode(rows, training=True):
        ids = example.inputs["input_ids"]
        assert ids[-1] == byte_bpe().eos_token_id
        assert example.extra.null == len(ids) - 1
        assert example.extra.first + len(example.extra.offsets) == len(ids) - 1
        assert {len(array) for array in example.inputs.values()} == {len(ids)}
    text = byte_bpe().decode(task.encode(rows[:1], training=True)[0].inputs["input_ids"])
    assert text.startswith("Why?\nThe old cat")
    assert text.endswith("<end>")


def test_odd_questions_and_contexts_are_counted() -> None:
    rows = [row_of("Who sat? " * 40, ("cat", 8)), row_of("Who?", context="")]
    task = task_of(wordpiece(), rows, max_length=40)
    examples = task.encode(rows, training=False)
    assert {example.row for example in examples} == {0}
    assert all(len(example.inputs["input_ids"]) <= 40 for example in examples)
    assert all((example.inputs["token_type_ids"][: example.extra.first] == 0).all() for example in examples)
    assert any("1 of 2 evaluation questions are longer than half" in note for note in task.notes)
    assert any("1 of 2 evaluation contexts are empty" in note for note in task.notes)
    assert task.score(rows, examples, said_of(task, examples)).predictions[1]["answer"] == ""


def test_answers_of_another_form_are_refused_by_their_place() -> None:
    with pytest.raises(ValueError, match=r"x:1: `answers` holds 'Paris', and \{text"):
        task_of(wordpiece(), [Row({"question": "q", "context": "c", "answers": "Paris"}, "x:1")])
    with pytest.raises(ValueError, match="leaves no room for a context"):
        task_of(wordpiece(), rows_of(), max_length=3).encode(rows_of(), training=True)


@pytest.mark.parametrize(
    ("said", "right", "exact", "overlap"),
    [
        ("The Cat!", ["a cat"], 1.0, 1.0),
        ("the old cat", ["cat", "dog"], 0.0, 2 / 3),
        ("cat cat dog", ["cat dog dog"], 0.0, 2 / 3),
        ("", [], 1.0, 1.0),
        ("cat", [], 0.0, 0.0),
        ("", ["cat"], 0.0, 0.0),
        ("tree", ["cat"], 0.0, 0.0),
        ("the", ["an", "cat"], 0.0, 0.0),  # an answer that is an article alone is no answer to SQuAD's script
    ],
)
def test_words_are_compared_as_in_squad(said: str, right: list[str], exact: float, overlap: float) -> None:
    assert of_words(said, right) == (exact, pytest.approx(overlap))


@pytest.mark.parametrize(
    ("said", "right", "exact", "overlap"),
    [
        ("《红楼梦》", ["红楼梦"], 1.0, 1.0),
        ("门捷列夫发表", ["门捷列夫"], 0.0, 2 * (4 / 6) / (4 / 6 + 1)),
        ("甲乙丙丁", ["甲乙戊丁"], 0.0, 0.5),  # the longest run, not the characters that both have
        ("1869年3月", ["1869年"], 0.0, 2 * 0.5 / 1.5),  # 1869 | 年 | 3 | 月
        ("GPT模型", ["gpt模型"], 1.0, 1.0),
        ("猫", ["狗", "猫"], 1.0, 1.0),
        ("猫", ["狗"], 0.0, 0.0),
    ],
)
def test_characters_are_compared_as_in_cmrc(said: str, right: list[str], exact: float, overlap: float) -> None:
    assert of_characters(said, right) == (exact, pytest.approx(overlap))


@pytest.mark.parametrize("name", ["xquad-en", "cmrc2018", "squad", "squad-v2"])
def test_shipped_tasks_are_read(name: str) -> None:
    assert load_tuning(name).task.kind == "question-answering"


def test_a_tiny_decoder_is_trained_and_scored(tmp_path: Path) -> None:
    articles = []
    for number in range(12):
        asked = [
            {"id": f"{number}-{one}", "question": question, "answers": [{"text": text, "answer_start": at}]}
            for one, (question, text) in enumerate(ASKED)
            for at in [CONTEXT.index(text)]
        ]
        articles.append({"title": f"t{number}", "paragraphs": [{"context": CONTEXT, "qas": asked}]})
    (tmp_path / "squad.json").write_text(json.dumps({"data": articles}))
    LlamaForCausalLM(config_of("llama")).save_pretrained(tmp_path / "model")
    byte_bpe().save_pretrained(tmp_path / "model")
    (tmp_path / "qa.yaml").write_text(
        "name: qa\ntask: {kind: question-answering, train: [squad.json], max_length: 96, stride: 16,\n"
        "  validation: {fraction: 0.3, by: title}, test: {fraction: 0.3, by: title}}\n"
    )
    overrides = [f"task.root={tmp_path}", f"out={tmp_path}", "train.steps=4", "train.batch_size=4"]
    assert finetune(tmp_path / "model", load_tuning(tmp_path / "qa.yaml", overrides), console=Console(quiet=True)) == 0
    result = json.loads((tmp_path / "qa" / "result.json").read_text())
    assert {"test/exact_match", "test/f1"} <= set(result["summary"])
    lines = (tmp_path / "qa" / "seed-0" / "predictions-test.jsonl").read_text().splitlines()
    assert len(lines) == result["rows"]["test"]
    said = [json.loads(line) for line in lines]
    assert [line["row"] for line in said] == list(range(len(lines)))
    assert all(set(line["prediction"]) == {"id", "answer"} for line in said)
    assert all(len(line["label"]) == 1 and line["label"][0] in CONTEXT for line in said)
    tuned, given = (
        AutoModelForQuestionAnswering.from_pretrained(tmp_path / "qa" / "model").transformer,
        AutoModel.from_pretrained(tmp_path / "model"),
    )
    for name, before in given.named_parameters():  # the body was read, and four small steps left it near
        torch.testing.assert_close(tuned.get_parameter(name), before, atol=1e-3, rtol=0)
