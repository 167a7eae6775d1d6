"""Feeds broken text to the reader for a while: `python scripts/fuzz_data.py --minutes 5 --seed 0`.

What lives here: one way to look at what the reader made of given bytes, against oracles of our own, and a source of
random ones. The tests use the same checks on what hypothesis draws.

For any bytes in any format: nothing but a ValueError that names the file; no good line lost or altered; the ranges of a
file together give each document once; every line is good, bad or empty. Exit code 1 when a case failed; it is shown.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import lzma
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pretrain.config_data import DocumentStart  # noqa: E402
from pretrain.data.reading.documents import ReadReport, SourceFile, byte_ranges, read_documents, units  # noqa: E402
from pretrain.data.reading.encodings import encoding_of, is_wide  # noqa: E402
from pretrain.data.reading.sources import resolve_sources  # noqa: E402

MODES: tuple[str | DocumentStart, ...] = ("line", "paragraph", "file", DocumentStart(start="^= "))
ENCODINGS = ("auto", "utf-8", "utf-16", "utf-32", "gb18030", "big5", "shift_jis", "euc-kr", "latin-1", "cp1252")
PACKERS = {
    ".gz": partial(gzip.compress, mtime=0),
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
_BLANK = b" \t\r\n\v\f"


def check(file: SourceFile, data: bytes, mode: str | DocumentStart, cuts: Sequence[int]) -> str:
    """Read a plain file that holds `data`, whole and in ranges, and compare with the oracles; "read" or "refused".

    Raises:
        AssertionError: when the reader broke a promise.
    """
    report = ReadReport()
    try:
        codec = encoding_of(file)
        whole = list(read_documents(file, document=mode, report=report))
        assert units(file) >= 0
    except ValueError as error:
        promise(file.name in str(error), f"the file is not named: {error}")
        return "refused"
    assert report.bad == sum(report.by_kind.values())
    assert len(report.named) == min(report.bad, 20) or (file.format == "parquet" and report.named)
    assert all(name.startswith(file.name) for name in report.named)
    if not is_wide(codec):
        _check_ranges(file, mode, whole, report, cuts)
        if file.format == "txt":
            _check_text(data, codec, mode, [document.text for document in whole], report)
        elif file.format == "jsonl":
            _check_jsonl(data, codec, [document.text for document in whole], report)
    elif file.format == "txt" and mode == "line":
        _check_wide(data, codec, [document.text for document in whole], report)
    _check_policy(file, mode, report)
    return "read"


def promise(holds: object, broken: str) -> None:
    """Raise AssertionError where a promise does not hold."""
    if not holds:
        raise AssertionError(broken)


def _check_ranges(
    file: SourceFile, mode: str | DocumentStart, whole: list[object], report: ReadReport, cuts: Sequence[int]
) -> None:
    if mode == "file" and file.format == "txt":
        return
    bounds = sorted({0, file.bytes, *(cut % (file.bytes + 1) for cut in cuts)})
    ranges = list(pairwise(bounds)) or [(0, 0)]
    if file.format == "csv":
        ranges = [each or (0, file.bytes) for each in byte_ranges(file, 1 + file.bytes // (len(cuts) + 1))]
    parts, reports = [], []
    for byte_range in ranges:
        reports.append(ReadReport())
        parts += read_documents(file, document=mode, byte_range=byte_range, report=reports[-1])
    assert parts == whole, "the ranges give other documents"
    for name in ("bad", "good", "empty"):
        found = sum(getattr(part, name) for part in reports)
        assert found == getattr(report, name), f"{name}: {found} in ranges, {getattr(report, name)} in the whole"
    assert [name for part in reports for name in part.named][:20] == report.named


def _lines(data: bytes, codec: str) -> tuple[list[bytes], list[str | None]]:
    mark = {"utf-8": b"\xef\xbb\xbf", "gb18030": b"\x84\x31\x95\x33"}.get(codec, b"")
    lines = list(io.BytesIO(data))
    if lines and mark:
        lines[0] = lines[0].removeprefix(mark)
    texts: list[str | None] = []
    for line in lines:
        try:
            texts.append(line.decode(codec))
        except UnicodeDecodeError:
            texts.append(None)
    return lines, texts


def _check_text(data: bytes, codec: str, mode: str | DocumentStart, documents: list[str], report: ReadReport) -> None:
    lines, texts = _lines(data, codec)
    good = [text for text in texts if text is not None]
    if mode == "line":
        kept = [_stripped(text) for text in good]
        assert documents == [text for text in kept if text and not text.isspace()], "lines"
        assert report.good + report.bad + report.empty == len(lines)
        assert report.good == len(documents)
        return
    if mode == "paragraph":
        inner = [text for line, text in zip(lines, texts, strict=True) if line.strip(_BLANK) and text is not None]
        assert report.good == len(inner)
        assert report.bad == sum(text is None for text in texts)
        inner = [text for text in inner if not text.isspace()]
        seen = [part for text in documents for part in io.StringIO(text, newline="\n") if not part.isspace()]
        assert list(map(_stripped, seen)) == list(map(_stripped, inner)), "paragraphs"
        return
    assert report.good + report.bad == len(lines)
    assert report.bad == sum(text is None for text in texts)
    if mode == "file":
        text = "".join(good)
        assert documents == ([text] if text and not text.isspace() else []), "file"
        return
    kept = [""]
    for text in good:
        if re.search("^= ", _stripped(text)) and kept[-1]:
            kept.append("")
        kept[-1] += text
    assert documents == [text for text in kept if text and not text.isspace()], "started"


def _stripped(text: str) -> str:
    return text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")


def _check_jsonl(data: bytes, codec: str, documents: list[str], report: ReadReport) -> None:
    lines, texts = _lines(data, codec)
    expected, rows, empty = [], 0, 0
    for line, text in zip(lines, texts, strict=True):
        if not line.strip(_BLANK):
            continue
        rows += 1
        found = _text_of(text) if text is not None else None
        if found is not None and found and not found.isspace():
            expected.append(found)
        empty += found is not None and (not found or found.isspace())
    assert documents == expected, "rows"
    assert (report.good, report.empty, report.bad) == (len(expected), empty, rows - len(expected) - empty)


def _text_of(line: str) -> str | None:
    pairs: list[list[tuple[str, object]]] = [[]]

    def note(found: list[tuple[str, object]]) -> dict[str, object]:
        pairs[0] = found
        return dict(found)

    try:
        row = json.loads(line, object_pairs_hook=note)
    except (ValueError, RecursionError):
        return None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or sum(key == "text" for key, _ in pairs[0]) > 1:
        return None
    return text if text.encode("utf-8", "replace").decode() == text else None


def _check_wide(data: bytes, codec: str, documents: list[str], report: ReadReport) -> None:
    try:
        text = data.decode(codec)
    except UnicodeDecodeError:
        assert report.bad, "what cannot be decoded was not counted"
        return
    lines = [_stripped(line) for line in io.StringIO(text.removeprefix("\ufeff"), newline="\n")]
    assert documents == [line for line in lines if line and not line.isspace()], "wide lines"
    assert report.bad == 0


def _check_policy(file: SourceFile, mode: str | DocumentStart, report: ReadReport) -> None:
    try:
        list(read_documents(file, document=mode, report=ReadReport(on_error="stop")))
    except ValueError as error:
        promise(report.named and report.named[0].partition(": ")[0] in str(error), f"stopped elsewhere: {error}")
    else:
        assert not report.bad, "bad lines did not stop it"


def check_packed(file: SourceFile, data: bytes, packed: bytes, suffix: str) -> str:
    """Read a compressed file, damaged or not, whose text was `data` (jsonl); of a cut one, the first rows are kept.

    Raises:
        AssertionError: when the reader broke a promise.
    """
    report = ReadReport()
    documents = []
    texts = (_text_of(line.decode()) for line in data.splitlines())
    plain = [text for text in texts if text and not text.isspace()]
    try:
        for document in read_documents(file, report=report):
            documents.append(document.text)
    except ValueError as error:
        promise(file.name in str(error), f"the file is not named: {error}")
        return "refused"
    whole = packed == PACKERS[suffix](data)
    # Flipped bits may also look like an early end, before any checksum is met; what was read of it then is counted.
    cut = PACKERS[suffix](data).startswith(packed[8:], 8)
    promise(documents == plain[: len(documents)] or (report.bad and not cut), "a damaged archive gave other text")
    assert report.bad or documents == plain, "text was lost in silence"
    assert not whole or (documents == plain and not report.bad)
    return "read"


# --- random cases ---------------------------------------------------------------------------------------------------

_WORDS = [
    "alpha",
    "beta ",
    "= head",
    "宋词三百首",
    "é",
    "日本語テキスト",
    "한국어",
    "\x00",
    "\x0c",
    "\u2028",
    "\ufeff",
    "😀",
    "  ",
    "\r",
]
_LINES = [
    b"{broken",
    b'{"text": null}',
    b'{"text": 5}',
    b'{"text": ["a"]}',
    b'{"text": ""}',
    b'{"other": 1}',
    b'{"text": "a", "text": "b"}',
    b'{"text": "inner", "more": {"text": "x"}}',
    b'{"text": "\\ud800"}',
    b'{"text": "n", "score": NaN}',
    b'{"text": "q\\"text\\": 1"}',
    b"[1]",
    b"[" * 2000,
    b"1,two",
    b'1,"two, three"',
    b'1,"open',
    b'say "hi",x',
    b'"a"b,c',
    b"1,2,3",
    b"\xff\xfe",
    b"\x81",
    b"\xed\xa0\x80",
    b"",
]


def random_text(source: random.Random) -> bytes:
    """Bytes that look like text of some kind, mostly, with something wrong in it."""
    encoding = source.choice(["utf-8", "utf-8", "utf-8", "utf-16", "utf-32-le", "gb18030", "shift_jis", "latin-1"])
    lines: list[bytes] = []
    for _ in range(source.choice([0, 1, 3, 10, 40])):
        kind = source.random()
        words = "".join(source.choices(_WORDS, k=source.randint(0, 4)))
        if kind < 0.35:
            lines.append(words.encode(encoding, "ignore"))
        elif kind < 0.6:
            lines.append(
                json.dumps({"id": 1, "text": words}, ensure_ascii=source.random() < 0.5).encode(encoding, "ignore")
            )
        elif kind < 0.95:
            lines.append(source.choice(_LINES))
        else:
            lines.append(source.randbytes(source.randint(0, 30)))
    newline = source.choice([b"\n", b"\n", b"\r\n", b"\r", "\n".encode("utf-16-le")])
    data = newline.join(lines) + source.choice([b"", newline])
    if source.random() < 0.3 and data:
        data = source.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"id,text\n"]) + data
    return data[: source.randint(0, len(data))] if source.random() < 0.1 else data


def damaged(source: random.Random, data: bytes) -> bytes:
    """The bytes cut off, flipped, zeroed, or with others behind."""
    kind = source.choice(["whole", "cut", "flip", "zero", "behind"])
    at = source.randrange(len(data)) if data else 0
    if kind == "cut":
        return data[:at]
    if kind == "flip" and data:
        return data[:at] + bytes([data[at] ^ 1 << source.randrange(8)]) + data[at + 1 :]
    if kind == "zero":
        return data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :]
    return data + source.randbytes(20) if kind == "behind" else data


def cases(source: random.Random, folder: Path) -> Iterator[tuple[str, bytes, Callable[[], str]]]:
    """Endless cases: (what it is, the file's bytes, what checks it)."""
    number = 0
    while True:
        number = (number + 1) % 50
        suffix = source.choice([".txt", ".txt", ".jsonl", ".csv", ".tsv", ".parquet", *PACKERS])
        path = folder / f"case-{number}{'.jsonl' if suffix in PACKERS else ''}{suffix}"
        data = random_text(source)
        encoding = source.choice(ENCODINGS[:2] if source.random() < 0.6 else ENCODINGS)
        mode = source.choice(MODES) if suffix == ".txt" else "row"
        cuts = [source.randrange(1 << 20) for _ in range(source.choice([0, 1, 5]))]
        packed = data
        if suffix in PACKERS:
            rows = [json.dumps({"text": word}) for word in source.choices(_WORDS, k=source.choice([1, 20, 400]))]
            data = "\n".join(rows).encode() + b"\n"
            packed = damaged(source, PACKERS[suffix](data))
        elif suffix == ".parquet":
            packed = damaged(source, _parquet(source))
        path.write_bytes(packed)
        file = replace(resolve_sources([str(path)])[0], encoding=encoding if suffix not in PACKERS else "auto")
        what = f"{suffix} {mode} {file.encoding} {cuts}"
        if suffix in PACKERS:
            yield what, packed, partial(check_packed, file, data, packed, suffix)
        else:
            yield what, packed, partial(check, file, packed, mode, cuts)


def _parquet(source: random.Random) -> bytes:
    sink = io.BytesIO()
    texts = [source.choice([None, "", *_WORDS]) for _ in range(source.choice([0, 5, 300]))]
    table = pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, sink, row_group_size=50, write_page_checksum=True)
    return sink.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cases until the time is over; say how many there were and what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args(arguments)
    started = time.perf_counter()
    ended: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for what, data, run in cases(random.Random(parsed.seed), Path(folder)):
            try:
                ended[run()] += 1
            except Exception:  # whatever it is, it is what this looks for
                ended["failed"] += 1
                if ended["failed"] <= 3:
                    sys.stdout.write(f"\n{what}\n{data[:2000]!r}\n{traceback.format_exc()}\n")
            if time.perf_counter() - started > 60 * parsed.minutes:
                break
    total = sum(ended.values())
    minutes = (time.perf_counter() - started) / 60
    sys.stdout.write(
        f"{total:,} cases in {minutes:.1f} minutes (seed {parsed.seed}): {ended['read']:,} read, "
        f"{ended['refused']:,} refused by name, {ended['failed']:,} failed\n"
    )
    return int(ended["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
