"""What the Loom encoder and decoder share: initialisation, embeddings, the stack of blocks, the classification loss.

Heads live in `modeling_loom_encoder.py` and `modeling_loom_decoder.py`; the block in `layers.py`.
"""

# mypy: disable-error-code="misc, no-untyped-call, untyped-decorator, assignment, index"
# (transformers' base classes and decorators, and the attributes of nn.Module, are untyped)

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from .attention import CAPABILITIES, RotaryTables, rotary_tables
from .configuration_loom import LoomConfig
from .dropout import EMBEDDING_SITE, dropout
from .layers import LoomAttention, LoomLayer, LoomPredictionHead, LoomRMSNorm, make_norm
from .losses import mean_over_targets
from .masks import build_masks, document_positions


class LoomPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation of every Loom model."""

    config: LoomConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LoomLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": LoomLayer, "attentions": LoomAttention}

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Resolve a backend's name; refuses names outside the capability table."""
        if requested_attention is not None and requested_attention not in CAPABILITIES:
            known = ", ".join(CAPABILITIES)
            raise ValueError(
                f"attn_implementation {requested_attention!r} is unknown to Loom models: take one of {known}"
            )
        return str(super().get_correct_attn_implementation(requested_attention, is_init_check))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module by `config.initializer`.

        normal: every matrix from N(0, initializer_range). scaled_normal (GPT-2): o_proj and down_proj, which write
        into the residual stream, divided by sqrt(2 layers). scaled_truncated_normal (Megatron's scheme as ModernBERT
        uses it): the same, cut at two standard deviations; the head's transform and an untied token head take the
        divided width, the classifier hidden_size ** -0.5. Biases 0, norms 1.
        """
        if isinstance(module, nn.LayerNorm | LoomRMSNorm):
            init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            self._draw(module.weight, self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            self._draw(module.weight, self._width(module))
            if module.bias is not None:
                init.zeros_(module.bias)

    def _width(self, module: nn.Linear) -> float:
        """The standard deviation of one matrix, by the role it was registered under (`_mark_roles`)."""
        width = self.config.initializer_range
        role = getattr(module, "loom_role", None)
        if self.config.initializer == "normal" or role is None:
            return width
        divided = width / math.sqrt(2 * self.config.num_hidden_layers)
        if role == "residual":
            return divided
        if self.config.initializer == "scaled_truncated_normal":
            return divided if role == "head" else self.config.hidden_size**-0.5
        return width

    def _draw(self, weight: Tensor, width: float) -> None:
        if self.config.initializer == "scaled_truncated_normal":
            init.trunc_normal_(weight, mean=0.0, std=width, a=-2 * width, b=2 * width)
        else:
            init.normal_(weight, mean=0.0, std=width)

    def _mark_roles(self) -> None:
        """Tell matrices with an initialisation of their own what they are; called before `post_init`."""
        for module in self.modules():
            if isinstance(module, LoomLayer):
                module.self_attn.o_proj.loom_role = "residual"
                module.mlp.down_proj.loom_role = "residual"
            elif isinstance(module, LoomPredictionHead):
                module.dense.loom_role = "head"
        for name, role in (("lm_head", "head"), ("classifier", "classifier"), ("score", "classifier")):
            if isinstance(getattr(self, name, None), nn.Linear):
                getattr(self, name).loom_role = role


class LoomModel(LoomPreTrainedModel):
    """Embeddings and blocks, without a head. Encoder and decoder differ in masks and cache alone."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_kind == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.type_vocab_size:
            self.embed_token_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        if config.embedding_norm:
            self.embed_norm = make_norm(config)
        self.layers = nn.ModuleList([LoomLayer(config, index) for index in range(config.num_hidden_layers)])
        if config.norm_placement == "pre":
            self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self._mark_roles()
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        dropout_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """(B, L) token ids, or (B, L, hidden) embeddings -> last hidden state (B, L, hidden).

        attention_mask: None, (B, keys) with 1 = token, or 4D (bool, True = may look; or added to the scores).
        document_ids (B, L): 0 = padding, 1.. = piece of the row; pieces do not see each other. position_ids default to
        places in the row, or in the piece when document_ids are given. dropout_keys (B,) int64: while training, the
        masks of hidden and embedding dropout are a function of each row's key; None draws them from torch's generator.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length, device = embeddings.shape[1], embeddings.device
        past_key_values = self._cache(past_key_values, use_cache)
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        key_length = length if past_key_values is None else past_key_values.get_mask_sizes(length, 0)[0]
        masks = build_masks(
            self.config,
            causal=self.config.kind == "decoder",
            length=length,
            past_length=past_length,
            key_length=key_length,
            device=device,
            attention_mask=attention_mask,
            document_ids=document_ids,
        )
        position_ids = self._positions(position_ids, document_ids, length, past_length, device)
        hidden_states = self._embed(embeddings, position_ids, token_type_ids, dropout_keys)
        rotary = self._rotary(position_ids)
        need_weights = bool(kwargs.get("output_attentions", self.config.output_attentions))
        for layer in self.layers:
            kind = str(layer.attention_kind)
            hidden_states = layer(
                hidden_states,
                mask=masks[kind],
                rotary=rotary.get(kind),
                past_key_values=past_key_values,
                need_weights=need_weights,
                dropout_keys=dropout_keys,
            )
        if self.config.norm_placement == "pre":
            hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _cache(self, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to fill. Training keeps none unless asked; gradient checkpointing cannot keep one."""
        if self.config.kind != "decoder" or (self.gradient_checkpointing and self.training):
            return None
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", False) and not self.training
        if past_key_values is None and use_cache:
            return DynamicCache()
        return past_key_values

    def _positions(
        self,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
        length: int,
        past_length: int | Tensor,
        device: torch.device,
    ) -> Tensor:
        """(B or 1, L) positions, checked against a learned table where that needs no look at the values."""
        if position_ids is not None:
            return position_ids
        if document_ids is not None:
            return document_positions(document_ids)
        longest = self.config.max_position_embeddings
        if self.config.position_kind == "learned" and isinstance(past_length, int) and past_length + length > longest:
            raise ValueError(
                f"the input reaches position {past_length + length}, the model has max_position_embeddings {longest}"
            )
        return (torch.arange(length, device=device) + past_length)[None]

    def _embed(
        self, embeddings: Tensor, position_ids: Tensor, token_type_ids: Tensor | None, dropout_keys: Tensor | None
    ) -> Tensor:
        if self.config.type_vocab_size:
            if token_type_ids is None:
                embeddings = embeddings + self.embed_token_types.weight[0]
            else:
                embeddings = embeddings + self.embed_token_types(token_type_ids)
        if self.config.position_kind == "learned":
            embeddings = embeddings + self.embed_positions(position_ids)
        if self.config.embedding_norm:
            embeddings = self.embed_norm(embeddings)
        if self.training and self.config.embedding_dropout > 0.0:
            embeddings = dropout(embeddings, self.config.embedding_dropout, dropout_keys, EMBEDDING_SITE)
        return embeddings

    def _rotary(self, position_ids: Tensor) -> dict[str, RotaryTables]:
        """Rotary tables of each kind of layer, made once per forward."""
        if self.config.position_kind != "rotary":
            return {}
        thetas = {"global": self.config.rope_theta, "local": self.config.local_rope_theta}
        return {
            kind: rotary_tables(position_ids, self.config.head_dim, float(thetas[kind] or 0.0))
            for kind in sorted(set(self.config.attention_kinds))
        }


def classification_loss(
    logits: Tensor, labels: Tensor, config: LoomConfig, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Loss of (B, num_labels) logits by `config.problem_type`, which is set from the labels when it is None.

    One label: mean squared error; whole-number labels: cross-entropy; else binary cross-entropy per label.
    """
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.dtype in (torch.long, torch.int):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"
    logits = logits.float()
    if config.problem_type == "single_label_classification":
        total = functional.cross_entropy(logits, labels.view(-1).long(), reduction="sum")
        return mean_over_targets(total, labels, num_items_in_batch)
    labels = labels.to(logits.dtype).view(logits.shape)
    if config.problem_type == "regression":
        return functional.mse_loss(logits, labels)
    return functional.binary_cross_entropy_with_logits(logits, labels)
