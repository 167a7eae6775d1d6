"""GPT-2: pre-norm decoder with learned positions (GPT2LMHeadModel and its kin); its dense layers lie transposed."""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config

from pretrain.models import LoomDecoderConfig

from .mapping import Home, Rule, Task, attention_rows, join_linear, linear, norm


def _to_config(config: LoomDecoderConfig) -> GPT2Config:
    return GPT2Config(
        vocab_size=config.vocab_size,
        n_embd=config.hidden_size,
        n_inner=config.intermediate_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_positions=config.max_position_embeddings,
        activation_function=config.hidden_act,
        resid_pdrop=config.hidden_dropout,
        embd_pdrop=config.embedding_dropout,
        attn_pdrop=config.attention_dropout,
        layer_norm_epsilon=config.norm_eps,
        initializer_range=config.initializer_range,
        use_cache=config.use_cache,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def _from_config(stock: Any) -> LoomDecoderConfig:
    return LoomDecoderConfig(
        architecture="gpt2",
        vocab_size=stock.vocab_size,
        hidden_size=stock.n_embd,
        intermediate_size=4 * stock.n_embd if stock.n_inner is None else stock.n_inner,
        num_hidden_layers=stock.n_layer,
        num_attention_heads=stock.n_head,
        max_position_embeddings=stock.n_positions,
        hidden_act=stock.activation_function,
        hidden_dropout=stock.resid_pdrop,
        embedding_dropout=stock.embd_pdrop,
        attention_dropout=stock.attn_pdrop,
        norm_eps=stock.layer_norm_epsilon,
        initializer_range=stock.initializer_range,
        use_cache=stock.use_cache,
        bos_token_id=stock.bos_token_id,
        eos_token_id=stock.eos_token_id,
        pad_token_id=stock.pad_token_id,
        tie_word_embeddings=stock.tie_word_embeddings,
    )


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
    return rules


GPT2 = Home(
    name="gpt2",
    kind="decoder",
    prefix="transformer.",
    position_kind="learned",
    classes={
        "pretraining": "GPT2LMHeadModel",
        "classification": "GPT2ForSequenceClassification",
        "base": "GPT2Model",
    },
    config_type=GPT2Config,
    to_config=_to_config,
    from_config=_from_config,
    rules=_rules,
    classifier="score.weight",
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
