"""A preparation under way: what is finished, how far the rest is, and the artifact at the end.

What lives here: the directory `data.unfinished` and its files. What must not: the work on a part.

    plan.json        the plan; another one makes the rest worthless
    parts/NAME.json  the mark of a finished part, with the digests of its shards
    progress         an int64 a part, mapped by all processes
    data/            what becomes the artifact

Where documents are compared with each other or with held-out texts, also

    held_out/NAME.npy      runs of words of a part's held-out documents
    runs.*.npy             those of all parts, and of the evaluation files
    candidates/            shards before deduplication, in the place of data/
    fingerprints/NAME.npy  of the documents in a part's candidates
    goes.npy, repeats.npy  which of them repeat others, and which those are
    kept/NAME.json         the mark of a part whose shards in data/ are without them
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.keeping.kept_out import Counted, Tally, describe, most_removing
from pretrain.data.keeping.sieve import DEDUP, inputs_of, labels_of
from pretrain.data.preparing.parts import Part, Plan, is_training
from pretrain.data.reading.problems import add_problems, no_problems, problem_facts, refuse_bad
from pretrain.data.shards import UNFINISHED_SUFFIX, digests_of
from pretrain.data.vocabulary import SpecialIds
from pretrain.files import MANIFEST, Manifest, replace_file, sha256_file, write_manifest

NAMED_PROBLEMS = 20
RUNS = {"a validation text": "runs.validation.npy", "an evaluation text": "runs.evaluation.npy"}
REMOVED = "removed.jsonl"


def start_or_go_on(work: Path, plan: Plan) -> None:
    """Keep what an earlier call finished under the same plan; remove what it did under another."""
    path = work / "plan.json"
    if path.is_file():
        try:
            if read_plan(work).digest == plan.digest:
                _remove_leftovers(work)
                return
        except (json.JSONDecodeError, TypeError, KeyError):
            pass  # cut off, or of another version: worth nothing
    if work.exists():
        shutil.rmtree(work)
    for folder in ("data", "parts", "kept", "held_out", "fingerprints"):
        (work / folder).mkdir(parents=True)
    replace_file(path, json.dumps(plan.to_json()).encode())


def read_plan(work: Path) -> Plan:
    """The plan that `start_or_go_on` wrote."""
    return Plan.from_json(json.loads((work / "plan.json").read_text(encoding="utf-8")))


def _remove_leftovers(work: Path) -> None:
    """Remove shards that a killed worker left half written."""
    for folder in ("data", "candidates"):
        for path in (work / folder).rglob(f"*{UNFINISHED_SUFFIX}"):
            path.unlink(missing_ok=True)


def marker(work: Path, part: Part, *, kept: bool = False) -> Path:
    """Where the mark of a finished part lies; `kept`: of one that is rid of repeated documents."""
    return work / ("kept" if kept else "parts") / f"{part.name}.json"


def shards_folder(work: Path, plan: Plan) -> Path:
    """Where the shards of a part lie when it is read: what is deduplicated after is not yet data."""
    return work / ("candidates" if DEDUP in plan.steps else "data")


def fingerprints_of(work: Path, part: Part) -> Path:
    """Where the fingerprints of a part's documents lie."""
    return work / "fingerprints" / f"{part.name}.npy"


def held_out_runs_of(work: Path, part: Part) -> Path:
    """Where the runs of words of a part's held-out documents lie."""
    return work / "held_out" / f"{part.name}.npy"


def save_array(path: Path, array: npt.NDArray[Any]) -> str:
    """Write an array, whole or not at all; return the file's SHA-256."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    replace_file(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def load_array(path: Path) -> npt.NDArray[Any]:
    """Map what `save_array` wrote."""
    try:
        mapped: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except ValueError:  # nothing can be mapped of an empty one
        mapped = np.load(path, allow_pickle=False)
    return mapped


def is_finished(work: Path, part: Part, shards: Path, *, kept: bool = False) -> bool:
    """Whether the part is marked as finished and its shards are what the mark says, byte for byte."""
    path = marker(work, part, kept=kept)
    if not path.is_file():
        return False
    mark = json.loads(path.read_text(encoding="utf-8"))
    if not kept and "fingerprints" in mark:
        noted = fingerprints_of(work, part)
        if not noted.is_file() or sha256_file(noted) != mark["fingerprints"]:
            return False
    for shard in mark["shards"]:
        for name, digest in digests_of(shard).items():
            file = shards / name
            if not file.is_file() or sha256_file(file) != digest:
                return False
    return True


def open_progress(work: Path) -> npt.NDArray[np.int64]:
    """How far each part is, shared by all processes through a mapped file."""
    return np.memmap(work / "progress", dtype=np.int64, mode="r+")


def start_progress(work: Path, plan: Plan, finished: set[int]) -> npt.NDArray[np.int64]:
    """Set the finished parts to their whole weight, the others to nothing."""
    done = [part.weight if number in finished else 0 for number, part in enumerate(plan.parts)]
    replace_file(work / "progress", np.array(done, dtype=np.int64).tobytes())  # one that is mapped is not cut
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
        ValueError: when a split has no tokens, or too much of the text is bad; names the key.
    """
    kept = DEDUP in plan.steps
    marks = [json.loads(marker(work, part, kept=kept).read_text(encoding="utf-8")) for part in plan.parts]
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in plan.splits()}
    for mark in marks:
        for shard in mark["shards"]:
            shards[shard["name"].partition("/")[0]].append(shard)
    files = _files(plan, marks)
    named = list(chain.from_iterable(mark["bad"] for mark in marks))[:NAMED_PROBLEMS]
    data = work / "data"
    kept_out, removed = _kept_out(data, plan, marks)
    refuse_bad(files, named, plan.max_bad_share, plan.files)
    _refuse_empty(shards, named, _blamed(kept_out, data))
    digests: dict[str, str] = {}
    for shard in chain.from_iterable(shards.values()):
        digests |= digests_of(shard)
    digests |= removed
    lines = "".join(json.dumps(file, ensure_ascii=False) + "\n" for file in files)
    replace_file(data / "files.jsonl", lines.encode())
    _remove_leftovers(work)
    (data / MANIFEST).unlink(missing_ok=True)
    return write_manifest(
        data,
        kind="data",
        config=config,
        inputs={**inputs_of(plan), "tokenizer": plan.tokenizer_digest},
        files=digests,
        facts={
            "tokenizer": vocabulary.facts(),
            "splits": {split: _split_facts(some) for split, some in shards.items()},
            "parts": len(plan.parts),
            "bad": problem_facts(files, named),
            "empty": sum(file["empty"] for file in files),
            "kept_out": kept_out,
            "inputs_seen": seen,
        },
    )


def _kept_out(data: Path, plan: Plan, marks: list[dict[str, Any]]) -> tuple[list[Counted], dict[str, str]]:
    """What each step left out of all parts; the samples are written, and their digest returned by name."""
    if not plan.steps:
        return [], {}
    tally = Tally(labels_of(plan))
    for mark in marks:
        tally.add(mark["kept_out"])
    samples = chain.from_iterable(tally.samples.values())
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    replace_file(data / REMOVED, lines.encode("utf-8", "surrogatepass"))
    return tally.facts(), {REMOVED: sha256_file(data / REMOVED)}


def _blamed(kept_out: list[Counted], data: Path) -> str:
    """The step that left out most documents, as the end of a message; nothing when none did."""
    most = most_removing(kept_out)
    return f"; {describe(most)}; some of them are in `{data / REMOVED}`" if most is not None else ""


def _split_facts(shards: list[dict[str, Any]]) -> dict[str, Any]:
    totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")}
    if any(shard["tokens"] and not shard["bytes"] for shard in shards):
        totals["bytes"] = 0  # of ready ids the bytes of text are not known: none is better than too few
    return {**totals, "shards": shards}


def _files(plan: Plan, marks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What became of each input file, over all its parts."""
    files: dict[str, dict[str, Any]] = {
        file.name: {"name": file.name, "sha256": digest, **no_problems(), "splits": {}}
        for file, digest in zip(plan.files, plan.digests, strict=True)
    }
    for mark in marks:
        for name, counts in mark["files"].items():
            add_problems(files[name], counts)
            for split, part in counts["splits"].items():
                total = files[name]["splits"].setdefault(split, dict.fromkeys(part, 0))
                for key, value in part.items():
                    total[key] += value
    return list(files.values())


def _refuse_empty(shards: dict[str, list[dict[str, Any]]], named: list[str], blamed: str) -> None:
    """Raise ValueError when a split has no tokens; `blamed` says which step left out most documents."""
    tokens = {split: sum(shard["tokens"] for shard in some) for split, some in shards.items()}
    if not any(tokens.values()):
        first = f"; the first problem: {named[0]}" if named else ""
        raise ValueError(f"data.train gave no tokens at all{first}{blamed}")
    for split, count in tokens.items():
        if not count and is_training(split) and blamed:
            raise ValueError(f"data.train: nothing is left of `{split}`{blamed}; loosen that step")
        if not count and is_training(split):
            raise ValueError(
                f"data.validation: nothing is left to train on in `{split}`; hold out less, or give validation files"
            )
        if not count:
            documents = sum(shard["documents"] for some in shards.values() for shard in some)
            raise ValueError(
                f"data.validation: split `{split}` is empty (of {documents} documents none is held out); hold out a "
                "larger fraction, use {tail: 0.1}, name validation files, or cut the text into more documents "
                f"with data.document{blamed}"
            )
