"""The verb `plan`: what a run needs and what it will take on machines that are not here.

What lives here: a configuration and a machine in, a plan as plain data out, and how it looks on a terminal. What must
not: formulas (`pretrain.planning`). Needs neither data nor a tokenizer, touches no device and writes nothing but the
JSON that is asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from pretrain.building import planned_model_config
from pretrain.config import RunConfig
from pretrain.data.batches import target_length_for
from pretrain.data.loader import DataPlane
from pretrain.files import write_bytes
from pretrain.models import model_class
from pretrain.planning.assumptions import Assumption, assumptions_for
from pretrain.planning.choice import Margins, Option, best, evaluate, layouts, pass_of
from pretrain.planning.facts import ModelFacts, model_facts
from pretrain.planning.failures import checkpoint_bytes, reliability, stall_seconds
from pretrain.planning.gpus import GIB, GIGA, TERA, Gpu
from pretrain.planning.memory import PARTS
from pretrain.planning.speed import links_of, rates_of
from pretrain.planning.words import COLUMNS, aligned, assumption_rows, choice, heading, memory_row

Plan = dict[str, Any]

_LARGEST_PUBLISHED = 32  # GPUs that a model below 1 B was published on


@dataclass(frozen=True)
class Machine:
    """Where a run is to go: so many accelerators of a kind, over so many nodes, and what is assumed of them."""

    gpu: Gpu
    gpus: int
    nodes: int
    assumed: dict[str, Assumption]

    @classmethod
    def of(cls, gpu: Gpu, gpus: int, nodes: int, assume: Sequence[str] = ()) -> Machine:
        """A machine.

        Raises:
            ValueError: when the accelerators cannot be spread evenly over the nodes, or an assumption is unknown.
        """
        if gpus < 1 or nodes < 1:
            raise ValueError(f"--gpus {gpus} --nodes {nodes}: give at least 1 of each")
        if gpus % nodes:
            near = max(1, gpus // nodes) * nodes
            raise ValueError(
                f"--gpus: {gpus} GPUs cannot be spread evenly over {nodes} nodes; give the GPUs of all nodes together, "
                f"such as --gpus {near} or --gpus {near + nodes}"
            )
        return cls(gpu, gpus, nodes, assumptions_for(gpu, assume))

    def value(self, name: str) -> float:
        """An assumed number."""
        return self.assumed[name].value


def planned_facts(config: RunConfig) -> ModelFacts:
    """The facts of a run's model, built without memory on torch's meta device."""
    planned = planned_model_config(config)
    with torch.device("meta"):
        model = model_class(planned, config.objective.task)(planned)
    return model_facts(model, target_length=target_length_for(config))


def make_plan(config: RunConfig, machine: Machine) -> Plan:
    """The plan of a run on a machine, as plain data.

    Args:
        config: the run; its `train.strategy`, `micro_batch`, `offload` and `shard_size` are kept where they are set.
        machine: what it is to run on.

    Raises:
        ValueError: when there is less than one row for each accelerator, or the budget needs data that is not there.
    """
    rows = config.rows_per_batch
    if rows < machine.gpus:
        raise ValueError(
            f"train.batch_tokens: {config.train.batch_tokens} are {rows} rows of {config.data.sequence_length} tokens, "
            f"fewer than {machine.gpus} GPUs; raise it to {machine.gpus * config.data.sequence_length} at least, or "
            f"give --gpus {rows} at most"
        )
    facts = planned_facts(config)
    precision = _precision(config, machine.gpu)
    options = _options(config, facts, machine, precision, checkpointing=config.train.gradient_checkpointing)
    chosen = best([option for option in options if _allowed(option, config, machine)])
    other = not config.train.gradient_checkpointing
    changed = _options(config, facts, machine, precision, checkpointing=other)
    alternative = best([option for option in changed if _allowed(option, config, machine)])
    plan: Plan = {
        "name": config.name,
        "machine": _machine_facts(machine, precision),
        "model": _model_part(config, facts),
        "options": [_option_part(option, config, machine, precision) for option in options],
        "chosen": None,
        "other_checkpointing": {
            "gradient_checkpointing": other,
            **({} if alternative is None else _option_part(alternative, config, machine, precision)),
        },
        "warnings": _warnings(config, facts, machine, precision),
        "assumptions": {name: asdict(entry) for name, entry in machine.assumed.items()},
    }
    if chosen is not None:
        plan["chosen"] = _option_part(chosen, config, machine, precision)
        plan["chosen"]["reason"] = _reason(chosen, options, config)
        plan["chosen"]["set"] = _settings(chosen)
        plan |= _course(config, facts, machine, plan["chosen"]["tokens_per_second"])
    return plan


def _precision(config: RunConfig, gpu: Gpu) -> str:
    if config.train.precision != "auto":
        return config.train.precision
    return "bf16" if gpu.bf16 else "fp32"


def _options(
    config: RunConfig, facts: ModelFacts, machine: Machine, precision: str, *, checkpointing: bool
) -> list[Option]:
    """Every way to run, evaluated."""
    context = machine.value("context_gib") + (machine.value("nccl_gib") if machine.gpus > 1 else 0.0)
    per_node = machine.gpus // machine.nodes
    compute = 4 if precision == "fp32" else 2
    given = None if config.train.micro_batch == "auto" else int(config.train.micro_batch)
    return [
        evaluate(
            facts,
            pass_of(config, 1, compute, checkpointing=checkpointing),
            layout,
            rows=math.ceil(config.rows_per_batch / machine.gpus),
            micro_batch=given,
            device_memory=machine.gpu.memory,
            optimizer=config.optimizer.name,
            margins=Margins(context * GIB, machine.value("waste")),
            rates=rates_of(machine.gpu, precision, machine.assumed, compiled=config.train.compile),
            links=links_of(machine.gpu, per_node, machine.assumed),
        )
        for layout in layouts(machine.gpus, per_node, shard_size=config.train.shard_size)
    ]


def _allowed(option: Option, config: RunConfig, machine: Machine) -> bool:
    """Whether the configuration leaves this way open, and main memory holds what is offloaded."""
    train, layout = config.train, option.layout
    host = machine.value("host_gib") * GIB * machine.nodes / machine.gpus
    if host and option.parts.host > host:
        return False
    if train.offload is not None and layout.offload != train.offload:
        return False
    if train.shard_size is not None and layout.strategy == "fsdp2" and layout.shard != train.shard_size:
        return False
    return train.strategy in ("auto", layout.strategy)


def _machine_facts(machine: Machine, precision: str) -> dict[str, Any]:
    gpu = machine.gpu
    return {
        "gpu": gpu.name,
        "gpus": machine.gpus,
        "nodes": machine.nodes,
        "precision": precision,
        "peak_tflops": gpu.peak(precision) / TERA,
        "memory_gib": gpu.memory / GIB,
        "bandwidth_gbs": gpu.bandwidth / GIGA,
        "link_gbs": gpu.link / GIGA,
        "network_gbps": gpu.network * 8 / GIGA,
        "price_per_hour": gpu.price,
        "source": gpu.source,
    }


def _model_part(config: RunConfig, facts: ModelFacts) -> dict[str, Any]:
    return {
        "architecture": config.model.architecture or config.model.from_,
        "parameters": facts.size,
        "in_blocks": sum(facts.layer_sizes),
        "outside": facts.outside,
        "vocabulary": facts.vocab_size,
        "layers": sum(stack.num_hidden_layers for stack in facts.stacks),
        "hidden_size": facts.hidden_size,
        "sequence_length": config.data.sequence_length,
        "batch_tokens": config.train.batch_tokens,
        "optimizer": config.optimizer.name,
    }


def _option_part(option: Option, config: RunConfig, machine: Machine, precision: str) -> dict[str, Any]:
    parts = {name: getattr(option.parts, name) / GIB for name in PARTS}
    part: dict[str, Any] = {
        "strategy": option.layout.name,
        "fits": option.time is not None,
        "micro_batch": option.micro_batch,
        "micro_steps": option.micro_steps,
        "memory_gib": parts | {"total": option.parts.total / GIB},
        "host_gib_per_node": option.parts.host * machine.gpus / machine.nodes / GIB,
        "peak_at": option.parts.moment,
    }
    if option.time is not None:
        seconds = option.time.seconds
        part |= {
            "tokens_per_second": config.train.batch_tokens / seconds,
            "seconds_per_step": seconds,
            "mfu": option.time.flops / seconds / machine.gpu.peak(precision),
            "spent": {
                name: getattr(option.time, name)
                for name in ("products", "attention", "traffic", "update", "host", "communication")
            },
        }
    return part


def _reason(chosen: Option, options: Sequence[Option], config: RunConfig) -> str:
    first = options.index(chosen)
    simpler = [option.layout.name for option in options[:first] if option.time is None]
    slower = [option.layout.name for option in options[:first] if option.time is not None]
    words = "the simplest that fits and reaches 97% of the fastest"
    if config.train.strategy != "auto":
        words = f"train.strategy: {config.train.strategy}"
    if simpler:
        words += f"; {', '.join(simpler)} {'does' if len(simpler) == 1 else 'do'} not fit"
    if slower and config.train.strategy == "auto":
        words += f"; {', '.join(slower)} would be slower"
    return words


def _settings(chosen: Option) -> list[str]:
    """Overrides that make a run as planned."""
    layout = chosen.layout
    settings = [f"train.strategy={layout.strategy}", f"train.micro_batch={chosen.micro_batch}"]
    if layout.strategy == "fsdp2" and layout.shard < layout.world:
        settings.append(f"train.shard_size={layout.shard}")
    return settings + ([f"train.offload={layout.offload}"] if layout.offload is not None else [])


def _course(config: RunConfig, facts: ModelFacts, machine: Machine, rate: float) -> Plan:
    """Budget, checkpoints, failures, time and cost at so many tokens a second."""
    tokens = _tokens(config, rate)
    compute_seconds = tokens / rate
    size = checkpoint_bytes(facts, config.optimizer.name)
    sharded = 4 * facts.size > config.checkpoint.shard_above_bytes
    stall = machine.value("stall_seconds") or stall_seconds(
        size,
        machine.gpus,
        machine.nodes,
        asynchronous=config.checkpoint.asynchronous,
        sharded=sharded,
        copy_rate=machine.value("copy_gbs") * GIGA,
        write_rate=machine.value("write_gbs") * GIGA,
    )
    restart = machine.value("restart_seconds")
    outcomes = {}
    for name, hours in (("expected", "mttf_hours"), ("pessimist", "mttf_bad_hours")):
        expected = reliability(machine.gpus, machine.value(hours), stall, restart, compute_seconds)
        wall = compute_seconds / expected.goodput
        outcomes[name] = {
            "mttf_hours": expected.mttf / 3600,
            "save_every_minutes": expected.interval / 60,
            "goodput": expected.goodput,
            "failures": expected.failures,
            "hours": wall / 3600,
            "cost": wall / 3600 * machine.gpus * machine.gpu.price,
        }
    return {
        "budget": {
            "tokens": tokens,
            "steps": tokens / config.train.batch_tokens,
            "hours_of_training": compute_seconds / 3600,
            "tokens_per_parameter": tokens / facts.size,
        },
        "checkpoint": {"bytes": size, "stall_seconds": stall, "sharded": sharded},
        "outcome": outcomes,
    }


def _tokens(config: RunConfig, rate: float) -> float:
    """Token positions of the whole budget; a budget of time at so many tokens a second."""
    train = config.train
    if train.tokens is not None:
        return float(math.ceil(train.tokens / train.batch_tokens) * train.batch_tokens)
    if train.steps is not None:
        return float(train.steps * train.batch_tokens)
    if train.epochs is None:
        seconds = 60.0 * (train.minutes or 60.0 * (train.hours or 0.0))
        return float(max(1, round(seconds * rate / train.batch_tokens)) * train.batch_tokens)
    if not (config.directory / "data").is_dir():
        raise ValueError(
            f"train.epochs: {train.epochs:g} passes over data that is not prepared have no known length; give "
            f"train.tokens=N, or prepare it first: pretrain prepare"
        )
    rows = DataPlane.from_config(config, "train").num_rows
    return float(max(1, math.ceil(train.epochs * rows / config.rows_per_batch)) * train.batch_tokens)


def _warnings(config: RunConfig, facts: ModelFacts, machine: Machine, precision: str) -> list[str]:
    found = []
    rows, gpus = config.rows_per_batch, machine.gpus
    if rows % gpus:
        found.append(
            f"{rows} rows a step over {gpus} GPUs: some have {math.ceil(rows / gpus)} rows and others wait; a multiple "
            f"is train.batch_tokens={(rows // gpus) * gpus * config.data.sequence_length}"
        )
    if facts.size < 1e9 and gpus > _LARGEST_PUBLISHED:
        found.append(
            f"below 1 B parameters no speed was published on more than {_LARGEST_PUBLISHED} GPUs: unknown ground"
        )
    if precision == "bf16" and not machine.gpu.bf16:
        found.append(f"train.precision: bf16, but a {machine.gpu.name} has no native bf16; use fp16")
    if precision == "fp32":
        half = "bf16" if machine.gpu.bf16 else "fp16"
        found.append(f"fp32 runs without tensor cores; train.precision={half} computes with them")
    if config.train.attention == "eager":
        found.append("train.attention: eager keeps every probability; sdpa takes far less memory")
    return found


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan as JSON."""
    write_bytes(path, (json.dumps(plan, indent=2) + "\n").encode())


def show(plan: Plan, console: Console) -> None:
    """Print a plan: what fits, what to take, what comes of it, and everything that was assumed."""
    options = [memory_row(option) for option in plan["options"]]
    head = ["strategy", *COLUMNS, "rows x passes", "tokens/s"]
    sections = [
        ("", heading(plan)),
        ("GiB on each GPU at the highest moment of a step", aligned(head, options, left={0})),
        ("", choice(plan)),
        ("", [f"! {line}" for line in plan["warnings"]]),
        (
            "assumed (another value: --assume NAME=VALUE)",
            aligned(["name", "value", "unit", "what", "source"], assumption_rows(plan), left={0, 2, 3, 4}),
        ),
    ]
    for title, lines in sections:
        if title:
            console.print(Text(title, style="bold"), soft_wrap=True)
        for line in lines:
            console.print(Text(line), soft_wrap=True)
        if lines:
            console.print()
