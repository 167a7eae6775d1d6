"""A preparation under way: what is finished, how far the rest is, and the artifact at the end.

What lives here: the directory `data.unfinished` and its files. What must not: the work on a part.

    plan.json        the plan; another one makes the rest worthless
    parts/NAME.json  the mark of a finished part, with the digests of its shards
    progress         an int64 a part, mapped by all processes
    data/            what becomes the artifact
"""

from __future__ import annotations

import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.parts import Part, Plan, is_training
from pretrain.data.shards import INDEX_SUFFIX, TOKENS_SUFFIX, UNFINISHED_SUFFIX
from pretrain.data.vocabulary import SpecialIds
from pretrain.files import MANIFEST, Manifest, replace_file, sha256_file, write_manifest

NAMED_PROBLEMS = 20


def start_or_go_on(work: Path, plan: Plan) -> None:
    """Keep what an earlier call finished under the same plan; remove what it did under another."""
    path = work / "plan.json"
    if path.is_file():
        try:
            if Plan.from_json(json.loads(path.read_text(encoding="utf-8"))).digest == plan.digest:
                _remove_leftovers(work)
                return
        except (json.JSONDecodeError, TypeError, KeyError):
            pass  # cut off, or of another version: worth nothing
    if work.exists():
        shutil.rmtree(work)
    for folder in ("data", "parts"):
        (work / folder).mkdir(parents=True)
    replace_file(path, json.dumps(plan.to_json()).encode())


def _remove_leftovers(work: Path) -> None:
    """Remove shards that a killed worker left half written."""
    for path in (work / "data").rglob(f"*{UNFINISHED_SUFFIX}"):
        path.unlink(missing_ok=True)


def marker(work: Path, part: Part) -> Path:
    """Where the mark of a finished part lies."""
    return work / "parts" / f"{part.name}.json"


def is_finished(work: Path, part: Part) -> bool:
    """Whether the part is marked as finished and its shards are what the mark says, byte for byte."""
    path = marker(work, part)
    if not path.is_file():
        return False
    for shard in json.loads(path.read_text(encoding="utf-8"))["shards"]:
        for suffix, digest in ((TOKENS_SUFFIX, shard["digest"]), (INDEX_SUFFIX, shard["index_digest"])):
            file = work / "data" / (shard["name"] + suffix)
            if not file.is_file() or sha256_file(file) != digest:
                return False
    return True


def open_progress(work: Path) -> npt.NDArray[np.int64]:
    """How far each part is, shared by all processes through a mapped file."""
    return np.memmap(work / "progress", dtype=np.int64, mode="r+")


def start_progress(work: Path, plan: Plan, finished: set[int]) -> npt.NDArray[np.int64]:
    """Set the finished parts to their whole weight, the others to nothing."""
    done = [part.weight if number in finished else 0 for number, part in enumerate(plan.parts)]
    np.array(done, dtype=np.int64).tofile(work / "progress")
    return open_progress(work)


# --- the artifact ---------------------------------------------------------------------------------------------------


def finish(work: Path, plan: Plan, vocabulary: SpecialIds, *, config: dict[str, Any], seen: dict[str, str]) -> Manifest:
    """Check the splits and write the manifest, and a line for each input file in `files.jsonl`.

    Args:
        work: the directory of the preparation, all its parts finished.
        plan: its plan.
        vocabulary: of the tokenizer.
        config: the keys that decided the shards.
        seen: size and time of each input, to tell quickly that it did not change.

    Raises:
        ValueError: when a split has no tokens; names the key.
    """
    marks = [json.loads(marker(work, part).read_text(encoding="utf-8")) for part in plan.parts]
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in plan.splits()}
    for mark in marks:
        for shard in mark["shards"]:
            shards[shard["name"].partition("/")[0]].append(shard)
    files = _files(plan, marks)
    named = list(chain.from_iterable(mark["bad"] for mark in marks))[:NAMED_PROBLEMS]
    _refuse_empty(shards, named)
    data = work / "data"
    digests = {
        shard["name"] + suffix: shard[key]
        for shard in chain.from_iterable(shards.values())
        for suffix, key in ((TOKENS_SUFFIX, "digest"), (INDEX_SUFFIX, "index_digest"))
    }
    lines = "".join(json.dumps(file, ensure_ascii=False) + "\n" for file in files)
    replace_file(data / "files.jsonl", lines.encode())
    _remove_leftovers(work)
    (data / MANIFEST).unlink(missing_ok=True)
    return write_manifest(
        data,
        kind="data",
        config=config,
        inputs={**plan.inputs(), "tokenizer": plan.tokenizer_digest},
        files=digests,
        facts={
            "tokenizer": vocabulary.facts(),
            "splits": {split: _split_facts(some) for split, some in shards.items()},
            "parts": len(plan.parts),
            "bad": {"count": sum(file["bad"] for file in files), "named": named},
            "empty": sum(file["empty"] for file in files),
            "inputs_seen": seen,
        },
    )


def _split_facts(shards: list[dict[str, Any]]) -> dict[str, Any]:
    totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")}
    return {**totals, "shards": shards}


def _files(plan: Plan, marks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What became of each input file, over all its parts."""
    files: dict[str, dict[str, Any]] = {
        file.name: {"name": file.name, "sha256": digest, "bad": 0, "empty": 0, "splits": {}}
        for file, digest in zip(plan.files, plan.digests, strict=True)
    }
    for mark in marks:
        for name, counts in mark["files"].items():
            files[name]["bad"] += counts["bad"]
            files[name]["empty"] += counts["empty"]
            for split, part in counts["splits"].items():
                total = files[name]["splits"].setdefault(split, dict.fromkeys(part, 0))
                for key, value in part.items():
                    total[key] += value
    return list(files.values())


def _refuse_empty(shards: dict[str, list[dict[str, Any]]], named: list[str]) -> None:
    """Raise ValueError when a split has no tokens."""
    tokens = {split: sum(shard["tokens"] for shard in some) for split, some in shards.items()}
    if not any(tokens.values()):
        first = f"; the first problem: {named[0]}" if named else ""
        raise ValueError(f"data.train gave no tokens at all{first}")
    for split, count in tokens.items():
        if not count and is_training(split):
            raise ValueError(
                f"data.validation: nothing is left to train on in `{split}`; hold out less, or give validation files"
            )
        if not count:
            documents = sum(shard["documents"] for some in shards.values() for shard in some)
            raise ValueError(
                f"data.validation: split `{split}` is empty (of {documents} documents none is held out); hold out a "
                "larger fraction, use {tail: 0.1}, name validation files, or cut the text into more documents "
                "with data.document"
            )
