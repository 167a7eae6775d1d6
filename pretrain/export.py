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
from pretrain.interop import NoStockHome, stock_config
from pretrain.model_dir import DTYPES, write_model
from pretrain.model_reading import GENERATOR, is_held, read_config, read_loom, read_stock, stored_task
from pretrain.models import LoomConfig, LoomPreTrainedModel, task_of
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
    code: bool = False,
    replace: bool = False,
    proof_file: Path | None = None,
) -> Proof:
    """Write the model of a run, checkpoint or model directory for publishing, then read it back and compare logits.

    Of a detector of replaced tokens that is the discriminator, and in the folder `generator` its generator.

    Args:
        source: a run directory (its latest checkpoint), a checkpoint, or a model directory.
        out: the directory to make.
        dtype: fp32, bf16 or fp16.
        max_shard_bytes: larger models are split over several files.
        code: write our own form with its code, which holds any shape; the form too of a model that came with its code
            and has no stock architecture.
        replace: whether `out` may exist.
        proof_file: where token ids and the live model's logits are kept, for a comparison in another process.

    Raises:
        ValueError: when the dtype is unknown, or no stock architecture holds the model; names the keys in the way.
        ArtifactError: when `source` holds no model, or an altered checkpoint's, `out` exists, or the logits differ;
            then nothing is published.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype} is unknown; use one of {', '.join(DTYPES)}")
    directory = model_directory(Path(source))
    checkpoint.verify_model(directory)
    models: dict[str, PreTrainedModel] = _published(directory)
    proofs: list[Proof] = []
    with commit_directory(Path(out), replace=replace) as temporary:
        for name, model in models.items():
            as_written(model, DTYPES[dtype])
            place = temporary / name
            place.mkdir(exist_ok=True)
            write_model(
                model,
                place,
                tokenizer_directory=directory,
                dtype=DTYPES[dtype],
                max_shard_bytes=max_shard_bytes,
                code=_with_code(model, directory, code),
            )
            stock = read_stock(place, task=stored_task(read_config(place)))
            proofs.append(_prove(model, stock, Path(out) / name, None if name else proof_file))
    return proofs[0]


def import_model(source: Path, out: Path) -> Proof:
    """Turn a stock model directory into a Loom directory, which carries its code, and compare logits.

    Raises:
        ValueError: when the architecture is not one that we hold.
        ArtifactError: when `source` holds no model, `out` exists, or the logits differ.
    """
    proofs: list[Proof] = []
    with commit_directory(Path(out)) as temporary:
        for name in ("", GENERATOR) if _has_generator(source) else ("",):
            own = source / name
            model, stock = _read(own), read_stock(own, task=stored_task(read_config(own)))
            (temporary / name).mkdir(exist_ok=True)
            write_model(model, temporary / name, tokenizer_directory=source, code=True)
            proofs.append(_prove(stock, model, Path(out) / name, None))
    return proofs[0]


def _published(source: Path) -> dict[str, PreTrainedModel]:
    """The models of a directory by the folder of the export that each is written to; the first one has none."""
    if not is_held(source):
        return {"": read_stock(source)}
    model: Any = _read(source)
    if getattr(model, GENERATOR, None) is not None:
        return dict(zip(("", GENERATOR), model.published_parts(), strict=True))
    return {"": model} | ({GENERATOR: _read(source / GENERATOR)} if _has_generator(source) else {})


def _with_code(model: PreTrainedModel, source: Path, asked: bool) -> bool:
    """Whether a model is written in our own form."""
    if not isinstance(model.config, LoomConfig):
        if asked:
            raise ValueError(f"--code: `{source}` is a stock model, which needs no code of ours; leave it out")
        return False
    if asked:
        return True
    try:
        stock_config(model.config, task_of(model) or "pretraining")
    except NoStockHome as refusal:
        if getattr(read_config(source), "auto_map", None) is None:
            raise NoStockHome(f"{refusal}: --code", refusal.keys) from None
        return True
    return False


def _has_generator(source: Path) -> bool:
    """Whether it is a published detector of replaced tokens with its generator beside it."""
    return (source / GENERATOR / "config.json").is_file()


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
