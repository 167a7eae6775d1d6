"""Samples during training: the likeliest tokens, as `generate` and `fill` choose them; nothing else changes by them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from data_builders import run_config, write_tokenizer
from transformers import AutoTokenizer

from pretrain.config import RunConfig, config_from_dict, config_to_dict
from pretrain.config_text import ConfigError
from pretrain.evaluation.loading import LoadedModel
from pretrain.evaluation.outputs import generation_config, input_ids
from pretrain.evaluation.samples import Sampler, keep_samples
from pretrain.fill import fill_masks
from pretrain.generate import generate_text
from pretrain.models import loom_config, model_from_config
from pretrain.train import train

sys.path.insert(0, str(Path(__file__).parent.parent / "gpu"))
from synthetic import make_run

TEXT = "brown foxes jump over lazy dogs and sleep " * 4
PROMPTS = {
    "gpt2": ("brown", "foxes jump over lazy"),
    "bert": ("brown [MASK] jump", "[MASK] dogs and <mask>"),
    "t5": ("brown foxes", "jump over lazy dogs and sleep"),
}


def prepared(tmp_path: Path, architecture: str) -> tuple[RunConfig, LoadedModel]:
    """A run with a tokenizer, and a model with drawn weights that tends to no one token."""
    config = run_config(tmp_path, "bert" if architecture == "bert" else "gpt2", train=["a.txt"])
    config = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"samples": PROMPTS[architecture]})}
    )
    kind = {"gpt2": "causal", "bert": "mlm"}.get(architecture, "seq2seq")
    if kind == "seq2seq":
        config = config.model_copy(
            update={"objective": config.objective.model_copy(update={"kind": "span-corruption"})}
        )
    directory = config.directory / "tokenizer"
    write_tokenizer(directory, "bert" if architecture == "bert" else "gpt2", TEXT, 300)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if kind == "seq2seq":
        ids["decoder_start_token_id"] = tokenizer.pad_token_id
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = model_from_config(loom_config(architecture, max_position_embeddings=40, **sizes, **ids)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
    return config, LoadedModel(model, tokenizer, kind, "model", "model", torch.device("cpu"))


def made(config: RunConfig, loaded: LoadedModel) -> list[dict[str, Any]]:
    before = torch.get_rng_state()
    sampler = Sampler(config, loaded.model, loaded.device)
    with torch.no_grad():
        samples = sampler.samples(loaded.model, lambda: False)
    assert samples is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert [sample["prompt"] for sample in samples] == list(config.evaluate.samples)
    return samples


def test_a_decoder_goes_on_as_generate_does(tmp_path: Path) -> None:
    config, loaded = prepared(tmp_path, "gpt2")
    rows = [loaded.tokenizer(prompt)["input_ids"] for prompt in config.evaluate.samples]
    room = 40 - max(map(len, rows)) - 1  # BOS before
    for sample in made(config, loaded):
        whole = generate_text(loaded, sample["prompt"], temperature=0.0, max_new_tokens=room)
        assert sample["text"] == whole.removeprefix(sample["prompt"]) != ""


def test_a_masked_model_fills_as_fill_does(tmp_path: Path) -> None:
    config, loaded = prepared(tmp_path, "bert")
    for sample in made(config, loaded):
        wanted = fill_masks(loaded, sample["prompt"])
        assert len(sample["candidates"]) == sample["prompt"].count("[MASK]") + sample["prompt"].count("<mask>")
        for gap, candidates in zip(sample["candidates"], wanted, strict=True):
            assert [chance for _, chance in gap] == [round(one.probability, 4) for one in candidates]
        assert "[MASK]" not in sample["text"]


def test_an_encoder_decoder_answers_as_generate_does(tmp_path: Path) -> None:
    config, loaded = prepared(tmp_path, "t5")
    sampler = Sampler(config, loaded.model, loaded.device)
    options = generation_config(loaded, sampler.new_tokens, {"do_sample": False, "num_beams": 1})
    for sample in made(config, loaded):
        ids = torch.tensor([input_ids(loaded, sample["prompt"])])
        output = loaded.model.generate(ids, generation_config=options)[0].tolist()
        end = output.index(loaded.tokenizer.eos_token_id) if loaded.tokenizer.eos_token_id in output else None
        assert sample["text"] == loaded.tokenizer.decode(output[1:end], skip_special_tokens=True)


def test_a_stop_ends_them_and_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    config, loaded = prepared(tmp_path, "gpt2")
    sampler = Sampler(config, loaded.model, loaded.device)
    asked: list[int] = []
    with torch.no_grad():
        assert sampler.samples(loaded.model, lambda: bool(asked.append(1)) or len(asked) > 2) is None
    assert len(asked) == 3
    too_long = config.evaluate.model_copy(update={"samples": ("brown foxes " * 40,)})
    with pytest.raises(ValueError, match=r"evaluate\.samples: 'brown .* shorten it"):
        Sampler(config.model_copy(update={"evaluate": too_long}), loaded.model, loaded.device)
    masked = config_to_dict(run_config(tmp_path, "bert", name="other", train=["a.txt"]))
    masked["evaluate"]["samples"] = ["no gap"]
    with pytest.raises(ConfigError, match=r"'no gap' has no gap .* write \[MASK\]"):
        config_from_dict(masked)


def test_what_is_written_again_replaces_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "train" / "samples.jsonl"
    for step, text in ((0, "a"), (1, "b"), (2, "c"), (1, "again")):
        keep_samples(path, step, [{"prompt": "p", "text": text}])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["text"]) for line in lines] == [(0, "a"), (1, "again")]


def test_a_run_with_samples_is_the_same_run(tmp_path: Path) -> None:
    """Every number of every step, dropout included; and the file has a line a prompt and evaluation."""
    losses = {}
    for name, samples in (("without", []), ("with", ["8 9 10", "11"])):
        config = make_run(
            tmp_path / name,
            tokens=4000,
            vocab_size=64,
            data={"sequence_length": 16},
            model={"hidden_size": 16, "hidden_dropout": 0.2},
            train={"steps": 4, "batch_tokens": 64, "micro_batch": 4},
            evaluate={"every": 2, "samples": samples},
        )
        assert train(config) == 0
        lines = [json.loads(line) for line in (config.directory / "train" / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
        written = config.directory / "train" / "samples.jsonl"
        assert written.is_file() == bool(samples)
        (start,) = (config.directory / "train" / "starts.jsonl").read_text().splitlines()
        assert json.loads(start)["step"] == 0
    assert losses["with"] == losses["without"]
    found = [json.loads(line) for line in written.read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in found] == [
        (step, prompt) for step in (0, 2, 4) for prompt in ("8 9 10", "11")
    ]
