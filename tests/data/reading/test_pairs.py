"""Pairs of texts out of tables: both sides or none, one bad row costs one row."""

from __future__ import annotations

import csv
import json

import pytest

from pretrain.data.reading.documents import ReadReport, byte_ranges, read_documents
from pretrain.data.reading.pairs import SEPARATOR, sides
from pretrain.data.reading.sources import resolve_sources

PAIRS = [("Run.", "你跑。"), ('Say "hi", please.', "说，好。"), ("a b", "c")]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"en": a, "id": 1, "zh": b}) + "\n" for a, b in rows))
        return
    with path.open("w", newline="") as file:
        delimited = path.suffix == ".csv"
        writer = (
            csv.writer(file) if delimited else csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
        )
        writer.writerow(["zh", "id", "en"])
        writer.writerows([b, 1, a] for a, b in rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_pairs_are_read_in_the_order_of_the_configuration(tmp_path, suffix):
    path = tmp_path / f"pairs{suffix}"
    write(path, [*PAIRS, ("", "nothing"), ("nothing", " "), (f"x{SEPARATOR}y", "z"), ("last", "one")])
    (file,) = resolve_sources([str(path)])
    report = ReadReport()
    found = list(read_documents(file, text_field=("en", "zh"), report=report))
    assert [sides(document.text) for document in found] == [*PAIRS, ("last", "one")]
    assert (report.good, report.empty, report.bad) == (4, 2, 1)
    assert "U+001F" in report.named[0]
    parts = [
        document.text
        for part in byte_ranges(file, 40)
        for document in read_documents(file, text_field=("en", "zh"), byte_range=part)
    ]
    assert parts == [document.text for document in found]
    turned = read_documents(file, text_field=("zh", "en"))
    assert sides(next(iter(turned)).text) == PAIRS[0][::-1]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_a_side_that_is_missing_is_named(tmp_path, suffix):
    path = tmp_path / f"pairs{suffix}"
    write(path, PAIRS)
    (file,) = resolve_sources([str(path)])
    with pytest.raises(ValueError, match=r"has no field `de`; the fields are: .*zh"):
        list(read_documents(file, text_field=("en", "de")))


def test_a_row_without_a_side_is_bad_alone(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"en": "a", "zh": "b"}\n{"en": "c"}\n{"en": "d", "zh": 5}\n{"en": "e", "zh": "f", "zh": "g"}\n')
    (file,) = resolve_sources([str(path)])
    report = ReadReport()
    assert [sides(one.text) for one in read_documents(file, text_field=("en", "zh"), report=report)] == [("a", "b")]
    assert report.bad == 3


def test_text_holds_no_pairs(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (file,) = resolve_sources([str(tmp_path / "a.txt")])
    with pytest.raises(
        ValueError, match=r"data\.text_field: \[en, zh\] are columns .*`.*a\.txt` is txt; pairs are read"
    ):
        list(read_documents(file, text_field=("en", "zh")))
