"""Small tokenizers, configurations and prepared data for the tests of the data plane."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pretrain.config import RunConfig, config_from_dict
from pretrain.data.reading import remote
from pretrain.data.shards import ShardFacts, TokenStore
from pretrain.files import Manifest, read_manifest, write_json, write_manifest

SPECIALS = {
    "gpt2": {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|pad|>"},
    "llama": {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"},
    "bert": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
}


def write_tokenizer(directory: Path, architecture: str, text: str = "", vocab_size: int = 400) -> Manifest:
    """A byte-level BPE tokenizer directory with the architecture's special tokens."""
    specials = SPECIALS[architecture]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dict.fromkeys(specials.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {f"{role}_token": token for role, token in specials.items()})
    return write_manifest(directory, kind="tokenizer", config={}, facts={"vocab_size": tokenizer.get_vocab_size()})


def forget_servers() -> None:
    """What servers said and whether they answered is forgotten, as in a new process."""
    remote._listings.clear()
    remote._unreachable.clear()


def run_config(tmp_path: Path, architecture: str = "gpt2", name: str = "run", **data: Any) -> RunConfig:
    """A run under `tmp_path`; `data` are keys of its data section."""
    sequence_length = data.setdefault("sequence_length", 32)
    return config_from_dict(
        {
            "name": name,
            "out": str(tmp_path / "runs"),
            "data": data,
            "model": {"architecture": architecture},
            "objective": {"kind": "mlm" if architecture in ("bert", "modernbert") else "causal"},
            "optimizer": {"lr": 1e-3},
            "train": {"batch_tokens": 4 * sequence_length, "steps": 1},
        }
    )


def documents(directory: Path, split: str) -> list[str]:
    """The texts of a split, decoded from its shards."""
    manifest = read_manifest(directory, "data")
    facts = manifest.facts["splits"][split]
    store = TokenStore(directory, [ShardFacts(**s) for s in facts["shards"]], manifest.facts["tokenizer"]["vocab_size"])
    tokenizer = Tokenizer.from_file(str(directory.parent / "tokenizer" / "tokenizer.json"))
    lengths = store.document_lengths()
    texts = []
    for start, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
        ids = store.gather(np.array([start]), np.array([length]))
        texts.append(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
    return texts
