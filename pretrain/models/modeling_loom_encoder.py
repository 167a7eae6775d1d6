"""The Loom encoder and its heads: masked language modelling and sequence classification."""

# mypy: disable-error-code="misc, no-untyped-call, untyped-decorator, attr-defined, assignment"
# (transformers' base classes and decorators are untyped)

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from .configuration_loom import LoomEncoderConfig
from .layers import LoomPredictionHead
from .losses import IGNORE_INDEX, mean_over_targets, token_cross_entropy_sum
from .modeling_loom import LoomLanguageModel, LoomModel, LoomPreTrainedModel, classification_loss


class LoomEncoderModel(LoomModel):
    """The bidirectional stack without a head."""

    config: LoomEncoderConfig


class LoomEncoderForMaskedLM(LoomLanguageModel):
    """Predicts the tokens at positions that have a label."""

    config: LoomEncoderConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LoomEncoderConfig) -> None:
        super().__init__(config)
        self.model = LoomEncoderModel(config)
        self.make_head()
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
        num_items_in_batch: Tensor | int | None = None,
        inputs_embeds: Tensor | None = None,
        return_logits: bool | None = None,
        dropout_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """labels (B, L): target ids, -100 elsewhere -> loss over the targets, logits (B, L, vocabulary).

        The loss is summed over targets and divided by `num_items_in_batch`, or by the number of targets.
        `return_logits` None means: not while training with labels. Without logits the head sees target positions
        alone, in chunks, and `logits` is None. dropout_keys (B,): see `LoomModel.forward`.
        """
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
        hidden_states = outputs.last_hidden_state
        if return_logits is None:
            return_logits = not (self.training and labels is not None)
        loss, logits = None, None
        if return_logits or labels is None:
            logits = self.logits(hidden_states)
        if labels is not None:
            if logits is None:
                chosen = (labels.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)  # (targets,)
                rows = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, chosen)
                total = self.loss_sum(rows, labels.reshape(-1).index_select(0, chosen))
            else:
                total = token_cross_entropy_sum(logits, labels)
            loss = mean_over_targets(total, labels, num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LoomEncoderForSequenceClassification(LoomPreTrainedModel):
    """One label, several, or a number for a whole row."""

    config: LoomEncoderConfig

    def __init__(self, config: LoomEncoderConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        self.model = LoomEncoderModel(config)
        if config.classifier_head == "transform":
            self.head = LoomPredictionHead(config)
        else:
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.classifier.loom_role = "classifier"
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
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
        pooled = self._pool(outputs.last_hidden_state, attention_mask)
        if self.config.classifier_head == "transform":
            pooled = self.head(pooled)
        else:
            squash = torch.tanh if self.config.classifier_head == "pooler" else functional.gelu
            pooled = squash(self.pooler["dense"](pooled))
        if self.training and self.config.classifier_dropout > 0.0:
            pooled = functional.dropout(pooled, p=self.config.classifier_dropout)
        logits = self.classifier(pooled)
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _pool(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, L, hidden) -> (B, hidden): the first position, or the mean over tokens."""
        if self.config.classifier_pooling == "cls":
            return hidden_states[:, 0]
        if attention_mask is None:
            return hidden_states.mean(dim=1)
        if attention_mask.dim() != 2:
            raise ValueError("classifier_pooling mean needs a 2D attention_mask: a 4D one does not say what is padding")
        tokens = attention_mask.to(hidden_states.dtype)[..., None]  # (B, L, 1)
        return (hidden_states * tokens).sum(dim=1) / tokens.sum(dim=1).clamp(min=1)
