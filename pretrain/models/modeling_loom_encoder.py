"""The Loom encoder and its pretraining heads: masked language modelling, alone and beside a task of sentence pairs.

Task heads are in `modeling_loom_heads.py`, the detection of replaced tokens in `modeling_loom_rtd.py`.
"""

# mypy: disable-error-code="misc, no-untyped-call, untyped-decorator, attr-defined, assignment"
# (transformers' base classes and decorators are untyped)

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput
from transformers.utils import can_return_tuple

from .configuration_loom import LoomEncoderConfig
from .losses import IGNORE_INDEX, mean_over_targets, token_cross_entropy_sum
from .modeling_loom import LoomLanguageModel, LoomModel

if TYPE_CHECKING:
    # Never run: transformers copies the files that are named in such a line, so that a directory saved with its code
    # also loads for the tasks of that file.
    from .modeling_loom_heads import LoomEncoderForSequenceClassification  # noqa: F401


class LoomEncoderModel(LoomModel):
    """The bidirectional stack without a head."""

    config: LoomEncoderConfig


class _EncoderLanguageModel(LoomLanguageModel):
    """The stack and a token head that predicts at positions with a label."""

    config: LoomEncoderConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LoomEncoderConfig) -> None:
        super().__init__(config)
        self.model = LoomEncoderModel(config)
        self.make_head()

    def tokens(
        self, hidden_states: Tensor, labels: Tensor | None, return_logits: bool | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits (B, L, vocabulary) and the summed loss at labels (B, L), each None where it is not wanted.

        `return_logits` None means: not while training with labels. Without logits the head sees target positions
        alone, in chunks.
        """
        if labels is None:
            return self.logits(hidden_states), None
        if return_logits or (return_logits is None and not self.training):
            logits = self.logits(hidden_states)
            return logits, token_cross_entropy_sum(logits, labels)
        chosen = (labels.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)  # (targets,)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, chosen)
        return None, self.loss_sum(rows, labels.reshape(-1).index_select(0, chosen))


class LoomEncoderForMaskedLM(_EncoderLanguageModel):
    """Predicts the tokens at positions that have a label."""

    def __init__(self, config: LoomEncoderConfig) -> None:
        super().__init__(config)
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
        `return_logits` None means: not while training with labels; then `logits` is None. dropout_keys (B,): see
        `LoomModel.forward`.
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
        logits, total = self.tokens(outputs.last_hidden_state, labels, return_logits)
        loss = None
        if total is not None and labels is not None:
            loss = mean_over_targets(total, labels, num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LoomEncoderForPreTraining(_EncoderLanguageModel):
    """Masked tokens, and how the two parts of a pair belong together, as BERT and ALBERT were trained.

    Devlin et al. 2018, section 3.1: 0 = the second part follows the first, 1 = it is from elsewhere. Lan et al. 2019,
    section 3.1: 0 = in order, 1 = swapped. A pair is read from its first position by a dense layer and tanh (BERT's
    pooler, whatever `config.classifier_head` is).
    """

    def __init__(self, config: LoomEncoderConfig) -> None:
        super().__init__(config)
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        self.seq_relationship = nn.Linear(config.hidden_size, 2)
        self.seq_relationship.loom_role = "classifier"
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
        next_sentence_label: Tensor | None = None,
        sentence_positions: Tensor | None = None,
        sentence_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        item_counts: Mapping[str, Tensor | int] | None = None,
        inputs_embeds: Tensor | None = None,
        return_logits: bool | None = None,
        dropout_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> BertForPreTrainingOutput:
        """Loss of the tokens + loss of the pairs; of one of them where only its labels are given.

        labels, num_items_in_batch, return_logits: as in `LoomEncoderForMaskedLM`. One pair a row: next_sentence_label
        (B,), seq_relationship_logits (B, 2). Several: sentence_positions (B, P), the place of each pair's first token,
        and sentence_labels (B, P), -100 where there is no pair; seq_relationship_logits (B, P, 2). The loss of pairs
        is summed and divided by item_counts["pairs"], or by the number of pairs.
        """
        if sentence_labels is not None and (sentence_positions is None or next_sentence_label is not None):
            raise ValueError("sentence_labels need sentence_positions of the same shape, and no next_sentence_label")
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
        logits, total = self.tokens(hidden_states, labels, return_logits)
        pair_logits = self.pairs(hidden_states, sentence_positions)
        losses = []
        if total is not None and labels is not None:
            losses.append(mean_over_targets(total, labels, num_items_in_batch))
        pair_labels = next_sentence_label if sentence_labels is None else sentence_labels
        if pair_labels is not None:
            pair_labels = pair_labels.reshape(-1).long()
            pair_total = token_cross_entropy_sum(pair_logits, pair_labels)
            losses.append(mean_over_targets(pair_total, pair_labels, (item_counts or {}).get("pairs")))
        return BertForPreTrainingOutput(
            loss=torch.stack(losses).sum() if losses else None,
            prediction_logits=logits,
            seq_relationship_logits=pair_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def pairs(self, hidden_states: Tensor, positions: Tensor | None) -> Tensor:
        """(B, L, hidden) -> (B, 2) from the first position of each row, or (B, P, 2) from positions (B, P)."""
        if positions is None:
            first = hidden_states[:, 0]
        else:
            index = positions.long().clamp(0, hidden_states.shape[1] - 1)[..., None]  # where there is none: any
            first = hidden_states.gather(1, index.expand(-1, -1, hidden_states.shape[-1]))  # (B, P, hidden)
        scores: Tensor = self.seq_relationship(torch.tanh(self.pooler["dense"](first)))
        return scores
