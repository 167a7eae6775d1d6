"""The plan's formulas against this machine: tokens/s by a probe, and bytes of live tensors, for several shapes.

    python scripts/bench_plan.py [--out plan.json] [--steps N] [--precision fp32 bf16] [--processor-time]

The probe times products, attention, the operations between them and the loss, each alone and none of them in a model.
The formula of `pretrain plan` then predicts the tokens/s of each shape from these rates, and real steps are timed too.
Memory: what `pretrain.planning` says against a count of all live tensors in a real step. On a busy machine
--processor-time (one thread) counts what this process got. CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.config_loop import OptimizerConfig
from pretrain.models import LoomConfig, linear_cross_entropy, loom_config, model_from_config
from pretrain.models.attention import sdpa_attention
from pretrain.models.masks import AttentionMask
from pretrain.planning.activations import Pass
from pretrain.planning.memory import Layout, memory
from pretrain.planning.speed import Rates, step_time
from pretrain.runtime import describe_machine, keep_freed_memory
from pretrain.training.optim import build_optimizer
from tests.planning.training_step import RATE, count_step, packed_rows

PASSES = 5.0

# name, architecture, sizes, rows, row length
SHAPES: tuple[tuple[str, str, dict[str, int], int, int], ...] = (
    ("bert 4 x 256", "bert", {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}, 16, 256),
    ("bert 6 x 384", "bert", {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}, 8, 256),
    (
        "modernbert 6 x 256",
        "modernbert",
        {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4},
        8,
        512,
    ),
    ("gpt2 4 x 256", "gpt2", {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}, 16, 256),
    ("gpt2 8 x 512", "gpt2", {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}, 4, 512),
    ("llama 6 x 384", "llama", {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}, 8, 256),
    ("llama 4 x 256, long", "llama", {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}, 2, 1024),
)
VOCABULARY = 8192
_processor_time = False


def clock() -> float:
    """Seconds on the clock that `main` chose."""
    return time.process_time() if _processor_time else time.perf_counter()


def seconds(work: Callable[[], Any], *, least: float = 0.3) -> float:
    """Median time of a call, after two to warm up."""
    work(), work()
    times: list[float] = []
    while sum(times) < least or len(times) < 3:
        started = clock()
        work()
        times.append(clock() - started)
    return statistics.median(times)


def probe(dtype: torch.dtype) -> Rates:
    """Rates of this machine, from operations outside of any model."""
    matmul = [_matmul(2048, 256, 1024, dtype), _matmul(2048, 512, 2048, dtype), _matmul(2048, 384, 384, dtype)]
    between, kept = _between(dtype)
    rate = PASSES * kept / between
    return Rates(
        matmul=statistics.fmean(matmul),
        attention=_attention(dtype),
        memory=rate,
        passes=PASSES,
        logit_bytes=_loss(dtype, statistics.fmean(matmul)) * rate,
        launch=0.0,
    )


def _matmul(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """FLOP/s of a linear layer, forward and backward."""
    states = torch.randn(rows, inner, dtype=dtype, requires_grad=True)
    weight = torch.randn(columns, inner, dtype=dtype, requires_grad=True)
    gradient = torch.randn(rows, columns, dtype=dtype)
    return 6 * rows * inner * columns / seconds(lambda: functional.linear(states, weight).backward(gradient))


def _attention(dtype: torch.dtype) -> float:
    """FLOP/s of attention over packed rows, the whole square counted, forward and backward."""
    rows, heads, length, width = 8, 4, 256, 64
    states = [torch.randn(rows, heads, length, width, dtype=dtype, requires_grad=True) for _ in range(3)]
    documents = (torch.arange(length) > length // 3).long().expand(rows, length)
    allowed = (documents[:, None, :, None] == documents[:, None, None, :]) & torch.ones(length, length).tril().bool()
    gradient = torch.randn(rows, length, heads, width, dtype=dtype)

    def work() -> None:
        mask = AttentionMask(allowed=allowed, causal=True)
        mixed, _ = sdpa_attention(*states, mask, scale=0.125, dropout=0.0)
        mixed.backward(gradient)

    return 12 * rows * heads * length * length * width / seconds(work)


def _between(dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of norms, sums and an activation, and the bytes that they keep: a block without its products."""
    tokens, hidden = 2048, 384
    stream = torch.randn(tokens, hidden, requires_grad=True)
    wide = torch.randn(tokens, 4 * hidden, dtype=dtype, requires_grad=True)
    weight = torch.ones(hidden, requires_grad=True)
    gradient, wide_gradient = torch.randn(tokens, hidden), torch.randn(tokens, 4 * hidden, dtype=dtype)

    def work() -> None:
        normed = functional.layer_norm(stream, (hidden,), weight)
        normed = functional.layer_norm(stream + normed.to(dtype), (hidden,), weight)
        torch.autograd.backward([normed, functional.gelu(wide)], [gradient, wide_gradient])

    compute = dtype.itemsize
    kept = tokens * hidden * (2 * (4 + (2 if compute == 2 else 4)) + 2 * 4 * compute)
    return seconds(work), float(kept)


def _loss(dtype: torch.dtype, matmul: float) -> float:
    """Seconds of each logit in head and loss, beyond the products."""
    rows, hidden, vocabulary = 2048, 256, VOCABULARY
    states = torch.randn(rows, hidden, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,))

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = linear_cross_entropy(states, weight, targets)
        loss.backward()

    spent = seconds(work) - 6 * rows * hidden * vocabulary / matmul
    return max(0.0, spent) / (rows * vocabulary)


def real_step(config: LoomConfig, rows: int, length: int, *, bf16: bool, steps: int) -> float:
    """Median seconds of a training step."""
    model = model_from_config(config)
    model.train()
    optimizer = build_optimizer(model, OptimizerConfig(name="adamw", lr=1e-4))
    batch, targets = packed_rows(config, rows, length)
    times: list[float] = []
    for _ in range(steps + 2):
        started = clock()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss: Tensor = model(**batch, num_items_in_batch=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(clock() - started)
    return statistics.median(times[2:])


def compare(precision: str, steps: int) -> list[dict[str, Any]]:
    """Predicted and real tokens/s and bytes of every shape."""
    bf16 = precision == "bf16"
    found = []
    for name, architecture, sizes, rows, length in SHAPES:
        config = loom_config(architecture, vocab_size=VOCABULARY, max_position_embeddings=length, **sizes)
        # The machine's speed drifts: the probe is taken beside each shape.
        rates = probe(torch.bfloat16 if bf16 else torch.float32)
        spent = real_step(config, rows, length, bf16=bf16, steps=steps)
        facts, counted, _ = count_step(config, rows, length, bf16=bf16)
        share = RATE if config.kind == "encoder" else 1.0
        step = Pass(rows, length, 2 if bf16 else 4, "cpu", target_share=share)
        predicted = step_time(facts, step, Layout(), rates)
        found.append(
            {
                "shape": name,
                "precision": precision,
                "parameters": facts.size,
                "tokens_per_second": rows * length / spent,
                "predicted_tokens_per_second": rows * length / predicted.seconds,
                "bytes": counted,
                "predicted_bytes": memory(facts, step).tensors,
            }
        )
        line = found[-1]
        sys.stdout.write(
            f"| {name} | {precision} | {facts.size / 1e6:.1f} M | {line['tokens_per_second']:,.0f} | "
            f"{line['predicted_tokens_per_second']:,.0f} | "
            f"{line['predicted_tokens_per_second'] / line['tokens_per_second']:.2f} | {counted / 1e6:.1f} | "
            f"{line['predicted_bytes'] / 1e6:.1f} | {line['predicted_bytes'] / counted:.3f} |\n"
        )
        sys.stdout.flush()
    return found


def main() -> int:
    """Print a table in Markdown; write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--processor-time", action="store_true")
    arguments = parser.parse_args()
    global _processor_time
    _processor_time = arguments.processor_time
    if _processor_time:
        torch.set_num_threads(1)
    keep_freed_memory()
    machine = describe_machine(torch.device("cpu"))
    sys.stdout.write(f"{machine}\n\n| shape | precision | parameters | tokens/s | planned | ratio ")
    sys.stdout.write("| MB of live tensors | planned | ratio |\n|---|---|--:|--:|--:|--:|--:|--:|--:|\n")
    lines = [line for precision in arguments.precision for line in compare(precision, arguments.steps)]
    ratios = [line["predicted_tokens_per_second"] / line["tokens_per_second"] for line in lines]
    sys.stdout.write(f"\ntokens/s, planned over real: median {statistics.median(ratios):.2f}, ")
    sys.stdout.write(f"from {min(ratios):.2f} to {max(ratios):.2f}\n")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"machine": machine, "shapes": lines}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
