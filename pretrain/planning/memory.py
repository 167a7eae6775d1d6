"""Memory of one device in a training step, by part, for every way of sharing the work.

What lives here: what each strategy holds, and the moments of a step at which memory can be largest. What must not: what
a block keeps (`activations`), or which strategy is best (`choice`).

A step is walked moment by moment: the head's forward pass, the start of its backward pass, the backward pass of each
block, of the embeddings, and the update. The peak is the largest sum, and the parts are those of that moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from pretrain.planning.activations import WIDE, Block, Head, Pass, block, head, masks, outside_stack
from pretrain.planning.facts import ModelFacts
from pretrain.planning.gpus import GIB

Strategy = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
STRATEGIES: tuple[Strategy, ...] = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
STACK_ELEMENTS = 1 << 26  # as `training.optim`, compared by a test


@dataclass(frozen=True)
class Layout:
    """How the state of a job lies on its devices.

    Attributes:
        strategy: who holds what.
        world: devices.
        shard: devices that share one copy; `world`, or fewer with hybrid sharding.
        offload: "optimizer": its state lies in main memory; "all": parameters, too.
        zero_bucket: elements of DeepSpeed's bucket.
    """

    strategy: Strategy = "single"
    world: int = 1
    shard: int = 1
    offload: Literal["optimizer", "all"] | None = None
    zero_bucket: float = 5e7

    @property
    def name(self) -> str:
        """What people call it."""
        hybrid = "hybrid " if self.strategy == "fsdp2" and self.shard < self.world else ""
        return f"{hybrid}{self.strategy}" + (f" + {self.offload} offload" if self.offload else "")

    @property
    def gathers(self) -> bool:
        """Whether parameters are whole only while they are used."""
        return self.strategy in ("fsdp2", "zero3")


@dataclass(frozen=True)
class Parts:
    """Bytes of one device at the moment of a step when they are most.

    Attributes:
        masters: fp32 parameters, the working ones and those of a partition.
        gradients: fp32.
        optimizer: moments.
        buffers: buckets that gradients travel in.
        gathered: parameters made whole for use.
        copies: of weights in the compute type.
        activations: kept for the backward pass.
        head: logits of one chunk and the head's gradients.
        workspace: what comes and goes in a backward pass or an update.
        overhead: context and communicators of the libraries, and what the allocator cannot use.
        host: bytes of main memory for what is offloaded (not in `total`).
        moment: of the step.
    """

    masters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    buffers: float = 0.0
    gathered: float = 0.0
    copies: float = 0.0
    activations: float = 0.0
    head: float = 0.0
    workspace: float = 0.0
    overhead: float = 0.0
    host: float = 0.0
    moment: str = ""

    @property
    def total(self) -> float:
        """Bytes in all."""
        return self.tensors + self.overhead

    @property
    def tensors(self) -> float:
        """Bytes of live tensors."""
        return float(sum(getattr(self, name) for name in PARTS)) - self.overhead


PARTS = tuple(field.name for field in fields(Parts) if field.name not in ("host", "moment"))


@dataclass(frozen=True)
class State:
    """Bytes that a device holds all the time, and what its gradients come to."""

    masters: float
    optimizer: float
    buffers: float
    gradients: float
    host: float


def state(facts: ModelFacts, layout: Layout, optimizer: str = "adamw") -> State:
    """Parameters, moments, buckets, and all gradients once they are there, on the fullest device."""
    size, trained = float(WIDE * facts.size), float(WIDE * facts.trainable)
    values = _moments(facts, optimizer)  # bytes of moments a byte of parameters
    part = WIDE * (facts.shard(layout.shard) if layout.strategy == "fsdp2" else facts.size / layout.shard)
    bucket = WIDE * min(layout.zero_bucket, facts.trainable)
    masters, gradients, moments, buffers = size, trained, trained * values, 0.0
    if layout.strategy == "ddp":
        gradients, buffers = 0.0, trained  # gradients are views of the buckets, which stay
    elif layout.strategy == "fsdp2":
        masters, gradients, moments = part, part, part * values
    elif layout.strategy in ("zero1", "zero2"):
        # Beside a rank's part, a whole set of gradients stays, in stage 2 as in stage 1 (counted on fake ranks).
        masters, moments, buffers, gradients = size + part, part * values, trained + bucket, part
    elif layout.strategy == "zero3":
        masters, gradients, moments, buffers = 2 * part, part, part * values, bucket
    host = 0.0
    if layout.offload is not None:
        kept = {"zero1": size, "zero2": size, "zero3": part, "fsdp2": part}.get(layout.strategy, size)
        kept = 0.0 if layout.offload == "all" else kept
        host = masters - kept + moments + gradients
        masters, moments = kept, 0.0
        gradients = 0.0 if layout.strategy in ("zero2", "zero3", "fsdp2") else gradients
    return State(masters, moments, buffers, gradients, host)


def _moments(facts: ModelFacts, optimizer: str) -> float:
    """Values of state for each parameter: two for Adam, one for a matrix under Muon."""
    if optimizer != "muon" or not facts.size:
        return 2.0
    matrices = sum(facts.layer_matrices)
    return 2.0 - matrices / facts.size


def memory(
    facts: ModelFacts,
    step: Pass,
    layout: Layout | None = None,
    *,
    optimizer: str = "adamw",
    accumulating: bool = False,
    context: float = 0.0,
    waste: float = 0.0,
) -> Parts:
    """The peak of a step, by part.

    Args:
        facts: of the model.
        step: the micro-batch.
        layout: who holds what; one device when left out.
        optimizer: adamw, stable-adamw or muon.
        accumulating: whether gradients of an earlier micro-batch are there already.
        context: bytes of the libraries.
        waste: share of the tensors' bytes that the allocator loses.
    """
    layout = layout or Layout()
    held = state(facts, layout, optimizer)
    base = {"masters": held.masters, "optimizer": held.optimizer, "buffers": held.buffers, "host": held.host}
    largest: dict[str, float] = {}
    moment = ""
    for name, parts in _moments_of_a_step(facts, step, layout, held, optimizer, accumulating):
        if not moment or sum(parts.values()) > sum(largest.values()):
            largest, moment = parts, name
    tensors = sum(largest.values()) + sum(base.values()) - held.host
    batch = 4 * 8 * step.tokens
    largest["activations"] = largest.get("activations", 0.0) + batch
    overhead = context + waste * (tensors + batch)
    return Parts(**base, **largest, overhead=overhead, moment=moment)


def _moments_of_a_step(
    facts: ModelFacts, step: Pass, layout: Layout, held: State, optimizer: str, accumulating: bool
) -> Iterator[tuple[str, dict[str, float]]]:
    """(Name, bytes by part beside what is always there) of each moment that may be the peak."""
    stacks = [_stack(each, step.of(each)) for each in facts.stacks]
    inputs = WIDE * step.of(facts).tokens * facts.hidden_size
    early = held.gradients if accumulating else 0.0
    layer_bytes = WIDE * max(facts.layer_sizes, default=0) if layout.gathers else 0.0
    whole = WIDE * facts.outside if layout.gathers else 0.0  # embeddings, norms, heads: through the whole step
    below = _Under()
    for stack in stacks:
        activations = below.activations + sum(stack.kept) + stack.edges + stack.lasting_masks
        copies = below.copies + sum(stack.copies) + below.cached + stack.cached
        yield (
            "last block, forward",
            {
                "gradients": early,
                "gathered": whole + 3 * layer_bytes,  # in use, and the next one as it came and as it is cut up
                "copies": copies,
                "activations": activations + stack.masks - stack.lasting_masks,
                "head": below.head,
                "workspace": stack.inputs + (stack.blocks[-1].kept if step.checkpointing else 0.0),
            },
        )
        base = {"gradients": early, "gathered": whole + layer_bytes, "activations": activations + stack.head.kept}
        if not stack.facts.headless:
            yield "head, forward", base | {"copies": copies, "head": below.head + stack.head.forward}
        below = below.over(stack)
    base |= {"copies": below.copies, "head": below.head + stacks[-1].head.backward - stacks[-1].head.lasting}
    yield "head, backward", base
    yield from _backward(facts, stacks, below, (layout, held), (whole, layer_bytes), early if accumulating else None)
    # A tied matrix has its gradient from the head, another from the look-up, and their sum, beside what was there.
    # ZeRO-1 and -2 keep parts alone as `gradients`, so the head's own one comes on top.
    apart = layout.strategy in ("zero1", "zero2")
    table = max(stack.facts.vocab_size * stack.facts.embedding_size for stack in stacks)
    lookup = WIDE * table * ((2 if facts.tied else 0) + accumulating + apart)
    yield (
        "embeddings, backward",
        {
            "gradients": held.gradients + 2 * whole,  # whole ones, and the buffer that they leave in
            "gathered": whole,
            "workspace": lookup + 2 * inputs,
        },
    )
    yield (
        "update",
        {"gradients": held.gradients, "workspace": _update(facts, step, layout, optimizer), "gathered": 0.0},
    )


def _backward(
    facts: ModelFacts,
    stacks: list[_Stack],
    below: _Under,
    where: tuple[Layout, State],
    gathered: tuple[float, float],
    early: float | None,
) -> Iterator[tuple[str, dict[str, float]]]:
    """The backward pass of each block, the last stack first; `below` is what lies over all of them."""
    (_, held), (whole, layer_bytes) = where, gathered
    last = sum(stack.facts.num_hidden_layers for stack in stacks) - 1
    number = last
    ended = 0.0  # elements of blocks whose gradients are there
    for stack in reversed(stacks):
        below = below.without(stack)
        own, step = stack.facts, stack.step
        above = WIDE * own.head_size
        # A decoder's look at the encoder leaves the gradient of all that it saw.
        seen = WIDE * step.rows * step.memory_length * own.hidden_size
        for layer in reversed(range(own.num_hidden_layers)):
            here: Block = stack.blocks[layer]
            again = here.kept + here.weights if step.checkpointing else 0.0
            extra = max(here.mlp_extra, here.attention_extra - here.mlp) + again
            done = 0.0 if early is not None else _share(held, facts, ended)
            yield (
                f"block {number}, backward",
                {
                    # Where parts are kept, the whole gradients of the block before are still on their way.
                    "gradients": (early or 0.0) + done + above + (layer_bytes if number < last else 0.0),
                    "gathered": whole + 3 * layer_bytes,
                    "copies": below.copies + sum(stack.copies[: layer + 1]),
                    "activations": below.activations + sum(stack.kept[: layer + 1]) + stack.edges + stack.lasting_masks,
                    "head": below.head,
                    "workspace": extra + seen,
                },
            )
            if layer + 1 == own.num_hidden_layers or own.block_of(layer) != own.block_of(layer + 1):
                ended += facts.layer_sizes[own.block_of(layer)]
            number -= 1


@dataclass(frozen=True)
class _Stack:
    """One stack of a model in a step; bytes."""

    facts: ModelFacts
    step: Pass
    blocks: list[Block]
    kept: list[float]
    copies: list[float]
    cached: float
    edges: float
    masks: float
    lasting_masks: float
    inputs: float
    head: Head


@dataclass(frozen=True)
class _Under:
    """Bytes that the stacks which have run keep for their backward pass."""

    activations: float = 0.0
    copies: float = 0.0
    cached: float = 0.0
    head: float = 0.0

    def over(self, stack: _Stack) -> _Under:
        """With one more stack."""
        return self._changed(stack, 1)

    def without(self, stack: _Stack) -> _Under:
        """Without the last one."""
        return self._changed(stack, -1)

    def _changed(self, stack: _Stack, sign: int) -> _Under:
        lasting = sum(stack.kept) + stack.edges + stack.lasting_masks + stack.head.kept
        return _Under(
            self.activations + sign * lasting,
            self.copies + sign * sum(stack.copies),
            self.cached + sign * stack.cached,
            self.head + sign * stack.head.lasting,
        )


def _stack(facts: ModelFacts, step: Pass) -> _Stack:
    blocks = [block(facts, step, layer) for layer in range(facts.num_hidden_layers)]
    inputs = WIDE * step.tokens * facts.hidden_size
    return _Stack(
        facts,
        step,
        blocks,
        kept=[inputs if step.checkpointing else each.kept for each in blocks],
        copies=[0.0 if step.checkpointing else each.weights for each in blocks],
        cached=sum(each.cached_weights for each in blocks) if step.checkpointing else 0.0,
        edges=outside_stack(facts, step),
        masks=masks(facts, step),
        lasting_masks=masks(facts, step) if step.checkpointing else 0.0,
        inputs=inputs,
        head=head(facts, step),
    )


def _share(held: State, facts: ModelFacts, parameters: float) -> float:
    """Bytes of gradients that so many parameters have on this device."""
    return held.gradients * parameters / max(1, facts.size)


def _update(facts: ModelFacts, step: Pass, layout: Layout, optimizer: str) -> float:
    """What the optimizer makes beside its state."""
    largest = max((parameter.shard(layout.shard) for parameter in facts.parameters), default=0)
    if optimizer == "stable-adamw":
        return 5 * WIDE * largest
    if optimizer != "muon":
        return 0.0
    alike: dict[tuple[int, ...], int] = {}
    for parameter in facts.parameters:
        if parameter.matrix:
            alike[tuple(sorted(parameter.shape))] = alike.get(tuple(sorted(parameter.shape)), 0) + 1
    parts = layout.shard if layout.strategy in ("zero1", "zero2") else 1  # those cut between matrices
    needs = [_orthogonalize(short, long, -(-count // parts), step.compute) for (short, long), count in alike.items()]
    return max(needs, default=0.0)


def _orthogonalize(short: int, long: int, count: int, compute: int) -> float:
    """Newton-Schulz over a stack: updates, their stack, the running matrices, the small squares."""
    together = min(count, max(1, STACK_ELEMENTS // (short * long)))
    matrices, squares = together * short * long, together * short * short
    if compute == WIDE and 2 * long > 3 * short:
        return WIDE * (4 * matrices + squares) if short < long else WIDE * 4 * matrices
    return 2 * WIDE * matrices + compute * (2 * matrices + 2 * squares)


def gib(count: float) -> float:
    """Bytes in GiB."""
    return count / GIB
