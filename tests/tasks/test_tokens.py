"""Words get their tags whatever the tokenizer, none is lost, and the loss and scores are those of the field."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForTokenClassification, BertForMaskedLM

from pretrain.config_task import TokenTask, load_tuning
from pretrain.finetune import finetune
from pretrain.ranks import Ranks
from pretrain.tasks import make_task
from pretrain.tasks.examples import IGNORED
from pretrain.tasks.heads import install
from pretrain.tasks.rows import Row
from pretrain.tasks.tokens import Tokens, lead_of
from pretrain.tasks.windows import best_windows, windows
from tests.tasks.small_tokenizers import byte_bpe, config_of, drawn, unigram, wordpiece

SENTENCES = [
    ("The old cat sat on the mat .", "D A N V P D N ."),
    ("Dmitri Mendeleev published the periodic table in Saint Petersburg", "B-PER I-PER O O O O O B-LOC I-LOC"),
    ("Unhappy children don't like Petersburg's cats", "A N V V N N"),
    ("chemist", "N"),
]


def row_of(words: str, tags: str, **more: Any) -> Row:
    return Row({"tokens": words.split(), "tags": tags.split(), **more}, "somewhere:1")


def rows_of(chosen: slice = slice(None)) -> list[Row]:
    return [row_of(words, tags) for words, tags in SENTENCES[chosen]]


def task_of(tokenizer: Any, rows: list[Row], *, causal: bool = False, **keys: Any) -> Tokens:
    task = make_task(TokenTask(kind="token-classification", train=("x",), **keys), tokenizer, causal=causal)
    assert isinstance(task, Tokens)
    task.fit(rows)
    return task


@pytest.mark.parametrize(("tokenizer", "lead"), [(wordpiece, ""), (byte_bpe, " "), (unigram, "")])
def test_words_are_encoded_as_in_running_text(tokenizer: Any, lead: str) -> None:
    assert lead_of(tokenizer()) == lead
    task = task_of(tokenizer(), rows_of())
    for row, example in zip(rows_of(), task.encode(rows_of(), training=True), strict=True):
        running = tokenizer()(" ".join(row["tokens"]))
        assert example.inputs["input_ids"].tolist() == running["input_ids"]
        assert set(example.inputs) == set(running)


def test_no_space_comes_where_the_script_has_none_or_the_corpus_says_so() -> None:
    row = Row({"tokens": ["他", "喜欢", "cats", "，", "很"], "tags": ["R", "V", "N", "P", "D"]}, "x")
    misc = ["_", "SpaceAfter=No", "SpaceAfter=No|Gloss=x", "_"]
    said = row_of("the dog 's friend", "D N P N", misc=["_", "SpaceAfter=No", "_", "_"])
    mark = row_of("a cat ! !", "D N P P", misc=misc)
    task = task_of(byte_bpe(), [row, said])
    texts = [
        byte_bpe().decode(example.inputs["input_ids"]) for example in task.encode([row, said, mark], training=True)
    ]
    assert texts == ["他喜欢cats，很", "the dog's friend", "a cat!!"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokenizer", [wordpiece, byte_bpe, unigram])
@pytest.mark.parametrize("max_length", [6, 11, 128])
def test_every_word_is_a_target_once_at_its_own_token(tokenizer: Any, max_length: int, causal: bool) -> None:
    rows = rows_of()
    task = task_of(tokenizer(), rows, causal=causal, max_length=max_length)
    examples = task.encode(rows, training=True)
    seen: dict[tuple[int, int], int] = {}
    for example in examples:
        assert len(example.inputs["input_ids"]) <= max_length
        assert (example.label != IGNORED).sum() == len(example.extra)
        for word, carrier in example.extra:
            assert (example.row, word) not in seen
            seen[example.row, word] = int(example.inputs["input_ids"][carrier])
            assert task.tags[example.label[carrier]] == rows[example.row]["tags"][word]
    for place, row in enumerate(rows):
        for number, word in enumerate(row["tokens"]):
            alone = tokenizer()((task.lead if number else "") + word, add_special_tokens=False)["input_ids"]
            kept = alone[: max_length - tokenizer().num_special_tokens_to_add()]
            assert seen.pop((place, number)) == (kept[-1] if causal else kept[0])
    assert not seen
    assert any("cut into windows" in note for note in task.notes) == (max_length < 128)


def test_windows_hold_every_piece_and_share_what_they_may() -> None:
    drawing = np.random.default_rng(0)
    for _ in range(200):
        sizes = drawing.integers(1, 9, drawing.integers(1, 30)).tolist()
        room, shared = int(drawing.integers(3, 20)), int(drawing.integers(0, 5))
        cut = list(windows(sizes, room, shared))
        small = [min(size, room) for size in sizes]
        assert {piece for first, last in cut for piece in range(first, last)} == set(range(len(sizes)))
        assert all(sum(small[first:last]) <= room for first, last in cut)
        for (_, before), (first, last) in itertools.pairwise(cut):
            assert first <= before < last
            assert sum(small[first:before]) <= shared
        for causal in (False, True):
            for piece, chosen in enumerate(best_windows(small, cut, causal=causal)):
                seen = {
                    number: (sum(small[first:piece]), sum(small[piece + 1 : last]))
                    for number, (first, last) in enumerate(cut)
                    if first <= piece < last
                }
                amounts = {number: left if causal else min(left, right) for number, (left, right) in seen.items()}
                assert amounts[chosen] == max(amounts.values())


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "gpt2", "llama"])
def test_the_loss_is_that_of_the_stock_class(architecture: str) -> None:
    causal = architecture in ("gpt2", "llama")
    tokenizer = byte_bpe() if causal else wordpiece()
    task = task_of(tokenizer, rows_of(), causal=causal)
    arrays = {
        name: torch.from_numpy(array) for name, array in task.collate(task.encode(rows_of(), training=True)).items()
    }
    assert arrays["labels"].shape == arrays["input_ids"].shape
    keys = task.model_keys()
    model = drawn(AutoModelForTokenClassification.from_config(config_of(architecture, **keys)))
    if architecture in ("gpt2", "llama", "modernbert"):
        arrays.pop("token_type_ids", None)
    labels = arrays.pop("labels")
    stock = model(**arrays, labels=labels).loss
    install(model, task)
    ours = model(**arrays, labels=labels, num_items_in_batch=(labels != IGNORED).sum()).loss
    assert model(**arrays).logits.shape == (*labels.shape, len(task.tags))
    torch.testing.assert_close(ours, stock)


class Oracle(torch.nn.Module):
    """Says of each token what a table has for its id."""

    def __init__(self, tags: dict[int, int], count: int) -> None:
        super().__init__()
        self.table = torch.zeros(400, count)
        for number, tag in tags.items():
            self.table[number, tag] = 5.0

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def test_long_sentences_are_scored_whole_and_lost_words_count_as_wrong() -> None:
    vocabulary = wordpiece().get_vocab()
    words, tags = ["cat", "dog", "the"] * 40, ["B-X", "I-X", "O"] * 40
    rows = [Row({"tokens": [*words, "\u200d"], "tags": [*tags, "B-X"]}, "x")]
    task = task_of(wordpiece(), rows, max_length=16)
    examples = task.encode(rows, training=False)
    ids = {
        wordpiece()(word, add_special_tokens=False)["input_ids"][0]: tag for word, tag in zip(words, tags, strict=True)
    }
    assert len(ids) == 3
    assert set(ids) <= set(vocabulary.values())
    oracle = Oracle({number: task.tags.index(tag) for number, tag in ids.items()}, len(task.tags))
    found = task.evaluate(oracle, rows, examples, torch.device("cpu"), Ranks.alone())
    assert found.predictions == [[*tags, "O"]]
    assert found.scores["precision"] == 1.0
    assert found.scores["recall"] == pytest.approx(40 / 41)
    assert found.scores["accuracy"] == pytest.approx(120 / 121)
    assert any("1 words of the evaluation rows leave no token: taken for O" in note for note in task.notes)


class OneOfTwo:
    """One of two processes; what they tell each other is JSON."""

    world = 2

    def __init__(self, rank: int, said: list[Any]) -> None:
        self.rank, self.said = rank, said

    def gather(self, value: Any) -> list[Any]:
        self.said.append(json.loads(json.dumps(value)))
        return self.said

    def sum(self, values: list[float]) -> list[float]:
        return values


def test_two_processes_score_what_one_does() -> None:
    rows = rows_of()
    task = task_of(wordpiece(), rows, max_length=11, spans=False)
    examples = task.encode(rows, training=False)
    oracle, device, said = Oracle({}, len(task.tags)), torch.device("cpu"), list[Any]()
    with pytest.raises(KeyError):  # the other half is not there yet
        task.evaluate(oracle, rows, examples, device, cast(Ranks, OneOfTwo(1, said)))
    found = task.evaluate(oracle, rows, examples, device, cast(Ranks, OneOfTwo(0, said)))
    assert found.predictions == task.evaluate(oracle, rows, examples, device, Ranks.alone()).predictions


def test_a_sentence_of_which_nothing_is_left_is_scored_too() -> None:
    rows = [row_of("cat", "N"), Row({"tokens": ["\u200d"], "tags": ["V"]}, "x"), Row({"tokens": [], "tags": []}, "x")]
    task = task_of(wordpiece(), [row_of("cat dog the", "N N V")])
    examples = task.encode(rows, training=False)
    assert [example.row for example in examples] == [0]
    found = task.evaluate(Oracle({}, 2), rows, examples, torch.device("cpu"), Ranks.alone())
    assert found.predictions == [["N"], ["N"], []]
    assert found.scores["accuracy"] == 0.5


def test_spans_are_scored_whole_and_tags_alone() -> None:
    truth = row_of("a b c d e", "B-PER I-PER O B-LOC O")
    task = task_of(wordpiece(), [truth])
    assert task.spans
    assert task.metric == "f1"
    said = [task.tags.index(tag) for tag in ("B-PER", "O", "O", "B-LOC", "O")]  # one of two entities, of two said
    example = task.encode([truth], training=False)[0]
    numbers = np.zeros(len(example.label), dtype=np.int32)
    numbers[[carrier for _, carrier in example.extra]] = said
    scores = task.score([truth], [example], [numbers]).scores
    assert scores == {"f1": 0.5, "precision": 0.5, "recall": 0.5, "accuracy": 0.8}
    tags = task_of(wordpiece(), [truth], spans=False)
    scores = tags.score([truth], [example], [numbers]).scores
    assert tags.metric == "accuracy"
    assert scores["accuracy"] == 0.8
    # B-PER: F1 1, I-PER: 0, B-LOC: 1, O: 2 of 3 said are right, both found: 0.8
    assert scores["f1_macro"] == pytest.approx((1 + 0 + 1 + 0.8) / 4)


def test_a_tag_that_training_has_not_is_no_target_and_counts_as_wrong() -> None:
    task = task_of(wordpiece(), [row_of("cat dog", "N V")])
    rows = [row_of("cat dog", "N X")]
    examples = task.encode(rows, training=False)
    assert (examples[0].label != IGNORED).sum() == 1
    assert any("1 words of the evaluation rows have a tag that no training row has" in note for note in task.notes)
    found = task.evaluate(Oracle({}, 2), rows, examples, torch.device("cpu"), Ranks.alone())
    assert found.scores["accuracy"] == 0.5


def test_rows_that_cannot_be_meant_are_refused_by_their_place() -> None:
    with pytest.raises(ValueError, match=r"somewhere:1: 2 words in `tokens` and 1 tags in `tags`"):
        task_of(wordpiece(), [row_of("cat dog", "N")])
    with pytest.raises(ValueError, match=r"x: column `tokens` holds '\[1, 2\]', and a list of texts"):
        task_of(wordpiece(), [Row({"tokens": [1, 2], "tags": ["A", "B"]}, "x")])
    with pytest.raises(ValueError, match="has 1 tag"):
        task_of(wordpiece(), [row_of("cat dog", "N N")])
    with pytest.raises(ValueError, match=r"task.spans: true, but no tag"):
        task_of(wordpiece(), [row_of("cat dog", "N V")], spans=True)
    with pytest.raises(ValueError, match=r"task.max_length: 2 leaves no room"):
        task_of(wordpiece(), rows_of(), max_length=2).encode(rows_of(), training=True)


def test_a_table_may_hold_words_with_spaces_between() -> None:
    row = Row({"tokens": "the cat sat", "tags": "D N V"}, "x")
    assert len(task_of(wordpiece(), [row]).encode([row], training=True)[0].extra) == 3


@pytest.mark.parametrize("name", ["ud-ewt", "wnut17", "conll2003"])
def test_shipped_tasks_are_read(name: str) -> None:
    assert load_tuning(name).task.kind == "token-classification"


def test_a_tiny_model_learns_tags(tmp_path: Path) -> None:
    for part in ("train", "dev"):
        lines = [f"{word}\t{tag}" for word, tag in zip(["cat", "dog", "sat"], ["N", "N", "V"], strict=True)]
        (tmp_path / f"{part}.conll").write_text(("\n".join(lines) + "\n\n") * 12)
    BertForMaskedLM(config_of("bert")).save_pretrained(tmp_path / "model")
    wordpiece().save_pretrained(tmp_path / "model")
    keys = ["train=[train.conll]", "validation=[dev.conll]", "tokens=0", "tags=1", f"root={tmp_path}"]
    (tmp_path / "tags.yaml").write_text("name: tags\ntask: {kind: token-classification, train: [x]}\n")
    overrides = [*(f"task.{key}" for key in keys), f"out={tmp_path}", "train.steps=40", "train.batch_size=8"]
    config = load_tuning(tmp_path / "tags.yaml", [*overrides, "optimizer.lr=0.02", "evaluate.every=20"])
    assert finetune(tmp_path / "model", config, console=Console(quiet=True)) == 0
    result = (tmp_path / "tags" / "result.json").read_text()
    assert '"validation/accuracy"' in result
    tagger = AutoModelForTokenClassification.from_pretrained(tmp_path / "tags" / "model")
    logits = tagger(**wordpiece()("cat dog sat", return_tensors="pt")).logits[0, 1:-1]
    assert [tagger.config.id2label[number] for number in logits.argmax(-1).tolist()] == ["N", "N", "V"]
