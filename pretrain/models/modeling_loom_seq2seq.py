"""The Loom encoder-decoder: the Transformer of Vaswani et al. 2017, T5, and what lies between, with generation."""

# mypy: disable-error-code="misc, no-untyped-call, untyped-decorator, attr-defined, assignment, no-any-return"
# (transformers' base classes and decorators are untyped)

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import can_return_tuple

from .configuration_loom import LoomSeq2SeqConfig
from .losses import IGNORE_INDEX, mean_over_targets, token_cross_entropy_sum
from .modeling_loom import LoomLanguageModel, LoomModel, LoomPreTrainedModel


class LoomSeq2SeqModel(LoomPreTrainedModel):
    """The two stacks without a head; both look tokens up in the encoder's table."""

    config: LoomSeq2SeqConfig

    def __init__(self, config: LoomSeq2SeqConfig) -> None:
        super().__init__(config)
        self.encoder = LoomModel(config, "encoder")
        self.decoder = LoomModel(config, "decoder")
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table that encoder and decoder share."""
        table: nn.Module = self.encoder.embed_tokens
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another table in its place."""
        self.encoder.embed_tokens = value

    def get_encoder(self, modality: str | None = None) -> LoomModel:
        """The stack that reads the input."""
        return self.encoder

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        decoder_document_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        dropout_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        """(B, S) input and (B, T) output so far -> the decoder's last hidden state (B, T, hidden).

        attention_mask (B, S) and decoder_attention_mask (B, T): 1 = token. document_ids (B, S) and
        decoder_document_ids (B, T): piece n of the output sees piece n of the input and itself. encoder_outputs: what
        the encoder made of the input before, instead of it. dropout_keys (B,): see `LoomModel.forward`.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                document_ids=document_ids,
                inputs_embeds=inputs_embeds,
                dropout_keys=dropout_keys,
                **kwargs,
            )
        elif not isinstance(encoder_outputs, dict):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        if decoder_inputs_embeds is None:
            if decoder_input_ids is None:
                raise ValueError("give decoder_input_ids, decoder_inputs_embeds, or labels to a class with a head")
            decoder_inputs_embeds = self.encoder.embed_tokens(decoder_input_ids)
        decoded = self.decoder(
            inputs_embeds=decoder_inputs_embeds,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            document_ids=decoder_document_ids,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            encoder_document_ids=document_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            dropout_keys=dropout_keys,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class LoomSeq2SeqForConditionalGeneration(LoomLanguageModel, GenerationMixin):
    """Predicts an output from an input; generates through `GenerationMixin`."""

    config: LoomSeq2SeqConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.encoder.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LoomSeq2SeqConfig) -> None:
        super().__init__(config)
        self.model = LoomSeq2SeqModel(config)
        self.make_head()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table that encoder and decoder share."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another table in its place."""
        self.model.set_input_embeddings(value)

    def get_encoder(self, modality: str | None = None) -> LoomModel:
        """The stack that reads the input."""
        return self.model.encoder

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """(B, T) targets -> what the decoder is given: the same, one place later, behind the start token."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None:
            raise ValueError("decoder_start_token_id is not set: the decoder does not know what to begin with")
        shifted = labels.new_full(labels.shape, start)
        shifted[:, 1:] = labels[:, :-1]
        return shifted.masked_fill(shifted == IGNORE_INDEX, start if pad is None else pad)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        decoder_document_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        return_logits: bool | None = None,
        dropout_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """labels (B, T): the target of each position of the output, -100 for none -> loss; logits (B, T, vocabulary).

        Without decoder_input_ids the decoder is given the labels, one place later. The loss is summed over targets and
        divided by `num_items_in_batch`, or by the number of targets; while training `label_smoothing` is in it.
        `return_logits` None means: not while training with labels; then head and loss run in chunks and `logits` is
        None.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            position_ids=position_ids,
            document_ids=document_ids,
            decoder_position_ids=decoder_position_ids,
            decoder_document_ids=decoder_document_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            dropout_keys=dropout_keys,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if return_logits is None:
            return_logits = not (self.training and labels is not None)
        smoothing = self.config.label_smoothing if self.training else 0.0
        loss, logits = None, None
        if return_logits or labels is None:
            logits = self.logits(hidden_states)
        if labels is not None:
            if logits is None:
                total = self.loss_sum(hidden_states, labels, smoothing)
            else:
                total = token_cross_entropy_sum(logits, labels, label_smoothing=smoothing)
            loss = mean_over_targets(total, labels, num_items_in_batch)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )
