"""`pretrain finetune MODEL CONFIG`: any model on a task's labelled rows, by the trainer of pretraining.

What lives here: a run for each seed, the best checkpoint of each scored once on the test rows, the summary of all. What
must not: what a task is (`tasks`), or the loop.

    OUT/NAME/
        seed-0/ seed-1/ ...    a run each: train/ with checkpoints and metrics, result.json, predictions-test.jsonl
        model/                 the best model by its validation score, as its users load it, with its card
        result.json            every seed's scores, their median and spread
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from pretrain.card import write_card
from pretrain.changes import check_allowed
from pretrain.config_task import TuningConfig
from pretrain.export import model_directory
from pretrain.files import commit_directory, lock_directory, make_directories, replace_file, sha256_file
from pretrain.published_store import PublishedStore
from pretrain.ranks import PATIENT_SECONDS, Ranks
from pretrain.runtime import EXIT_STOPPED, describe_machine, keep_freed_memory, versions
from pretrain.tasks import bag_of_words, make_task
from pretrain.tasks.adapters import AdapterStore, add_adapters, check_choice, digest_of, read_adapted, write_merged
from pretrain.tasks.base import Evaluated, Task, prediction_lines
from pretrain.tasks.examples import Example, TaskData
from pretrain.tasks.heads import (
    check_length,
    install,
    is_causal,
    prepare_passes,
    read_model,
    read_tokenizer,
    read_tuned,
)
from pretrain.tasks.reading import Parts, read_parts
from pretrain.tasks.rows import Row
from pretrain.training import checkpoint
from pretrain.training.engines.job import Job, open_job
from pretrain.training.optim import build_optimizer
from pretrain.training.saving import ModelStore
from pretrain.training.trainer import EvaluationContext, EvaluationStopped, Judge, Trainer

VALIDATION, TEST = "validation", "test"


@dataclass(frozen=True)
class _Rows:
    """The rows of a task and the examples made of them."""

    parts: Parts
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]

    def of(self, name: str) -> tuple[Sequence[Row], Sequence[Example]]:
        """Rows and examples of a part."""
        return getattr(self.parts, name), getattr(self, name)


def finetune(
    model: str | Path,
    config: TuningConfig,
    *,
    resume: str = "auto",
    allow_changes: Collection[str] = (),
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> int:
    """Fine-tune a model on a task, a run a seed; return the exit code (0 done, 75 stopped and saved).

    What is done is not done again: a seed whose result is there is kept, one that was stopped goes on.

    Args:
        model: a Hugging Face model directory, a Hub name, or a pretraining's run directory; `bag-of-words` is the
            baseline of `pretrain.tasks.bag_of_words`, which trains no network and needs no seeds.
        config: the task and how it is trained.
        resume: `auto` goes on from what is there; `never` refuses when there is something.
        allow_changes: keys of the configuration that may differ from a checkpoint's.
        trust_remote_code: run the code that the model's directory carries.
        console: where progress is shown.

    Raises:
        ValueError: when the rows, the model or the configuration cannot be used, or do not fit each other.
    """
    console = console or Console(stderr=True)
    keep_freed_memory()
    baseline = str(model) == bag_of_words.NAME
    source = str(model_directory(Path(model)) if Path(model).is_dir() else model)
    config = config.model_copy(update={"model": config.model.model_copy(update={"from_": source})})
    if resume not in ("auto", "never"):
        raise ValueError(f"--resume {resume}: give auto or never")
    if resume == "never" and config.directory.exists():
        raise ValueError(f"--resume never, but `{config.directory}` is there; give another name=, or --resume auto")
    check_allowed(allow_changes, TuningConfig)
    if baseline:
        with lock_directory(config.directory):
            _baseline(config, console)
        return 0
    job = open_job(config)
    check_choice(config.model, job.strategy)
    if not job.ranks.main:
        console.quiet = True
    with ExitStack() as owned:
        job.ranks.on_main(lambda: owned.enter_context(lock_directory(config.directory)))
        with job.ranks.missed():
            tokenizer = read_tokenizer(source, trust_remote_code=trust_remote_code)
            causal = is_causal(source, trust_remote_code=trust_remote_code)
            task: Task = make_task(config.task, tokenizer, causal=causal)
            rows = _encode(task, console)
            results = []
            told = config.with_inputs(max(example.num_inputs for example in rows.train))
            for seed in config.train.seeds:
                tuning = _Seed(told.of_seed(seed), task, rows, job, console, trust_remote_code)
                found = tuning.run(allow_changes)
                if found is None:
                    return EXIT_STOPPED
                results.append(found)
            patient = job.ranks.another_group(timeout=PATIENT_SECONDS)
            patient.on_main(lambda: _conclude(config, task, rows, results, job, console, trust_remote_code))
        return 0


def _baseline(config: TuningConfig, console: Console) -> None:
    """The scores of a logistic regression over words, written and shown as those of a model."""
    result = config.directory / "result.json"
    if result.is_file() and "best_seed" in json.loads(result.read_text(encoding="utf-8")):
        raise ValueError(f"`{result}` is of a model; give the baseline a name of its own (name={config.name}-words)")
    parts = read_parts(config.task)
    scores = bag_of_words.score_baseline(config.task, parts)
    summary = summary_of([scores])
    whole = {
        "task": config.as_dict()["task"],
        "model": {"from": bag_of_words.NAME},
        "rows": {part: len(getattr(parts, part)) for part in ("train", VALIDATION, TEST)},
        "rows_sha256": parts.digest,
        "summary": summary,
        "versions": {"scikit-learn": version("scikit-learn")},
    }
    replace_file(config.directory / "result.json", (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode())
    _show(config.name, summary, 1, console)


def _encode(task: Task, console: Console) -> _Rows:
    """Read the rows and make examples of them; say what is in them."""
    parts = read_parts(task.section)
    task.fit(parts.train)
    made = {name: task.encode(getattr(parts, name), training=name == "train") for name in ("train", VALIDATION, TEST)}
    counts = ", ".join(f"{len(getattr(parts, name)):,} {name}" for name, some in made.items() if some)
    console.print(f"{task.section.kind}: {counts} rows", highlight=False)  # type: ignore[attr-defined]
    if parts.repeated:
        task.notes.append(f"{parts.repeated:,} of {len(parts.test):,} test rows stand among the training rows too")
    for note in task.notes:
        console.print(note, highlight=False, markup=False)
    if not made["train"]:
        raise ValueError("task.train: no row of it makes an example; see above")
    return _Rows(parts, made["train"], made[VALIDATION], made[TEST])


class _Seed:
    """The run of one seed."""

    def __init__(
        self, config: TuningConfig, task: Task, rows: _Rows, job: Job, console: Console, trust_remote_code: bool
    ) -> None:
        self.config, self.task, self.rows = config, task, rows
        self.job, self.console, self.trust_remote_code = job, console, trust_remote_code

    @property
    def result_file(self) -> Path:
        """What is written once, at the end."""
        return self.config.directory / "result.json"

    def run(self, allow_changes: Collection[str]) -> dict[str, Any] | None:
        """Train to the end, and score the best checkpoint; None when it was stopped."""
        config, ranks = self.config, self.job.ranks
        if allow_changes and self.result_file.is_file():
            raise ValueError(
                f"--allow-change: `{self.result_file}` has the scores of the test rows already, and they are looked at "
                "once; leave it out, or give this one another name="
            )
        ranks.on_main(self._write_tokenizer)
        model, new = read_model(config.model, self.task, config.train.seed, trust_remote_code=self.trust_remote_code)
        check_length(model, config.task.max_length, str(config.model.from_))
        prepare_passes(model, config.train, self.job.device, config.task.max_length)
        install(model, self.task)
        if config.model.adapters is not None:
            model = add_adapters(model, new, config.model.adapters, config.train.seed)
        trainer = self._trainer(model)
        if config.model.weights == "pretrained" and new:
            self.console.print(f"seed {config.train.seed}: new weights: {', '.join(new)}", highlight=False)
        result = trainer.train(allow_changes=allow_changes)
        if not result.finished:
            self.console.print(
                f"stopped by {result.stopped_by} at step {result.progress.step:,}; run the same command again to go on",
                highlight=False,
            )
            return None
        group = ranks.another_group(timeout=PATIENT_SECONDS)
        found: dict[str, Any] = group.broadcast(group.on_main(lambda: self._result(trainer, result.progress)))
        return found

    def _trainer(self, model: nn.Module) -> Trainer:
        config, task, rows = self.config, self.task, self.rows
        data = TaskData(
            rows.train,
            task.collate,
            config.rows_per_batch,
            config.train.seed,
            {
                "rows": rows.parts.digest,
                "examples": len(rows.train),
                "tokenizer": _tokenizer_digest(config),
                **task.made_of(),
                **({} if config.model.adapters is None else {"model": digest_of(str(config.model.from_), model)}),
            },
        )

        def validate(live: nn.Module, context: EvaluationContext) -> Mapping[str, float]:
            def look() -> None:
                if context.stopping():
                    raise EvaluationStopped

            scores = task.evaluate(live, *rows.of(VALIDATION), context.device, context.ranks, look).scores
            judge({f"{VALIDATION}/{name}": score for name, score in scores.items()})  # a wrong metric, at step 0
            return scores

        judge = judge_of(task)
        compute = torch.bfloat16 if self.job.precision == "bf16" else torch.float32
        return Trainer(
            config,
            model=model,
            data=data,
            optimizer=build_optimizer(model, config.optimizer, compute_dtype=compute),
            store=self._store(),
            evaluators={VALIDATION: validate},
            judge=judge,
            patience=config.evaluate.patience,
            console=self.console,
            job=self.job,
        )

    def _store(self) -> ModelStore:
        tokenizer = self.config.directory / "tokenizer"
        if self.config.model.adapters is None:
            return PublishedStore(tokenizer)
        return AdapterStore(str(self.config.model.from_), self.task.head, tokenizer)

    def _read(self, directory: Path) -> Any:
        """The model of a checkpoint, as its users read it."""
        chosen, code = self.config.model, self.trust_remote_code
        if chosen.adapters is None:
            return read_tuned(directory, self.task, self.job.device, trust_remote_code=code)
        seed = self.config.train.seed
        return read_adapted(chosen, directory, self.task, seed, self.job.device, trust_remote_code=code)

    def _write_tokenizer(self) -> None:
        directory = self.config.directory / "tokenizer"
        if not directory.is_dir():
            make_directories(self.config.directory)
            with commit_directory(directory) as temporary:
                self.task.tokenizer.save_pretrained(temporary)

    def _result(self, trainer: Trainer, progress: Any) -> dict[str, Any]:
        """The scores of the best checkpoint, read as its users read it. The test rows are looked at once."""
        if self.result_file.is_file():
            found: dict[str, Any] = json.loads(self.result_file.read_text(encoding="utf-8"))
            if found["best"]["of"] != progress.step:
                raise ValueError(
                    f"`{self.result_file}` is of step {found['best']['of']:,}, and the run stands at "
                    f"{progress.step:,}; give this one another name="
                )
            return found
        best = checkpoint.read_pointer(trainer.directory, "best") or checkpoint.read_pointer(
            trainer.directory, "latest"
        )
        assert best is not None
        model = self._read(best / "model")
        scored: dict[str, Evaluated] = {}
        for name in (VALIDATION, TEST):
            rows, examples = self.rows.of(name)
            if examples:
                scored[name] = self.task.evaluate(model, rows, examples, self.job.device, Ranks.alone(), part=name)
        if TEST in scored:
            lines = prediction_lines(self.task, self.rows.parts.test, scored[TEST].predictions)
            replace_file(self.config.directory / "predictions-test.jsonl", "".join(lines).encode())
        result = {
            "seed": self.config.train.seed,
            "best": {"step": int((progress.best or {"step": progress.step})["step"]), "of": progress.step},
            "checkpoint": str(best.relative_to(self.config.directory)),
            "seconds": round(progress.seconds, 1),
            **{name: evaluated.scores for name, evaluated in scored.items()},
        }
        replace_file(self.result_file, (json.dumps(result, indent=2) + "\n").encode())
        return result


def judge_of(task: Task) -> Judge:
    """What decides which checkpoint is best: a score of the validation rows."""
    metric = task.section.metric or task.metric
    sign, name = (1.0, metric[1:]) if metric.startswith("-") else (-1.0, metric)

    def judge(scores: Mapping[str, float]) -> float | None:
        known = {key.partition("/")[2]: value for key, value in scores.items() if key.startswith(f"{VALIDATION}/")}
        if name not in known:
            raise ValueError(f"task.metric: there is no score `{name}`; there are {', '.join(known)}")
        return sign * known[name]

    return judge


def _tokenizer_digest(config: TuningConfig) -> str:
    file = config.directory / "tokenizer" / "tokenizer.json"
    return sha256_file(file) if file.is_file() else "none"


def summary_of(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of every score its median over the seeds, its least and its largest, and all of them in the seeds' order."""
    summary = {}
    for part in (VALIDATION, TEST):
        for score in results[0].get(part, {}):
            values = [float(result[part][score]) for result in results]
            spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            summary[f"{part}/{score}"] = {**spread, "values": values}
    return summary


def _conclude(
    config: TuningConfig,
    task: Task,
    rows: _Rows,
    results: Sequence[Mapping[str, Any]],
    job: Job,
    console: Console,
    trust_remote_code: bool,
) -> None:
    """Publish the best model of all seeds, write the summary, and show it."""
    metric = task.section.metric or task.metric
    name = metric.removeprefix("-")
    better = min if metric.startswith("-") else max
    best = better(results, key=lambda result: float(result[VALIDATION][name]))
    chosen = config.directory / f"seed-{best['seed']}" / str(best["checkpoint"]) / "model"
    whole = _whole(config, task, rows, results, best, name, job)
    with commit_directory(config.directory / "model", replace=True) as temporary:
        if config.model.adapters is not None:
            seed = int(best["seed"])
            write_merged(config.model, chosen, temporary, task, seed, trust_remote_code=trust_remote_code)
        else:
            for file in sorted(chosen.iterdir()):
                (temporary / file.name).write_bytes(file.read_bytes())
        task.finish(temporary)
        write_card(temporary, config.directory, result=whole, overwrite=True)
    replace_file(config.directory / "result.json", (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode())
    _show(config.name, whole["summary"], len(results), console)
    console.print(f"model: {config.directory / 'model'}", highlight=False)


def _whole(
    config: TuningConfig,
    task: Task,
    rows: _Rows,
    results: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any],
    metric: str,
    job: Job,
) -> dict[str, Any]:
    """What `result.json` holds of all seeds."""
    plain = config.as_dict()
    return {
        "task": plain["task"],
        "model": plain["model"],
        "base_is_local": Path(str(config.model.from_)).is_dir(),
        **{section: plain[section] for section in ("optimizer", "schedule", "train")},
        "precision": job.precision,
        "rows": {part: len(getattr(rows.parts, part)) for part in ("train", VALIDATION, TEST)},
        "rows_sha256": rows.parts.digest,
        "notes": task.notes,
        "metric": metric,
        "best_seed": best["seed"],
        "seeds": list(results),
        "summary": summary_of(results),
        "machine": describe_machine(job.device),
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    }


def _show(name: str, summary: Mapping[str, Mapping[str, Any]], seeds: int, console: Console) -> None:
    table = Table(title=f"{name}: {seeds} seed(s)")
    for column in ("score", "median", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for score, spread in summary.items():
        table.add_row(score, *(f"{spread[key]:.4f}" for key in ("median", "min", "max")))
    console.print(table)
