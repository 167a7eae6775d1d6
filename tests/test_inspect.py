"""`pretrain inspect`: the trainer's own batch, marked rightly, with nothing in it that steers terminal or browser."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from data_builders import run_config, write_tokenizer
from rich.console import Console
from tokenizers import Tokenizer
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.config import config_from_dict, config_to_dict, dump_config
from pretrain.data.loader import DataPlane
from pretrain.data.looking.spelling import GOES_ON, Spelling, visible
from pretrain.data.objectives import IGNORE
from pretrain.data.preparing.splits import is_held_out
from pretrain.data.vocabulary import read_vocabulary
from pretrain.files import ArtifactError
from pretrain.inspect import Inspected, inspect_step, parse_rows, show, write_page
from pretrain.prepare import prepare_data
from pretrain.training.guard import Verdict, message

NASTY = (
    "<script>alert('x')</script> \x1b[31mred\x1b[0m \u202eevil\u202c 宋朝的 שלום e\u0301 \x9b2J https://a.org/b.png\n"
)
WORDS = [f"{NASTY}web text {number}, the quick brown fox. " * (number % 5 + 1) for number in range(60)]
BOOKS = [f"chapter {number}: once upon a time " * (number % 7 + 1) for number in range(30)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A masked and a causal run over two weighted sources, prepared."""
    root = tmp_path_factory.mktemp("inspect")
    for name, texts in (("web-1", WORDS[:25]), ("web-2", WORDS[25:]), ("books", BOOKS)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (root / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    train = [
        {"name": "web", "files": [str(root / "web-1.jsonl"), str(root / "web-2.jsonl")], "weight": 0.7},
        {"name": "books", "files": [str(root / "books.jsonl")], "weight": 0.3},
    ]
    made = {}
    for architecture in ("bert", "gpt2"):
        config = run_config(root, architecture, architecture, train=train, validation={"fraction": 0.1}, workers=1)
        config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 50})})
        write_tokenizer(config.directory / "tokenizer", architecture, " ".join(BOOKS), vocab_size=300)
        prepare_data(config)
        made[architecture] = config
    return made


def shown(inspected: Inspected, width: int = 100, **keys: str) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=False, color_system=None)
    show(inspected, console, **keys)
    return console.file.getvalue()


def words(inspected: Inspected) -> set[str]:
    """Which of two words a batch shows."""
    pieces = [piece for row in every_row(inspected) for piece in row.pieces]
    joined = "".join(token.text for piece in pieces for token in piece.tokens)
    return {word for word in ("script", "宋") if word in joined}


def every_row(inspected: Inspected):
    return [inspected.inspector.row(inspected.batch, number) for number in range(inspected.totals.rows)]


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("step", [1, 7, 50])
def test_it_is_the_trainers_batch(runs, architecture, step):
    config = runs[architecture]
    data = DataPlane.from_config(config)
    data.for_run(50)
    fed = data.batch(step - 1)
    inspected = inspect_step(config, step)
    np.testing.assert_array_equal(inspected.batch.row_ids, fed.row_ids)
    for name, array in fed.arrays.items():
        np.testing.assert_array_equal(inspected.batch.arrays[name], array)
    for row in every_row(inspected):
        tokens = [token for piece in row.pieces for token in piece.tokens]
        used = fed.arrays["document_ids"][row.number] > 0
        assert [token.id for token in tokens] == fed.arrays["input_ids"][row.number][used].tolist()
        assert [token.position for token in tokens] == np.flatnonzero(used).tolist()
        targets = fed.arrays["labels" if architecture == "bert" else "shift_labels"][row.number][used]
        assert [IGNORE if token.target is None else token.target for token in tokens] == targets.tolist()
        source, epoch, plan_row = fed.row_ids[row.number].tolist()
        assert (row.source, row.epoch, row.plan_row) == (data.sources[source], epoch, plan_row)
        assert row.targets == np.count_nonzero(targets != IGNORE)
        assert row.tokens + row.padding == 32
    assert inspected.totals.targets == fed.num_targets
    assert inspected.totals.tokens == fed.num_tokens


def test_marks_of_a_masked_model_are_its_targets(runs):
    config = runs["bert"]
    mask = read_vocabulary(config.directory / "tokenizer").mask
    seen = dict.fromkeys(("masked", "random", "kept"), 0)
    for step in range(1, 30):
        for row in every_row(inspect_step(config, step)):
            for token in (token for piece in row.pieces for token in piece.tokens):
                assert (token.kind != "plain") == (token.target is not None)
                if token.kind != "plain":
                    seen[token.kind] += 1
                    expected = "masked" if token.id == mask else "kept" if token.id == token.target else "random"
                    assert token.kind == expected
    assert all(count > 5 for count in seen.values()), seen
    assert seen["masked"] > 4 * seen["random"]


def test_marks_of_a_causal_model_are_at_piece_borders(runs):
    ahead = none = 0
    for step in range(1, 20):
        for row in every_row(inspect_step(runs["gpt2"], step)):
            for piece in row.pieces:
                *inner, last = piece.tokens
                assert all(token.kind == "plain" for token in inner)
                assert [token.target for token in inner] == [token.id for token in piece.tokens[1:]]
                assert last.kind == ("none" if last.target is None else "ahead")
                ahead, none = ahead + (last.kind == "ahead"), none + (last.kind == "none")
                assert (last.kind == "ahead") or piece.origin.end == piece.origin.tokens
    assert ahead > 0
    assert none > 0


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_documents_are_named_by_file_exactly(runs, architecture):
    """The text of each piece is that part of the document of the file that it names."""
    config = runs[architecture]
    tokenizer = Tokenizer.from_file(str(config.directory / "tokenizer" / "tokenizer.json"))
    facts = json.loads((config.directory / "data" / "manifest.json").read_text())["facts"]["splits"]
    kept = {}
    texts = {"web-1": WORDS[:25], "web-2": WORDS[25:], "books": BOOKS}
    for name, some in texts.items():
        kept[name] = [text for text in some if not is_held_out(text, 0.1)]
    assert sum(map(len, kept.values())) == sum(facts[f"train-{source}"]["documents"] for source in ("web", "books"))
    checked = set()
    for step in range(1, 40):
        for row in every_row(inspect_step(config, step)):
            for piece in row.pieces:
                origin = piece.origin
                stem = Path(origin.file).stem
                assert origin.documents_of_file == len(kept[stem])
                ids = tokenizer.encode(kept[stem][origin.document_in_file], add_special_tokens=False).ids
                assert origin.tokens == len(ids)
                original = [token.target if token.kind in ("masked", "random") else token.id for token in piece.tokens]
                payload = [token for token, one in zip(original, piece.tokens, strict=True) if not one.is_special]
                assert payload == ids[origin.first : origin.end]
                checked.add(stem)
    assert checked == set(texts)


def test_no_file_is_named_where_the_counts_do_not_fit(runs, tmp_path):
    config = copied(runs["gpt2"], tmp_path)
    path = config.directory / "data" / "files.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["splits"]["train-web"]["tokens"] += 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [row for step in range(1, 9) for row in every_row(inspect_step(config, step)) if row.source == "web"]
    assert {piece.origin.file for row in rows for piece in row.pieces} == {None}
    path.unlink()
    assert "train-web/part-00000 document" in shown(inspect_step(config, 1))


def copied(config, tmp_path: Path):
    """The run with nothing but data and tokenizer, elsewhere."""
    moved = config.model_copy(update={"out": str(tmp_path / "copy")})
    for folder in ("data", "tokenizer"):
        shutil.copytree(config.directory / folder, moved.directory / folder)
    return moved


def test_a_copy_with_data_and_tokenizer_alone_is_enough_and_nothing_is_written(runs, tmp_path):
    config = copied(runs["bert"], tmp_path)
    for plan in (config.directory / "data").glob("train-*/packing-*"):
        shutil.rmtree(plan)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    inspected = inspect_step(config, 3)
    shown(inspected)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    np.testing.assert_array_equal(inspected.batch.row_ids, inspect_step(runs["bert"], 3).batch.row_ids)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_nothing_of_the_text_steers_the_terminal(runs, architecture):
    for step in (1, 2, 3):
        text = shown(inspect_step(runs[architecture], step), rows=":")
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
        assert max(map(len, text.splitlines())) <= 100
    assert visible("\x1b[2J\x9b\u202e\ufeff\x7f") == "␛[2J⟨U+009B⟩⟨U+202E⟩⟨U+FEFF⟩␡"


class Balanced(HTMLParser):
    """Fails on a tag that is not closed, and collects what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "img", "link", "iframe", "object")
        if tag != "meta":
            self.open.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href") or name.startswith("on")]

    def handle_startendtag(self, tag, attributes):
        assert tag == "meta"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(html: str) -> str:
    """Well-formed, self-contained, and without a script; returns the text that a reader sees."""
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert parser.fetched == []
    root = ElementTree.fromstring(html)
    assert "<script" not in html
    assert not re.search(r"url\(|@import", html)
    assert "prefers-color-scheme: dark" in html
    return "".join(root.find("body").itertext())


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_the_page_stands_alone_and_escapes_the_text(runs, architecture, tmp_path):
    batches = (inspect_step(runs[architecture], step) for step in range(1, 50))
    inspected = next(batch for batch in batches if words(batch) == {"script", "宋"})
    assert write_page(inspected, tmp_path / "not" / "there" / "page.html") == 4
    html = (tmp_path / "not" / "there" / "page.html").read_text(encoding="utf-8")
    body = check_page(html)
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert html.count("<section") == 4
    assert "宋" in body
    assert "script" in body
    if architecture == "bert":
        assert html.count('class="masked"') - 1 == inspected.totals.kinds["masked"]  # one more in the legend


def test_what_the_run_says_of_the_step_is_shown(runs, tmp_path):
    config = copied(runs["gpt2"], tmp_path)
    rows = inspect_step(config, 5).batch.row_ids.tolist()
    train = config.directory / "train"
    train.mkdir()
    (train / "metrics.jsonl").write_text(
        '{"step": 5, "loss": NaN, "grad_norm": 2.5, "lr": 0.001}\n{"step": 5, "validation/loss": 3.0}\n{"step": 6, "lo'
    )
    assert "not finite: loss nan" in shown(inspect_step(config, 5))
    record = {"step": 5, "why": "spike", "skipped": True, "loss": 9.5, "grad_norm": 2.5, "rows": rows}
    (train / "skipped.jsonl").write_text(json.dumps(record) + "\n")
    text = shown(inspect_step(config, 5))
    assert "! spike: loss 9.5, gradient norm 2.5; the update was not made" in text
    assert "other rows" not in text
    assert "spike" not in shown(inspect_step(config, 6))
    (train / "skipped.jsonl").write_text(json.dumps(record | {"rows": [*rows[:-1], [0, 9, 9]]}) + "\n")
    assert "other rows for this step" in " ".join(shown(inspect_step(config, 5)).split())


def test_a_checkpoint_of_other_data_is_told(runs, tmp_path):
    config = copied(runs["gpt2"], tmp_path)
    data = DataPlane.from_config(config)
    data.for_run(50)
    state = {"progress": {"total_steps": 50}, "data": data.state(0), "config": config_to_dict(config)}
    path = config.directory / "train" / "checkpoints" / "step-00000010" / "trainer.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"state": state}))
    assert inspect_step(config, 3).warnings == ()
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 9})})
    assert "seed was 0, is 9" in inspect_step(other, 3).warnings[0]
    wider = config.model_copy(update={"train": config.train.model_copy(update={"batch_tokens": 64})})
    assert "train.batch_tokens was 128, is 64" in inspect_step(wider, 3).warnings[0]
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 70})})
    assert inspect_step(longer, 3).title.endswith("step 3 of 50")
    assert "ends at step 50" in inspect_step(config, 51).warnings[0]
    damaged = path.parent.with_name("step-00000020") / "trainer.json"
    damaged.parent.mkdir()
    damaged.write_text('{"state": {"prog')
    assert inspect_step(longer, 3).title.endswith("step 3 of 50")


def test_phases_need_the_length_of_the_run(runs, tmp_path):
    config = copied(runs["gpt2"], tmp_path)
    plain = config_to_dict(config)
    for source in plain["data"]["train"]:
        del source["weight"]
    plain["data"]["phases"] = [{"until": "50%", "weights": {"web": 1.0}}, {"weights": {"books": 1.0}}]
    del plain["train"]["steps"]
    plain["train"]["minutes"] = 1.0
    phased = config_from_dict(plain)
    unknown = inspect_step(phased, 30)
    assert "length is not known" in unknown.warnings[0]
    assert unknown.totals.sources == {"web": 4}
    budget = {"minutes": 1.0, "batch_tokens": 128, "steps": 40}
    (phased.directory / "train").mkdir()
    (phased.directory / "train" / "budget.json").write_text(json.dumps(budget))
    known = inspect_step(phased, 30)
    assert known.warnings == ()
    assert known.totals.sources == {"books": 4}
    for damage in ('{"minutes": 1.0, "ba', "[]", '{"minutes": 1.0, "batch_tokens": 128}', '{"steps": null}'):
        (phased.directory / "train" / "budget.json").write_text(damage)
        with pytest.raises(ArtifactError, match=r"budget\.json` cannot be read .*; remove it, and it is measured"):
            inspect_step(phased, 30)


def test_splits(runs):
    config = runs["bert"]
    rows = every_row(inspect_step(config, 2))
    only = inspect_step(config, 2, split="train-books")
    assert list(only.rows) == [row.number for row in rows if row.source == "books"]
    validation = inspect_step(config, 1, split="validation-web")
    made = next(iter(DataPlane.validation(config, "validation-web").batches()))
    np.testing.assert_array_equal(validation.batch.arrays["input_ids"], made.arrays["input_ids"])
    with pytest.raises(ValueError, match="has 1 batches"):
        inspect_step(config, 2, split="validation-web")
    with pytest.raises(ValueError, match="the data have train, train-web, train-books"):
        inspect_step(config, 2, split="nothing")
    with pytest.raises(ValueError, match="count from 1"):
        inspect_step(config, 0)


def test_rows_are_chosen():
    assert parse_rows(None, range(9), 4) == [0, 1, 2, 3]
    assert parse_rows("2:4", range(9), 4) == [2, 3]
    assert parse_rows("7:", range(9), 4) == [7, 8]
    assert parse_rows(":", range(3), 1) == [0, 1, 2]
    assert parse_rows("5", range(9), 4) == [5]
    for wrong in ("x", "", "9:", "4:2", "-1"):
        with pytest.raises(ValueError, match="--rows"):
            parse_rows(wrong, range(9), 4)


def test_characters_that_tokens_share_are_shown_once(tmp_path):
    write_tokenizer(tmp_path / "tokenizer", "gpt2", "", vocab_size=300)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    spelling = Spelling(tmp_path / "tokenizer", read_vocabulary(tmp_path / "tokenizer"))
    ids = tokenizer.encode("a宋é\x1b", add_special_tokens=False).ids
    assert spelling.spell(ids) == ["a", "宋", GOES_ON, GOES_ON, "é", GOES_ON, "␛"]
    assert spelling.spell(ids[2:5]) == ["⟨AE⟩", "⟨8B⟩", "⟨C3⟩"]
    assert spelling.spell([ids[1], 0, ids[2]]) == ["⟨E5⟩", "<|endoftext|>", "⟨AE⟩"]
    assert spelling.alone(10**6) == "⟨id 1000000⟩"


def test_the_command(runs, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(runs["bert"]))
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["inspect", str(path), "--step", "4", "--rows", "0:2"])
    assert done.exit_code == 0, done.output
    assert "bert: step 4 of 50" in done.output
    assert "row 1 " in done.output
    assert "row 2 " not in done.output
    assert CliRunner().invoke(app, ["inspect", str(path), "--step", "4", "--html", str(page)]).exit_code == 0
    check_page(page.read_text(encoding="utf-8"))


def test_the_line_of_the_guard_names_a_command_that_parses(runs, tmp_path):
    (tmp_path / "config.yaml").write_text(dump_config(runs["gpt2"]))
    command = f"pretrain inspect {tmp_path / 'config.yaml'} --step 12"
    line = message(12, Verdict(update=False, why="spike", detail="loss 9"), [[0, 0, 1]], command)
    words = re.search(r"`pretrain ([^`]*)`", line)[1].split()
    assert CliRunner().invoke(app, words).exit_code == 0
