"""The road as a whole: every stage, re-runs, changed configurations, the dry run, a stop and going on, plain reload."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pretrain import run as verb
from pretrain.config import RunConfig, config_from_dict, config_to_dict
from pretrain.evaluate import evaluate_model
from pretrain.export import export_model
from pretrain.files import ArtifactError, read_manifest, write_manifest
from pretrain.runtime import EXIT_STOPPED

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["the", "river", "runs", "over", "stones", "and", "under", "a", "bridge", "of", "wood", "to", "sea"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two thousand short documents, one a paragraph."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    words = len(WORDS)
    text = (" ".join(WORDS[(i * i + 3 * j * (i + 1)) % words] for j in range(5 + i % 40)) for i in range(2000))
    path.write_text("\n\n".join(text))
    return path


def config(corpus: Path, out: Path, architecture: str = "gpt2", **sections: dict[str, Any]) -> RunConfig:
    encoder = architecture in ("bert", "modernbert")
    raw: dict[str, Any] = {
        "name": f"small-{architecture}",
        "out": str(out),
        "tokenizer": {"algorithm": "wordpiece" if encoder else "byte-bpe", "vocab_size": 320},
        "data": {"train": [str(corpus)], "document": "paragraph", "sequence_length": 64, "workers": 1},
        "model": {"architecture": architecture, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2},
        "objective": {"kind": "mlm", "rate": 0.3} if encoder else {"kind": "causal"},
        "optimizer": {"name": "muon", "lr": 0.02},
        "train": {"steps": 6, "batch_tokens": 512, "precision": "fp32"},
        "checkpoint": {"every": 3},
        "evaluate": {"every": 3, "max_tokens": 1024},
        "log": {"to": ["console", "jsonl"]},
    }
    for section, keys in sections.items():
        raw[section] = raw.get(section, {}) | keys
    return config_from_dict(raw)


def digest(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def recorded() -> Console:
    return Console(file=io.StringIO(), width=200, soft_wrap=True)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, str]:
    """A finished run, and what it printed."""
    configuration = config(corpus, tmp_path_factory.mktemp("runs"))
    console = recorded()
    assert verb.run(configuration, console=console) == 0
    return configuration, text_of(console)


def test_every_stage_is_made(made: tuple[RunConfig, str]) -> None:
    configuration, printed = made
    for folder in ("tokenizer", "data", "train", "report", "export"):
        assert (configuration.directory / folder).is_dir()
    for name in ("config.yaml", "train/config.yaml", "train/metrics.jsonl", "train/result.json", "report/scores.json"):
        assert (configuration.directory / name).is_file()
    for word in ("tokens/s", "validation loss", "bits per byte", "export"):
        assert word in printed
    lines = [json.loads(line) for line in (configuration.directory / "train/metrics.jsonl").read_text().splitlines()]
    validation = [line["validation/loss"] for line in lines if "validation/loss" in line]
    assert [line["step"] for line in lines if "validation/loss" in line] == [0, 3, 6]
    assert validation[-1] < validation[0]


def test_a_second_call_skips_and_changes_nothing(made: tuple[RunConfig, str]) -> None:
    configuration, _ = made
    before, console = digest(configuration.directory), recorded()
    assert verb.run(configuration, console=console) == 0
    assert digest(configuration.directory) == before
    for stage in verb.STAGES:
        assert f"{stage}: made already, unchanged" in text_of(console)


def test_a_changed_configuration_is_refused_with_what_it_touches(made: tuple[RunConfig, str]) -> None:
    configuration, _ = made
    before = digest(configuration.directory)
    changed = configuration.model_copy(
        update={
            "optimizer": configuration.optimizer.model_copy(update={"lr": 0.5}),
            "export": configuration.export.model_copy(update={"dtype": "bf16"}),
        }
    )
    with pytest.raises(verb.ChangedConfigError) as caught:
        verb.run(changed, console=recorded())
    message = str(caught.value)
    assert "optimizer.lr: 0.02 -> 0.5 (touches train, evaluate, export)" in message
    assert "export.dtype: 'fp32' -> 'bf16' (touches export)" in message
    assert "name=small-gpt2-2" in message
    assert "--fresh" in message
    assert digest(configuration.directory) == before


def test_logging_elsewhere_is_no_change(made: tuple[RunConfig, str]) -> None:
    configuration, _ = made
    quiet = configuration.model_copy(update={"log": configuration.log.model_copy(update={"to": ("jsonl",)})})
    assert verb.run(quiet, console=recorded()) == 0


def test_a_lost_export_is_made_again_and_nothing_else(corpus: Path, tmp_path: Path) -> None:
    configuration = config(corpus, tmp_path)
    assert verb.run(configuration, console=recorded()) == 0
    before = digest(configuration.directory)
    (configuration.directory / "export" / "manifest.json").unlink()
    console = recorded()
    assert verb.run(configuration, console=console) == 0
    assert "train: made already" in text_of(console)
    assert "export: made already" not in text_of(console)
    assert digest(configuration.directory) == before


def test_an_altered_checkpoint_is_neither_scored_nor_exported(made: tuple[RunConfig, str], tmp_path: Path) -> None:
    """Refused with the file and the remedy; the remedy works; a copy of the model alone is taken as it is."""
    directory = tmp_path / made[0].name
    shutil.copytree(made[0].directory, directory)
    configuration = made[0].model_copy(update={"out": str(tmp_path)})
    assert verb.run(configuration, console=recorded()) == 0
    final = directory / "train" / "checkpoints" / "step-00000006"
    weights = final / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    altered = r"model\.safetensors` was altered.*remove `.*step-00000006`, and `pretrain run` trains on"
    for lost in ("report", "export"):
        kept = (directory / lost / "manifest.json").read_bytes()
        (directory / lost / "manifest.json").unlink()
        before = digest(directory)
        with pytest.raises(ArtifactError, match=altered):
            verb.run(configuration, console=recorded())
        assert digest(directory) == before
        (directory / lost / "manifest.json").write_bytes(kept)
    for source in (directory, final, final / "model"):
        with pytest.raises(ArtifactError, match=altered):
            export_model(source, tmp_path / "out")
    with pytest.raises(ArtifactError, match=altered):
        evaluate_model(final / "model", [made[0].data.train[0]])
    shutil.copytree(final / "model", tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "out")
    shutil.rmtree(final)
    console = recorded()
    assert verb.run(configuration, console=console) == 0
    assert "going on from step 3 of 6" in text_of(console)
    assert weights.read_bytes() == whole


@pytest.mark.parametrize("damage", [b'{"checkpoint": "st', b"\xff\xfe", b"[]", b'{"checkpoint": "step-00000006"}'])
def test_a_damaged_result_is_written_again(made: tuple[RunConfig, str], tmp_path: Path, damage: bytes) -> None:
    directory = tmp_path / made[0].name
    shutil.copytree(made[0].directory, directory)
    configuration = made[0].model_copy(update={"out": str(tmp_path)})
    result = directory / "train" / "result.json"
    before = json.loads(result.read_text())
    result.write_bytes(damage)
    assert not verb.is_made(configuration, "train")
    console = recorded()
    assert verb.run(configuration, console=console) == 0
    assert json.loads(result.read_text()) == before
    assert "export: made already, unchanged" in text_of(console)


def test_fresh_archives_the_old_run(corpus: Path, tmp_path: Path) -> None:
    configuration = config(corpus, tmp_path, train={"steps": 2})
    assert verb.run(configuration, console=recorded()) == 0
    before = digest(configuration.directory)
    changed = config(corpus, tmp_path, train={"steps": 3})
    assert verb.run(changed, fresh=True, console=recorded()) == 0
    archived = [path for path in tmp_path.iterdir() if ".archived-" in path.name]
    assert len(archived) == 1
    assert digest(archived[0]) == before
    assert json.loads((changed.directory / "train" / "result.json").read_text())["step"] == 3


def test_the_train_verb_alone_refuses_a_changed_configuration(made: tuple[RunConfig, str]) -> None:
    from pretrain.train import train

    configuration, _ = made
    before = digest(configuration.directory)
    longer = configuration.model_copy(update={"train": configuration.train.model_copy(update={"steps": 9})})
    with pytest.raises(verb.ChangedConfigError, match=r"train.steps: 6 -> 9 \(touches train"):
        train(longer, console=recorded())
    assert digest(configuration.directory) == before


def test_a_finished_run_is_taken_further_by_leave_and_made_anew_from_there(corpus: Path, tmp_path: Path) -> None:
    """Training, evaluation and export go on from the longer run; without leave, or without effect, nothing changes."""
    flat = {"kind": "constant", "warmup": 0}
    assert verb.run(config(corpus, tmp_path, train={"steps": 2}, schedule=flat), console=recorded()) == 0
    longer = config(corpus, tmp_path, train={"steps": 4}, schedule=flat)
    before = digest(longer.directory)
    with pytest.raises(verb.ChangedConfigError, match=r"train\.steps: 2 -> 4 .*--allow-change train\.steps"):
        verb.run(longer, console=recorded())
    assert digest(longer.directory) == before
    console = recorded()
    assert verb.run(longer, allow_changes=["train.steps"], console=console) == 0
    assert "data: made already" in text_of(console)
    assert "going on from step 2 of 4" in text_of(console)
    scores = json.loads((longer.directory / "report" / "manifest.json").read_text())["inputs"]
    final = longer.directory / "train" / "checkpoints" / "step-00000004"
    assert scores["checkpoint"] == read_manifest(final, "checkpoint").digest
    after = digest(longer.directory)
    console = recorded()
    assert verb.run(longer, console=console) == 0  # the same again needs no leave any more
    assert "train: made already, unchanged" in text_of(console)
    assert digest(longer.directory) == after


def test_a_first_try_that_made_nothing_binds_nobody(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing-here.txt"):
        verb.run(config(tmp_path / "nothing-here.txt", tmp_path), console=recorded())
    assert verb.run(config(corpus, tmp_path, train={"steps": 2}), console=recorded()) == 0


def test_training_goes_on_from_a_finished_model(corpus: Path, tmp_path: Path, made: tuple[RunConfig, str]) -> None:
    """`model.from` takes weights and tokenizer; the loss at step 0 is the finished model's, not a new one's."""
    first, _ = made
    raw = json.loads(json.dumps(config_to_dict(config(corpus, tmp_path, train={"steps": 2}))))
    raw |= {"name": "on", "model": {"from": str(first.directory / "export")}, "tokenizer": {}}
    raw["evaluate"] = {"every": 2}
    going_on = config_from_dict(raw)
    assert verb.run(going_on, console=recorded()) == 0
    lines = (going_on.directory / "train" / "metrics.jsonl").read_text().splitlines()
    scores = json.loads((first.directory / "report" / "scores.json").read_text())
    assert json.loads(lines[0])["validation/loss"] == pytest.approx(scores["validation"]["loss"], abs=1e-4)


def test_the_exports_home_must_fit_a_model_from_elsewhere(
    corpus: Path, tmp_path: Path, made: tuple[RunConfig, str]
) -> None:
    raw = json.loads(json.dumps(config_to_dict(config(corpus, tmp_path, train={"steps": 2}))))
    raw |= {"name": "on", "model": {"from": str(made[0].directory / "export")}, "tokenizer": {}}
    raw["export"]["to"] = "llama"
    with pytest.raises(ValueError, match=r"export.to: llama does not hold this model, gpt2 does"):
        verb.run(config_from_dict(raw), console=recorded())


def test_one_process_at_a_time(made: tuple[RunConfig, str]) -> None:
    from pretrain.prepare import prepare_data
    from pretrain.tokenizer import train_tokenizer
    from pretrain.train import train

    configuration, _ = made
    holding = (
        "import sys\nfrom pathlib import Path\nfrom pretrain.files import lock_directory\n"
        "with lock_directory(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", holding, str(configuration.directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for function in (train_tokenizer, prepare_data, train, verb.run):
            with pytest.raises(ArtifactError, match=f"process {holder.pid} on .* works in"):
                function(configuration, console=recorded())
        holder.kill()
    assert verb.run(configuration, console=recorded()) == 0, "a killed holder's lock clears itself"
    assert not (configuration.directory / ".lock").exists()


def test_changed_text_is_refused_before_anything_is_replaced(corpus: Path, tmp_path: Path) -> None:
    own = tmp_path / "text.txt"
    own.write_text(corpus.read_text())
    configuration = config(own, tmp_path / "runs", train={"steps": 2})
    assert verb.run(configuration, console=recorded()) == 0
    before = digest(configuration.directory)
    own.write_text(corpus.read_text() + "\n\nand a last word of the river")
    with pytest.raises(verb.ChangedConfigError, match="does not fit any more"):
        verb.run(configuration, console=recorded())
    assert digest(configuration.directory) == before


def test_data_made_again_are_trained_on_again(corpus: Path, tmp_path: Path) -> None:
    """The checkpoint holds the digests of its tokenizer and data; other ones make the training stage stale."""
    configuration = config(corpus, tmp_path, train={"steps": 2})
    assert verb.run(configuration, console=recorded()) == 0
    assert verb.is_made(configuration, "train")
    data = configuration.directory / "data"
    old = read_manifest(data, "data")
    other = dict.fromkeys(old.files, "0" * 64)
    write_manifest(data, kind="data", config=old.config, inputs=old.inputs, files=other, facts=old.facts)
    assert not verb.is_made(configuration, "train")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"hidden_size": 33}}, "hidden_size"),
        ({"model": {"rope_theta": 1e4}}, "rope_theta"),
        ({"model": {"num_key_value_heads": 3}}, "num_key_value_heads"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_before_anything_is_made(
    corpus: Path, tmp_path: Path, sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        verb.run(config(corpus, tmp_path, **sections), console=recorded())
    assert not list(tmp_path.iterdir())


def test_the_dry_run_takes_a_schedule_in_steps_and_a_budget_in_epochs(corpus: Path, tmp_path: Path) -> None:
    epochs = {"steps": None, "epochs": 2.0}
    configuration = config(corpus, tmp_path, schedule={"warmup": 100}, train=epochs)
    console = recorded()
    verb.dry_run(configuration, console=console)
    assert "known once the data are prepared" in text_of(console)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prepared", [False, True])
def test_the_dry_run_tells_memory_and_time_and_leaves_nothing(
    corpus: Path, tmp_path: Path, made: tuple[RunConfig, str], prepared: bool
) -> None:
    configuration = made[0] if prepared else config(corpus, tmp_path)
    before, console = digest(Path(configuration.out)), recorded()
    verb.dry_run(configuration, console=console)
    assert digest(Path(configuration.out)) == before
    for word in ("memory at most", "ETA of training", "parameters", "checkpoint"):
        assert word in text_of(console)


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "gpt2", "llama"])
def test_stopped_and_started_again_equals_straight_through(corpus: Path, tmp_path: Path, architecture: str) -> None:
    """SIGINT in the middle of training by the real command; the same command again ends with the same weights."""
    straight = config(corpus, tmp_path / "straight", architecture, model={"hidden_dropout": 0.1})
    assert verb.run(straight, console=recorded()) == 0
    cut = config(corpus, tmp_path / "cut", architecture, model={"hidden_dropout": 0.1})
    code = (
        "import os, signal, sys\n"
        "from pretrain import run\nfrom pretrain.config import load_config\nfrom pretrain.training import trainer\n"
        "step = trainer.Trainer._step\n"
        "def stopping(self, progress, *rest):\n"
        "    step(self, progress, *rest)\n"
        "    if progress.step == 2:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "trainer.Trainer._step = stopping\n"
        "sys.exit(run.run(load_config(sys.argv[1])))\n"
    )
    from pretrain.config import dump_config

    file = tmp_path / "cut.yaml"
    file.write_text(dump_config(cut))
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert "stopped by SIGINT at step 2 of 6" in done.stderr
    assert verb.run(cut, console=recorded()) == 0
    ours, theirs = (
        made.directory / "train" / "checkpoints" / "step-00000006" / "model" / "model.safetensors"
        for made in (cut, straight)
    )
    assert ours.read_bytes() == theirs.read_bytes()


def test_plain_transformers_reloads_it(made: tuple[RunConfig, str], corpus: Path, tmp_path: Path) -> None:
    """`scripts/reload.py` in a process that cannot import this package: logits equal, text sampled, masks filled."""
    encoder = config(corpus, tmp_path, "bert")
    assert verb.run(encoder, console=recorded()) == 0
    (tmp_path / "pretrain.py").write_text("raise ImportError('this process must not import pretrain')\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "reload.py"), str(made[0].directory), str(encoder.directory)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "equal within" in done.stdout
    assert "sampled" in done.stdout
    assert "->" in done.stdout
