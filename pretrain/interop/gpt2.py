"""GPT-2: pre-norm decoder with learned positions (GPT2LMHeadModel and its kin); its dense layers lie transposed."""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config

from pretrain.models import LoomDecoderConfig

from .mapping import (
    Home,
    Rule,
    Task,
    attention_rows,
    fields_from_stock,
    fields_to_stock,
    join_linear,
    linear,
    norm,
    per_token_rules,
)

_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "hidden_dropout": "resid_pdrop",
    "embedding_dropout": "embd_pdrop",
    "attention_dropout": "attn_pdrop",
    "norm_eps": "layer_norm_epsilon",
    "initializer_range": "initializer_range",
    "use_cache": "use_cache",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
}


def _to_config(config: LoomDecoderConfig) -> GPT2Config:
    return GPT2Config(**fields_to_stock(config, _FIELDS), n_inner=config.intermediate_size)


def _from_config(stock: Any) -> LoomDecoderConfig:
    inner = 4 * stock.n_embd if stock.n_inner is None else stock.n_inner
    return LoomDecoderConfig(architecture="gpt2", **fields_from_stock(stock, _FIELDS), intermediate_size=inner)


def _normal(stock: dict[str, Any]) -> dict[str, Any]:
    inner = stock["n_inner"]
    return stock | {"n_inner": 4 * stock["n_embd"] if inner is None else inner}


def _rules(config: LoomDecoderConfig, task: Task, prefix: str) -> list[Rule]:
    loom = "" if task == "base" else "model."
    rules = [
        Rule(f"{prefix}wte.weight", (f"{loom}embed_tokens.weight",)),
        Rule(f"{prefix}wpe.weight", (f"{loom}embed_positions.weight",)),
        *norm(f"{loom}norm", f"{prefix}ln_f", True),
    ]
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"{loom}layers.{layer}", f"{prefix}h.{layer}"
        projections = tuple(f"{ours}.self_attn.{name}_proj" for name in "qkv")
        rules += [
            *norm(f"{ours}.attention_norm", f"{theirs}.ln_1", True),
            *join_linear(projections, f"{theirs}.attn.c_attn", True, attention_rows(config), transposed=True),
            *linear(f"{ours}.self_attn.o_proj", f"{theirs}.attn.c_proj", True, transposed=True),
            *norm(f"{ours}.mlp_norm", f"{theirs}.ln_2", True),
            *linear(f"{ours}.mlp.up_proj", f"{theirs}.mlp.c_fc", True, transposed=True),
            *linear(f"{ours}.mlp.down_proj", f"{theirs}.mlp.c_proj", True, transposed=True),
        ]
    if task == "pretraining" and not config.tie_word_embeddings:
        rules.append(Rule("lm_head.weight", ("lm_head.weight",)))
    elif task == "classification":
        rules.append(Rule("score.weight", ("score.weight",)))
    return rules + per_token_rules(task)


GPT2 = Home(
    name="gpt2",
    kind="decoder",
    prefix="transformer.",
    position_kind="learned",
    classes={
        "pretraining": "GPT2LMHeadModel",
        "classification": "GPT2ForSequenceClassification",
        "token_classification": "GPT2ForTokenClassification",
        "question_answering": "GPT2ForQuestionAnswering",
        "base": "GPT2Model",
    },
    to_config=_to_config,
    from_config=_from_config,
    rules=_rules,
    duplicates={"lm_head.weight": "transformer.wte.weight"},
    unread=(
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
    ),
    normal=_normal,
    spare=(r"\.attn\.(masked_)?bias$",),  # causal masks, stored as buffers by early releases
)
