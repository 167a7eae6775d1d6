"""Hugging Face model directories: the one place that writes, reads and compares them.

What lives here: a model in its published form (the stock architecture's names and config), its tokenizer beside it,
digests of the memory that was written. What must not: training state, or any choice of hyper-parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from pretrain.files import ArtifactError, write_bytes, write_json, write_safetensors
from pretrain.interop import config_json, from_stock, to_stock
from pretrain.models import LoomConfig, LoomPreTrainedModel, model_from_config
from pretrain.training.state import tensor_bytes

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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


def published_form(model: PreTrainedModel) -> tuple[Any, dict[str, Tensor]]:
    """The stock configuration and state dict that hold this model; tied tensors stand once.

    A model that is stock already is returned as it is.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    if isinstance(model.config, LoomConfig):
        return to_stock(model.config, state)
    return model.config, state


def write_model(
    model: PreTrainedModel,
    directory: Path,
    *,
    tokenizer_directory: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, str]:
    """Write a complete Hugging Face directory: config, generation config, weights, tokenizer.

    Args:
        model: ours or stock.
        directory: an existing, empty directory.
        tokenizer_directory: its files are copied beside the weights.
        dtype: floating-point tensors are cast to this; None keeps them.
        max_shard_bytes: a larger model is split over several files with an index.

    Returns:
        SHA-256 of every file, of the memory that was written.
    """
    stock_config, state = published_form(model)
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    floating = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    stock_config.dtype = floating
    digests = {"config.json": write_json(directory / "config.json", config_json(stock_config))}
    digests |= _write_weights(state, directory, max_shard_bytes)
    if model.can_generate():
        generation = GenerationConfig.from_model_config(stock_config)
        digests["generation_config.json"] = write_json(
            directory / "generation_config.json", json.loads(generation.to_json_string())
        )
    if tokenizer_directory is not None:
        digests |= copy_tokenizer(tokenizer_directory, directory)
    return digests


def copy_tokenizer(source: Path, directory: Path) -> dict[str, str]:
    """Copy a tokenizer's files; return their SHA-256."""
    digests: dict[str, str] = {}
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            digests[name] = write_bytes(directory / name, (source / name).read_bytes())
    return digests


def _write_weights(state: Mapping[str, Tensor], directory: Path, max_shard_bytes: int) -> dict[str, str]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in state.items():
        if shards[-1] and used + tensor.nbytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = ((name, tensor_bytes(state[name])) for name in names)
        digests[file] = write_safetensors(directory / file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        digests[_INDEX] = write_json(directory / _INDEX, index)
    return digests


def read_state(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory's safetensors files, in the dtype that is stored.

    Raises:
        ArtifactError: when there are none.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ArtifactError(
            f"`{directory}` holds no .safetensors file; pickled weights are not read, convert them first"
        )
    state: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                state[name] = opened.get_tensor(name)
    return state


def read_config(directory: Path) -> PreTrainedConfig:
    """The configuration of a model directory.

    Raises:
        ArtifactError: when it is no model directory.
    """
    if not (directory / "config.json").is_file():
        raise ArtifactError(f"`{directory}` is no model directory: config.json is missing")
    config: PreTrainedConfig = AutoConfig.from_pretrained(directory)
    return config


def read_loom(directory: Path) -> LoomPreTrainedModel:
    """Read a stock model directory (BERT, ModernBERT, GPT-2, Llama) as the Loom class that holds it: fp32, eval mode.

    Raises:
        ArtifactError: when it is no model directory.
        ValueError: when the architecture, or a value in its config, is not one that we hold; names it.
    """
    config, state = from_stock(read_config(directory), read_state(directory))
    model = model_from_config(config)
    load_state(model, state)
    nn.Module.float(model)
    nn.Module.eval(model)
    return model


def read_stock(directory: Path) -> PreTrainedModel:
    """Read a model directory with transformers' own class and a language-model head: fp32, eval mode.

    Raises:
        ArtifactError: when it is no model directory.
    """
    config = read_config(directory)
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or [])
    auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    model: PreTrainedModel = auto.from_pretrained(directory, dtype=torch.float32, use_safetensors=True)
    return model


def load_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Load a state dict in which tied tensors stand once; every other tensor must be there, and none too many.

    Raises:
        ArtifactError: names the tensors that are missing or left over.
    """
    missing, unexpected = model.load_state_dict(state, strict=False, assign=False)
    missing = [name for name in missing if name not in model.all_tied_weights_keys]
    if missing or unexpected:
        raise ArtifactError(
            f"the weights do not fit the model: missing {missing[:5]}, left over {list(unexpected)[:5]}"
        )
    model.tie_weights()


class PublishedStore:
    """The trainer's model store: every checkpoint holds the model as it is published."""

    def __init__(self, tokenizer_directory: Path | None = None) -> None:
        self.tokenizer_directory = tokenizer_directory

    def write(self, model: PreTrainedModel, directory: Path) -> dict[str, str]:
        """Write the model directory in full precision."""
        return write_model(model, directory, tokenizer_directory=self.tokenizer_directory)

    def read(self, model: PreTrainedModel, directory: Path) -> None:
        """Load weights into a model of the same configuration, bit for bit."""
        state = read_state(directory)
        if isinstance(model.config, LoomConfig):
            _, state = from_stock(AutoConfig.from_pretrained(directory), state)
        load_state(model, state)
