"""A run's own validation sets: packed rows give the scores of each document by itself, for the published weights."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from data_builders import run_config, write_tokenizer
from rich.console import Console
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.config import RunConfig
from pretrain.evaluate import evaluate_run
from pretrain.model_dir import write_model
from pretrain.models import loom_config, model_from_config
from pretrain.prepare import prepare_data

TEXTS = [f"{number} brown foxes " * (number % 3 + 1) for number in range(12)]


def prepared(tmp_path: Path, architecture: str) -> tuple[RunConfig, Path]:
    """A run with a validation set of one document a line, and a model directory with random weights."""
    (tmp_path / "train.txt").write_text("something else entirely\n" * 20)
    (tmp_path / "held-out.txt").write_text("\n".join(TEXTS))
    config = run_config(
        tmp_path,
        architecture,
        train=[str(tmp_path / "train.txt")],
        validation=[str(tmp_path / "held-out.txt")],
        document="line",
        sequence_length=64,
    )
    tokenizer = config.directory / "tokenizer"
    write_tokenizer(tokenizer, architecture, " ".join(TEXTS), 280)
    prepare_data(config)
    sizes = {"vocab_size": 280, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = model_from_config(loom_config(architecture, max_position_embeddings=64, **sizes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    (tmp_path / "model").mkdir()
    write_model(model, tmp_path / "model", tokenizer_directory=tokenizer)
    return config, tmp_path / "model"


def test_a_decoder_is_scored_on_every_token_and_end(tmp_path: Path) -> None:
    config, directory = prepared(tmp_path, "gpt2")
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    total, count = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        row = torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(row[:, :-1]).logits[0]
        total += float(F.cross_entropy(logits.double(), row[0, 1:], reduction="sum"))
        count += len(ids) + 1
    sink = io.StringIO()
    (scores,) = evaluate_run(config, directory, console=Console(file=sink, width=200)).values()
    assert scores["num_targets"] == count
    assert scores["loss"] == pytest.approx(total / count, rel=1e-2 if scores["precision"] == "bf16" else 1e-5)
    assert scores["bits_per_byte"] == pytest.approx(
        scores["loss"] * count / math.log(2) / sum(len(text.encode()) for text in TEXTS), rel=1e-6
    )
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["context"] == 64
    assert f"{scores['loss']:.4f}" in sink.getvalue()


def test_scores_do_not_depend_on_the_optimizer_batch_and_progress_is_told(tmp_path: Path) -> None:
    config, directory = prepared(tmp_path, "bert")
    told: list[tuple[str, int, int]] = []
    scores = evaluate_run(config, directory, progress=lambda *what: told.append(what))
    assert [stage for stage, _, _ in told] == ["validation"] * len(told)
    assert told[0][1] == 0
    assert told[-1][1] == told[-1][2] > 0
    train = config.train.model_copy(update={"batch_tokens": 1 << 20})
    assert evaluate_run(config.model_copy(update={"train": train}), directory) == scores


def test_an_encoder_is_scored_on_fixed_masks(tmp_path: Path) -> None:
    config, directory = prepared(tmp_path, "bert")
    scores = evaluate_run(config, directory)
    assert list(scores) == ["validation"]
    assert 0.0 <= scores["validation"]["accuracy"] <= 1.0
    assert scores["validation"]["num_targets"] > 0
    assert "bits_per_byte" not in scores["validation"]
    assert evaluate_run(config, directory) == scores
