"""`pretrain plan`: a table and JSON from a configuration alone; budgets, bad input, nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

from pretrain.building import build_model, model_config
from pretrain.cli import app
from pretrain.config import RunConfig, config_from_dict, config_to_dict, load_config
from pretrain.data.loader import DataPlane
from pretrain.plan import Machine, make_plan, planned_facts, planned_model_config
from pretrain.planning.gpus import find_gpu
from tests.gpu.synthetic import make_run

SHIPPED = ("bert-base", "gpt2-small", "llama-350m", "modernbert-base", "quickstart-bert", "quickstart-gpt")


def _machine(gpu: str = "h100", gpus: int = 8, nodes: int = 1, *assume: str) -> Machine:
    return Machine.of(find_gpu(gpu), gpus, nodes, assume)


def _invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_run_is_planned_without_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(name)
    plan = make_plan(config, _machine())
    assert plan["chosen"]["tokens_per_second"] > 0
    assert plan["chosen"]["memory_gib"]["total"] < plan["machine"]["memory_gib"]
    for option in plan["options"]:
        parts = {key: value for key, value in option["memory_gib"].items() if key != "total"}
        assert sum(parts.values()) == pytest.approx(option["memory_gib"]["total"])
    json.dumps(plan)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SHIPPED)
def test_the_model_is_that_of_the_run(name: str) -> None:
    config = load_config(name)
    planned = planned_model_config(config)
    made = model_config(config, {"vocab_size": planned.vocab_size, "special_ids": {}})
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
        assert getattr(planned, key) == getattr(made, key)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return make_run(tmp_path_factory.mktemp("plan"), tokens=40_000, vocab_size=300)


def test_a_prepared_run_counts_its_own_vocabulary_and_rows(prepared: RunConfig) -> None:
    model = build_model(prepared)
    assert planned_facts(prepared).size == sum(parameter.numel() for parameter in model.parameters())
    train = prepared.train.model_copy(update={"steps": None, "tokens": None, "minutes": None, "epochs": 3.0})
    plan = make_plan(prepared.model_copy(update={"train": train}), _machine(gpus=1))
    rows = DataPlane.from_config(prepared, "train").num_rows
    assert plan["budget"]["steps"] == -(-3 * rows // prepared.rows_per_batch)


def test_budgets_in_tokens_steps_and_time() -> None:
    batch = 524_288
    plan = make_plan(load_config("llama-350m", ["train.steps=100"]), _machine())
    assert plan["budget"]["tokens"] == 100 * batch
    assert plan["budget"]["hours_of_training"] * 3600 == pytest.approx(100 * plan["chosen"]["seconds_per_step"])
    timed = make_plan(load_config("llama-350m", ["train.hours=2"]), _machine())
    assert timed["budget"]["hours_of_training"] == pytest.approx(2, rel=0.01)
    assert timed["budget"]["tokens"] == pytest.approx(7200 * timed["chosen"]["tokens_per_second"], rel=0.01)
    with pytest.raises(ValueError, match=r"train\.epochs: 3.*train\.tokens"):
        make_plan(load_config("llama-350m", ["train.epochs=3", "name=not-there"]), _machine())


def test_what_the_configuration_sets_is_kept() -> None:
    chosen = make_plan(load_config("llama-350m", ["train.strategy=zero3", "train.micro_batch=3"]), _machine())["chosen"]
    assert chosen["strategy"] == "zero3"
    assert chosen["micro_batch"] == 3
    hybrid = load_config("llama-350m", ["train.strategy=fsdp2", "train.shard_size=4"])
    chosen = make_plan(hybrid, _machine(gpus=16, nodes=2))["chosen"]
    assert chosen["set"] == ["train.strategy=fsdp2", f"train.micro_batch={chosen['micro_batch']}", "train.shard_size=4"]
    for setting in chosen["set"]:
        load_config("llama-350m", [setting])
    offload = load_config("llama-350m", ["train.strategy=fsdp2", "train.offload=all"])
    chosen = make_plan(offload, _machine())["chosen"]
    assert chosen["set"][-1] == "train.offload=all"
    assert chosen["host_gib_per_node"] > 0
    assert make_plan(offload, _machine("h100", 8, 1, "host_gib=0.1"))["chosen"] is None


def test_a_large_model_is_sharded_with_the_reason() -> None:
    sizes = ["model.hidden_size=4096", "model.num_hidden_layers=32", "model.num_attention_heads=32"]
    plan = make_plan(load_config("llama-350m", sizes), _machine(gpus=16, nodes=2))
    assert "fsdp2" in plan["chosen"]["strategy"] or "zero" in plan["chosen"]["strategy"]
    assert "ddp" in plan["chosen"]["reason"]
    assert plan["checkpoint"]["sharded"]
    lost = make_plan(load_config("llama-350m", [*sizes, "train.strategy=ddp"]), _machine(gpus=16, nodes=2))
    assert lost["chosen"] is None


def test_the_command_prints_writes_and_names_every_assumption(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    done = _invoke("gpt2-small", "--gpu", "a100-40gb", "--gpus", "4", "--assume", "waste=0.1", "--output", str(path))
    assert done.exit_code == 0, done.output
    plan = json.loads(path.read_text())
    assert plan["assumptions"]["waste"]["source"] == "yours"
    for name in plan["assumptions"]:
        assert name in done.output
    for words in ("124,", "take ddp", "tokens/s", "goodput", "bytes a value", "train.gradient_checkpointing=true"):
        assert words in done.output
    assert max(map(len, done.output.splitlines())) > 100  # a table is not cut to the terminal's width


def test_nothing_fits_is_an_exit_code_and_a_way_out() -> None:
    done = _invoke("llama-350m", "--gpu", "t4", "model.num_hidden_layers=80")
    assert done.exit_code == 1
    assert "nothing that the configuration allows fits" in done.output
    assert "more GPUs" in done.output or "gradient_checkpointing" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "z9000"], r"--gpu: `z9000` is not in the table.*h200.*--memory-gib"),
        (["--gpus", "9", "--nodes", "2"], r"--gpus: 9 GPUs.*2 nodes.*--gpus 8 or --gpus 10"),
        (["--gpus", "0"], r"at least 1"),
        (["--gpus", "5000"], r"train\.batch_tokens.*fewer than 5000 GPUs; raise it to"),
        (["--assume", "wast=1"], r"did you mean `waste`"),
        (["tokenizer={from: /not/there}"], r"tokenizer\.from: `/not/there`"),
    ],
)
def test_bad_input_names_the_remedy(arguments: list[str], message: str) -> None:
    done = _invoke("gpt2-small", *arguments)
    assert isinstance(done.exception, ValueError)
    with pytest.raises(ValueError, match=message):
        raise done.exception


def test_a_grown_model_and_a_detector_are_those_that_the_run_builds(tmp_path: Path, prepared: RunConfig) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": planned_model_config(prepared).vocab_size}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 128}
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "small")
    electra = transformers.ElectraConfig(**sizes, embedding_size=8)
    transformers.ElectraForPreTraining(electra).save_pretrained(tmp_path / "detector")
    grown = {"from": str(tmp_path / "small"), "grow": {"num_hidden_layers": 4, "hidden_size": 32}}
    plain = config_to_dict(prepared)
    for model, objective in ((grown, {"kind": "mlm"}), ({"from": str(tmp_path / "detector")}, {"kind": "rtd"})):
        config = config_from_dict(plain | {"model": model, "objective": objective})
        assert planned_facts(config).size == sum(one.numel() for one in build_model(config).parameters())
    plain["tokenizer"] = {"extend": 1_000}
    extended = config_from_dict(plain | {"model": {"from": str(tmp_path / "small")}, "objective": {"kind": "mlm"}})
    assert planned_model_config(extended).vocab_size == -(-(sizes["vocab_size"] + 1_000) // 64) * 64
