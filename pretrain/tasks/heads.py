"""A model with the head of a task: read from a directory or drawn anew, and its forward pass in the trainer.

What lives here: the one place of fine-tuning that reads models. What must not: tasks, rows.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils.generic import ModelOutput

import pretrain.models  # noqa: F401 (registers the Loom classes with the Auto classes)
from pretrain.config_loop import LoopTrainConfig
from pretrain.config_task import TunedModel
from pretrain.evaluation.loading import check_source, kind_of_model, loading, usable_positions
from pretrain.files import ArtifactError
from pretrain.runtime import set_seed
from pretrain.tasks.base import Task, pad_id
from pretrain.trust import check_model, check_tokenizer

PLAIN_ATTENTION_TOKENS = 256
"""Up to this length a training step on a CPU is faster without the fused attention kernel (torch 2.13)."""

_SHOWN = 6


def read_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory or Hub name; one without padding pads with its end of text.

    Raises:
        ValueError: when there is none; names the remedy.
    """
    check_source(source)
    with loading(source, "tokenizer"):
        check_tokenizer(source, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def is_causal(source: str, *, trust_remote_code: bool = False) -> bool:
    """Whether a model is a decoder; one that names no head is taken for an encoder.

    Raises:
        ValueError: when its configuration cannot be read.
    """
    try:
        return kind_of_model(source, trust_remote_code=trust_remote_code) == "causal"
    except ArtifactError:
        raise
    except ValueError:
        return False


def read_model(chosen: TunedModel, task: Task, seed: int, *, trust_remote_code: bool = False) -> tuple[Any, list[str]]:
    """The model with the task's head, in fp32; what is new in it is drawn by the seed.

    Args:
        chosen: the `model` section.
        task: whose head it gets.
        seed: of the new weights.
        trust_remote_code: run the code that the directory carries.

    Returns:
        The model, and the names of its parameters that were not read.

    Raises:
        ValueError: when there is no such model, none of its weights fits, or its class has no such head.
    """
    assert chosen.from_ is not None
    source, auto = chosen.from_, getattr(importlib.import_module("transformers"), task.head)
    keys = task.model_keys()
    set_seed(seed)
    with loading(source, "model"):
        check_model(source, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        _refuse_other_kinds(config, task, auto, source)
        for key, value in keys.items():
            setattr(config, key, value)
        _pool(config, chosen.classifier_pooling, source)
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = pad_id(task.tokenizer)
        if chosen.weights == "random":
            model = auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
            new = [name for name, _ in model.named_parameters()]
        else:
            model, report = auto.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
            new = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
            new = _read_body(model, new, source, trust_remote_code=trust_remote_code)
    known = dict(model.named_parameters())
    missing = sum(known[name].numel() for name in new if name in known)
    if chosen.weights == "pretrained" and missing * 2 > sum(one.numel() for one in known.values()):
        raise ValueError(
            f"`{source}`: most weights of {type(model).__name__} are not in it ({', '.join(new[:_SHOWN])}, ...); give "
            "the directory of another model, or train the shape from new weights with model.weights=random"
        )
    if len(task.tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"`{source}`: its tokenizer has {len(task.tokenizer):,} ids, the model embeds "
            f"{model.get_input_embeddings().num_embeddings:,}; put the tokenizer there that it was trained with"
        )
    _freeze(model)
    model.config.architectures = [type(model).__name__]  # the class with the head, not the one that was saved
    task.prepare_model(model)
    return model.train(), new


def _read_body(model: Any, new: list[str], source: str, *, trust_remote_code: bool) -> list[str]:
    """Read the body alone where none of it was found, and say what is new still.

    Some classes name it otherwise than the language models do whose weights they are given: LlamaForQuestionAnswering
    and its kin `transformer`, LlamaForCausalLM `model`.
    """
    body = getattr(model, model.base_model_prefix, None)
    if body is None:
        return new
    names = {f"{model.base_model_prefix}.{name}" for name, _ in body.named_parameters()}
    if not names or not names <= set(new):
        return new
    read, report = AutoModel.from_pretrained(
        source,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    if report["missing_keys"] or type(read) is not type(body):
        return new
    body.load_state_dict(read.state_dict())
    return [name for name in new if name not in names]


def _freeze(model: Any) -> None:
    """What a class never saves is computed, not learnt (Marian's sinusoids); reading a model forgets that."""
    unsaved = getattr(model, "_keys_to_ignore_on_save", None) or ()
    for name, parameter in model.named_parameters():
        if name in unsaved:
            parameter.requires_grad_(False)


def _pool(config: Any, pooling: str | None, source: str) -> None:
    """Choose how the class makes one vector of a text; EuroBERT calls the first token's `bos`."""
    if pooling is None:
        return
    if not hasattr(config, "classifier_pooling"):
        raise ValueError(
            f"model.classifier_pooling: {config.model_type}, the class of `{source}`, lets nobody choose; remove it"
        )
    config.classifier_pooling = "bos" if pooling == "cls" and config.model_type == "eurobert" else pooling


def _refuse_other_kinds(config: Any, task: Task, auto: Any, source: str) -> None:
    """Refuse a model whose architecture has no class with the task's head."""
    if type(config) not in auto._model_mapping and not hasattr(config, "auto_map"):
        kind = getattr(task.section, "kind", "")
        raise ArtifactError(
            f"`{source}`: {config.model_type} has no class for task.kind: {kind} ({task.head}); "
            "give a model that has one"
        )


def check_length(model: Any, wanted: int, source: str) -> None:
    """Refuse inputs that are longer than the model has positions.

    Raises:
        ValueError: names the key.
    """
    positions = usable_positions(model)
    if positions is not None and positions < wanted:
        raise ValueError(f"task.max_length: {wanted} is longer than the {positions} positions of `{source}`; lower it")


def prepare_passes(model: Any, train: LoopTrainConfig, device: torch.device, max_length: int) -> None:
    """Take the attention backend and the checkpointing of activations that the configuration asks for.

    `train.attention: auto` keeps what transformers chose, but for short rows on a CPU: the backward pass of torch's
    fused kernel takes longer there than that of the plain products.

    Raises:
        ValueError: when the class does not have them.
    """
    short = device.type == "cpu" and max_length <= PLAIN_ATTENTION_TOKENS
    chosen = "eager" if train.attention == "auto" and short else train.attention
    try:
        if chosen != "auto":
            model.set_attn_implementation(chosen)
    except (ValueError, ImportError) as error:
        raise ValueError(f"train.attention: {error}") from error
    if train.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ValueError(f"train.gradient_checkpointing: {type(model).__name__} has none; set it to false")
        model.gradient_checkpointing_enable()


def install(model: Any, task: Task) -> None:
    """Put the task's loss behind the model's forward pass, as the trainer calls it.

    `model(**inputs)` gives the class's own outputs; with `labels` and `num_items_in_batch` it gives `.loss`, the sum
    over the targets divided by their number. Inputs that the class does not take are left out.
    """
    own = model.forward
    parameters = inspect.signature(own).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values()) and "token_type_ids" in parameters

    def forward(labels: Tensor | None = None, num_items_in_batch: Tensor | int = 1, **inputs: Any) -> Any:
        if labels is not None:
            inputs = dict(task.given(model, inputs, labels))
        outputs = task.call(own, {name: value for name, value in inputs.items() if takes_all or name in parameters})
        if labels is None:
            return outputs
        return ModelOutput(loss=task.loss(outputs, labels) / num_items_in_batch)

    model.forward = forward


def read_tuned(directory: Path, task: Task, device: torch.device, *, trust_remote_code: bool = False) -> Any:
    """A fine-tuned directory as its users read it, in evaluation mode."""
    auto = getattr(importlib.import_module("transformers"), task.head)
    with loading(str(directory), "model"):
        model = auto.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    install(model, task)
    return model.eval().to(device)
