"""The training loop: one straight road over Accelerate, for any objective and any model.

What lives here: the order of things in a step and in a run. What must not: models, data formats, tokenizers. The
trainer is handed a model, a data plane, an optimizer, a store that writes the model, and evaluators.

A run is exact: the batch of a step is a pure function of (data, seed, step), the learning rate of (step, total
steps), and a checkpoint holds everything else, so an interrupted run goes on bit for bit (one process, same split).
"""

from __future__ import annotations

import json
import math
import socket
import statistics
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from pretrain.config import config_to_dict
from pretrain.config_loop import LoopConfig
from pretrain.config_types import amount_in_steps
from pretrain.files import replace_file
from pretrain.heartbeat import Heartbeat
from pretrain.planning.facts import ModelFacts
from pretrain.ranks import Ranks
from pretrain.runtime import StopSignals, describe_machine, peak_memory_bytes, set_seed, versions
from pretrain.training import checkpoint
from pretrain.training.engines import Engine, make_engine
from pretrain.training.engines.job import Job, open_job
from pretrain.training.feed import Data, Feed, MicroBatch, counts_of, divisors
from pretrain.training.flops import peak_flops
from pretrain.training.guard import Guard, error, message
from pretrain.training.metrics import JsonLines, Metrics, open_metrics
from pretrain.training.micro_batch import choose_micro_batch
from pretrain.training.parts import Parts
from pretrain.training.pending import Known, Sent, make_road
from pretrain.training.progress import Progress, Result, budget_minutes, steps_of
from pretrain.training.records import fixed_steps
from pretrain.training.replicas import Replicas
from pretrain.training.saving import ModelStore, Saver
from pretrain.training.schedule import learning_rate_scale
from pretrain.training.slow_ranks import SlowRanks
from pretrain.training.starts import record_start

_PROBE_SECONDS = 6.0


class EvaluationStopped(Exception):  # noqa: N818 (it is no error)
    """An evaluator saw `context.stopping()`: its scores are not wanted now, the run makes them when it goes on."""


class AgreedStop:
    """A stop that all processes of a job take at the same step, whichever of them got the signal."""

    def __init__(self, signals: StopSignals, ranks: Ranks) -> None:
        self._signals = signals
        self._ranks = ranks
        self.received: str | None = None

    @property
    def requested(self) -> bool:
        """Whether they have agreed to stop; one process needs to ask nobody."""
        return self.received is not None or (self._ranks.world == 1 and self.look())

    def agree(self, *values: float) -> list[float]:
        """Look together whether any of them was asked to stop; returns the sums of their `values` on the way."""
        *totals, asked = self._ranks.sum([*values, float(self._signals.requested)])
        if asked and self.received is None:
            names = [name for name in self._ranks.gather(self._signals.received) if name is not None]
            self.received = names[0]
        return totals

    def look(self) -> bool:
        """`agree` for whoever has nothing to add up."""
        self.agree()
        return self.received is not None


@dataclass(frozen=True)
class EvaluationContext:
    """What an evaluator may want to know."""

    step: int
    device: torch.device
    config: LoopConfig
    directory: Path
    stopping: Callable[[], bool] = lambda: False
    """Whether the run was asked to stop; a long evaluator looks now and then, and raises `EvaluationStopped`. The
    processes of a job agree on it, so each of them must look equally often."""
    ranks: Ranks = field(default_factory=Ranks.alone)
    """The processes of the job. All of them run every evaluator, and the scores of the first one count."""
    total_steps: int = 0
    """Of the whole training."""


Evaluator = Callable[[nn.Module, EvaluationContext], Mapping[str, float]]
"""`evaluator(model, context)` gives scores by name; the model is in eval mode and under no_grad."""

Judge = Callable[[Mapping[str, float]], float | None]
"""From the scores of an evaluation, by `evaluator/score`, the number that is lowest at the best checkpoint."""


class Trainer:
    """Trains a model from where its run directory stands to the end of the budget.

    Args:
        config: the run configuration.
        model: any module whose `forward(**batch, num_items_in_batch=n)` returns an object with `.loss`, the sum of
            the token losses over n; where batches have item counts it is given `item_counts` too, by name. What else
            a step is to log stands in the output's `parts`: (2,) tensors by name, a sum and its divisor.
        data: the data plane.
        optimizer: its groups hold `initial_lr`, which the schedule scales.
        store: writes and reads the model.
        directory: where checkpoints and metrics go.
        evaluators: by name.
        judges: names of the evaluators whose mean `loss` decides what is best; the first one when left out.
        judge: what decides it in place of them: a number of the scores (by `evaluator/score`) that is to be low.
        patience: evaluations without a better checkpoint after which the run ends; None: it never does.
        flops_per_token: model FLOPs of a token, forward and backward, for MFU.
        model_facts: of the model, by which `train.micro_batch: auto` is planned on a GPU.
        inputs: digests of what is trained on; every checkpoint holds them.
        console: where progress is shown.
        job: the processes of the run and what they run on; opened when left out.
        at_start: called with the engine before step 0 of a new run; returns a line about what it did.
    """

    def __init__(
        self,
        config: LoopConfig,
        *,
        model: nn.Module,
        data: Data,
        optimizer: torch.optim.Optimizer,
        store: ModelStore,
        directory: Path | None = None,
        evaluators: Mapping[str, Evaluator] | None = None,
        judges: Sequence[str] | None = None,
        judge: Judge | None = None,
        patience: int | None = None,
        flops_per_token: float | None = None,
        model_facts: ModelFacts | None = None,
        inputs: Mapping[str, str] | None = None,
        console: Console | None = None,
        job: Job | None = None,
        at_start: Callable[[Engine], str] | None = None,
    ) -> None:
        self.config = config
        self.at_start = at_start
        self.directory = directory or config.directory / "train"
        self.console = console or Console(stderr=True)
        self.evaluators = dict(evaluators or {})
        self.judges = list(judges) if judges is not None else list(self.evaluators)[:1]
        self.judge, self.patience = judge or self._mean_loss, patience
        self.data = data
        self.flops_per_token = flops_per_token
        self.job = job or open_job(config)
        self.ranks = self.job.ranks
        self.device = self.job.device
        if not self.ranks.main:
            self.console.quiet = True
        if config.train.compile:
            model.compile()
        self.engine = make_engine(self.job.strategy, config.train, self.job.accelerator, self.ranks, model, optimizer)
        self.saver = Saver(config, self.directory, self.engine, data, store, self.job, self.console, dict(inputs or {}))
        self.base_lrs = [float(group["initial_lr"]) for group in optimizer.param_groups]
        self.road = make_road(config.train, Guard.of(config.train, scaled=self.engine.scaled), self.engine)
        self._known_at = 0.0
        hosts = self.ranks.gather(socket.gethostname())
        self.replicas = Replicas(config.train.check_replicas, self.engine, hosts)
        self.slow_ranks = SlowRanks(config.log.slow_ranks, self.engine, hosts)
        self.heartbeat = Heartbeat.from_environment(self.ranks.rank)
        self.micro_batch = choose_micro_batch(config, self.job.precision, self.engine, data, model_facts)

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
        set_seed(self.config.train.seed + self.ranks.rank)  # what is drawn without a key differs between the ranks
        with StopSignals(self.config.train.stop_signals) as signals:
            stop = AgreedStop(signals, self.ranks)
            self.saver.check()
            progress = self.saver.resume(allow_changes) if resume else None
            saved = None if progress is None else progress.step
            if progress is None:
                progress = self._begin()
            elif self.config.train.micro_batch == "auto" and progress.split in ("", self.split):
                self.micro_batch = progress.micro_batch  # another engine has another choice, made for its memory
            progress.micro_batch, progress.split = self.micro_batch, self.split
            if not progress.finished:
                self._record_start(progress)
                self.road.begin(progress.guard)
                self.replicas.begin()
                self.slow_ranks.begin()
                saved = self._loop(progress, saved, stop)
        assert saved is not None
        self.heartbeat.beat(progress.step, "end")
        stopped_by = None if progress.finished else stop.received
        path = checkpoint.checkpoint_path(self.directory, saved)
        return Result(progress, path, stopped_by, self.saver.place.where(saved))

    def _record_start(self, progress: Progress) -> None:
        """Say in `starts.jsonl` from where this call goes on, and on what."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        about = {"device": name, "processes": self.ranks.world, "precision": self.job.precision, "split": self.split}
        more = {"machine": describe_machine(self.device), "threads": torch.get_num_threads(), "versions": versions()}
        if self.ranks.main:
            record_start(self.directory, progress.step, about | {"micro_batch": self.micro_batch} | more)

    def _begin(self) -> Progress:
        """Step 0 of a new run, its length fixed."""
        self.ranks.on_main(self.saver.write_copies)
        steps = self._total_steps()
        for line in self.data.for_run(steps):
            self.console.print(line, highlight=False)
        if self.at_start is not None:  # after the steps by which a budget of time is measured
            self.console.print(self.at_start(self.engine), highlight=False, markup=False)
        run_id = self.ranks.broadcast(uuid.uuid4().hex[:12])
        arithmetic = self.saver.arithmetic
        return Progress(run_id=run_id, total_steps=steps, micro_batch=self.micro_batch, arithmetic=arithmetic)

    def _loop(self, progress: Progress, saved: int | None, stop: AgreedStop) -> int:
        """Steps, evaluations and saves to the end, or until a stop; returns the step that was saved last.

        An evaluation that a stop signal cut short is made when the run goes on.
        """
        evaluate_every = max(1, amount_in_steps(self.config.evaluate.every, progress.total_steps))
        save_every = max(1, amount_in_steps(self.config.save_every, progress.total_steps))
        judged = bool(self.judges) or self.judge != self._mean_loss
        progress.patience = None if self.patience is None else self.patience * evaluate_every
        self.ranks.on_main(lambda: self.saver.check_space(progress, save_every=save_every, judged=judged))

        def settle() -> None:
            """Evaluate and save where this step wants it."""
            nonlocal saved
            self.saver.look()
            done, wanted = progress.step == progress.total_steps, progress.step % evaluate_every == 0
            wanted = wanted or self.config.evaluate.also_at(progress.step, progress.total_steps)
            known = progress.scored_at == progress.step and progress.step > 0  # nothing is kept of a start at step 0
            if (done or wanted) and not known and not stop.requested:
                self._evaluate(progress, metrics, stop)
                saved = saved if saved != progress.step else None  # a save without its scores is made again
            if progress.step and saved != progress.step and (done or progress.step % save_every == 0):
                self.heartbeat.beat(progress.step, "save")
                self._before_save(progress, metrics)
                whole = self.saver.save(progress, loss=self._judged(progress), last=done or stop.requested)
                saved = progress.step if whole is not None else saved
                # With patience, whether this one is the best is to be known before the next step.
                if self.patience is not None and not self.saver.wait():
                    saved = None
            self.heartbeat.beat(progress.step, "step")  # waiting for its data belongs to a step

        with self._open_metrics(progress) as metrics, self._saves_ended(progress):
            stop.agree()
            settle()
            for micro_batches, waited in self.feed.ahead(progress.step, progress.total_steps):
                if stop.requested or progress.given_up:
                    break
                self._step(progress, micro_batches, waited, metrics, stop)
                settle()
            self.heartbeat.beat(progress.step, "save")
            self._before_save(progress, metrics)
            whole_too = self.saver.wait()
            if saved != progress.step or not whole_too:
                self.saver.save(progress, loss=self._judged(progress))
        return progress.step

    @contextmanager
    def _saves_ended(self, progress: Progress) -> Iterator[None]:
        """Whatever happens, the save in flight ends first; it may take longer than a step may."""
        try:
            yield
        finally:
            self.heartbeat.beat(progress.step, "save")
            self.saver.close()

    def _step(
        self, progress: Progress, micro_batches: Sequence[MicroBatch], waited: float, metrics: Metrics, stop: AgreedStop
    ) -> None:
        """One optimizer step over the global batch, normalized by its number of targets."""
        since = time.perf_counter() - waited
        scale = learning_rate_scale(progress.step, progress.total_steps, self.config.schedule)
        self._set_learning_rate(scale)
        self.slow_ranks.arrive(waited)
        own = counts_of(micro_batches)
        *counts, num_tokens = self.ranks.sum([*own.values(), sum(batch.num_tokens for batch in micro_batches)])
        parts = Parts()
        share = self._backward(micro_batches, dict(zip(own, counts, strict=True)), parts)
        progress.step += 1
        progress.samples += self.config.rows_per_batch
        progress.tokens += self.config.tokens_per_step
        progress.text_tokens += int(num_tokens)
        sent = Sent(progress.step, progress.tokens, int(num_tokens), scale, since, waited, micro_batches, parts)
        all_known = self.road.update(progress.guard, sent, share, self.slow_ranks.noticing(stop.agree))
        if self._is_logged(progress.step, progress.total_steps):
            parts.send(self.ranks.world)
        slow = self.slow_ranks.look(progress.step)
        self.slow_ranks.leave()
        for line in slow:
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)
        for known in all_known:
            self._conclude(progress, known, metrics)
        if self.replicas.due(progress.step):
            self._check_replicas(progress)

    def _drain(self, progress: Progress, metrics: Metrics) -> None:
        """Let everything be known of the steps that were made: before anything looks at where the run stands."""
        self.slow_ranks.pause()
        for known in self.road.drain(progress.guard):
            self._conclude(progress, known, metrics)

    def _before_save(self, progress: Progress, metrics: Metrics) -> None:
        """What is saved is known to the end, and the copies of it agree: rank 0 may hold the bad one."""
        self._drain(progress, metrics)
        if self.replicas.wanted:
            self._check_replicas(progress)

    def _check_replicas(self, progress: Progress) -> None:
        self.slow_ranks.pause()
        self.replicas.check(progress.step, lambda: self._next_call(progress))

    def _conclude(self, progress: Progress, known: Known, metrics: Metrics) -> None:
        """Log a step of which everything is known, and say what the guard found."""
        sent, verdict = known.sent, known.verdict
        seconds = known.at - max(sent.since, self._known_at)
        self._known_at = known.at
        progress.seconds += seconds
        logged = self._is_logged(sent.step, progress.total_steps)
        if verdict.why or logged:
            parts = sent.parts.numbers() if logged else {}
            metrics.write(sent.step, self._numbers(known, seconds, progress.seconds) | parts | verdict.numbers())
        if verdict.why and (verdict.why != "overflow" or verdict.stop):
            self._report(progress, known)

    def _is_logged(self, step: int, total_steps: int) -> bool:
        return step % self.config.log.every == 0 or step == total_steps

    def _backward(
        self, micro_batches: Sequence[MicroBatch], counts: Mapping[str, float], parts: Parts | None = None
    ) -> Tensor:
        """The gradient of the global batch (`counts`: over all ranks); returns this rank's share of its loss."""
        self.engine.model.train()
        by = divisors(counts)
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches, start=1):
            tensors = batch.tensors(self.device)

            def share(tensors: dict[str, Tensor] = tensors) -> Tensor:
                with self.slow_ranks.computing():
                    output = self.engine.model(**tensors, **by)
                if parts is not None:
                    parts.add(output)
                loss: Tensor = output.loss
                return loss

            total += self.engine.backward(share, last=number == len(micro_batches))
        return total

    def _report(self, progress: Progress, known: Known) -> None:
        """Name the rows of a step that the guard found fault with: a line here, and one in `skipped.jsonl`.

        Raises:
            NonFiniteError, SpikeError: when the run ends here.
        """
        own = [row for batch in known.sent.micro_batches for row in batch.row_ids.tolist()]
        step, verdict, rows = known.sent.step, known.verdict, [row for rows in self.ranks.gather(own) for row in rows]
        found = {"why": verdict.why, "skipped": not verdict.update, "loss": known.loss, "grad_norm": known.norm}
        if self.ranks.main:
            with suppress(OSError), closing(JsonLines(self.directory / "skipped.jsonl", first_step=step - 1)) as record:
                record.write(step, found | {"rows": rows})  # a full disk must not end the training
        line = message(step, verdict, rows, f"pretrain inspect {self.directory / 'config.yaml'} --step {step}")
        if verdict.stop:
            raise error(verdict, line, progress.guard.in_a_row, self._next_call(progress))
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _next_call(self, progress: Progress) -> str:
        """From where the next call goes on, when this one ends with an error."""
        self.heartbeat.beat(progress.step, "save")  # one in flight may take longer than a step may
        self.saver.close()
        try:
            whole = self.saver.place.steps(progress.run_id)
            where = f"checkpoint step-{whole[-1]:08d}" if whole else "step 0: nothing is saved yet"
        except OSError:
            where = f"the newest checkpoint in {self.saver.place.name}"
        return f"The next call goes on from {where}."

    def _numbers(self, known: Known, seconds: float, seconds_of_run: float) -> dict[str, float]:
        sent = known.sent
        rate = sent.text_tokens / seconds
        numbers = {
            "loss": known.loss,
            "grad_norm": known.norm,
            "lr": self.base_lrs[0] * sent.scale,
            "tokens": sent.tokens,
            "seconds": seconds_of_run,
            "tokens_per_second": rate,
            "data_wait": min(1.0, sent.waited / seconds),
            "memory_gib": peak_memory_bytes(self.device) / 2**30,
        }
        peak = peak_flops(self.device, self.job.precision)
        if peak is not None and self.flops_per_token is not None:
            numbers["mfu"] = rate * self.flops_per_token / (peak * self.ranks.world)
        return numbers

    def _set_learning_rate(self, scale: float) -> None:
        for group, base in zip(self.engine.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * scale

    # --- data -------------------------------------------------------------------------------------------------------

    @property
    def split(self) -> str:
        """The engine, the processes and the kind of device, in words."""
        return f"{self.engine.name} x{self.ranks.world} on {self.device.type}"

    @property
    def feed(self) -> Feed:
        """The micro-batches of this process."""
        return Feed(self.data, self.config.rows_per_batch, self.micro_batch, self.ranks)

    # --- the budget -------------------------------------------------------------------------------------------------

    def _total_steps(self) -> int:
        """Steps of the whole run. A budget of time is measured once, fixed as steps, and written down."""
        train = self.config.train
        if train.minutes is None and train.hours is None:
            return steps_of(self.config, self.data.num_rows, None)
        record = self.directory / "budget.json"
        known: int | None = self.ranks.on_main(lambda: fixed_steps(self.config, self.directory))
        if known is not None:
            return known
        seconds_per_step = self.measure_step()
        steps = steps_of(self.config, self.data.num_rows, seconds_per_step)
        fixed = {
            "minutes": budget_minutes(self.config),
            "seconds_per_step": seconds_per_step,
            "steps": steps,
            "batch_tokens": self.config.tokens_per_step,
            "tokens": steps * self.config.tokens_per_step,
        }
        if self.ranks.main:
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
        rng, scaler = checkpoint.capture_rng(), self.engine.scaler_state()
        self._set_learning_rate(0.0)
        times: list[float] = []
        feed = self.feed
        while self.ranks.broadcast(len(times) < 3 or (sum(times) < _PROBE_SECONDS and len(times) < 50)):
            started = time.perf_counter()
            micro_batches = feed.micro_batches(len(times))
            own = counts_of(micro_batches)
            self._backward(micro_batches, dict(zip(own, self.ranks.sum(list(own.values())), strict=True)))
            self.engine.update(self.config.train.max_grad_norm, math.isfinite)
            times.append(time.perf_counter() - started)
        self.engine.clear_state()
        self.engine.load_scaler_state(scaler)
        checkpoint.restore_rng(rng)
        seconds: float = self.ranks.broadcast(statistics.median(times[1:]))
        return seconds

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self, progress: Progress, metrics: Metrics, stop: AgreedStop) -> None:
        """Run every evaluator; scores go to the sinks as `name/score`. A stop signal may end it without any."""
        self._drain(progress, metrics)
        self.engine.model.eval()

        def stopping() -> bool:
            self.heartbeat.beat(progress.step, "evaluate")
            return stop.look()

        self.heartbeat.beat(progress.step, "evaluate")
        about = (progress.step, self.device, self.config, self.directory)
        context = EvaluationContext(*about, stopping, self.ranks, progress.total_steps)
        rng = checkpoint.capture_rng()
        scores: dict[str, float] = {}
        try:
            with torch.no_grad():
                for name, evaluator in self.evaluators.items():
                    for score, value in evaluator(self.engine.readable, context).items():
                        scores[f"{name}/{score}"] = float(value)
        except EvaluationStopped:
            return
        finally:
            checkpoint.restore_rng(rng)
            self.engine.evaluated()
        progress.scores, progress.scored_at = self.ranks.broadcast(scores), progress.step
        if progress.step == 0:
            progress.first_scores = progress.scores
        if progress.scores:
            metrics.write(progress.step, progress.scores)

    def _judged(self, progress: Progress) -> float | None:
        """The number that decides what is best; None when this step has none."""
        return self.judge(progress.scores) if progress.scored_at == progress.step else None

    def _mean_loss(self, scores: Mapping[str, float]) -> float | None:
        """The mean loss over the validation sets; None without any."""
        known = [loss for loss in (scores.get(f"{name}/loss") for name in self.judges) if loss is not None]
        return statistics.fmean(known) if known else None

    def _open_metrics(self, progress: Progress) -> Metrics:
        log = self.config.log
        return open_metrics(
            log.to if self.ranks.main else (),
            project=log.project,
            name=self.config.name,
            run_id=progress.run_id,
            directory=self.directory,
            config=config_to_dict(self.config),
            first_step=progress.step,
            total_steps=progress.total_steps,
            console=self.console,
            scored=progress.scored_at == progress.step,
        )
