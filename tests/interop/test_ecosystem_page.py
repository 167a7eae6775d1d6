"""The lines of "Use it elsewhere" in `docs/models.md` run as they stand."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from datasets import Dataset
from ecosystem_builders import SENTENCES, make_tokenizer, publish, tiny

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
LIBRARIES = ("lm_eval", "onnxruntime", "onnxscript", "peft", "sentence_transformers", "trl")


@pytest.mark.slow
def test_the_lines_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    section = PAGE.read_text().split("## Use it elsewhere\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for name, architecture in (("bert", "bert"), ("gpt", "gpt2")):
        tokenizer = make_tokenizer(tmp_path / name, architecture)
        publish(tiny(tokenizer, architecture), tmp_path / f"runs/quickstart-{name}/export", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names = {"dataset": Dataset.from_dict({"text": SENTENCES})}
    code = code.replace('SFTConfig("sft",', 'SFTConfig("sft", max_steps=1, use_cpu=True, bf16=False, report_to="none",')
    exec(compile(code, str(PAGE), "exec"), names)
    assert (tmp_path / "onnx" / "model.onnx").is_file()
    names["trainer"].train()
    assert any("lora_" in name for name, _ in names["adapted"].named_parameters())
    (words,) = re.findall(r"--model_args pretrained=\S+?,(\S+)", section)
    assert words == "dtype=float32,add_bos_token=False"
