"""The verb `run`: every stage of the road, one after another, skipping what is made and unchanged.

What lives here: the order of the stages, what makes one stale, and the dry run. What must not: any stage's work.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pretrain.card import write_card
from pretrain.changes import STAGES, ChangedConfigError, changed_keys, check_allowed, refuse_changed
from pretrain.config import RunConfig, config_to_dict, dump_config
from pretrain.config_loop import BUDGETS, ScheduleConfig
from pretrain.continuing import gain_table, learnt_pieces
from pretrain.data.batches import LoadedSplit
from pretrain.data.loader import DataPlane
from pretrain.data.objectives import evaluation_objective
from pretrain.evaluate import evaluate_run
from pretrain.evaluation.own_pieces import bits_per_byte_in_old_pieces
from pretrain.evaluation.passes import Passes
from pretrain.export import export_model
from pretrain.files import (
    MANIFEST,
    ArtifactError,
    bytes_in,
    commit_directory,
    lock_directory,
    read_manifest,
    update_file,
    write_json,
    write_manifest,
)
from pretrain.interop.published import CODE
from pretrain.model_reading import read_stock
from pretrain.prepare import check_data, is_prepared, prepare_data
from pretrain.runtime import describe_machine, peak_memory_bytes
from pretrain.tokenizer import is_trained, train_tokenizer
from pretrain.train import build_trainer, check, inputs_of, train, trained_with
from pretrain.training.progress import steps_of
from pretrain.training.stored import open_place, stored_model

_FOLDERS = {"evaluate": "report", "export": "export"}
_RESULT = {"checkpoint", "tokens", "seconds", "tokens_per_second"}  # what is read of a training's `result.json`
_DRY_RUN_BYTES = 4_000_000
_OF_SEVERAL = ("processes", "shard_size", "offload", "deepspeed", "check_replicas")  # keys that the dry run leaves out


def run(
    config: RunConfig,
    *,
    fresh: bool = False,
    allow_changes: Collection[str] = (),
    launch: Callable[[str], int] | None = None,
    console: Console | None = None,
) -> int:
    """Make every artifact of a run that is not there yet; return the exit code (75: stopped and saved).

    Args:
        config: the run configuration.
        fresh: archive what lies under this name, and start anew.
        allow_changes: keys of the configuration, or whole sections, that training may go on with although the
            checkpoint had others.
        launch: trains in processes of their own, given a value of `--resume`; None: training is done in this one.
        console: where progress is shown.

    Raises:
        ChangedConfigError: when the name was used with another configuration.
    """
    console = console or Console(stderr=True)
    directory = config.directory
    if fresh and config.checkpoint.to is not None and (place := open_place(config, directory / "train")).steps():
        raise ValueError(
            f"--fresh archives a directory, but the checkpoints of this run lie in {place.name}: remove them there, or "
            f"give another name (name={config.name}-2)"
        )
    if fresh and directory.exists():
        with lock_directory(directory):  # nobody works there
            pass
        console.print(f"archived the old run as {archive(directory)}", highlight=False)
    check(config)
    check_allowed(allow_changes)
    if not (directory / "data" / MANIFEST).is_file():  # data that are made may lie where filters are not
        check_data(config)
    made = [stage for stage in ("tokenizer", "data", "export") if (directory / stage / MANIFEST).is_file()]
    refuse_changed(config, directory / "config.yaml", made, trained_with=trained_with(config), allow=allow_changes)
    _refuse_stale(config)
    with lock_directory(directory):
        update_file(directory / "config.yaml", dump_config(config).encode())
    for stage in STAGES:
        if is_made(config, stage):
            console.print(f"{stage}: made already, unchanged", highlight=False)
        elif launch is not None and stage == "train":
            console.rule(f"[bold]{config.name}: {stage}")
            if code := launch("auto"):  # the processes own the directory meanwhile
                return code
        else:
            with lock_directory(directory):
                if code := _make(config, stage, allow_changes, console):
                    return code
    console.print(summary_table([directory]))
    if config.model.from_ is not None and (table := _gain(directory)) is not None:
        console.print(table)
    return 0


def _refuse_stale(config: RunConfig) -> None:
    """Refuse before anything is replaced when the text, or the tokenizer, is not what an artifact was made from.

    Raises:
        ChangedConfigError: names the artifact and the remedy.
    """
    for stage in ("tokenizer", "data"):
        folder = config.directory / stage
        if (folder / MANIFEST).is_file() and not is_made(config, stage):
            raise ChangedConfigError(
                f"`{folder}` does not fit any more: the text, or a file of the {stage}, has changed since it was made. "
                f"Put it back, give this run another name (name={config.name}-2), or archive the old one with --fresh."
            )


def archive(directory: Path) -> Path:
    """Move a run aside under a name that says when; return the new place."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    target = directory.with_name(f"{directory.name}.archived-{stamp}")
    number = 2
    while target.exists():
        target = directory.with_name(f"{directory.name}.archived-{stamp}-{number}")
        number += 1
    directory.rename(target)
    return target


# --- stages ---------------------------------------------------------------------------------------------------------


def is_made(config: RunConfig, stage: str) -> bool:
    """Whether a stage's artifact is there, whole, and made from what is there now."""
    directory = config.directory
    if stage == "tokenizer":
        return is_trained(config)
    if stage == "data":
        return is_prepared(config)
    checkpoint = _final_checkpoint(directory)
    if checkpoint is None:
        return False
    if stage == "train":
        manifest = read_manifest(checkpoint, "checkpoint")
        same = not any(change.rule.stage == "train" for change in changed_keys(manifest.config, config))
        return same and manifest.inputs == inputs_of(config)
    try:
        made_from = read_manifest(directory / _FOLDERS[stage], stage).inputs["checkpoint"]
    except ArtifactError:
        return False
    return bool(made_from == read_manifest(checkpoint, "checkpoint").digest)


def _final_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of a run that trained to its end."""
    result = _read_result(directory)
    if result is None:
        return None
    path = directory / "train" / "checkpoints" / str(result["checkpoint"])
    return path if path.is_dir() else stored_model(directory / "train", str(result["checkpoint"]))


def _read_result(directory: Path) -> dict[str, Any] | None:
    """What training wrote at its end; None when it is not there, or damaged: training then says it once more."""
    try:
        result = json.loads((directory / "train" / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # JSON or UTF-8 that is none
        return None
    return result if isinstance(result, dict) and set(result) >= _RESULT else None


def _make(config: RunConfig, stage: str, allow_changes: Collection[str], console: Console) -> int:
    console.rule(f"[bold]{config.name}: {stage}")
    if stage == "tokenizer":
        train_tokenizer(config, console=console)
    elif stage == "data":
        prepare_data(config, console=console)
    elif stage == "train":
        return train(config, allow_changes=allow_changes, console=console)
    elif stage == "evaluate":
        _evaluate(config, console)
    else:
        _export(config, console)
    return 0


def _evaluate(config: RunConfig, console: Console) -> None:
    checkpoint = _final_checkpoint(config.directory)
    assert checkpoint is not None
    scores = evaluate_run(config, checkpoint / "model", console=console)
    for split, score in _before(config).items():
        scores[split]["bits_per_byte_before"] = score
    with commit_directory(config.directory / _FOLDERS["evaluate"], replace=True) as temporary:
        write_json(temporary / "scores.json", scores)
        _write_manifest(config, "evaluate", temporary, checkpoint)


def _before(config: RunConfig) -> dict[str, float]:
    """Bits per byte by validation set of the model that was gone on from, where the vocabulary was extended."""
    made_of = learnt_pieces(config)
    if config.model.from_ is None or config.objective.kind != "causal" or not made_of:
        return {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = read_stock(config.model.from_, "decoder")
    passes, window = Passes(device), config.data.sequence_length
    found: dict[str, float] = {}
    for name in DataPlane.validation_splits(config):
        split = LoadedSplit.of(config, name, objective=evaluation_objective(config.objective))
        score = bits_per_byte_in_old_pieces(model.to(device), split, made_of, passes, window=window)
        if score is not None:
            found[name] = score
    return found


def _export(config: RunConfig, console: Console) -> None:
    checkpoint = _final_checkpoint(config.directory)
    assert checkpoint is not None
    out = config.directory / _FOLDERS["export"]
    proof = export_model(
        checkpoint,
        out,
        dtype=config.export.dtype,
        max_shard_bytes=config.export.max_shard_bytes,
        code=config.export.to == CODE,
        replace=True,
        proof_file=config.directory / "report" / "logits.safetensors",
    )
    write_card(out, config.directory)
    _write_manifest(config, "export", out, checkpoint)
    console.print(proof.describe(), highlight=False)


def _write_manifest(config: RunConfig, stage: str, directory: Path, checkpoint: Path) -> None:
    inputs = {"checkpoint": read_manifest(checkpoint, "checkpoint").digest}
    write_manifest(directory, kind=stage, config=config_to_dict(config)[stage], inputs=inputs)


# --- what a person sees at the end ----------------------------------------------------------------------------------


def summary_table(directories: list[Path]) -> Table:
    """Speed, scores and places of finished runs, a column each."""
    table = Table(title="runs", show_header=True)
    table.add_column("")
    rows: dict[str, list[str]] = {}
    for number, directory in enumerate(directories):
        table.add_column(directory.name, overflow="fold")
        for label, value in _summary(directory).items():
            cells = rows.setdefault(label, [])
            cells += [""] * (number - len(cells))
            cells.append(value)
    for label, cells in rows.items():
        table.add_row(label, *cells)
    return table


def _gain(directory: Path) -> Table | None:
    return gain_table(_read_result(directory) or {}, _read_scores(directory))


def _read_scores(directory: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((directory / _FOLDERS["evaluate"] / "scores.json").read_text(encoding="utf-8"))
    return scores


def _summary(directory: Path) -> dict[str, str]:
    result = _read_result(directory)
    assert result is not None
    scores = _read_scores(directory)
    facts = {
        "tokens trained": f"{result['tokens']:,}",
        "training time": f"{result['seconds'] / 60:.1f} min",
        "tokens/s": f"{result['tokens_per_second']:,.0f}",
    }
    for name, value in _flat_numbers(scores).items():
        facts[name] = f"{value:.4f}"
    places = {
        "tokenizer": "tokenizer",
        "data": "data",
        "checkpoints": "train/checkpoints",
        "metrics": "train/metrics.jsonl",
    }
    for label, place in (places | {"scores": "report/scores.json", "model": "export"}).items():
        facts[label] = str(directory / place)
    return facts


def _flat_numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    shown = ("loss", "accuracy", "bits_per_byte", "perplexity")
    return {
        f"{name} {key}".replace("_", " "): float(values[key])
        for name, values in scores.items()
        if isinstance(values, Mapping)
        for key in shown
        if values.get(key) is not None
    }


# --- the dry run ----------------------------------------------------------------------------------------------------


def dry_run(config: RunConfig, *, console: Console | None = None) -> None:
    """One step, one save, one reload, one export on (a sample of) the real data; print memory and ETA; leave nothing.

    What the run has made already is used; otherwise a tokenizer and shards are made from a sample of about 4 MB.
    """
    console = console or Console(stderr=True)
    check(config)
    if not (config.directory / "data" / MANIFEST).is_file():
        check_data(config)
    with tempfile.TemporaryDirectory(prefix="pretrain-dry-run-") as folder:
        trial = _trial(config, Path(folder))
        borrowed = _borrow_or_make(config, trial, console)
        trainer = build_trainer(trial, console=console)
        first = trainer.train()
        again = build_trainer(trial, console=console)
        resumed = again.train()
        if not resumed.finished or resumed.progress != first.progress:
            raise ArtifactError("the checkpoint of the first step did not read back as it was written")
        code = config.export.to == CODE
        proof = export_model(first.checkpoint, Path(folder) / "export", dtype=config.export.dtype, code=code)
        seconds = trainer.measure_step()
        device = trainer.device
        unknown = config.train.epochs is not None and not borrowed
        total = None if unknown else steps_of(config, trainer.data.num_rows, seconds)
        facts = {
            "machine": describe_machine(device),
            "parameters": f"{proof.parameters:,}",
            "micro batch": f"{trainer.micro_batch} rows of {config.data.sequence_length} tokens",
            "memory at most": f"{peak_memory_bytes(device) / 2**30:.2f} GiB",
            "checkpoint": f"{bytes_in(first.checkpoint) / 2**20:,.1f} MiB",
            "a step": f"{seconds:.2f} s, {config.train.batch_tokens / seconds:,.0f} tokens/s",
            "steps": "known once the data are prepared" if total is None else f"{total:,}",
            "ETA of training": "as above" if total is None else f"{total * seconds / 3600:.2f} h",
        }
        table = Table(title=f"{config.name}: dry run", show_header=False)
        for label, value in facts.items():
            table.add_row(label, value)
        console.print(table)


def _trial(config: RunConfig, folder: Path) -> RunConfig:
    alone = {**dict.fromkeys(_OF_SEVERAL), "strategy": "auto"}
    train = config.train.model_copy(update={**dict.fromkeys(BUDGETS), "steps": 1, **alone})
    evaluate = config.evaluate.model_copy(update={"max_tokens": config.train.batch_tokens, "measure_at": ()})
    log = config.log.model_copy(update={"to": ()})
    update = {
        "out": str(folder),
        "train": train,
        "evaluate": evaluate,
        "log": log,
        "schedule": ScheduleConfig(kind="constant", warmup=0),
    }
    if config.tokenizer.from_ is None:
        size = min(config.tokenizer.max_bytes, _DRY_RUN_BYTES)
        update["tokenizer"] = config.tokenizer.model_copy(update={"max_bytes": size})
    return config.model_copy(update=update)


def _borrow_or_make(config: RunConfig, trial: RunConfig, console: Console) -> bool:
    """Take what the run has made already, or make it from a sample; returns whether it was taken."""
    trial.directory.mkdir(parents=True)
    if is_trained(config) and is_prepared(config):
        for name in ("tokenizer", "data"):
            (trial.directory / name).symlink_to((config.directory / name).resolve(), target_is_directory=True)
        return True
    train_tokenizer(trial, max_bytes=_DRY_RUN_BYTES, console=console)
    prepare_data(trial, max_bytes=_DRY_RUN_BYTES, console=console)
    return False
