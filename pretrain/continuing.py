"""Going on from a model that is there: its optimizer's state taken along, and what was gained and what was forgotten.

What lives here: the way of saved moments into a new run, also past a vocabulary that grew, and the table of losses at
the first and the last step. What must not: reading or growing models, the loop.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.config import RunConfig
from pretrain.files import ArtifactError, read_manifest
from pretrain.growing import more_rows, vocabulary_tensors
from pretrain.tokenization.extend import EXTENDED
from pretrain.training import checkpoint
from pretrain.training.checkpoint_files import KIND
from pretrain.training.engines import Engine
from pretrain.training.state import OptimizerState

_REMEDY = "leave model.optimizer_state out, and its moments start at zero"
_SHOWN = ("bits_per_byte", "loss")  # of each set the first one that is there: bytes stay when the tokenizer changes


def learnt_pieces(config: RunConfig) -> dict[int, list[int]]:
    """What each piece that the run's tokenizer has learnt is made of: new id -> old ids; empty where it learnt none."""
    path = config.directory / "tokenizer" / EXTENDED
    if not path.is_file():
        return {}
    return {int(new): parts for new, parts in json.loads(path.read_text(encoding="utf-8")).items()}


# --- the optimizer's state ------------------------------------------------------------------------------------------


def check_optimizer_state(config: RunConfig) -> None:
    """Refuse `model.optimizer_state` where there is no state, or another optimizer's, before anything is made.

    Raises:
        ValueError: names what is there instead, and the remedy.
    """
    if config.model.optimizer_state:
        _checkpoint_of(config)


def optimizer_state_of(config: RunConfig, model: PreTrainedModel) -> Callable[[Engine], str]:
    """What puts the moments of `model.from`'s optimizer into an engine, as `Trainer` calls it before its first step.

    Moments of weights that are as they were are taken bit for bit, and the count of updates with them. Where the
    vocabulary was extended, the row of a new piece starts with a first moment of zero and with the mean of its parts'
    second moments, as its embedding is the mean of theirs. Adam corrects its bias by one count for the whole table, the
    old one: a second moment of zero would not be corrected any more, and first updates would be up to 6.6 times (betas
    0.9, 0.999) as large as the learning rate says.

    Args:
        config: the run configuration; peak rates and betas are its own, not the checkpoint's.
        model: the run's, before an engine splits it.

    Raises:
        ValueError: the function does, as `check_optimizer_state`, and when the state does not fit the model.
    """
    tables = vocabulary_tensors(model)
    made_of = learnt_pieces(config)

    def take_along(engine: Engine) -> str:
        source = _checkpoint_of(config)
        engine.ranks.on_main(lambda: _verify(source))
        found = checkpoint.load_checkpoint(source, verify=False)
        shapes = {name: known.shape for name, known in engine.shapes().items()}
        try:
            engine.load(None, _grown(found.optimizer, shapes, tables, made_of))
        except ArtifactError as error:
            raise ValueError(
                f"model.optimizer_state: what lies beside model.from: {config.model.from_} does not fit: {error}; "
                f"{_REMEDY}"
            ) from error
        return f"the optimizer starts with the moments of {source.name}, {found.step:,} updates ({source})"

    return take_along


def _checkpoint_of(config: RunConfig) -> Path:
    """The checkpoint whose model `model.from` names, made with the same optimizer."""
    named = Path(str(config.model.from_))
    source = named.resolve().parent
    key = f"model.optimizer_state: model.from: {config.model.from_}"
    try:
        manifest = read_manifest(source, KIND) if named.name == "model" else None
    except ArtifactError:
        manifest = None
    if manifest is None:
        raise ValueError(f"{key} is no checkpoint's model, so no optimizer's state lies beside it; {_hint(named)}")
    before, now = manifest.config["optimizer"]["name"], config.optimizer.name
    if before != now:
        raise ValueError(f"{key} was trained with {before}, and this run has optimizer.name: {now}; {_REMEDY}")
    return source


def _hint(named: Path) -> str:
    """The checkpoint that is probably meant: of the run directory, or of the one around an exported model."""
    for train in (named / "train", named.parent / "train"):
        try:
            latest = checkpoint.read_pointer(train, "latest")
        except ArtifactError:
            continue
        if latest is not None:
            return f"give model.from: {latest / 'model'}, or {_REMEDY}"
    return f"give .../train/checkpoints/step-00001000/model of a run, or {_REMEDY}"


def _verify(source: Path) -> None:
    checkpoint.load_checkpoint(source)


def _grown(
    state: OptimizerState,
    shapes: Mapping[str, tuple[int, ...]],
    tables: Iterable[str],
    made_of: Mapping[int, Sequence[int]],
) -> OptimizerState:
    """The state with rows for new pieces; the same where there are none."""
    if not made_of:
        return state
    tensors = dict(state.tensors)
    for name, tensor in state.tensors.items():
        parameter, _, key = name.rpartition("/")
        shape = shapes.get(parameter, ())
        grew = tensor.dim() > 0 and tensor.shape[1:] == shape[1:] and tensor.shape[0] < shape[0]
        if key != "step" and (parameter in tables or grew):
            make = _squares if key == "exp_avg_sq" else _means
            tensors[name] = make(tensor, made_of, max(tensor.shape[0], shape[0]))
    return OptimizerState(tensors, state.groups, state.stateless)


def _squares(tensor: Tensor, made_of: Mapping[int, Sequence[int]], rows: int) -> Tensor:
    return more_rows(tensor, made_of, rows)


def _means(tensor: Tensor, made_of: Mapping[int, Sequence[int]], rows: int) -> Tensor:
    grown = torch.cat((tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])))
    grown[list(made_of)] = 0.0
    return grown


# --- gained and forgotten -------------------------------------------------------------------------------------------


def gain_table(result: Mapping[str, Any], scores: Mapping[str, Any]) -> Table | None:
    """The loss of each validation set before anything was learnt and at the end; None where the start was not scored.

    Bits per byte where they are known, which compare over tokenizers; else nats a target. Where the vocabulary was
    extended, the change is to the model that was gone on from, in its own pieces, over all of the set.

    Args:
        result: what training wrote at its end (`result.json`).
        scores: of the finished model by set, and as `bits_per_byte_before` those of the model it went on from.
    """
    first, last = result.get("scores_at_start") or {}, result.get("scores") or {}
    lines: list[tuple[str, ...]] = []
    for name in dict.fromkeys(score.rpartition("/")[0] for score in last):
        known = [kind for kind in _SHOWN if f"{name}/{kind}" in first and f"{name}/{kind}" in last]
        if known:
            start, end = (float(found[f"{name}/{known[0]}"]) for found in (first, last))
            whole = scores.get(name) or {}
            before = whole.get(f"{known[0]}_before")
            end = end if before is None else float(whole[known[0]])
            change = f"{end - (start if before is None else before):+.4f}"
            shown = "" if before is None else f"{before:.4f}"
            lines.append((name, known[0].replace("_", " "), shown, f"{start:.4f}", f"{end:.4f}", change))
    if not lines:
        return None
    table = Table(title="gained (below 0) and forgotten (above)")
    extended = any(line[2] for line in lines)
    for name in ("set", "measured in", "before", "step 0", f"step {result.get('step', 0):,}", "change"):
        if name != "before" or extended:
            table.add_column(name, justify="left" if name in ("set", "measured in") else "right")
    for line in lines:
        table.add_row(*(line if extended else line[:2] + line[3:]))
    return table
