"""The rehearsal `scripts/text_to_hub.py`: the four small configurations from text to a repository and back."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.config import load_config
from scripts import from_hub, text_to_hub
from tests.local_hub import LocalHub

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, str(ROOT / "scripts" / "text_to_hub.py")]
TINY = [
    "tokenizer.vocab_size=600",
    "tokenizer.max_bytes=200000",
    "data.sequence_length=32",
    "data.workers=1",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.max_position_embeddings=64",
    "train.tokens=2048",
    "train.batch_tokens=256",
    "checkpoint.every=4",
    "evaluate.every=4",
    "evaluate.max_tokens=512",
]
CHINESE = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def chinese_text(folder: Path) -> Path:
    """Three hundred documents of drawn sentences."""
    draw = random.Random(7)
    sentences = ("".join(draw.choices(CHINESE, k=draw.randint(6, 20))) + "。" for _ in range(3000))
    path = folder / "text.jsonl"
    lines = (json.dumps({"text": "".join(next(sentences) for _ in range(10))}, ensure_ascii=False) for _ in range(300))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# --- from text to a repository and back -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small-bert-en", "small-bert-zh", "small-gpt-en", "small-gpt-zh"])
def test_text_becomes_a_repository_that_loads_without_pretrain(tmp_path: Path, name: str) -> None:
    text = "python-stdlib" if name.endswith("en") else str(chinese_text(tmp_path))
    words = [name, f"out={tmp_path}", f"data.train=[{text}]", *TINY, "--folder", str(tmp_path / "hub")]
    asked = [] if name.endswith("en") else ["--text", "天地[MASK]黄"]
    environment = os.environ | SETTINGS
    done = subprocess.run(
        [*PROGRAM, *words, *asked],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    hub = LocalHub(tmp_path / "hub")
    branches = hub.repositories.read(f"local/{name}")["branches"]
    assert {"main", "step-8"} <= set(branches)
    for revision in branches:
        assert f"│ {revision} " in done.stdout
    assert done.stdout.count(" equal ") == len(branches)
    assert "valid, runs" in done.stdout
    assert ("ModernBertForMaskedLM" if "bert" in name else "LlamaForCausalLM") in done.stdout
    assert done.stdout.splitlines()[-2].startswith(asked[1].partition("[")[0] if asked else "He looked at the")
    if name == "small-bert-zh":
        _other_weights_are_seen(tmp_path / name, hub, name)


def _other_weights_are_seen(run: Path, hub: LocalHub, name: str) -> None:
    """One bit of one weight, changed on this side."""
    weights = run / "export" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with hub:
        repository = f"local/{name}"
        revisions = text_to_hub.revisions_of(run, hub, repository)
        found = text_to_hub.load_back(hub, repository, revisions, None)
        with pytest.raises(text_to_hub.FailedError, match="cannot be loaded back"):
            text_to_hub.load_back(hub, "local/nothing", {"main": run / "export"}, None)
    assert {revision for revision, row in found["revisions"].items() if not row["equal"]} == {"main"}


# --- its parts ------------------------------------------------------------------------------------------------------


def test_the_owner_is_the_user_of_this_hub() -> None:
    config = load_config("small-bert-en")
    assert text_to_hub.repository_of(None, config) == "local/small-bert-en"
    assert text_to_hub.repository_of("mine", config) == "local/mine"
    assert text_to_hub.repository_of("local/mine", config) == "local/mine"
    with pytest.raises(ValueError, match="give local/mine, or mine"):
        text_to_hub.repository_of("somebody/mine", config)


def test_overrides_stand_among_options(capsys: pytest.CaptureFixture[str]) -> None:
    given = text_to_hub.arguments(["small-bert-en", "--repo", "mine", "train.steps=4", "out=there"])
    assert (given.config, given.overrides, given.repo) == ("small-bert-en", ["train.steps=4", "out=there"], "mine")
    for wrong, said in (([], "CONFIG"), (["small-bert-en", "--text", "no mask"], "has no [MASK]")):
        with pytest.raises(SystemExit, match="2"):
            text_to_hub.arguments(wrong)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["small-bert-en", "export.to=code"], "export.to=code"),
        (["small-bert-en", "train.stepz=4"], "stepz"),
        (["small-bert-en", "--repo", "a/b"], "--repo a/b"),
        (["--repo", "a b", "small-bert-en"], "local/a b"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a command was started")

    monkeypatch.setattr(text_to_hub, "call", refuse)
    monkeypatch.setattr(sys, "argv", ["text_to_hub.py", *words])
    assert text_to_hub.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error


def test_the_code_of_a_command_that_fails_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text_to_hub, "pretrain", lambda *_: [sys.executable, "-c", "raise SystemExit(75)"])
    monkeypatch.setattr(sys, "argv", ["text_to_hub.py", "small-bert-en"])
    assert text_to_hub.main() == 75
    assert "pretrain run ended with code 75" in capsys.readouterr().err


def test_the_project_is_not_to_be_had_behind_the_guard() -> None:
    guard = from_hub.Absent()
    for name in ("pretrain", "pretrain.models"):
        with pytest.raises(ModuleNotFoundError, match="not to be had"):
            guard.find_spec(name)
    assert guard.find_spec("pretraining") is None


@pytest.mark.parametrize(
    ("architecture", "found"),
    [
        ("ModernBertForMaskedLM", ("AutoModelForMaskedLM", "fill-mask")),
        ("GPT2LMHeadModel", ("AutoModelForCausalLM", "text-generation")),
        ("LlamaForCausalLM", ("AutoModelForCausalLM", "text-generation")),
        ("T5ForConditionalGeneration", ("AutoModelForSeq2SeqLM", None)),
        ("MarianMTModel", ("AutoModelForSeq2SeqLM", None)),
        ("ElectraForPreTraining", ("AutoModelForPreTraining", None)),
        ("BertModel", ("AutoModel", None)),
    ],
)
def test_the_configuration_decides_the_class(architecture: str, found: tuple[str, str | None]) -> None:
    assert from_hub.class_of(SimpleNamespace(architectures=[architecture])) == found


class Gives(torch.nn.Module):
    """A model with one answer."""

    def __init__(self, *values: float, pooled: float = 0.0) -> None:
        super().__init__()
        self.answer = {"logits": torch.tensor(values), "pooler_output": torch.tensor(pooled), "cache": None}

    def forward(self) -> dict[str, torch.Tensor | None]:
        """The answer."""
        return self.answer


def test_equality_is_of_bits() -> None:
    assert from_hub.are_equal(Gives(0.5, float("nan")), Gives(0.5, float("nan"), pooled=1.0), [{}])
    assert not from_hub.are_equal(Gives(0.0), Gives(-0.0), [{}])
    assert not from_hub.are_equal(Gives(0.5), Gives(0.5 + 2**-24), [{}])
    assert not from_hub.are_equal(Gives(0.5), Gives(0.5, 0.5), [{}])


def test_lines_of_a_card_that_do_not_run_are_told() -> None:
    assert from_hub.run_lines("# x\n\n```python\nprint(1 + 1)\n```\n") == ""
    assert "ZeroDivisionError" in from_hub.run_lines("```python\n1 / 0\n```\n")
    assert "no lines" in from_hub.run_lines("# x\n")
