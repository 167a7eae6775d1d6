"""One training step of a Loom model on synthetic packed rows, as the loop makes it, for counting its tensors.

What lives here: rows, the step, and what the counter saw. What must not: any expectation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.config_loop import OptimizerConfig
from pretrain.models import LoomConfig, model_class
from pretrain.planning.activations import Pass
from pretrain.planning.facts import ModelFacts, model_facts
from pretrain.training.optim import build_optimizer
from tests.planning.live_tensors import LiveTensors

RATE = 0.15


def packed_rows(config: LoomConfig, rows: int, length: int) -> tuple[dict[str, Tensor], int]:
    """Rows of two documents each, and the number of their targets."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, config.vocab_size, (rows, length), generator=generator)
    first = length // 3
    documents = torch.ones(rows, length, dtype=torch.long)
    documents[:, first:] = 2
    positions = torch.cat([torch.arange(first), torch.arange(length - first)]).repeat(rows, 1)
    batch = {"input_ids": ids, "document_ids": documents, "position_ids": positions}
    if config.kind == "seq2seq":
        batch["labels"], batch["decoder_document_ids"] = ids[:, : length // 2], documents[:, : length // 2]
        return batch, batch["labels"].numel()
    if config.kind == "encoder":
        hidden = torch.rand(rows, length, generator=generator) >= RATE
        targets = batch["labels"] = ids.masked_fill(hidden, -100)
    else:
        targets = batch["shift_labels"] = ids.roll(-1, 1)
        targets[:, -1] = -100
    return batch, int((targets != -100).sum())


def count_step(
    config: LoomConfig,
    rows: int,
    length: int,
    *,
    bf16: bool = False,
    optimizer: str = "adamw",
    checkpointing: bool = False,
    micro_steps: int = 1,
) -> tuple[ModelFacts, int, Callable[..., Pass]]:
    """Facts of the model, the most bytes of live tensors in its second step, and the pass to plan with."""
    detects = getattr(config, "generator_size", None) is not None
    model = model_class(config, "replaced_token_detection" if detects else "pretraining")(config)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    compute = torch.bfloat16 if bf16 else torch.float32
    settings = OptimizerConfig(name=optimizer, lr=1e-3)  # type: ignore[arg-type]
    made = build_optimizer(model, settings, compute_dtype=compute)
    batch, targets = packed_rows(config, rows, length)

    def step() -> None:
        for _ in range(micro_steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**batch, num_items_in_batch=targets).loss
            loss.backward()
        del loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        made.step()
        made.zero_grad(set_to_none=True)

    counter = LiveTensors()
    counter.know([*model.parameters(), *batch.values()])
    with counter:
        step()
        counter.reset_peak()
        step()

    def planned(**changes: Any) -> Pass:
        share = RATE if config.kind == "encoder" else 1.0  # of a decoder's row
        keys: dict[str, Any] = {"device": "cpu", "checkpointing": checkpointing, "target_share": share}
        return Pass(rows, length, 2 if bf16 else 4, **(keys | changes))

    return model_facts(model, target_length=length // 2), counter.peak, planned
