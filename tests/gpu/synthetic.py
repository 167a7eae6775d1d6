"""A prepared run of synthetic tokens, made with numpy alone: for machines that have no text tools and no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from pretrain.config import RunConfig, config_from_dict
from pretrain.data.shards import ShardWriter
from pretrain.files import write_json, write_manifest

SPECIALS: dict[str, dict[str, int]] = {
    "encoder": {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4},
    "decoder": {"bos": 0, "eos": 0, "pad": 1},
}


def make_run(out: Path, *, tokens: int = 200_000, vocab_size: int = 512, **sections: dict[str, Any]) -> RunConfig:
    """Write a tokenizer and shards of a learnable stream (each token tends to follow from the one before)."""
    raw: dict[str, Any] = {
        "name": "synthetic",
        "out": str(out),
        "data": {"train": ["synthetic"], "sequence_length": 128},
        "model": {"architecture": "gpt2", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        "objective": {"kind": "causal"},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "train": {"steps": 10, "batch_tokens": 2048},
        "evaluate": {"every": 10**6},
        "log": {"to": ["jsonl"]},
    }
    for section, keys in sections.items():
        raw[section] = raw.get(section, {}) | keys
    config = config_from_dict(raw)
    kind = config.kind or "decoder"
    special = SPECIALS[kind]
    facts = {"vocab_size": vocab_size, "special_ids": special, "all_special_ids": sorted(set(special.values()))}
    tokenizer = config.directory / "tokenizer"
    tokenizer.mkdir(parents=True)
    words = WordLevel({str(number): number for number in range(vocab_size)}, unk_token="1")
    Tokenizer(words).save(str(tokenizer / "tokenizer.json"))
    write_json(tokenizer / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    made = write_manifest(tokenizer, kind="tokenizer", config={}, facts=facts)
    _write_data(config.directory / "data", tokens, vocab_size, facts, made.digest)
    return config


def _write_data(directory: Path, tokens: int, vocab_size: int, facts: dict[str, Any], tokenizer_digest: str) -> None:
    generator = np.random.default_rng(0)
    follows = generator.permutation(np.arange(8, vocab_size))
    splits: dict[str, Any] = {}
    for split, count in (("train", tokens), ("validation", max(2000, tokens // 50))):
        lengths = generator.integers(20, 2000, max(1, count // 1000)).astype(np.int64)
        total = int(lengths.sum())
        ids = np.empty(total, dtype=np.int64)
        ids[0] = 8
        random = generator.random(total) < 0.3
        fresh = generator.integers(8, vocab_size, total)
        for index in range(1, total):
            ids[index] = fresh[index] if random[index] else follows[ids[index - 1] - 8]
        (directory / split).mkdir(parents=True)
        with ShardWriter(directory / split / "part-00000", f"{split}/part-00000", vocab_size) as writer:
            writer.add(ids, lengths, 4 * total)
        shard = writer.facts().__dict__
        splits[split] = {"documents": len(lengths), "tokens": total, "bytes": 4 * total, "shards": [shard]}
    write_manifest(
        directory,
        kind="data",
        config={},
        inputs={"tokenizer": tokenizer_digest},
        facts={"tokenizer": facts, "splits": splits},
    )
