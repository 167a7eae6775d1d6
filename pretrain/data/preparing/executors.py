"""Who works on the parts: this machine, or a cluster, through datatrove's executors over our pipeline.

What lives here: how parts are handed to processes or machines. What must not: what is done with a part.

On this machine datatrove's executor runs each part, in worker processes of our own: its pool waits for ever for a
worker that the system killed, and leaves processes behind when its parent is killed. Ours are watched, and each of
them watches its parent. On Slurm an array job is submitted, and the call ends with `SubmittedError`; the same command
collects the result later, as the marks of finished parts say what is done. On Ray the call waits for the result.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.utils.logging import logger as datatrove_logger

from pretrain.config_data import Executor
from pretrain.data.keeping.filters import check_arguments
from pretrain.data.preparing.parts import Plan
from pretrain.data.preparing.passes import Pass, steps_of
from pretrain.data.preparing.submitted import SubmittedError
from pretrain.data.preparing.unfinished import read_plan
from pretrain.data.reading.lines import Policy
from pretrain.files import replace_file

KEY = "data.executor.options"
SUBMITTED = "submitted.json"
_KINDS: dict[str, type[PipelineExecutor]] = {"slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}
_OURS = ("self", "pipeline", "tasks", "logging_dir", "skip_completed", "depends", "job_id_retriever")


def check_executor(wanted: Executor) -> None:
    """Refuse what cannot work before any text is read.

    Raises:
        ValueError: for options that datatrove's executor does not have or that are missing, a cluster whose commands or
            package are not on this machine; names the key.
    """
    if wanted.kind == "local":
        if wanted.options:
            name = next(iter(wanted.options))
            raise ValueError(f"{KEY}: `{name}` has no effect on this machine; set data.workers, or remove it")
        return
    kind = _KINDS[wanted.kind]
    signature = {name: parameter for name, parameter in inspect.signature(kind).parameters.items() if name not in _OURS}
    check_arguments(kind, signature, wanted.options, KEY)
    missing = [name for name, one in signature.items() if one.default is one.empty and name not in wanted.options]
    if missing:
        raise ValueError(f"{KEY}: `{missing[0]}` is missing; {wanted.kind} needs {', '.join(missing)}")
    if wanted.kind == "slurm" and shutil.which("sbatch") is None:
        raise ValueError("data.executor: slurm needs the command `sbatch`, which is not here; run this on a login node")
    if wanted.kind == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError("data.executor: ray is not installed; install it with: pip install 'ray[default]'")


def run_parts(work: Path, plan: Plan, one: Pass, finished: list[int], cores: int, wanted: Executor) -> None:
    """Work on the parts that are not finished in a pass.

    Args:
        work: the directory of the preparation.
        plan: its plan; rank r works on part r.
        one: the pass.
        finished: numbers of the parts that are finished.
        cores: to use on this machine, for processes and the tokenizer's threads.
        wanted: the executor of the configuration.

    Raises:
        SubmittedError: when the work was handed to Slurm.
        ChildProcessError: when a worker was killed; names the part and the remedy.
    """
    datatrove_logger.disable("datatrove")
    try:
        if one.here or wanted.kind == "local":
            _run_here(work, plan, one, finished, cores)
        elif wanted.kind == "ray":
            _run_on_ray(work, plan, one, finished, wanted)
        else:
            _submit(work, plan, one, finished, wanted)
    finally:
        datatrove_logger.enable("datatrove")


# --- this machine ---------------------------------------------------------------------------------------------------


class _Executor(LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's local executor, for one part at a time, quiet."""

    def __init__(self, work: Path, plan: Plan, pass_name: str) -> None:
        steps = steps_of(pass_name, work, plan)
        super().__init__(steps, tasks=len(plan.parts), workers=1, logging_dir=str(work / "logs"))

    def run_part(self, number: int) -> None:
        """Work on one part."""
        datatrove_logger.disable("datatrove")
        self._run_for_rank(number)


def _run_here(work: Path, plan: Plan, one: Pass, finished: list[int], cores: int) -> None:
    """Work on the parts in processes of this machine; the cores are shared out between them and their threads."""
    shutil.rmtree(work / "logs", ignore_errors=True)  # what datatrove noted; our own marks say what is finished
    done = set(finished)
    left = [number for number in range(len(plan.parts)) if number not in done]
    processes = min(cores, len(left))
    threads = str(cores // processes)
    with _environment(TOKENIZERS_PARALLELISM="true" if threads != "1" else "false", RAYON_NUM_THREADS=threads):
        if processes > 1:
            _run_in_processes(work, plan, one, left, processes)
            return
        for number in left:
            _Executor(work, plan, one.name).run_part(number)


def _run_in_processes(work: Path, plan: Plan, one: Pass, left: list[int], processes: int) -> None:
    context = multiprocessing.get_context("forkserver")
    workers: dict[Connection, BaseProcess] = {}
    working: dict[Connection, int] = {}
    waiting = iter(left)
    try:
        with _without_main_module():
            for _ in range(processes):
                ours, theirs = context.Pipe()
                worker: BaseProcess = context.Process(
                    target=_serve, args=(theirs, str(work), one.name, plan.on_error, _environment_now())
                )
                worker.start()
                theirs.close()
                workers[ours] = worker
        for connection in workers:
            working[connection] = next(waiting)
            _send(connection, working[connection])
        while working:
            for connection in _readable(working):
                number = working.pop(connection)
                _receive(connection, workers[connection], plan.parts[number].name)
                if (following := next(waiting, None)) is not None:
                    working[connection] = following
                    _send(connection, following)
    finally:
        for connection, worker in workers.items():
            connection.close()
            worker.kill()  # idle, or of no use any more: what it writes appears whole or not at all
            worker.join()


def _readable(working: dict[Connection, int]) -> list[Connection]:
    """Connections with something to read: an answer, or the end that a dead worker leaves."""
    return [connection for connection in wait(list(working)) if isinstance(connection, Connection)]


def _send(connection: Connection, number: int) -> None:
    with suppress(BrokenPipeError):  # the worker is gone, which its answer will say
        connection.send(number)


def _receive(connection: Connection, worker: BaseProcess, part: str) -> None:
    """Take a worker's answer; raise what it raised, or that it is gone."""
    try:
        problem = connection.recv()
    except (EOFError, ConnectionResetError):
        worker.join()
        code = worker.exitcode or 0
        if code < 0:
            name = signal.Signals(-code).name
            raise ChildProcessError(
                f"the worker on part `{part}` was killed by {name}, as the system does when memory runs out; run the "
                "same command again with fewer workers (data.workers=1) or smaller parts (data.part_bytes)"
            ) from None
        raise ChildProcessError(
            f"the worker on part `{part}` failed (exit code {code}); what it said stands above. Finished parts are kept"
        ) from None
    if problem is not None:
        kind, message, trace = problem
        error = OSError(message) if kind == "OSError" else ValueError(message)
        error.add_note(trace)
        raise error


def _serve(connection: Connection, work: str, pass_name: str, on_error: Policy, environment: dict[str, str]) -> None:
    """A worker: takes numbers of parts, answers None, or what was wrong; ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent decides
    threading.Thread(target=_end_with_parent, name="watch", daemon=True).start()
    os.environ.update(environment)
    folder = Path(work)
    plan = replace(read_plan(folder), on_error=on_error)
    while True:
        try:
            number = connection.recv()
        except EOFError:
            return
        try:
            _Executor(folder, plan, pass_name).run_part(number)
        except (OSError, ValueError) as error:
            kind = "OSError" if isinstance(error, OSError) else "ValueError"
            connection.send((kind, str(error), traceback.format_exc()))
            return
        connection.send(None)


def _end_with_parent() -> None:
    """End this process when the one that wants its work is gone, by whatever signal."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _environment_now() -> dict[str, str]:
    return {name: os.environ[name] for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS")}


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Hide the main module while workers start: they import this file, and must not run the caller's script again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# --- clusters -------------------------------------------------------------------------------------------------------


def _cluster_executor(work: Path, plan: Plan, one: Pass, finished: list[int], wanted: Executor) -> Any:
    """datatrove's executor with the options of the configuration; finished parts are marked as it knows them."""
    work = work.resolve()  # other machines find it by its whole path
    executor = _KINDS[wanted.kind](
        pipeline=steps_of(one.name, work, plan),
        tasks=len(plan.parts),
        logging_dir=str(work / "logs"),
        **wanted.options,
    )
    for number in finished:
        executor.mark_rank_as_completed(number)
    return executor


def _run_on_ray(work: Path, plan: Plan, one: Pass, finished: list[int], wanted: Executor) -> None:
    shutil.rmtree(work / "logs", ignore_errors=True)
    ray = importlib.import_module("ray")
    if not ray.is_initialized():
        ray.init()
    _cluster_executor(work, plan, one, finished, wanted).run()


def _submit(work: Path, plan: Plan, one: Pass, finished: list[int], wanted: Executor) -> None:
    """Submit the parts that are left, unless a job on them is still under way."""
    path = work / SUBMITTED
    count = f"{len(finished)} of {len(plan.parts)} parts are finished ({one.title})"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    failed = ""
    if before is not None and before["pass"] == one.name:
        job = before["job"]
        if (state := _job_state(job)) is None:
            raise SubmittedError(
                f"Slurm job {job} may still be under way, and there is no `squeue` here to ask; {count}. Run the same "
                f"command again later, or remove `{path}` to submit the other parts anew"
            )
        if state:
            raise SubmittedError(f"Slurm job {job} is under way ({state}); {count}. Run the same command again later")
        failed = f"job {job} is over, and only {count}: see `{work / f'logs-{job}'}`. So "
    if before is not None:
        shutil.rmtree(work / f"logs-{before['job']}", ignore_errors=True)
        if (work / "logs").is_dir():
            (work / "logs").replace(work / f"logs-{before['job']}")
        path.unlink()
    shutil.rmtree(work / "logs", ignore_errors=True)
    executor = _cluster_executor(work, plan, one, finished, wanted)
    try:
        executor.run()
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"data.executor: `sbatch` refused the job (exit code {error.returncode}); what it said stands above, and "
            f"the script is `{work / 'logs' / 'launch_script.slurm'}`; mend data.executor.options"
        ) from error
    replace_file(path, json.dumps({"job": executor.job_id, "pass": one.name}).encode())
    raise SubmittedError(
        f"{failed}submitted {len(plan.parts) - len(finished)} parts to Slurm as job {executor.job_id} ({one.title}); "
        f"logs are in `{executor.slurm_logs_folder}`. Run the same command again when it is done: it goes on from there"
    )


def _job_state(job: str) -> str | None:
    """What Slurm says of a job: its states, or nothing when it is over; None when it cannot be asked."""
    if shutil.which("squeue") is None:
        return None
    answer = subprocess.run(
        ["squeue", "--noheader", "--format=%T", f"--jobs={job}"], capture_output=True, text=True, check=False
    )
    return ", ".join(sorted(set(answer.stdout.split()))) if answer.returncode == 0 else ""
