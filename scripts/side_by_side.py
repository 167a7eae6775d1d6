"""Both sides of a comparison with transformers' Trainer: the same shape, weights, batches, optimizer and schedule.

What lives here: the stock class under transformers' Trainer, and the Loom class with the same weights under ours, on
the same full, unpadded rows. `bench_speed.py` times them, `tests/test_equality_with_trainer.py` compares their losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    TrainingArguments,
)

from pretrain.config import RunConfig, config_from_dict
from pretrain.interop import from_stock
from pretrain.model_reading import load_state
from pretrain.models import model_from_config, pick_backend
from pretrain.published_store import PublishedStore
from pretrain.runtime import set_seed
from pretrain.training.optim import build_optimizer
from pretrain.training.schedule import learning_rate_scale
from pretrain.training.trainer import Trainer

ARCHITECTURES = ("gpt2", "llama", "bert", "modernbert")
DECODERS = ("gpt2", "llama")
FIRST_ORDINARY, MASK = 5, 4


@dataclass(frozen=True)
class Shape:
    """A model and its batch. `glu` is the width of gated MLPs (llama, modernbert); the plain ones have 4 x hidden."""

    hidden: int = 384
    layers: int = 6
    heads: int = 6
    glu: int = 1_024
    vocabulary: int = 8_192
    length: int = 256
    rows: int = 16


# --- what both sides share ------------------------------------------------------------------------------------------


def stock_model(architecture: str, shape: Shape, seed: int = 0) -> PreTrainedModel:
    """transformers' own class with its own initial weights, dropout 0."""
    set_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.length,
    }
    if architecture == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0))
    if architecture == "llama":
        ids = {"bos_token_id": 1, "eos_token_id": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, **ids, intermediate_size=shape.glu, tie_word_embeddings=True))
    if architecture == "bert":
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertForMaskedLM(BertConfig(**sizes, **dropout, intermediate_size=4 * shape.hidden, pad_token_id=0))
    ids = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    return ModernBertForMaskedLM(ModernBertConfig(**sizes, **ids, intermediate_size=shape.glu))


def our_model(stock: PreTrainedModel) -> PreTrainedModel:
    """The Loom class with the same weights."""
    config, state = from_stock(stock.config, stock.state_dict())
    model = model_from_config(config)
    load_state(model, {name: tensor.clone() for name, tensor in state.items()})
    return model


def make_rows(architecture: str, shape: Shape, number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Input ids and targets, each (number, length) int64: Zipf's law with a bigram rule, so there is much to learn.

    Causal: the target of a position is the next id, and the last position of a row has none (-100). Masked: 15% of
    positions, 80/10/10.
    """
    generator = np.random.default_rng(seed)
    ordinary = shape.vocabulary - FIRST_ORDINARY
    weights = 1.0 / np.arange(1, ordinary + 1)
    ids = generator.choice(ordinary, (number, shape.length), p=weights / weights.sum())
    follows = generator.permutation(ordinary)
    ruled = generator.random((number, shape.length)) < 0.5
    for place in range(1, shape.length):
        ids[:, place] = np.where(ruled[:, place], follows[ids[:, place - 1]], ids[:, place])
    ids += FIRST_ORDINARY
    if architecture in DECODERS:
        targets = np.concatenate([ids[:, 1:], np.full((number, 1), -100)], axis=1)
        return torch.from_numpy(ids), torch.from_numpy(targets)
    chosen = generator.random(ids.shape) < 0.15
    how = generator.random(ids.shape)
    labels = np.where(chosen, ids, -100)
    ids = np.where(chosen & (how < 0.8), MASK, ids)
    ids = np.where(chosen & (how >= 0.9), generator.integers(FIRST_ORDINARY, shape.vocabulary, ids.shape), ids)
    return torch.from_numpy(ids), torch.from_numpy(labels)


def run_config(
    architecture: str, shape: Shape, *, steps: int, precision: str, lr: float, warmup: int | str, log: list[str]
) -> RunConfig:
    """Our configuration of a side by side: AdamW (0.9, 0.999), no decay, clip 1.0, linear to 0."""
    kind = "causal" if architecture in DECODERS else "mlm"
    return config_from_dict(
        {
            "name": "bench",
            "data": {"train": ["python-stdlib"], "sequence_length": shape.length},
            "model": {"architecture": architecture},
            "objective": {"kind": kind},
            "optimizer": {"name": "adamw", "lr": lr, "betas": [0.9, 0.999]},
            "schedule": {"kind": "linear", "warmup": warmup},
            "train": {"steps": steps, "batch_tokens": shape.rows * shape.length, "precision": precision},
            "checkpoint": {"every": "100%", "keep": 1},
            "evaluate": {"every": "100%"},
            "log": {"to": log},
        }
    )


# --- the peer -------------------------------------------------------------------------------------------------------


class RowDataset(Dataset[dict[str, Tensor]]):
    """Rows in order, over and over.

    Causal rows carry their targets as `shift_labels` too. With `labels` alone, Trainer 5.23 divides the loss of GPT-2
    by one target a row too many: the class names no loss type, so the shift is not seen. The losses would not compare.
    """

    def __init__(self, rows: tuple[Tensor, Tensor], number: int, causal: bool) -> None:
        self.ids, self.targets = rows
        self.number, self.causal = number, causal

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = index % len(self.ids)
        row = {"input_ids": self.ids[place], "labels": self.targets[place]}
        return row | {"shift_labels": self.targets[place]} if self.causal else row


class PeerTrainer(transformers.Trainer):
    """transformers' Trainer, with its linear schedule one step ahead: its own makes the first update at rate 0."""

    run: RunConfig

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rates that our side has."""
        schedule = self.run.schedule
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer, lambda step: learning_rate_scale(step, num_training_steps, schedule)
        )
        return self.lr_scheduler


def peer_trainer(model: PreTrainedModel, rows: tuple[Tensor, Tensor], run: RunConfig, directory: Path) -> PeerTrainer:
    """transformers' Trainer on these rows; its arguments are its defaults but for what `run` says."""
    assert run.train.steps is not None
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=run.train.steps,
        per_device_train_batch_size=run.rows_per_batch,
        learning_rate=run.optimizer.lr,
        adam_beta1=run.optimizer.betas[0],
        adam_beta2=run.optimizer.betas[1],
        weight_decay=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=1 if run.log.to else 500,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        bf16=run.train.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=0,
    )
    dataset = RowDataset(rows, run.train.steps * run.rows_per_batch, run.objective.kind == "causal")
    trainer = PeerTrainer(model=model, args=arguments, train_dataset=dataset)
    trainer.run = run
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


# --- ours -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A batch, as our Trainer takes it."""

    arrays: dict[str, np.ndarray]
    num_targets: int
    num_tokens: int
    row_ids: np.ndarray


class RowData:
    """Our Trainer's data plane over the same rows in the same order."""

    fingerprint = "rows in memory"

    def __init__(self, rows: tuple[Tensor, Tensor], rows_per_batch: int, causal: bool) -> None:
        ids, self.targets = (part.numpy() for part in rows)
        self.arrays = {"input_ids": ids, "shift_labels" if causal else "labels": self.targets}
        self.num_rows, self.rows_per_batch = len(ids), rows_per_batch

    def batch(self, step: int, rows: slice | None = None) -> Rows:
        """Rows of `step`, all or some."""
        first = step * self.rows_per_batch
        chosen = np.arange(first, first + self.rows_per_batch)[rows or slice(None)] % self.num_rows
        arrays = {name: array[chosen] for name, array in self.arrays.items()}
        return Rows(arrays, int((self.targets[chosen] != -100).sum()), arrays["input_ids"].size, chosen)

    def state(self, samples_seen: int) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"samples_seen": samples_seen}

    def for_run(self, total_steps: int) -> list[str]:
        """Nothing depends on the length of the run."""
        return []

    def check(self, state: Any) -> None:
        """Any state fits."""


class OurTrainer(Trainer):
    """Our Trainer, with a place to be told that a step is done."""

    on_step: Callable[[], None] | None = None

    def _step(self, *arguments: Any) -> None:
        super()._step(*arguments)
        if self.on_step is not None:
            self.on_step()


def our_trainer(
    model: PreTrainedModel, rows: tuple[Tensor, Tensor], run: RunConfig, directory: Path, console: Console
) -> OurTrainer:
    """Our Trainer on these rows, with the attention backend that `pretrain train` picks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.set_attn_implementation(pick_backend(model.config, device)[0])
    return OurTrainer(
        run,
        model=model,
        data=RowData(rows, run.rows_per_batch, run.objective.kind == "causal"),
        optimizer=build_optimizer(model, run.optimizer),
        store=PublishedStore(),
        directory=directory,
        console=console,
    )
