"""Outputs of encoder-decoders for pairs: as one by one, and scored as sacrebleu scores them by hand."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_models import byte_tokenizer
from transformers import MarianConfig, MarianMTModel
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.evaluate import evaluate_model, show_scores
from pretrain.evaluation.loading import LoadedModel, load_model
from pretrain.evaluation.outputs import score_outputs, write_outputs
from pretrain.evaluation.passes import Passes
from pretrain.generate import generate_text

metrics = pytest.importorskip("sacrebleu.metrics")

_SIDE = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
PAIRS = [("good day", "你好"), ("a", "一个人在这里。"), ("the long way home", "回家的路很长"), ("good day", "日安")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock encoder-decoder over bytes with random weights that are large enough to write something."""
    folder = tmp_path_factory.mktemp("marian")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    sizes = {"vocab_size": len(tokenizer), "d_model": 16, "max_position_embeddings": 40}
    layers = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in _SIDE.items()}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = MarianConfig(
        **sizes, **layers, **tokens, decoder_start_token_id=tokenizer.pad_token_id, forced_eos_token_id=None
    )
    model = MarianMTModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # norms stay as they are, else one channel decides
                parameter.normal_(0.0, 0.7, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(directory: Path) -> LoadedModel:
    return load_model(directory, device="cpu")


@pytest.mark.parametrize("num_beams", [1, 3])
def test_outputs_do_not_depend_on_the_batch(loaded: LoadedModel, num_beams: int) -> None:
    inputs = [source for source, _ in PAIRS]
    alone = [generate_text(loaded, text, num_beams=num_beams, max_new_tokens=12).strip() for text in inputs]
    assert len(set(alone)) > 1
    for batch_tokens in (1, 40, 10_000):
        passes = Passes(torch.device("cpu"), None, batch_tokens)
        assert write_outputs(loaded, inputs, passes, num_beams=num_beams, max_new_tokens=12).texts == alone


def test_the_scores_are_sacrebleus(loaded: LoadedModel) -> None:
    passes = Passes(torch.device("cpu"))
    scores = score_outputs(loaded, PAIRS, passes, max_new_tokens=12)
    references = [reference for _, reference in PAIRS]
    assert scores["bleu"] == metrics.BLEU(tokenize="zh").corpus_score(scores["outputs"], [references]).score
    assert scores["chrf"] == metrics.CHRF().corpus_score(scores["outputs"], [references]).score
    assert "tok:zh" in scores["bleu_signature"]
    assert scores["text"] == {**scores["text"], "documents": 4, "bytes": len("".join(references).encode())}
    english = [(source, "it is " + source) for source, _ in PAIRS]
    assert "tok:13a" in score_outputs(loaded, english, passes, max_new_tokens=2)["bleu_signature"]
    japanese = [(source, "これは" + reference + "です") for source, reference in PAIRS]
    assert "tok:char" in score_outputs(loaded, japanese, passes, max_new_tokens=2)["bleu_signature"]
    thai = [(source, "วันนี้อากาศดี") for source, _ in PAIRS]
    short = score_outputs(loaded, thai, passes, max_new_tokens=2, num_beams=2)
    assert "tok:char" in short["bleu_signature"]
    assert (short["num_beams"], short["max_new_tokens"]) == (2, 2)
    assert short["cut_off"] == sum(len(text) > 0 for text in short["outputs"])
    char = score_outputs(loaded, english, passes, max_new_tokens=2, bleu_tokenizer="char", max_bytes=1)
    assert "tok:char" in char["bleu_signature"]
    assert char["text"]["documents"] == 1


def test_a_perfect_model_scores_a_hundred(loaded: LoadedModel) -> None:
    passes = Passes(torch.device("cpu"))
    outputs = write_outputs(loaded, [source for source, _ in PAIRS], passes, max_new_tokens=20).texts
    own = [(source, output) for (source, _), output in zip(PAIRS, outputs, strict=True)]
    scores = score_outputs(loaded, own, passes, max_new_tokens=20, bleu_tokenizer="char")
    assert scores["bleu"] == pytest.approx(100)
    assert scores["chrf"] == pytest.approx(100)


def test_from_the_command_line(directory: Path, tmp_path: Path) -> None:
    table = tmp_path / "pairs.tsv.gz"
    table.write_bytes(gzip.compress(("en\tzh\n" + "".join(f"{a}\t{b}\n" for a, b in PAIRS)).encode()))
    arguments = ["evaluate", str(directory), str(table), "--text-field", "en,zh", "--num-beams", "2", "--device", "cpu"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "tok:zh" in done.output
    assert "4 pairs" in done.output
    scores = evaluate_model(directory, [str(table)], text_field=("en", "zh"), num_beams=2, device="cpu")
    shown = io.StringIO()
    show_scores(scores, Console(file=shown, width=120))
    assert f"{scores['bleu']:.2f}" in shown.getvalue()
    for options, message in (
        ({"text_field": "en"}, "predicts an output from an input: give a table of pairs"),
        ({"text_field": ("en", "zh"), "stride": 4}, "stride: 4 belongs to causal models"),
        ({"text_field": ("en", "zh"), "context": 4}, "context: 4 belongs to models of one text"),
        ({"text_field": ("en", "zh"), "bleu_tokenizer": "han"}, "bleu_tokenizer: han is unknown"),
        ({"text_field": ("en", "zh"), "num_beams": 0}, "num_beams: 0 must be at least 1"),
        ({"text_field": ("en", "zh"), "max_new_tokens": 0}, "max_new_tokens: 0 must be at least 1"),
        ({"text_field": ("zz", "zh")}, "zz"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_model(directory, [str(table)], device="cpu", **options)


def test_other_models_take_one_text(directories: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words\n")
    for options, message in (
        ({"text_field": ("a", "b")}, "two sides of pairs, which encoder-decoders are scored on"),
        ({"max_new_tokens": 2}, "max_new_tokens: 2 belongs to encoder-decoders"),
        ({"num_beams": 2}, "num_beams: 2 belongs to encoder-decoders"),
        ({"bleu_tokenizer": "zh"}, "bleu_tokenizer: zh belongs to encoder-decoders"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_model(directories["gpt2"], [str(text)], device="cpu", **options)


def test_an_input_that_does_not_fit_is_named(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match=r"input 2 \(`x{40}`\): an input of 71 tokens does not fit the 32 positions"):
        write_outputs(loaded, ["a", "x" * 70], Passes(torch.device("cpu")))
