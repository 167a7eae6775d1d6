"""Runs as directories, of the small files alone that a card is made from."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.files import write_manifest

STEP = "step-00000100"
CONFIG: dict[str, Any] = {
    "name": "river",
    "out": "runs",
    "tokenizer": {"algorithm": "byte-bpe", "vocab_size": 384},
    "data": {
        "train": [
            {"name": "web", "files": ["hub:me/web", "hub:me/more"], "weight": 0.75, "license": "odc-by"},
            {"name": "own", "files": ["/home/secretive/notes/*.txt"], "weight": 0.25},
        ],
        "filters": [{"name": "GopherQualityFilter", "parameters": {}}],
        "dedup": "minhash",
        "decontaminate": False,
        "validation": {"fraction": 0.02},
        "sequence_length": 64,
    },
    "model": {"architecture": "llama"},
    "objective": {"kind": "causal"},
    "optimizer": {"name": "muon", "lr": 0.02, "betas": [0.9, 0.95]},
    "schedule": {"kind": "wsd", "warmup": "2%", "decay": "20%"},
    "train": {"steps": 100, "batch_tokens": 512, "seed": 7, "max_grad_norm": 1.0},
    "export": {"to": "auto", "license": "apache-2.0", "language": ["en", "code"]},
}
RESULT: dict[str, Any] = {
    "step": 100,
    "tokens": 51_200,
    "seconds": 7_200.0,
    "checkpoint": STEP,
    "run_id": "abc123",
    "skipped": {"spike": 2},
    "flops_per_token": 1_000_000.0,
    "epochs": {"web": 0.5, "own": 6.25},
}
START: dict[str, Any] = {
    "step": 0,
    "time": "2026-03-02T01:02:03+00:00",
    "device": "NVIDIA H100 80GB HBM3",
    "machine": "NVIDIA H100 80GB HBM3, torch 2.13.0",
    "threads": 4,
    "processes": 4,
    "versions": {"pretrain": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
}
PROGRESS: dict[str, Any] = {
    "run_id": "abc123",
    "total_steps": 100,
    "step": 100,
    "samples": 800,
    "tokens": 51_200,
    "text_tokens": 50_000,
    "seconds": 7_200.0,
    "micro_batch": 2,
    "arithmetic": "bf16 on cuda",
    "split": "ddp x4 on cuda",
    "scored_at": 100,
    "scores": {"validation-web/loss": 3.5, "validation-own/loss": 4.5},
    "first_scores": {"validation-web/loss": 6.0, "validation-own/loss": 6.25},
    "changes": [],
}
FACTS: dict[str, Any] = {
    "splits": {
        "train-web": {"documents": 900, "tokens": 70_000, "bytes": 210_000},
        "train-own": {"documents": 30, "tokens": 2_048, "bytes": 6_000},
        "validation-web": {"documents": 18, "tokens": 1_400, "bytes": 4_200},
    },
    "bad": {"count": 3},
    "empty": 1,
    "kept_out": [
        {"step": "GopherQualityFilter", "documents": 100, "bytes": 9, "kept_documents": 900, "kept_bytes": 90},
        {"step": "minhash", "documents": 50, "bytes": 9, "kept_documents": 850, "kept_bytes": 81},
    ],
}
SCORES: dict[str, Any] = {
    "validation-web": {"loss": 3.4, "num_targets": 1_400, "bits_per_byte": 1.2, "perplexity": 29.96, "context": 64},
    "validation-own": {"loss": 4.4, "num_targets": 99, "bits_per_byte": 1.9, "perplexity": 81.45, "context": 64},
}
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "vocab_size": 384,
    "transformers_version": "5.23.0",
}


def write_weights(path: Path, shapes: Mapping[str, list[int]], dtype: str = "F32") -> None:
    """A safetensors file of zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    plain = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(plain)) + plain + bytes(end))


def write_model(directory: Path, config: Mapping[str, Any] = SHAPE) -> Path:
    """A model directory of 16 x 384 + 10 numbers."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_weights(directory / "model.safetensors", {"embed": [384, 16], "norm": [10]})
    tokenizer = {
        "added_tokens": [{"id": 0, "content": "<pad>"}, {"id": 1, "content": "</s>"}],
        "pre_tokenizer": {"type": "ByteLevel"},
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "model": {"type": "BPE", "vocab": {"<pad>": 0, "</s>": 1, "a": 2, "b": 3}, "merges": []},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", "eos_token": "</s>"}))
    return directory


def write_run(
    directory: Path,
    config: Mapping[str, Any] | None = None,
    result: Mapping[str, Any] | None = None,
    progress: Mapping[str, Any] | None = None,
    metrics: str | None = None,
    starts: Sequence[Mapping[str, Any]] = (START,),
) -> Path:
    """A finished run with its export; keys of its parts are replaced by those that are given."""
    train, checkpoint = directory / "train", directory / "train" / "checkpoints" / STEP
    checkpoint.mkdir(parents=True)
    whole = CONFIG | dict(config or {})
    (directory / "config.yaml").write_text(json.dumps(whole))  # JSON is YAML
    (train / "result.json").write_text(json.dumps(RESULT | dict(result or {})))
    state = {"progress": PROGRESS | dict(progress or {}), "config": whole}
    (checkpoint / "trainer.json").write_text(json.dumps({"step": 100, "code_version": "0.1.0", "state": state}))
    made = write_manifest(checkpoint, kind="checkpoint", config=whole)
    (train / "metrics.jsonl").write_text(_metrics() if metrics is None else metrics)
    (train / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    (directory / "data").mkdir()
    write_manifest(directory / "data", kind="data", config={}, facts=FACTS)
    (directory / "tokenizer").mkdir()
    total = {"bytes": 3_000, "words": 500, "tokens": 1_000, "unknown": 1, "lines": 10, "exact_lines": 9}
    learnt = {"learnt": 100, "corpus": {"bytes": 216_000, "documents": 930, "sample_bytes": 100_000}, "total": total}
    write_manifest(directory / "tokenizer", kind="tokenizer", config={}, facts=learnt)
    (directory / "report").mkdir()
    (directory / "report" / "scores.json").write_text(json.dumps(SCORES))
    export = write_model(directory / "export")
    write_manifest(export, kind="export", config=whole["export"], inputs={"checkpoint": made.digest})
    return directory


def _metrics() -> str:
    lines = [{"step": 0, "validation-web/loss": 6.0, "validation-own/loss": 6.25}]
    for step in range(1, 101):
        lines.append({"step": step, "loss": 6.0 - 0.025 * step, "tokens": 512 * step, "seconds": 72.0 * step})
        if step % 50 == 0:
            lines.append({"step": step, "validation-web/loss": 6.0 - 0.025 * step})
    return "".join(json.dumps(line) + "\n" for line in lines)
