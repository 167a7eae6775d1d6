"""Faults of the data: altered shards, bad text, ids and tokenizers that do not fit, text that changed under a run.

What lives here: rows 32 to 35. What must not: how a tiny run is made (`tiny`).
"""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from outcome import Fault, Outcome

from pretrain.data.shards import ShardWriter
from pretrain.data.verification import verify_data
from pretrain.files import MANIFEST, ArtifactError, read_manifest, sha256_file, write_manifest

REFUSED = "refused before step 1: 0 steps"
_ANOTHER_TOKENIZER = {"tokenizer": {"algorithm": "byte-bpe", "vocab_size": 320, "normalize": "nfkc"}}
SECTIONS: dict[str, Any] = {
    "tokenizer": {"algorithm": "byte-bpe", "vocab_size": 320},
    "data": {"sequence_length": 32, "validation": {"fraction": 0.2}, "workers": 1},
    "model": {"architecture": "gpt2", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "objective": {"kind": "causal"},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "train": {"steps": 2, "batch_tokens": 128, "precision": "fp32"},
    "evaluate": {"every": 1000},
    "log": {"to": ["jsonl"]},
}


class Tries:
    """Counts tries, those survived, and keeps the first reason of one that was not."""

    def __init__(self) -> None:
        self.tries = self.survived = 0
        self.reason = ""

    def add(self, held: bool, reason: str) -> None:
        """Count a try."""
        self.tries += 1
        self.survived += held
        if not held and not self.reason:
            self.reason = f"not survived: {reason}"

    def outcome(self, lost: str, note: str) -> Outcome:
        """What came of all."""
        return Outcome(self.tries, self.survived, lost, self.reason or note)


def _prepared(folder: Path, texts: dict[str, bytes], name: str = "text", **data: Any) -> tiny.Run:
    """A run of text files, with tokenizer and shards made by the commands."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in texts.items():
        (folder / file).write_bytes(content)
    train = data.pop("train", [str(folder / file) for file in texts])
    config = {"name": name, "out": str(folder / "runs"), **SECTIONS}
    config["data"] = {**config["data"], "train": train, **data}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config))
    run = tiny.Run(path, folder / "runs" / name)
    for verb in ("tokenizer", "prepare"):
        ended = tiny.execute(tiny.command(run, verb=verb))
        if ended.code:
            raise RuntimeError(ended.output)
    return run


def _rows(count: int, word: str = "document") -> bytes:
    rows = [json.dumps({"text": f"{word} {number} the quick brown fox jumps over"}) for number in range(count)]
    return ("\n".join(rows) + "\n").encode()


def _refuses(run: tiny.Run, *expected: str) -> tuple[bool, str]:
    """Whether training is refused at once, with all of these in what it says."""
    ended = tiny.train(run, recorded=False)
    said = " ".join(ended.output.split())
    missing = [words for words in expected if words not in said]
    started = (run.directory / "train" / "metrics.jsonl").exists()
    return ended.code != 0 and not missing and not started and "Traceback" not in said, said[-300:]


# --- 32: shards -----------------------------------------------------------------------------------------------------


def corrupt_shards(folder: Path) -> Outcome:
    """Flip, cut, zero and swap bytes of shards, indices, packing plans and manifests; all must be found before use."""
    run = tiny.make(folder)
    first = tiny.train(run, recorded=False)
    if first.code:
        raise RuntimeError(first.output)
    shutil.rmtree(run.directory / "train")
    directory = run.directory / "data"
    tries, source = Tries(), random.Random(0)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
    for number in range(400):
        path = files[number % len(files)]
        whole = path.read_bytes()
        path.write_bytes(_injured(source, whole))
        try:
            verify_data(directory, full=True)
        except ArtifactError as error:
            tries.add(path.parent.name in str(error), str(error))
        else:
            tries.add(False, f"{path.relative_to(directory)} was altered and not found")
        path.write_bytes(whole)
    for path in (directory / "train" / "part-00000.ds", directory / "train" / "part-00000.ds.index"):
        for kind in ("flip", "zero", "cut", "swap"):
            whole = path.read_bytes()
            other = directory / "validation" / path.name
            path.write_bytes(other.read_bytes() if kind == "swap" else _injured(source, whole, kind))
            tries.add(*_refuses(run, path.name, *(["SHA-256", sha256_file(path)] if kind in ("flip", "zero") else [])))
            path.write_bytes(whole)
    return tries.outcome(REFUSED, "400 random injuries of all files, 8 by `pretrain train`; file and digests named")


def _injured(source: random.Random, data: bytes, kind: str | None = None) -> bytes:
    kind = kind or source.choice(["flip", "zero", "cut"])
    at = source.randrange(len(data))
    zeroed = data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :]
    if kind == "cut":
        return data[:at]
    return zeroed if kind == "zero" and zeroed != data else data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :]


# --- 33: text -------------------------------------------------------------------------------------------------------

_GOOD = _rows(200)
_BAD: dict[str, tuple[str, bytes, str]] = {
    "malformed UTF-8": ("bad.jsonl", _GOOD + b'{"text": "caf\xe9"}\n', r"bad\.jsonl:201: not UTF-8"),
    "broken JSON": ("bad.jsonl", _GOOD + b'{"text": "cut', r"bad\.jsonl:201: not a JSON object"),
    "missing field": ("bad.jsonl", _GOOD + b'{"body": "x"}\n', r"bad\.jsonl:201: no text in `text`"),
    "field of a number": ("bad.jsonl", _GOOD + b'{"text": 5}\n', r"bad\.jsonl:201: no text in `text`"),
    "field twice": ("bad.jsonl", _GOOD + b'{"text": "a", "text": "b"}\n', r"bad\.jsonl:201: `text` stands twice"),
    "open quote": ("bad.csv", b'text\nfirst\n"open\n' + b"row\n" * 300, r"bad\.csv:3: a quote"),
    "cut gzip": ("bad.jsonl.gz", gzip.compress(_GOOD)[:-30], r"bad\.jsonl\.gz:\d+: .* ends too early"),
    "bytes behind gzip": ("bad.jsonl.gz", gzip.compress(_GOOD) + b"behind", r"bad\.jsonl\.gz:201: .* behind its end"),
    "no parquet": ("bad.parquet", b"PAR1 and no more", r"bad\.parquet: the parquet file is damaged"),
}
_KEPT: dict[str, tuple[str, bytes, int]] = {
    "byte-order mark": ("kept.jsonl", b"\xef\xbb\xbf" + _GOOD, 200),
    "UTF-16": ("kept.jsonl", _GOOD.decode().encode("utf-16"), 200),
    "NUL, CR LF": ("kept.jsonl", _GOOD.replace(b"\n", b"\r\n").replace(b"quick", b"\\u0000"), 200),
    "empty file": ("kept.txt", b"", 0),
    "blank file": ("kept.jsonl", b"\n \n\r\n", 0),
    "empty documents": ("kept.jsonl", b'{"text": ""}\n' * 9 + _GOOD, 200),
}
_OTHER_ENCODINGS = {
    "gb18030": '{"text": "宋词三百首，明月几时有"}\n',
    "cp1252": '{"text": "voilà le café"}\n',
    "shift_jis": '{"text": "これは日本語です"}\n',
}


def bad_text(folder: Path) -> Outcome:
    """Prepare a corpus with one thing wrong at a time; it is named by file and line, and every other document kept."""
    tries = Tries()
    whole = {"good.jsonl": _rows(300, "other")}
    run = _prepared(folder / "base", whole)
    for number, (what, (name, data, expected)) in enumerate(_BAD.items()):
        code, output, facts = _prepare_with(run, folder / f"bad-{number}", {**whole, name: data}, max_bad_share=0.5)
        named = any(re.search(expected, line) for line in facts.get("bad", {}).get("named", ()))
        documents = sum(split["documents"] for split in facts.get("splits", {}).values())
        tries.add(code == 0 and named and facts["bad"]["count"] == 1 and documents >= 300, f"{what}: {output}")
    for number, (what, (name, data, more)) in enumerate(_KEPT.items()):
        code, output, facts = _prepare_with(run, folder / f"kept-{number}", {**whole, name: data})
        documents = sum(split["documents"] for split in facts.get("splits", {}).values())
        tries.add(code == 0 and facts["bad"]["count"] == 0 and documents == 300 + more, f"{what}: {output}")
    for encoding, row in _OTHER_ENCODINGS.items():
        code, output, _ = _prepare_with(run, folder / encoding, {**whole, "other.jsonl": (row * 120).encode(encoding)})
        tries.add(code != 0 and f"data.encoding: {encoding}" in output and "perhaps" in output, f"{encoding}: {output}")
    factor = _long_line(run, folder / "long", tries)
    return tries.outcome("none", f"a 200 MB line: {factor:.1f} bytes of memory a byte, of which 1 GiB may be a line")


def _prepare_with(run: tiny.Run, folder: Path, texts: dict[str, bytes], **data: Any) -> tuple[int, str, dict[str, Any]]:
    """Prepare other text with the run's tokenizer: (exit code, what was said, facts of the manifest)."""
    folder.mkdir(parents=True)
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    config = json.loads(run.config.read_text())
    config["out"] = str(folder / "runs")
    config["data"] |= {"train": [str(folder / name) for name in texts], **data}
    other = tiny.Run(folder / run.config.name, folder / "runs" / run.directory.name)
    other.config.write_text(json.dumps(config))
    shutil.copytree(run.directory / "tokenizer", other.directory / "tokenizer")
    ended = tiny.execute(tiny.command(other, verb="prepare"))
    directory = other.directory / "data"
    return ended.code, ended.output[-400:], read_manifest(directory, "data").facts if directory.is_dir() else {}


_MEASURE = """
import resource, sys
from pretrain.data.reading.documents import ReadReport, read_documents, resolve_sources
file, = resolve_sources([sys.argv[1]])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = sum(len(document.text) for document in read_documents(file, report=ReadReport()))
print(size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def _long_line(run: tiny.Run, folder: Path, tries: Tries) -> float:
    """Read a line of 200 MB in a process of its own; return the memory that it took, in bytes a byte of the line."""
    folder.mkdir(parents=True)
    size = 200_000_000
    path = folder / "long.jsonl"
    with path.open("w") as file:
        file.write('{"text": "')
        for _ in range(size // 500):
            file.write("the quick brown fox jumps over the lazy dog. words" * 10)
        file.write('"}\n')
    ended = tiny.execute([sys.executable, "-c", _MEASURE, str(path)])
    path.unlink()
    characters, grown = map(int, ended.output.split()[-2:])
    tries.add(ended.code == 0 and characters == size and grown < 4 * size, f"a 200 MB line: {ended.output[-300:]}")
    return grown / size


# --- 34: ids and tokenizers -----------------------------------------------------------------------------------------


def other_ids(folder: Path) -> Outcome:
    """An id beyond the vocabulary, an edited merge, another tokenizer, and a model with fewer embeddings."""
    whole = _prepared(folder, {"a.jsonl": _rows(300)})
    tries = Tries()
    for number, injury in enumerate((_id_beyond, _edit_merge, _take_other_tokenizer)):
        run = tiny.copy(whole, folder / f"copy-{number}")
        tries.add(*_refuses(run, *injury(run)))
    return tries.outcome(REFUSED, "both digests shown, or the id and the vocabulary")


def _id_beyond(run: tiny.Run) -> Sequence[str]:
    """A shard with an id that no embedding has, in data whose digests all fit."""
    directory = run.directory / "data"
    made = read_manifest(directory, "data")
    shard = made.facts["splits"]["train"]["shards"][0]
    path = directory / f"{shard['name']}.ds"
    ids = np.fromfile(path, dtype="<u2")
    ends = np.fromfile(directory / f"{shard['name']}.ds.index", dtype="<u8")
    ids[len(ids) // 2] = 60_000
    with ShardWriter(directory / shard["name"], shard["name"], 65_536) as writer:
        writer.add(ids, np.diff(ends, prepend=0).astype(np.int64), shard["bytes"])
    shard |= writer.facts().__dict__
    digests = made.files | {f"{shard['name']}.ds": shard["digest"]}
    shutil.rmtree(next((directory / "train").glob("packing-*")))
    keys = {"kind": "data", "config": made.config, "inputs": made.inputs, "facts": made.facts}
    packing = {name for name in digests if "packing-" in name}
    (directory / MANIFEST).unlink()
    write_manifest(directory, files={name: digest for name, digest in digests.items() if name not in packing}, **keys)
    return ("part-00000.ds", "holds id 60000, beyond the vocabulary of 320")


def _edit_merge(run: tiny.Run) -> Sequence[str]:
    path = run.directory / "tokenizer" / "tokenizer.json"
    was = sha256_file(path)
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["model"]["merges"][0], raw["model"]["merges"][1] = raw["model"]["merges"][1], raw["model"]["merges"][0]
    path.write_text(json.dumps(raw), encoding="utf-8")
    return ("tokenizer.json", "was altered", was, sha256_file(path))


def _take_other_tokenizer(run: tiny.Run) -> Sequence[str]:
    was = read_manifest(run.directory / "tokenizer", "tokenizer").digest
    config = json.loads(run.config.read_text())
    shutil.rmtree(run.directory / "tokenizer")
    run.config.write_text(json.dumps(config | _ANOTHER_TOKENIZER))
    ended = tiny.execute(tiny.command(run, verb="tokenizer"))
    if ended.code:
        raise RuntimeError(ended.output)
    return ("another tokenizer", was[:12], read_manifest(run.directory / "tokenizer", "tokenizer").digest[:12])


# --- 35: the text under a run ---------------------------------------------------------------------------------------


def changed_text(folder: Path) -> Outcome:
    """Append to, reorder, add and delete files after prepare; each is listed; with it put back, the run trains."""
    text = folder / "text"
    text.mkdir()
    for name in ("a", "b"):
        (text / f"{name}.jsonl").write_bytes(_rows(150, name))
    run = _prepared(folder, {}, train=[str(text)])
    a = text / "a.jsonl"
    was, whole = sha256_file(a), a.read_bytes()
    rows = whole.splitlines(keepends=True)
    tries = Tries()
    changes: list[tuple[str, Callable[[], object], Callable[[], object], Sequence[str]]] = [
        ("append", lambda: a.write_bytes(whole + _rows(1)), lambda: a.write_bytes(whole), ("changed:", "a.jsonl", was)),
        ("reorder", lambda: a.write_bytes(b"".join(reversed(rows))), lambda: a.write_bytes(whole), ("changed:", was)),
        ("delete", a.unlink, lambda: a.write_bytes(whole), ("removed:", "a.jsonl")),
        ("add", lambda: (text / "c.jsonl").write_bytes(whole), (text / "c.jsonl").unlink, ("added:", "c.jsonl")),
    ]
    for what, change, put_back, expected in changes:
        change()
        held, said = _refuses(run, *expected)
        tries.add(held, f"{what}: {said}")
        put_back()
    ended = tiny.train(run, recorded=False)
    tries.add(ended.code == 0, f"put back: {ended.output[-300:]}")
    return tries.outcome(REFUSED, "differences listed with both digests; put back, it trains")


FAULTS = [
    Fault("32", "corrupt data shard, index, packing plan, manifest", "100% found before use, named", corrupt_shards),
    Fault(
        "33", "bad text of every kind, a 200 MB line", "named by file and line, all else kept, memory bounded", bad_text
    ),
    Fault("34", "id beyond the vocabulary, tokenizer changed", "refused before step 1, both digests shown", other_ids),
    Fault("35", "text changed after prepare", "refused, difference listed", changed_text),
]
