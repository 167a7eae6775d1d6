"""Training speeds that others published, for comparing the formula of speed with them.

llm-foundry's benchmark table (GPT shapes, FSDP, sequences of 2,048, vocabulary 50,432, bf16): MFU by model, GPU and
number of GPUs. What lives here: the figures, and the plan of the same job. What must not: any expectation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pretrain.models import loom_config, model_from_config
from pretrain.planning.activations import Pass
from pretrain.planning.assumptions import assumptions_for
from pretrain.planning.facts import model_facts
from pretrain.planning.gpus import find_gpu
from pretrain.planning.memory import Layout
from pretrain.planning.speed import links_of, rates_of, step_time

# name: (hidden, layers, heads, rows of a micro-batch: their table has other numbers on each line, about these)
SHAPES = {
    "125M": (768, 12, 12, 32),
    "350M": (1024, 24, 16, 16),
    "760M": (1536, 24, 12, 12),
    "1.3B": (2048, 24, 16, 8),
    "2.7B": (2560, 32, 20, 6),
    "6.7B": (4096, 32, 32, 4),
}


@dataclass(frozen=True)
class Published:
    """One line of the table."""

    shape: str
    gpu: str
    gpus: int
    mfu: float


POINTS = (
    Published("125M", "a100", 8, 0.448),
    Published("350M", "a100", 8, 0.516),
    Published("6.7B", "a100", 8, 0.642),
    Published("760M", "h100", 8, 0.349),
    Published("760M", "h100", 32, 0.376),
    Published("1.3B", "h100", 8, 0.418),
    Published("1.3B", "h100", 64, 0.409),
    Published("1.3B", "h100", 512, 0.367),
    Published("2.7B", "h100", 16, 0.437),
    Published("2.7B", "h100", 64, 0.408),
    Published("2.7B", "h100", 512, 0.392),
    Published("6.7B", "h100", 8, 0.464),
    Published("6.7B", "h100", 128, 0.457),
    Published("6.7B", "h100", 512, 0.422),
)


def predicted_mfu(point: Published) -> float:
    """MFU of the same job by our formula: their FSDP gathers 2 bytes a parameter, and their kernels are fused."""
    hidden, layers, heads, rows = SHAPES[point.shape]
    with torch.device("meta"):
        model = model_from_config(
            loom_config(
                "gpt2",
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                vocab_size=50_432,
                max_position_embeddings=2048,
            )
        )
    gpu = find_gpu(point.gpu)
    assumed = assumptions_for(gpu)
    time = step_time(
        model_facts(model),
        Pass(rows, 2048, 2, packed=False),
        Layout("fsdp2", point.gpus, point.gpus),
        rates_of(gpu, "bf16", assumed, compiled=True),
        links=replace(links_of(gpu, 8, assumed), gather_bytes=2),
    )
    return time.flops / time.seconds / gpu.half
