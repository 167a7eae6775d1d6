"""Files of examples: what is read, and what is said of a line that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.evaluation.examples import find_sets, read_pairs, read_retrieval, read_similarity
from pretrain.files import ArtifactError


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


GOOD = {"sentence_good": "a cat sat", "sentence_bad": "a cat sit"}


def test_pairs_with_their_groups(tmp_path: Path) -> None:
    place = write(tmp_path / "blimp.jsonl", GOOD | {"field": "syntax", "UID": "agreement", "pairID": "0"}, GOOD)
    (one,) = find_sets([place], "minimal pairs")
    assert one.name == "blimp"
    first, second = read_pairs(one)
    assert (first.good, first.bad) == ("a cat sat", "a cat sit")
    assert first.groups == {"field": "syntax", "UID": "agreement"}
    assert second.groups == {}
    assert len(read_pairs(one, limit=1)) == 1


def test_fields_may_have_other_names(tmp_path: Path) -> None:
    (tmp_path / "zh.tsv").write_text("right\twrong\tphenomenon\n一本书\t一个书\tclassifier\n")
    (one,) = find_sets([str(tmp_path / "zh.tsv")], "minimal pairs")
    (pair,) = read_pairs(one, ("right", "wrong", "phenomenon"))
    assert (pair.good, pair.bad, pair.groups) == ("一本书", "一个书", {"phenomenon": "classifier"})
    with pytest.raises(ArtifactError, match=r"line 2: there is no `sentence_good` \(there are: right, wrong"):
        read_pairs(one)


def test_a_folder_and_a_glob_are_one_set(tmp_path: Path) -> None:
    folder = tmp_path / "suite"
    folder.mkdir()
    for name in ("one", "two"):
        write(folder / f"{name}.jsonl", GOOD)
    (folder / "README.md").write_text("not an example")
    for place in (folder, folder / "*.jsonl"):
        (one,) = find_sets([str(place)], "minimal pairs")
        assert one.name == "suite"
        assert [pair.groups["file"] for pair in read_pairs(one)] == ["one", "two"]


def test_similarity_and_retrieval(tmp_path: Path) -> None:
    (tmp_path / "sts.csv").write_text('sentence1,sentence2,score\n"a, b",c,4.5\nd,e,1\n')
    (one,) = find_sets([str(tmp_path / "sts.csv")], "similarity")
    assert read_similarity(one) == (["a, b", "d"], ["c", "e"], [4.5, 1.0])
    rows = [("q1", "p1"), ("q2", "p2"), ("q1", "p2"), ("q1", "p1")]
    place = write(tmp_path / "nq.jsonl", *({"query": query, "positive": positive} for query, positive in rows))
    (one,) = find_sets([place], "retrieval")
    assert read_retrieval(one) == (["q1", "q2"], ["p1", "p2"], [[0, 1], [1]])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"sentence_good": "a"\n', "line 1: not JSON"),
        ("a.jsonl", b"[1, 2]\n", "line 1: not an object"),
        ("a.jsonl", b"\n\n", "holds no example"),
        ("a.jsonl", b'{"sentence_good": "a", "sentence_bad": ""}\n', "line 1: `sentence_bad` is '', not a text"),
        ("a.jsonl", b'{"sentence_good": "a", "sentence_bad": 3}\n', "`sentence_bad` is 3, not a text"),
        ("a.jsonl", "caf\xe9".encode("latin-1"), "is not UTF-8"),
        ("a.csv", b"sentence_good,sentence_bad\na,b,c\n", "line 2: not the 2 columns"),
        ("a.csv", b'sentence_good,sentence_bad\n"a,b\n', "mend the quotes"),
        ("a.txt", b"a\n", "is not one of .jsonl"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        read_pairs(*find_sets([str(tmp_path / name)], "minimal pairs"))


def test_sets_that_say_nothing_are_refused(tmp_path: Path) -> None:
    place = write(tmp_path / "same.jsonl", *({"sentence1": "a", "sentence2": "b", "score": 1} for _ in range(3)))
    with pytest.raises(ArtifactError, match="all 1"):
        read_similarity(find_sets([place], "similarity")[0])
    place = write(tmp_path / "nan.jsonl", {"sentence1": "a", "sentence2": "b", "score": "nan"})
    with pytest.raises(ArtifactError, match="`score` is 'nan', not a number"):
        read_similarity(find_sets([place], "similarity")[0])
    place = write(tmp_path / "one.jsonl", {"query": "a", "positive": "b"}, {"query": "c", "positive": "b"})
    with pytest.raises(ArtifactError, match="one candidate alone"):
        read_retrieval(find_sets([place], "retrieval")[0])
    with pytest.raises(ArtifactError, match="there is no file"):
        find_sets([str(tmp_path / "none.jsonl")], "retrieval")
    (tmp_path / "other").mkdir()
    twin = write(tmp_path / "other" / "one.jsonl", GOOD)
    with pytest.raises(ValueError, match="are both called one"):
        find_sets([place, twin], "retrieval")
