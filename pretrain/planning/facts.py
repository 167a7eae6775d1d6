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

_LAYER = re.compile(r"^(.*?)layers?\.(\d+)\.")


@dataclass(frozen=True)
class ParameterFact:
    """One parameter; `layer` is the block it belongs to, None outside the stacks; `tied` ones are counted once."""

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
    """Sizes and switches of a Transformer, by the names of its configuration.

    A model may have two stacks: an encoder before its decoder, a generator before its discriminator. These are the
    facts of the last stack, and `before` are those of the one before it; `parameters`, and what is summed over them,
    are those of the whole model, blocks counted from the first stack's on. `groups` sets of weights serve all layers.
    `target_length` are the positions of a decoder's row beside an encoder's; None: as many as that has.
    """

    encoder: bool
    vocab_size: int
    hidden_size: int
    embedding_size: int
    intermediate_size: int
    num_hidden_layers: int
    groups: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    gated: bool
    relu: bool
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
    head_transform: bool
    qk_norm: bool
    parallel: bool
    shared_norm: bool
    position_bias: bool
    learned_bias: bool
    parameters: tuple[ParameterFact, ...]
    first_block: int = 0
    crosses: bool = False
    detects: bool = False
    headless: bool = False
    target_length: int | None = None
    before: ModelFacts | None = None

    @property
    def query_width(self) -> int:
        """Features of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Features of all key heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def stacks(self) -> tuple[ModelFacts, ...]:
        """The stacks in the order in which they run."""
        return (*(() if self.before is None else self.before.stacks), self)

    def block_of(self, layer: int) -> int:
        """The place among all blocks of the one that serves a layer of this stack."""
        return self.first_block + layer * self.groups // self.num_hidden_layers

    def uses_first(self, layer: int) -> bool:
        """Whether no layer before this one has the same weights."""
        return layer == 0 or self.block_of(layer - 1) != self.block_of(layer)

    @property
    def multiplied(self) -> int:
        """Elements of the matrices that a position of this stack passes, shared ones as often as they are used."""
        passed = sum(self.layer_matrices[self.block_of(layer)] for layer in range(self.num_hidden_layers))
        return passed + (self.hidden_size * self.embedding_size if self.embedding_size != self.hidden_size else 0)

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
    def head_width(self) -> int:
        """Features that the matrix to the vocabulary takes."""
        return self.embedding_size if self.head_transform else self.hidden_size

    @property
    def head_size(self) -> int:
        """Elements of the matrix to the vocabulary, tied or not; a discriminator or an encoder's part has none."""
        return 0 if self.detects or self.headless else self.vocab_size * self.head_width

    @property
    def transform_size(self) -> int:
        """Elements of the matrices before that one; of a discriminator's head, all of it."""
        if self.detects:
            return self.hidden_size * (self.hidden_size + 1)
        return self.hidden_size * self.head_width if self.head_transform and not self.headless else 0

    def shard(self, parts: int) -> int:
        """Elements on the fullest device when every parameter is cut along its first axis."""
        return sum(parameter.shard(parts) for parameter in self.parameters)

    def _by_layer(self, counts: Callable[[ParameterFact], bool]) -> tuple[int, ...]:
        blocks = max((parameter.layer for parameter in self.parameters if parameter.layer is not None), default=-1)
        sizes = [0] * (blocks + 1)
        for parameter in self.parameters:
            if parameter.layer is not None and counts(parameter):
                sizes[parameter.layer] += parameter.size
        return tuple(sizes)


def model_facts(model: Any, *, target_length: int | None = None) -> ModelFacts:
    """The facts of a Loom model: any object with its `config` and `named_parameters()`.

    Args:
        model: may lie on torch's meta device.
        target_length: see `ModelFacts`.
    """
    config = model.config
    if config.kind == "seq2seq":
        parameters = _parameters(model.named_parameters(), ("encoder", "decoder"))
        layers = config.num_hidden_layers
        encoder = _facts(config, parameters, encoder=True, num_hidden_layers=layers, groups=layers, headless=True)
        layers = config.num_decoder_layers
        return _facts(
            config,
            parameters,
            encoder=False,
            num_hidden_layers=layers,
            groups=layers,
            first_block=encoder.groups,
            crosses=True,
            target_length=target_length,
            before=encoder,
        )
    detects = any(name.startswith("rtd_head.") for name, _ in model.named_parameters())
    generator = getattr(model, "generator", None)
    parameters = _parameters(model.named_parameters(), ("generator", "model"))
    if generator is None:
        return _facts(config, parameters, detects=detects)
    before = _facts(generator.config, parameters)
    return _facts(config, parameters, first_block=before.groups, detects=True, before=before)


def _facts(config: Any, parameters: tuple[ParameterFact, ...], **more: Any) -> ModelFacts:
    """The facts of one stack."""
    layers = more.get("num_hidden_layers", config.num_hidden_layers)
    keys: dict[str, Any] = {
        "encoder": config.kind == "encoder",
        "num_hidden_layers": layers,
        "groups": config.num_hidden_groups,
    }
    return ModelFacts(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        embedding_size=config.embedding_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        gated=config.mlp_kind == "gated",
        relu=config.hidden_act == "relu",
        rms_norm=config.norm_kind == "rms_norm",
        post_norm=config.norm_placement == "post",
        first_norm=config.first_norm,
        embedding_norm=config.embedding_norm,
        rotary=config.position_kind == "rotary",
        tied=config.tie_word_embeddings,
        local_layers=tuple(kind == "local" for kind in config.attention_kinds_of(layers)),
        local_window=config.local_window,
        hidden_dropout=config.hidden_dropout > 0,
        attention_dropout=config.attention_dropout > 0,
        head_transform=config.head_transform,
        qk_norm=config.qk_norm != "none",
        parallel=config.block_kind != "sequential",
        shared_norm=config.block_kind == "parallel_shared_norm",
        position_bias=config.position_kind in ("alibi", "relative"),
        learned_bias=config.position_kind == "relative",
        parameters=parameters,
        **(keys | more),
    )


def _parameters(named: Iterable[tuple[str, Any]], stacks: tuple[str, str]) -> tuple[ParameterFact, ...]:
    """Every parameter; blocks are counted through both stacks, those whose names hold `stacks[0]` first."""
    found = [(name, parameter, _LAYER.search(name)) for name, parameter in named]
    early = [stacks[0] in match[1].split(".") if match else False for _, _, match in found]
    counts = [int(match[2]) + 1 for (_, _, match), first in zip(found, early, strict=True) if match and first]
    facts = []
    for (name, parameter, match), first in zip(found, early, strict=True):
        layer = None if match is None else int(match[2]) + (0 if first else max(counts, default=0))
        facts.append(ParameterFact(name, tuple(parameter.shape), layer, bool(parameter.requires_grad)))
    return tuple(facts)
