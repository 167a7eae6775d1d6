"""Two real processes, one of them injured (ranks_job.py): all skip alike, copies are compared, the slow one named."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks_job import OneBadRow, found_of, make

JOB = Path(__file__).with_name("ranks_job.py")
ROOT = JOB.parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"
)


def job(tmp_path: Path, *scenarios: str) -> dict[str, list[dict[str, Any]]]:
    """What both ranks found, by scenario."""
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(JOB)]
    places = [ROOT, ROOT / "scripts", JOB.parent]
    ended = subprocess.run(
        [*command, str(out), str(tmp_path), *scenarios],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, places))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, list[dict[str, Any]]] = json.loads(out.read_text())
    return found


def one_process(folder: Path, optimizer: str) -> dict[str, Any]:
    made = make(folder, OneBadRow(), optimizer={"name": optimizer, "lr": 0.01})
    made.train()
    return found_of(made)


def check_skips(found: list[dict[str, Any]], tmp_path: Path) -> None:
    """All ranks skipped the one step, named the rows of all of them, and went on as one process does."""
    alone: dict[str, dict[str, Any]] = {}
    for name in found[0]:
        here, there = found[0][name], found[1][name]
        assert here["finite"], name
        assert here["weights"] == there["weights"], name
        assert [step for step, _, skipped in here["logged"] if skipped] == [3], name
        assert here["logged"][2][1] == "nan", name
        (entry,) = here["skipped"]
        assert (entry["step"], entry["rows"], entry["skipped"]) == (3, list(range(16, 24)), True), name
        assert not math.isfinite(entry["grad_norm"]), name
        if (twin := name.replace("late", "at once")) in found[0]:  # bit for bit, whichever way the verdict came
            assert here["weights"] == found[0][twin]["weights"], name
            assert here["logged"] == found[0][twin]["logged"], name
        optimizer = name.split()[1]
        if optimizer not in alone:
            alone[optimizer] = one_process(tmp_path / "alone" / optimizer, optimizer)
        losses, expected = ([float(loss) for _, loss, _ in one["logged"]] for one in (here, alone[optimizer]))
        assert losses == pytest.approx(expected, rel=1e-5, nan_ok=True), name


def test_two_ranks_agree(tmp_path: Path) -> None:
    """One job, since its start is what it costs: about 10 s."""
    found = job(tmp_path, "not_finite", "replicas", "slow")
    check_skips(found["not_finite"], tmp_path)
    for here, there in zip(*(rank.items() for rank in found["replicas"]), strict=True):
        assert here == there
        name, (error, saved) = here[0], here[1].values()
        if name.startswith("none"):
            assert (error, len(saved)) == ("", 4), name
            continue
        first = "embed.weight" if name == "flip" else "norm.weight"
        # It came at step 5; the save of step 6 looks before it writes, so that no checkpoint holds what differs.
        assert error.startswith("step 6: ranks 0 ("), error
        assert "it cannot be told which of them is right" in error
        assert f"`{first}` is the first tensor that differs. They were the same after step 4. The next call" in error
        assert saved == ["step-00000003"], name
        assert "goes on from checkpoint step-00000003" in error
    slow = found["slow"]
    assert "rank 1 (" in slow[0]["forward"]["said"]
    assert "keeps the others waiting in forward" in slow[0]["forward"]["said"]
    assert "rank 1 (" in slow[0]["data"]["said"]
    assert "keeps the others waiting in data" in slow[0]["data"]["said"]
    assert "rank 0 (" not in slow[0]["forward"]["said"] + slow[0]["data"]["said"]
    assert [entry["said"] for entry in slow[1].values()] == ["", ""]  # one process speaks for all


@pytest.mark.slow
def test_every_optimizer_and_engine_agrees(tmp_path: Path) -> None:
    found = job(tmp_path, "not_finite_more", "stop")
    check_skips(found["not_finite_more"], tmp_path)
    ends = [entry for rank in found["stop"] for entry in rank.values()]
    assert len(ends) == 4
    for entry in ends:
        assert "step 3: loss nan, gradient norm nan; the update was not made; rows 16, 17, 18" in entry["error"]
        assert entry["weights"] == ends[0]["weights"]
        assert entry["logged"] == ends[0]["logged"]
        assert entry["finite"]
