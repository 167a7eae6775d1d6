"""What was bad in the text of a run: by file and by kind, and whether it is too much.

What lives here: adding up the reports of all parts, and the ceiling `data.max_bad_share`. What must not: reading text,
but to tell what a file with many bad lines is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.data.reading.encodings import what_it_is
from pretrain.data.reading.lines import ReadReport
from pretrain.data.reading.sources import SourceFile

FEWEST_LINES = 100
"""Lines or rows of a file that is judged by itself; smaller ones are judged together, as the whole run."""
_FILES_NAMED = 20


def no_problems() -> dict[str, Any]:
    """The counts of a file of which nothing was read."""
    return {"bad": 0, "empty": 0, "good": 0, "by_kind": {}}


def add_problems(total: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add counts of a part of a file to those of the file."""
    for key in ("bad", "empty", "good"):
        total[key] += more.get(key, 0)
    for kind, count in more.get("by_kind", {}).items():
        total["by_kind"][kind] = total["by_kind"].get(kind, 0) + count


def counts_of(report: ReadReport) -> dict[str, Any]:
    """The counts of a report, as plain data."""
    return {"bad": report.bad, "empty": report.empty, "good": report.good, "by_kind": dict(report.by_kind)}


def problem_facts(files: Sequence[Mapping[str, Any]], named: list[str]) -> dict[str, Any]:
    """For the manifest: how many lines or rows were bad, the first by name, and counts by kind and by file (the worst).

    The counts of all files stand in `files.jsonl`.
    """
    kinds = no_problems()
    for file in files:
        add_problems(kinds, file)
    worst = sorted((file for file in files if file["bad"]), key=lambda file: -file["bad"])[:_FILES_NAMED]
    return {
        "count": kinds["bad"],
        "named": named,
        "by_kind": dict(sorted(kinds["by_kind"].items())),
        "by_file": {file["name"]: file["bad"] for file in worst},
        "share": round(_share(kinds["bad"], sum(map(_good, files))), 6),
    }


def describe_problems(facts: Mapping[str, Any]) -> str:
    """The facts in a line, for people."""
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in facts["by_kind"].items())
    return (
        f"left out {facts['count']:,} bad lines or rows ({facts['share']:.2%}; {kinds}) of {len(facts['by_file']):,} "
        f"files; the first: {facts['named'][0]}"
    )


def refuse_bad(
    files: Sequence[Mapping[str, Any]], named: Sequence[str], most: float, sources: Sequence[SourceFile]
) -> None:
    """Refuse text of which too much is bad: over the whole run, or of one file with at least a hundred lines.

    Text without anything good has an error of its own.

    Args:
        files: counts of each input file, with its name.
        named: the first bad lines.
        most: the largest share that may be bad, of all that is bad or good.
        sources: the input files, to look again into the worst.

    Raises:
        ValueError: names the files, the counts and the first bad lines, and the remedy.
    """
    bad, good = sum(file["bad"] for file in files), sum(map(_good, files))
    if not good:
        return
    judged = [file for file in files if file["bad"] + _good(file) >= FEWEST_LINES]
    worst = max(judged, key=lambda file: _share(file["bad"], _good(file)), default=None)
    if worst is not None and _share(worst["bad"], _good(worst)) > most:
        what = f"of `{worst['name']}` {_of(worst['bad'], _good(worst))} are bad"
    elif _share(bad, good) > most:
        worst = max(files, key=lambda file: file["bad"])
        what = f"{_of(bad, good)} of the text are bad"
    else:
        return
    first = [name for name in named if name.startswith(f"{worst['name']}:")] or list(named)
    lines = "".join(f"\n  {name}" for name in first[:5])
    path = next((file for file in sources if file.name == worst["name"]), None)
    guess = what_it_is(path) if path is not None and worst["by_kind"].get("encoding", 0) * 2 > worst["bad"] else None
    raise ValueError(
        f"data.max_bad_share: {what}, more than {most:g}; the first:{lines}\n"
        + (f"{guess}\n" if guess else "")
        + "Mend the text, or allow more with data.max_bad_share; what is already prepared is kept."
    )


def _good(file: Mapping[str, Any]) -> int:
    """Good lines or rows; of ready ids, which have none, documents."""
    documents = sum(int(split["documents"]) for split in file["splits"].values())
    return max(int(file["good"]), documents)


def _share(bad: int, good: int) -> float:
    return bad / max(1, bad + good)


def _of(bad: int, good: int) -> str:
    return f"{bad:,} of {bad + good:,} lines or rows ({_share(bad, good):.1%})"
