"""Task heads of the Loom decoder: classes and numbers for rows, classes for tokens, answers.

Losses, dropout and their conventions are those of the encoder's heads (`modeling_loom_heads.py`).
"""

# mypy: disable-error-code="misc, no-untyped-call, untyped-decorator, attr-defined, assignment, no-any-return"
# (transformers' base classes and decorators are untyped)

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from .configuration_loom import LoomDecoderConfig
from .layers import LoomPredictionHead
from .modeling_loom_decoder import LoomDecoderModel
from .modeling_loom_heads import Items, LoomTaskHead, answer_output, classification_loss, label_loss


class _DecoderHead(LoomTaskHead):
    config: LoomDecoderConfig

    def __init__(self, config: LoomDecoderConfig) -> None:
        super().__init__(config)
        self.model = LoomDecoderModel(config)


class LoomDecoderForSequenceClassification(_DecoderHead):
    """Scores a row by its last token, through the transform of the token head where the design has one."""

    def __init__(self, config: LoomDecoderConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        if config.head_transform:
            self.head = LoomPredictionHead(config)
        self.score = self.linear(self.num_labels, bias=config.head_transform and config.head_dense_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Items = None,
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
        if self.config.head_transform:
            last = self.head(last)
        logits = self.score(self.drop(last, dropout_keys))
        loss = None if labels is None else classification_loss(logits, labels, self.config, num_items_in_batch)
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


class LoomDecoderForTokenClassification(_DecoderHead):
    """A label for each token, of which a token sees those before it alone."""

    def __init__(self, config: LoomDecoderConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        self.classifier = self.linear(self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Items = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        dropout_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """labels (B, L), unshifted, -100 for none -> loss, logits (B, L, num_labels)."""
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
        logits = self.classifier(self.drop(outputs.last_hidden_state, dropout_keys))
        loss = None if labels is None else label_loss(logits, labels, num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LoomDecoderForQuestionAnswering(_DecoderHead):
    """Finds the first and the last token of an answer."""

    def __init__(self, config: LoomDecoderConfig) -> None:
        super().__init__(config)
        self.qa_outputs = self.linear(2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        num_items_in_batch: Items = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        dropout_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """start_positions and end_positions (B,) -> loss (`span_loss`); start_logits and end_logits (B, L)."""
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
        logits = self.qa_outputs(outputs.last_hidden_state)
        return answer_output(logits, start_positions, end_positions, num_items_in_batch, outputs)
