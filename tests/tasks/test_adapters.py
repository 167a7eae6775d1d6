"""Adapters: what is trained, checkpoints in PEFT's form and exact, and the merged model that needs no PEFT."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer
from writing_models import byte_tokenizer, model_directory, tuning, write_jsonl

from pretrain.config_loop import OptimizerConfig
from pretrain.config_task import ClassificationTask, LoraConfig, TextTask, TunedModel, load_tuning
from pretrain.files import ArtifactError
from pretrain.finetune import finetune
from pretrain.tasks.adapters import AdapterStore, add_adapters, check_choice, read_adapted, write_merged
from pretrain.tasks.heads import install, read_model
from pretrain.tasks.rows import Row
from pretrain.tasks.sentences import Classification
from pretrain.tasks.texts import TextToText
from pretrain.training.optim import build_optimizer

peft = pytest.importorskip("peft")

CPU = torch.device("cpu")
ROWS = [
    Row({"text": text, "label": label, "source": text, "target": label}, f"rows:{number}")
    for number, (text, label) in enumerate([("good one", "yes"), ("bad", "no"), ("good", "yes"), ("a bad one", "no")])
]


def task_for(architecture: str) -> Any:
    tokenizer = byte_tokenizer()
    if architecture == "bert":
        task: Any = Classification(ClassificationTask(kind="classification", train=("x",)), tokenizer, causal=False)
    else:
        section = TextTask(kind="text-to-text", train=("x",), max_length=32, max_target_length=8)
        task = TextToText(section, tokenizer, causal=architecture in ("llama", "gpt2"))
    task.fit(ROWS)
    return task


def adapted(root: Path, architecture: str, **keys: Any) -> tuple[Any, Any, TunedModel, list[str]]:
    """A task, the model with adapters that were drawn, the section that describes it, and its new weights."""
    task = task_for(architecture)
    chosen = TunedModel.model_validate({"from": str(model_directory(root, architecture)), "lora": {"rank": 4, **keys}})
    model, new = read_model(chosen, task, 3)
    install(model, task)
    assert chosen.adapters is not None
    model = add_adapters(model, new, chosen.adapters, 3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    return task, model.eval(), chosen, new


def batch_of(task: Any) -> dict[str, Tensor]:
    arrays = task.collate(task.encode(ROWS, training=True))
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def logits_of(task: Any, model: Any) -> Tensor:
    batch = batch_of(task)
    labels = batch.pop("labels")
    with torch.no_grad():
        found: Tensor = model(**task.given(model, batch, labels)).logits
    return found


def test_adapters_and_the_new_head_are_trained_and_nothing_else(tmp_path: Path) -> None:
    task, model, _, new = adapted(tmp_path, "bert")
    assert "classifier.weight" in new
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {
        f"base_model.model.{module}.modules_to_save.default.{kind}"
        for module in ("bert.pooler", "classifier")
        for kind in ("dense.weight", "dense.bias", "weight", "bias")
        if ("dense" in kind) == (module == "bert.pooler")
    }
    optimizer = build_optimizer(model, OptimizerConfig(name="adamw", lr=1e-3))
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    batch = batch_of(task)
    loss = model(**batch, num_items_in_batch=4).loss  # the task's, through PEFT's forward pass
    assert torch.allclose(loss, task.loss(type("Outputs", (), {"logits": logits_of(task, model)}), batch["labels"]) / 4)
    loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


@pytest.mark.parametrize(
    ("architecture", "auto", "kind"),
    [
        ("bert", AutoModelForSequenceClassification, "SEQ_CLS"),
        ("gpt2", AutoModelForCausalLM, "CAUSAL_LM"),
        ("llama", AutoModelForCausalLM, "CAUSAL_LM"),
        ("marian", AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
    ],
)
def test_the_directory_is_peft_s_and_the_merged_model_plain(
    tmp_path: Path, architecture: str, auto: Any, kind: str
) -> None:
    task, model, chosen, _ = adapted(tmp_path, architecture)
    expected = logits_of(task, model)
    store = AdapterStore(str(chosen.from_), task.head, Path(str(chosen.from_)))
    checkpoint, merged, theirs = (tmp_path / name for name in ("checkpoint", "merged", "theirs"))
    checkpoint.mkdir()
    merged.mkdir()
    digests = store.write(model, dict(model.named_parameters()), checkpoint)
    assert set(digests) == {path.name for path in checkpoint.iterdir()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(theirs)
    own, saved = (load_file(directory / "adapter_model.safetensors") for directory in (checkpoint, theirs))
    assert own.keys() == saved.keys()
    assert all(torch.equal(own[name], saved[name]) for name in own)

    weights = store.read(model, checkpoint)
    assert set(weights) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())

    again = read_adapted(chosen, checkpoint, task, 8, CPU)  # another seed: nothing that counts is drawn
    assert torch.equal(logits_of(task, again), expected)

    write_merged(chosen, checkpoint, merged, task, 8)
    plain = auto.from_pretrained(merged).eval()
    assert "Peft" not in type(plain).__name__
    assert torch.allclose(logits_of(task, plain), expected, atol=1e-4, rtol=1e-4)
    labels = {"num_labels": 2} if architecture == "bert" else {}
    base = auto.from_pretrained(chosen.from_, **labels).eval()
    loaded = peft.PeftModel.from_pretrained(base, merged / "adapter").eval()
    assert loaded.peft_config["default"].task_type == kind
    assert torch.equal(logits_of(task, loaded), expected)
    assert len(AutoTokenizer.from_pretrained(merged)) == len(task.tokenizer)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_an_interrupted_run_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_directory(tmp_path, "bert")
    rows = [{"text": f"{word} {n}", "label": word} for word in ("good", "bad") for n in range(12)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    task = {"kind": "classification", "train": ["rows.jsonl"], "test": ["rows.jsonl"]}
    shape = {"evaluate": {"every": 3}, "checkpoint": {"keep": 2}, "model": {"lora": {"rank": 4, "dropout": 0.1}}}
    whole = tuning(tmp_path, task, "name=whole", "train.steps=6", **shape)
    assert finetune(model, whole) == 0

    parts = tuning(tmp_path, task, "name=parts", "train.steps=6", **shape)
    evaluate, calls = Classification.evaluate, []

    def interrupted(self: Classification, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:  # that of step 6: step 3 is saved
            raise KeyboardInterrupt
        return evaluate(self, *arguments)

    monkeypatch.setattr(Classification, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, parts)
    monkeypatch.undo()
    assert finetune(model, parts) == 0
    out = tmp_path / "out"
    starts = (out / "parts" / "seed-0" / "train" / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in starts] == [0, 3]
    for name in ("model/adapter_model.safetensors", "optimizer/optimizer-00001-of-00001.safetensors"):
        first, second = (out / run / "seed-0/train/checkpoints/step-00000006" / name for run in ("whole", "parts"))
        assert first.read_bytes() == second.read_bytes(), name
    scores = [json.loads((out / run / "seed-0" / "result.json").read_text())["test"] for run in ("whole", "parts")]
    assert scores[0] == scores[1]
    plain = AutoModelForSequenceClassification.from_pretrained(out / "whole" / "model")
    assert plain.config.id2label == {0: "bad", 1: "good"}
    before = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2).state_dict()
    changed = {name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "bert.embeddings.word_embeddings.weight" not in changed
    assert "bert.encoder.layer.0.attention.self.query.weight" in changed

    another = model_directory(tmp_path / "another", "bert", drawn=0.2)
    (model / "model.safetensors").write_bytes((another / "model.safetensors").read_bytes())
    (out / "parts" / "seed-0" / "result.json").unlink()
    with pytest.raises(ValueError, match=r"the checkpoint saw other examples: model was"):
        finetune(model, parts)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.lora adapts pretrained weights"):
        check_choice(TunedModel(lora=4, weights="random"), "single")
    with pytest.raises(ValueError, match=r"train.strategy: fsdp2 splits the weights"):
        check_choice(TunedModel(lora=4), "fsdp2")
    check_choice(TunedModel(weights="random"), "fsdp2")
    with pytest.raises(ValueError, match=r"model.lora.targets: \['nowhere'\]"):
        adapted(tmp_path / "targets", "llama", targets=("nowhere",))
    task, model, chosen, _ = adapted(tmp_path / "other", "llama")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    store = AdapterStore(str(chosen.from_), task.head, Path(str(chosen.from_)))
    store.write(model, dict(model.named_parameters()), checkpoint)
    _, fewer, _, _ = adapted(tmp_path / "fewer", "llama", targets=("q_proj",))
    with pytest.raises(ArtifactError, match=r"are of another shape"):
        store.read(fewer, checkpoint)
    (checkpoint / "adapter_model.safetensors").rename(checkpoint / "adapter_model.bin")
    with pytest.raises(ArtifactError, match=r"lacks adapter_model.safetensors"):
        read_adapted(chosen, checkpoint, task, 0, CPU)


def test_one_key_is_enough(tmp_path: Path) -> None:
    task = {"kind": "text-to-text", "train": ["x"]}
    config = tuning(tmp_path, task, "model.lora=8")
    assert config.model.adapters == LoraConfig(rank=8)
    assert config.optimizer.lr == 0.01  # what is given stays
    file = tmp_path / "bare.yaml"
    file.write_text(json.dumps({"name": "x", "task": task}))
    assert load_tuning(file).optimizer.lr == 5e-5
    assert load_tuning(file, ["model.lora=8"]).optimizer.lr == 5e-4
