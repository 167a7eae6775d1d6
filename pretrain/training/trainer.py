"""The training loop: one straight road over Accelerate, for any objective and any model.

What lives here: the order of things in a step and in a run. What must not: models, data formats, tokenizers. The
trainer is handed a model, a data plane, an optimizer, a store that writes the model, and evaluators.

A run is exact: the batch of a step is a pure function of (data, seed, step), the learning rate of (step, total
steps), and a checkpoint holds everything else, so an interrupted run goes on bit for bit (one process, same split).
"""

from __future__ import annotations

import json
import math
import statistics
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from pretrain.config import RunConfig, config_to_dict
from pretrain.config_types import amount_in_steps
from pretrain.files import replace_file
from pretrain.runtime import StopSignals, make_accelerator, peak_memory_bytes, set_seed
from pretrain.training import checkpoint
from pretrain.training.flops import peak_flops
from pretrain.training.guard import Guard, Verdict, error, message
from pretrain.training.metrics import JsonLines, Metrics, open_metrics
from pretrain.training.progress import Progress, Result, budget_minutes, steps_of
from pretrain.training.records import fixed_steps
from pretrain.training.saving import ModelStore, Saver
from pretrain.training.schedule import learning_rate_scale

_CPU_MICRO_BATCH_TOKENS = 4096
_PROBE_SECONDS = 6.0


class EvaluationStopped(Exception):  # noqa: N818 (it is no error)
    """An evaluator saw `context.stopping()`: its scores are not wanted now, the run makes them when it goes on."""


class Batch(Protocol):
    """Rows of tokens, as a data plane makes them: numpy arrays by Hugging Face's names, each (rows, length)."""

    arrays: Mapping[str, np.ndarray]
    num_targets: int
    num_tokens: int
    row_ids: np.ndarray


class Data(Protocol):
    """A data plane: the batch at a step is a pure function of (data, seed, step)."""

    @property
    def num_rows(self) -> int:
        """Rows an epoch."""

    def batch(self, step: int, rows: slice | None = None) -> Any:
        """The global batch of `step`, or the given rows of it."""

    def for_run(self, total_steps: int) -> Sequence[str]:
        """Fix what depends on the length of the run; return what a person should know, a line each."""

    def state(self, samples_seen: int) -> dict[str, Any]:
        """What a checkpoint must hold of the data, as plain data."""

    def check(self, state: dict[str, Any]) -> None:
        """Raise ValueError with the difference when `state` was made by other data."""


@dataclass(frozen=True)
class EvaluationContext:
    """What an evaluator may want to know."""

    step: int
    device: torch.device
    config: RunConfig
    directory: Path
    stopping: Callable[[], bool] = lambda: False
    """Whether the run was asked to stop; a long evaluator looks now and then, and raises `EvaluationStopped`."""


Evaluator = Callable[[nn.Module, EvaluationContext], Mapping[str, float]]
"""`evaluator(model, context)` gives scores by name; the model is in eval mode and under no_grad."""


class Trainer:
    """Trains a model from where its run directory stands to the end of the budget.

    Args:
        config: the run configuration.
        model: any module whose `forward(**batch, num_items_in_batch=n)` returns an object with `.loss`, the sum of
            the token losses over n.
        data: the data plane.
        optimizer: its groups hold `initial_lr`, which the schedule scales.
        store: writes and reads the model.
        directory: where checkpoints and metrics go.
        evaluators: by name.
        judges: names of the evaluators whose mean `loss` decides what is best; the first one when left out.
        flops_per_token: model FLOPs of a token, forward and backward, for MFU.
        inputs: digests of what is trained on; every checkpoint holds them.
        console: where progress is shown.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        model: nn.Module,
        data: Data,
        optimizer: torch.optim.Optimizer,
        store: ModelStore,
        directory: Path | None = None,
        evaluators: Mapping[str, Evaluator] | None = None,
        judges: Sequence[str] | None = None,
        flops_per_token: float | None = None,
        inputs: Mapping[str, str] | None = None,
        console: Console | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.config = config
        self.directory = directory or config.directory / "train"
        self.console = console or Console(stderr=True)
        self.evaluators = dict(evaluators or {})
        self.judges = list(judges) if judges is not None else list(self.evaluators)[:1]
        self.data = data
        self.flops_per_token = flops_per_token
        self.accelerator = accelerator or make_accelerator(config.train)
        self.device: torch.device = self.accelerator.device
        if config.train.compile:
            model.compile()
        self.unwrapped = model
        self.bare_optimizer = optimizer
        self.saver = Saver(
            config, self.directory, model, optimizer, data, store, self.accelerator, self.console, dict(inputs or {})
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.base_lrs = [float(group["initial_lr"]) for group in optimizer.param_groups]
        self.guard = Guard.of(config.train, scaled=self.accelerator.scaler is not None)
        self.micro_batch = self._choose_micro_batch()

    # --- the run ----------------------------------------------------------------------------------------------------

    def train(self, *, resume: bool = True, allow_changes: Collection[str] = ()) -> Result:
        """Train to the end of the budget, or until a stop signal; save; return where the run stands.

        Args:
            resume: go on from the newest whole checkpoint, if there is one.
            allow_changes: keys of the configuration, or whole sections, that may differ from the checkpoint's.

        Raises:
            ChangedConfigError: when the configuration differs from the checkpoint's in a way that is not allowed.
            ArtifactError: when a checkpoint that is there does not fit; nothing starts over in silence.
            NonFiniteError, SpikeError: when a step is not finite or spikes, and the policy is stop.
        """
        set_seed(self.config.train.seed)
        with StopSignals(self.config.train.stop_signals) as stop:
            progress = self.saver.resume(allow_changes) if resume else None
            saved = None if progress is None else progress.step
            if progress is None:
                progress = self._begin()
            elif self.config.train.micro_batch == "auto":
                self.micro_batch = progress.micro_batch
            progress.micro_batch = self.micro_batch
            if not progress.finished:
                saved = self._loop(progress, saved, stop)
        assert saved is not None
        stopped_by = None if progress.finished else stop.received
        return Result(progress, checkpoint.checkpoint_path(self.directory, saved), stopped_by)

    def _begin(self) -> Progress:
        """Step 0 of a new run, its length fixed."""
        self.saver.write_copies()
        steps = self._total_steps()
        for line in self.data.for_run(steps):
            self.console.print(line, highlight=False)
        run_id = uuid.uuid4().hex[:12]
        arithmetic = self.saver.arithmetic
        return Progress(run_id=run_id, total_steps=steps, micro_batch=self.micro_batch, arithmetic=arithmetic)

    def _loop(self, progress: Progress, saved: int | None, stop: StopSignals) -> int:
        """Steps, evaluations and saves to the end, or until a stop; returns the step that was saved last.

        An evaluation that a stop signal cut short is made when the run goes on.
        """
        evaluate_every = max(1, amount_in_steps(self.config.evaluate.every, progress.total_steps))
        save_every = max(1, amount_in_steps(self.config.checkpoint.every, progress.total_steps))
        self.saver.check_space(progress, save_every=save_every, judged=bool(self.judges))

        def settle() -> None:
            """Evaluate and save where this step wants it."""
            nonlocal saved
            done, wanted = progress.step == progress.total_steps, progress.step % evaluate_every == 0
            known = progress.scored_at == progress.step and progress.step > 0  # nothing is kept of a start at step 0
            if (done or wanted) and not known and not stop.requested:
                self._evaluate(progress, metrics, stop)
                saved = saved if saved != progress.step else None  # a save without its scores is made again
            if progress.step and saved != progress.step and (done or progress.step % save_every == 0):
                whole = self.saver.save(progress, loss=self._judged(progress), last=done or stop.requested)
                saved = progress.step if whole is not None else saved

        with self._open_metrics(progress) as metrics:
            settle()
            for micro_batches, waited in self._batches(progress):
                if stop.requested:
                    break
                self._step(progress, micro_batches, waited, metrics)
                settle()
            if saved != progress.step:
                self.saver.save(progress, loss=self._judged(progress))
        return progress.step

    def _step(self, progress: Progress, micro_batches: Sequence[Batch], waited: float, metrics: Metrics) -> None:
        """One optimizer step over the global batch, normalized by its number of targets."""
        started = time.perf_counter()
        scale = learning_rate_scale(progress.step, progress.total_steps, self.config.schedule)
        self._set_learning_rate(scale)
        loss, norm = self._forward_backward(micro_batches)
        verdict = self.guard.judge(progress.guard, loss, norm)
        if verdict.update:
            self.optimizer.step()
        elif self.accelerator.scaler is not None:  # it has seen the gradients: let it find its scale
            self.accelerator.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started + waited
        progress.seconds += seconds
        progress.step += 1
        progress.samples += self.config.rows_per_batch
        progress.tokens += self.config.train.batch_tokens
        num_tokens = sum(batch.num_tokens for batch in micro_batches)
        progress.text_tokens += num_tokens
        if verdict.why or progress.step % self.config.log.every == 0 or progress.step == progress.total_steps:
            numbers = self._numbers(progress, loss, norm, scale, seconds, waited, num_tokens)
            metrics.write(progress.step, numbers | verdict.numbers())
        if verdict.why and (verdict.why != "overflow" or verdict.stop):
            self._report(progress, verdict, loss, norm, micro_batches)

    def _forward_backward(self, micro_batches: Sequence[Batch]) -> tuple[float, float]:
        """Gradients of the global batch, clipped. Returns its loss and the norm of the gradient before clipping."""
        self.model.train()
        num_targets = max(1, sum(batch.num_targets for batch in micro_batches))
        total = torch.zeros((), device=self.device)
        for batch in micro_batches:
            loss = self.model(**self._to_device(batch), num_items_in_batch=num_targets).loss
            self.accelerator.backward(loss)
            total += loss.detach()
        limit = self.config.train.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), math.inf if limit is None else limit)
        return total.item(), float(norm)

    def _report(
        self, progress: Progress, verdict: Verdict, loss: float, norm: float, micro_batches: Sequence[Batch]
    ) -> None:
        """Name the rows of a step that the guard found fault with: a line here, and one in `skipped.jsonl`.

        Raises:
            NonFiniteError, SpikeError: when the run ends here.
        """
        step, rows = progress.step, [row for batch in micro_batches for row in batch.row_ids.tolist()]
        found = {"why": verdict.why, "skipped": not verdict.update, "loss": loss, "grad_norm": norm, "rows": rows}
        with suppress(OSError), closing(JsonLines(self.directory / "skipped.jsonl", first_step=step - 1)) as record:
            record.write(step, found)  # a full disk must not end the training
        line = message(step, verdict, rows, f"pretrain inspect {self.directory / 'config.yaml'} --step {step}")
        if verdict.stop:
            whole = checkpoint.list_checkpoints(self.directory, run_id=progress.run_id)
            where = f"checkpoint {whole[-1].name}" if whole else "step 0: nothing is saved yet"
            raise error(verdict, line, progress.guard.in_a_row, f"The next call goes on from {where}.")
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _numbers(
        self, progress: Progress, loss: float, norm: float, scale: float, seconds: float, waited: float, tokens: int
    ) -> dict[str, float]:
        rate = tokens / seconds
        numbers = {
            "loss": loss,
            "grad_norm": norm,
            "lr": self.base_lrs[0] * scale,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "tokens_per_second": rate,
            "data_wait": waited / seconds,
            "memory_gib": peak_memory_bytes(self.device) / 2**30,
        }
        peak = peak_flops(self.device, self.accelerator.mixed_precision)
        if peak is not None and self.flops_per_token is not None:
            numbers["mfu"] = rate * self.flops_per_token / peak
        return numbers

    def _set_learning_rate(self, scale: float) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * scale

    # --- data -------------------------------------------------------------------------------------------------------

    def _batches(self, progress: Progress) -> Iterator[tuple[list[Batch], float]]:
        """The micro-batches of every step to come, and the seconds waited for them; one step is made ahead."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as pool:
            ahead: Future[list[Batch]] = pool.submit(self._micro_batches, progress.step)
            for step in range(progress.step, progress.total_steps):
                started = time.perf_counter()
                current = ahead.result()
                waited = time.perf_counter() - started
                if step + 1 < progress.total_steps:
                    ahead = pool.submit(self._micro_batches, step + 1)
                yield current, waited

    def _micro_batches(self, step: int) -> list[Batch]:
        rows = self.config.rows_per_batch
        starts = range(0, rows, self.micro_batch)
        return [self.data.batch(step, slice(start, min(start + self.micro_batch, rows))) for start in starts]

    def _to_device(self, batch: Batch) -> dict[str, Tensor]:
        tensors = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
        if self.device.type == "cuda":
            return {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in tensors.items()}
        return tensors

    def _choose_micro_batch(self) -> int:
        """Rows a forward pass: as configured, or on a GPU the most that fit, or on a CPU what its caches like."""
        rows = self.config.rows_per_batch
        if self.config.train.micro_batch != "auto":
            return min(rows, self.config.train.micro_batch)
        if self.device.type != "cuda":
            return min(rows, max(1, _CPU_MICRO_BATCH_TOKENS // self.config.data.sequence_length))
        micro_batch = rows
        # The optimizer's state is not there yet: hold its place (two values a parameter) while trying.
        state = sum(parameter.numel() for parameter in self.unwrapped.parameters() if parameter.requires_grad)
        place = torch.empty(2 * state, dtype=torch.float32, device=self.device)
        while True:
            try:
                batch = self.data.batch(0, slice(0, micro_batch))
                loss = self.model(**self._to_device(batch), num_items_in_batch=max(1, batch.num_targets)).loss
                self.accelerator.backward(loss)
            except torch.OutOfMemoryError:
                if micro_batch == 1:
                    raise
                micro_batch = (micro_batch + 1) // 2
            else:
                del place
                return micro_batch
            finally:
                self.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()

    # --- the budget -------------------------------------------------------------------------------------------------

    def _total_steps(self) -> int:
        """Steps of the whole run. A budget of time is measured once, fixed as steps, and written down."""
        train = self.config.train
        if train.minutes is None and train.hours is None:
            return steps_of(self.config, self.data.num_rows, None)
        record = self.directory / "budget.json"
        if (known := fixed_steps(self.config, self.directory)) is not None:
            return known
        seconds_per_step = self.measure_step()
        steps = steps_of(self.config, self.data.num_rows, seconds_per_step)
        fixed = {
            "minutes": budget_minutes(self.config),
            "seconds_per_step": seconds_per_step,
            "steps": steps,
            "batch_tokens": train.batch_tokens,
            "tokens": steps * train.batch_tokens,
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        replace_file(record, (json.dumps(fixed, indent=2) + "\n").encode())
        self.console.print(
            f"budget: {fixed['minutes']:g} minutes at {seconds_per_step:.2f} s a step are {steps:,} steps, "
            f"{fixed['tokens']:,} tokens (fixed in {record})",
            highlight=False,
        )
        return steps

    def measure_step(self) -> float:
        """Median seconds of a whole step, by real steps at learning rate 0 that leave no trace."""
        rng = checkpoint.capture_rng()
        self._set_learning_rate(0.0)
        times: list[float] = []
        while len(times) < 3 or (sum(times) < _PROBE_SECONDS and len(times) < 50):
            started = time.perf_counter()
            self._forward_backward(self._micro_batches(len(times)))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - started)
        self.bare_optimizer.state.clear()
        checkpoint.restore_rng(rng)
        return statistics.median(times[1:])

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self, progress: Progress, metrics: Metrics, stop: StopSignals) -> None:
        """Run every evaluator; scores go to the sinks as `name/score`. A stop signal may end it without any."""
        self.model.eval()
        context = EvaluationContext(progress.step, self.device, self.config, self.directory, lambda: stop.requested)
        rng = checkpoint.capture_rng()
        scores: dict[str, float] = {}
        try:
            with torch.no_grad():
                for name, evaluator in self.evaluators.items():
                    for score, value in evaluator(self.model, context).items():
                        scores[f"{name}/{score}"] = float(value)
        except EvaluationStopped:
            return
        finally:
            checkpoint.restore_rng(rng)
        progress.scores, progress.scored_at = scores, progress.step
        if progress.scores:
            metrics.write(progress.step, progress.scores)

    def _judged(self, progress: Progress) -> float | None:
        """The loss that decides what is best: the mean over the validation sets; None when this step has none."""
        losses = [progress.scores.get(f"{name}/loss") for name in self.judges]
        known = [loss for loss in losses if loss is not None]
        return statistics.fmean(known) if known and progress.scored_at == progress.step else None

    def _open_metrics(self, progress: Progress) -> Metrics:
        log = self.config.log
        return open_metrics(
            log.to,
            project=log.project,
            name=self.config.name,
            run_id=progress.run_id,
            directory=self.directory,
            config=config_to_dict(self.config),
            first_step=progress.step,
            total_steps=progress.total_steps,
            console=self.console,
        )
