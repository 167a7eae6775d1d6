"""A part that is missing on a machine skips by name; with PRETRAIN_REQUIRE=all, as CI sets, a skip is a failure."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Generator
from typing import Any

import pytest

from tests.interrupted import PRELOADED


def pytest_configure(config: pytest.Config) -> None:
    """A process has one fork server, started by whichever test needs it first: let it hold what later ones fork."""
    multiprocessing.set_forkserver_preload(PRELOADED)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Turn a skip into a failure where everything is required; what needs a GPU is excused."""
    report = (yield).get_result()
    required = os.environ.get("PRETRAIN_REQUIRE") == "all" and item.get_closest_marker("gpu") is None
    if required and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"PRETRAIN_REQUIRE=all, but this was skipped: {reason}"


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, None]:
    """The same for a file that is left out whole, because a library that it tries is not installed."""
    report = (yield).get_result()
    if os.environ.get("PRETRAIN_REQUIRE") == "all" and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"PRETRAIN_REQUIRE=all, but this file was skipped: {report.longrepr[2]}"
