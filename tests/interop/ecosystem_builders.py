"""Tiny models with tokenizers of their own, as directories in the published form, for other libraries to load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from pretrain.config import TokenizerConfig
from pretrain.interop import NoStockHome
from pretrain.model_dir import copy_tokenizer, write_model
from pretrain.models import LoomPreTrainedModel, loom_config, model_class, register_hub_code
from pretrain.tokenization.sample import draw_sample
from pretrain.tokenization.train import fit_tokenizer, write_tokenizer

SENTENCES = [
    "the small cat sat under the old tree and saw a bird",
    "a red dog ran over the hill, then it slept in the sun",
    "water falls from the mountain and the river takes it to the sea",
    "every word of this text is short, so that a small vocabulary holds it",
    "the bird sang before the sun came up over the hill",
    "rain fell on the roof of the small house by the river",
    "she reads the old book aloud while he draws a map of the sea",
    "they walk to the market and buy bread, apples and a red coat",
]
POSITIONS = 64
_ALGORITHMS = {"bert": "wordpiece", "transformer": "bpe", "t5": "unigram"}


@dataclass(frozen=True)
class _Document:
    text: str
    file: str = "sentences"
    position: int = 0


def make_tokenizer(directory: Path, architecture: str) -> Any:
    """A tokenizer that `pretrain` trained on the sentences, in the directory, as transformers loads it."""
    if not directory.exists():
        directory.mkdir(parents=True)
        config = TokenizerConfig(
            algorithm=_ALGORITHMS.get(architecture, "byte-bpe"), vocab_size=320, min_frequency=1, pad_to_multiple=1
        )
        with draw_sample([_Document(sentence) for sentence in SENTENCES], 1_000_000) as sample:
            write_tokenizer(directory, fit_tokenizer(config, sample, architecture), model_max_length=POSITIONS)
    return AutoTokenizer.from_pretrained(directory)


def tiny(
    tokenizer: Any,
    architecture: str,
    task: str = "pretraining",
    *,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    **keys: Any,
) -> Any:
    """A Loom model of width 32 and 2 layers for a tokenizer, its weights drawn wide enough that numbers differ.

    `settings` are keys that every config of transformers has (id2label, problem_type).
    """
    roles = ("pad", "bos", "eos", "cls", "sep")
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in roles}
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if architecture in ("transformer", "t5"):
        ids["decoder_start_token_id"] = ids["pad_token_id"]
    ids = {name: number for name, number in ids.items() if number is not None}
    config = loom_config(
        architecture,
        vocab_size=len(tokenizer),
        max_position_embeddings=POSITIONS,
        intermediate_size=48,
        **(sizes | ids | keys),
    )
    for name, value in (settings or {}).items():
        setattr(config, name, value)
    if settings and "id2label" in settings:
        config.label2id = {label: number for number, label in settings["id2label"].items()}
    model = model_class(config, task)(config)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 * seed + index)) * 0.1
            parameter.copy_(drawn + 1 if parameter.dim() == 1 and name.endswith("norm.weight") else drawn)
    return model.eval()


def publish(model: LoomPreTrainedModel, directory: Path, tokenizer: Path) -> Path:
    """Write the directory that a run publishes: the stock form with its tokenizer; without one, Loom with its code."""
    directory.mkdir(parents=True)
    try:
        write_model(model, directory, tokenizer_directory=tokenizer)
    except NoStockHome:
        register_hub_code(model)
        model.save_pretrained(directory)
        copy_tokenizer(tokenizer, directory)
    return directory
