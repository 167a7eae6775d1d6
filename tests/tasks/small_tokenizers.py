"""Tokenizers of three algorithms, trained on a few sentences, and tiny models for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, GPT2Config, LlamaConfig, ModernBertConfig, PreTrainedTokenizerFast

TEXT = [
    "The old cat sat on the mat, and the dog's friend ran under a tree.",
    "In 1869 the chemist Dmitri Mendeleev published the periodic table of elements in Saint Petersburg.",
    "Who published the periodic table? Where did she go after the war? When was it built?",
    "在一八六九年，化学家门捷列夫发表了元素周期表。他住在圣彼得堡，很喜欢散步。",
    "Sitting, running and jumping cats don't like unhappy children.",
]
_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@cache
def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's: lower case, pieces, [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=260, special_tokens=_SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{role}_token": token for role, token in names.items()},
    )


@cache
def byte_bpe() -> PreTrainedTokenizerFast:
    """As GPT-2's: bytes, nothing around a text, and nothing between two."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", pad_token="<end>")


@cache
def unigram() -> PreTrainedTokenizerFast:
    """As T5's: a mark for each space, and one at the beginning."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=specials, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def config_of(architecture: str, **keys: Any) -> Any:
    """The configuration of a tiny model without dropout."""
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | keys
    if architecture == "gpt2":
        dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop", "classifier_dropout"), 0.0)
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128, "vocab_size": 400}
        return GPT2Config(**sizes, **dropouts, bos_token_id=0, eos_token_id=0, pad_token_id=0, **keys)
    shape |= {"vocab_size": 400, "intermediate_size": 32, "max_position_embeddings": 128, "pad_token_id": 0}
    if architecture == "llama":
        return LlamaConfig(**shape, bos_token_id=0, eos_token_id=0)
    if architecture == "modernbert":
        return ModernBertConfig(**shape, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)
    return BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def drawn(model: Any) -> Any:
    """The model with every parameter drawn from a normal, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model.eval()
