"""`pretrain evaluate` with further measures and several models: one call, one table, one JSON."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.config_evaluate import MeasuresConfig, measures_of
from pretrain.evaluate import evaluate_model, show_scores


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """One file for each measure, of words that the tiny tokenizers know."""
    rows: dict[str, list[dict[str, Any]]] = {
        "pairs": [
            {"sentence_good": "the cat sat", "sentence_bad": "cat the sat", "field": "syntax"},
            {"sentence_good": "a dog ran", "sentence_bad": "dog a ran", "field": "syntax"},
            {"sentence_good": "it was red", "sentence_bad": "it was was red", "field": "meaning"},
        ],
        "alike": [
            {"sentence1": "the cat", "sentence2": "a cat", "score": 4},
            {"sentence1": "the dog ran", "sentence2": "a tree", "score": 1},
            {"sentence1": "it was red", "sentence2": "it was big", "score": 3},
        ],
        "found": [{"query": "the cat", "positive": "a cat sat"}, {"query": "a dog", "positive": "the dog ran"}],
    }
    for name, examples in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    (tmp_path / "text.txt").write_text("the cat sat on the mat .\n" * 6)
    return {name: str(tmp_path / f"{name}.jsonl") for name in rows} | {"text": str(tmp_path / "text.txt")}


def asked(files: dict[str, str], **more: Any) -> MeasuresConfig:
    return MeasuresConfig(
        minimal_pairs=(files["pairs"],), similarity=(files["alike"],), retrieval=(files["found"],), **more
    )


def test_models_beside_each_other_are_scored_on_all_of_it(
    directories: dict[str, Path], files: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "scores.json"
    scores = evaluate_model(
        directories["gpt2"],
        [files["text"]],
        measures=asked(files),
        beside=[directories["bert"], directories["gpt2"]],
        device="cpu",
        out=out,
    )
    assert json.loads(out.read_text()) == scores
    masked, same = scores["beside"]
    for found in (scores, masked, same):
        assert found["minimal_pairs"]["pairs"]["pairs"] == 3
        assert found["similarity"]["alike"]["pairs"] == 3
        assert found["retrieval"]["found"]["candidates"] == 2
        assert list(found["retrieval"]["found"]["files"]) == [files["found"]]
    assert scores["minimal_pairs"]["pairs"]["scored_by"] == "log-likelihood"
    assert masked["minimal_pairs"]["pairs"]["scored_by"] == "pseudo-log-likelihood, within-word"
    assert "bits_per_byte" in scores
    assert "pseudo_perplexity" in masked
    own = {key: value for key, value in scores.items() if key not in ("beside", "seconds")}
    assert own == {key: value for key, value in same.items() if key != "seconds"}

    sink = io.StringIO()
    show_scores(scores, Console(file=sink, width=200))
    (line,) = (line for line in sink.getvalue().splitlines() if "pairs: minimal pairs" in line)
    shares = [f"{100 * found['minimal_pairs']['pairs']['accuracy']:.1f}%" for found in (scores, masked, same)]
    assert re.findall(r"[\d.]+%", line) == shares
    assert "pairs, syntax" in sink.getvalue()
    (line,) = (line for line in sink.getvalue().splitlines() if "bits per byte" in line)
    assert len(re.findall(r"\d\.\d{4}", line)) == 2, "the masked model's cell is empty"


def test_vectors_need_no_head(directories: dict[str, Path], files: dict[str, str], tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    bare = tmp_path / "bare"
    AutoModel.from_pretrained(directories["modernbert"]).save_pretrained(bare)
    AutoTokenizer.from_pretrained(directories["modernbert"]).save_pretrained(bare)
    vectors = MeasuresConfig(similarity=(files["alike"],))
    scores = evaluate_model(bare, measures=vectors, device="cpu")
    with_head = evaluate_model(directories["modernbert"], [files["text"]], measures=vectors, device="cpu")
    assert scores["similarity"] == with_head["similarity"]
    with pytest.raises(ValueError, match="saved without that head"):
        evaluate_model(bare, measures=asked(files), kind="mlm", device="cpu")


def test_from_the_command_line(directories: dict[str, Path], files: dict[str, str], tmp_path: Path) -> None:
    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["evaluate", str(directories["bert"]), "--device", "cpu", *words])

    done = run(
        *("--minimal-pairs", files["pairs"], "--similarity", files["alike"], "--retrieval", files["found"]),
        *("--beside", str(directories["modernbert"]), "--output", str(tmp_path / "out.json")),
        *("--pseudo-likelihood", "original", "--limit", "2"),
    )
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["minimal_pairs"]["pairs"]["pairs"] == found["beside"][0]["minimal_pairs"]["pairs"]["pairs"] == 2
    for words, message in (
        ((), "nothing is asked"),
        (("--tasks", "hellaswag"), "tasks of lm-eval are for decoders"),
        (("--num-fewshot", "2", "--similarity", files["alike"]), "none is asked for"),
        (("--minimal-pairs", files["alike"]), "there is no `sentence_good`"),
        (("--minimal-pairs", files["pairs"], "--pseudo-likelihood", "both"), "--pseudo-likelihood both"),
        (("--minimal-pairs", files["pairs"], "--pair-fields", "field"), "must be two names"),
        (("--similarity", files["alike"], "--beside", str(tmp_path)), "config.json is missing"),
    ):
        failed = run(*words)
        assert isinstance(failed.exception, ValueError), words
        assert message in str(failed.exception), words


def test_a_wrong_kind_is_refused_before_anything_is_scored(directories: dict[str, Path], files: dict[str, str]) -> None:
    told: list[str] = []
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        evaluate_model(
            directories["gpt2"],
            measures=asked(files),
            beside=[_translator(Path(files["text"]).parent / "t5")],
            device="cpu",
            progress=lambda stage, *_: told.append(stage),
        )
    assert not told
    assert measures_of(similarity=["a"], limit=None).similarity == ("a",)


def _translator(directory: Path) -> Path:
    from tiny_models import word_tokenizer
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=32, decoder_start_token_id=0, **sizes)).save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory
