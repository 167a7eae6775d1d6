"""Tiny decoders and encoder-decoders with a tokenizer of bytes, as directories that the verbs read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from pretrain.config_task import TuningConfig, load_tuning
from pretrain.models import loom_config, model_class

PAD, BOS, EOS = 0, 1, 2
POSITIONS = 160


def byte_tokenizer(*, chatml: bool = False) -> Any:
    """Bytes and the special tokens <pad>, <s>, </s>, which it does not add by itself."""
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if chatml:
        tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=POSITIONS
    )
    if chatml:
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def build(architecture: str, vocabulary: int, *, drawn: float | None = 0.1) -> Any:
    """A model of 2 layers, each parameter drawn from a normal of that deviation; None: as its class draws them."""
    torch.manual_seed(0)
    ids: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    width = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    if architecture == "gpt2":
        keys = {"vocab_size": vocabulary, "n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 2}
        model: Any = GPT2LMHeadModel(GPT2Config(**keys, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0, **ids))
    elif architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=POSITIONS, **width, **ids))
    elif architecture == "bert":
        model = BertForMaskedLM(BertConfig(vocab_size=vocabulary, max_position_embeddings=POSITIONS, **width))
    elif architecture == "marian":
        sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
        sizes |= {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")}
        keys = {"vocab_size": vocabulary, "decoder_vocab_size": vocabulary, "max_position_embeddings": POSITIONS}
        keys |= {"d_model": 32, "decoder_start_token_id": PAD, "forced_eos_token_id": None, "dropout": 0.0}
        model = MarianMTModel(MarianConfig(**keys, **sizes, **ids))
    elif architecture == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=vocabulary, **sizes, decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=EOS)
        )
    else:
        kind = "seq2seq" if architecture == "loom-seq2seq" else "decoder"
        more = {"decoder_start_token_id": PAD} if kind == "seq2seq" else {}
        name = "transformer" if kind == "seq2seq" else "llama"
        config = loom_config(
            name, vocab_size=vocabulary, max_position_embeddings=POSITIONS, **width, **ids, **more, hidden_dropout=0.0
        )
        model = model_class(config, "pretraining")(config)
    if drawn is not None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, drawn, generator=generator)
    return model.eval()


def model_directory(root: Path, architecture: str, *, chatml: bool = False, drawn: float | None = 0.1) -> Path:
    """The directory of a tiny model and its tokenizer."""
    tokenizer = byte_tokenizer(chatml=chatml)
    directory = root / architecture
    build(architecture, len(tokenizer), drawn=drawn).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """One object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def tuning(root: Path, task: Mapping[str, Any], *overrides: str, **sections: Any) -> TuningConfig:
    """A fine-tuning of some steps in `root`/out, in full precision."""
    plain = {
        "name": "tuned",
        "out": str(root / "out"),
        "task": {"root": str(root), **task},
        "train": {"steps": 30, "batch_size": 16, "precision": "fp32"},
        "evaluate": {"every": "50%"},
        "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.0, "betas": [0.9, 0.98]},
        "log": {"to": ["jsonl"]},
        **sections,
    }
    file = root / "tuning.yaml"
    file.write_text(json.dumps(plain), encoding="utf-8")
    return load_tuning(file, overrides)
