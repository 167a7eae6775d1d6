"""Tiny stock models of several architectures with random weights, and tokenizers for them."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "it", "was", "very"]
WORDS += ["small", "big", "red", "old", ".", ","]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with <|endoftext|> = 0 for both ends; 257 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {letter: number for number, letter in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=32
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words, with BERT's special tokens and template."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{role}_token": token for role, token in roles.items()}
    )


def build(architecture: str) -> Any:
    """A model of 2 layers and width 16, every parameter drawn from a normal."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = sizes | {"vocab_size": 32, "intermediate_size": 32, "max_position_embeddings": 24, "pad_token_id": 0}
    if architecture == "gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(vocab_size=257, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        )
    elif architecture == "llama":
        keys = sizes | {"intermediate_size": 32, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=257, **keys))
    elif architecture == "bert":
        model = BertForMaskedLM(BertConfig(**encoder))
    elif architecture == "roberta":
        model = RobertaForMaskedLM(RobertaConfig(**encoder | {"pad_token_id": 1}))
    else:
        keys = encoder | {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
        model = ModernBertForMaskedLM(ModernBertConfig(**keys))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model.eval()
