"""Sentence vectors: the losses of sentence-transformers, ranks of the positives, and the directory that it loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional as F
from transformers import BertForMaskedLM, BertModel

from pretrain.changes import ChangedConfigError, changes_at_resume
from pretrain.config import validated
from pretrain.config_task import TuningConfig, load_tuning
from pretrain.finetune import finetune
from pretrain.ranks import Ranks
from pretrain.tasks import make_task
from pretrain.tasks.base import _turns
from pretrain.tasks.examples import Example
from pretrain.tasks.heads import install
from pretrain.tasks.rows import Row
from tests.tasks.small_tokenizers import config_of, drawn, wordpiece

PAIRS = [("the cat sat", "a cat is sitting"), ("who published it", "the publisher"), ("a tree", "running under a tree")]


def task_and_rows(**keys: Any) -> tuple[Any, list[Row]]:
    section = validated(TuningConfig, {"name": "x", "task": {"kind": "embeddings", "train": ["a"]} | keys}, "test").task
    rows = [
        Row({"anchor": one, "positive": two, "negative": "the war", "score": str(place)}, f"a:{place}")
        for place, (one, two) in enumerate(PAIRS)
    ]
    return make_task(section, wordpiece(), causal=False), rows


def means(model: Any, texts: list[str]) -> torch.Tensor:
    """One text at a time, without padding."""
    found = []
    for text in texts:
        ids = torch.tensor([wordpiece()(text)["input_ids"]])
        found.append(model(input_ids=ids).last_hidden_state[0].mean(0))
    return torch.stack(found)


@pytest.mark.parametrize("negative", [False, True])
def test_the_ranking_loss(negative: bool) -> None:
    """Cross-entropy of the anchor's cosines with all positives and negatives, times 20, summed over the rows."""
    task, rows = task_and_rows(**({"negative": "negative"} if negative else {}))
    model = drawn(BertModel(config_of("bert")))
    candidates = [two for _, two in PAIRS] + (["the war"] * 3 if negative else [])
    anchors, others = means(model, [one for one, _ in PAIRS]), means(model, candidates)
    cosines = F.cosine_similarity(anchors[:, None], others[None], dim=-1)
    expected = F.cross_entropy(20.0 * cosines, torch.arange(3), reduction="sum")
    install(model, task)
    arrays = task.collate(task.encode(rows, training=True))
    ours = model(**{name: torch.from_numpy(array) for name, array in arrays.items()}, num_items_in_batch=1).loss
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_the_loss_of_scores() -> None:
    task, rows = task_and_rows(score="score", score_range=[0, 2])
    model = drawn(BertModel(config_of("bert")))
    left, right = (means(model, [pair[side] for pair in PAIRS]) for side in (0, 1))
    expected = (F.cosine_similarity(left, right) - torch.tensor([0.0, 0.5, 1.0])).pow(2).sum()
    install(model, task)
    arrays = task.collate(task.encode(rows, training=True))
    ours = model(**{name: torch.from_numpy(array) for name, array in arrays.items()}, num_items_in_batch=1).loss
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    with pytest.raises(ValueError, match="a:2: the score '2' is no number from 0 to 1"):
        task_and_rows(score="score")[0].encode(rows, training=True)


def test_equal_or_broken_vectors_find_nothing() -> None:
    """A candidate as near as the own one stands before it; the same text is no rival."""
    task, rows = task_and_rows()
    examples = task.encode(rows, training=False)
    perfect = np.eye(3)[:, None].repeat(2, 1).tolist()
    assert task.score(rows, examples, perfect).scores["mrr"] == 1.0
    for vectors in (np.ones((3, 2, 4)), np.full((3, 2, 4), np.nan)):
        scores = task.score(rows, examples, vectors.tolist()).scores
        assert scores["recall_at_1"] == 0.0
        assert scores["mrr"] == pytest.approx(1 / 3)
    same = [rows[0], Row(dict(rows[0].values), "a:9"), rows[2]]
    vectors = np.eye(3)[[0, 0, 2]][:, None].repeat(2, 1).tolist()
    assert task.score(same, task.encode(same, training=False), vectors).scores["recall_at_1"] == 1.0


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_process_has_equally_many_passes(count: int, world: int) -> None:
    """And each example is one process's own, once."""
    examples = [
        Example({"input_ids": np.zeros(4 + number % 9, dtype=np.int64)}, np.array(0), number) for number in range(count)
    ]

    def turns(rank: int) -> list[tuple[list[int], bool]]:
        ranks = Ranks.alone()
        object.__setattr__(ranks, "rank", rank)
        object.__setattr__(ranks, "world", world)
        return list(_turns(examples, ranks, 24))

    all_of_them = [turns(rank) for rank in range(world)]
    assert len({len(own) for own in all_of_them}) == 1
    owned = [number for own in all_of_them for numbers, mine in own if mine for number in numbers]
    assert sorted(owned) == list(range(count))


def test_sentence_transformers_loads_what_comes_out(tmp_path: Path) -> None:
    """The same vectors there as here."""
    from sentence_transformers import SentenceTransformer

    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"anchor": a, "positive": b}) for a, b in PAIRS * 8))
    BertForMaskedLM(config_of("bert")).save_pretrained(tmp_path / "model")
    wordpiece().save_pretrained(tmp_path / "model")
    (tmp_path / "task.yaml").write_text(
        f"name: e\ntask: {{kind: embeddings, root: {tmp_path}, train: [a.jsonl], validation: [a.jsonl]}}\n"
        "train: {steps: 2, batch_size: 6, precision: fp32}\nlog: {to: [jsonl]}\n"
    )
    config = load_tuning(tmp_path / "task.yaml", [f"out={tmp_path}/runs"])
    assert finetune(tmp_path / "model", config, console=Console(quiet=True)) == 0
    directory = config.directory / "model"
    theirs = SentenceTransformer(str(directory), device="cpu").encode([one for one, _ in PAIRS])
    ours = means(BertModel.from_pretrained(directory).eval(), [one for one, _ in PAIRS]).detach().numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_what_shares_a_pass_is_part_of_the_loss_and_stays(tmp_path: Path) -> None:
    """All rows of a process by itself; another micro-batch, or another number of processes, is refused later."""
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"anchor": a, "positive": b, "s": 1}) for a, b in PAIRS * 14)
    )
    BertForMaskedLM(config_of("bert")).save_pretrained(tmp_path / "model")
    wordpiece().save_pretrained(tmp_path / "model")
    (tmp_path / "task.yaml").write_text(
        f"name: e\nout: {tmp_path}\ntask: {{kind: embeddings, root: {tmp_path}, train: [a.jsonl], "
        "validation: [a.jsonl], max_length: 128}\n"
        "train: {steps: 1, batch_size: 40, precision: fp32}\nlog: {to: [jsonl]}\n"
    )
    config = load_tuning(tmp_path / "task.yaml")
    assert finetune(tmp_path / "model", config, console=Console(quiet=True)) == 0
    start = json.loads((config.directory / "seed-0/train/starts.jsonl").read_text().splitlines()[0])
    assert start["micro_batch"] == 40  # a CPU's caches would like fewer: 40 x 2 x 128 tokens
    other = load_tuning(tmp_path / "task.yaml", ["train.micro_batch=20"])
    with pytest.raises(ChangedConfigError, match=r"train.micro_batch: 'auto' -> 20 .*micro-batch are part of the loss"):
        finetune(tmp_path / "model", other, console=Console(quiet=True))
    plain = config.as_dict()
    with pytest.raises(ChangedConfigError, match=r"train.processes: 1 -> 2 .*are part of the loss"):
        changes_at_resume(plain, config, ["train"], attention_dropout=0.0, processes=(1, 2))
    scored = load_tuning(tmp_path / "task.yaml", ["task.score=s"])
    assert changes_at_resume(scored.as_dict(), scored, attention_dropout=0.0, processes=(1, 2))
    stated = load_tuning(tmp_path / "task.yaml", ["train.processes=1"])
    assert changes_at_resume(plain, stated, attention_dropout=0.0, processes=(1, 1))
