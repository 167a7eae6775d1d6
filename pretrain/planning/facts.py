"""What planning knows of a model: its sizes and the shapes of its parameters, as plain numbers.

What lives here: the facts and how they are read off any model that carries a configuration with Hugging Face's names.
What must not: a model class. A model on torch's meta device, which holds no memory, serves as well as a real one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")


@dataclass(frozen=True)
class ParameterFact:
    """One parameter; `layer` is the block it belongs to, None outside the stack; `tied` ones are counted once."""

    name: str
    shape: tuple[int, ...]
    layer: int | None
    trainable: bool = True

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> bool:
        """Whether it is a weight of the stack that multiplies: what autocast casts and Muon orthogonalizes."""
        return self.layer is not None and len(self.shape) == 2

    def shard(self, parts: int) -> int:
        """Elements of the largest part when the first axis is cut into `parts` equal ones."""
        if parts == 1 or not self.shape:
            return self.size
        return math.ceil(self.shape[0] / parts) * (self.size // self.shape[0])


@dataclass(frozen=True)
class ModelFacts:
    """Sizes and switches of a Transformer, by the names of its configuration."""

    encoder: bool
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    gated: bool
    rms_norm: bool
    post_norm: bool
    first_norm: bool
    embedding_norm: bool
    rotary: bool
    tied: bool
    local_layers: tuple[bool, ...]
    local_window: int | None
    hidden_dropout: bool
    attention_dropout: bool
    parameters: tuple[ParameterFact, ...]

    @property
    def query_width(self) -> int:
        """Features of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Features of all key heads."""
        return self.num_key_value_heads * self.head_dim

    @cached_property
    def size(self) -> int:
        """Parameters, tied ones once."""
        return sum(parameter.size for parameter in self.parameters)

    @cached_property
    def trainable(self) -> int:
        """Parameters that are trained."""
        return sum(parameter.size for parameter in self.parameters if parameter.trainable)

    @cached_property
    def layer_sizes(self) -> tuple[int, ...]:
        """Parameters of each block."""
        return self._by_layer(lambda parameter: True)

    @cached_property
    def layer_matrices(self) -> tuple[int, ...]:
        """Elements of each block's matrices."""
        return self._by_layer(lambda parameter: parameter.matrix)

    @property
    def outside(self) -> int:
        """Parameters outside the stack: embeddings, norms, head."""
        return self.size - sum(self.layer_sizes)

    @property
    def head_size(self) -> int:
        """Elements of the matrix from hidden states to the vocabulary, tied or not."""
        return self.vocab_size * self.hidden_size

    def shard(self, parts: int) -> int:
        """Elements on the fullest device when every parameter is cut along its first axis."""
        return sum(parameter.shard(parts) for parameter in self.parameters)

    def _by_layer(self, counts: Callable[[ParameterFact], bool]) -> tuple[int, ...]:
        sizes = [0] * self.num_hidden_layers
        for parameter in self.parameters:
            if parameter.layer is not None and counts(parameter):
                sizes[parameter.layer] += parameter.size
        return tuple(sizes)


def model_facts(model: Any) -> ModelFacts:
    """The facts of a Loom model: any object with its `config` and `named_parameters()`."""
    config = model.config
    return ModelFacts(
        encoder=config.kind == "encoder",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        gated=config.mlp_kind == "gated",
        rms_norm=config.norm_kind == "rms_norm",
        post_norm=config.norm_placement == "post",
        first_norm=config.first_norm,
        embedding_norm=config.embedding_norm,
        rotary=config.position_kind == "rotary",
        tied=config.tie_word_embeddings,
        local_layers=tuple(kind == "local" for kind in config.attention_kinds),
        local_window=config.local_window,
        hidden_dropout=config.hidden_dropout > 0,
        attention_dropout=config.attention_dropout > 0,
        parameters=_parameters(model.named_parameters()),
    )


def _parameters(named: Iterable[tuple[str, Any]]) -> tuple[ParameterFact, ...]:
    facts = []
    for name, parameter in named:
        found = _LAYER.search(name)
        layer = None if found is None else int(found[1])
        facts.append(ParameterFact(name, tuple(parameter.shape), layer, bool(parameter.requires_grad)))
    return tuple(facts)
