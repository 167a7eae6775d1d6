"""The verb `train`: prepared shards in, checkpoints out. The composition root of pretraining.

What lives here: which parts make up a run. What must not: how any of them works.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from pretrain.changes import changes_at_resume, check_allowed
from pretrain.config import RunConfig
from pretrain.data.loader import DataPlane
from pretrain.data.validation import ValidationData
from pretrain.data.verification import verify_run
from pretrain.evaluation.likelihood import evaluate_batches, share_of_batches
from pretrain.files import lock_directory, read_manifest, update_file
from pretrain.interop import stock_config
from pretrain.model_dir import PublishedStore, read_loom
from pretrain.models import (
    LoomPreTrainedModel,
    flops_per_token,
    loom_config,
    model_from_config,
    pick_backend,
    wants_dropout_keys,
)
from pretrain.planning.facts import model_facts
from pretrain.plugins import import_path
from pretrain.runtime import EXIT_STOPPED, keep_freed_memory, resolve_precision, set_seed
from pretrain.training import checkpoint
from pretrain.training.engines.job import Job, open_job
from pretrain.training.optim import build_optimizer as _build_optimizer
from pretrain.training.places import SAVED_MARK
from pretrain.training.progress import Result
from pretrain.training.stored import open_place
from pretrain.training.trainer import EvaluationContext, EvaluationStopped, Evaluator, Trainer

_LONGEST_LOOK = 6 * 3600.0


def check(config: RunConfig) -> None:
    """Refuse what cannot work before anything is made: the model's shape, and that a stock architecture holds it.

    Raises:
        ValueError: names the key in the way.
    """
    if config.model.architecture is not None:
        facts = {"vocab_size": config.tokenizer.vocab_size, "special_ids": {}}
        stock_config(model_config(config, facts))


def inputs_of(config: RunConfig) -> dict[str, str]:
    """Digests of what a run trains on; every checkpoint holds them."""
    return {kind: read_manifest(config.directory / kind, kind).digest for kind in ("tokenizer", "data")}


def build_model(config: RunConfig, *, console: Console | None = None) -> LoomPreTrainedModel:
    """The model of a run, with initial weights drawn from `train.seed`, or read from `model.from`.

    Reads the vocabulary and the special ids from the run's tokenizer.

    Raises:
        ArtifactError: when the run has no tokenizer yet.
        ValueError: when the sizes do not fit each other, or `model.from` has another vocabulary.
    """
    tokenizer = read_manifest(config.directory / "tokenizer", "tokenizer").facts
    if config.model.from_ is not None:
        model = read_loom(config.model.from_, note=console.print if console is not None else None)
        if model.config.vocab_size < tokenizer["vocab_size"]:
            raise ValueError(
                f"model.from: {config.model.from_} has {model.config.vocab_size} embeddings, the tokenizer has "
                f"{tokenizer['vocab_size']} ids; take the model's own with tokenizer.from: {config.model.from_}"
            )
    else:
        assert config.model.architecture is not None
        set_seed(config.train.seed)
        model = model_from_config(model_config(config, tokenizer))
    _fits(config, model)
    if config.train.attention != "auto":
        model.set_attn_implementation(config.train.attention)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
    return model


def _fits(config: RunConfig, model: LoomPreTrainedModel) -> None:
    """Refuse a model that cannot be published, or that the rest of the run does not fit.

    Raises:
        ValueError: names the keys that do not fit each other.
    """
    # Every checkpoint is published in this form: refuse now what it cannot hold.
    home = stock_config(model.config).model_type
    if config.export.to not in ("auto", home):
        raise ValueError(f"export.to: {config.export.to} does not hold this model, {home} does; use auto")
    wants = {"mlm": "encoder", "causal": "decoder"}.get(config.objective.kind, model.config.kind)
    if wants != model.config.kind:
        raise ValueError(
            f"objective.kind: {config.objective.kind} needs an {wants}, model.from: {config.model.from_} is a "
            f"{model.config.kind}; choose the other objective, or another model"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions < config.data.sequence_length:
        raise ValueError(
            f"data.sequence_length: {config.data.sequence_length} is longer than the {positions} positions of "
            f"model.from: {config.model.from_}; lower it"
        )


def model_config(config: RunConfig, tokenizer: Mapping[str, Any]) -> Any:
    """The model's configuration for a tokenizer's facts (`vocab_size`, `special_ids`)."""
    assert config.model.architecture is not None
    keys = config.model.sizes()
    keys.setdefault("max_position_embeddings", _positions(config))
    ids = {f"{role}_token_id": token_id for role, token_id in tokenizer["special_ids"].items()}
    return loom_config(config.model.architecture, vocab_size=tokenizer["vocab_size"], **ids, **keys)


def _positions(config: RunConfig) -> int:
    assert config.model.architecture is not None
    published = loom_config(config.model.architecture).max_position_embeddings
    sized = config.model.hidden_size is not None
    return config.data.sequence_length if sized else max(published, config.data.sequence_length)


def build_data(config: RunConfig, split: str = "train") -> DataPlane:
    """The data plane of a prepared split, in the run's order and objective.

    Raises:
        ArtifactError: when the split is not prepared, or was prepared with another tokenizer.
    """
    return DataPlane.from_config(config, split)


def build_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run over the model's parameters, in named groups."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(config.train.precision, device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return _build_optimizer(model, config.optimizer, compute_dtype=dtype)


def build_evaluators(config: RunConfig) -> dict[str, Evaluator]:
    """One evaluator for each validation set, then those of `evaluate.evaluators` by import path."""
    evaluators: dict[str, Evaluator] = {}
    for split in DataPlane.validation_splits(config):
        evaluators[split] = _validation(DataPlane.validation(config, split), config)
    for path in config.evaluate.evaluators:
        name = path.partition(":")[2]
        evaluators[path if name in evaluators else name] = import_path(path)
    return evaluators


def _validation(data: ValidationData, config: RunConfig) -> Evaluator:
    def evaluator(model: nn.Module, context: EvaluationContext) -> Mapping[str, float]:
        rows = data.batches(max_tokens=config.evaluate.max_tokens)

        def batches() -> Iterator[Mapping[str, Any]]:
            for arrays in share_of_batches((batch.arrays for batch in rows), context.ranks):
                if context.stopping():
                    raise EvaluationStopped
                yield arrays

        num_bytes = rows.num_bytes if config.objective.kind != "mlm" else None
        return evaluate_batches(model, batches(), device=context.device, num_bytes=num_bytes, ranks=context.ranks)

    return evaluator


def target_share(config: RunConfig) -> float:
    """Share of the token positions that the head sees."""
    return config.objective.rate if config.objective.kind == "mlm" else 1.0


def build_trainer(
    config: RunConfig,
    model: LoomPreTrainedModel | None = None,
    data: DataPlane | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    evaluators: Mapping[str, Evaluator] | None = None,
    console: Console | None = None,
    job: Job | None = None,
) -> Trainer:
    """A trainer for the run; parts that are not given are built from the configuration."""
    keep_freed_memory()
    job = job or open_job(config)
    model = model if model is not None else build_model(config, console=console)
    data = data if data is not None else build_data(config)
    data.dropout_keys = wants_dropout_keys(model.config)
    optimizer = optimizer if optimizer is not None else build_optimizer(config, model)
    if config.train.attention == "auto":
        backend, reason = pick_backend(model.config, job.device)
        model.set_attn_implementation(backend)
        if console is not None:
            console.print(f"attention: {backend} ({reason})", highlight=False)
    return Trainer(
        config,
        model=model,
        data=data,
        optimizer=optimizer,
        store=PublishedStore(config.directory / "tokenizer"),
        evaluators=evaluators if evaluators is not None else build_evaluators(config),
        judges=DataPlane.validation_splits(config) if evaluators is None else None,
        flops_per_token=flops_per_token(model.config, config.data.sequence_length, target_share(config)),
        model_facts=model_facts(model),
        inputs=inputs_of(config),
        console=console,
        job=job,
    )


def trained_with(config: RunConfig) -> dict[str, Any] | None:
    """The configuration in the newest checkpoint of a run, as plain data; None when there is no checkpoint."""
    return checkpoint.newest_config(config.directory / "train")


def train(
    config: RunConfig,
    *,
    resume: str = "auto",
    allow_changes: Collection[str] = (),
    console: Console | None = None,
) -> int:
    """Train a run to its end, from wherever it stands; return the exit code (0 done, 75 stopped and saved).

    Args:
        config: the run configuration; its resolved copy is written beside the checkpoints.
        resume: `auto` goes on from the newest checkpoint; `never` refuses when there is one.
        allow_changes: keys of the configuration, or whole sections, that may differ from the checkpoint's.
        console: where progress is shown.

    Raises:
        ValueError: when there is a checkpoint and `resume` is never, or one that does not fit.
    """
    console = console or Console(stderr=True)
    directory = config.directory / "train"
    if resume not in ("auto", "never"):
        raise ValueError(f"--resume {resume}: give auto or never")
    check(config)
    check_allowed(allow_changes)
    job = open_job(config)
    with ExitStack() as owned:

        def look() -> None:
            """What one process of a job does for all of them."""
            place = open_place(config, directory)
            if resume == "never" and place.steps():
                raise ValueError(
                    f"--resume never, but `{place.name}` holds checkpoints; give another name=, or --resume auto"
                )
            inputs_of(config)  # a run without tokenizer or data is refused before its directory is made
            verify_run(config, console)
            owned.enter_context(lock_directory(config.directory))
            old = trained_with(config)
            if old is not None:  # before a model of another shape is built; the trainer looks at what it really takes
                changes_at_resume(old, config, allow_changes)
            elif (directory / "config.yaml").is_file() and not (directory / SAVED_MARK).exists():
                console.print(
                    f"an earlier start in {directory} ended before it saved anything: starting at step 0",
                    highlight=False,
                )

        with job.ranks.missed():
            # The digests of all shards may take long; the others wait for that as they would for nothing else.
            job.ranks.another_group(timeout=_LONGEST_LOOK).on_main(look)
            trainer = build_trainer(config, console=console, job=job)
            result = trainer.train(allow_changes=allow_changes)
            code: int = job.ranks.on_main(lambda: report(result, directory, console))
        return code


def report(result: Result, directory: Path, console: Console) -> int:
    """Say how training ended, write `result.json`, and give the exit code."""
    progress = result.progress
    if not result.finished:
        console.print(
            f"stopped by {result.stopped_by} at step {progress.step:,} of {progress.total_steps:,}; saved in "
            f"{result.where or result.checkpoint}; run the same command again to go on",
            highlight=False,
        )
        return EXIT_STOPPED
    summary = {
        "step": progress.step,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "tokens_per_second": progress.text_tokens / max(progress.seconds, 1e-9),
        "scores": progress.scores,
        "best": progress.best,
        "checkpoint": result.checkpoint.name,
        "run_id": progress.run_id,
        "skipped": progress.guard.skipped,
    }
    if progress.changes:
        summary["changes"] = progress.changes
    update_file(directory / "result.json", (json.dumps(summary, indent=2) + "\n").encode())
    console.print(
        f"trained {progress.tokens:,} tokens in {progress.seconds / 60:.1f} min; {result.where or result.checkpoint}",
        highlight=False,
    )
    if skipped := progress.guard.summary():
        console.print(f"{skipped}; {directory / 'skipped.jsonl'} names the rows", highlight=False)
    return 0
