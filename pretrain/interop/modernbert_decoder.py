"""ModernBERT's recipe as a decoder (ModernBertDecoderForCausalLM); Weller et al. 2025 (Ettin, arXiv 2507.11412).

A local layer there looks back over half of `local_attention`, the token itself among them: our `local_window`. Its
config must name the ids of padding and of the first token.
"""

from __future__ import annotations

from typing import Any

from transformers import ModernBertDecoderConfig

from pretrain.models import LoomDecoderConfig

from .mapping import Home, NotHeld, Rule, Task, linear
from .modernbert_like import LOCAL, from_fields, normal, stack_rules, to_fields, token_head_rules, transform_rules


def _to_config(config: LoomDecoderConfig) -> ModernBertDecoderConfig:
    for name in ("pad_token_id", "bos_token_id"):
        if getattr(config, name) is None:
            raise NotHeld(name, None, "an id of the vocabulary")
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    ids: dict[str, Any] = {
        "cls_token_id": config.bos_token_id,
        "sep_token_id": config.bos_token_id if end is None else end,
    }
    return ModernBertDecoderConfig(
        **to_fields(config),
        **ids,
        local_attention=None if config.local_window is None else 2 * config.local_window,
        use_cache=config.use_cache,
    )


def _from_config(stock: Any) -> LoomDecoderConfig:
    window = {"local_window": stock.local_attention // 2} if LOCAL in stock.layer_types else {}
    keys = from_fields(stock) | window
    return LoomDecoderConfig(architecture="modernbert-decoder", **keys, use_cache=stock.use_cache)


def _normal(stock: dict[str, Any]) -> dict[str, Any]:
    stock = normal(stock)
    if stock.get("local_attention") is not None:
        stock["local_attention"] -= stock["local_attention"] % 2  # the half is rounded down
    return stock


def _rules(config: LoomDecoderConfig, task: Task, prefix: str) -> list[Rule]:
    loom = "" if task == "base" else "model."
    projections: list[list[Rule]] = []
    for layer in range(config.num_hidden_layers):
        projections.append([])
        for name in ("q_proj", "k_proj", "v_proj"):
            ours, theirs = f"{loom}layers.{layer}.self_attn.{name}", f"{prefix}layers.{layer}.attn.{name}"
            projections[-1] += linear(ours, theirs, config.attention_bias)
    rules = stack_rules(config, loom, prefix, projections)
    if task == "pretraining":
        rules += [*transform_rules(config, "lm_head"), *token_head_rules(config)]
    elif task == "classification":
        rules += [*transform_rules(config, "head"), *linear("score", "classifier", config.head_dense_bias)]
    return rules


MODERNBERT_DECODER = Home(
    name="modernbert-decoder",
    kind="decoder",
    prefix="model.",
    position_kind="rotary",
    classes={
        "pretraining": "ModernBertDecoderForCausalLM",
        "classification": "ModernBertDecoderForSequenceClassification",
        "base": "ModernBertDecoderModel",
    },
    to_config=_to_config,
    from_config=_from_config,
    rules=_rules,
    duplicates={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    unread=("initializer_cutoff_factor", "cls_token_id", "sep_token_id"),
    normal=_normal,
)
