"""The verbs `export` and `import`: model directories in the published form and in Loom's own, with a proof.

What lives here: reading one form, writing the other, and comparing the logits of both. What must not: the mapping
itself (interop) or the file format (model_dir).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.files import ArtifactError, commit_directory, write_safetensors
from pretrain.model_dir import (
    DTYPES,
    copy_tokenizer,
    is_held,
    read_config,
    read_loom,
    read_stock,
    stored_task,
    write_model,
)
from pretrain.models import LoomPreTrainedModel, register_hub_code
from pretrain.training import checkpoint
from pretrain.training.state import tensor_bytes
from pretrain.training.stored import stored_model

_TOLERANCE = 1e-5
"""Largest difference of two logits, over the largest logit; both sides compute in fp32."""


@dataclass(frozen=True)
class Proof:
    """Two models on the same token ids: the largest difference of their logits, over the largest logit."""

    directory: Path
    architecture: str
    parameters: int
    difference: float

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.directory}: {self.architecture}, {self.parameters:,} parameters; "
            f"logits equal within {self.difference:.1e} of the largest"
        )


def model_directory(path: Path) -> Path:
    """The model directory that a run directory (its latest checkpoint), a checkpoint or a model directory stands for.

    Raises:
        ArtifactError: when there is no model.
    """
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    train = path / "train" if (path / "train").is_dir() else path
    found = stored_model(train) or checkpoint.read_pointer(train, "latest")
    if found is None:
        raise ArtifactError(f"`{path}` is no run, checkpoint or model directory; give one that holds a model")
    return found / "model"


def export_model(
    source: Path,
    out: Path,
    *,
    dtype: str = "fp32",
    max_shard_bytes: int = 5_000_000_000,
    replace: bool = False,
    proof_file: Path | None = None,
) -> Proof:
    """Write the model of a run, checkpoint or model directory for publishing, then read it back and compare logits.

    Args:
        source: a run directory (its latest checkpoint), a checkpoint, or a model directory.
        out: the directory to make.
        dtype: fp32, bf16 or fp16.
        max_shard_bytes: larger models are split over several files.
        replace: whether `out` may exist.
        proof_file: where token ids and the live model's logits are kept, for a comparison in another process.

    Raises:
        ValueError: when the dtype is unknown.
        ArtifactError: when `source` holds no model, or an altered checkpoint's, `out` exists, or the logits differ;
            then nothing is published.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype} is unknown; use one of {', '.join(DTYPES)}")
    directory = model_directory(Path(source))
    checkpoint.verify_model(directory)
    model: PreTrainedModel = _read(directory) if is_held(directory) else read_stock(directory)
    as_written(model, DTYPES[dtype])
    with commit_directory(Path(out), replace=replace) as temporary:
        write_model(
            model, temporary, tokenizer_directory=directory, dtype=DTYPES[dtype], max_shard_bytes=max_shard_bytes
        )
        stock = read_stock(temporary, task=stored_task(read_config(temporary)))
        proof = _prove(model, stock, Path(out), proof_file)
    return proof


def import_model(source: Path, out: Path) -> Proof:
    """Turn a stock model directory into a Loom directory, which carries its code, and compare logits.

    Raises:
        ValueError: when the architecture is not one that we hold.
        ArtifactError: when `source` holds no model, `out` exists, or the logits differ.
    """
    model = _read(source)
    register_hub_code(model)
    stock = read_stock(source, task=stored_task(read_config(source)))
    with commit_directory(Path(out)) as temporary:
        model.save_pretrained(temporary)
        copy_tokenizer(source, temporary)
        proof = _prove(stock, model, Path(out), None)
    return proof


def _read(source: Path) -> LoomPreTrainedModel:
    """The model of a directory as the class that its config names for pretraining, every tensor of it."""
    return read_loom(source, task=stored_task(read_config(source)))


def as_written(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights to `dtype`, kept in fp32: the logits to expect are those of the weights that are written."""
    model.to(dtype).float()


def _prove(ours: PreTrainedModel, theirs: PreTrainedModel, directory: Path, proof_file: Path | None) -> Proof:
    """Compare logits on two rows of random ids, the second one padded."""
    generator = torch.Generator().manual_seed(0)
    length = min(64, getattr(ours.config, "max_position_embeddings", None) or 64)
    table: Any = ours.get_input_embeddings()
    vocabulary = table.weight.shape[0]
    ids = torch.randint(0, vocabulary, (2, length), generator=generator)
    padding = getattr(ours.config, "pad_token_id", None)
    if padding is not None:  # some architectures count positions by the tokens that are not padding
        ids = torch.where(ids == padding, (padding + 1) % vocabulary, ids)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    expected, actual = _logits(ours, ids, mask), _logits(theirs, ids, mask)
    difference = float((expected - actual).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:
        raise ArtifactError(
            f"`{directory}`: the logits differ by {difference:.1e} of the largest, more than {_TOLERANCE}"
        )
    if proof_file is not None:
        tensors = {"input_ids": ids, "attention_mask": mask, "logits": expected}
        proof_file.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(proof_file, [(name, tensor_bytes(tensor)) for name, tensor in tensors.items()])
    return Proof(directory, theirs.config.model_type, theirs.num_parameters(), difference)


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """(tokens, vocabulary) logits of the tokens among (rows, length) ids; a detector gives a number a token."""
    output = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    said = model(input_ids=ids, attention_mask=mask, **output)
    logits: Tensor = said.prediction_logits if "prediction_logits" in said else said.logits
    return logits[mask.bool()]
