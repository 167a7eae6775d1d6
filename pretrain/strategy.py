"""How a run is split over processes: what the configuration asks, what the launcher says, and whether they agree.

What lives here: reading the variables that torchrun, accelerate and deepspeed set, and refusing what does not fit,
before anything is built. What must not: torch, or the engines themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pretrain.config_loop import LoopConfig, LoopTrainConfig

Strategy = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
ZERO = ("zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Launch:
    """What the environment of a process says.

    Attributes:
        world: processes of the job; None when no launcher started this one.
        rank: of this process.
        wish: the strategy that `accelerate launch` was configured for; None when it says nothing.
        precision: what `accelerate launch` was configured for ("bf16", "fp16"); None when it says nothing.
        deepspeed: DeepSpeed's JSON that `accelerate launch` was given.
        others: further settings of `accelerate launch` that would decide the training: what, its value, the key here
            that must say the same.
    """

    world: int | None = None
    rank: int = 0
    wish: str | None = None
    precision: str | None = None
    deepspeed: str | None = None
    others: tuple[tuple[str, str, str], ...] = ()


def read_launch(environment: Mapping[str, str]) -> Launch:
    """What torchrun, `accelerate launch`, the deepspeed launcher or `pretrain train --processes` says.

    Raises:
        ValueError: when accelerate was configured for something that is not among the strategies.
    """
    started = "LOCAL_RANK" in environment or "RANK" in environment
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    return Launch(
        world=int(environment.get("WORLD_SIZE", 1)) if started else None,
        rank=int(environment.get("RANK", environment.get("LOCAL_RANK", 0))),
        wish=_wish(environment),
        precision=None if precision == "no" else precision,
        deepspeed=environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or None,
        others=tuple(_others(environment)),
    )


def _others(environment: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    if (steps := environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) not in ("1", "auto"):
        yield "gradient_accumulation_steps", steps, ""
    if (backend := environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()) != "no":
        yield "dynamo_backend", backend, "compile"
    if environment.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        yield "fsdp_offload_params", "true", "offload"
    if environment.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true":
        yield "fsdp_activation_checkpointing", "true", "gradient_checkpointing"


def _wish(environment: Mapping[str, str]) -> str | None:
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        if file := environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
            stage = str(_read_json(Path(file)).get("zero_optimization", {}).get("stage", 0))
        if f"zero{stage}" not in ZERO:
            raise ValueError(f"accelerate launch: ZeRO stage {stage} is not supported; use --zero_stage 1, 2 or 3")
        return f"zero{stage}"
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if environment.get("FSDP_VERSION", "1") != "2":
            raise ValueError("accelerate launch: FSDP version 1 is not supported; give --fsdp_version 2")
        return "fsdp2"
    return None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"accelerate launch: deepspeed_config_file `{path}` cannot be read ({error})") from error


def resolve_strategy(config: LoopConfig, launch: Launch) -> Strategy:
    """The strategy of a run, once what was asked for and what was launched agree.

    Raises:
        ValueError: names what differs, and the remedy.
    """
    train = config.train
    world = launch.world or 1
    asked = train.strategy
    if launch.wish is not None and asked not in ("auto", launch.wish):
        raise ValueError(
            f"train.strategy: {asked} was asked for, but accelerate launch is configured for {launch.wish}; "
            f"set train.strategy={launch.wish} (or auto), or launch it otherwise"
        )
    if launch.precision is not None and train.precision not in ("auto", launch.precision):
        raise ValueError(
            f"train.precision: {train.precision} was asked for, but accelerate launch has --mixed_precision "
            f"{launch.precision}; make them equal, or leave --mixed_precision no"
        )
    for what, value, key in launch.others:
        if not key:
            raise ValueError(
                f"accelerate launch: {what} {value} has no place here, accumulation follows from train.batch_tokens "
                "and train.micro_batch; remove it"
            )
        if not getattr(train, key):
            raise ValueError(
                f"accelerate launch: {what} is {value}, but train.{key} is {getattr(train, key)}; set train.{key}="
                f"{'all' if key == 'offload' else 'true'}, or remove it there"
            )
    if train.processes is not None and train.processes != world:
        raise ValueError(
            f"train.processes: {train.processes} were asked for, but this job has {world}; start them with `pretrain "
            f"train CONFIG --processes {train.processes}`, or, a fine-tuning too, with `torchrun --nproc_per_node "
            f"{train.processes} -m pretrain` in place of `pretrain` (`accelerate launch --cpu --num_processes N` "
            "starts one process whatever N is)"
        )
    strategy: Strategy = (launch.wish or ("single" if world == 1 else "ddp")) if asked == "auto" else asked  # type: ignore[assignment]
    if strategy == "single" and world > 1:
        raise ValueError(
            f"train.strategy: single runs on one process, but {world} were launched; use ddp, fsdp2, zero1, zero2 or "
            "zero3, or start it with `pretrain train` alone"
        )
    if config.rows_per_batch < world:
        raise ValueError(
            f"a batch of {config.tokens_per_step} tokens is {config.rows_per_batch} rows of {config.row_tokens}, fewer "
            f"than the {world} processes; raise it (train.batch_tokens, of a fine-tuning train.batch_size) to "
            f"{world * config.row_tokens} tokens ({world} rows) at least"
        )
    _refuse_settings(train, strategy, world)
    return strategy


def _refuse_settings(train: LoopTrainConfig, strategy: str, world: int) -> None:
    """Refuse settings that belong to another strategy."""
    if train.shard_size is not None:
        if strategy != "fsdp2":
            raise ValueError(f"train.shard_size: hybrid sharding is of fsdp2, not of {strategy}; remove it")
        if world % train.shard_size:
            raise ValueError(f"train.shard_size: {train.shard_size} does not divide the {world} processes")
    fits = {"optimizer": ZERO, "all": ("fsdp2", "zero3")}
    if train.offload is not None and strategy not in fits[train.offload]:
        raise ValueError(
            f"train.offload: {train.offload} is of {', '.join(fits[train.offload])}, not of {strategy}; remove it"
        )
    if train.deepspeed is not None and strategy not in ZERO:
        raise ValueError(f"train.deepspeed: it has no effect with {strategy}; remove it, or use {', '.join(ZERO)}")
    copies = world // (train.shard_size or world) if strategy == "fsdp2" else world
    if train.check_replicas is not None and (strategy in ("single", "zero3") or copies == 1):
        raise ValueError(
            f"train.check_replicas: there is one copy of the weights ({strategy}, {world} processes); remove it"
        )
