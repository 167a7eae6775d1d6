"""Ready token ids: files of other programs and columns of lists, each id in exactly one document; damage is named.

The writers below know the formats from their descriptions alone and share nothing with the readers.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_builders import run_config, write_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.data.batches import LoadedSplit
from pretrain.data.reading import token_files
from pretrain.data.reading.documents import ReadReport, byte_ranges, read_documents, resolve_sources, units
from pretrain.data.shards import ShardFacts, TokenStore
from pretrain.data.verification import verify_run
from pretrain.data.vocabulary import ReadyIds
from pretrain.files import ArtifactError, read_manifest
from pretrain.models import loom_config, model_from_config
from pretrain.prepare import is_prepared, prepare_data
from pretrain.ranks import Ranks
from pretrain.train import build_evaluators

END = 0
READY = ReadyIds(vocab_size=1000, separator=END)
Documents = list[list[int]]
MEGATRON_CODES = {"B": 1, "b": 2, "h": 3, "i": 4, "q": 5, "H": 8}


def write_megatron(path: Path, documents: Documents, code: str = "H", pieces: int = 1, *, modes: bool = False) -> None:
    """Each document in up to `pieces` sequences."""
    sequences: Documents = []
    starts = [0]
    for document in documents:
        size = max(1, -(-len(document) // pieces))
        sequences += [document[at : at + size] for at in range(0, len(document), size)] or [[]]
        starts.append(len(sequences))
    path.with_suffix(".bin").write_bytes(b"".join(array(code, sequence).tobytes() for sequence in sequences))
    width = array(code).itemsize
    pointers = [sum(len(each) for each in sequences[:number]) * width for number in range(len(sequences))]
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, MEGATRON_CODES[code], len(sequences), len(starts))
        + struct.pack(f"<{len(sequences)}i", *map(len, sequences))
        + struct.pack(f"<{len(sequences)}q", *pointers)
        + struct.pack(f"<{len(starts)}q", *starts)
        + (bytes(len(sequences)) if modes else b"")
    )


def write_nanogpt(path: Path, documents: Documents) -> None:
    path.write_bytes(array("H", [token for document in documents for token in (*document, END)]).tobytes())


def write_llmc(path: Path, documents: Documents, code: str = "H") -> None:
    tokens = [token for document in documents for token in (END, *document)]
    magic, version = (20240520, 1) if code == "H" else (20240801, 7)
    header = [magic, version, len(tokens)] + [0] * 253
    path.write_bytes(struct.pack("<256i", *header) + array(code, tokens).tobytes())


def write_ds(path: Path, documents: Documents, code: str = "H") -> None:
    path.write_bytes(array(code, [token for document in documents for token in document]).tobytes())
    ends = np.cumsum([len(document) for document in documents]).tolist()
    Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *map(int, ends)))


def write_all(folder: Path, documents: Documents) -> dict[str, Path]:
    folder.mkdir(exist_ok=True, parents=True)
    write_megatron(folder / "m", documents, "H")
    write_megatron(folder / "m4", documents, "i", pieces=3, modes=True)
    write_megatron(folder / "m8", documents, "q", pieces=2)
    write_nanogpt(folder / "n.bin", documents)
    write_llmc(folder / "l.bin", documents)
    write_llmc(folder / "l4.bin", documents, "I")
    write_ds(folder / "d.ds", documents)
    write_ds(folder / "d4.ds", documents, "I")
    names = ("m.bin", "m4.bin", "m8.bin", "n.bin", "l.bin", "l4.bin", "d.ds", "d4.ds")
    return {name: folder / name for name in names}


def ids_of(data: bytes | None) -> list[int]:
    return np.frombuffer(data or b"", dtype="<u4").tolist()


def read(path: Path, ready: ReadyIds = READY, part_bytes: int = 1 << 30, **how: Any) -> Documents:
    """All documents, by ranges."""
    (file,) = resolve_sources([str(path)])
    return [
        ids_of(document.ids)
        for each in byte_ranges(file, part_bytes)
        for document in read_documents(file, byte_range=each, ready=ready, **how)
    ]


lists = st.lists(st.lists(st.integers(1, 999), max_size=20), max_size=30)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=lists, part_bytes=st.integers(2, 200))
def test_every_id_is_in_exactly_one_document_of_one_range(tmp_path, documents: Documents, part_bytes: int) -> None:
    expected = [document for document in documents if document]
    for name, path in write_all(tmp_path, documents).items():
        assert read(path, part_bytes=part_bytes) == expected, name
        (file,) = resolve_sources([str(path)])
        separators = len(documents) if name[0] in "nl" else 0
        assert units(file) == sum(map(len, documents)) + separators


def test_positions_are_those_of_tokens_and_empty_documents_are_counted(tmp_path) -> None:
    write_megatron(tmp_path / "m", [[1, 2], [], [3]])
    (file,) = resolve_sources([str(tmp_path / "m.bin")])
    report = ReadReport()
    found = list(read_documents(file, ready=READY, report=report))
    assert [(document.position, ids_of(document.ids)) for document in found] == [(0, [1, 2]), (2, [3])]
    assert (report.empty, report.good, report.bad) == (1, 2, 0)
    write_nanogpt(tmp_path / "n.bin", [[1, 2], [3]])
    (file,) = resolve_sources([str(tmp_path / "n.bin")])
    assert [document.position for document in read_documents(file, ready=READY)] == [0, 3]


def test_blocks_that_are_read_at_a_time_part_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(token_files, "_BLOCK", 3)
    documents = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10], [11]]
    write_nanogpt(tmp_path / "n.bin", documents)
    assert read(tmp_path / "n.bin", part_bytes=4) == documents


def test_a_file_without_the_separator_is_one_document(tmp_path) -> None:
    (tmp_path / "n.bin").write_bytes(array("H", range(1, 900)).tobytes())
    assert read(tmp_path / "n.bin", part_bytes=100) == [list(range(1, 900))]
    assert read(tmp_path / "n.bin", ReadyIds(vocab_size=1000)) == [list(range(1, 900))]


def test_directories_take_what_has_an_index(tmp_path) -> None:
    write_all(tmp_path, [[1], [2, 3]])
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    names = [Path(file.path).name for file in resolve_sources([str(tmp_path)])]
    assert names == ["d.ds", "d4.ds", "m.bin", "m4.bin", "m8.bin"]
    assert len(resolve_sources([f"{tmp_path}/d*"])) == 2, "indices are no documents"


# --- special tokens that packing puts there -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_ids", "expected"),
    [
        ([7, 1, 2, 8], [1, 2]),
        ([7, 7, 1, 8, 8], [7, 1, 8]),
        ([1, 7, 8, 2], [1, 7, 8, 2]),
        ([9, 9, 7, 1, 8, 9], [1]),
        ([7, 8], []),
        ([8], []),
        ([9, 9], []),
        ([8, 1, 7], [8, 1, 7]),
        ([], []),
    ],
)
def test_one_opening_and_one_closing_id_are_taken_off_and_padding(given_ids, expected) -> None:
    ready = ReadyIds(10, frozenset({7}), frozenset({8}), pad=9)
    assert ready.payload(np.array(given_ids, dtype=np.int64)).tolist() == expected


def test_padding_that_is_the_end_of_text_is_not_told_from_it(tmp_path) -> None:
    write_tokenizer(tmp_path / "t", "gpt2", "some text")
    ready = ReadyIds.of(tmp_path / "t")
    assert (ready.opening, ready.closing, ready.separator, ready.pad) == ({0}, {0}, 0, 1)
    write_tokenizer(tmp_path / "b", "bert", "some text")
    ready = ReadyIds.of(tmp_path / "b")
    assert (ready.opening, ready.closing, ready.separator, ready.pad) == ({2}, {3}, 3, 0)


# --- damage ---------------------------------------------------------------------------------------------------------


def altered(path: Path, at: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[at : at + len(data)] = data
    path.write_bytes(whole)


def cut(path: Path, by: int = 1) -> None:
    path.write_bytes(path.read_bytes()[:-by])


DAMAGE: list[tuple[str, Any, str]] = [
    ("m.bin", lambda f: altered(f / "m.idx", 0, b"NOTANIDX"), "m.idx.*does not start with MMIDIDX"),
    ("m.bin", lambda f: altered(f / "m.idx", 9, b"\x02"), "version 2"),
    ("m.bin", lambda f: altered(f / "m.idx", 17, b"\x07"), "type 7"),
    ("m.bin", lambda f: cut(f / "m.idx"), "cut off"),
    ("m.bin", lambda f: (f / "m.idx").write_bytes(b"MMIDIDX"), "MMIDIDX"),
    ("m.bin", lambda f: cut(f / "m.bin", 2), "its index promises"),
    ("m.bin", lambda f: altered(f / "m.idx", 34, b"\xff\xff\xff\xff"), "do not follow one another"),
    ("m.bin", lambda f: altered(f / "m.idx", 34 + 4 * 2, b"\x01"), "do not follow one another"),
    ("m.bin", lambda f: altered(f / "m.idx", 34 + 12 * 2 + 8, b"\x09"), "do not follow one another"),
    ("l.bin", lambda f: altered(f / "l.bin", 4, b"\x09"), "version 9"),
    ("l.bin", lambda f: cut(f / "l.bin"), "cut off or altered"),
    ("l.bin", lambda f: (f / "l.bin").write_bytes(struct.pack("<i", 20240520)), "version None"),
    ("n.bin", lambda f: cut(f / "n.bin"), "no whole number of 16-bit ids"),
    ("d.ds", lambda f: cut(f / "d.ds", 2), "neither 2 nor 4"),
    ("d.ds", lambda f: cut(f / "d.ds.index", 1), "no whole number of 64-bit ends"),
    ("d.ds", lambda f: altered(f / "d.ds.index", 0, b"\x77"), "do not ascend"),
    ("d.ds", lambda f: (f / "d.ds.metadata").write_text("gpt2|4\n5\n5 T"), "metadata. says 4 bytes"),
    ("d.ds", lambda f: (f / "d.ds.index").unlink(), "has no .*index"),
]


@pytest.mark.parametrize("case", range(len(DAMAGE)))
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, case: int) -> None:
    name, damage, words = DAMAGE[case]
    write_all(tmp_path, [[1, 2, 3], [4, 5]])
    assert read(tmp_path / name) == [[1, 2, 3], [4, 5]]
    damage(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        read(tmp_path / name)
    assert f"{tmp_path}/{name[0]}." in str(caught.value)


@pytest.mark.parametrize("name", ["m.bin", "m8.bin", "n.bin", "l4.bin", "d.ds"])
def test_an_id_beyond_the_vocabulary_is_named_by_file_and_token(tmp_path, name: str) -> None:
    write_all(tmp_path, [[1, 2, 3], [4, 60, 5]])
    token = {"n.bin": 5, "l4.bin": 6}.get(name, 4)
    with pytest.raises(ValueError, match=rf"{name}.: token {token}: id 60 is beyond the vocabulary of 50"):
        read(tmp_path / name, ReadyIds(vocab_size=50, separator=END))


def test_a_negative_id_is_beyond_every_vocabulary(tmp_path) -> None:
    write_megatron(tmp_path / "m", [[5, -3]], "i")
    with pytest.raises(ValueError, match=r"token 1: id -3"):
        read(tmp_path / "m.bin")


def test_sixteen_bits_do_not_hold_a_large_vocabulary(tmp_path) -> None:
    write_nanogpt(tmp_path / "n.bin", [[1]])
    with pytest.raises(ValueError, match=r"16 bits an id, and the tokenizer has 70,000"):
        read(tmp_path / "n.bin", ReadyIds(vocab_size=70_000, separator=END))


# --- columns --------------------------------------------------------------------------------------------------------

ROWS = [[2, 5, 6, 3], [2, 7, 3], [2, 3], [8]]
COLUMN = ReadyIds(10, frozenset({2}), frozenset({3}), field="input_ids")


def tables(folder: Path, rows: Sequence[Any], kind: Any = None) -> list[Path]:
    pq.write_table(pa.table({"input_ids": pa.array(rows, kind), "n": range(len(rows))}), folder / "a.parquet")
    (folder / "a.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return [folder / "a.parquet", folder / "a.jsonl"]


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint16())])
def test_columns_of_lists_are_read(tmp_path, kind) -> None:
    for path in tables(tmp_path, ROWS, kind):
        report = ReadReport()
        (file,) = resolve_sources([str(path)])
        found = list(read_documents(file, ready=COLUMN, report=report))
        assert [ids_of(document.ids) for document in found] == [[5, 6], [7], [8]]
        assert (report.empty, report.bad, report.good) == (1, 0, 3)


def test_a_list_of_fixed_size_is_read(tmp_path) -> None:
    table = pa.table({"input_ids": pa.array([[2, 5, 3], [2, 6, 3]], pa.list_(pa.int32(), 3))})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", COLUMN) == [[5], [6]]


def test_bad_rows_are_counted_and_named(tmp_path) -> None:
    rows = [[4], [4, 10], None, [-1], [5]]
    for path in tables(tmp_path, rows):
        report = ReadReport()
        (file,) = resolve_sources([str(path)])
        found = [ids_of(document.ids) for document in read_documents(file, ready=COLUMN, report=report)]
        assert found == [[4], [5]]
        assert report.bad == 3
        assert report.named[0].endswith("2: id 10 is beyond the vocabulary of 10")
    (tmp_path / "b.jsonl").write_text(
        '{"input_ids": [1]}\n{"input_ids": [1.5]}\n{"input_ids": [true]}\n{"input_ids": "1"}\n'
    )
    (file,) = resolve_sources([str(tmp_path / "b.jsonl")])
    report = ReadReport()
    assert len(list(read_documents(file, ready=COLUMN, report=report))) == 1
    assert report.bad == 3


def test_what_holds_no_ids_is_refused(tmp_path) -> None:
    pq.write_table(pa.table({"input_ids": ["text"], "floats": [[0.5]]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"data\.ids_field: `input_ids` .* holds string, not lists of integers"):
        read(tmp_path / "a.parquet", COLUMN)
    with pytest.raises(ValueError, match="not lists of integers"):
        read(tmp_path / "a.parquet", ReadyIds(10, field="floats"))
    with pytest.raises(ValueError, match=r"data\.ids_field: .* has no field `ids`; the fields are: input_ids, floats"):
        read(tmp_path / "a.parquet", ReadyIds(10, field="ids"))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"data\.ids_field: .*a.txt. is txt"):
        read(tmp_path / "a.txt", COLUMN)
    write_nanogpt(tmp_path / "n.bin", [[1]])
    (file,) = resolve_sources([str(tmp_path / "n.bin")])
    with pytest.raises(ValueError, match=r"token ids, not text"):
        list(read_documents(file))


# --- through prepare ------------------------------------------------------------------------------------------------

CORPUS = [[(7 * number + place) % 200 + 5 for place in range(3 + number % 11)] for number in range(400)]


def prepared(tmp_path: Path, name: str = "run", architecture: str = "gpt2", **data: Any):
    config = run_config(tmp_path, architecture, name, workers=1, **data)
    write_tokenizer(config.directory / "tokenizer", architecture, "some text", vocab_size=400)
    return config, prepare_data(config)


def split_of(directory: Path, split: str) -> Documents:
    manifest = read_manifest(directory, "data")
    facts = manifest.facts["splits"][split]
    store = TokenStore(directory, [ShardFacts(**s) for s in facts["shards"]], manifest.facts["tokenizer"]["vocab_size"])
    lengths = store.document_lengths()
    return [
        store.gather(np.array([start]), np.array([length])).tolist()
        for start, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True)
    ]


@pytest.mark.parametrize("name", ["m4.bin", "n.bin", "l.bin", "d4.ds"])
def test_token_files_go_the_same_road_as_text(tmp_path, name: str) -> None:
    write_megatron(tmp_path / "m4", CORPUS, "i", pieces=3)
    write_nanogpt(tmp_path / "n.bin", CORPUS)
    write_llmc(tmp_path / "l.bin", CORPUS)
    write_ds(tmp_path / "d4.ds", CORPUS, "I")
    config, directory = prepared(tmp_path, train=[str(tmp_path / name)], validation={"fraction": 0.1})
    train, validation = split_of(directory, "train"), split_of(directory, "validation")
    assert sorted(train + validation) == sorted(CORPUS)
    assert 10 < len(validation) < 90
    assert not {tuple(document) for document in train} & {tuple(document) for document in validation}
    assert is_prepared(config)
    verify_run(config)
    facts = read_manifest(directory, "data").facts
    assert {split["bytes"] for split in facts["splits"].values()} == {0}
    index = tmp_path / {"m4.bin": "m4.idx", "d4.ds": "d4.ds.index"}.get(name, name)
    data = index.read_bytes()
    index.write_bytes(data)
    verify_run(config)
    assert is_prepared(config), "written anew, with the same bytes"
    index.write_bytes(data + b"\x00")
    with pytest.raises(ArtifactError, match=rf"changed: `{tmp_path}/{name}`"):
        verify_run(config)
    with pytest.raises(ValueError, match=index.name):
        is_prepared(config)


def test_the_tail_goes_by_position(tmp_path) -> None:
    write_ds(tmp_path / "d.ds", CORPUS)
    _, directory = prepared(tmp_path, train=[str(tmp_path / "d.ds")], validation={"tail": 0.25})
    assert split_of(directory, "train") + split_of(directory, "validation") == CORPUS
    tokens = sum(map(len, CORPUS))
    held_out = sum(map(len, split_of(directory, "validation")))
    assert 0.2 < held_out / tokens <= 0.25


def test_parts_and_trials(tmp_path, monkeypatch) -> None:
    from pretrain import prepare

    made = prepare.make_plan
    monkeypatch.setattr(
        prepare,
        "make_plan",
        lambda data, splits, **keys: made(data.model_copy(update={"part_bytes": 500}), splits, **keys),
    )
    write_ds(tmp_path / "d.ds", CORPUS)
    _, directory = prepared(tmp_path, train=[str(tmp_path / "d.ds")])
    assert read_manifest(directory, "data").facts["parts"] > 5
    assert sorted(split_of(directory, "train") + split_of(directory, "validation")) == sorted(CORPUS)
    config = run_config(tmp_path, "gpt2", "trial", train=[str(tmp_path / "d.ds")], workers=1)
    write_tokenizer(config.directory / "tokenizer", "gpt2", "some text", vocab_size=400)
    trial = prepare_data(config, max_bytes=1000)
    tokens = sum(len(document) for split in ("train", "validation") for document in split_of(trial, split))
    assert 150 < tokens <= 500


def test_bits_per_byte_are_left_out_where_bytes_are_not_known(tmp_path) -> None:
    write_ds(tmp_path / "d.ds", CORPUS)
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": f"text {n} of some length"}) + "\n" for n in range(99))
    )
    both = [str(tmp_path / "d.ds"), str(tmp_path / "t.jsonl")]
    for name, train, known in (("ids", both[:1], False), ("both", both, False), ("text", both[1:], True)):
        config, directory = prepared(tmp_path, name, train=train, validation={"fraction": 0.2})
        loaded = LoadedSplit(directory, "validation", "decoder", 32, 8)
        assert (loaded.num_bytes > 0) == known
        vocabulary = loaded.tokens.vocab_size
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
        model = model_from_config(loom_config("gpt2", vocab_size=vocabulary, **sizes))
        scores = build_evaluators(config)["validation"](
            model, SimpleNamespace(device="cpu", stopping=lambda: False, ranks=Ranks.alone())
        )
        assert scores["loss"] > 0
        assert ("bits_per_byte" in scores) == known


def test_steps_that_need_text_are_refused(tmp_path) -> None:
    write_ds(tmp_path / "d.ds", CORPUS)
    with pytest.raises(ValueError, match=r"data\.dedup works on text"):
        prepared(tmp_path, train=[str(tmp_path / "d.ds")], dedup="exact")
    with pytest.raises(ValueError, match=r"`dedup` works on text"):
        run_config(tmp_path, train=["a.parquet"], ids_field="input_ids", dedup="exact")


def test_a_column_of_ids_is_prepared(tmp_path) -> None:
    tables(tmp_path, [[2, *document, 3] for document in CORPUS])
    found = []
    for name in ("a.parquet", "a.jsonl"):
        data = {"train": [str(tmp_path / name)], "ids_field": "input_ids"}
        _, directory = prepared(tmp_path, name[2:], "bert", **data)
        found.append(sorted(split_of(directory, "train") + split_of(directory, "validation")))
    assert found == [sorted(CORPUS)] * 2


def test_our_own_shards_are_read_again(tmp_path) -> None:
    write_ds(tmp_path / "d.ds", CORPUS)
    _, directory = prepared(tmp_path, train=[str(tmp_path / "d.ds")])
    with pytest.raises(ValueError, match=r"data\.from"):
        resolve_sources([str(directory)])
    again = [document for path in sorted((directory / "train").glob("*.ds")) for document in read(path)]
    assert again == split_of(directory, "train")
