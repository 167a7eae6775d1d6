"""Who works on the parts: datatrove's executors over our pipeline.

What lives here: how parts are handed to processes or machines. What must not: what is done with a part.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.utils.logging import logger as datatrove_logger

from pretrain.data.parts import Plan
from pretrain.data.pipeline import ReadPart, WriteShards


def run_parts(work: Path, plan: Plan, finished: list[int], cores: int) -> None:
    """Work on the parts that are not finished.

    Args:
        work: the directory of the preparation.
        plan: its plan; rank r works on part r.
        finished: numbers of the parts that are.
        cores: to use on this machine, for processes and the tokenizer's threads.
    """
    executor = _Executor(work, plan, finished, cores)
    with _without_main_module():
        datatrove_logger.disable("datatrove")
        try:
            executor.run()
        finally:
            datatrove_logger.enable("datatrove")


class _Executor(LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's local executor, quiet, with the cores shared out between processes and the tokenizer's threads."""

    def __init__(self, work: Path, plan: Plan, finished: list[int], cores: int) -> None:
        steps = [ReadPart(work, plan), WriteShards(work, plan)]
        processes = min(cores, len(plan.parts) - len(finished))
        super().__init__(steps, tasks=len(plan.parts), workers=processes, logging_dir=str(work / "logs"))
        self.threads = cores // processes
        for number in finished:  # by our own marks and digests; what datatrove noted of an earlier run was removed
            self.mark_rank_as_completed(number)

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        datatrove_logger.disable("datatrove")
        with _environment(
            TOKENIZERS_PARALLELISM="true" if self.threads > 1 else "false", RAYON_NUM_THREADS=str(self.threads)
        ):
            return super()._run_for_rank(rank, local_rank, node_rank)


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
