"""Going on from a model that is there: the loss before the first step, the optimizer's moments, what is forgotten."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from data_builders import write_tokenizer
from rich.console import Console
from torch.nn import functional as F
from transformers import AutoTokenizer

from pretrain import run as verb
from pretrain.config import RunConfig, config_from_dict, dump_config
from pretrain.continuing import gain_table
from pretrain.data.loader import DataPlane
from pretrain.evaluate import evaluate_model, evaluate_run
from pretrain.evaluation.own_pieces import bits_per_byte_in_old_pieces
from pretrain.evaluation.passes import Passes
from pretrain.files import ArtifactError
from pretrain.prepare import prepare_data
from pretrain.tokenizer import train_tokenizer
from pretrain.train import build_trainer, check
from pretrain.training.checkpoint import load_checkpoint
from pretrain.training.trainer import Trainer

OLD = [f"the {word} runs over stone {number}" for number in range(60) for word in ("river", "road", "fox")]
NEW = [f"int {word}_{number} = make_{word}({number});" for number in range(40) for word in ("left", "right")]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("continuing")
    for name, lines in {"old": OLD, "new": NEW}.items():
        (folder / f"{name}.txt").write_text("\n".join(lines[:-20]))
        (folder / f"{name}-held-out.txt").write_text("\n".join(lines[-20:]))
    return folder


def config(root: Path, name: str, **sections: Any) -> RunConfig:
    """A tiny run on the old text, in steps without a warm-up, both held-out texts scored."""
    named = [{"name": one, "files": [str(root / f"{one}-held-out.txt")]} for one in ("old", "new")]
    raw: dict[str, Any] = {
        "name": name,
        "out": str(root / "runs"),
        "tokenizer": {"algorithm": "byte-bpe", "vocab_size": 320},
        "data": {"train": [str(root / "old.txt")], "document": "line", "sequence_length": 32, "validation": named},
        "model": {"architecture": "gpt2", **SIZES},
        "objective": {"kind": "causal"},
        "optimizer": {"lr": 1e-2},
        "schedule": {"kind": "constant", "warmup": 0},
        "train": {"steps": 4, "batch_tokens": 128, "precision": "fp32", "micro_batch": 4},
        "checkpoint": {"every": 2, "keep": 9},
        "log": {"to": ["jsonl"]},
    }
    for section, keys in sections.items():
        replaced = section in ("model", "tokenizer", "objective")
        raw[section] = keys if replaced else raw[section] | keys
    return config_from_dict(raw)


def trainer_of(made: RunConfig, console: Console | None = None) -> Trainer:
    train_tokenizer(made, console=console or Console(file=io.StringIO()))
    prepare_data(made)
    return build_trainer(made, console=console or Console(file=io.StringIO()))


def step_of(made: RunConfig, step: int) -> Path:
    return made.directory / "train" / "checkpoints" / f"step-{step:08d}"


def lines_of(made: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (made.directory / "train" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def base(root: Path) -> RunConfig:
    made = config(root, "base")
    assert verb.run(made, console=Console(file=io.StringIO())) == 0
    return made


# --- the optimizer's state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [True, False])
def test_with_the_moments_a_run_goes_on_as_if_it_had_not_ended(root: Path, base: RunConfig, taken: bool) -> None:
    """The batches of steps 2 and 3 after the model of step 2: bit for bit what the first run did, and not without."""
    model = {"from": str(step_of(base, 2) / "model"), **({"optimizer_state": True} if taken else {})}
    on = config(root, f"on-{taken}", model=model, tokenizer={}, train={"steps": 2})
    console = Console(file=io.StringIO(), width=300)
    trainer = trainer_of(on, console)
    batch = trainer.data.batch
    trainer.data.batch = lambda step, rows=None: batch(step + 2, rows)  # type: ignore[method-assign]
    assert trainer.train().finished
    straight, ours = (load_checkpoint(path) for path in (step_of(base, 4), step_of(on, 2)))
    same = all(torch.equal(tensor, ours.optimizer.tensors[name]) for name, tensor in straight.optimizer.tensors.items())
    before = [line["loss"] for line in lines_of(base) if "loss" in line]
    after = [line["loss"] for line in lines_of(on) if "loss" in line]
    assert (before[2:] == after) == taken
    assert same == taken
    assert ("the moments of step-00000002, 2 updates" in console.file.getvalue()) == taken  # type: ignore[attr-defined]


def test_moments_go_along_when_the_vocabulary_grows(root: Path, base: RunConfig) -> None:
    sources = {"train": [str(root / "new.txt")]}
    model = {"from": str(step_of(base, 4) / "model"), "optimizer_state": True}
    on = config(root, "taught", model=model, tokenizer={"extend": 30}, data=sources, train={"steps": 1})
    trainer = trainer_of(on)
    assert trainer.at_start is not None
    trainer.at_start(trainer.engine)
    made_of = json.loads((on.directory / "tokenizer" / "extended.json").read_text())
    saved = load_checkpoint(step_of(base, 4)).optimizer.tensors
    table = "model.embed_tokens.weight"
    assert saved[f"{table}/exp_avg"].shape[0] == 320
    for name in trainer.engine.names():
        for key, tensor in trainer.engine.state(name).items():
            old = saved[f"{name}/{key}"]
            assert torch.equal(tensor[:320] if name == table and key != "step" else tensor, old), f"{name}/{key}"
    first, second = (trainer.engine.state(table)[key] for key in ("exp_avg", "exp_avg_sq"))
    assert len(first) == 384
    assert not first[320:].any()
    for new, parts in made_of.items():
        assert torch.equal(second[int(new)], saved[f"{table}/exp_avg_sq"][parts].mean(0))
    assert (second[320:] > 0).all()
    assert trainer.train().finished


def test_a_state_that_is_not_there_or_anothers_is_refused(root: Path, base: RunConfig) -> None:
    model = {"from": str(base.directory / "export"), "optimizer_state": True}
    with pytest.raises(ValueError, match=r"no checkpoint's model.*give model.from: .*step-00000004/model"):
        check(config(root, "plain", model=model, tokenizer={}))
    model = {"from": str(step_of(base, 4) / "model"), "optimizer_state": True}
    for other in ({"name": "stable-adamw"}, {"name": "muon"}):
        with pytest.raises(
            ValueError, match=f"was trained with adamw, and this run has optimizer.name: {other['name']}"
        ):
            check(config(root, "other", model=model, tokenizer={}, optimizer=other))


def test_a_damaged_state_is_found_before_it_is_used(root: Path, base: RunConfig, tmp_path: Path) -> None:
    copy = tmp_path / "step-00000004"
    shutil.copytree(step_of(base, 4), copy)
    file = next((copy / "optimizer").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    model = {"from": str(copy / "model"), "optimizer_state": True}
    trainer = trainer_of(config(root, "damaged", model=model, tokenizer={}))
    with pytest.raises(ArtifactError, match=file.name):
        trainer.train()


def test_moments_of_another_class_do_not_fit(root: Path, base: RunConfig) -> None:
    """A stock class has other names: its own state goes on with it, and not with ours."""
    stock = {"from": str(base.directory / "export"), "class": "stock"}
    first = config(root, "stock", model=stock, tokenizer={}, train={"steps": 1})
    assert trainer_of(first).train().finished
    model = {"from": str(step_of(first, 1) / "model"), "optimizer_state": True}
    on = trainer_of(config(root, "stock-on", model=model | {"class": "stock"}, tokenizer={}, train={"steps": 1}))
    assert on.train().finished
    assert {int(value) for name, value in load_checkpoint(step_of(on.config, 1)).optimizer.tensors.items()
            if name.endswith("/step")} == {2}  # fmt: skip
    ours = trainer_of(config(root, "stock-ours", model=model, tokenizer={}, train={"steps": 1}))
    with pytest.raises(ValueError, match=r"model.optimizer_state: .* does not fit: .*leave model.optimizer_state out"):
        ours.train()


# --- the loss before the first step ---------------------------------------------------------------------------------


def stock_model(root: Path, name: str) -> Path:
    """A model of transformers' own class with weights drawn at random, beside its tokenizer."""
    directory = root / f"released-{name}"
    if directory.exists():
        return directory
    write_tokenizer(directory, {"gpt2": "gpt2", "llama": "llama", "bert": "bert"}[name], " ".join([*OLD, *NEW]), 300)
    (directory / "manifest.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    sizes = {"vocab_size": 320, "max_position_embeddings": 64, "pad_token_id": ids["pad_token_id"]}
    if name == "gpt2":
        made: Any = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=320, **ids)
        )
    elif name == "llama":
        made = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SIZES, **(sizes | ids), num_key_value_heads=1, intermediate_size=24)
        )
    else:
        made = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **sizes, intermediate_size=24))
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    made.tie_weights()
    made.save_pretrained(directory)
    return directory


def continued(root: Path, name: str, label: str, *, train: str = "old", **model: Any) -> RunConfig:
    directory = str(stock_model(root, name))
    return config(
        root,
        f"{label}-{name}",
        model={"from": directory, **model},
        tokenizer={"from": directory},
        objective={"kind": "mlm" if name == "bert" else "causal"},
        data={"train": [str(root / f"{train}.txt")]},
        train={"steps": 1},
    )


def scores_at_start(made: RunConfig) -> dict[str, float]:
    """What training measures before its first step."""
    result = trainer_of(made).train()
    (line,) = [line for line in lines_of(made) if line["step"] == 0]
    assert result.progress.first_scores == {name: value for name, value in line.items() if "/" in name}
    return result.progress.first_scores


def by_hand(made: RunConfig, split: str) -> tuple[float, float, int]:
    """Losses by transformers' own class, each document alone: of all targets, of the ends of documents; targets."""
    auto = transformers.AutoModelForMaskedLM if made.objective.kind == "mlm" else transformers.AutoModelForCausalLM
    model: Any = auto.from_pretrained(made.model.from_, dtype=torch.float32).eval()
    total = ends = 0.0
    count = 0
    for batch in DataPlane.validation(made, split).batches():
        arrays = {name: torch.as_tensor(array) for name, array in batch.arrays.items()}
        targets = arrays["labels" if made.objective.kind == "mlm" else "shift_labels"]
        for row, documents in enumerate(arrays["document_ids"]):
            for number in documents.unique().tolist():
                own = documents == number
                wanted = targets[row, own]
                if number == 0 or not (wanted != -100).any():
                    continue
                with torch.no_grad():
                    logits = model(input_ids=arrays["input_ids"][row : row + 1, own]).logits[0].double()
                losses = F.cross_entropy(logits, wanted, reduction="none", ignore_index=-100)
                total, ends = total + float(losses.sum()), ends + float(losses[wanted != -100][-1])
                count += int((wanted != -100).sum())
    return total, ends, count


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_the_first_loss_is_that_of_the_stock_class(root: Path, name: str) -> None:
    """Of both validation sets: our class, transformers' class in our rows, and that alone, document by document.

    `pretrain evaluate` scores a causal model's documents without their ends; with them its sum is the same.
    """
    made = continued(root, name, "first")
    first = scores_at_start(made)
    stock = evaluate_run(continued(root, name, "first", **{"class": "stock"}), Path(str(made.model.from_)))
    for split in ("validation-old", "validation-new"):
        total, ends, count = by_hand(made, split)
        assert first[f"{split}/num_targets"] == count
        assert first[f"{split}/loss"] == pytest.approx(total / count, abs=1e-4)
        assert stock[split]["loss"] == pytest.approx(first[f"{split}/loss"], abs=1e-4)
        if name != "bert":
            file = str(root / f"{split.removeprefix('validation-')}-held-out.txt")
            scores = evaluate_model(str(made.model.from_), [file], document="line", context=64)
            assert count == scores["tokens"] + scores["text"]["documents"]
            assert (scores["loss"] * scores["tokens"] + ends) / count == pytest.approx(first[f"{split}/loss"], abs=1e-4)


def test_the_first_loss_of_a_wider_model_is_that_of_the_one_it_is_tiled_from(root: Path) -> None:
    made = continued(root, "llama", "wider", grow={"hidden_size": 32})
    first = scores_at_start(made)
    total, _, count = by_hand(made, "validation-old")
    assert first["validation-old/loss"] == pytest.approx(total / count, abs=1e-4)


# --- gained and forgotten -------------------------------------------------------------------------------------------


def test_a_run_shows_what_it_gained_and_what_it_forgot(root: Path, base: RunConfig) -> None:
    """Replay of the old text, more pieces, both held-out texts: the table says what the log says."""
    sources = [
        {"name": "new", "files": [str(root / "new.txt")], "weight": 0.8},
        {"name": "old", "files": [str(root / "old.txt")], "weight": 0.2},
    ]
    on = config(
        root,
        "gain",
        model={"from": str(base.directory / "export")},
        tokenizer={"extend": 20},
        data={"train": sources},
        train={"steps": 12},
        schedule={"kind": "wsd", "warmup": 2, "decay": "50%"},
    )
    console = Console(file=io.StringIO(), width=200)
    assert verb.run(on, console=console) == 0
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    first, last = lines_of(on)[0], lines_of(on)[-1]
    known, scores = (json.loads((made.directory / "report" / "scores.json").read_text()) for made in (base, on))
    for split in ("validation-old", "validation-new"):
        before, after = known[split]["bits_per_byte"], scores[split]["bits_per_byte"]
        assert scores[split]["bits_per_byte_before"] == pytest.approx(before, rel=1e-5)  # in the first run's own pieces
        row = [line for line in shown.splitlines() if split in line and "bits per byte" in line][-1]
        for number in (f"{before:.4f}", f"{first[f'{split}/bits_per_byte']:.4f}", f"{after:.4f}"):
            assert number in row
        assert float(row.split("│")[-2]) == pytest.approx(after - before, abs=1e-4)
    assert last["validation-new/loss"] < first["validation-new/loss"]
    result = json.loads((on.directory / "train" / "result.json").read_text())
    assert result["scores_at_start"] == {name: value for name, value in first.items() if "/" in name}
    again = build_trainer(on, console=Console(file=io.StringIO())).train()
    assert again.progress.first_scores == result["scores_at_start"]  # a checkpoint holds them


def test_the_table_of_a_masked_model_is_in_nats_and_of_none_without_a_start_there_is_none() -> None:
    scores = {"old/loss": 2.0, "old/accuracy": 0.5, "own": 1.0}
    table = gain_table({"step": 7, "scores_at_start": scores, "scores": scores | {"old/loss": 2.25}}, {"old": {}})
    assert table is not None
    assert [list(column.cells) for column in table.columns] == [["old"], ["loss"], ["2.0000"], ["2.2500"], ["+0.2500"]]
    assert gain_table({"step": 7, "scores": scores}, {}) is None


@pytest.mark.parametrize("bos", [None, 1])
def test_old_pieces_are_scored_as_the_rows_of_a_run(root: Path, bos: int | None) -> None:
    """By hand, each document alone: without a BOS nothing predicts its first token."""
    model: Any = transformers.GPT2LMHeadModel.from_pretrained(stock_model(root, "gpt2")).eval()
    documents = [[5, 9, 30, 7], [8, 8], [12, 30]]
    made_of = {30: [6, 11]}  # a new piece
    total = 0.0
    for document in documents:
        ids = [old for token in document for old in made_of.get(token, [token])] + [2]
        row = torch.tensor([ids if bos is None else [bos, *ids]])
        with torch.no_grad():
            total += float(F.cross_entropy(model(input_ids=row).logits[0, :-1], row[0, 1:], reduction="sum"))
    ends = np.cumsum([len(document) for document in documents])
    store = SimpleNamespace(shard=lambda number: (np.concatenate(documents), ends))
    tokens = SimpleNamespace(bos=bos, eos=2, pad=None)
    split: Any = SimpleNamespace(num_bytes=50, tokens=tokens, shards=[0], store=store)
    found = bits_per_byte_in_old_pieces(model, split, made_of, Passes(torch.device("cpu")), window=32)
    assert found == pytest.approx(total / math.log(2) / 50, rel=1e-5)


def test_a_model_that_the_run_does_not_fit_is_refused_before_anything_is_made(root: Path) -> None:
    directory = str(stock_model(root, "gpt2"))
    for sections, words in (
        ({"data": {"sequence_length": 128}}, r"sequence_length: 128 is longer than the 64 positions"),
        ({"objective": {"kind": "mlm"}}, "objective.kind: mlm needs an encoder"),
        ({"model": {"from": directory, "class": "stock"}, "data": {"sequence_length": 128}}, "the 64 positions"),
    ):
        made = config(root, "unfit", **{"model": {"from": directory}, "tokenizer": {}} | sections)
        with pytest.raises(ValueError, match=words):
            check(made)
        assert not made.directory.exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_every_engine_takes_the_moments(root: Path, base: RunConfig, strategy: str) -> None:
    """Two processes, past a vocabulary that grew: the losses of one process."""
    model = {"from": str(step_of(base, 4) / "model"), "optimizer_state": True}
    keys: dict[str, Any] = {"model": model, "tokenizer": {"extend": 30}, "data": {"train": [str(root / "new.txt")]}}
    alone = config(root, f"alone-{strategy}", **keys, train={"steps": 3})
    assert trainer_of(alone).train().finished
    together = config(root, f"together-{strategy}", **keys, train={"steps": 3, "micro_batch": 2, "strategy": strategy})
    train_tokenizer(together)
    prepare_data(together)
    file = root / f"{strategy}.yaml"
    file.write_text(dump_config(together))
    command = [sys.executable, "-m", "pretrain", "train", str(file), "--processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "the moments of step-00000004, 4 updates" in done.stderr
    losses = [[line["loss"] for line in lines_of(made) if "loss" in line] for made in (alone, together)]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
