"""What all Loom models share: loading, embeddings, the stack of blocks.

Heads live in `modeling_loom_encoder.py`, `modeling_loom_decoder.py`, `modeling_loom_seq2seq.py`,
`modeling_loom_heads.py`, `modeling_loom_decoder_heads.py` and `modeling_loom_rtd.py`; the block in `layers.py`.
"""

# mypy: disable-error-code="misc, no-untyped-call, untyped-decorator, assignment, index"
# (transformers' base classes and decorators, and the attributes of nn.Module, are untyped)

import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import refuse_backend
from .configuration_loom import LoomConfig
from .dropout import DECODER_SITES, EMBEDDING_SITE, dropout
from .initial_weights import initialize
from .layers import LoomLayer, LoomPredictionHead, LoomTokenHead, token_loss_sum
from .losses import softcap_logits
from .masks import cross_mask, documents_by_positions
from .mixers import MIXERS, Geometry, LoomCrossAttention, make_mixer_inputs
from .norms import make_norm
from .positions import document_positions, sinusoids


class LoomPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation of every Loom model."""

    config: LoomConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LoomLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": LoomLayer,
        "attentions": [OutputRecorder(mixer.layer, index=1) for mixer in MIXERS.values()],
        "cross_attentions": OutputRecorder(LoomCrossAttention, index=1),
    }

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Resolve a backend's name; refuses names outside the capability table, and what cannot hold the config."""
        if requested_attention is not None:
            refuse_backend(requested_attention, self.config)
        if requested_attention in ("flex", "varlen"):  # no names of transformers'
            return requested_attention
        return str(super().get_correct_attn_implementation(requested_attention, is_init_check))

    @property
    def vocab_size(self) -> int:
        """The config's; transformers sets it on a model that it resizes."""
        return int(self.config.vocab_size)

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.config.vocab_size = size

    def init_parallel_plans(self) -> None:
        """Collect the plans of all parts; of that for tensor parallelism, what this model has and can split.

        Biases by position have a row for every head, and a norm over all heads needs all of them: there attention
        stays whole.
        """
        super().init_parallel_plans()
        names = {re.sub(r"(^|\.)\d+", r"\1*", name) for name, _ in self.named_modules()}
        if self.config.position_kind in ("alibi", "relative") or self.config.qk_norm == "full_width":
            names = {name for name in names if ".self_attn." not in name}
        self._tp_plan = {name: style for name, style in self.tp_plan.items() if name in names}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers saves a model; with the code that its config names, whichever class of ours it is.

        Without that, a model that came with its code and is saved again (fine-tuned, say, by the installed classes)
        would name files in `auto_map` that do not lie beside it.
        """
        found, code = type(self), getattr(self.config, "auto_map", None) or {}
        own = f"{found.__module__.rsplit('.', 1)[-1]}.{found.__name__}"
        # A Hub name may stand before the file's.
        auto_class = next((auto for auto, name in code.items() if str(name).rsplit("--", 1)[-1] == own), None)
        registered = found._auto_class
        if auto_class is not None:
            found._auto_class = auto_class
            self.config._auto_class = "AutoConfig"
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            found._auto_class = registered

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw the weights of one module, by `config.initializer`."""
        initialize(module, self.config)


class LoomLanguageModel(LoomPreTrainedModel):
    """What every class with a token head shares: the transform before it, scales, caps, logits and losses."""

    lm_head: nn.Linear

    def make_head(self) -> None:
        """Add `head`, where the config asks for a transform, and `lm_head`."""
        config, width = self.config, self.config.hidden_size
        if config.head_transform:
            width = config.embedding_size
            self.head = LoomPredictionHead(config, width)
        self.lm_head = LoomTokenHead(width, config.vocab_size, bias=config.head_bias)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden) -> (..., vocabulary)."""
        return softcap_logits(self.lm_head(self._before_head(hidden_states)), self.config.logit_softcap)

    def loss_sum(self, hidden_states: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Summed cross-entropy at targets (...) of hidden states (..., hidden), without keeping logits."""
        states = self._before_head(hidden_states)
        return token_loss_sum(self.lm_head, states, targets, self.config.logit_softcap, label_smoothing)

    def _before_head(self, hidden_states: Tensor) -> Tensor:
        if self.config.output_scale != 1.0:
            hidden_states = hidden_states * self.config.output_scale
        return self.head(hidden_states) if self.config.head_transform else hidden_states


class LoomModel(LoomPreTrainedModel):
    """Embeddings and blocks, without a head: an encoder, a decoder, or one of the two parts of an encoder-decoder."""

    def __init__(self, config: LoomConfig, part: str | None = None) -> None:
        """`part` is encoder or decoder, for a config that has both; its decoder has no table of embeddings."""
        super().__init__(config)
        self.is_decoder = (part or config.kind) == "decoder"
        self.is_part = config.kind == "seq2seq"
        num_layers = int(config.num_decoder_layers if self.is_part and self.is_decoder else config.num_hidden_layers)
        width = config.embedding_size
        if not (self.is_part and self.is_decoder):
            self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if config.position_kind == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings + config.position_offset, width)
        if config.type_vocab_size:
            self.embed_token_types = nn.Embedding(config.type_vocab_size, width)
        if config.embedding_norm:
            self.embed_norm = make_norm(config, width)
        if width != config.hidden_size:
            self.embed_project = nn.Linear(width, config.hidden_size)
        self.attention_kinds = config.attention_kinds_of(num_layers)
        self.mixer_inputs = make_mixer_inputs(config, self.attention_kinds, causal=self.is_decoder)
        groups = num_layers if self.is_part else config.num_hidden_groups
        crossing = self.is_part and self.is_decoder
        self.layers = nn.ModuleList(
            [LoomLayer(config, index, causal=self.is_decoder, cross_attention=crossing) for index in range(groups)]
        )
        if config.norm_placement == "pre":
            self.norm = make_norm(config)
        self.gradient_checkpointing = False
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
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        encoder_document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """(B, L) token ids, or (B, L, embedding) of what `embed_tokens` finds -> last hidden state (B, L, hidden).

        attention_mask: None, (B, keys) with 1 = token, or 4D (bool, True = may look; or added to the scores).
        document_ids (B, L): 0 = padding, 1.. = piece of the row; pieces do not see each other. position_ids default to
        places in the row, or in the piece when document_ids are given; where they start anew within a row, and neither
        mask, document_ids nor a cache is given, a piece begins, as in transformers' own packed rows. dropout_keys (B,)
        int64: while training, the masks of hidden and embedding dropout are a function of each row's key; None draws
        them from torch's generator. The decoder of an encoder-decoder also takes encoder_hidden_states (B, S, hidden),
        with their attention_mask and document_ids (B, S).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length, device = embeddings.shape[1], embeddings.device
        if not self.is_part and attention_mask is None and document_ids is None and past_key_values is None:
            document_ids = documents_by_positions(position_ids, embeddings.shape[0])
        past_key_values = self._cache(past_key_values, use_cache)
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        key_length = length if past_key_values is None else past_key_values.get_mask_sizes(length, 0)[0]
        position_ids = self._positions(position_ids, document_ids, length, past_length, device)
        exact = torch.promote_types(embeddings.dtype, torch.float32)
        inputs = self.mixer_inputs(
            Geometry(position_ids, length, past_length, key_length, attention_mask, document_ids, exact)
        )
        memory_mask = None
        if encoder_hidden_states is not None:
            memory_mask = cross_mask(
                encoder_attention_mask, encoder_document_ids, document_ids, encoder_hidden_states.shape[1]
            )
        hidden_states = self._embed(embeddings, position_ids, token_type_ids, dropout_keys)
        need_weights = bool(kwargs.get("output_attentions", self.config.output_attentions))
        for place, kind in enumerate(self.attention_kinds):
            layer = self.layers[place * len(self.layers) // len(self.attention_kinds)]
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                inputs[kind].shared,
                mixer_input=inputs[kind],
                past_key_values=past_key_values,
                need_weights=need_weights,
                dropout_keys=dropout_keys,
                layer_idx=place,
                memory_mask=memory_mask,
            )
        if self.config.norm_placement == "pre":
            hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states, past_key_values=past_key_values
        )

    def _cache(self, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to fill. Training keeps none unless asked; gradient checkpointing cannot keep one."""
        if not self.is_decoder or (self.gradient_checkpointing and self.training):
            return None
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", False) and not self.training
        if past_key_values is None and use_cache:
            return EncoderDecoderCache(DynamicCache(), DynamicCache()) if self.is_part else DynamicCache()
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
        """(B, L, embedding) -> (B, L, hidden): scale, token types, positions, norm, dropout, projection."""
        config = self.config
        if config.embedding_scale != 1.0:
            embeddings = embeddings * config.embedding_scale
        if config.type_vocab_size:
            if token_type_ids is None:
                embeddings = embeddings + self.embed_token_types.weight[0]
            else:
                embeddings = embeddings + self.embed_token_types(token_type_ids)
        if config.position_kind == "learned":
            embeddings = embeddings + self.embed_positions(position_ids + config.position_offset)
        elif config.position_kind == "sinusoidal":
            places, layout = position_ids + config.position_offset, str(config.sinusoidal_layout)
            embeddings = embeddings + sinusoids(places, embeddings.shape[-1], layout).to(embeddings.dtype)
        if config.embedding_norm:
            embeddings = self.embed_norm(embeddings)
        if self.training and config.embedding_dropout > 0.0:
            site = EMBEDDING_SITE + (DECODER_SITES if self.is_part and self.is_decoder else 0)
            embeddings = dropout(embeddings, config.embedding_dropout, dropout_keys, site)
        return self.embed_project(embeddings) if hasattr(self, "embed_project") else embeddings
