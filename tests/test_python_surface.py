"""The Python surface: every public name resolves, and the README's example trains and exports a model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pretrain

ROOT = Path(__file__).resolve().parent.parent


def example() -> str:
    """The first Python block of the README."""
    match = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    return match[1]


@pytest.mark.parametrize("name", pretrain.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(pretrain, name)
    assert value is not None
    if callable(value):
        assert value.__doc__


def test_the_example_is_short() -> None:
    assert len([line for line in example().splitlines() if line.strip()]) <= 18


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example(), "README.md", "exec"), {})
    assert (tmp_path / "runs" / "by-hand" / "export" / "model.safetensors").is_file()


def test_own_objective_and_evaluator_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`objective.kind: my_module:fn` and `evaluate.evaluators: [my_module:fn]`, from the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_parts.py").write_text(
        "import numpy as np\n"
        "def every_other(rows, draws, tokens):\n"
        "    labels = np.where((rows.position_ids % 2 == 1) & (rows.document_ids > 0), rows.input_ids, -100)\n"
        "    masked = np.where(labels != -100, tokens.mask, rows.input_ids)\n"
        "    return {'input_ids': masked, 'labels': labels}\n"
        "def count_parameters(model, context):\n"
        "    return {'parameters': float(sum(p.numel() for p in model.parameters())), 'step': float(context.step)}\n"
    )
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"document {i} says {i * i} and no more" for i in range(3000)))
    config = pretrain.load_config(
        "quickstart-bert",
        [
            "name=own",
            "data.train=[corpus.txt]",
            "data.document=paragraph",
            "tokenizer.vocab_size=256",
            "objective={kind: 'my_parts:every_other'}",
            "evaluate.evaluators=['my_parts:count_parameters']",
            "data.sequence_length=64",
            "train.steps=2",
            "train.batch_tokens=256",
            "model.hidden_size=32",
            "log.to=[jsonl]",
        ],
    )
    pretrain.train_tokenizer(config)
    pretrain.prepare_data(config)
    result = pretrain.build_trainer(config).train()
    assert result.finished
    assert result.progress.scores["count_parameters/parameters"] > 1000
    assert result.progress.scores["validation/loss"] > 0
