"""A full disk, and one that is too small from the start: rows 3 and 4, on real file systems of some megabytes.

What lives here: the small file systems, and what must hold on them. What must not: other faults of saving (`saving`).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny
from outcome import Outcome
from trial import CHECKPOINT, EVERY, SECTIONS, STEPS, TRAIN, Tally, against, not_run, repeated, spread, whole
from warm import Warm


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[str]:
    """A file system of `size` bytes at `place`; gives the reason when it cannot be had."""
    place.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        yield f"no small file system can be mounted here ({made.stderr.strip()[:80]})"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _with_ballast(folder: Path, **sections: Mapping[str, Any]) -> tiny.Run:
    return tiny.make(
        folder,
        **{**SECTIONS, **sections, "evaluate": {"every": EVERY, "max_tokens": 512, "evaluators": ["ballast:fill"]}},
    )


def disk_full(folder: Path) -> Outcome:
    """Fill the disk in the save of step 4 so that each file of it in turn is the first that does not fit."""
    oracle = _oracle_with_ballast(folder)
    sizes = _sizes(folder / "oracle-run" / "runs" / "tiny" / "train" / "checkpoints" / f"step-{STEPS:08d}")
    tally = Tally()
    room = [(name, sum(size for _, size in sizes[:number])) for number, (name, _) in enumerate(sizes)]
    room.append(("latest.json", sum(size for _, size in sizes)))
    with Warm() as warm:
        for name, free in room:
            disk = folder / "disk"
            with small_disk(disk, 64 << 20) as why:
                if why:
                    return not_run(why)
                run = _with_ballast(disk)
                environment = {"BALLAST_FROM": "4", "BALLAST_UNTIL": "6", "BALLAST_FREE": str(free)}
                ended = warm.execute([TRAIN, str(run.config)], environment=environment)
                tally.add(_after_full_disk(run, oracle, ended, name))
    names = f"{len(room)} places: {', '.join(name for name, _ in room)}"
    return tally.outcome(f"real ENOSPC on a tmpfs, on_error=keep-going, in {names}", lost="nothing: training went on")


def _after_full_disk(run: tiny.Run, oracle: tiny.Trace, ended: tiny.Ended, name: str) -> str:
    if ended.code:
        return f"{name}: exit {ended.code}: {ended.output[-300:]}"
    said = [line for line in ended.output.splitlines() if "No space left" in line]
    if len(said) != 1:
        return f"{name}: {len(said)} lines name the full disk: {ended.output[-300:]}"
    if name != "latest.json" and not ("KiB" in said[0] and "step-00000002" in said[0] and "checkpoint.keep" in said[0]):
        return f"{name}: the message lacks numbers or remedy: {said[0]}"
    if whole(run)[-1:] != [STEPS]:
        return f"{name}: whole at the end: {whole(run)}"
    wrong = against(run, oracle)
    return f"{name}: {wrong}" if wrong else ""


def _oracle_with_ballast(folder: Path) -> tiny.Trace:
    run = _with_ballast(folder / "oracle-run")
    ended = tiny.execute(
        tiny.command(run, recorded=True),
        environment={
            "BALLAST_FROM": "-1",
            "BALLAST_UNTIL": "100",
            "PYTHONPATH": f"{tiny.ROOT}{os.pathsep}{Path(__file__).parent}",
        },
    )
    assert ended.code == 0, ended.output
    return tiny.trace(run)


def _sizes(directory: Path) -> list[tuple[str, int]]:
    """Files of a checkpoint in the order they were written, and the disk's blocks that each takes."""
    files = sorted((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    return [(path.relative_to(directory).as_posix(), -(-path.stat().st_size // 4096) * 4096) for path in files]


def disk_full_at_the_end(folder: Path) -> Outcome:
    """The last save of a process on a full disk: by on_error=stop, at the end of the run, after a stop signal."""
    oracle = _oracle_with_ballast(folder)
    stop = {"checkpoint": {**CHECKPOINT, "on_error": "stop"}}
    full = {"BALLAST_FROM": "4", "BALLAST_UNTIL": "100", "BALLAST_FREE": "20000"}
    cases: list[tuple[str, dict[str, Any], dict[str, str], bool]] = [
        ("room comes back", stop, {**full, "BALLAST_SECONDS": "3"}, True),
        ("on_error=stop", stop, full, False),
        ("end of the run", {}, {**full, "BALLAST_FROM": "6"}, False),
        ("SIGTERM", {}, {**full, "BALLAST_SIGNAL": "SIGTERM"}, False),
    ]
    tally, refused = Tally(), []

    def work(warm: Warm, share: Sequence[tuple[str, dict[str, Any], dict[str, str], bool]]) -> None:
        for name, sections, environment, saved in share:
            place = folder / name.replace(" ", "-")
            with small_disk(place, 64 << 20) as why:
                if why:
                    refused.append(why)
                    continue
                run = _with_ballast(place, **sections)
                ended = warm.execute([TRAIN, str(run.config)], environment=environment)
                (run.directory / "ballast").unlink(missing_ok=True)
                wrong = _after_last_save(warm, run, oracle, ended, saved=saved)
                tally.add(f"{name}: {wrong}" if wrong else "", repeated=repeated(run))

    spread(cases, work)
    if refused:
        return not_run(refused[0])
    return tally.outcome(
        "room that comes back; on_error=stop, the end of the run, SIGTERM: an error after 30 s of tries"
    )


def _after_last_save(warm: Warm, run: tiny.Run, oracle: tiny.Trace, ended: tiny.Ended, *, saved: bool) -> str:
    if saved != (ended.code == 0):
        return f"exit {ended.code}: {ended.output[-300:]}"
    if not saved and not ("are lost" in ended.output and "run the same command again" in ended.output):
        return f"not said what is lost: {ended.output[-300:]}"
    if not saved and not whole(run):
        return "no whole checkpoint"
    again = warm.execute([TRAIN, str(run.config)], environment={"BALLAST_FROM": "-1", "BALLAST_UNTIL": "100"})
    return against(run, oracle) if again.code == 0 else f"exit {again.code}: {again.output[-300:]}"


def too_small_a_disk(folder: Path) -> Outcome:
    """Disks between one checkpoint and what must lie there together, at the start and when a run goes on."""
    tally = Tally()
    with Warm() as warm:
        for free in (10_000, 100_000, 250_000, 600_000):
            with small_disk(folder / "disk", 64 << 20) as why:
                if why:
                    return not_run(why)
                run = tiny.make(folder / "disk", **SECTIONS)
                ballast = folder / "disk" / "ballast"
                status = os.statvfs(folder / "disk")
                # the packing plans are made at the start and lie there too
                ballast.write_bytes(bytes(max(0, status.f_bavail * status.f_frsize - free - 40_000)))
                ended = warm.execute([TRAIN, str(run.config)])
                said = " ".join(ended.output.split())
                refused = ended.code != 0 and "the checkpoints need" in said and "checkpoint.keep" in said
                trained = (run.directory / "rows.jsonl").exists()
                wrong = "" if refused and not trained else f"exit {ended.code}: {said[-300:]}"
                if not wrong:
                    ballast.unlink()
                    wrong = "" if warm.execute([TRAIN, str(run.config)]).code == 0 else "did not start with room"
                tally.add(f"{free} bytes free: {wrong}" if wrong else "")
    return tally.outcome("10 kB to 600 kB free; refused before step 1 with what is needed, free and missing", lost="-")
