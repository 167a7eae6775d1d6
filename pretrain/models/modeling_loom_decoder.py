"""The Loom decoder and its language-model head, with generation; task heads are in `modeling_loom_decoder_heads.py`."""

# mypy: disable-error-code="misc, no-untyped-call, untyped-decorator, attr-defined, assignment"
# (transformers' base classes and decorators are untyped)

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from .configuration_loom import LoomDecoderConfig
from .losses import mean_over_targets, shift_targets, token_cross_entropy_sum
from .modeling_loom import LoomLanguageModel, LoomModel

if TYPE_CHECKING:
    # Never run: transformers copies the files that are named in such a line, so that a directory saved with its code
    # also loads for the tasks of that file.
    from .modeling_loom_decoder_heads import LoomDecoderForSequenceClassification  # noqa: F401


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
