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
from transformers import PreTrainedModel

from pretrain.changes import changes_at_resume, check_allowed
from pretrain.config import RunConfig
from pretrain.continuing import check_optimizer_state, learnt_pieces, optimizer_state_of
from pretrain.data.batches import layout_of, target_length_for
from pretrain.data.loader import DataPlane
from pretrain.data.validation import ValidationData
from pretrain.data.verification import verify_run
from pretrain.evaluation.likelihood import evaluate_batches, share_of_batches
from pretrain.files import lock_directory, read_manifest, update_file
from pretrain.growing import extend_vocabulary, grow
from pretrain.interop.published import CODE, check_published
from pretrain.model_dir import PublishedStore, read_detector, read_loom, read_stock
from pretrain.models import (
    DETECTION_KEYS,
    GENERATOR_SIZE,
    LoomConfig,
    flops_per_token,
    loom_config,
    model_class,
    pick_backend,
    refuse_device,
    wants_dropout_keys,
)
from pretrain.planning.facts import model_facts
from pretrain.plugins import import_path
from pretrain.ranks import PATIENT_SECONDS
from pretrain.runtime import EXIT_STOPPED, keep_freed_memory, resolve_precision, set_seed
from pretrain.stock_model import adapt
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
    if config.model.architecture is not None:
        facts = {"vocab_size": config.tokenizer.vocab_size, "special_ids": {}}
        check_published(model_config(config, facts), _task(config), config.export.to)


def inputs_of(config: RunConfig) -> dict[str, str]:
    """Digests of what a run trains on; every checkpoint holds them."""
    return {kind: read_manifest(config.directory / kind, kind).digest for kind in ("tokenizer", "data")}


def build_model(config: RunConfig, *, console: Console | None = None) -> PreTrainedModel:
    """The model of a run, with initial weights drawn from `train.seed`, or read from `model.from`.

    Reads the vocabulary and the special ids from the run's tokenizer.

    Raises:
        ArtifactError: when the run has no tokenizer yet.
        ValueError: when the sizes do not fit each other, or `model.from` has another vocabulary.
    """
    tokenizer = read_manifest(config.directory / "tokenizer", "tokenizer").facts
    if config.model.class_ == "stock":
        return _stock_model(config, tokenizer["vocab_size"], console)
    if config.model.from_ is not None:
        model: PreTrainedModel
        note = console.print if console is not None else None
        if config.objective.kind == "rtd":
            set_seed(config.train.seed)  # of a new generator
            keys = {key: config.model.sizes()[key] for key in DETECTION_KEYS if key in config.model.sizes()}
            model = small = read_detector(config.model.from_, note=note, keys=keys)
        else:
            model = small = read_loom(config.model.from_, note=note, task=_task(config))
        if config.model.grow is not None:
            model = grow(small, config.model.grow.model_dump(exclude_none=True))
        model = _taught(config, model, tokenizer["vocab_size"])
        _covers(config, model, tokenizer["vocab_size"])
    else:
        assert config.model.architecture is not None
        set_seed(config.train.seed)
        sized = model_config(config, tokenizer)
        model = model_class(sized, _task(config))(sized)
    _fits(config, model)
    _attend(config, model)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
    return model


def _task(config: RunConfig) -> str:
    """What the model's class is for."""
    return config.objective.task


def _covers(config: RunConfig, model: PreTrainedModel, vocab_size: int) -> None:
    """Refuse a model with fewer embeddings than the tokenizer has ids."""
    table: Any = model.get_input_embeddings()
    embeddings = table.weight.shape[0]
    if embeddings < vocab_size:
        raise ValueError(
            f"model.from: {config.model.from_} has {embeddings} embeddings, the tokenizer has {vocab_size} ids; take "
            f"the model's own with tokenizer.from: {config.model.from_}"
        )


def _taught(config: RunConfig, model: PreTrainedModel, vocab_size: int) -> PreTrainedModel:
    """The model with embeddings for the pieces that its tokenizer has learnt from the new text, where it has."""
    made_of = learnt_pieces(config)
    return extend_vocabulary(model, made_of, vocab_size) if made_of else model


def _stock_model(config: RunConfig, vocab_size: int, console: Console | None) -> PreTrainedModel:
    """A model of transformers' own class, made to take packed rows."""
    assert config.model.from_ is not None
    kind = layout_of(config.objective)
    model = _taught(config, read_stock(config.model.from_, kind), vocab_size)
    _covers(config, model, vocab_size)
    _reaches(config, model)
    _attend(config, model)
    way = adapt(model, kind, config.data.sequence_length)
    if console is not None:
        console.print(f"{type(model).__name__}: documents of a row are kept apart by {way.words}", highlight=False)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
    return model


def _attend(config: RunConfig, model: PreTrainedModel) -> None:
    """Take the attention backend that is asked for by name."""
    if config.train.attention != "auto":
        try:
            model.set_attn_implementation(config.train.attention)
        except ValueError as error:
            raise ValueError(f"train.attention: {error}") from error


def check_attention(config: RunConfig, device: torch.device | str) -> None:
    """Refuse an attention backend that the device or the model's class does not have, before a step is made.

    Raises:
        ValueError: names the key, its value and the remedy.
    """
    name = config.train.attention
    if name == "auto":
        return
    if config.model.class_ == "stock" and name not in ("eager", "sdpa"):
        raise ValueError(
            f"train.attention: {name} is a backend of the project's own classes, and model.class is stock; take "
            "eager, sdpa or auto, or leave model.class out"
        )
    try:
        refuse_device(name, device)
    except ValueError as error:
        raise ValueError(f"train.attention: {error}") from error


def _reaches(config: RunConfig, model: PreTrainedModel) -> None:
    """Refuse rows that are longer than the model has positions."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions < config.data.sequence_length:
        raise ValueError(
            f"data.sequence_length: {config.data.sequence_length} is longer than the {positions} positions of "
            f"model.from: {config.model.from_}; lower it"
        )


def _fits(config: RunConfig, model: PreTrainedModel) -> None:
    """Refuse a model that cannot be published, or that the rest of the run does not fit.

    Raises:
        ValueError: names the keys that do not fit each other.
    """
    if config.objective.sentences != "none" and model.config.type_vocab_size < 2:
        raise ValueError(
            f"objective.sentences: {config.objective.sentences} tells two segments apart by token types, and the model "
            f"has {model.config.type_vocab_size}; set model.type_vocab_size: 2, or take an architecture that has them "
            "(bert, electra, albert)"
        )
    # Every checkpoint is published in this form: refuse now what it cannot hold.
    check_published(model.config, _task(config), config.export.to)
    wants = config.objective.model_kind or model.config.kind
    if wants != model.config.kind:
        raise ValueError(
            f"objective.kind: {config.objective.kind} needs an {wants}, model.from: {config.model.from_} is a "
            f"{model.config.kind}; choose the other objective, or another model"
        )
    if wants == "seq2seq" and model.config.decoder_start_token_id != model.config.pad_token_id:
        raise ValueError(
            f"model.from: {config.model.from_} begins its output with id {model.config.decoder_start_token_id}, and "
            f"rows are made with padding there, id {model.config.pad_token_id}; take a model that begins with padding"
        )
    _reaches(config, model)


def model_config(config: RunConfig, tokenizer: Mapping[str, Any]) -> Any:
    """The model's configuration for a tokenizer's facts (`vocab_size`, `special_ids`)."""
    assert config.model.architecture is not None
    keys = config.model.sizes()
    keys.setdefault("max_position_embeddings", _positions(config))
    ids = {f"{role}_token_id": token_id for role, token_id in tokenizer["special_ids"].items()}
    if config.kind == "seq2seq" and "pad_token_id" in ids:
        ids["decoder_start_token_id"] = ids["pad_token_id"]
    if config.objective.kind == "rtd":
        keys.setdefault("generator_size", GENERATOR_SIZE)
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

        by_text = config.objective.kind == "causal" or config.objective.is_own  # each byte of it is predicted once
        num_bytes = rows.num_bytes if by_text else None
        return evaluate_batches(model, batches(), device=context.device, num_bytes=num_bytes, ranks=context.ranks)

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
    starts_anew = config.model.optimizer_state and trained_with(config) is None
    at_start = optimizer_state_of(config, model) if starts_anew else None
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
        "scores_at_start": progress.first_scores,
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
