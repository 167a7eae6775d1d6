"""The verb on model directories: the scores say what was scored; what cannot be scored is named with a remedy."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import build, byte_tokenizer
from transformers import BertConfig, BertModel

from pretrain.evaluate import evaluate_model, show_scores
from pretrain.evaluation.loading import load_model


@pytest.fixture
def text(tmp_path: Path, sentences: list[str]) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line, "body": line.upper()}) + "\n" for line in sentences))
    return path


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert", "roberta", "modernbert"])
def test_any_directory_is_scored(architecture: str, directories: dict[str, Path], text: Path, tmp_path: Path) -> None:
    directory, out = directories[architecture], tmp_path / "new" / "scores.json"
    scores = evaluate_model(directory, [str(text)], pseudo_perplexity=2, device="cpu", out=out)
    assert json.loads(out.read_text()) == scores
    causal = architecture in ("gpt2", "llama")
    assert scores["kind"] == ("causal" if causal else "mlm")
    assert {"loss", "tokens", "bytes"} <= set(scores)
    assert set(scores) >= ({"bits_per_byte", "perplexity"} if causal else {"accuracy", "pseudo_perplexity"})
    assert scores["text"]["files"] == [str(text)]
    assert scores["text"]["documents"] == 30
    weights = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    assert scores["model"]["sha256"]["model.safetensors"] == weights
    assert set(scores["tokenizer"]["sha256"]) == {"tokenizer.json", "tokenizer_config.json"}
    assert scores["precision"] == "fp32"
    assert scores["context"]["window"] == (32 if causal else 22 if architecture == "roberta" else 24)


def test_the_same_scores_twice(directories: dict[str, Path], text: Path) -> None:
    first, second = (evaluate_model(directories["bert"], [str(text)], device="cpu") for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_options_reach_the_scores(directories: dict[str, Path], text: Path) -> None:
    told: list[str] = []
    scores = evaluate_model(
        directories["gpt2"],
        [str(text)],
        text_field="body",
        context=16,
        stride=8,
        max_bytes=300,
        precision="bf16",
        device="cpu",
        progress=lambda stage, done, total: told.append(stage),
    )
    assert (scores["context"]["window"], scores["context"]["stride"]) == (16, 8)
    assert 300 <= scores["bytes"] < 600
    assert scores["precision"] == "bf16"
    assert told


def test_the_scores_are_shown(directories: dict[str, Path], text: Path) -> None:
    for architecture, expected in (("gpt2", "bits per byte"), ("bert", "pseudo-perplexity")):
        sink = io.StringIO()
        console = Console(file=sink, width=120)
        scores = evaluate_model(directories[architecture], [str(text)], device="cpu", console=console)
        show_scores(scores, console)
        assert expected in sink.getvalue()
        assert f"{scores['loss']:.4f}" in sink.getvalue()


def test_a_tokenizer_may_lie_elsewhere(directories: dict[str, Path], text: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    build("gpt2").save_pretrained(alone)
    with pytest.raises(ValueError, match="--tokenizer"):
        evaluate_model(alone, [str(text)], device="cpu")
    scores = evaluate_model(alone, [str(text)], tokenizer=directories["gpt2"], device="cpu")
    assert scores["loss"] == evaluate_model(directories["gpt2"], [str(text)], device="cpu")["loss"]


def test_errors_name_the_remedy(directories: dict[str, Path], text: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": tmp_path / "missing"}, "there is no directory"),
        ({"model": "no-such/model"}, "Hub name that can be reached"),
        ({"model": text}, "is a file"),
        ({"model": tmp_path}, "config.json is missing"),
        ({"files": [str(tmp_path / "none.txt")]}, "none.txt"),
        ({"kind": "mlm"}, "cannot be loaded"),
        ({"kind": "both"}, "use auto, causal, mlm, seq2seq"),
        ({"context": 33}, "takes 1 to 32 tokens"),
        ({"precision": "int8"}, "int8"),
        ({"model": directories["bert"], "stride": 4}, "belongs to causal models"),
        ({"tokenizer": directories["bert"]}, "no bos_token"),
        ({"text_field": "nothing"}, "nothing"),
    ]
    for arguments, message in cases:
        given: dict[str, Any] = {"model": directories["gpt2"], "files": [str(text)], "device": "cpu"} | arguments
        with pytest.raises(ValueError, match=message):
            evaluate_model(given.pop("model"), given.pop("files"), **given)


def test_a_run_or_checkpoint_directory_points_at_its_model(directories: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(directories["gpt2"], tmp_path / "step-00000010" / "model")
    with pytest.raises(ValueError, match="step-00000010/model"):
        load_model(tmp_path / "step-00000010")


def test_a_model_without_its_head_is_refused(tmp_path: Path) -> None:
    """AutoModelForMaskedLM would fill the head with random numbers, and the scores would look like scores."""
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="without that head"):
        load_model(tmp_path, kind="mlm")
    with pytest.raises(ValueError, match="--kind"):
        load_model(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = build("gpt2")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled"):
        load_model(tmp_path)


def test_code_in_a_directory_does_not_run(directories: dict[str, Path], tmp_path: Path) -> None:
    directory = tmp_path / "own-code"
    shutil.copytree(directories["gpt2"], directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="--trust-remote-code"):
        load_model(directory)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["one", "more"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="embeds 257"):
        load_model(directories["gpt2"], tokenizer=tmp_path)
