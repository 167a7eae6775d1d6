"""The verb `train`: prepared shards in, checkpoints out. The composition root of pretraining.

What lives here: which parts make up a run. What must not: how any of them works.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from pretrain.building import build_model, check_attention, check_model
from pretrain.changes import changes_at_resume, check_allowed
from pretrain.config import RunConfig
from pretrain.continuing import check_optimizer_state, optimizer_state_of
from pretrain.data.batches import target_length_for
from pretrain.data.loader import DataPlane
from pretrain.data.validation import ValidationData
from pretrain.data.verification import verify_run
from pretrain.evaluation.likelihood import evaluate_batches, share_of_batches
from pretrain.evaluation.loading import Kind, LoadedModel
from pretrain.evaluation.measures import Measure, Measures, default_window, score_names
from pretrain.evaluation.passes import Passes, bare
from pretrain.evaluation.samples import FILE as SAMPLES_FILE
from pretrain.evaluation.samples import Sampler, keep_samples
from pretrain.files import lock_directory, read_manifest, update_file
from pretrain.interop.published import CODE
from pretrain.models import (
    LoomConfig,
    flops_per_token,
    pick_backend,
    wants_dropout_keys,
)
from pretrain.planning.facts import model_facts
from pretrain.plugins import import_path
from pretrain.published_store import PublishedStore
from pretrain.publishing.background import FOLDER as PUBLISH_FOLDER
from pretrain.publishing.background import Publisher, Target
from pretrain.ranks import PATIENT_SECONDS
from pretrain.runtime import EXIT_STOPPED, keep_freed_memory, resolve_precision
from pretrain.stock_model import flops_per_token as stock_flops_per_token
from pretrain.training import checkpoint
from pretrain.training.engines.job import Job, open_job
from pretrain.training.optim import build_optimizer as _build_optimizer
from pretrain.training.places import RECORD, SAVED_MARK
from pretrain.training.progress import Result
from pretrain.training.stored import open_place
from pretrain.training.trainer import EvaluationContext, EvaluationStopped, Evaluator, Trainer


def check(config: RunConfig) -> None:
    """Refuse what cannot work before anything is made: the model's shape, and that a stock architecture holds it.

    Raises:
        ValueError: names the key in the way.
    """
    check_attention(config, "cuda" if torch.cuda.is_available() else "cpu")
    if trained_with(config) is None:
        check_optimizer_state(config)
    check_model(config)


def inputs_of(config: RunConfig) -> dict[str, str]:
    """Digests of what a run trains on; every checkpoint holds them."""
    return {kind: read_manifest(config.directory / kind, kind).digest for kind in ("tokenizer", "data")}


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
    """One evaluator for each validation set, those of `evaluate.evaluators`, the samples, the measures."""
    evaluators: dict[str, Evaluator] = {}
    for split in DataPlane.validation_splits(config):
        evaluators[split] = _validation(DataPlane.validation(config, split), config)
    for path in config.evaluate.evaluators:
        name = path.partition(":")[2]
        evaluators[path if name in evaluators else name] = import_path(path)
    if config.evaluate.samples:
        evaluators["samples"] = _samples(config)
    return evaluators | _measures(config)


def _validation(data: ValidationData, config: RunConfig) -> Evaluator:
    def evaluator(model: nn.Module, context: EvaluationContext) -> Mapping[str, float]:
        rows = data.batches(max_tokens=config.evaluate.max_tokens)

        def batches() -> Iterator[Mapping[str, Any]]:
            for arrays in share_of_batches((batch.arrays for batch in rows), context.ranks):
                if context.stopping():
                    raise EvaluationStopped
                yield arrays

        by_text = config.objective.kind == "causal" or config.objective.is_own  # each byte of it is predicted once
        num_bytes = rows.num_bytes if by_text else None
        return evaluate_batches(model, batches(), device=context.device, num_bytes=num_bytes, ranks=context.ranks)

    return evaluator


def _measures(config: RunConfig) -> dict[str, Evaluator]:
    """What `evaluate` names beside validation sets, read now: a file that cannot be used ends no long training."""
    if not config.evaluate.has_measures:
        return {}
    directory = str(config.directory / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    kind: Kind = {"mlm": "mlm", "causal": "causal"}.get(config.objective.kind, "vectors")  # type: ignore[assignment]
    measures = Measures.read(config.evaluate, standard_errors=False)

    def evaluator_of(measure: Measure) -> Evaluator:
        def evaluator(model: nn.Module, context: EvaluationContext) -> Mapping[str, float]:
            def look(*_: Any) -> None:
                if context.stopping():
                    raise EvaluationStopped

            if not config.evaluate.measures_at(context.step, context.total_steps):
                return {}
            live = LoadedModel(model, tokenizer, kind, config.name, directory, context.device)
            passes = Passes(context.device, progress=look, ranks=context.ranks)
            found = measure.score(live, passes, default_window(live))
            if measure.kind != "tasks":
                return score_names(found)
            return {f"{task}/{name}": value for task in found for name, value in score_names(found[task]).items()}

        return evaluator

    return {measure.label: evaluator_of(measure) for measure in measures.all}


def _samples(config: RunConfig) -> Evaluator:
    """No scores: what the model makes of the prompts goes to `samples.jsonl`."""
    sampler: Sampler | None = None

    def evaluator(model: nn.Module, context: EvaluationContext) -> Mapping[str, float]:
        nonlocal sampler
        sampler = sampler or Sampler(config, bare(model), context.device)
        samples = sampler.samples(model, context.stopping)
        if samples is not None and context.ranks.main:
            with suppress(OSError):  # a full disk must not end the training
                keep_samples(context.directory / SAMPLES_FILE, context.step, samples)
        return {}

    return evaluator


def target_share(config: RunConfig) -> float:
    """Share of the positions that the head sees; of an encoder-decoder, the decoder's positions to the encoder's."""
    objective = config.objective
    if objective.kind in ("mlm", "rtd"):
        return (objective.rate + (objective.final_rate or objective.rate)) / 2
    return target_length_for(config) / config.data.sequence_length


def _flops(config: RunConfig, model: PreTrainedModel) -> float:
    """Operations of a training step for one token position."""
    length = config.data.sequence_length
    if isinstance(model.config, LoomConfig):
        return flops_per_token(model.config, length, target_share(config))
    return stock_flops_per_token(model, length)


def build_trainer(
    config: RunConfig,
    model: PreTrainedModel | None = None,
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
    check_attention(config, job.device)
    model = model if model is not None else build_model(config, console=console)
    data = data if data is not None else build_data(config)
    at_start = optimizer_state_of(config, model) if config.model.optimizer_state else None
    ours = model.config if isinstance(model.config, LoomConfig) else None
    data.dropout_keys = ours is not None and wants_dropout_keys(ours)
    optimizer = optimizer if optimizer is not None else build_optimizer(config, model)
    if config.train.attention == "auto" and ours is not None:
        backend, reason = pick_backend(ours, job.device)
        model.set_attn_implementation(backend)
        if console is not None:
            console.print(f"attention: {backend} ({reason})", highlight=False)
    return Trainer(
        config,
        model=model,
        data=data,
        optimizer=optimizer,
        store=PublishedStore(config.directory / "tokenizer", code=config.export.to == CODE),
        evaluators=evaluators if evaluators is not None else build_evaluators(config),
        judges=DataPlane.validation_splits(config) if evaluators is None else None,
        flops_per_token=_flops(config, model),
        model_facts=model_facts(model, target_length=target_length_for(config)) if ours is not None else None,
        inputs=inputs_of(config),
        console=console,
        job=job,
        at_start=at_start,
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
            elif (directory / "config.yaml").is_file() and not any(
                (directory / mark).exists() for mark in (SAVED_MARK, RECORD)
            ):
                console.print(
                    f"an earlier start in {directory} ended before it saved anything: starting at step 0",
                    highlight=False,
                )

        with job.ranks.missed():
            # The digests of all shards may take long; the others wait for that as they would for nothing else.
            job.ranks.another_group(timeout=PATIENT_SECONDS).on_main(look)
            trainer = build_trainer(config, console=console, job=job)
            publisher = publisher_of(config, console) if job.ranks.main else None
            if publisher is not None:
                trainer.saver.publisher = publisher
                owned.callback(publisher.close)
                publisher.start()
            result = trainer.train(allow_changes=allow_changes)
            facts = spent_on(trainer, result)
            code: int = job.ranks.on_main(lambda: report(result, directory, console, facts))
            if publisher is not None:
                publisher.finished = result.finished
        return code


def publisher_of(config: RunConfig, console: Console) -> Publisher | None:
    """What pushes the checkpoints of a run to a Hub, where the configuration asks for it."""
    wanted = config.checkpoint.publish
    if wanted is None:
        return None

    def say(line: str) -> None:
        with suppress(OSError):  # the log may lie on a disk that is full
            console.print(line, highlight=False, markup=False)

    spool = config.directory / "train" / PUBLISH_FOLDER
    return Publisher(spool, Target(wanted.to, wanted.private), wanted.every, wanted.wait, say)


def spent_on(trainer: Trainer, result: Result) -> dict[str, Any]:
    """How often a run read its text, and what a token cost: facts for the model card."""
    data, samples = trainer.data, result.progress.samples
    epochs: dict[str, float] = {}
    if isinstance(data, DataPlane):
        epochs = {"": samples / data.num_rows} if data.mixture is None else data.mixture.epochs(samples)
    return {"flops_per_token": trainer.flops_per_token, "epochs": epochs}


def report(result: Result, directory: Path, console: Console, facts: Mapping[str, Any] | None = None) -> int:
    """Say how training ended, write `result.json` with further `facts`, and give the exit code."""
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
        "scores_at_start": progress.first_scores,
        "scores": progress.scores,
        "best": progress.best,
        "checkpoint": result.checkpoint.name,
        "run_id": progress.run_id,
        "skipped": progress.guard.skipped,
        **(facts or {}),
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
