"""Bad input: counted and named, or refused by name; every good line kept as it is; memory bounded."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fuzz_data
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from data_builders import run_config, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pretrain.config_data import Source
from pretrain.data.preparing import long_texts
from pretrain.data.preparing.pipeline import load_tokenizer
from pretrain.data.reading import lines, tables
from pretrain.data.reading.documents import ReadReport, byte_ranges, read_documents, resolve_sources, units
from pretrain.files import read_manifest
from pretrain.prepare import is_prepared, prepare_data

CHINESE = "宋词三百首，明月几时有？把酒问青天。"
FRAGMENTS = st.sampled_from(
    [*fuzz_data._LINES, b"good line", CHINESE.encode(), CHINESE.encode("gb18030"), b"\x00", b"= x"]
)
BYTES = st.one_of(
    st.binary(max_size=60),
    st.lists(st.tuples(FRAGMENTS, st.sampled_from([b"\n", b"\r\n", b"\r", b""])), max_size=12).map(
        lambda parts: b"".join(line + end for line, end in parts)
    ),
)


def source(path: Path, data: bytes, encoding: str = "auto"):
    path.write_bytes(data)
    return resolve_sources([str(path)], encoding=encoding)[0]


def read(file, **keys) -> tuple[list[str], ReadReport]:
    report = ReadReport()
    return [document.text for document in read_documents(file, report=report, **keys)], report


# --- any bytes ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    data=BYTES,
    encoding=st.sampled_from(fuzz_data.ENCODINGS),
    cuts=st.lists(st.integers(0, 400), max_size=4),
)
@pytest.mark.parametrize("mode", fuzz_data.MODES, ids=["line", "paragraph", "file", "start"])
def test_any_text_is_read_or_refused_by_name(tmp_path_factory, mode, data, encoding, cuts):
    file = source(tmp_path_factory.mktemp("any") / "a.txt", data, encoding)
    fuzz_data.check(file, data, mode, cuts)


@settings(max_examples=60, deadline=None)
@given(data=BYTES, encoding=st.sampled_from(fuzz_data.ENCODINGS), cuts=st.lists(st.integers(0, 400), max_size=4))
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_any_table_is_read_or_refused_by_name(tmp_path_factory, suffix, data, encoding, cuts):
    header = b"" if suffix == ".jsonl" else b"id,text\n" if suffix == ".csv" else b"id\ttext\n"
    file = source(tmp_path_factory.mktemp("any") / f"a{suffix}", header + data, encoding)
    fuzz_data.check(file, header + data, "row", cuts)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=60))
@pytest.mark.parametrize("suffix", [".parquet", ".txt.gz", ".jsonl.xz", ".csv.zst"])
def test_bytes_of_no_archive_are_read_or_refused_by_name(tmp_path_factory, suffix, data):
    file = source(tmp_path_factory.mktemp("any") / f"a{suffix}", data)
    try:
        texts, report = read(file)
    except ValueError as error:
        fuzz_data.promise(file.name in str(error), str(error))
    else:
        assert not texts
        assert report.bad


# --- encodings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-be"])
def test_a_mark_decides_and_is_no_text(tmp_path, encoding):
    text = f"one\r\n{CHINESE}\x00\n\ufeffinside\n"
    mark = "" if encoding in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff"
    file = source(tmp_path / "a.txt", (mark + text).encode(encoding))
    assert read(file, document="line")[0] == ["one", CHINESE + "\x00", "\ufeffinside"]
    assert read(file)[0] == [text]
    rows = json.dumps({"text": CHINESE}, ensure_ascii=False) + "\n"
    assert read(source(tmp_path / "b.jsonl", (mark + rows).encode(encoding)))[0] == [CHINESE]


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "shift_jis", "euc-kr", "latin-1", "cp1252"])
def test_an_encoding_that_is_named_is_read_in_ranges(tmp_path, encoding):
    word = {"big5": "明月幾時有", "shift_jis": "日本語ー表示", "euc-kr": "한국어 텍스트"}.get(encoding, CHINESE)
    word = "café, naïve" if encoding in ("latin-1", "cp1252") else word
    lines_of = [f"{number} {word}" for number in range(40)]
    data = "\r\n".join(lines_of).encode(encoding)
    file = source(tmp_path / "a.txt", data, encoding)
    assert read(file, document="line")[0] == lines_of
    split = byte_ranges(file, 150, "line")
    assert len(split) > 3
    assert [text for part in split for text in read(file, document="line", byte_range=part)[0]] == lines_of
    csv = source(
        tmp_path / "a.csv",
        b"id,text\r\n" + b"\r\n".join(f'1,"{word}"'.encode(encoding) for _ in "ab"),
        encoding,
    )
    assert read(csv)[0] == [word, word]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("gb18030", CHINESE),
        ("shift_jis", "これは日本語のテキストです"),
        ("cp1252", "Voilà le café, déjà fermé"),
        ("utf-16-le", CHINESE + " abc " * 20),
    ],
)
def test_another_encoding_is_refused_with_what_it_may_be(tmp_path, encoding, text):
    name = encoding.removesuffix("-le")
    file = source(tmp_path / "a.jsonl", (json.dumps({"text": text}, ensure_ascii=False) + "\n").encode(encoding) * 20)
    with pytest.raises(ValueError, match=rf"data\.encoding: `.*a\.jsonl`.*data\.encoding: {name}") as caught:
        read(file)
    if name != "utf-16":
        assert "perhaps" in str(caught.value)
        assert "byte 0x" in str(caught.value)
    assert set(read(replace(file, encoding=name))[0]) == {text}


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        ((CHINESE * 3).encode(), "gb18030"),
        ((CHINESE * 3).encode(), "latin-1"),
        ("\ufeffabc".encode("utf-16-le"), "utf-8"),
        ("\ufeffabc".encode(), "gb18030"),
        (b"", "utf-16"),
    ],
)
def test_an_encoding_that_would_garble_is_refused(tmp_path, data, encoding):
    file = source(tmp_path / "a.txt", data, encoding)
    if not data:
        assert read(file)[0] == []
        return
    with pytest.raises(ValueError, match=r"data\.encoding: `.*a\.txt`"):
        read(file)


def test_wide_text_without_a_mark_odd_bytes_and_half_pairs(tmp_path):
    text = "first\nsecond 宋\nthird\n"
    for order in ("le", "be"):
        file = source(tmp_path / f"{order}.txt", text.encode(f"utf-16-{order}"), "utf-16")
        assert read(file, document="line")[0] == text.splitlines()
    data = "\ufeffone\n".encode("utf-16-le") + b"\x3d\xd8" + "half\nlast\n".encode("utf-16-le") + b"\x41"
    texts, report = read(source(tmp_path / "odd.txt", data), document="line")
    assert texts == ["one", "last"]
    assert [name.rpartition(": ")[0].rpartition(":")[2] for name in report.named] == ["2", "4"]
    assert byte_ranges(source(tmp_path / "b.txt", data * 100), 100, "line") == [None]
    assert units(source(tmp_path / "c.txt", text.encode("utf-16"))) == len(text.encode()) + 3  # with its mark


def test_a_source_has_an_encoding_of_its_own(tmp_path):
    (tmp_path / "a.txt").write_bytes(CHINESE.encode("gb18030"))
    (tmp_path / "b.txt").write_bytes(CHINESE.encode())
    entries = [Source(name="old", files=(str(tmp_path / "a.txt"),), encoding="gb18030"), str(tmp_path / "b.txt")]
    assert [read(file)[0] for file in resolve_sources(entries)] == [[CHINESE], [CHINESE]]


def test_a_few_bad_lines_do_not_refuse_a_file(tmp_path):
    good = [f"line {number} é" for number in range(50)]
    data = "\n".join(good[:25]).encode() + b"\ncaf\xe9\n" + "\n".join(good[25:]).encode()
    texts, report = read(source(tmp_path / "a.txt", data), document="line")
    assert texts == good
    assert (report.bad, report.by_kind) == (1, {"encoding": 1})
    assert report.named[0].startswith(f"{tmp_path / 'a.txt'}:26: not UTF-8")


# --- tables ---------------------------------------------------------------------------------------------------------


def test_one_bad_quote_costs_one_line(tmp_path):
    rows = [
        b"id,text",
        b'1,"two',
        b'lines"',
        b'2,"never closed',
        b"3,plain",
        b'4,5" disk',
        b'5,"a ""b"""',
        b'6,"x"y',
        b'7,"end',
    ]
    file = source(tmp_path / "a.csv", b"\n".join(rows) + b"\n")
    texts, report = read(file)
    assert texts == ["two\nlines", "plain", '5" disk', 'a "b"']
    assert [name.removeprefix(file.name).split(": ")[0] for name in report.named] == [":4", ":8", ":9"]
    assert report.by_kind == {"quotes": 3}
    parts = byte_ranges(file, 10)
    assert len(parts) > 4
    assert [text for part in parts for text in read(file, byte_range=part)[0]] == texts


def test_an_open_quote_reaches_no_further_than_a_row_may(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LARGEST_RECORD", 100)
    rows = b'id,text\n1,"open\n' + b"2,row\n" * 500
    texts, report = read(source(tmp_path / "a.csv", rows))
    assert (texts, report.bad) == (["row"] * 500, 1)


def test_the_first_rows_may_lack_the_field_but_not_all(tmp_path):
    file = source(tmp_path / "a.jsonl", b'{"text": null}\n{"body": "x"}\n{"text": "good"}\n')
    texts, report = read(file)
    assert (texts, report.by_kind) == (["good"], {"field": 2})
    file = source(tmp_path / "b.jsonl", b'{"body": "x"}\n' * 101 + b'{"text": "good"}\n')
    with pytest.raises(ValueError, match=r"data\.text_field.*b\.jsonl` has no field `text`; the fields are: body"):
        read(file)


def test_a_field_that_stands_twice_is_ambiguous(tmp_path):
    rows = [
        b'{"text": "a", "text": "b"}',
        b'{"text": "c", "type": "text", "inner": {"text": "d"}}',
        b'{"text": "say \\"text\\": e"}',
    ]
    texts, report = read(source(tmp_path / "a.jsonl", b"\n".join(rows)))
    assert texts == ["c", 'say "text": e']
    assert report.named == [f"{tmp_path / 'a.jsonl'}:1: `text` stands twice in the object"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.tsv"])
@pytest.mark.parametrize("data", [b"", b"\n\n \n\r\n"])
def test_nothing_is_nothing(tmp_path, name, data):
    texts, report = read(source(tmp_path / name, data))
    assert (texts, report.bad) == ([], 0)


def test_all_but_line_ends_is_kept_byte_for_byte(tmp_path):
    text = "nul \x00 cr \r ff \x0c nel \x85 ls \u2028 ps \u2029 bom \ufeff"
    assert read(source(tmp_path / "a.txt", f"{text}\r\n{text}\n".encode()), document="line")[0] == [text, text]
    row = json.dumps({"text": text + "\r\n"}, ensure_ascii=False).encode()
    assert read(source(tmp_path / "a.jsonl", row))[0] == [text + "\r\n"]
    assert read(source(tmp_path / "a.tsv", b"id\ttext\n1\tnul \x00\n"))[0] == ["nul \x00"]


# --- damaged archives -----------------------------------------------------------------------------------------------

ROWS = [json.dumps({"text": f"document {number} {os.urandom(20).hex()}"}) for number in range(3000)]
DATA = "\n".join(ROWS).encode() + b"\n"
PACK = {
    "gz": gzip.compress,
    "xz": lambda data: lzma.compress(data, preset=0),
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@pytest.mark.parametrize("suffix", PACK)
def test_what_a_cut_archive_holds_is_kept_and_the_cut_is_named(tmp_path, suffix):
    packed = PACK[suffix](DATA)
    file = source(tmp_path / f"a.jsonl.{suffix}", packed[: len(packed) * 2 // 3])
    texts, report = read(file)
    assert 1000 < len(texts) < 3000
    assert texts == [json.loads(row)["text"] for row in ROWS[: len(texts)]]
    assert report.by_kind == {"damaged": 1}
    assert report.named[0].startswith(f"{file.name}:{len(texts) + 1}: ")
    assert "ends too early" in report.named[0]
    whole, report = read(replace(file), document="auto")
    assert whole == texts
    text_file = source(tmp_path / f"a.txt.{suffix}", packed[: len(packed) * 9 // 10])
    (text,), report = read(text_file)
    assert DATA.startswith(text.encode())
    assert text.endswith("\n")
    assert report.bad == 1
    assert units(text_file) >= len(text)


@pytest.mark.parametrize("suffix", PACK)
def test_other_bytes_behind_an_archive_are_named_and_zeros_are_padding(tmp_path, suffix):
    packed = PACK[suffix](DATA[:1000]) + PACK[suffix](DATA[1000:])
    for behind, bad in ((b"garbage behind", 1), (bytes(512), 0)):
        texts, report = read(source(tmp_path / f"a.jsonl.{suffix}", packed + behind))
        assert (len(texts), report.bad) == (3000, bad)


@pytest.mark.parametrize("suffix", PACK)
def test_an_archive_that_fails_its_checksum_is_refused(tmp_path, suffix):
    packed = bytearray(PACK[suffix](DATA))
    packed[-7 if suffix == "gz" else len(packed) // 2] ^= 0x10
    with pytest.raises(ValueError, match=rf"a\.jsonl\.{suffix}.*damaged"):
        read(source(tmp_path / f"a.jsonl.{suffix}", bytes(packed)))


def test_a_damaged_parquet_file_costs_its_damaged_rows(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"row {number} {os.urandom(8).hex()}" for number in range(400)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}),
        path,
        row_group_size=100,
        write_page_checksum=True,
        use_dictionary=False,
        compression="none",
    )
    data = bytearray(path.read_bytes())
    data[data.find(texts[150].encode())] ^= 1
    file = source(path, bytes(data))
    found, report = read(file)
    assert found == texts[:100] + texts[200:]
    assert report.by_kind == {"damaged": 100}
    assert "rows 101 to 200" in report.named[0]
    cut = source(path, bytes(data)[:-20])
    assert read(cut)[0] == []
    parts = [read(cut, byte_range=(start, start + 500))[1].bad for start in range(0, cut.bytes, 500)]
    assert sum(parts) == 1
    assert units(cut) == 0


# --- policy, counts, ceiling ----------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [json.dumps({"text": f"document {number}"}) for number in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "b.jsonl").write_text("\n".join(["{broken", '{"text": 5}', '{"text": ""}', *rows[:150]]) + "\n")
    return tmp_path


def prepared(corpus: Path, *names: str, **data):
    config = run_config(
        corpus, train=[str(corpus / name) for name in names], workers=1, validation={"fraction": 0.1}, **data
    )
    if not (config.directory / "tokenizer").exists():
        write_tokenizer(config.directory / "tokenizer", "gpt2", "document 0123456789")
    return config, prepare_data(config)


def test_counts_by_kind_and_file_stand_in_the_manifest(corpus):
    _, directory = prepared(corpus, "a.jsonl", "b.jsonl")
    facts = read_manifest(directory, "data").facts
    name = str(corpus / "b.jsonl")
    assert facts["bad"]["count"] == 2
    assert facts["bad"]["by_kind"] == {"field": 1, "json": 1}
    assert facts["bad"]["by_file"] == {name: 2}
    assert facts["bad"]["share"] == round(2 / 452, 6)
    assert [entry.split(": ")[0] for entry in facts["bad"]["named"]] == [f"{name}:1", f"{name}:2"]
    listed = [json.loads(line) for line in (directory / "files.jsonl").read_text().splitlines()]
    assert [(line["good"], line["bad"], line["empty"]) for line in listed] == [(300, 0, 0), (150, 2, 1)]


def test_the_policy_stop_ends_at_the_first_bad_line(corpus):
    with pytest.raises(ValueError, match=r"data\.on_error: stop: .*b\.jsonl:1: not a JSON object"):
        prepared(corpus, "a.jsonl", "b.jsonl", on_error="stop")
    config, _ = prepared(corpus, "a.jsonl", "b.jsonl")
    assert is_prepared(
        run_config(corpus, **{**config.data.model_dump(exclude_unset=True, by_alias=True), "on_error": "stop"})
    )


def test_too_much_that_is_bad_ends_the_preparation_and_loses_no_work(corpus):
    (corpus / "c.jsonl").write_bytes('{"text": "fine é"}\n'.encode() * 80 + b'{"text": "caf\xe9"}\n' * 20)
    with pytest.raises(ValueError, match=r"max_bad_share: of `.*c\.jsonl` 20 of 100 .*20\.0%") as caught:
        prepared(corpus, "a.jsonl", "c.jsonl")
    assert f"{corpus / 'c.jsonl'}:81: not UTF-8" in str(caught.value)
    assert "perhaps it is cp1252 (\u201cé" in str(caught.value)
    part = next((corpus / "runs" / "run" / "data.unfinished" / "data").rglob("*.ds"))
    made = part.stat().st_mtime_ns
    _, directory = prepared(corpus, "a.jsonl", "c.jsonl", max_bad_share=0.2)
    assert (
        directory / part.relative_to(corpus / "runs" / "run" / "data.unfinished" / "data")
    ).stat().st_mtime_ns == made


def test_small_files_are_judged_together(corpus):
    for number in range(3):
        (corpus / f"s{number}.jsonl").write_text('{"text": "fine"}\n' * 10 + "{broken\n" * 5)
    names = [f"s{number}.jsonl" for number in range(3)]
    with pytest.raises(ValueError, match=r"max_bad_share: 15 of 45 .* of the text are bad"):
        prepared(corpus, *names)
    prepared(corpus, "a.jsonl", *names)


def test_a_run_with_nothing_good_is_an_error(corpus):
    (corpus / "c.jsonl").write_text("{broken\n")
    with pytest.raises(ValueError, match=r"no tokens at all; the first problem: .*c\.jsonl:1: not a JSON object"):
        prepared(corpus, "c.jsonl", max_bad_share=1.0)


# --- size and memory ------------------------------------------------------------------------------------------------


def test_a_line_that_is_too_long_is_bad_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LARGEST_DOCUMENT", 1000)
    monkeypatch.setattr(lines, "_SKIPPED_BLOCK", 64)
    data = b"one\n" + b"x" * 1001 + b"\ntwo\n\n" + b"y" * 600 + b"\n" + b"y" * 600 + b"\n\nthree"
    file = source(tmp_path / "a.txt", data)
    texts, report = read(file, document="line")
    assert texts == ["one", "two", "y" * 600, "y" * 600, "three"]
    assert report.by_kind == {"too long": 1}
    assert f"{file.name}:2: longer than 1,000 bytes" in report.named[0]
    texts, report = read(file, document="paragraph")
    assert texts == ["one\ntwo", "three"]
    assert [name.removeprefix(file.name)[:3] for name in report.named] == [":2:", ":5:"]
    with pytest.raises(ValueError, match=r"a\.txt` would be one document of 2,2\d\d bytes"):
        read(file)
    rows = b'{"text": "a"}\n{"text": "' + b"x" * 1000 + b'"}\n{"text": "b"}\n'
    assert read(source(tmp_path / "a.jsonl", rows))[0] == ["a", "b"]
    assert read(source(tmp_path / "b.txt.gz", gzip.compress(data)), document="line")[0] == [
        "one",
        "two",
        "y" * 600,
        "y" * 600,
        "three",
    ]
    with pytest.raises(ValueError, match="would be one document"):
        read(source(tmp_path / "c.txt.gz", gzip.compress(data)))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_a_long_text_has_the_ids_of_the_whole(tmp_path, monkeypatch, architecture):
    monkeypatch.setattr(long_texts, "PIECE", 4096)
    write_tokenizer(
        tmp_path / "tokenizer", architecture, f"def read(self): return 'naïve' {CHINESE} 1234\n    x = 5\n" * 9
    )
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"), "")
    text = Path(json.__file__).read_text() * 6 + CHINESE * 500 + " \n\t  x" * 3000
    pieces = list(long_texts.cut_text(tokenizer, text))
    assert len(pieces) > 10
    assert "".join(pieces) == text
    (ids,) = long_texts.encode_texts(tokenizer, [text])
    assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_text_with_no_place_to_be_cut_at_is_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(long_texts, "PIECE", 4096)
    monkeypatch.setattr(long_texts, "LARGEST_PIECE", 40_000)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"fine {number}"}) + "\n" for number in range(50)))
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": "a" * 60_000}) + "\n" + json.dumps({"text": "a" * 30_000}) + "\n"
    )
    config = run_config(
        tmp_path, train=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], workers=1, validation={"tail": 0.1}
    )
    write_tokenizer(config.directory / "tokenizer", "gpt2")
    tokenizer = Tokenizer.from_file(str(config.directory / "tokenizer" / "tokenizer.json"))
    found = list(long_texts.encode_texts(tokenizer, ["short", "a" * 60_000, "last"]))
    assert [type(each).__name__ for each in found] == ["array", "UncutTextError", "array"]


_READ_LONG = """
import resource, sys
from pretrain.data.reading.documents import ReadReport, read_documents, resolve_sources
file, = resolve_sources([sys.argv[1]])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sizes = [len(document.text) for document in read_documents(file, report=ReadReport())]
print(sum(sizes), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_reading_a_long_line_takes_at_most_four_times_its_size(tmp_path):
    size = 24_000_000
    (tmp_path / "a.jsonl").write_text('{"text": "' + "word " * (size // 5) + '"}\n{"text": "b"}\n')
    done = subprocess.run(
        [sys.executable, "-c", _READ_LONG, str(tmp_path / "a.jsonl")], capture_output=True, text=True, check=True
    )
    read_characters, grown = map(int, done.stdout.split())
    assert read_characters == size + 1
    assert grown < 4 * size
