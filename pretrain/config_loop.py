"""What every training is told, whatever it trains: optimizer, schedule, loop, checkpoints, log.

What lives here: the sections that pretraining and fine-tuning share, and what the trainer asks of a configuration. What
must not: torch, text, models.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StrictBool, model_validator

from pretrain.config_types import Amount, Beta, Interval, Positive, Section, Share

BUDGETS = ("tokens", "steps", "epochs", "minutes", "hours")


class OptimizerConfig(Section):
    """AdamW, StableAdamW, or Muon on the hidden matrices with AdamW on everything else."""

    name: Literal["adamw", "stable-adamw", "muon"] = "adamw"
    lr: Annotated[float, Field(gt=0.0)] = Field(description="peak learning rate (muon: of the matrices)")
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    adam_lr: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="muon: peak learning rate of embeddings, head, norms and biases; default 3e-3"
    )
    momentum: Share = Field(0.95, description="muon")

    @model_validator(mode="after")
    def _muon_keys(self) -> Self:
        if self.name != "muon" and (given := sorted(self.model_fields_set & {"adam_lr", "momentum"})):
            raise ValueError(f"`{given[0]}` belongs to muon and has no effect with `name: {self.name}`; remove it")
        return self


class ScheduleConfig(Section):
    """The learning rate over the run: a pure function of progress."""

    kind: Literal["constant", "cosine", "linear", "inverse-sqrt", "wsd"] = "cosine"
    warmup: Amount = "2%"
    decay: Amount = Field("20%", description="wsd: the last part of the run, falling as 1 - sqrt")
    final: Share = Field(0.0, description="the learning rate at the end, as a share of the peak")

    @model_validator(mode="after")
    def _fits_the_run(self) -> Self:
        shares = [self.warmup, self.decay] if self.kind == "wsd" else [self.warmup]
        total = sum(float(share.rstrip("%")) for share in shares if isinstance(share, str))
        if total > 100:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} are more than the whole run; lower one")
        return self

    @model_validator(mode="after")
    def _decay_is_for_wsd(self) -> Self:
        if self.kind != "wsd" and "decay" in self.model_fields_set:
            raise ValueError(f"`decay` belongs to wsd and has no effect with `kind: {self.kind}`; remove it")
        return self


class LoopTrainConfig(Section):
    """The loop. Exactly one budget of tokens, steps, epochs, minutes and hours."""

    tokens: Positive | None = Field(None, description="budget: token positions seen, padding included")
    steps: Positive | None = Field(None, description="budget: optimizer steps")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="budget: passes over the rows")
    minutes: Annotated[float, Field(gt=0)] | None = Field(None, description="budget: measured, then fixed as steps")
    hours: Annotated[float, Field(gt=0)] | None = Field(None, description="budget: measured, then fixed as steps")
    micro_batch: Positive | Literal["auto"] = Field("auto", description="rows a forward pass a process")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    strategy: Literal["auto", "single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = Field(
        "auto", description="how the work is split; auto: as the launcher says, else ddp for several processes"
    )
    processes: Positive | None = Field(None, description="processes of the job; another number is refused")
    shard_size: Positive | None = Field(
        None, description="hybrid sharding (fsdp2): processes that hold one copy together; none: all of them"
    )
    offload: Literal["optimizer", "all"] | None = Field(
        None, description="keep the optimizer's state (zero1-3), or parameters too (fsdp2, zero3), in main memory"
    )
    deepspeed: str | None = Field(None, description="zero1-3: a DeepSpeed JSON file with further settings")
    ddp_timeout: Positive = Field(600, description="seconds that a process waits for the others before it gives up")
    check_replicas: Positive | None = Field(
        None, description="compare all copies every so many steps and before a save (ddp, zero1, zero2, hybrid)"
    )
    attention: Literal["auto", "eager", "sdpa", "flex", "varlen"] = "auto"
    seed: int = Field(0, ge=0)
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    compile: StrictBool = False
    gradient_checkpointing: StrictBool = False
    on_nonfinite: Literal["skip", "stop"] = Field("stop", description="what a NaN or infinite loss or gradient does")
    spike_sigma: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="a loss, or log of a gradient norm, so many standard deviations above its mean is a spike"
    )
    spike_window: Annotated[int, Field(ge=8)] = Field(128, description="steps that a spike is measured against")
    on_spike: Literal["skip", "stop", "log"] = "skip"
    stop_signals: tuple[Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"], ...] = ("SIGTERM", "SIGINT")

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [key for key in BUDGETS if getattr(self, key) is not None]
        if len(given) != 1:
            which = " and ".join(given) if given else "none"
            raise ValueError(f"give exactly one budget of {', '.join(BUDGETS)}; given: {which}")
        return self


class LoopCheckpointConfig(Section):
    """What is kept of a training, where, and what a failed save does."""

    keep: Positive = 2
    on_error: Literal["keep-going", "stop"] = Field(
        "keep-going", description="when a checkpoint cannot be written (disk full, say); the last one must be"
    )
    asynchronous: StrictBool = Field(True, description="write in the background; training waits for a copy alone")
    to: str | None = Field(None, description="an fsspec store (s3://bucket/folder, say) that holds the checkpoints")
    shard_above_bytes: Positive = Field(
        2_000_000_000, description="a larger model is written by all processes, each its share, and gathered by none"
    )


class LoopEvaluateConfig(Section):
    """When a training is evaluated, beside step 0 and its end."""

    every: Interval = "10%"

    def also_at(self, step: int, total_steps: int) -> bool:
        """Whether a step of a training of so many is evaluated that `every` does not name."""
        return False


class LogConfig(Section):
    """Where the numbers go."""

    to: tuple[Literal["console", "jsonl", "wandb", "trackio", "tensorboard"], ...] = ("console", "jsonl")
    every: Positive = Field(1, description="steps between two lines of metrics")
    slow_ranks: Positive | None = Field(20, description="steps between looks for processes that keep others waiting")
    project: str = "pretrain"


class LoopConfig(Section):
    """What the trainer asks of a configuration."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="artifacts lie in OUT/NAME")
    out: str = "runs"
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: LoopTrainConfig
    checkpoint: LoopCheckpointConfig = LoopCheckpointConfig()
    evaluate: LoopEvaluateConfig = LoopEvaluateConfig()
    log: LogConfig = LogConfig()

    @property
    def directory(self) -> Path:
        """Where the artifacts of this run lie: OUT/NAME."""
        return Path(self.out) / self.name

    @property
    @abstractmethod
    def row_tokens(self) -> int:
        """Token positions of a row, at most."""

    @property
    @abstractmethod
    def rows_per_batch(self) -> int:
        """Rows an optimizer step, over all processes."""

    @property
    def tokens_per_step(self) -> int:
        """Token positions an optimizer step, over all processes."""
        return self.rows_per_batch * self.row_tokens

    @property
    def rows_meet(self) -> bool:
        """Whether a row's loss depends on which others share its forward pass: another split is another loss."""
        return False

    @property
    @abstractmethod
    def save_every(self) -> str | int:
        """How often the training is saved."""

    @property
    @abstractmethod
    def attention_dropout(self) -> float:
        """Of the model, as far as the configuration knows it."""

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """The resolved configuration as plain data."""
