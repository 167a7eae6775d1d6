"""Text to text: losses as the stock classes have them, outputs as they write them, scores as the libraries count."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from writing_models import BOS, EOS, PAD, build, byte_tokenizer, model_directory, tuning, write_jsonl

from pretrain.config_task import TextTask, TunedModel
from pretrain.evaluation.outputs import bleu_and_chrf
from pretrain.finetune import finetune
from pretrain.ranks import Ranks
from pretrain.tasks.base import Evaluation
from pretrain.tasks.heads import install, read_model, read_tuned
from pretrain.tasks.rows import Row
from pretrain.tasks.texts import TextToText, rouge
from tests.two_ranks import two_ranks

CPU = torch.device("cpu")
PAIRS = [("one red apple", "un"), ("two", "deux pommes"), ("three small trees", "trois"), ("red", "rouge vif")]
ROWS = [Row({"source": source, "target": target}, f"rows:{n}") for n, (source, target) in enumerate(PAIRS, start=1)]


def make(*, causal: bool, **keys: Any) -> TextToText:
    section = TextTask(kind="text-to-text", train=("x",), max_length=32, max_target_length=12, **keys)
    return TextToText(section, byte_tokenizer(), causal=causal)


def asked(model: Any) -> Evaluation:
    return Evaluation(model, (), (), CPU, Ranks.alone())


@pytest.mark.parametrize("architecture", ["marian", "t5", "loom-seq2seq", "llama", "gpt2", "loom-decoder"])
def test_the_loss_is_the_class_s_own_times_the_number_of_targets(architecture: str) -> None:
    causal = architecture in ("llama", "gpt2", "loom-decoder")
    task = make(causal=causal)
    arrays = task.collate(task.encode(ROWS, training=True))
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    count = int((batch["labels"] != -100).sum())
    assert count == sum(len(target) + 1 for _, target in PAIRS)  # bytes, and EOS
    model = build(architecture, len(task.tokenizer))
    with torch.no_grad():
        own = model(**batch).loss  # the class shifts the labels itself
        install(model, task)
        assert torch.allclose(model(**batch, num_items_in_batch=1).loss, own * count, rtol=1e-5)
        assert torch.allclose(model(**batch, num_items_in_batch=7).loss, own * count / 7, rtol=1e-5)


def test_a_decoder_s_row_is_bos_source_separator_target_eos() -> None:
    task = make(causal=True, prefix="to French: ", separator=" = ")
    (example,) = task.encode(ROWS[:1], training=True)
    ids = example.inputs["input_ids"].tolist()
    assert task.tokenizer.decode(ids) == "<s>to French: one red apple = un</s>"
    assert (ids[0], ids[-1]) == (BOS, EOS)
    assert [one for one in example.label.tolist() if one != -100] == ids[-3:]
    assert (example.label[:-3] == -100).all()


def test_long_and_empty_rows_are_counted() -> None:
    rows = [
        *ROWS,
        Row({"source": "s" * 40, "target": "t" * 20}, "rows:5"),
        Row({"source": " ", "target": "x"}, "rows:6"),
    ]
    for causal in (False, True):
        task = make(causal=causal)
        examples = task.encode(rows, training=True)
        assert [example.row for example in examples] == [0, 1, 2, 3, 4]
        notes = "\n".join(task.notes)
        assert "1 of 6 training rows have no source" in notes
        assert "1 of 6 training rows have a source of more than task.max_length: 32" in notes
        assert "1 of 6 training rows have a target of more than task.max_target_length: 12" in notes
        ids = examples[4].inputs["input_ids"].tolist()
        targets = [one for one in examples[4].label.tolist() if one != -100]
        assert (len(targets), targets[-1]) == (12, EOS)
        assert len(ids) == (32 + 12 if causal else 32)
        if not causal:
            assert ids[-1] == EOS


@pytest.mark.parametrize("architecture", ["marian", "loom-seq2seq", "llama", "gpt2", "loom-decoder"])
def test_outputs_are_those_of_the_class_for_each_input_alone(architecture: str) -> None:
    causal = architecture in ("llama", "gpt2", "loom-decoder")
    task = make(causal=causal, num_beams=2)
    examples = task.encode(ROWS, training=False)
    model = build(architecture, len(task.tokenizer), drawn=0.4)
    prompts = [example.extra["prompt"] for example in examples]
    written = task.write(asked(model), prompts, max_new_tokens=9, num_beams=2)
    for prompt, text in zip(prompts, written, strict=True):
        made = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), max_new_tokens=9, num_beams=2,
            do_sample=False, pad_token_id=PAD,
        )  # fmt: skip
        alone = task.tokenizer.decode(made[0, len(prompt) if causal else 1 :], skip_special_tokens=True)
        assert text == alone.strip()


def test_scores_are_those_of_the_libraries() -> None:
    outputs, references = ["the cat sat", "a dog"], ["the cat sat down", "a dog"]
    task = make(causal=True, scores=("bleu", "chrf", "rouge", "exact_match"))
    scores = task._scores(outputs, references)
    assert scores["bleu"] == bleu_and_chrf(outputs, references)["bleu"]
    assert scores["exact_match"] == 0.5
    # Three of three words in three of four: F1 6/7; two of two pairs in two of three: 4/5.
    assert scores["rouge1"] == pytest.approx(100 * (6 / 7 + 1) / 2)
    assert scores["rouge2"] == pytest.approx(100 * (4 / 5 + 1) / 2)


def test_rouge_of_chinese_counts_characters() -> None:
    # 中 文 模 型 bert was said, 中 文 的 模 型 is right: 4 of 5 on both sides, and 2 of 4 pairs.
    scores = rouge(["中文模型 BERT"], ["中文的模型。"])
    assert scores["rouge1"] == pytest.approx(80)
    assert scores["rouge2"] == pytest.approx(50)
    assert rouge(["完全一样"], ["完全一样"])["rougeL"] == 100.0
    task = make(causal=True, scores=("rouge",))
    task.encode([Row({"source": "one", "target": "中文"}, "rows:1")], training=True)
    assert task.notes == ["ROUGE counts characters as words here: the targets are in a script without spaces"]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    section = TextTask(kind="text-to-text", train=("x",), max_length=150, max_target_length=64)
    with pytest.raises(ValueError, match=r"no end of text"):
        TextToText(section, tokenizer, causal=True)
    task = TextToText(section, byte_tokenizer(), causal=True)
    with pytest.raises(ValueError, match=r"214 tokens do not fit the 160 positions"):
        task.prepare_model(build("llama", len(task.tokenizer)))
    encoder = model_directory(tmp_path, "bert")
    with pytest.raises(ValueError, match=r"bert has no class for task.kind: text-to-text"):
        read_model(TunedModel.model_validate({"from": str(encoder)}), make(causal=False), 0)


def test_a_run_learns_and_is_judged_by_what_it_writes(tmp_path: Path) -> None:
    model = model_directory(tmp_path, "llama", drawn=None)
    words = ["un", "deux", "trois"]
    rows = [{"source": f"say {word} {number}", "target": word} for word in words for number in range(8)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    config = tuning(
        tmp_path,
        {
            "kind": "text-to-text",
            "train": ["rows.jsonl"],
            "validation": {"fraction": 0.2},
            "test": ["rows.jsonl"],
            "max_length": 32,
            "max_target_length": 8,
            "metric": "exact_match",
            "scores": ["chrf"],
            "evaluate_limit": 2,
        },
    )
    assert finetune(model, config) == 0
    out = tmp_path / "out" / "tuned"
    found = json.loads((out / "seed-0" / "result.json").read_text())
    lines = [json.loads(line) for line in (out / "seed-0" / "predictions-test.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(len(rows)))
    assert [line["label"] for line in lines] == [row["target"] for row in rows]
    said = [line["prediction"] for line in lines]
    right = sum(line == row["target"] for line, row in zip(said, rows, strict=True))
    assert found["test"]["exact_match"] == right / len(rows) > 0.3
    assert found["test"]["loss"] < 1.0
    assert {"chrf", "exact_match", "token_accuracy", "perplexity"} <= set(found["validation"])
    metrics = [json.loads(line) for line in (out / "seed-0/train/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "validation/exact_match" in line] == [0, 15, 30]
    assert json.loads((out / "model/generation_config.json").read_text())["eos_token_id"] == EOS
    task = make(causal=True)
    again = read_tuned(out / "model", task, CPU)
    prompts = [example.extra["prompt"] for example in task.encode([Row(row, "") for row in rows], training=False)]
    assert task.write(asked(again), prompts, max_new_tokens=8) == said


def test_what_is_computed_is_not_learnt(tmp_path: Path) -> None:
    """Marian's sinusoids get no gradient, and engines that update flat buffers refuse such a weight."""
    chosen = TunedModel.model_validate({"from": str(model_directory(tmp_path, "marian"))})
    model, _ = read_model(chosen, make(causal=False), 0)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"]


class Writer(torch.nn.Module):
    """Says an input's last byte again, and ends."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.generation_config = SimpleNamespace(), SimpleNamespace(eos_token_id=EOS)
        self.widths: list[int] = []

    def generate(self, *, input_ids: torch.Tensor, synced_gpus: bool, **others: Any) -> torch.Tensor:
        """(B, L + 2)."""
        assert synced_gpus
        self.widths.append(input_ids.shape[1])
        return torch.cat([input_ids, input_ids[:, -1:], torch.full_like(input_ids[:, :1], EOS)], dim=1)


def test_processes_write_in_equally_many_turns() -> None:
    """Five inputs of five lengths: three turns on each of two processes, and every process has all outputs."""
    texts = [letter * length for letter, length in zip("abcde", (4, 9, 2, 7, 5), strict=True)]

    def write(ranks: Any) -> Any:
        task, model, looks = make(causal=True), Writer(), list[int]()
        prompts = [task.tokenizer(text)["input_ids"] for text in texts]
        given = Evaluation(model, (), (), CPU, ranks, lambda: looks.append(len(model.widths)))
        return task.write(given, prompts, max_new_tokens=4), model.widths, looks

    first, second = two_ranks(write)
    assert first[0] == second[0] == list("abcde")
    assert (first[1], second[1]) == ([9, 5, 2], [7, 4, 2])  # the last turn has one batch
    assert first[2] == second[2] == [1, 2, 3]
