"""Hugging Face model directories, written: the one place that does.

What lives here: a model in its published form (the stock architecture's names and config), its tokenizer beside it,
digests of the memory that was written. What must not: reading them, training state, or any choice of hyper-parameters.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from pretrain.files import LateBytes, check_inside, write_bytes, write_json, write_safetensors
from pretrain.interop import Rule, config_json
from pretrain.interop.published import code_files, published_rules
from pretrain.models import LoomConfig
from pretrain.training.state import late_bytes

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions by the names that users give them, of stored weights and of arithmetic."""

_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)


def _own_state(model: PreTrainedModel, weights: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """Whole tensors by the model's own names, tied ones once.

    The model is asked for its state only without `weights`: a sharded one changes its parameters when it is asked,
    which must not happen in the middle of a step.
    """
    if weights:
        return weights
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def _published(rule: Rule, state: Mapping[str, Tensor], dtype: torch.dtype | None) -> tuple[Tensor, LateBytes]:
    """A published tensor that is made when it is written: its like without data, and its bytes."""

    def make(tensors: list[Tensor]) -> Tensor:
        joined = rule.join(tensors)
        return joined.to(dtype) if dtype is not None and joined.is_floating_point() else joined

    like = make([torch.empty_like(state[name], device="meta") for name in rule.loom])
    return like, late_bytes(like, lambda: make([state[name] for name in rule.loom]))


def write_model(
    model: PreTrainedModel,
    directory: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    tokenizer_directory: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    code: bool = False,
) -> dict[str, str]:
    """Write a complete Hugging Face directory: config, generation config, weights, tokenizer, and code if asked for.

    Args:
        model: ours or stock.
        directory: an existing, empty directory.
        weights: all of the model's tensors, whole, by its own names; None takes them from the model.
        tokenizer_directory: its files are copied beside the weights.
        dtype: floating-point tensors are cast to this; None keeps them.
        max_shard_bytes: a larger model is split over several files with an index.
        code: write our model in its own form with its code, whatever stock architecture would hold it.

    Returns:
        SHA-256 of every file, of the memory that was written.
    """
    state = _own_state(model, weights)
    stock_config, rules = published_rules(model, state, code=code)
    published = {rule.stock: _published(rule, state, dtype) for rule in rules}
    stock_config.dtype = next(like.dtype for like, _ in published.values() if like.is_floating_point())
    digests = _write_configs(model, stock_config, directory)
    shards: list[list[str]] = [[]]
    used = 0
    for name, (_, tensor) in published.items():
        if shards[-1] and used + tensor.nbytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes
    for number, names in enumerate(shards):
        tensors = ((name, published[name][1]) for name in names)
        digests |= _write_shard(directory, number, len(shards), tensors)
    if len(shards) > 1:
        sizes = {name: tensor.nbytes for name, (_, tensor) in published.items()}
        digests |= _write_index(directory, shards, sizes)
    if tokenizer_directory is not None:
        digests |= copy_tokenizer(tokenizer_directory, directory)
    return digests


def write_model_share(
    model: PreTrainedModel,
    directory: Path,
    *,
    weights: Mapping[str, Tensor],
    shares: Sequence[Collection[str]],
    number: int,
    tokenizer_directory: Path | None = None,
    code: bool = False,
) -> dict[str, str]:
    """Write one of several shares of a model directory; the first one brings config, tokenizer and index too.

    Args:
        model: ours or stock.
        directory: an existing directory.
        weights: all of the model's tensors by its own names, whole; those of other shares may hold no data.
        shares: the names of each share; what `joined_names` gives together must be in one.
        number: of the own share, from 0.
        tokenizer_directory: its files are copied beside the weights.
        code: as of `write_model`.

    Returns:
        SHA-256 of every file that was written, of the memory that was written.
    """
    stock_config, rules = published_rules(model, weights, code=code)
    home = {name: place for place, names in enumerate(shares) for name in names}
    published = {rule.stock: _published(rule, weights, None) for rule in rules}
    parts: list[list[str]] = [[] for _ in shares]
    for rule in rules:
        (place,) = {home[name] for name in rule.loom} or {0}
        parts[place].append(rule.stock)
    own = ((name, published[name][1]) for name in parts[number])
    digests = _write_shard(directory, number, len(shares), own)
    if number == 0:
        stock_config.dtype = next(like.dtype for like, _ in published.values() if like.is_floating_point())
        digests |= _write_configs(model, stock_config, directory)
        digests |= _write_index(directory, parts, {name: tensor.nbytes for name, (_, tensor) in published.items()})
        if tokenizer_directory is not None:
            digests |= copy_tokenizer(tokenizer_directory, directory)
    return digests


def _write_configs(model: PreTrainedModel, stock_config: Any, directory: Path) -> dict[str, str]:
    digests = {"config.json": write_json(directory / "config.json", config_json(stock_config))}
    if isinstance(stock_config, LoomConfig):
        for file in code_files(stock_config):
            digests[file.name] = write_bytes(directory / file.name, file.read_bytes())
    if model.can_generate():
        own = model.generation_config
        from_config = own is None or own._from_model_config
        generation = GenerationConfig.from_model_config(stock_config) if from_config else own
        digests["generation_config.json"] = write_json(
            directory / "generation_config.json", json.loads(generation.to_json_string())
        )
    return digests


def copy_tokenizer(source: Path, directory: Path) -> dict[str, str]:
    """Copy a tokenizer's files; return their SHA-256.

    Raises:
        ArtifactError: when one is a link that leads outside: what lies there would go out with the model.
    """
    digests: dict[str, str] = {}
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            check_inside(source / name)
            digests[name] = write_bytes(directory / name, (source / name).read_bytes())
    return digests


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_shard(directory: Path, number: int, count: int, tensors: Iterable[tuple[str, LateBytes]]) -> dict[str, str]:
    file = _shard_name(number, count)
    return {file: write_safetensors(directory / file, tensors, {"format": "pt"})}


def _write_index(directory: Path, shards: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> dict[str, str]:
    weight_map = {name: _shard_name(number, len(shards)) for number, names in enumerate(shards) for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    return {_INDEX: write_json(directory / _INDEX, index)}
