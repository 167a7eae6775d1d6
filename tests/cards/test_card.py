"""A card says what its run left, in the Hub's form, and nothing of the machine that made it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as Tree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from card_runs import CONFIG, PROGRESS, SHAPE, START, STEP, write_model, write_run
from hub_rules import Service, problems
from huggingface_hub import ModelCard, ModelCardData, constants, parse_eval_result_entries
from typer.testing import CliRunner

from pretrain.card import CARD, write_card
from pretrain.cards.cost import OVERHEAD, WATTS, WATTS_A_CORE, WATTS_ON_PCIE, WITHOUT_SOURCE
from pretrain.cards.curve import FILE as CURVE
from pretrain.cards.places import hub_name, public
from pretrain.cli import app
from pretrain.files import ArtifactError, read_manifest, verify_manifest
from pretrain.planning.gpus import GPUS


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    found = Service()
    yield found
    found.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "river")


def section(card: str, title: str) -> str:
    """The text below a heading."""
    return card.split(f"\n## {title}\n\n")[1].split("\n## ")[0]


def row(card: str, title: str, label: str) -> str:
    """The cells beside a label in the tables of a section."""
    (found,) = re.findall(rf"^\| {re.escape(label)} \| (.*) \|$", section(card, title), re.MULTILINE)
    return str(found)


def harness(path: Path) -> Path:
    """Scores as lm-eval writes them."""
    results = {
        "arc_easy": {"alias": "arc_easy", "acc,none": 0.25, "acc_stderr,none": 0.01, "acc_norm,none": 0.3},
        "mine": {"bits_per_byte,none": 1.5, "bits_per_byte_stderr,none": "N/A"},
    }
    configs = {
        "arc_easy": {"dataset_path": "allenai/ai2_arc", "dataset_name": "ARC-Easy", "test_split": "test"},
        "mine": {"dataset_path": "json", "dataset_kwargs": {"data_files": "/home/secretive/mine.jsonl"}},
    }
    path.write_text(
        json.dumps({"results": results, "configs": configs, "n-shot": {"arc_easy": 5, "mine": 0}, "date": 1795262400.0})
    )
    return path


# --- the Hub's form -------------------------------------------------------------------------------------------------


def test_the_hubs_client_and_its_service_take_the_card(
    run: Path, tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_card(run / "export", run, scores=[harness(tmp_path / "scores.json")])
    card = ModelCard.load(path)
    data = card.data
    assert data.language == ["en", "code"]
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert data.datasets == ["me/web", "me/more"]
    assert data.tags == ["pretrain", "causal"]
    assert data.get("base_model") is None
    assert data.model_name == "river"
    by_name = {(found.dataset_name, found.metric_type): found for found in data.eval_results or ()}
    assert by_name["validation-web", "bits_per_byte"].metric_value == 1.2
    assert by_name["arc_easy", "acc"].dataset_type == "allenai/ai2_arc"
    assert ("validation-web", "num_targets") not in by_name
    again = ModelCardData(**yaml.safe_load(data.to_yaml()))  # what is written is what was meant
    assert again.eval_results == data.eval_results
    assert again.to_dict() == data.to_dict()
    assert problems(path.read_text()) == []
    monkeypatch.setattr(constants, "ENDPOINT", service.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    card.validate()
    assert service.asked[-1]["path"] == "/api/validate-yaml"
    assert service.asked[-1]["repoType"] == "model"
    card.data.license = "mine"
    with pytest.raises(ValueError, match="license"):  # the service does look
        card.validate()


def test_a_score_on_a_benchmark_of_the_hub_gets_a_file_of_its_own(run: Path, tmp_path: Path) -> None:
    write_card(run / "export", run, scores=[harness(tmp_path / "scores.json")])
    (path,) = sorted((run / "export" / ".eval_results").iterdir())
    assert path.name == "arc_easy.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("allenai/ai2_arc", "ARC-Easy", 0.25)
    assert entry.date == "2026-11-21T12:00:00+00:00"
    assert "5 shots" in str(entry.notes)
    assert "0.25 ± 0.01" in section((run / "export" / CARD).read_text(), "Scores")


def test_scores_that_a_card_no_longer_has_leave_no_file(run: Path, tmp_path: Path) -> None:
    """Nor does the picture; what others wrote there stays."""
    export = run / "export"
    write_card(export, run, scores=[harness(tmp_path / "scores.json")])
    theirs = export / ".eval_results" / "mine.yaml"
    theirs.write_text("- dataset: {id: a/b, task_id: c}\n  value: 1\n")
    (run / "train" / "metrics.jsonl").write_text("")
    write_card(export, run, overwrite=True)
    assert [path.name for path in (export / ".eval_results").iterdir()] == ["mine.yaml"]
    assert not (export / CURVE).exists()
    theirs.unlink()
    write_card(export, run, scores=[harness(tmp_path / "scores.json")], overwrite=True)
    assert "arc_easy.yaml" in {path.name for path in (export / ".eval_results").iterdir()}
    verify_manifest(export, read_manifest(export, "export"))
    write_card(export, run, overwrite=True)
    assert not (export / ".eval_results").exists()
    verify_manifest(export, read_manifest(export, "export"))


def test_a_licence_that_the_hub_does_not_list_goes_by_its_name(run: Path) -> None:
    path = write_card(run / "export", run, license="my-license-1.0")
    data = ModelCard.load(path).data
    assert (data.license, data.license_name) == ("other", "my-license-1.0")
    assert problems(path.read_text()) == []


@pytest.mark.parametrize(
    ("base", "there", "named"),
    [
        ("openai-community/gpt2", False, "openai-community/gpt2"),
        ("gpt2", False, "gpt2"),
        ("models/first", True, None),  # a directory beside the runs, though the Hub could have such a name
        ("/home/secretive/first", False, None),
        ("runs/first/train/checkpoints/latest/model", False, None),
    ],
)
def test_a_base_model_is_named_when_the_hub_has_it(base: str, there: bool, named: str | None, tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "river", {"model": {"from": base}})
    if there:
        (tmp_path / base).mkdir(parents=True)
    card = write_card(run / "export", run)
    assert ModelCard.load(card).data.get("base_model") == named
    assert "secretive" not in card.read_text()


# --- what it says ---------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_artifacts(run: Path) -> None:
    card = write_card(run / "export", run).read_text()
    assert row(card, "Architecture", "parameters") == "6,154"
    assert row(card, "Architecture", "stored as") == "fp32"
    assert row(card, "Architecture", "context") == "128 positions, trained on rows of 64"
    assert row(card, "Tokenizer", "algorithm") == "byte-level BPE"
    assert row(card, "Tokenizer", "pieces") == "4"
    assert row(card, "Tokenizer", "UTF-8 bytes a token") == "3"
    assert row(card, "Tokenizer", "unknown tokens") == "0.1000%"
    assert row(card, "Tokenizer", "lines that decode to themselves") == "90.00%"
    assert row(card, "Recipe", "batch") == "512 tokens, 8 rows of 64"
    assert row(card, "Recipe", "engine") == "ddp x4 on cuda"
    assert row(card, "Recipe", "seed") == "7"
    assert "lr 0.02" in row(card, "Recipe", "optimizer")
    assert row(card, "Training", "tokens seen") == "51,200 positions, 97.7% of them text"
    assert row(card, "Training", "operations").startswith("5.12 × 10¹⁰ FLOPs")
    assert row(card, "Training", "hardware") == "4 processes on NVIDIA H100 80GB HBM3, torch 2.13.0"
    assert row(card, "Training", "hours of training steps").startswith("8 process hours")
    assert row(card, "Training", "steps skipped") == "spike 2"
    assert "minhash: 50 of 900 documents (5.6%)." in section(card, "Data")
    assert "3 lines or rows could not be read." in section(card, "Data")
    assert "No decontamination." in section(card, "Data")
    assert "| web |" in section(card, "Data")
    assert "odc-by | 0.75 | 0.50 |" in section(card, "Data")
    assert "`*.txt` | unknown | 0.25 | 6.25 |" in section(card, "Data")
    assert row(card, "Versions", "torch") == "2.13.0"
    assert "| validation-web | loss (nats a target) | 3.4 | 6 |" in section(card, "Scores")
    assert "Repeated text: read up to 6.2 times" in section(card, "Limits")
    assert "follow instructions" in section(card, "Limits")
    for key in ("touvron2023llama", "jordan2024muon", "hagele2024scaling", "@misc{river"):
        assert key in section(card, "Citation")
    assert "year = {2026}" in section(card, "Citation")


def test_energy_is_an_estimate_with_its_assumptions(run: Path) -> None:
    told = row(write_card(run / "export", run).read_text(), "Training", "energy, an estimate")
    assert told.startswith(f"{WATTS['H100'] * 8 * OVERHEAD / 1000:.2g} kWh: ")
    assert "700 W a GPU (assumed" in told
    assert f"effectiveness {OVERHEAD:g} (assumed" in told
    card = write_card(run / "export", run, watts=250, overhead=1.1, overwrite=True).read_text()
    told = row(card, "Training", "energy, an estimate")
    assert told.startswith("2.2 kWh: 250 W a process (given)")
    assert "assumed" not in told


def test_energy_of_a_cpu_is_by_threads_and_unknown_without_them(tmp_path: Path) -> None:
    start = START | {"device": "cpu", "machine": "AMD EPYC, 2 cores, torch 2.13.0", "threads": 2, "processes": 1}
    on_cpu = {"arithmetic": "fp32 on cpu", "split": "single x1 on cpu"}
    run = write_run(tmp_path / "a", progress=on_cpu, starts=[start])
    told = row(write_card(run / "export", run).read_text(), "Training", "energy, an estimate")
    assert told.startswith(f"{WATTS_A_CORE * 2 * 2 * OVERHEAD / 1000:.2g} kWh: 24 W a process (assumed")
    run = write_run(tmp_path / "b", progress=on_cpu, starts=[])
    assert row(write_card(run / "export", run).read_text(), "Training", "energy, an estimate") == "unknown"


def test_hours_are_counted_by_the_processes_of_each_start(tmp_path: Path) -> None:
    """4 processes for 25 steps, then 2, each step 72 s; a start in between saved nothing and is made anew."""
    other = {"machine": "NVIDIA L4, torch 2.13.0", "processes": 2}
    starts = [START, START | other | {"step": 50}, START | other | {"step": 25}]
    run = write_run(tmp_path / "river", starts=starts)
    card = write_card(run / "export", run).read_text()
    assert row(card, "Training", "hardware") == (
        "4 processes, then 2 processes on NVIDIA H100 80GB HBM3, torch 2.13.0, then NVIDIA L4, torch 2.13.0"
    )
    hours = float(row(card, "Training", "hours of training steps").split()[0])
    assert hours == pytest.approx(72 * (4 * 25 + 2 * 75) / 3600, rel=1e-2)
    assert row(card, "Training", "energy, an estimate") == "unknown"


def test_every_gpu_has_a_power() -> None:
    assert set(WATTS) == {gpu.name for gpu in GPUS}
    assert set(WATTS_ON_PCIE) | WITHOUT_SOURCE <= set(WATTS)
    assert all(WATTS_ON_PCIE[name] < WATTS[name] for name in WATTS_ON_PCIE)


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("NVIDIA A100-SXM4-80GB", "400 W a GPU (assumed: all of the board power that is published for it)"),
        ("NVIDIA A100 80GB PCIe", "300 W a GPU (assumed: all of"),
        ("NVIDIA A100-PCIE-40GB", "250 W a GPU (assumed: all of"),
        ("Tesla V100-PCIE-16GB", "250 W a GPU (assumed: all of"),
        ("NVIDIA H100 PCIe", "350 W a GPU (assumed: all of"),
        ("NVIDIA GH200 480GB", "700 W a GPU (assumed: nothing published was found of its power)"),
        ("NVIDIA X9000", "400 W a GPU (assumed: its power is not known)"),
    ],
)
def test_the_power_of_a_gpu_says_where_it_comes_from(tmp_path: Path, device: str, told: str) -> None:
    run = write_run(tmp_path / "river", starts=[START | {"machine": f"{device}, torch 2.13.0"}])
    card = write_card(run / "export", run).read_text()
    assert f" kWh: {told}" in row(card, "Training", "energy, an estimate")


def test_what_a_run_did_not_keep_is_unknown_and_never_made_up(tmp_path: Path) -> None:
    kept = {"step": 100, "tokens": 51_200, "seconds": 60.0, "checkpoint": STEP}
    run = write_run(tmp_path / "old", metrics="")
    (run / "train" / "result.json").write_text(json.dumps(kept))
    (run / "train" / "starts.jsonl").unlink()
    (run / "report" / "scores.json").unlink()
    (run / "data" / "manifest.json").unlink()
    (run / "tokenizer" / "manifest.json").unlink()
    card = write_card(run / "export", run).read_text()
    assert "a rule of thumb" in row(card, "Training", "operations")
    assert row(card, "Training", "operations").startswith("1.89 × 10⁹ FLOPs")  # 6 x 6,154 x 51,200
    assert row(card, "Training", "hardware") == "4 processes on a machine that was not recorded"
    assert "unknown |" in section(card, "Data")
    assert not (run / "export" / CURVE).exists()
    assert CURVE not in card
    assert "during training" in section(card, "Scores")  # those of the last evaluation
    assert problems(card) == []


def test_a_directory_alone_tells_what_it_can(tmp_path: Path) -> None:
    card = write_card(write_model(tmp_path / "found")).read_text()
    assert "What text it was trained on, and how, is not known to this card." in section(card, "Limits")
    assert row(card, "Architecture", "parameters") == "6,154"
    for title in ("Recipe", "Training"):
        assert f"## {title}\n" not in card
    assert "None were recorded." in section(card, "Scores")
    assert problems(card) == []
    data = ModelCard(card).data
    assert (data.license, data.language, data.eval_results) == (None, None, None)


def test_a_checkpoint_on_the_way_is_told_as_it_stood(run: Path, tmp_path: Path) -> None:
    earlier = run / "train" / "checkpoints" / "step-00000050"
    earlier.mkdir()
    progress = PROGRESS | {"step": 50, "tokens": 25_600, "seconds": 3_600.0, "scored_at": 50}
    (earlier / "trainer.json").write_text(json.dumps({"step": 50, "state": {"progress": progress, "config": CONFIG}}))
    card = write_card(write_model(tmp_path / "half"), run, checkpoint=earlier).read_text()
    assert row(card, "Training", "steps") == "50"
    assert row(card, "Training", "tokens seen").startswith("25,600 ")
    assert "| validation-web | loss (nats a target) | 3.5 | 6 |" in section(card, "Scores")
    assert "29.96" not in card  # that is the end's
    assert row(card, "Training", "hours of training steps").startswith("4 process hours")


def test_shards_of_another_run_say_which_text_they_hold(tmp_path: Path) -> None:
    run = write_run(tmp_path / "second", {"data": {"from": "/home/secretive/first/data", "sequence_length": 64}})
    manifest = json.loads((run / "data" / "manifest.json").read_text())
    manifest["facts"]["made_from"] = {"config": {"train": ["hub:me/first"], "filters": [], "dedup": "exact"}}
    (run / "data" / "manifest.json").write_text(json.dumps(manifest))
    path = write_card(run / "export", run)
    assert "datasets/me/first" in section(path.read_text(), "Data")
    assert ModelCard.load(path).data.datasets == ["me/first"]
    assert "secretive" not in path.read_text()


# --- secrets and places ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("/home/me/notes/a.txt", "a.txt"),
        ("~/a.txt", "a.txt"),
        ("$HOME/a.txt", "a.txt"),
        ("../me/a.txt", "a.txt"),
        (r"C:\Users\me\a.txt", "a.txt"),
        ("data/zh/*.jsonl.gz", "data/zh/*.jsonl.gz"),
        ("https://me:secret@host/a.txt?token=secret#secret", "https://host/a.txt"),
        ("s3://bucket/a.txt", "s3://bucket/a.txt"),
        ("file:///home/me/a.txt", "a.txt"),
        ("zip://a.txt::/home/me/b.zip", "b.zip"),
        ("http://[secret", "an address"),
        ("hub:me/set:train", "hub:me/set:train"),
        ("python-stdlib", "python-stdlib"),
    ],
)
def test_a_place_is_shown_without_its_machine(place: str, shown: str) -> None:
    assert public(place) == shown


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("hub:me/set", "me/set"),
        ("hub:me/set/en:train", "me/set"),
        ("hub:set", "set"),
        ("me/set", None),
        ("hub:..", None),
    ],
)
def test_a_dataset_of_the_hub_has_a_name(place: str, name: str | None) -> None:
    assert hub_name(place) == name


def test_no_secret_and_no_home_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "s3cr3t-t0ken"
    monkeypatch.setenv("HF_TOKEN", secret)
    places = [f"https://me:{secret}@host/{tmp_path.name}/a.txt?key={secret}", f"{tmp_path}/b.txt", "~/c.txt"]
    changes = [{"step": 5, "key": "optimizer.lr", "before": 0.1, "after": 0.2}]
    changes.append({"step": 6, "key": "log.project", "before": str(tmp_path), "after": secret})  # type: ignore[dict-item]
    data = CONFIG["data"] | {"train": places, "validation": [f"{tmp_path}/valid.txt"]}
    more: dict[str, Any] = {"out": str(tmp_path), "data": data, "model": {"from": f"{tmp_path}/base"}}
    more["tokenizer"] = {"from": f"{tmp_path}/base"}
    run = write_run(tmp_path / "river", more, progress={"changes": changes})
    write_card(run / "export", run, scores=[harness(tmp_path / "scores.json")])
    written = [path for path in (run / "export").rglob("*") if path.suffix in (".md", ".svg", ".yaml")]
    assert len(written) == 3
    for path in written:
        text = path.read_text()
        assert secret not in text
        assert str(tmp_path.parent) not in text
        assert "/home/" not in text
    card = (run / "export" / CARD).read_text()
    assert "step 5: `optimizer.lr` from `0.1` to `0.2`" in card
    assert "log.project" not in card


def test_names_that_look_like_markup_are_only_text(tmp_path: Path) -> None:
    odd = "a|b`c<script>\n## Not a heading *x*.txt"
    run = write_run(tmp_path / "river", {"data": CONFIG["data"] | {"train": [odd]}, "name": "river"})
    card = write_card(run / "export", run).read_text()
    assert "\n## Not a heading" not in card
    (line,) = [line for line in card.splitlines() if "Not a heading" in line]
    assert len(re.findall(r"(?<!\\)\|", line)) == 6
    assert line.count("`") == 2  # within which nothing is markup


# --- beside the card ------------------------------------------------------------------------------------------------


def test_the_picture_is_whole_small_and_asks_nobody(run: Path) -> None:
    write_card(run / "export", run)
    text = (run / "export" / CURVE).read_text()
    root = Tree.fromstring(text)
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 3  # of training, and of each set
    assert f"]({CURVE})" in (run / "export" / CARD).read_text()
    assert len(text) < 20_000
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]
    for point in lines[0].attrib["points"].split():
        x, y = map(float, point.split(","))
        assert 0 <= x <= 720
        assert 0 <= y <= 320


def test_losses_that_are_no_numbers_are_left_out_of_the_picture(tmp_path: Path) -> None:
    lines = [
        {"step": step, "loss": float("nan") if step == 3 else 1e9 if step == 4 else 5.0, "tokens": step}
        for step in range(1, 9)
    ]
    run = write_run(tmp_path / "river", metrics="".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "lo')
    write_card(run / "export", run)
    text = (run / "export" / CURVE).read_text()
    assert "nan" not in text
    (line,) = Tree.fromstring(text).findall("{http://www.w3.org/2000/svg}polyline")
    assert len(line.attrib["points"].split()) == 7


def test_the_manifest_of_an_export_holds_its_card(run: Path) -> None:
    before = read_manifest(run / "export", "export")
    write_card(run / "export", run)
    after = read_manifest(run / "export", "export")
    assert {CARD, CURVE} <= set(after.files)
    assert after.inputs == before.inputs
    verify_manifest(run / "export", after)


def test_a_card_makes_no_strange_file_the_exports_own(run: Path) -> None:
    """Nor an altered one a whole one."""
    before = read_manifest(run / "export", "export").files
    (run / "export" / "notes.txt").write_text("of mine")
    (run / "export" / "config.json").write_text(json.dumps({**SHAPE, "altered": True}))
    write_card(run / "export", run)
    after = read_manifest(run / "export", "export").files
    assert set(after) - set(before) == {CARD, CURVE}
    assert {name: after[name] for name in before} == before


def test_a_card_that_is_there_is_kept(run: Path) -> None:
    (run / "export" / CARD).write_text("written by hand")
    with pytest.raises(ArtifactError, match="--overwrite"):
        write_card(run / "export", run)
    assert (run / "export" / CARD).read_text() == "written by hand"
    assert "# river" in write_card(run / "export", run, overwrite=True).read_text()


def test_a_model_of_another_run_is_refused(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", {"name": "other"})
    with pytest.raises(ArtifactError, match="was not exported from"):
        write_card(run / "export", other)
    assert not (run / "export" / CARD).exists()


@pytest.mark.parametrize("damage", ["no config", "cut weights", "no run", "no scores"])
def test_damage_is_named_or_unknown(damage: str, run: Path, tmp_path: Path) -> None:
    export = run / "export"
    if damage == "cut weights":
        (export / "model.safetensors").write_bytes(b"\x10\x00")
        assert row(write_card(export, run).read_text(), "Architecture", "parameters") == "unknown"
        return
    if damage == "no config":
        (export / "config.json").write_text("{")
        arguments: dict[str, Any] = {"run": run}
    elif damage == "no run":
        arguments = {"run": tmp_path / "nothing"}
        (export / "manifest.json").unlink()
    else:
        (tmp_path / "scores.json").write_text('{"results": {}}')
        arguments = {"run": run, "scores": [tmp_path / "scores.json"]}
    with pytest.raises(ArtifactError):
        write_card(export, **arguments)


def test_the_command_finds_the_run_around_an_export(run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["card", str(run / "export"), "--license", "mit", "--language", "zh"])
    assert done.exit_code == 0, done.output
    data = ModelCard.load(run / "export" / CARD).data
    assert (data.license, data.language, data.model_name) == ("mit", ["zh"], "river")
    alone = write_model(tmp_path / "alone", SHAPE | {"architectures": ["BertForMaskedLM"], "model_type": "bert"})
    done = CliRunner().invoke(app, ["card", str(alone), "--repo", "me/alone"])
    assert done.exit_code == 0, done.output
    card = (alone / CARD).read_text()
    assert ModelCard(card).data.pipeline_tag == "fill-mask"
    assert 'place = "me/alone"' in card
