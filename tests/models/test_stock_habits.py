"""What transformers asks of every class, found missing by its own tests: plans, refusals, embeddings, recomputation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loom_builders import randomize, relative, tiny_config, tiny_model, tokens
from seq2seq_builders import seq2seq_model

from pretrain.models import model_class

HERE = Path(__file__).resolve().parent


def test_an_unknown_backend_is_refused_in_transformers_words() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match='Specified `attn_implementation="foo"` is not supported by Loom models: take'):
        model.set_attn_implementation("foo")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("architecture", ["bert", "llama", "transformer", "t5"])
def test_a_plan_names_modules_that_are_there(architecture: str) -> None:
    """A gate where there is one, both stacks of an encoder-decoder; attention where a head can stand alone."""
    config = tiny_config(architecture)
    with torch.device("meta"):
        model = model_class(config)(config)
    names = {name.replace(".0.", ".*.") for name, _ in model.named_modules()}
    assert set(model.tp_plan) <= names
    stacks = ["model.encoder", "model.decoder"] if config.kind == "seq2seq" else ["model"]
    for stack in stacks:
        assert model.tp_plan[f"{stack}.layers.*.mlp.down_proj"] == "rowwise"
        assert (f"{stack}.layers.*.mlp.gate_proj" in model.tp_plan) == (config.mlp_kind == "gated")
        assert (f"{stack}.layers.*.self_attn.q_proj" in model.tp_plan) == (architecture != "t5")


def test_given_embeddings_are_those_that_the_table_holds() -> None:
    """What adapters and soft prompts do: look up in `get_input_embeddings()`, whatever the scale."""
    model = tiny_model("bert", embedding_scale=3.0)
    ids = tokens(2, 7)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected)


@pytest.mark.parametrize(("architecture", "keys"), [("llama", {}), ("electra", {"generator_size": 0.5})])
def test_a_resized_model_knows_its_size(architecture: str, keys: dict[str, Any]) -> None:
    config = tiny_config(architecture, **keys)
    model = model_class(config, "replaced_token_detection" if keys else "pretraining")(config)
    assert model.vocab_size == 61
    model.resize_token_embeddings(70)
    assert model.vocab_size == model.config.vocab_size == 70


@pytest.mark.parametrize("variant", ["transformer", "t5"])
def test_reentrant_recomputation_gives_equal_gradients(variant: str) -> None:
    """Layers read the encoder's output and one table of biases together: each gradient is summed over them."""
    model = seq2seq_model(variant).train()
    model.config.label_smoothing = 0.0
    given = {"input_ids": tokens(2, 9), "labels": tokens(2, 6, seed=1)}
    found = []
    for reentrant in (None, True):
        model.zero_grad()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**given).loss.backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    largest = max(float(gradient.abs().max()) for gradient in found[0].values())
    for name, gradient in found[0].items():
        assert float((found[1][name] - gradient).abs().max()) < 1e-5 * largest, name


SPLIT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "modernbert": ("modernbert", {}),
    "transformer": ("transformer", {}),
    "t5": ("t5", {}),
    "alibi": ("gpt2", {"position_kind": "alibi"}),
    "full width": ("llama", {"qk_norm": "full_width"}),
}
_RANK = """
import json, os, sys
sys.path[:0] = json.loads(os.environ["PATHS"])
import torch
from test_stock_habits import SPLIT, split_error
torch.distributed.init_process_group("gloo")
errors = {name: split_error(sys.argv[1] + "/" + name.replace(" ", "-"), *SPLIT[name]) for name in SPLIT}
if torch.distributed.get_rank() == 0:
    print("ERRORS" + json.dumps(errors))
torch.distributed.destroy_process_group()
"""


def split_error(directory: str, architecture: str, keys: dict[str, Any]) -> float:
    """The largest error of the logits of a model loaded in two parts, in a process of two."""
    from transformers.distributed import DistributedConfig

    config = tiny_config(architecture, vocab_size=64, intermediate_size=32, **keys)
    model = model_class(config)(config).eval()
    randomize(model)
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(directory)
    torch.distributed.barrier()
    given = {"input_ids": tokens(2, 9)}
    if config.kind == "seq2seq":
        given["decoder_input_ids"] = tokens(2, 7, seed=1)
    loaded = type(model).from_pretrained(directory, distributed_config=DistributedConfig(tp_size=2)).eval()
    assert type(next(loaded.parameters())).__name__ == "DTensor"
    with torch.no_grad():
        logits, expected = loaded(**given).logits, model(**given).logits
    return relative(logits.full_tensor() if hasattr(logits, "full_tensor") else logits, expected)


@pytest.mark.slow  # two processes
def test_a_model_in_two_parts_says_the_same(tmp_path: Path) -> None:
    paths = json.dumps([str(HERE), str(HERE.parents[1])])
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PATHS": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(next(line for line in done.stdout.splitlines() if "ERRORS" in line).split("ERRORS")[1])
    assert set(errors) == set(SPLIT)
    assert max(errors.values()) < 1e-5, errors
