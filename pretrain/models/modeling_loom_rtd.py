"""Detection of replaced tokens: an encoder that learns which tokens a small generator made up.

What lives here: generator and discriminator in one module, what they share, how replacements are drawn, the loss. What
must not: the stack, or which positions are masked (the data say it).

Clark et al. 2020 (arXiv 2003.10555), section 2: the generator is a masked language model; each masked token is replaced
by one drawn from its distribution, and the discriminator says of every token whether it is the original. No gradient
flows through the draw. He et al. 2021 (arXiv 2111.09543), section 3.2: with gradient-disentangled sharing the
discriminator's embeddings are the generator's, which it cannot move, plus a part of its own that starts at zero.
"""

# mypy: disable-error-code="misc, no-untyped-call, untyped-decorator, attr-defined, assignment, no-any-return"
# (transformers' base classes and decorators are untyped)

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_loom import LoomEncoderConfig
from .dropout import SAMPLING_SITE, keyed_uniform, place_words
from .losses import IGNORE_INDEX, mean_over_targets
from .modeling_loom import LoomPreTrainedModel
from .modeling_loom_encoder import LoomEncoderForMaskedLM, LoomEncoderModel
from .norms import activate

# The generator's rows draw by other keys than the discriminator's: equal ones would drop the same elements in both.
_GENERATOR_KEYS = 0x5851F42D4C957F2D
# Elements that are drawn together: 4 MiB in float32.
_DRAWN_ELEMENTS = 2**20
_WORD = 2**32 - 1


@dataclass
class LoomReplacedTokenDetectionOutput(ModelOutput):
    """What a forward gives.

    logits (B, L): above 0 where a token is taken for a replacement. generator_loss and discriminator_loss are what
    `loss` is the weighted sum of. corrupted_ids (B, L): what the discriminator read; is_replaced (B, L) bool: where
    that is not the original token. parts: numbers of these rows, each a sum and what it is divided by, (2,) and left on
    the device: over micro-batches and processes both add up, and then make the number of the whole batch.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    generator_loss: Tensor | None = None
    discriminator_loss: Tensor | None = None
    corrupted_ids: Tensor | None = None
    is_replaced: Tensor | None = None
    parts: dict[str, Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class LoomDetectionHead(nn.Module):
    """A dense layer, the block's activation, and one number a token."""

    def __init__(self, config: LoomEncoderConfig) -> None:
        super().__init__()
        self.activation = config.hidden_act
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense.loom_role = "head"
        self.out = nn.Linear(config.hidden_size, 1)
        self.out.loom_role = "classifier"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, hidden) -> (B, L)."""
        return self.out(activate(self.activation, self.dense(hidden_states))).squeeze(-1)


class LoomEncoderForReplacedTokenDetection(LoomPreTrainedModel):
    """The discriminator (`model`, `rtd_head`), and while it is trained its `generator`.

    Without `config.generator_size` there is no generator: the published form, which takes finished labels.
    """

    config: LoomEncoderConfig

    def __init__(self, config: LoomEncoderConfig) -> None:
        super().__init__(config)
        self.model = LoomEncoderModel(config)
        self.rtd_head = LoomDetectionHead(config)
        self.generator: LoomEncoderForMaskedLM | None = None
        if config.generator_size is not None:
            of_generator = config.generator_config()
            of_generator._attn_implementation = config._attn_implementation
            self.generator = LoomEncoderForMaskedLM(of_generator)
        if self.is_disentangled:
            del self.model.embed_tokens
            self.embedding_delta = nn.Embedding(config.vocab_size, config.embedding_size)
        self._tied_weights_keys = self._shared_tables()
        self.post_init()
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    @property
    def is_disentangled(self) -> bool:
        """Whether the discriminator's embeddings are the generator's plus `embedding_delta`."""
        return self.generator is not None and self.config.rtd_sharing == "gradient_disentangled"

    def _init_weights(self, module: nn.Module) -> None:
        if self.is_disentangled and module is self.embedding_delta:
            init.zeros_(module.weight)
        else:
            super()._init_weights(module)

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
        item_counts: Mapping[str, Tensor | int] | None = None,
        inputs_embeds: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> LoomReplacedTokenDetectionOutput:
        """Masked tokens and what stood there -> loss; logits (B, L) of the discriminator.

        With a generator, labels (B, L) are the original ids at masked places, -100 elsewhere, as for a masked language
        model: only those places are replaced, and a draw that hits the original counts as original. Loss = generator's
        loss + rtd_weight x discriminator's. The first is summed over targets and divided by num_items_in_batch, the
        second over all tokens (padding is what document_ids or a 2D attention_mask call so) and divided by
        item_counts["tokens"]; without those numbers each is a mean. dropout_keys (B,): replacements are a function of
        the row's key, the position and the generator's logits; without keys of torch's generator while training, and
        of the row's own tokens in evaluation, which so gives one number.

        Without a generator labels are 1 where a token was replaced, 0 where not, -100 for neither. Without labels the
        discriminator reads input_ids as they are.
        """
        rows = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "document_ids": document_ids,
            "token_type_ids": token_type_ids,
        }
        tokens = (item_counts or {}).get("tokens")
        is_replaced = real = generator_sum = None
        if labels is not None:
            real = _real_tokens(labels, attention_mask, document_ids)
            if self.generator is not None:
                input_ids, is_replaced, generator_sum = self._corrupt(input_ids, labels, real, rows, dropout_keys)
            else:
                is_replaced, real = labels == 1, real & (labels != IGNORE_INDEX)
                tokens = num_items_in_batch if tokens is None else tokens
        given: dict[str, Any] = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        if self.is_disentangled and inputs_embeds is None:
            given = {"inputs_embeds": self._sum_of_embeddings(input_ids)}
        outputs = self.model(**given, **rows, dropout_keys=dropout_keys, **kwargs)
        logits = self.rtd_head(outputs.last_hidden_state)
        loss = generator_loss = detection_loss = parts = None
        if labels is not None and is_replaced is not None and real is not None:
            detection_sum = _detection_sum(logits, is_replaced, real)
            detection_loss = mean_over_targets(detection_sum, real, tokens, ignore_index=False)
            loss = self.config.rtd_weight * detection_loss
            if generator_sum is not None:
                generator_loss = mean_over_targets(generator_sum, labels, num_items_in_batch)
                loss = loss + generator_loss
            parts = _parts(logits, is_replaced, real, detection_sum)
            if generator_sum is not None:
                parts["generator_loss"] = _ratio(generator_sum, (labels != IGNORE_INDEX).sum())
        return LoomReplacedTokenDetectionOutput(
            loss=loss,
            logits=logits,
            generator_loss=generator_loss,
            discriminator_loss=detection_loss,
            corrupted_ids=None if generator_sum is None else input_ids,
            is_replaced=is_replaced,
            parts=parts,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _corrupt(
        self,
        input_ids: Tensor | None,
        labels: Tensor,
        real: Tensor,
        rows: Mapping[str, Tensor | None],
        keys: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The generator's work: corrupted ids (B, L), where they are not the original, its summed loss.

        Each part of the generator is called once, however many targets there are: engines that gather weights at a
        module's call need equal numbers of calls in all processes.
        """
        if input_ids is None:
            raise ValueError("a generator puts tokens in place of tokens: give input_ids, not inputs_embeds")
        assert self.generator is not None
        if keys is not None and (keys.shape != input_ids.shape[:1] or keys.dtype != torch.int64):
            shape, count = tuple(keys.shape), input_ids.shape[0]
            raise ValueError(f"dropout_keys: {keys.dtype} of shape {shape} for {count} rows; give one int64 a row")
        other_keys = None if keys is None else keys ^ _GENERATOR_KEYS
        hidden_states = self.generator.model(input_ids=input_ids, **rows, dropout_keys=other_keys).last_hidden_state
        masked = labels != IGNORE_INDEX
        places = masked.reshape(-1).nonzero().squeeze(1)  # (targets,)
        states = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, places)
        total = self.generator.loss_sum(states, labels.reshape(-1).index_select(0, places))
        if keys is None and not self.training:
            keys = _keys_of_tokens(input_ids, real)
        with torch.no_grad():
            logits = self.generator.logits(states)
            words = None if keys is None else place_words(keys, SAMPLING_SITE, input_ids.shape[1], places)
            drawn = draw_tokens(logits, words)
        original = torch.where(masked, labels, input_ids)
        corrupted = original.reshape(-1).index_copy(0, places, drawn.to(original.dtype)).view_as(original)
        return corrupted, corrupted != original, total

    def _sum_of_embeddings(self, input_ids: Tensor | None) -> Tensor:
        """(B, L) -> (B, L, embedding): the generator's, which stay where they are, plus the discriminator's part."""
        assert self.generator is not None
        base = self.generator.model.embed_tokens(input_ids).detach()
        return base + self.embedding_delta(input_ids)

    def discriminator_config(self) -> LoomEncoderConfig:
        """The config of the discriminator alone: this class without a generator."""
        config = type(self.config).from_dict(self.config.to_dict())
        config.generator_size, config.generator = None, None
        config.architectures = [type(self).__name__]
        return config

    @torch.no_grad()
    def published_parts(self) -> "tuple[LoomEncoderForReplacedTokenDetection, LoomEncoderForMaskedLM]":
        """Copies of both parts as they are published: the discriminator alone, and the generator.

        Raises ValueError where there is no generator.
        """
        state = self.generator_state()
        assert self.generator is not None
        of_generator = type(self.config).from_dict(self.generator.config.to_dict())
        of_generator.architectures = [type(self.generator).__name__]
        parts = type(self)(self.discriminator_config()), type(self.generator)(of_generator)
        for part, own in zip(parts, (self.discriminator_state(), state), strict=True):
            nn.Module.to(part, self.rtd_head.dense.weight).load_state_dict(own, strict=False)
            part.tie_weights()
            part.eval()
        return parts

    def discriminator_state(self) -> dict[str, Tensor]:
        """The tensors of the discriminator alone, embeddings added up: what `discriminator_config`'s model holds."""
        state = {name: tensor for name, tensor in self.state_dict().items() if name.startswith(("model.", "rtd_head."))}
        if self.is_disentangled:
            assert self.generator is not None
            base = self.generator.model.embed_tokens.weight.detach()
            state["model.embed_tokens.weight"] = base + self.embedding_delta.weight.detach()
        return state

    def generator_state(self) -> dict[str, Tensor]:
        """The tensors of the generator, a masked language model with `generator.config`; tied ones once.

        Raises ValueError where there is no generator.
        """
        if self.generator is None:
            raise ValueError("this model has no generator: generator_size is None in its config")
        tied = self.generator.all_tied_weights_keys
        return {name: tensor for name, tensor in self.generator.state_dict().items() if name not in tied}

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Copy -> source: what generator and discriminator share, and the generator's head.

        Not asking for `tie_word_embeddings`, which ties that head alone.
        """
        tied = self._shared_tables()
        if self.generator is not None and all_submodels:
            for copy, source in self.generator.get_expanded_tied_weights_keys(all_submodels=True).items():
                tied[f"generator.{copy}"] = tied.get(f"generator.{source}", f"generator.{source}")
        return tied

    def _shared_tables(self) -> dict[str, str]:
        if self.generator is None or self.config.rtd_sharing != "tied":
            return {}
        tables = ("embed_tokens", "embed_positions", "embed_token_types")
        names = [f"model.{table}.weight" for table in tables if hasattr(self.model, table)]
        return {f"generator.{name}": name for name in names}

    def get_input_embeddings(self) -> nn.Module:
        """The table of the discriminator; where it has none of its own, the generator's."""
        if self.is_disentangled:
            assert self.generator is not None
            return self.generator.model.embed_tokens
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module | None:
        """The generator's token head."""
        return None if self.generator is None else self.generator.lm_head

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the tables of both; new rows of `embedding_delta` are zero."""
        if self.generator is None:
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        table = self.generator.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        rows, width = table.weight.shape
        if self.is_disentangled:
            old = self.embedding_delta
            self.embedding_delta = nn.Embedding(rows, width, device=old.weight.device, dtype=old.weight.dtype)
            init.zeros_(self.embedding_delta.weight)
            kept = min(rows, old.num_embeddings)
            self.embedding_delta.weight.data[:kept] = old.weight.data[:kept]
        else:
            self.model.resize_token_embeddings(rows, mean_resizing=mean_resizing)
        self.config.vocab_size = rows
        self.tie_weights()  # where they share, the discriminator's table serves both
        resized: nn.Embedding = self.get_input_embeddings()
        return resized


def _real_tokens(labels: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor:
    """(B, L) bool: what is not padding."""
    if document_ids is not None:
        return document_ids != 0
    if attention_mask is not None and attention_mask.dim() == 2:
        return attention_mask != 0
    return torch.ones_like(labels, dtype=torch.bool)


def _keys_of_tokens(input_ids: Tensor, real: Tensor) -> Tensor:
    """(B,) int64 of what each row holds; every step stays within 64 bits."""
    places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    tokens = (input_ids.long() + 1) * real
    low, high = (((tokens * (places * factor & _WORD)) & _WORD).sum(-1) for factor in (0x9E3779B1, 0x85EBCA77))
    return (high & (_WORD >> 1)) << 32 | (low & _WORD)


@torch.no_grad()
def draw_tokens(logits: Tensor, words: tuple[Tensor, Tensor] | None) -> Tensor:
    """A token id for each of (N, vocabulary) logits, by its probability: (N,).

    The largest of logit + Gumbel noise is distributed as the softmax (Gumbel 1954). The noise is a hash of `words`
    (`place_words`) and the token's id; without words it is drawn from torch's generator.
    """
    vocabulary = logits.shape[-1]
    step = max(1, _DRAWN_ELEMENTS // vocabulary)
    drawn = torch.empty(logits.shape[0], dtype=torch.long, device=logits.device)
    for start in range(0, logits.shape[0], step):
        part = slice(start, start + step)
        scores = logits[part].float()
        if words is None:
            waiting = torch.empty_like(scores).exponential_()
        else:
            first, second = words
            waiting = keyed_uniform((first[part], second[part]), vocabulary).neg_().log1p_().neg_()
        drawn[part] = scores.sub(waiting.log_()).argmax(dim=-1)
    return drawn


def _detection_sum(logits: Tensor, is_replaced: Tensor, real: Tensor) -> Tensor:
    """Summed binary cross-entropy over real tokens; all (B, L)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = functional.binary_cross_entropy_with_logits(wide, is_replaced.to(wide.dtype), reduction="none")
    return losses.masked_fill(~real, 0.0).sum()


@torch.no_grad()
def _parts(logits: Tensor, is_replaced: Tensor, real: Tensor, detection_sum: Tensor) -> dict[str, Tensor]:
    """What is known of the verdicts on real tokens, all (B, L): each number a sum and its divisor."""
    tokens, said, replaced = real.sum(), (logits > 0) & real, is_replaced & real
    found = (said & replaced).sum()
    return {
        "discriminator_loss": _ratio(detection_sum, tokens),
        "accuracy": _ratio(((said == replaced) & real).sum(), tokens),
        "detection_precision": _ratio(found, said.sum()),
        "detection_recall": _ratio(found, replaced.sum()),
        "replaced": _ratio(replaced.sum(), tokens),
    }


def _ratio(total: Tensor, by: Tensor) -> Tensor:
    """(2,), at least float32: it holds every count up to 2^24."""
    wide = torch.promote_types(total.dtype, torch.float32) if total.is_floating_point() else torch.float32
    return torch.stack((total.detach().to(wide), by.to(wide)))
