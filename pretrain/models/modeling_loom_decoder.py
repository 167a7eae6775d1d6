"""The Loom decoder and its heads: causal language modelling with generation, and sequence classification."""

# mypy: disable-error-code="misc, no-untyped-call, untyped-decorator, attr-defined, assignment"
# (transformers' base classes and decorators are untyped)

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from .configuration_loom import LoomDecoderConfig
from .losses import mean_over_targets, shift_targets, token_cross_entropy_sum
from .modeling_loom import LoomLanguageModel, LoomModel, LoomPreTrainedModel, classification_loss


class LoomDecoderModel(LoomModel):
    """The causal stack without a head."""

    config: LoomDecoderConfig


class LoomDecoderForCausalLM(LoomLanguageModel, GenerationMixin):
    """Predicts the next token; generates through `GenerationMixin`."""

    config: LoomDecoderConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LoomDecoderConfig) -> None:
        super().__init__(config)
        self.model = LoomDecoderModel(config)
        self.make_head()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool | None = None,
        dropout_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Targets -> loss; logits (B, kept positions, vocabulary).

        shift_labels (B, L): shift_labels[b, t] is the target of position t, -100 for none. labels (B, L): unshifted,
        as transformers' classes take them; shifted here, never across `document_ids`. The loss is summed over targets
        and divided by `num_items_in_batch`, or by the number of targets. `return_logits` None means: not while
        training with targets; then head and loss run in chunks and `logits` is None. dropout_keys (B,): see
        `LoomModel.forward`.
        """
        if labels is not None and shift_labels is None:
            shift_labels = shift_targets(labels, document_ids)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            document_ids=document_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            dropout_keys=dropout_keys,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if return_logits is None:
            return_logits = not (self.training and shift_labels is not None)
        loss, logits = None, None
        if return_logits or shift_labels is None:
            logits = self.logits(slice_logits_to_keep(hidden_states, logits_to_keep))
        if shift_labels is not None:
            if logits is None:
                total = self.loss_sum(hidden_states, shift_labels)
            elif logits.shape[:-1] != shift_labels.shape:
                raise ValueError("a loss needs the logits of every position: leave logits_to_keep at 0")
            else:
                total = token_cross_entropy_sum(logits, shift_labels)
            loss = mean_over_targets(total, shift_labels, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class LoomDecoderForSequenceClassification(LoomPreTrainedModel):
    """Scores a row by its last token."""

    config: LoomDecoderConfig

    def __init__(self, config: LoomDecoderConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        self.model = LoomDecoderModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.score.loom_role = "classifier"
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        dropout_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """labels (B,) or (B, num_labels) -> loss by `config.problem_type`, logits (B, num_labels) of the last token."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            dropout_keys=dropout_keys,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        last = hidden_states[rows, self._last_token(input_ids, attention_mask, hidden_states)]
        if self.training and self.config.classifier_dropout > 0.0:
            last = functional.dropout(last, p=self.config.classifier_dropout)
        logits = self.score(last)
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config, num_items_in_batch)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_token(self, input_ids: Tensor | None, attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor:
        """(B,) places of the last token of each row, by the mask, else by `pad_token_id`."""
        batch, length, _ = hidden_states.shape
        if attention_mask is not None and attention_mask.dim() == 2:
            tokens = attention_mask[:, -length:] != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            tokens = input_ids != self.config.pad_token_id
        elif batch == 1:
            tokens = torch.ones(batch, length, dtype=torch.bool, device=hidden_states.device)
        else:
            raise ValueError("rows may differ in length: give attention_mask, or set pad_token_id in the config")
        places = torch.arange(length, device=hidden_states.device)
        return (places * tokens.to(hidden_states.device)).argmax(dim=-1)
