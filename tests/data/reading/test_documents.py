"""Reading: each document once whatever the ranges, byte for byte, and one bad line costs one line."""

from __future__ import annotations

import gzip
import json
import lzma
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config_data import DocumentStart, Source
from pretrain.data.reading import embedded
from pretrain.data.reading.documents import (
    ReadReport,
    SourceFile,
    byte_ranges,
    corpus_digest,
    input_digest,
    read_documents,
    resolve_sources,
    stdlib_corpus,
    units,
)
from pretrain.data.reading.embedded import torch_headers

LINES = st.lists(
    st.sampled_from([b"alpha", b"= head", b"", b"  ", b"\xfe bad", "宋词 é".encode(), b"x" * 50, b"= \xff"]).flatmap(
        lambda text: st.sampled_from([text + b"\n", text + b"\r\n"])
    ),
    max_size=14,
).map(b"".join)
MODES = ["line", "paragraph", DocumentStart(start="^= ")]


def source(path: Path, data: bytes) -> SourceFile:
    path.write_bytes(data)
    return resolve_sources([str(path)], encoding="utf-8")[0]


def ranges(total: int, cuts: list[int]) -> list[tuple[int, int]]:
    bounds = sorted({0, total, *(cut for cut in cuts if cut < total)})
    return list(pairwise(bounds))


@settings(max_examples=150, deadline=None)
@given(data=LINES, tail=st.sampled_from([b"", b"end"]), cuts=st.lists(st.integers(1, 300), max_size=6))
@pytest.mark.parametrize("mode", MODES, ids=["line", "paragraph", "start"])
def test_ranges_partition_a_text(tmp_path_factory, mode, data, tail, cuts):
    file = source(tmp_path_factory.mktemp("text") / "a.txt", data + tail)
    whole_report, part_reports = ReadReport(), []
    whole = list(read_documents(file, document=mode, report=whole_report))
    parts = []
    for byte_range in ranges(file.bytes, cuts):
        part_reports.append(ReadReport())
        parts += read_documents(file, document=mode, byte_range=byte_range, report=part_reports[-1])
    assert parts == whole
    assert sum(report.bad for report in part_reports) == whole_report.bad
    assert sum(report.empty for report in part_reports) == whole_report.empty
    assert [name for report in part_reports for name in report.named] == whole_report.named


@settings(max_examples=100, deadline=None)
@given(data=LINES, cuts=st.lists(st.integers(1, 300), max_size=6))
def test_documents_opened_by_a_line_are_the_whole_text(tmp_path_factory, data, cuts):
    file = source(tmp_path_factory.mktemp("text") / "a.txt", b"= first\n" + data)
    documents = list(read_documents(file, document=DocumentStart(start="^= ")))
    good = b"".join(line for line in (b"= first\n" + data).splitlines(keepends=True) if _is_utf8(line))
    assert "".join(document.text for document in documents).encode() == good


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text(alphabet='a,"\n\ré宋', max_size=12).filter(lambda text: text.strip()), max_size=12),
    part_bytes=st.integers(1, 80),
)
def test_csv_rows_with_newlines_and_quotes_survive_splitting(tmp_path_factory, texts, part_bytes):
    rows = "".join('{},"{}"\r\n'.format(number, text.replace('"', '""')) for number, text in enumerate(texts))
    file = source(tmp_path_factory.mktemp("csv") / "a.csv", ("id,text\r\n" + rows).encode())
    parts = [
        document
        for byte_range in byte_ranges(file, part_bytes)
        for document in read_documents(file, byte_range=byte_range)
    ]
    assert [document.text for document in parts] == texts


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=9).filter(lambda text: text.strip() and _encodable(text)), max_size=9),
    cuts=st.lists(st.integers(1, 300), max_size=6),
)
def test_jsonl_ranges_partition(tmp_path_factory, texts, cuts):
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    file = source(tmp_path_factory.mktemp("jsonl") / "a.jsonl", data)
    parts = [d for byte_range in ranges(file.bytes, cuts) for d in read_documents(file, byte_range=byte_range)]
    assert [document.text for document in parts] == texts
    assert [document.position for document in parts] == sorted({document.position for document in parts})


def _encodable(text: str) -> bool:
    return not any(0xD800 <= ord(character) < 0xE000 for character in text)


def test_bad_rows_are_counted_and_named(tmp_path):
    lines = [
        b'{"text": "one"}',
        b"{broken",
        b'{"other": 1}',
        b'{"text": 5}',
        b'{"text": ""}',
        b"",
        b'{"text": "\xff"}',
        b'{"text": "two", "score": NaN}',
        b'{"text": "\\ud800"}',
        b"[1]",
    ]
    file = source(tmp_path / "a.jsonl", b"\n".join(lines))
    report = ReadReport()
    assert [document.text for document in read_documents(file, report=report)] == ["one", "two"]
    assert (report.bad, report.empty) == (6, 1)
    assert [name.split(": ")[0].rpartition(":")[2] for name in report.named] == ["2", "3", "4", "7", "9", "10"]


def test_line_numbers_count_from_the_start_of_the_file(tmp_path):
    file = source(tmp_path / "a.txt", b"good\n" * 10 + b"\xff\n" + b"good\n")
    report = ReadReport()
    assert len(list(read_documents(file, document="line", byte_range=(30, file.bytes), report=report))) == 5
    assert report.named[0].startswith(f"{file.name}:11: not UTF-8")


def test_a_file_is_one_document_byte_for_byte_without_its_bad_lines(tmp_path):
    file = source(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\r\n\ttwo\x00\nthree")
    assert [document.text for document in read_documents(file)] == ["one\r\n\r\n\ttwo\x00\nthree"]
    file = source(tmp_path / "b.txt", b"one\n\xff\r\ntwo")
    report = ReadReport()
    assert [document.text for document in read_documents(file, report=report)] == ["one\ntwo"]
    assert report.named == [f"{file.name}:2: not UTF-8 (invalid start byte at byte 0 of the line)"]


def test_paragraphs_leave_blank_lines_out(tmp_path):
    file = source(tmp_path / "a.txt", b"\n one\r\ntwo\r\n \r\n\n\nthree\n")
    assert [document.text for document in read_documents(file, document="paragraph")] == [" one\r\ntwo", "three"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed_text_reads_the_same(tmp_path, suffix):
    data = "".join(f'{{"text": "document {number} é"}}\n' for number in range(3000)).encode()
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    half = len(data) // 2
    file = source(tmp_path / f"a.jsonl{suffix}", pack(data[:half]) + pack(data[half:]))  # two members or frames
    plain = source(tmp_path / "a.jsonl", data)
    expected = [(document.text, document.position) for document in read_documents(plain)]
    assert [(document.text, document.position) for document in read_documents(file)] == expected
    assert units(file) == len(data)
    assert byte_ranges(file, 10) == [None]


def test_tsv_has_no_quoting(tmp_path):
    file = source(tmp_path / "a.tsv", b'label\ttext\n1\tsay "hi\n0\tbye\n1\n')
    report = ReadReport()
    assert [document.text for document in read_documents(file, report=report)] == ['say "hi', "bye"]
    assert report.named == [f"{file.name}:4: 1 fields, the header 2"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b'{"body": "x", "id": 1}\n'),
        ("a.csv", b"body,id\nx,1\n"),
        ("a.tsv", b"body\tid\nx\t1\n"),
    ],
)
def test_a_missing_field_names_those_that_are_there(tmp_path, name, data):
    file = source(tmp_path / name, data)
    with pytest.raises(ValueError, match=r"data.text_field.* no field `text`; the fields are: body, id"):
        list(read_documents(file))
    assert [document.text for document in read_documents(file, text_field="body")] == ["x"]


def test_parquet_row_groups_are_split_by_range(tmp_path):
    texts = [f"row {number}" if number % 7 else None for number in range(100)]
    table = pyarrow.table({"id": list(range(100)), "text": pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=9)
    file = resolve_sources([str(tmp_path / "a.parquet")])[0]
    report = ReadReport()
    whole = list(read_documents(file, report=report))
    assert [(d.text, d.position) for d in whole] == [(text, row) for row, text in enumerate(texts) if text]
    assert (report.bad, report.named[1]) == (15, f"{file.name}:row 8: no text in `text`")
    split = byte_ranges(file, 2000)
    assert len(split) > 3
    assert [d for byte_range in split for d in read_documents(file, byte_range=byte_range)] == whole
    assert units(file) == 100
    with pytest.raises(ValueError, match="holds int64, not text"):
        list(read_documents(file, text_field="id"))
    with pytest.raises(ValueError, match="the fields are: id, text"):
        list(read_documents(file, text_field="body"))


def test_hub_datasets_are_read_by_row(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": [f"row {number}" for number in range(2500)], "id": range(2500)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    file = resolve_sources(["hub:org/some-name/config:test"])[0]
    whole = list(read_documents(file))
    assert asked == [("org/some-name", "config", "test")]
    assert [(d.text, d.position) for d in whole] == [(f"row {number}", number) for number in range(2500)]
    split = byte_ranges(file, 10_000)
    assert len(split) > 2
    assert [d for byte_range in split for d in read_documents(file, byte_range=byte_range)] == whole


def test_a_hub_name_of_two_parts_may_be_a_name_and_a_configuration(monkeypatch):
    import datasets

    def load_dataset(name, config, split):
        if "/" in name:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return datasets.Dataset.from_dict({"text": [f"{name} {config} {split}"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (file,) = resolve_sources(["hub:wikitext/wikitext-2-raw-v1:test"])
    assert [document.text for document in read_documents(file)] == ["wikitext wikitext-2-raw-v1 test"]


@pytest.mark.parametrize("max_bytes", [None, 100])
def test_a_hub_dataset_that_cannot_be_had_names_the_key_and_the_remedy(monkeypatch, max_bytes):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (file,) = resolve_sources(["hub:nobody/nothing-of-this-name"])
    with pytest.raises(ValueError, match=r"data\.train .*`hub:nobody/nothing-of-this-name` cannot be loaded .*OFFLINE"):
        list(read_documents(file, max_bytes=max_bytes))


def test_a_trial_streams_a_hub_dataset(monkeypatch):
    import datasets

    taken = []

    def rows():
        for number in range(10**9):
            taken.append(number)
            yield {"text": None if number == 1 else f"row {number}"}

    def load_dataset(name, config, split, streaming):
        assert streaming
        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (file,) = resolve_sources(["hub:org/name"])
    report = ReadReport()
    read = list(read_documents(file, max_bytes=14, report=report))
    assert [(document.text, document.position) for document in read] == [("row 0", 0), ("row 2", 2), ("row 3", 3)]
    assert (len(taken), report.bad) == (4, 1)
    assert input_digest(file, 14) == input_digest(file, 14)
    with pytest.raises(ValueError, match="has no field `body`; the fields are: text"):
        list(read_documents(file, max_bytes=14, text_field="body"))


@pytest.mark.parametrize("most", range(1, 14))
def test_the_first_bytes_of_text_end_at_a_character(tmp_path, most):
    text = "aé宋😀b\nzz"
    file = source(tmp_path / "a.txt", text.encode())
    report = ReadReport()
    read = "".join(document.text for document in read_documents(file, max_bytes=most, report=report))
    assert text.startswith(read)
    assert most - 4 <= len(read.encode()) <= most
    assert report.bad == 0


def test_the_first_bytes_of_a_table_end_at_a_row(tmp_path):
    rows = b'id,text\n1,"one\nof two\nlines"\n2,two\n'
    for most in (9, 12, 20):
        report = ReadReport()
        read = list(read_documents(source(tmp_path / "a.csv", rows), max_bytes=most, report=report))
        assert [document.text for document in read] == ["one\nof two\nlines"]
        assert report.bad == 0
    (document,) = read_documents(source(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "b"}\n'), max_bytes=3)
    assert document.text == "a"


def test_the_first_bytes_of_a_parquet_file(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row"] * 5000}), tmp_path / "a.parquet")
    (file,) = resolve_sources([str(tmp_path / "a.parquet")])
    assert len(list(read_documents(file, max_bytes=3001))) == 1001


def test_sources_are_found_in_a_stable_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("d/b.txt", "d/a.jsonl.gz", "d/inner/c.csv", "d/skip.bin", "d/.hidden/e.txt", "g2.txt", "g1.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")
    files = resolve_sources(["d", Source(name="globbed", files=("g*.txt",))])
    assert [file.name for file in files] == ["d/a.jsonl.gz", "d/b.txt", "d/inner/c.csv", "g1.txt", "g2.txt"]
    assert [file.source for file in files] == ["", "", "", "globbed", "globbed"]
    assert (files[0].format, files[0].compression) == ("jsonl", "gz")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["nowhere.txt"], "`nowhere.txt` names no file"),
        (["a.exe"], "no known format"),
        (["a.txt", "*.txt"], "comes twice, from `a.txt` and `\\*.txt`"),
        (["empty"], "holds no file of a known format"),
    ],
)
def test_wrong_entries_name_the_key(tmp_path, monkeypatch, entries, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("x")
    Path("a.exe").write_text("x")
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=rf"data.validation: .*{message}"):
        resolve_sources(entries, key="data.validation")


@pytest.mark.parametrize(("name", "document"), [("a.txt", "row"), ("a.jsonl", "line")])
def test_a_rule_that_does_not_fit_the_format_is_refused(tmp_path, name, document):
    with pytest.raises(ValueError, match=f"data.document: {document} is for"):
        list(read_documents(source(tmp_path / name, b"x\n"), document=document))


def test_the_embedded_corpus():
    corpus = stdlib_corpus()
    names = [name for name, _ in corpus]
    assert names == sorted(names)
    assert "dataclasses.py" in names
    assert not [name for name in names if {"test", "tests", "idlelib", "encodings"} & set(name.split("/"))]
    assert sum(path.stat().st_size for _, path in corpus) >= 5_000_000
    assert len(corpus_digest()) == 64
    assert resolve_sources(["python-stdlib"])[0].name == f"python-stdlib/{names[0]}"


def test_the_headers_of_the_installed_torch_are_a_corpus_too():
    corpus = torch_headers()
    names = [name for name, _ in corpus]
    assert names == sorted(names)
    assert "c10/core/Device.h" in names
    assert not [name for name in names if "generated" in name.split("/") or name.startswith("ATen/")]
    assert sum(path.stat().st_size for _, path in corpus) >= 3_000_000
    files = resolve_sources([Source(name="cpp", files=("torch-headers",))])
    assert [file.name for file in files] == [f"torch-headers/{name}" for name in names]
    assert {(file.format, file.source) for file in files} == {("txt", "cpp")}
    (text,) = read_documents(files[0])
    assert text.text == corpus[0][1].read_text(encoding="utf-8")


def test_an_installation_without_headers_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    with pytest.raises(ValueError, match=r"torch-headers: .* holds 0 bytes of C\+\+ headers, fewer than 3,000,000"):
        resolve_sources(["torch-headers"])
    assert embedded.embedded_paths(["torch-headers/c10/core/Device.h", "text.txt"]) == {}
