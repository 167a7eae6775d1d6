"""A model made of a smaller one: more pieces in its vocabulary, more layers, more width.

What lives here: where each new weight comes from. What must not: reading or writing models, or why one grows.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"
# (transformers' base classes are untyped)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.models import LoomConfig, LoomPreTrainedModel, model_from_config

GROWABLE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
"""Sizes that `grow` takes."""


# --- the vocabulary -------------------------------------------------------------------------------------------------


def extend_vocabulary(
    model: PreTrainedModel, made_of: Mapping[int, Sequence[int]], vocab_size: int, multiple: int = 64
) -> PreTrainedModel:
    """The model with embeddings for a vocabulary that was extended; what is there stays bit for bit.

    A new piece's embedding, and its row and bias of an untied head, is the mean of those of the pieces that it is made
    of (Hewitt 2021; Yao et al. 2021, arXiv 2107.13022). Rows that pad the table stay as they are, or are such a mean of
    the whole table.

    Args:
        model: ours, which is rebuilt, or a stock class, which is resized in place.
        made_of: new id -> the old ids that its piece stands for.
        vocab_size: ids of the extended tokenizer.
        multiple: the table's rows are padded up to a multiple of this.

    Raises:
        ValueError: when a piece is made of an id that the model has no embedding for.
    """
    table: Any = model.get_input_embeddings()
    before = int(table.weight.shape[0])
    rows = table_rows(before, vocab_size, multiple)
    if unknown := sorted(old for parts in made_of.values() for old in parts if old >= before):
        raise ValueError(f"the tokenizer's id {unknown[0]} has no embedding in a model of {before}; it is another's")
    if isinstance(model, LoomPreTrainedModel):
        config = _changed(model.config, {"vocab_size": rows})
        grown = model_from_config(config)
        wanted = grown.state_dict()
        old = model.state_dict()
        ours = vocabulary_tensors(model) | {name for name in old if wanted[name].shape != old[name].shape}
        state = {name: more_rows(tensor, made_of, rows) if name in ours else tensor for name, tensor in old.items()}
        grown.load_state_dict(state)
        grown.tie_weights()
        return grown.eval()
    model.resize_token_embeddings(rows, mean_resizing=False)
    head: Any = model.get_output_embeddings()
    seen: set[int] = set()
    for module in (model.get_input_embeddings(), head):
        for tensor in (getattr(module, "weight", None), getattr(module, "bias", None)):
            if isinstance(tensor, Tensor) and tensor.shape[:1] == (rows,) and id(tensor) not in seen:
                seen.add(id(tensor))
                with torch.no_grad():
                    tensor.copy_(more_rows(tensor[:before].clone(), made_of, rows))
    return model


def table_rows(before: int, vocab_size: int, multiple: int = 64) -> int:
    """Rows of a table for `vocab_size` ids, padded up to a multiple; never fewer than it had."""
    return max(before, -(-vocab_size // multiple) * multiple)


def vocabulary_tensors(model: PreTrainedModel) -> set[str]:
    """Names of the tensors that have a row for each id: the table of embeddings, the head's weight and bias."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    own = {id(tensor) for module in modules if module is not None for tensor in module.parameters(recurse=False)}
    return {name for name, tensor in model.named_parameters(remove_duplicate=False) if id(tensor) in own}


def more_rows(table: Tensor, made_of: Mapping[int, Sequence[int]], rows: int) -> Tensor:
    """(V, ...) -> (rows, ...), those of new ids the mean of the rows that they are made of."""
    grown = torch.cat((table, table.mean(dim=0, keepdim=True).expand(rows - table.shape[0], *table.shape[1:])))
    for new, parts in made_of.items():
        grown[new] = table[list(parts)].mean(dim=0)
    return grown


# --- the sizes ------------------------------------------------------------------------------------------------------


def grow(model: LoomPreTrainedModel, sizes: Mapping[str, int]) -> LoomPreTrainedModel:
    """A larger model of the same design whose weights are tiled from this one.

    Width: each new channel is a copy of an old one, and what reads copies is divided by how many there are (Net2Net,
    Chen et al. 2016, arXiv 1511.05641), so that whole multiples of every width compute the same function; other sizes
    nearly so, because norms see some channels once more than others. Depth: layer i of L is a copy of layer i l / L of
    l, in the order of stacking (Gong et al. 2019), which computes another function and trains fast.

    Args:
        model: an encoder or a decoder with its language-model head.
        sizes: of `GROWABLE`, those that are larger. Heads keep their width: hidden_size brings more of them, in
            proportion, where num_attention_heads is not given.

    Raises:
        ValueError: names the size that cannot grow so.
    """
    small = model.config
    large = grown_config(small, sizes)
    widths = _widths(small, large)
    grown = model_from_config(large)
    old = dict(model.state_dict())
    state = {}
    for name, tensor in grown.state_dict().items():
        source = _source(name, small.num_hidden_layers, large.num_hidden_layers)
        if source not in old:  # the norm that the first layer goes without, in a layer that is its copy
            state[name] = tensor
            continue
        looked_up = name.rpartition(".")[0].rpartition(".")[2].startswith(("embed_", "relative_bias"))
        looked_up = looked_up or (small.tie_word_embeddings and name == "lm_head.weight")
        state[name] = _tile(old[source], _axes(name, old[source], small), widths, read=not looked_up)
        assert state[name].shape == tensor.shape, name
    if large.tie_word_embeddings:
        _calm(state, widths["hidden"], small)
    grown.load_state_dict(state)
    grown.tie_weights()
    return grown.eval()


def grown_config(small: LoomConfig, sizes: Mapping[str, int]) -> LoomConfig:
    """The configuration of what `grow` makes.

    Raises:
        ValueError: names the size that cannot grow so.
    """
    if small.kind == "seq2seq" or small.num_hidden_groups != small.num_hidden_layers:
        raise ValueError("model.grow is for an encoder or a decoder whose layers have weights of their own")
    large = _changed(small, _all_sizes(small, sizes))
    for name in GROWABLE:
        if (wanted := getattr(large, name)) < getattr(small, name):
            raise ValueError(f"model.grow: {name} {wanted} is below {getattr(small, name)}; a model only grows")
    return large


def _changed(config: LoomConfig, changes: Mapping[str, Any]) -> LoomConfig:
    plain = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "transformers_version")}
    return type(config)(**(plain | dict(changes)))


def _all_sizes(small: LoomConfig, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The given sizes, and those that follow from them."""
    if unknown := sorted(set(sizes) - set(GROWABLE)):
        raise ValueError(f"model.grow: {unknown[0]} cannot grow; {', '.join(GROWABLE)} can")
    made: dict[str, Any] = dict(sizes)
    hidden = made.get("hidden_size", small.hidden_size)
    if "hidden_size" in made and small.embedding_size != small.hidden_size:
        raise ValueError("model.grow: hidden_size cannot grow apart from embedding_size; leave it out")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        wanted = getattr(small, name) * hidden
        if name not in made and wanted % small.hidden_size:
            raise ValueError(f"model.grow: hidden_size {hidden} gives no whole {name}; give that too")
        made.setdefault(name, wanted // small.hidden_size)
    if hidden != small.hidden_size:
        made["embedding_size"] = hidden
    made["num_hidden_groups"] = made.get("num_hidden_layers", small.num_hidden_layers)
    return made | {"head_dim": small.head_dim}


class _Width:
    """Which old channel each new one copies, and how many copies an old one has."""

    def __init__(self, old: int, new: int, block: int = 1) -> None:
        self.index = (torch.arange(new // block)[:, None] % (old // block) * block + torch.arange(block)).flatten()
        self.copies = torch.bincount(self.index, minlength=old)
        self.factor = new / old


def _widths(small: LoomConfig, large: LoomConfig) -> dict[str, _Width]:
    dim = small.head_dim
    return {
        "hidden": _Width(small.hidden_size, large.hidden_size),
        "inner": _Width(small.intermediate_size, large.intermediate_size),
        "queries": _Width(small.num_attention_heads * dim, large.num_attention_heads * dim, dim),
        "keys": _Width(small.num_key_value_heads * dim, large.num_key_value_heads * dim, dim),
        "heads": _Width(small.num_attention_heads, large.num_attention_heads),
    }


def _axes(name: str, tensor: Tensor, config: LoomConfig) -> tuple[str | None, ...]:
    """What each axis of a tensor counts; None: neither grows."""
    module, _, kind = name.rpartition(".")
    part = module.rpartition(".")[2]
    matrices: dict[str, tuple[str | None, str | None]] = {
        "q_proj": ("queries", "hidden"),
        "k_proj": ("keys", "hidden"),
        "v_proj": ("keys", "hidden"),
        "o_proj": ("hidden", "queries"),
        "up_proj": ("inner", "hidden"),
        "gate_proj": ("inner", "hidden"),
        "down_proj": ("hidden", "inner"),
        "dense": ("hidden", "hidden"),
        "lm_head": (None, "hidden"),
    }
    if part in matrices:
        return matrices[part] if kind == "weight" else matrices[part][:1]
    if part in ("q_norm", "k_norm"):
        whole = {"q_norm": "queries", "k_norm": "keys"}[part]
        return (whole,) if config.qk_norm == "full_width" else (None,)
    if part == "relative_bias":
        return (None, "heads")
    return (None, "hidden") if tensor.dim() == 2 else ("hidden",)  # tables, norms


def _source(name: str, small: int, large: int) -> str:
    """The tensor that one of the grown model is made of."""
    before, found, after = name.partition("layers.")
    if not found:
        return name
    number, _, rest = after.partition(".")
    return f"{before}layers.{int(number) * small // large}.{rest}"


def _tile(tensor: Tensor, axes: Sequence[str | None], widths: Mapping[str, _Width], *, read: bool) -> Tensor:
    """Copy channels along the axes that grow; a matrix that reads copies is divided by their number."""
    for axis, kind in enumerate(axes):
        if kind is None:
            continue
        if axis == 1 and read:
            tensor = tensor / widths[kind].copies
        tensor = tensor.index_select(axis, widths[kind].index)
    return tensor


def _calm(state: dict[str, Tensor], hidden: _Width, config: LoomConfig) -> None:
    """Divide what reaches a head that is tied to copied embeddings: its products have that many times the terms."""
    last = "head.norm" if config.head_transform else "model.norm"
    for kind in ("weight", "bias"):
        if f"{last}.{kind}" in state:
            state[f"{last}.{kind}"] = state[f"{last}.{kind}"] / hidden.factor
