"""Task heads of the Loom encoder: classes and numbers for rows, classes for tokens, answers, choices; their losses.

What lives here: what stands between the stack's hidden states and the labels of a task, and what the decoder's heads
(`modeling_loom_decoder_heads.py`) share with it. What must not: token heads (`modeling_loom_encoder.py`), or the stack.

Losses are sums over labels, divided by `num_items_in_batch` where it is given, so that micro-batches add up; without
it by the number of labels, and no label at all is a loss of 0. Dropout stands once, before the last linear layer
(`config.classifier_dropout`); it is drawn by `dropout_keys` where they are given. RoBERTa's and ELECTRA's classifiers
of rows drop before their dense layer too: this changes nothing but the noise of fine-tuning, and has no switch.
"""

# mypy: disable-error-code="misc, no-untyped-call, untyped-decorator, attr-defined, assignment, no-any-return"
# (transformers' base classes and decorators are untyped)

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import (
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from .configuration_loom import LoomConfig, LoomEncoderConfig
from .dropout import CLASSIFIER_SITE, dropout
from .layers import LoomPredictionHead
from .losses import mean_over_targets, token_cross_entropy_sum
from .modeling_loom import LoomPreTrainedModel
from .modeling_loom_encoder import LoomEncoderModel

Items = Tensor | int | None


def classification_loss(logits: Tensor, labels: Tensor, config: LoomConfig, num_items_in_batch: Items = None) -> Tensor:
    """Loss of (B, num_labels) logits by `config.problem_type`, which is set from the labels when it is None.

    One label: squared error; whole-number labels (B,), -100 for none: cross-entropy; else binary cross-entropy of
    each of (B, num_labels). Squared errors and binary cross-entropies count every number of the labels as an item.
    """
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.dtype in (torch.long, torch.int):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"
    if config.problem_type == "single_label_classification":
        return label_loss(logits, labels, num_items_in_batch)
    wide = _wide(logits)
    numbers = labels.to(wide.device, wide.dtype).view(wide.shape)
    if config.problem_type == "regression":
        total = functional.mse_loss(wide, numbers, reduction="sum")
    else:
        total = functional.binary_cross_entropy_with_logits(wide, numbers, reduction="sum")
    return mean_over_targets(total, torch.zeros_like(numbers), num_items_in_batch)


def label_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Items = None) -> Tensor:
    """Cross-entropy of (..., classes) at labels (...), -100 for none, as a mean over labels or the given items."""
    labels = labels.reshape(-1).to(logits.device, torch.long)
    return mean_over_targets(token_cross_entropy_sum(logits, labels), labels, num_items_in_batch)


def span_loss(
    start_logits: Tensor, end_logits: Tensor, starts: Tensor, ends: Tensor, num_items_in_batch: Items = None
) -> Tensor:
    """Half the cross-entropy of the first place of an answer, and half of its last: (B, L) logits, (B,) places.

    As in transformers' classes places beyond the row count nothing, and ones below 0 are 0.
    """
    losses = []
    for logits, places in ((start_logits, starts), (end_logits, ends)):
        length = logits.shape[1]
        places = places.reshape(-1).to(logits.device, torch.long).clamp(0, length)
        losses.append(label_loss(logits, places.masked_fill(places == length, -100), num_items_in_batch))
    return (losses[0] + losses[1]) / 2


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class LoomTaskHead(LoomPreTrainedModel):
    """What the classes here share: a linear layer that knows its role, and the dropout before it."""

    def linear(self, outputs: int, *, bias: bool = True) -> nn.Linear:
        layer = nn.Linear(self.config.hidden_size, outputs, bias=bias)
        layer.loom_role = "classifier"
        return layer

    def drop(self, states: Tensor, keys: Tensor | None) -> Tensor:
        """(B, hidden) or (B, L, hidden), while training with `classifier_dropout`."""
        if not self.training or self.config.classifier_dropout == 0.0:
            return states
        deep = states if states.dim() == 3 else states[:, None]
        return dropout(deep, self.config.classifier_dropout, keys, CLASSIFIER_SITE).view(states.shape)


class _EncoderHead(LoomTaskHead):
    """An encoder, and what `config.classifier_head` puts before the linear layer.

    pooler (BERT, RoBERTa, ALBERT) and gelu (ELECTRA, EuroBERT): a dense layer with tanh or gelu for what is said of a
    whole row, nothing for what is said of its tokens. transform (ModernBERT): dense layer, activation and norm for
    both.
    """

    config: LoomEncoderConfig

    def __init__(self, config: LoomEncoderConfig, *, of_rows: bool) -> None:
        super().__init__(config)
        self.model = LoomEncoderModel(config)
        if config.classifier_head == "transform":
            self.head = LoomPredictionHead(config)
        elif of_rows:
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})

    def transform(self, states: Tensor, keys: Tensor | None) -> Tensor:
        """(B, hidden) or (B, L, hidden) -> the same shape, ready for the linear layer."""
        if hasattr(self, "head"):
            states = self.head(states)
        elif hasattr(self, "pooler"):
            states = self.pooler["dense"](states)
            states = torch.tanh(states) if self.config.classifier_head == "pooler" else functional.gelu(states)
        return self.drop(states, keys)

    def row_scores(
        self, classifier: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None, keys: Tensor | None
    ) -> Tensor:
        """(B, L, hidden) -> (B, outputs), by `config.classifier_pooling`.

        cls: of the first token. mean: of the mean over tokens. late: the mean over what is said of each token.
        """
        pooling = self.config.classifier_pooling
        if pooling == "late":
            return _mean(classifier(self.transform(hidden_states, keys)), attention_mask)
        if pooling == "mean":
            return classifier(self.transform(_mean(hidden_states, attention_mask), keys))
        if attention_mask is None or attention_mask.dim() != 2:
            return classifier(self.transform(hidden_states[:, 0], keys))
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        first = (attention_mask != 0).to(hidden_states.device, torch.int).argmax(dim=-1)  # the first largest
        return classifier(self.transform(hidden_states[rows, first], keys))


def _mean(states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, L, channels) -> (B, channels): the mean over tokens."""
    if attention_mask is None:
        return states.mean(dim=1)
    if attention_mask.dim() != 2:
        raise ValueError("classifier_pooling needs a 2D attention_mask: a 4D one does not say what is padding")
    tokens = attention_mask.to(states.device, states.dtype)[..., None]  # (B, L, 1)
    return (states * tokens).sum(dim=1) / tokens.sum(dim=1).clamp(min=1)


class LoomEncoderForSequenceClassification(_EncoderHead):
    """One label, several, or a number for a whole row."""

    def __init__(self, config: LoomEncoderConfig) -> None:
        super().__init__(config, of_rows=True)
        self.num_labels = int(config.num_labels or 2)
        self.classifier = self.linear(self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Items = None,
        inputs_embeds: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """labels (B,) or (B, num_labels) -> loss by `config.problem_type`, logits (B, num_labels)."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            dropout_keys=dropout_keys,
            **kwargs,
        )
        logits = self.row_scores(self.classifier, outputs.last_hidden_state, attention_mask, dropout_keys)
        loss = None if labels is None else classification_loss(logits, labels, self.config, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LoomEncoderForMultipleChoice(_EncoderHead):
    """Picks one of several rows."""

    def __init__(self, config: LoomEncoderConfig) -> None:
        super().__init__(config, of_rows=True)
        self.classifier = self.linear(1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Items = None,
        inputs_embeds: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """input_ids (B, choices, L), labels (B,) places of the right choice -> loss, logits (B, choices).

        All inputs of a token have the choices as their second axis; dropout_keys are (B,).
        """
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or given.dim() < 3:
            raise ValueError("multiple choice takes input_ids of shape (rows, choices, tokens)")
        choices = given.shape[1]
        if dropout_keys is not None:
            dropout_keys = (dropout_keys[:, None] + torch.arange(choices, device=dropout_keys.device)).reshape(-1)
        attention_mask = _rows_of_choices(attention_mask)
        outputs = self.model(
            input_ids=_rows_of_choices(input_ids),
            attention_mask=attention_mask,
            position_ids=_rows_of_choices(position_ids),
            token_type_ids=_rows_of_choices(token_type_ids),
            inputs_embeds=_rows_of_choices(inputs_embeds),
            dropout_keys=dropout_keys,
            **kwargs,
        )
        scores = self.row_scores(self.classifier, outputs.last_hidden_state, attention_mask, dropout_keys)
        logits = scores.view(-1, choices)
        loss = None if labels is None else label_loss(logits, labels, num_items_in_batch)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def _rows_of_choices(given: Tensor | None) -> Tensor | None:
    """(B, choices, ...) -> (B x choices, ...)."""
    return None if given is None else given.flatten(0, 1)


class LoomEncoderForTokenClassification(_EncoderHead):
    """A label for each token."""

    def __init__(self, config: LoomEncoderConfig) -> None:
        super().__init__(config, of_rows=False)
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
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Items = None,
        inputs_embeds: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """labels (B, L), -100 for none -> loss, logits (B, L, num_labels)."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            document_ids=document_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            dropout_keys=dropout_keys,
            **kwargs,
        )
        logits = self.classifier(self.transform(outputs.last_hidden_state, dropout_keys))
        loss = None if labels is None else label_loss(logits, labels, num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LoomEncoderForQuestionAnswering(_EncoderHead):
    """Finds the first and the last token of an answer."""

    def __init__(self, config: LoomEncoderConfig) -> None:
        super().__init__(config, of_rows=False)
        self.qa_outputs = self.linear(2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        num_items_in_batch: Items = None,
        inputs_embeds: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """start_positions and end_positions (B,) -> loss (`span_loss`); start_logits and end_logits (B, L).

        Only ModernBERT's design drops out here (`config.classifier_head` transform), as the published classes do.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            dropout_keys=dropout_keys,
            **kwargs,
        )
        states = outputs.last_hidden_state
        if self.config.classifier_head == "transform":
            states = self.transform(states, dropout_keys)
        return answer_output(self.qa_outputs(states), start_positions, end_positions, num_items_in_batch, outputs)


def answer_output(
    logits: Tensor, starts: Tensor | None, ends: Tensor | None, num_items_in_batch: Items, outputs: Any
) -> QuestionAnsweringModelOutput:
    """(B, L, 2) logits -> what question answering returns."""
    start_logits, end_logits = logits.unbind(-1)
    loss = None
    if starts is not None and ends is not None:
        loss = span_loss(start_logits, end_logits, starts, ends, num_items_in_batch)
    return QuestionAnsweringModelOutput(
        loss=loss,
        start_logits=start_logits.contiguous(),
        end_logits=end_logits.contiguous(),
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
