"""A model saved with its code loads where this package is not installed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from loom_builders import tiny_model, tokens

from pretrain.models import register_hub_code

SCRIPT = """
import sys
for blocked in ("pretrain",):
    sys.modules[blocked] = None  # an import of it fails
import torch, transformers
directory, auto = sys.argv[1:]
ids, expected = torch.load(directory + "/expected.pt")
model = getattr(transformers, auto).from_pretrained(directory + "/model", trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(model(input_ids=ids).logits, expected)
base = transformers.AutoModel.from_pretrained(directory + "/model", trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(base(input_ids=ids).last_hidden_state, model.model(input_ids=ids).last_hidden_state)
if auto == "AutoModelForCausalLM":
    assert model.generate(ids, max_new_tokens=3, pad_token_id=1).shape[1] > ids.shape[1]
transformers.AutoModelForSequenceClassification.from_pretrained(directory + "/model", trust_remote_code=True)
print(type(model).__module__)
"""


@pytest.mark.parametrize(
    ("architecture", "auto"), [("modernbert", "AutoModelForMaskedLM"), ("llama", "AutoModelForCausalLM")]
)
def test_a_model_saved_with_its_code_needs_no_package(architecture: str, auto: str, tmp_path) -> None:
    # A shape without a stock home: learned positions in a gated, otherwise rotary design.
    keys = {"position_kind": "learned"}
    if architecture == "modernbert":
        keys |= {"first_norm": True}
    model = tiny_model(architecture, **keys)
    register_hub_code(model)
    model.save_pretrained(tmp_path / "model")
    ids = tokens(1, 12)
    with torch.no_grad():
        torch.save((ids, model(input_ids=ids).logits), tmp_path / "expected.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, str(tmp_path), auto],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("transformers_modules.")
