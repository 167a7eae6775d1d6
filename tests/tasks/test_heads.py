"""Models with heads: what does not fit their positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from pretrain.config_task import TuneTrainConfig
from pretrain.evaluation.loading import usable_positions
from pretrain.tasks.heads import PLAIN_ATTENTION_TOKENS, check_length, prepare_passes
from pretrain.tasks.writing import check_room

SHAPE: dict[str, Any] = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 8, "max_position_embeddings": 34}


def test_the_positions_before_the_first_are_not_counted() -> None:
    """RoBERTa counts from its padding id + 1: 34 positions with padding 1 are 32 tokens; BERT has all 34."""
    roberta = RobertaForSequenceClassification(RobertaConfig(**SHAPE, pad_token_id=1))
    assert usable_positions(roberta) == 32
    check_length(roberta, 32, "r")
    with pytest.raises(ValueError, match=r"task\.max_length: 33 is longer than the 32 positions of `r`; lower it"):
        check_length(roberta, 33, "r")
    decoder = RobertaForCausalLM(RobertaConfig(**SHAPE, pad_token_id=1, is_decoder=True))
    check_room(decoder, 32, "task.max_length")
    with pytest.raises(ValueError, match=r"task\.max_length: 33 tokens do not fit the 32 positions"):
        check_room(decoder, 33, "task.max_length")
    bert = BertForSequenceClassification(BertConfig(**SHAPE))
    check_length(bert, 34, "b")
    with pytest.raises(ValueError, match="35 is longer than the 34 positions"):
        check_length(bert, 35, "b")


def test_a_model_without_a_limit_takes_any_length() -> None:
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    assert usable_positions(model) is None
    check_length(model, 10_000, "t")
    check_room(model, 10_000, "task.max_target_length")


@pytest.mark.parametrize(
    ("asked", "device", "length", "taken"),
    [
        ("auto", "cpu", PLAIN_ATTENTION_TOKENS, "eager"),
        ("auto", "cpu", PLAIN_ATTENTION_TOKENS + 1, "sdpa"),
        ("auto", "cuda", 16, "sdpa"),
        ("sdpa", "cpu", 16, "sdpa"),
        ("eager", "cuda", 512, "eager"),
    ],
)
def test_short_rows_on_a_cpu_go_without_the_fused_kernel(asked: Any, device: str, length: int, taken: str) -> None:
    model = BertForSequenceClassification(BertConfig(**SHAPE))
    prepare_passes(model, TuneTrainConfig(steps=1, attention=asked), torch.device(device), length)
    assert model.config._attn_implementation == taken
