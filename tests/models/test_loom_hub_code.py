"""A model saved with its code loads where this package is not installed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from loom_builders import tiny_model, tokens

from pretrain.interop import NoStockHome, stock_config
from pretrain.models import register_hub_code

SCRIPT = """
import sys
for blocked in ("pretrain",):
    sys.modules[blocked] = None  # an import of it fails
import torch, transformers
for case in sys.argv[2:]:
    auto, directory = case.split(":")
    directory = sys.argv[1] + "/" + directory
    given, expected = torch.load(directory + "/expected.pt")
    model = getattr(transformers, auto).from_pretrained(directory, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(model(**given).logits, expected)
    base = transformers.AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(base(**given).last_hidden_state, model.model(**given).last_hidden_state)
    if auto == "AutoModelForCausalLM":
        assert model.generate(**given, max_new_tokens=3, pad_token_id=1).shape[1] > given["input_ids"].shape[1]
    if auto == "AutoModelForSeq2SeqLM":
        assert model.generate(given["input_ids"], max_new_tokens=3).shape[1] > 1
    else:
        classifier = transformers.AutoModelForSequenceClassification
        classifier.from_pretrained(directory, trust_remote_code=True)
        transformers.AutoModelForTokenClassification.from_pretrained(directory, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
print("all")
"""

# Shapes without a stock home.
CASES = [
    ("AutoModelForMaskedLM", "modernbert", {"position_kind": "learned", "first_norm": True}),
    ("AutoModelForCausalLM", "gpt2", {"position_kind": "alibi", "qk_norm": "per_head", "block_kind": "parallel"}),
    ("AutoModelForSeq2SeqLM", "transformer", {"norm_placement": "pre", "position_kind": "relative"}),
    (
        "AutoModelForPreTraining",
        "eurobert",
        {"task": "replaced_token_detection", "generator_size": 0.5, "qk_norm": "per_head"},
    ),
]


def test_models_saved_with_their_code_need_no_package(tmp_path) -> None:
    for auto, architecture, keys in CASES:
        model = tiny_model(architecture, **keys)
        with pytest.raises(NoStockHome):
            stock_config(model.config)
        register_hub_code(model)
        directory = tmp_path / architecture
        model.save_pretrained(directory)
        given = {"input_ids": tokens(1, 12)}
        if auto == "AutoModelForSeq2SeqLM":
            given["decoder_input_ids"] = tokens(1, 7, seed=1)
        with torch.no_grad():
            torch.save((given, model(**given).logits), directory / "expected.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    cases = [f"{auto}:{architecture}" for auto, architecture, _ in CASES]
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, str(tmp_path), *cases],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all\n"
