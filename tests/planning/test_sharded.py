"""The plan of a sharded job against what the real sharding code gives one rank of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.models import loom_config, model_from_config
from pretrain.planning.activations import Pass
from pretrain.planning.facts import model_facts
from pretrain.planning.memory import Layout, memory, state

JOB = Path(__file__).parent / "sharded_job.py"
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 4000}
LARGE = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 32_000}


@pytest.mark.parametrize(
    ("architecture", "sizes", "shard", "rows", "length", "bf16"),
    [
        ("llama", SMALL, 64, 2, 256, True),
        ("gpt2", SMALL, 8, 2, 256, False),
        pytest.param("llama", LARGE, 64, 4, 2048, True, marks=pytest.mark.slow),  # 1.3 B parameters, half a minute
    ],
)
def test_a_rank_of_64_holds_what_the_plan_says(
    architecture: str, sizes: dict[str, Any], shard: int, rows: int, length: int, bf16: bool
) -> None:
    job = {"architecture": architecture, "sizes": sizes | {"max_position_embeddings": length}, "world": 64}
    job |= {"shard": shard, "rows": rows, "length": length, "bf16": bf16}
    done = subprocess.run([sys.executable, str(JOB), json.dumps(job)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    with torch.device("meta"):
        facts = model_facts(model_from_config(loom_config(architecture, max_position_embeddings=length, **sizes)))
    layout = Layout("fsdp2", 64, shard)
    held = state(facts, layout)
    assert held.masters == pytest.approx(counted["masters"], rel=0.01)
    assert held.gradients == pytest.approx(counted["gradients"], rel=0.01)
    assert held.optimizer == pytest.approx(counted["optimizer"], rel=0.01)
    step = Pass(rows, length, 2 if bf16 else 4, "cpu", packed=False)
    assert memory(facts, step, layout).tensors == pytest.approx(counted["peak"], rel=0.1)
