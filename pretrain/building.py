"""The model of a run: new, read from elsewhere, grown, or taught new pieces; refused when the run does not fit it.

What lives here: the way from a configuration to a model. What must not: how a model works, or the rest of a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from pretrain.config import RunConfig
from pretrain.continuing import learnt_pieces
from pretrain.data.batches import layout_of
from pretrain.files import read_manifest
from pretrain.growing import extend_vocabulary, grow, grown_config, table_rows
from pretrain.interop import from_stock_config
from pretrain.interop.published import check_published
from pretrain.model_reading import GENERATOR, read_config, read_detector, read_loom, read_stock
from pretrain.models import (
    DETECTION_KEYS,
    GENERATOR_SIZE,
    LoomConfig,
    LoomEncoderConfig,
    loom_config,
    model_class,
    refuse_device,
    sizes_of_generator,
)
from pretrain.runtime import set_seed
from pretrain.stock_model import adapt
from pretrain.trust import check_tokenizer

_SPECIAL_TOKENS = 5  # about as many as a tokenizer adds to numbers or bytes


def build_model(config: RunConfig, *, console: Console | None = None) -> PreTrainedModel:
    """The model of a run, with initial weights drawn from `train.seed`, or read from `model.from`.

    Reads the vocabulary and the special ids from the run's tokenizer.

    Raises:
        ArtifactError: when the run has no tokenizer yet.
        ValueError: when the sizes do not fit each other, or `model.from` has another vocabulary.
    """
    tokenizer = read_manifest(config.directory / "tokenizer", "tokenizer").facts
    if config.model.class_ == "stock":
        return _stock_model(config, tokenizer["vocab_size"], console)
    if config.model.from_ is not None:
        model: PreTrainedModel
        note = console.print if console is not None else None
        if config.objective.kind == "rtd":
            set_seed(config.train.seed)  # of a new generator
            keys = {key: config.model.sizes()[key] for key in DETECTION_KEYS if key in config.model.sizes()}
            model = small = read_detector(config.model.from_, note=note, keys=keys)
        else:
            model = small = read_loom(config.model.from_, note=note, task=config.objective.task)
        if config.model.grow is not None:
            model = grow(small, config.model.grow.model_dump(exclude_none=True))
        model = _taught(config, model, tokenizer["vocab_size"])
        _covers(config, model, tokenizer["vocab_size"])
    else:
        assert config.model.architecture is not None
        set_seed(config.train.seed)
        sized = model_config(config, tokenizer)
        model = model_class(sized, config.objective.task)(sized)
    _fits(config, cast(LoomConfig, model.config))
    _attend(config, model)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
    return model


def _covers(config: RunConfig, model: PreTrainedModel, vocab_size: int) -> None:
    """Refuse a model with fewer embeddings than the tokenizer has ids."""
    table: Any = model.get_input_embeddings()
    embeddings = table.weight.shape[0]
    if embeddings < vocab_size:
        raise ValueError(
            f"model.from: {config.model.from_} has {embeddings} embeddings, the tokenizer has {vocab_size} ids; take "
            f"the model's own with tokenizer.from: {config.model.from_}"
        )


def _taught(config: RunConfig, model: PreTrainedModel, vocab_size: int) -> PreTrainedModel:
    """The model with embeddings for the pieces that its tokenizer has learnt from the new text, where it has."""
    made_of = learnt_pieces(config)
    return extend_vocabulary(model, made_of, vocab_size) if made_of else model


def _stock_model(config: RunConfig, vocab_size: int, console: Console | None) -> PreTrainedModel:
    """A model of transformers' own class, made to take packed rows."""
    assert config.model.from_ is not None
    kind = layout_of(config.objective)
    model = _taught(config, read_stock(config.model.from_, kind), vocab_size)
    _covers(config, model, vocab_size)
    _reaches(config, model.config)
    _attend(config, model)
    way = adapt(model, kind, config.data.sequence_length)
    if console is not None:
        console.print(f"{type(model).__name__}: documents of a row are kept apart by {way.words}", highlight=False)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
    return model


def _attend(config: RunConfig, model: PreTrainedModel) -> None:
    """Take the attention backend that is asked for by name."""
    if config.train.attention != "auto":
        try:
            model.set_attn_implementation(config.train.attention)
        except ValueError as error:
            raise ValueError(f"train.attention: {error}") from error


def check_attention(config: RunConfig, device: torch.device | str) -> None:
    """Refuse an attention backend that the device or the model's class does not have, before a step is made.

    Raises:
        ValueError: names the key, its value and the remedy.
    """
    name = config.train.attention
    if name == "auto":
        return
    if config.model.class_ == "stock" and name not in ("eager", "sdpa"):
        raise ValueError(
            f"train.attention: {name} is a backend of the project's own classes, and model.class is stock; take "
            "eager, sdpa or auto, or leave model.class out"
        )
    try:
        refuse_device(name, device)
    except ValueError as error:
        raise ValueError(f"train.attention: {error}") from error


def _reaches(config: RunConfig, held: PreTrainedConfig) -> None:
    """Refuse rows that are longer than the model has positions."""
    positions = getattr(held, "max_position_embeddings", None)
    if positions is not None and positions < config.data.sequence_length:
        raise ValueError(
            f"data.sequence_length: {config.data.sequence_length} is longer than the {positions} positions of "
            f"model.from: {config.model.from_}; lower it"
        )


def _fits(config: RunConfig, held: LoomConfig) -> None:
    """Refuse a model that cannot be published, or that the rest of the run does not fit.

    Raises:
        ValueError: names the keys that do not fit each other.
    """
    if config.objective.sentences != "none" and held.type_vocab_size < 2:
        raise ValueError(
            f"objective.sentences: {config.objective.sentences} tells two segments apart by token types, and the model "
            f"has {held.type_vocab_size}; set model.type_vocab_size: 2, or take an architecture that has them "
            "(bert, electra, albert)"
        )
    # Every checkpoint is published in this form: refuse now what it cannot hold.
    check_published(held, config.objective.task, config.export.to)
    wants = config.objective.model_kind or held.kind
    if wants != held.kind:
        raise ValueError(
            f"objective.kind: {config.objective.kind} needs an {wants}, model.from: {config.model.from_} is a "
            f"{held.kind}; choose the other objective, or another model"
        )
    if wants == "seq2seq" and held.decoder_start_token_id != held.pad_token_id:
        raise ValueError(
            f"model.from: {config.model.from_} begins its output with id {held.decoder_start_token_id}, and "
            f"rows are made with padding there, id {held.pad_token_id}; take a model that begins with padding"
        )
    _reaches(config, held)


def model_config(config: RunConfig, tokenizer: Mapping[str, Any]) -> Any:
    """The model's configuration for a tokenizer's facts (`vocab_size`, `special_ids`)."""
    assert config.model.architecture is not None
    keys = config.model.sizes()
    keys.setdefault("max_position_embeddings", _positions(config))
    ids = {f"{role}_token_id": token_id for role, token_id in tokenizer["special_ids"].items()}
    if config.kind == "seq2seq" and "pad_token_id" in ids:
        ids["decoder_start_token_id"] = ids["pad_token_id"]
    if config.objective.kind == "rtd":
        keys.setdefault("generator_size", GENERATOR_SIZE)
    return loom_config(config.model.architecture, vocab_size=tokenizer["vocab_size"], **ids, **keys)


def _positions(config: RunConfig) -> int:
    assert config.model.architecture is not None
    published = loom_config(config.model.architecture).max_position_embeddings
    sized = config.model.hidden_size is not None
    return config.data.sequence_length if sized else max(published, config.data.sequence_length)


# --- what a model will be, before it is made ------------------------------------------------------------------------


def planned_model_config(config: RunConfig, vocab_size: int | None = None) -> LoomConfig:
    """The model's configuration as a run would make it; without a tokenizer by the size that is asked for.

    Args:
        config: the run configuration.
        vocab_size: of a new model; default: that of the tokenizer, which is read where it is there or named.

    Raises:
        ValueError: when the sizes do not fit each other, or `model.from` or `tokenizer.from` cannot be read.
    """
    detects = config.objective.kind == "rtd"
    if config.model.from_ is not None:
        found: Any = read_config(config.model.from_)
        held = found if isinstance(found, LoomConfig) else from_stock_config(found, config.objective.task)
        if detects and getattr(held, "generator_size", None) is None:
            held = _with_generator(held, _generator_keys(config, held))
        if config.model.grow is not None:
            held = grown_config(held, config.model.grow.model_dump(exclude_none=True))
        if config.tokenizer.extend is not None:
            rows = table_rows(held.vocab_size, held.vocab_size + config.tokenizer.extend)  # at most
            held = type(held).from_dict(held.to_dict() | {"vocab_size": rows})
        return held
    size = _vocabulary(config) if vocab_size is None else vocab_size
    return cast(LoomConfig, model_config(config, {"vocab_size": size, "special_ids": {"pad": 0}}))


def _with_generator(config: LoomConfig, keys: dict[str, Any]) -> LoomConfig:
    """The configuration of a discriminator, with a generator."""
    return type(config).from_dict(config.to_dict() | keys)


def _generator_keys(config: RunConfig, held: LoomConfig) -> dict[str, Any]:
    """The keys that give a discriminator the generator that lies beside it, or a new one."""
    beside = Path(str(config.model.from_)) / GENERATOR
    if (beside / "config.json").is_file() and isinstance(held, LoomEncoderConfig):
        found: Any = read_config(beside)
        own: Any = found if isinstance(found, LoomConfig) else from_stock_config(found)
        return sizes_of_generator(held, own, held.rtd_sharing)
    given = {key: value for key, value in config.model.sizes().items() if key in DETECTION_KEYS}
    return {"generator_size": GENERATOR_SIZE} | given


def _vocabulary(config: RunConfig) -> int:
    """Ids of the run's tokenizer: of the one that is there, or that is named, or as asked for."""
    own, tokenizer = config.directory / "tokenizer", config.tokenizer
    if (own / "manifest.json").is_file():
        return int(read_manifest(own, "tokenizer").facts["vocab_size"])
    if tokenizer.from_ is not None:
        try:
            check_tokenizer(tokenizer.from_)
            return len(AutoTokenizer.from_pretrained(tokenizer.from_, trust_remote_code=False))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"tokenizer.from: `{tokenizer.from_}` cannot be read ({str(error).splitlines()[0]}); for a plan give "
                "its size instead: take `from` out and write tokenizer: {vocab_size: N}"
            ) from None
    more = _SPECIAL_TOKENS + len(tokenizer.special_tokens)
    size = {"ids": tokenizer.vocab_size + more, "bytes": 256 + more}.get(tokenizer.algorithm, tokenizer.vocab_size)
    return math.ceil(size / tokenizer.pad_to_multiple) * tokenizer.pad_to_multiple


def check_model(config: RunConfig) -> None:
    """Refuse a model that the run does not fit, or that cannot be published, before anything is made.

    Raises:
        ValueError: names the keys that do not fit each other.
    """
    if config.model.from_ is not None and config.model.class_ == "stock":
        _reaches(config, read_config(config.model.from_))
    else:
        _fits(config, planned_model_config(config, config.tokenizer.vocab_size))
