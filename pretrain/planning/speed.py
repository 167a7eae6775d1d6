"""How long a step takes: products, attention, traffic, the update, the host, and communication that nothing hides.

What lives here: one formula, fed with the rates of any device: shares of a data sheet, or rates that a probe measured.
What must not: the rates themselves (`assumptions`), memory limits, or failures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.planning.activations import WIDE, Pass, block
from pretrain.planning.assumptions import Assumption
from pretrain.planning.facts import ModelFacts
from pretrain.planning.gpus import GIGA, Gpu
from pretrain.planning.memory import Layout

NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        matmul: FLOP/s of products.
        attention: FLOP/s of attention, the whole square counted.
        memory: bytes/s of everything else.
        passes: how often a kept byte is read or written in a step.
        logit_bytes: traffic of each logit.
        launch: seconds of the host for each block of a micro-batch.
    """

    matmul: float
    attention: float
    memory: float
    passes: float
    logit_bytes: float
    launch: float


@dataclass(frozen=True)
class Links:
    """How fast bytes leave a device, bytes/s in one direction, and what travels.

    Attributes:
        inside: to the others of its node.
        between: a device's share of what its node has to other nodes.
        per_node: devices of a node.
        overlap: share of computing time that hides communication.
        scale_loss: share lost at each doubling above 8 devices.
        gather_bytes: of a parameter on its way to those that need it whole.
        host: bytes/s between a device and main memory, and of an update that runs there.
    """

    inside: float
    between: float
    per_node: int
    overlap: float = 0.8
    scale_loss: float = 0.02
    gather_bytes: float = WIDE
    host: float = 20e9

    def ring(self, devices: int) -> float:
        """Bytes/s of a collective over so many devices.

        A ring crosses from node to node once, and as many rings run side by side as a node has devices, so what
        counts is all that a node has to the others; never more than a device's link inside.
        """
        return self.inside if devices <= self.per_node else min(self.inside, self.between * self.per_node)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on each device, by what they are spent on, and its FLOPs (as MFU counts them)."""

    products: float
    attention: float
    traffic: float
    update: float
    host: float
    communication: float
    scaling: float
    flops: float

    @property
    def device(self) -> float:
        """Seconds of computing."""
        return self.products + self.attention + self.traffic

    @property
    def seconds(self) -> float:
        """Seconds in all: the device or its host, whichever is slower, and what neither hides."""
        return (max(self.device, self.host) + self.update + self.communication) * self.scaling


def rates_of(gpu: Gpu, precision: str, assumed: dict[str, Assumption], *, compiled: bool) -> Rates:
    """The rates of an accelerator by its data sheet and the assumed shares."""
    end = "_compiled" if compiled else ""
    return Rates(
        matmul=gpu.peak(precision) * assumed["matmul_share"].value,
        attention=gpu.peak(precision) * assumed["attention_share"].value,
        memory=gpu.bandwidth * assumed["memory_share"].value,
        passes=assumed[f"passes{end}"].value,
        logit_bytes=assumed["logit_bytes"].value,
        launch=assumed[f"launch_us{end}"].value / 1e6,
    )


def links_of(gpu: Gpu, per_node: int, assumed: dict[str, Assumption]) -> Links:
    """The links of an accelerator at the assumed share."""
    share = assumed["link_share"].value
    return Links(
        inside=gpu.link * share,
        between=gpu.network * share,
        per_node=per_node,
        overlap=assumed["overlap"].value,
        scale_loss=assumed["scale_loss"].value,
        host=assumed["host_gbs"].value * GIGA,
    )


def step_time(
    facts: ModelFacts,
    step: Pass,
    layout: Layout,
    rates: Rates,
    *,
    micro_steps: float = 1.0,
    optimizer: str = "adamw",
    links: Links | None = None,
) -> StepTime:
    """Seconds of an optimizer step of so many micro-batches on each device."""
    again = 1 if step.checkpointing else 0
    multiplied = headed = squares = seen = kept = logits = 0.0
    for stack in facts.stacks:
        part = step.of(stack)
        tokens = part.tokens * micro_steps
        multiplied += _multiplied(stack, part) * micro_steps
        headed += (stack.head_size + stack.transform_size) * tokens * (1.0 if stack.detects else part.target_share)
        across = stack.num_hidden_layers * part.memory_length if stack.crosses else 0
        squares += (stack.num_hidden_layers * part.length + across) * stack.query_width * tokens
        keys = sum(_keys(stack, part, local) for local in stack.local_layers)
        seen += (keys + across) * stack.query_width * tokens
        kept += sum(block(stack, part, layer).kept for layer in range(stack.num_hidden_layers)) * micro_steps
        logits += (stack.vocab_size if stack.head_size else 0) * tokens * part.target_share
    products = (6 + 2 * again) * multiplied + 6 * headed
    # A window saves nothing where the mask is dense, but MFU counts the keys in it alone. Forward two products,
    # backward five, one of which makes the scores again; kernels on a CPU keep them.
    attention = (14 if step.device == "cuda" else 12) * squares + 4 * again * squares
    traffic = kept * rates.passes * (1 + 0.4 * again) + logits * rates.logit_bytes
    copies = (WIDE + 2 * step.compute) * sum(facts.layer_matrices) * micro_steps if step.cast else 0.0
    updated = facts.trainable / _updating(layout)
    at = links.host if layout.offload is not None and links is not None else rates.memory
    update = 9 * WIDE * updated / at + _newton_schulz(facts, layout, optimizer) / rates.matmul
    compute = products / rates.matmul + attention / rates.attention + (traffic + copies) / rates.memory
    return StepTime(
        products=products / rates.matmul,
        attention=attention / rates.attention,
        traffic=(traffic + copies) / rates.memory,
        update=update,
        host=rates.launch * sum(stack.num_hidden_layers for stack in facts.stacks) * micro_steps * (1 + again / 3),
        communication=0.0 if links is None else _communication(facts, layout, links, compute, micro_steps, optimizer),
        scaling=1.0 if links is None else (1 - links.scale_loss) ** -max(0.0, math.log2(layout.world / 8)),
        flops=6 * multiplied + 6 * headed + 12 * seen,
    )


def _multiplied(stack: ModelFacts, step: Pass) -> float:
    """Multiplied elements of a stack, as often as a position passes them; a decoder's look makes keys of the input."""
    across = 2 * stack.num_hidden_layers * stack.hidden_size * stack.key_width if stack.crosses else 0
    return step.tokens * (stack.multiplied - across) + step.rows * step.memory_length * across


def _keys(facts: ModelFacts, step: Pass, local: bool) -> int:
    """Keys that a query may look at."""
    return step.length if not local or facts.local_window is None else min(step.length, facts.local_window)


def _updating(layout: Layout) -> int:
    """Devices that share one update."""
    return 1 if layout.strategy in ("single", "ddp") else layout.shard


def _newton_schulz(facts: ModelFacts, layout: Layout, optimizer: str) -> float:
    """FLOPs of orthogonalizing each matrix: five times X X^T, its square, and their product with X."""
    if optimizer != "muon":
        return 0.0
    total = 0.0
    for parameter in facts.parameters:
        if parameter.matrix:
            short, long = sorted(parameter.shape)
            total += NEWTON_SCHULZ_STEPS * (4 * short * short * long + 2 * short**3)
    # ZeRO-1 and -2 cut between matrices, so most are made once; where each is cut, every device makes it whole.
    return total / layout.shard if layout.strategy in ("zero1", "zero2") else total


def _communication(
    facts: ModelFacts, layout: Layout, links: Links, compute: float, micro_steps: float, optimizer: str
) -> float:
    """Seconds of everything that travels and that nothing hides."""
    seconds = _exposed(facts, layout, links, compute, micro_steps) if layout.world > 1 else 0.0
    if optimizer == "muon" and layout.gathers and layout.shard > 1:  # the matrices' gradients, made whole
        seconds += WIDE * sum(facts.layer_matrices) / links.ring(layout.shard)
    held = WIDE * facts.trainable / _updating(layout)
    if layout.offload == "optimizer":  # gradients down and parameters up, once a step
        seconds += 2 * held / links.host
    elif layout.offload == "all":  # parameters up twice and gradients down, in every pass
        seconds += 3 * micro_steps * held / links.host
    return seconds


def _exposed(facts: ModelFacts, layout: Layout, links: Links, compute: float, micro_steps: float) -> float:
    """Seconds of communication that computing does not hide. Gradients travel as fp32, 4 bytes."""
    size = WIDE * facts.trainable
    # Hybrid sharding keeps groups within a node where they fit.
    group, everyone = links.ring(layout.shard), links.ring(layout.world)
    ring = (layout.world - 1) / layout.world
    part = (layout.shard - 1) / layout.shard
    if layout.strategy in ("ddp", "zero1"):  # once a step, beside the last backward pass
        seconds, hides = 2 * size * ring / everyone, compute / micro_steps * 2 / 3
    elif layout.strategy == "zero2":
        seconds, hides = (micro_steps + 1) * size * ring / everyone, compute * 2 / 3
    else:
        gathered = 2 * links.gather_bytes / WIDE * size
        seconds, hides = micro_steps * (gathered + size) * part / group, compute
        if layout.shard < layout.world:
            seconds += 2 * micro_steps * size / layout.shard / everyone
    return max(0.0, seconds - links.overlap * hides)
