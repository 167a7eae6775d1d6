"""Rows out of files: each format, the parts of a task, and what is said of files that cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, get_args

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import validated
from pretrain.config_task import TaskConfig, TuningConfig, load_tuning
from pretrain.tasks.reading import COLUMN_KEYS, read_parts


def task(**keys: Any) -> TaskConfig:
    kind = {"kind": "classification"} if "kind" not in keys else {}
    return validated(TuningConfig, {"name": "x", "task": kind | keys}, "test").task


def rows(path: Path, content: str | bytes, **keys: Any) -> list[dict[str, Any]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    parts = read_parts(task(train=[str(path)], validation=[str(path)], **keys))
    return [dict(row.values) for row in parts.train]


def test_tables(tmp_path: Path) -> None:
    """Quotes enclose fields of csv and are text in tsv; a file without a header has its names from the task."""
    assert rows(tmp_path / "a.csv", 'text,label\n"a, ""b""\nc",1\n') == [{"text": 'a, "b"\nc', "label": "1"}]
    assert rows(tmp_path / "a.tsv", 'text\tlabel\n"a\t1\n') == [{"text": '"a', "label": "1"}]
    assert rows(tmp_path / "b.tsv", "a\t1\nb\t0\n", columns=["text", "label"]) == [
        {"text": "a", "label": "1"},
        {"text": "b", "label": "0"},
    ]
    assert rows(tmp_path / "c.txt", "text\tlabel\r\na\t1\r\n", format="tsv") == [{"text": "a", "label": "1"}]
    assert rows(tmp_path / "d.csv", "\ufefftext,label\na,1\n") == [{"text": "a", "label": "1"}]
    packed = gzip.compress(b"text,label\na,1\n")
    assert rows(tmp_path / "e.csv.gz", packed) == [{"text": "a", "label": "1"}]


def test_json_in_its_forms(tmp_path: Path) -> None:
    lines = '{"text": "a"}\n\n{"text": "b"}\n'
    whole = [{"text": "a"}, {"text": "b"}]
    assert rows(tmp_path / "a.jsonl", lines) == whole
    assert rows(tmp_path / "a.json", lines) == whole
    assert rows(tmp_path / "b.json", json.dumps(whole)) == whole
    assert rows(tmp_path / "c.json", json.dumps({"data": whole}, indent=1)) == whole
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), tmp_path / "d.parquet")
    assert rows(tmp_path / "d.parquet", (tmp_path / "d.parquet").read_bytes()) == whole


def test_squad(tmp_path: Path) -> None:
    asked = [
        {"id": "q1", "question": "who?", "answers": [{"text": "a cat", "answer_start": 3}]},
        {"id": "q2", "question": "why?", "answers": [], "is_impossible": True},
    ]
    squad = {"data": [{"title": "t", "paragraphs": [{"context": "It a cat.", "qas": asked}]}]}
    found = rows(tmp_path / "a.json", json.dumps(squad))
    assert [row["question"] for row in found] == ["who?", "why?"]
    assert found[0]["answers"] == {"text": ["a cat"], "answer_start": [3]}
    assert found[1]["answers"] == {"text": [], "answer_start": []}
    assert found[0]["context"] == "It a cat."


def test_sentences_a_line_a_word(tmp_path: Path) -> None:
    """CoNLL's columns by number or name; of CoNLL-U neither comments, nor multiword tokens, nor empty nodes."""
    conll = "-DOCSTART- O\n\na\tO\nb\tB-x\n\n\nc\tO\n"
    assert rows(tmp_path / "a.conll", conll) == [{"0": ["a", "b"], "1": ["O", "B-x"]}, {"0": ["c"], "1": ["O"]}]
    assert rows(tmp_path / "b.conll", "a O\n", columns=["word", "tag"]) == [{"word": ["a"], "tag": ["O"]}]
    rest = "\t_" * 6
    conllu = (
        f"# text = don't\n1-2\tdon't\t_\t_{rest}\n1\tdo\tdo\tAUX{rest}\n2\tn't\tnot\tPART{rest}\n8.1\tx\tx\tX{rest}\n\n"
    )
    (row,) = rows(tmp_path / "a.conllu", conllu)
    assert (row["form"], row["upos"]) == (["do", "n't"], ["AUX", "PART"])


@pytest.mark.parametrize(
    ("name", "content", "keys", "said"),
    [
        ("a.csv", "text,label\na\n", {}, "a.csv:2: 1 fields, and the columns are 2"),
        ("a.csv", 'text,label\n"a,1\n', {}, "quotes"),
        ("a.jsonl", '{"text": "a"}\n{"text"\n', {}, "a.jsonl:2: not valid JSON"),
        ("a.jsonl", "[1]\n", {}, "expected an object"),
        ("a.tsv", b"text\n\xff\n", {}, "no UTF-8"),
        ("a.xyz", "a", {}, "task.format"),
        ("a.conll", "a\tO\nb\n", {}, "1 columns, and 2 in the line before"),
        ("a.tsv", "text\tlabel\n", {}, "task.train: there are no rows in the files of `"),
        ("a.json", " \n", {}, "task.train: there are no rows"),
        ("a.parquet", b"", {}, "is no parquet file"),
        ("a.conllu", "# text = a\n\n# more\n", {"kind": "token-classification"}, "task.train: there are no rows"),
        ("a.conllu", "1\ta\tX\n", {"kind": "token-classification"}, "3 columns, and CoNLL-U has 10; other forms are"),
        ("a.csv", "text;label\na;1\n", {}, "a.csv:1: no comma parts the columns of `text;label`, read as csv; write"),
        ("a.csv", "text\tlabel\na\t1\n", {}, "set task.format: tsv"),
        ("a.tsv", "text,label\na,1\n", {}, "set task.format: csv"),
        ("a.csv", "text,label,text\na,1,b\n", {}, "a.csv:1: 2 columns are called `text`; rename all but one"),
        ("a.json", '{"data": [{"paragraphs": [{"context": "a", "qas": [{}]}]}]}', {}, "article 1: `id` is missing"),
        ("a.json", '{"data": [{"paragraphs": [{"qas": [{"id": 7}]}]}]}', {}, "article 1: `context` is missing"),
        (
            "a.json",
            '{"data": [{"paragraphs": [{"qas": [{"id": 7}], "context": ""}]}]}',
            {},
            "question 7: `question` is",
        ),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        rows(tmp_path / name, content, **keys)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(ValueError, match=r"task\.train: there are no rows in the files of `a\.csv`"):
        read_parts(task(train=["a.csv"], root=str(tmp_path), validation={"fraction": 0.1}))
    with pytest.raises(ValueError, match=r"task\.train: `.*nothing\.tsv` names no file"):
        read_parts(task(train=["nothing.tsv"], root=str(tmp_path)))
    with pytest.raises(ValueError, match="cannot be loaded"):
        read_parts(task(train=["hub:nobody/nothing-of-this-name"]))


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\tlabel\na\t1\n")
    row = read_parts(task(train=["a.tsv"], validation=["a.tsv"], root=str(tmp_path))).train[0]
    with pytest.raises(ValueError, match=r"a\.tsv:2: there is no column `sentence`; there are `text`, `label`"):
        row["sentence"]


@settings(max_examples=25, deadline=None)
@given(count=st.integers(20, 60), fraction=st.floats(0.2, 0.6), groups=st.integers(5, 12))
def test_parts_held_out(tmp_path_factory: pytest.TempPathFactory, count: int, fraction: float, groups: int) -> None:
    """Each row is in one part alone, the same one whatever else the file holds; groups stay together."""
    path = tmp_path_factory.mktemp("held") / "a.jsonl"
    lines = [json.dumps({"text": f"row {number}", "group": number % groups}) for number in range(count)]

    def split(some: list[str]) -> dict[str, str]:
        path.write_text("\n".join(some))
        try:
            parts = read_parts(
                task(
                    train=[str(path)],
                    validation={"fraction": fraction, "by": "group"},
                    test={"fraction": fraction, "by": "group"},
                )
            )
        except ValueError:  # few groups may all fall on one side
            return {}
        homes = {row["text"]: name for name in ("train", "validation", "test") for row in getattr(parts, name)}
        assert len(homes) == len(some)
        by_group: dict[int, set[str]] = {}
        for name in ("train", "validation", "test"):
            for row in getattr(parts, name):
                by_group.setdefault(row["group"], set()).add(name)
        assert all(len(names) == 1 for names in by_group.values())
        return homes

    whole, fewer = split(lines), split(lines[::-1][: count * 3 // 4])
    if whole and fewer:
        assert {text: whole[text] for text in fewer} == fewer


def test_a_hub_dataset_has_its_labels_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers become the dataset's own names, in lists too; what is not told (-1) stays a number."""
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B-x"])),
        }
    )
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1], "tags": [[0, 1], [1]]}, features=features)
    asked: list[Any] = []

    def load(*names: Any, **keys: Any) -> Any:
        asked.append((names, keys))
        return made

    monkeypatch.setattr(datasets, "load_dataset", load)
    parts = read_parts(task(train=["hub:nyu-mll/glue/rte"], validation=["hub:nyu-mll/glue/rte:validation"]))
    assert [dict(row.values) for row in parts.train] == [
        {"text": "a", "label": "yes", "tags": ["O", "B-x"]},
        {"text": "b", "label": -1, "tags": ["B-x"]},
    ]
    assert asked == [(("nyu-mll/glue", "rte"), {"split": name}) for name in ("train", "validation")]
    with pytest.raises(ValueError, match="is no name on the Hub"):
        read_parts(task(train=["hub:../somewhere"]))


def test_columns_are_joined(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("word\ttext\tlabel\nbank\ta river bank\t1\n")
    row = read_parts(task(train=["a.tsv"], validation=["a.tsv"], root=str(tmp_path))).train[0]
    assert row.text(("word", "text")) == "bank a river bank"


SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs" / "tasks").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tasks_are_found_by_name(path: Path) -> None:
    config = load_tuning(path.stem)
    assert config.name == path.stem
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_every_task_of_glue_and_superglue_is_there() -> None:
    glue = {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"}
    superglue = {"boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"}
    wanted = {f"glue-{name}" for name in glue} | {f"superglue-{name}" for name in superglue}
    assert wanted <= {path.stem for path in SHIPPED}


def test_repeated_rows_are_counted_and_a_limit_takes_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"t{n}\t{n % 2}\n" for n in range(30)))
    (tmp_path / "b.tsv").write_text("text\tlabel\nt3\t1\nnew\t0\n")
    keys: dict[str, Any] = {"train": ["a.tsv"], "validation": ["b.tsv"], "test": ["b.tsv"], "root": str(tmp_path)}
    assert read_parts(task(**keys)).repeated == 1
    few, more = (read_parts(task(**keys, train_limit=limit)).train for limit in (5, 9))
    assert len(few) == 5
    assert {row["text"] for row in few} < {row["text"] for row in more}


def test_numbers_of_rows_hide_no_repeats(tmp_path: Path) -> None:
    """What the task does not look at (GLUE's `idx`, say) tells no row from another."""
    lines = [{"idx": n, "text": f"t{n % 10}", "label": n % 2} for n in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "b.jsonl").write_text(json.dumps({"idx": 999, "text": "t3", "label": 1}))
    keys: dict[str, Any] = {"train": ["a.jsonl"], "root": str(tmp_path)}
    assert read_parts(task(**keys, validation=["b.jsonl"], test=["b.jsonl"])).repeated == 1
    other = task(**keys, validation=["b.jsonl"], test=["b.jsonl"], text="idx", label="text")
    assert read_parts(other).repeated == 0
    held = read_parts(task(**keys, validation={"fraction": 0.3}, test={"fraction": 0.3}))
    texts = [{row["text"] for row in part} for part in (held.train, held.validation, held.test)]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 10
    assert sum(map(len, (held.train, held.validation, held.test))) == 60
    with pytest.raises(ValueError, match=r"a\.jsonl:1: there is no column `title`; there are `idx`, `text`, `label`"):
        read_parts(task(**keys, text="title"))


def test_the_columns_of_every_kind_are_known() -> None:
    """Each key of a task that names a column is one that tells its rows apart."""
    for section in get_args(TaskConfig):
        kind = section.model_fields["kind"].annotation.__args__[0]
        named = {key for key, one in section.model_fields.items() if _is_column(one.annotation)}
        assert named == set(COLUMN_KEYS.get(kind, ())), kind


def _is_column(annotation: Any) -> bool:
    return {str, int} <= set(getattr(annotation, "__args__", ()))
