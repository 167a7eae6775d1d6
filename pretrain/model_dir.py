"""Hugging Face model directories: the one place that writes, reads and compares them.

What lives here: a model in its published form (the stock architecture's names and config), its tokenizer beside it,
digests of the memory that was written, released models read as Loom models. What must not: training state, or any
choice of hyper-parameters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
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

from pretrain.evaluation.loading import check_source, loading
from pretrain.files import ArtifactError, write_bytes, write_json, write_safetensors
from pretrain.interop import HOMES, config_json, from_stock, from_stock_config, to_stock
from pretrain.models import LoomConfig, LoomPreTrainedModel, model_class, model_from_config
from pretrain.training.state import tensor_bytes

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions by the names that users give them, of stored weights and of arithmetic."""

_OWN_CODE = "it carries code of its own, which is not run here; give a model of a stock architecture"
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


def published_form(
    model: PreTrainedModel, weights: Mapping[str, Tensor] | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """The stock configuration and state dict that hold this model; tied tensors stand once.

    A model that is stock already is returned as it is. `weights` are whole parameters by the model's names, where the
    model itself holds parts of them alone.
    """
    whole = weights or {}
    state = {
        name: whole.get(name, tensor)
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    if isinstance(model.config, LoomConfig):
        return to_stock(model.config, state)
    return model.config, state


def write_model(
    model: PreTrainedModel,
    directory: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    tokenizer_directory: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, str]:
    """Write a complete Hugging Face directory: config, generation config, weights, tokenizer.

    Args:
        model: ours or stock.
        directory: an existing, empty directory.
        weights: whole parameters by the model's names; None takes them from the model.
        tokenizer_directory: its files are copied beside the weights.
        dtype: floating-point tensors are cast to this; None keeps them.
        max_shard_bytes: a larger model is split over several files with an index.

    Returns:
        SHA-256 of every file, of the memory that was written.
    """
    stock_config, state = published_form(model, weights)
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
    state: dict[str, Tensor] = {}
    for file in _weight_files(directory):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                state[name] = opened.get_tensor(name)
    return state


def _weight_files(directory: Path) -> list[Path]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ArtifactError(
            f"`{directory}` holds no .safetensors file; pickled weights are not read, convert them first"
        )
    return files


def read_config(source: str | Path) -> PreTrainedConfig:
    """The configuration of a model directory or Hub name, stock or Loom; code that it carries is not run.

    Raises:
        ArtifactError: when it is no model directory.
        ValueError: when the Hub does not give it, or transformers does not know the architecture; names the remedy.
    """
    check_source(source)
    with loading(str(source), "model", own_code=_OWN_CODE):
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return config


def read_loom(source: str | Path, *, note: Callable[[str], None] | None = None) -> LoomPreTrainedModel:
    """Read a model with its language-model head as the Loom class that holds it: fp32, eval mode.

    Takes BERT, ModernBERT, GPT-2 and Llama in every layout that transformers' own class reads (names without the
    prefix of the stack, LayerNorm.gamma, half precision, tied or not), and Loom's own directories. Tensors that take
    no part in language modelling are left out: BERT's pooler and next-sentence head, GPT-2's mask buffers.

    Args:
        source: a directory, or a Hub name (a directory of that name comes first). Weights come from safetensors alone.
        note: called with a line that names the tensors that were left out, when there are any.

    Raises:
        ArtifactError: when it is no model directory, or its weights do not fit its config; names them.
        ValueError: when the Hub does not give it, when it has no language-model head, or when its architecture, or a
            value in its config, is not one that we hold; names it.
    """
    config = read_config(source)
    if isinstance(config, LoomConfig):
        loom: LoomPreTrainedModel = _pretrained(model_class(config), source, config, spare=())
        if config.tie_word_embeddings and loom.lm_head.weight is not loom.model.embed_tokens.weight:
            raise ArtifactError(
                f"`{source}`: lm_head.weight differs from model.embed_tokens.weight, to which it is tied"
            )
        return loom
    from_stock_config(config)  # what cannot be held is refused before its weights are fetched
    home = HOMES[config.model_type]
    stock = _pretrained(getattr(transformers, home.classes["pretraining"]), source, config, home.spare, note)
    converted, state = from_stock(stock.config, stock.state_dict())
    model = model_from_config(converted)
    load_state(model, state)
    nn.Module.eval(model)
    return model


def read_stock(source: str | Path) -> PreTrainedModel:
    """Read a model with transformers' registered class and its language-model head: fp32, eval mode.

    Args:
        source: a directory, stock or Loom, or a Hub name.

    Raises:
        ArtifactError: when it is no model directory, or weights are missing.
        ValueError: when the Hub does not give it, or it has no language-model head; names the remedy.
    """
    config = read_config(source)
    home = config if isinstance(config, LoomConfig) else HOMES.get(config.model_type)
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or [])
    causal = causal or (home is not None and home.kind == "decoder")
    auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    model: PreTrainedModel = _pretrained(auto, source, config, spare=("",))
    return model


def _pretrained(
    found: Any,
    source: str | Path,
    config: PreTrainedConfig,
    spare: Iterable[str],
    note: Callable[[str], None] | None = None,
) -> Any:
    """The model of a class in fp32, every weight read; tensors that match a pattern of `spare` may be left over."""
    if Path(source).is_dir():
        _weight_files(Path(source))
    with loading(str(source), "model", own_code=_OWN_CODE):
        model, report = found.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    _refuse_gaps(model, source, report)
    left_over = sorted(report["unexpected_keys"])
    if refused := [name for name in left_over if not any(re.search(pattern, name) for pattern in spare)]:
        raise ArtifactError(
            f"`{source}` has {len(refused)} tensors that {type(model).__name__} does not hold, such as `{refused[0]}`; "
            f"give a model that was saved by that class"
        )
    if left_over and note is not None:
        names = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in left_over))
        note(f"`{source}`: left out {', '.join(names)}; no part of language modelling")
    return model


def _refuse_gaps(model: PreTrainedModel, source: str | Path, report: Mapping[str, Any]) -> None:
    class_name = type(model).__name__
    missing = sorted(report["missing_keys"])
    stack = f"{model.base_model_prefix}."
    if head := [name for name in missing if not name.startswith(stack)]:
        raise ArtifactError(
            f"`{source}` ({', '.join(model.config.architectures or ['no class named'])}) has no language-model head: "
            f"`{head[0]}` is missing; give a model that was saved with one, as {class_name} saves it"
        )
    if missing:
        raise ArtifactError(
            f"`{source}` lacks {len(missing)} tensors of {class_name}, such as `{missing[0]}`; it is incomplete: copy "
            "it again"
        )
    if report["mismatched_keys"]:
        name, stored, expected = min(report["mismatched_keys"])
        raise ArtifactError(
            f"`{source}`: `{name}` has shape {tuple(stored)}, its config.json asks for {tuple(expected)}; one of the "
            "two is of another model"
        )


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

    def write(self, model: PreTrainedModel, weights: Mapping[str, Tensor], directory: Path) -> dict[str, str]:
        """Write the model directory in full precision."""
        return write_model(model, directory, weights=weights, tokenizer_directory=self.tokenizer_directory)

    def read(self, model: PreTrainedModel, directory: Path) -> dict[str, Tensor]:
        """The weights by the model's own names, tied ones once, as they are stored; buffers go into the model."""
        state = read_state(directory)
        wanted = next(parameter.dtype for parameter in model.parameters())
        for name, tensor in state.items():
            if tensor.is_floating_point() and tensor.dtype != wanted:  # a silent cast would lose bits
                raise ArtifactError(
                    f"the saved `{name}` in `{directory}` is {tensor.dtype}, the run trains {wanted}; a checkpoint "
                    "holds the full precision: put the whole one back"
                )
        if isinstance(model.config, LoomConfig):
            _, state = from_stock(AutoConfig.from_pretrained(directory), state)
        for name, buffer in model.named_buffers():
            if name in state:
                buffer.copy_(state.pop(name))
        return state
