"""T5: pre-norm encoder-decoder with relative positions and no biases (T5ForConditionalGeneration and its kin).

Version 1.0 ties its head to the table and scales what reaches it; version 1.1 does neither. Its config says which by
`scale_decoder_outputs` (transformers 5) or `tie_word_embeddings` (4); the class of version 5 ties the head of both
until it reads a head that differs. It has one dropout for all places.
"""

from __future__ import annotations

from typing import Any

from transformers import T5Config

from pretrain.models import LoomSeq2SeqConfig

from .mapping import Home, NotHeld, Rule, Task, linear, norm


def _to_config(config: LoomSeq2SeqConfig) -> T5Config:
    scale = config.hidden_size**-0.5 if config.tie_word_embeddings else 1.0
    if config.output_scale != scale:
        tied = str(config.tie_word_embeddings).lower()
        raise NotHeld("output_scale", config.output_scale, f"{scale} beside tie_word_embeddings {tied}")
    ids = {name: getattr(config, name) for name in ("bos_token_id", "decoder_start_token_id")}
    # No fields of T5Config: read apart, or carried as published configs carry them.
    more: dict[str, Any] = {name: token for name, token in ids.items() if token is not None}
    more |= {"tie_word_embeddings": config.tie_word_embeddings, "n_positions": config.max_position_embeddings}
    return T5Config(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        d_kv=config.head_dim,
        d_ff=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_decoder_layers=config.num_decoder_layers,
        num_heads=config.num_attention_heads,
        relative_attention_num_buckets=config.relative_attention_num_buckets,
        relative_attention_max_distance=config.relative_attention_max_distance,
        dropout_rate=config.hidden_dropout,
        classifier_dropout=config.classifier_dropout,
        layer_norm_epsilon=config.norm_eps,
        initializer_factor=config.initializer_range,
        feed_forward_proj=_feed_forward(config),
        use_cache=config.use_cache,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        **more,
    )


def _feed_forward(config: LoomSeq2SeqConfig) -> str:
    if config.mlp_kind == "plain":
        return config.hidden_act
    if config.hidden_act == "gelu":
        raise NotHeld("hidden_act", "gelu", "gelu_new: it reads gated-gelu as the approximation by tanh")
    return "gated-gelu" if config.hidden_act == "gelu_new" else f"gated-{config.hidden_act}"


def _from_config(stock: Any) -> LoomSeq2SeqConfig:
    tied = bool(stock.scale_decoder_outputs)
    positions: Any = getattr(stock, "n_positions", None)
    return LoomSeq2SeqConfig(
        architecture="t5",
        vocab_size=stock.vocab_size,
        hidden_size=stock.d_model,
        head_dim=stock.d_kv,
        intermediate_size=stock.d_ff,
        num_hidden_layers=stock.num_layers,
        num_decoder_layers=stock.num_decoder_layers,
        num_attention_heads=stock.num_heads,
        max_position_embeddings=positions,
        relative_attention_num_buckets=stock.relative_attention_num_buckets,
        relative_attention_max_distance=stock.relative_attention_max_distance,
        hidden_dropout=stock.dropout_rate,
        embedding_dropout=stock.dropout_rate,
        attention_dropout=stock.dropout_rate,
        classifier_dropout=stock.classifier_dropout,
        norm_eps=stock.layer_norm_epsilon,
        initializer_range=stock.initializer_factor,
        mlp_kind="gated" if stock.is_gated_act else "plain",
        hidden_act=stock.dense_act_fn,
        output_scale=stock.d_model**-0.5 if tied else 1.0,
        tie_word_embeddings=tied,
        use_cache=stock.use_cache,
        pad_token_id=stock.pad_token_id,
        bos_token_id=getattr(stock, "bos_token_id", None),
        eos_token_id=stock.eos_token_id,
        decoder_start_token_id=getattr(stock, "decoder_start_token_id", None),
    )


def _normal(stock: dict[str, Any]) -> dict[str, Any]:
    same = {"gated-gelu_new": "gated-gelu"}
    return stock | {"feed_forward_proj": same.get(stock["feed_forward_proj"], stock["feed_forward_proj"])}


def _rules(config: LoomSeq2SeqConfig, task: Task, prefix: str) -> list[Rule]:
    loom = "" if task == "base" else "model."
    rules = [Rule("shared.weight", (f"{loom}encoder.embed_tokens.weight",))]
    for stack, layers in (("encoder", config.num_hidden_layers), ("decoder", config.num_decoder_layers)):
        first = f"{stack}.block.0.layer.0.SelfAttention"
        bias = f"{loom}{stack}.mixer_inputs.relative_bias.weight"
        rules.append(Rule(f"{first}.relative_attention_bias.weight", (bias,)))
        for layer in range(layers):
            rules += _block_rules(config, f"{loom}{stack}.layers.{layer}", f"{stack}.block.{layer}", stack == "decoder")
        rules += norm(f"{loom}{stack}.norm", f"{stack}.final_layer_norm", False)
    if task == "pretraining" and not config.tie_word_embeddings:
        rules.append(Rule("lm_head.weight", ("lm_head.weight",)))
    return rules


def _block_rules(config: LoomSeq2SeqConfig, ours: str, theirs: str, crossing: bool) -> list[Rule]:
    rules: list[Rule] = []
    branches = [("self_attn", "attention_norm", "SelfAttention")]
    if crossing:
        branches.append(("cross_attn", "cross_attention_norm", "EncDecAttention"))
    for place, (attention, before, name) in enumerate(branches):
        for letter in "qkvo":
            rules += linear(f"{ours}.{attention}.{letter}_proj", f"{theirs}.layer.{place}.{name}.{letter}", False)
        rules += norm(f"{ours}.{before}", f"{theirs}.layer.{place}.layer_norm", False)
    last = f"{theirs}.layer.{len(branches)}"
    gated = config.mlp_kind == "gated"
    matrices = [("gate_proj", "wi_0"), ("up_proj", "wi_1")] if gated else [("up_proj", "wi")]
    for mine, name in [*matrices, ("down_proj", "wo")]:
        rules += linear(f"{ours}.mlp.{mine}", f"{last}.DenseReluDense.{name}", False)
    return rules + norm(f"{ours}.mlp_norm", f"{last}.layer_norm", False)


def _copies(stock: Any) -> dict[str, str]:
    """The tables of both stacks always; the head where version 1.0 ties it."""
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    return dict.fromkeys([*names, "lm_head.weight"] if stock.scale_decoder_outputs else names, "shared.weight")


T5 = Home(
    name="t5",
    kind="seq2seq",
    prefix="",
    position_kind="relative",
    classes={"pretraining": "T5ForConditionalGeneration", "base": "T5Model"},
    to_config=_to_config,
    from_config=_from_config,
    rules=_rules,
    duplicates={},
    copies=_copies,
    normal=_normal,
)
