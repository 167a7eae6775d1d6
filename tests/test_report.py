"""`pretrain report`: one page that stands alone, true to the numbers, whatever a run left behind."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_builders import run_config, write_tokenizer
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.config import dump_config
from pretrain.files import ArtifactError
from pretrain.model_dir import write_model
from pretrain.models import loom_config, model_from_config
from pretrain.pages.report import SECTIONS, spread
from pretrain.prepare import prepare_data
from pretrain.report import MOST_POINTS, write_report
from pretrain.reporting.places import names_of, places_of
from pretrain.training.history import read_lines, read_metrics

pytest.importorskip("plotly", reason="plotly is not installed")

PLANTED = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\u2028"


class Fetched(HTMLParser):
    """What a browser would fetch or run, and the text of the scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._inside = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "video", "audio")
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action"):
                self.asked.append(str(value))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append((dict(attributes), ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)


def checked(page: Path) -> tuple[str, dict[str, Any]]:
    """The text that a reader sees, and the numbers of the curves; the page stands alone and runs nothing planted."""
    html = page.read_text(encoding="utf-8")
    assert len(html) < 10_000_000
    parser = Fetched()
    parser.feed(html)
    assert all(asked.startswith(("data:image/png;base64,", "#")) for asked in parser.asked)
    assert not re.search(r"url\(|@import", html)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-")
    numbers, library, ours = parser.scripts
    unpacked = gzip.decompress(base64.b64decode(library[1])).decode()
    assert "plotly.js" in unpacked[:200]
    assert (library[0]["type"], numbers[0]["type"], ours[0]) == ("application/gzip", "application/json", {})
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (unpacked, ours[1])]
    assert policy.rpartition("script-src ")[2].split() == [f"'sha256-{digest}'" for digest in digests]
    root = ElementTree.fromstring(html)  # well-formed, so nothing has opened or closed a tag of its own
    body = root.find("body")
    assert body is not None
    assert [heading.get("id") for heading in body.iter("h2")] == list(SECTIONS)
    for script in list(body.iter("script")):
        script.text = ""
    return " ".join("".join(body.itertext()).split()), json.loads(numbers[1])


def written(root: Path, lines: list[dict[str, Any]], **files: str) -> Path:
    """A run directory with these lines of metrics and other files of `train`, `__` in their names for a dot."""
    train = root / "train"
    train.mkdir(parents=True)
    (train / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, text in files.items():
        (train / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return root


def step(number: int, loss: float = 3.0, **others: float) -> dict[str, float]:
    return {"step": number, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, "tokens": 8.0 * number, "seconds": 0.5 * number,
            "tokens_per_second": 16.0, "data_wait": 0.01, "memory_gib": 0.5, **others}  # fmt: skip


def test_runs_side_by_side(tmp_path: Path) -> None:
    """Numbers, marks, differences and samples of two runs; what is planted stays text."""
    lines = [step(number, math.nan if number == 4 else 3.0 - number / 10, mfu=0.4) for number in range(1, 7)]
    lines += [{"step": 6, f"validation-{PLANTED}/loss": 2.5, "validation/bits_per_byte": 1.25}]
    skips = [
        {"step": 4, "why": "not finite", "skipped": True, "loss": math.nan, "grad_norm": math.inf},
        {"step": 5, "why": PLANTED, "skipped": False, "loss": 9.0, "grad_norm": 3.0},
    ]
    starts = [{"step": 0, "time": "2026-01-01T00:00:00+00:00"}, {"step": 3, "device": PLANTED}]
    sample = {"step": 6, "prompt": PLANTED, "text": f"text {PLANTED}", "candidates": [[[PLANTED, 0.5]]]}
    address = "s3://user:hunter2@host/x?token=swordfish"
    first = written(
        tmp_path / "first",
        lines,
        skipped__jsonl="".join(json.dumps(skip) + "\n" for skip in skips),
        starts__jsonl="".join(json.dumps(start) + "\n" for start in starts),
        samples__jsonl=json.dumps(sample) + "\n" + '{"step": 7, "pro',
        config__yaml=f"name: {json.dumps(PLANTED)}\nout: {address}\ntrain: {{seed: 0, steps: 6}}\n",
        result__json=json.dumps({"step": 6, "best": {"step": 5, "loss": 2.5}}),
    )
    second = written(
        tmp_path / "<b>second", [step(2), step(4, 2.0)], config__yaml="name: x\ntrain: {seed: 1, steps: 6}\n"
    )
    with (second / "train" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.')  # a run that is going on
    result = CliRunner().invoke(app, ["report", str(first), str(second), "--out", str(tmp_path / "a" / "page.html")])
    assert result.exit_code == 0, result.output
    text, numbers = checked(tmp_path / "a" / "page.html")
    assert "hunter2" not in text + json.dumps(numbers)
    assert "swordfish" not in text
    one, two = numbers["runs"]
    assert one["curves"]["loss"]["mean"] == [2.9, 2.8, 2.7, None, 2.5, 2.4]
    assert one["along"] == {"step": [1, 2, 3, 4, 5, 6], "tokens": [8, 16, 24, 32, 40, 48],
                            "seconds": [0.5, 1, 1.5, 2, 2.5, 3]}  # fmt: skip
    assert two["curves"]["loss"]["mean"] == [3, 2]
    assert one["restarts"] == [3]
    assert [(mark["kind"], mark["steps"]) for mark in one["marks"]] == [("skipped", [4]), ("spike", [5])]
    assert "<" not in json.dumps([one["marks"], one["name"], two["name"]])  # the library reads tags
    titles = [chart["title"] for chart in numbers["charts"]]
    assert titles[:2] == ["loss (nats a target)", "learning rate"]
    assert "validation: bits per byte" in titles
    for said in (
        "1 logged steps have a loss that is not finite",
        "text </script><script>document.title='owned'</script><img src=x onerror=alert(1)>",
        "5 (loss 2.5000)",
        "going on: its last line is",
        "train.seed",
        "left out: there is no directory `data` in the run",
        "left out: no model is saved here yet",
        "<b>second: none was made",
    ):
        assert said in text
    assert re.search(r"3 of 4 keys differ.*train\.seed01", text)


def test_a_long_run_keeps_its_peaks_and_says_so(tmp_path: Path) -> None:
    rows = 20 * MOST_POINTS
    values = np.full(rows, 2.0)
    values[12_345] = 50.0
    values[40:60] = math.nan  # a whole span
    root = tmp_path / "long"
    (root / "train").mkdir(parents=True)
    path = root / "train" / "metrics.jsonl"
    lines = (f'{{"step": {number + 1}, "loss": {loss}}}\n'.replace("nan", "NaN") for number, loss in enumerate(values))
    path.write_text("".join(lines))
    curves, scores = read_metrics(path, most=MOST_POINTS)
    loss = curves.curves["loss"]
    assert (curves.lines, curves.span, curves.times_not_finite, scores) == (rows, 20, 20, {})
    assert loss.low is not None
    assert loss.high is not None
    assert loss.high[12_345 // 20] == 50.0
    assert loss.mean[12_345 // 20] == pytest.approx((19 * 2 + 50) / 20)
    assert loss.low[12_345 // 20] == 2.0
    assert np.flatnonzero(np.isnan(loss.mean)).tolist() == [2]
    assert curves.along["step"][-1] == rows
    text, numbers = checked(write_report([root], tmp_path / "page.html", attention=False))
    assert "long: 20,000 steps were logged; a point of its curves is the mean of 20 of them" in text
    assert len(numbers["runs"][0]["curves"]["loss"]["high"]) == MOST_POINTS


def test_damaged_files_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": 2.0}\n\xff\xfe\n[1]\n\n{"loss": 1}\n{"step": 2, "loss": 1.0, "new": 7}\n{"step"'
    )
    curves, _ = read_metrics(path, most=10)
    assert (curves.lines, curves.bad) == (2, 3)
    assert np.isnan(curves.curves["new"].mean).tolist() == [True, False]
    assert read_lines(path)[-1] == {"step": 2, "loss": 1.0, "new": 7}
    root = written(
        tmp_path / "odd",
        [],
        result__json='{"step": "many"}',
        samples__jsonl='{"step": 1, "prompt": "p", "text": "t", "candidates": "odd"}\n{"step": 1, "prompt": 3}\n',
        skipped__jsonl="not json\n",
        config__yaml="a: [1, ",
    )
    text, _ = checked(write_report([root, root], tmp_path / "page.html"))
    assert "nothing was logged yet" in text
    assert "config.yaml" in text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs" / "here" / "train").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="no directory"):
        places_of(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"is no run: .* did you mean `.*here`"):
        places_of(tmp_path / "runs")
    with pytest.raises(ArtifactError, match="whose training has begun"):
        places_of(tmp_path / "runs" / "here")


def test_a_fine_tuning_is_the_runs_of_its_seeds(tmp_path: Path) -> None:
    for seed in (10, 2):
        written(tmp_path / "task" / f"seed-{seed}", [step(1)])
    places = places_of(tmp_path / "task")
    assert names_of(places) == ["task/seed-2", "task/seed-10"]
    result = {"seed": 2, "best": {"step": 1, "of": 1}, "test": {"accuracy": 0.75}}
    (places[0].root / "result.json").write_text(json.dumps(result))
    text, _ = checked(write_report([tmp_path / "task"], tmp_path / "page.html"))
    assert "test accuracy0.7500–" in text
    assert "finished" in text


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    runs = [written(tmp_path / "a" / "run", [step(1)]), written(tmp_path / "b" / "run", [step(1)])]
    assert names_of([place for run in runs for place in places_of(run)]) == ["a/run", "b/run"]


def test_places_are_spread_evenly() -> None:
    assert spread(3, 5) == [0, 1, 2]
    assert spread(101, 5) == [0, 25, 50, 75, 100]


def test_data_tokenizer_and_attention_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{number} brown foxes jump over lazy dogs" for number in range(40)]
    (tmp_path / "train.txt").write_text("\n".join(texts))
    (tmp_path / "held-out.txt").write_text("\n".join(texts[:3]))
    config = run_config(
        tmp_path, "gpt2", train=[str(tmp_path / "train.txt")], validation=[str(tmp_path / "held-out.txt")],
        document="line", workers=1,
    )  # fmt: skip
    root = config.directory
    write_tokenizer(root / "tokenizer", "gpt2", " ".join(texts), 280)
    prepare_data(config)
    sizes = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    (root / "export").mkdir()
    write_model(
        model_from_config(loom_config("gpt2", max_position_embeddings=32, **sizes)),
        root / "export",
        tokenizer_directory=root / "tokenizer",
    )
    written(root, [step(1)], config__yaml=dump_config(config))
    moved = root.rename(tmp_path / "elsewhere")
    before = torch.get_rng_state()
    page = write_report([moved], tmp_path / "page.html")
    assert torch.equal(torch.get_rng_state(), before)
    text, _ = checked(page)
    for said in ("rows of 32 places", "most frequent", "elsewhere: 0 brown foxes", "Head importance", "layer 1"):
        assert said in text
    assert page.read_text().count('class="map"') == 2 * (1 + 2 * 2)  # two sentences: rollout, and the heads
    text, _ = checked(write_report([moved], page, texts=["lazy dogs"]))
    assert "elsewhere: lazy dogs" in text
    assert "elsewhere: 0 brown" not in text
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ValueError, match=r"pip install 'pretrain\[report\]'"):
        write_report([moved], page)
