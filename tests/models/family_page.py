"""Writes docs/family.md: every variant of the model, what it follows, how far it lies from a slow reference, its homes.

    python tests/models/family_page.py docs/family.md

What lives here: the page and its sections. A section lists the names of its rows cheaply, so that a test can see that
the page is whole, and measures them when the page is written. The tests that measure the same things ask `written` for
the figures of the page and compare.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import transformers

if __name__ == "__main__":  # run as a command: the builders lie beside this file, the package two folders up
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import head_cases
import loss_cases
import mask_cases
from family_homes import class_name, homes_of_task, native_homes
from loom_builders import relative
from reference import slow_attention
from variants import GROUPS, Errors, Variant, measure

from pretrain.models import CAPABILITIES
from pretrain.models.attention import BACKENDS
from pretrain.models.masks import AttentionMask
from pretrain.models.mixers import MIXERS

PAGE = Path(__file__).parents[2] / "docs" / "family.md"
AGAIN = "run python tests/models/family_page.py docs/family.md"
LARGEST = Errors(logits=1e-9, gradients=1e-9, float32=1e-5)
"""What `test_switches.py` allows."""


@dataclass(frozen=True)
class Section:
    """One table of the page: its columns, the names in its first one, and what makes the row of a name.

    `figures` are the columns that are measured; the others follow from the code alone.
    """

    title: str
    text: str
    columns: tuple[str, ...]
    figures: tuple[str, ...]
    names: list[str]
    facts: Callable[[str], dict[str, str]]
    measured: Callable[[str], tuple[float, ...]]

    def row(self, name: str) -> list[str]:
        """All cells of a row, measured now."""
        cells = {self.columns[0]: name} | self.facts(name)
        cells |= {column: f"{error:.0e}" for column, error in zip(self.figures, self.measured(name), strict=True)}
        return [cells[column] for column in self.columns]


# --- the switches -----------------------------------------------------------------------------------------------------


def _switches(title: str, variants: list[Variant]) -> Section:
    by_name = {variant.name: variant for variant in variants}

    def facts(name: str) -> dict[str, str]:
        variant = by_name[name]
        kinds = ", ".join(variant.kinds)
        return {"keys": _keys(variant), "follows": variant.source, "models": kinds, "homes": native_homes(variant)}

    def measured(name: str) -> tuple[float, ...]:
        worst = Errors(0.0, 0.0, 0.0)
        for kind in by_name[name].kinds:
            worst = worst.worst(measure(by_name[name], kind))
        return worst.logits, worst.gradients, worst.float32

    return Section(
        title,
        "The conventions of each `architecture`, at tiny sizes." if title == "Designs" else "",
        ("variant", "keys", "follows", "models", "logits", "gradients", "float32", "homes"),
        ("logits", "gradients", "float32"),
        list(by_name),
        facts,
        measured,
    )


def _keys(variant: Variant) -> str:
    if variant.architecture:
        return f"`architecture: {variant.architecture}`"
    return ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in variant.keys.items())


# --- mixers and backends ----------------------------------------------------------------------------------------------

_BACKENDS = {
    "eager": "Vaswani et al. 2017, 3.2.1",
    "sdpa": "Dao et al. 2022; on a CPU our own blocks",
    "flex": "Dong et al. 2024",
    "varlen": "Dao 2023",
}


def _backend_facts(name: str) -> dict[str, str]:
    can = CAPABILITIES[name]
    switches = [field.name for field in fields(can) if field.type in (bool, "bool") and not getattr(can, field.name)]
    without = ", ".join(switch.replace("_", " ") for switch in switches)
    return {
        "mixer": ", ".join(MIXERS),
        "follows": _BACKENDS[name],
        "devices": "all" if can.devices is None else ", ".join(can.devices),
        "without": without or "-",
        "test": "`models/test_loom_attention.py`" if can.devices is None else "`gpu`, `models/test_cuda_kernels.py`",
    }


def _backend_error(name: str) -> tuple[float, ...]:
    """Outputs in float64 over rows with and without a mask; what only a GPU runs is measured by its own tests."""
    if CAPABILITIES[name].devices is not None:
        return (float("nan"),)
    worst = 0.0
    for causal in (True, False):
        generator = torch.Generator().manual_seed(1)
        states = [torch.randn(2, 2, 9, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
        allowed = torch.ones(2, 9, 9, dtype=torch.bool)
        allowed = allowed.tril() if causal else allowed
        mixed, _ = BACKENDS[name](*states, AttentionMask(causal=causal), scale=0.4, dropout=0.0)
        worst = max(worst, relative(mixed.transpose(1, 2), slow_attention(*states, allowed, 0.4)))
    return (worst,)


# --- masks ------------------------------------------------------------------------------------------------------------


def _mask_facts(name: str) -> dict[str, str]:
    keys = mask_cases.SCHEMES[name]
    return {"keys": ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in keys.items())}


def _mask_errors(name: str) -> tuple[float, ...]:
    models = mask_cases.scheme_models(name)
    places = max(error for model in models for error in mask_cases.place_errors(model).values())
    slopes = max(mask_cases.neighbour_gradient(model) for model in models)
    ways = [mask_cases.mask_errors(model, padded) for model in models for padded in (False, True)]
    return places, slopes, max(error for way in ways for error in way.values())


# --- heads ------------------------------------------------------------------------------------------------------------

_HEADS = {
    "classification": "Devlin et al. 2018, 4.1; the family's own",
    "token_classification": "Devlin et al. 2018, 4.1",
    "question_answering": "Devlin et al. 2018, 4.2",
    "multiple_choice": "Devlin et al. 2018, 4.4",
}
_FAMILIES = {
    "encoder": (head_cases.ENCODER_FAMILIES, head_cases.ENCODER_TASKS),
    "decoder": (head_cases.DECODER_FAMILIES, head_cases.DECODER_TASKS),
}
_HEAD_NAMES = [f"{kind}, {task}" for kind, (_, tasks) in _FAMILIES.items() for task in tasks]


def _head_facts(name: str) -> dict[str, str]:
    kind, task = name.split(", ")
    last_token = (kind, task) == ("decoder", "classification")
    source = "Radford et al. 2018, 3.2: the last token" if last_token else _HEADS[task]
    return {"class": f"`{class_name(kind, task)}`", "follows": source, "homes": homes_of_task(kind, task)}


def _head_errors(name: str) -> tuple[float, ...]:
    kind, task = name.split(", ")
    families = _FAMILIES[kind][0]
    losses = [head_cases.loss_error(family, task) for family in families]
    if task == "classification":
        losses += [head_cases.problem_error(family, problem) for family in families for problem in head_cases.PROBLEMS]
    return max(head_cases.logits_error(family, task) for family in families), max(losses)


# --- objectives -------------------------------------------------------------------------------------------------------

_BATCHES = {
    "masked tokens": ("`kind: mlm`", "Devlin et al. 2018, 3.1", "data/test_objectives.py"),
    "a rate that moves": ("`kind: mlm`, `final_rate: 0.1`", "Ankner et al. 2023", "data/test_masking.py"),
    "whole words": ("`kind: mlm`, `whole_words: true`", "Cui et al. 2019", "data/test_masking.py"),
    "spans": ("`kind: mlm`, `span: 3.8`", "Joshi et al. 2019, 3.1", "data/test_masking.py"),
    "the next sentence": ("`kind: mlm`, `sentences: next`", "Devlin et al. 2018, 3.1", "data/test_sentences.py"),
    "the order of sentences": ("`kind: mlm`, `sentences: order`", "Lan et al. 2019, 3.1", "data/test_sentences.py"),
    "replaced tokens": ("`kind: rtd`", "Clark et al. 2020, 2; He et al. 2021, 3.2", "models/test_loom_rtd.py"),
    "the next token": ("`kind: causal`", "Radford et al. 2019", "data/test_packed_rows.py"),
    "span corruption": ("`kind: span-corruption`", "Raffel et al. 2019, 3.1.4", "data/test_paired_rows.py"),
    "translation": ("`kind: translation`", "Vaswani et al. 2017, 5.4 (smoothed labels)", "data/test_paired_rows.py"),
}
_LOSSES = {  # the loss that a batch of each is given to, and the task of the class that has it
    "the next sentence": ("pairs of sentences", "encoder", "sentence_pretraining"),
    "the order of sentences": ("pairs of sentences", "encoder", "sentence_pretraining"),
    "replaced tokens": ("replaced tokens", "encoder", "replaced_token_detection"),
    "the next token": ("next tokens", "decoder", "pretraining"),
    "span corruption": ("outputs", "seq2seq", "pretraining"),
    "translation": ("outputs, smoothed labels", "seq2seq", "pretraining"),
}
_MASKED = ("masked tokens", "encoder", "pretraining")


def loss_case(objective: str) -> str:
    """Which of `loss_cases.CASES` a batch of an objective is given to."""
    return _LOSSES.get(objective, _MASKED)[0]


def _objective_facts(name: str) -> dict[str, str]:
    keys, source, test = _BATCHES[name]
    _, kind, task = _LOSSES.get(name, _MASKED)
    facts = {"keys": keys, "follows": source, "batches": f"`{test}`", "homes": homes_of_task(kind, task)}
    return facts | {"class": f"`{class_name(kind, task)}`"}


def _objective_errors(name: str) -> tuple[float, ...]:
    return loss_cases.loss_errors(loss_case(name))


SECTIONS = [
    *(_switches(title, variants) for title, variants in GROUPS.items()),
    Section(
        "Mixers and backends",
        "What computes a mixer. The error is that of outputs in float64 over plain loops. What runs on a GPU alone is "
        "compared there (`bash scripts/gpu.sh`).",
        ("backend", "mixer", "follows", "devices", "without", "float64", "test"),
        ("float64",),
        list(CAPABILITIES),
        _backend_facts,
        _backend_error,
    ),
    Section(
        "Masks",
        "What a piece of text sees of its row, in float32, of an encoder and a decoder, with windows and without, on "
        "each backend of a CPU. Place: its logits in packed and padded rows beside those of the piece alone. "
        "Neighbour: the slope of its states over what stands behind it. Ways: one mask as bool, integers, floats, over "
        "pairs of positions and additive, and no mask for one of ones. `tests/models/test_loom_masks.py` allows 1e-5, "
        "0 and 1e-5.",
        ("scheme", "keys", "place", "neighbour", "ways"),
        ("place", "neighbour", "ways"),
        list(mask_cases.SCHEMES),
        _mask_facts,
        _mask_errors,
    ),
    Section(
        "Heads",
        "Logits and losses in float64 beside the formulas of `tests/models/head_cases.py`, over every family; of "
        "classifiers of rows for one label, several, and regression. `tests/models/test_loom_heads.py` allows 1e-12.",
        ("head", "class", "follows", "logits", "loss", "homes"),
        ("logits", "loss"),
        _HEAD_NAMES,
        _head_facts,
        _head_errors,
    ),
    Section(
        "Objectives",
        "The loss and the gradients of all parameters in float64 beside the formulas of `tests/models/loss_cases.py` "
        "on the slow reference; `tests/models/test_objective_losses.py` allows 1e-9. Batches are integers: they are "
        "exact, and the tests that say what must hold of them are named.",
        ("objective", "keys", "class", "follows", "batches", "loss", "gradients", "homes"),
        ("loss", "gradients"),
        list(_BATCHES),
        _objective_facts,
        _objective_errors,
    ),
]

INTRODUCTION = """# The family

Every variant of the one Transformer block, and how far a model of it lies from a second implementation
(`tests/models/reference.py`): plain loops over the definitions in the papers, in float64, which share no line with the
package. Each row of the first tables is a tiny model with every parameter drawn from a normal, over packed rows with
padding, on every attention backend of a CPU, as a change of BERT (encoder), GPT-2 (decoder) and the Transformer of 2017
(seq2seq). The figures are the largest difference over the largest value: of logits and of the gradients of all
parameters in float64, and of logits in float32. `tests/models/test_switches.py` allows 1e-9, 1e-9 and 1e-5, and tries
random combinations of switches too; angles, slopes and buckets are also those of transformers.

Homes are the stock architectures of transformers that hold these switches on at least one of the designs, found by
asking the conversion. Where none does, the keys in the way are named: such a model is refused, or with
`export: {to: code}` written with its modelling code.

Written by `python tests/models/family_page.py docs/family.md`
"""


def page() -> str:
    """The whole page, measured now."""
    versions = f"with torch {torch.__version__} and transformers {transformers.__version__}.\n"
    parts = [INTRODUCTION.rstrip("\n") + " " + versions]
    for section in SECTIONS:
        lines = [f"## {section.title}", *([section.text] if section.text else []), ""]
        lines += ["| " + " | ".join(section.columns) + " |", "|" + "---|" * len(section.columns)]
        for name in section.names:
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in section.row(name)) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts).replace("| nan |", "| on a GPU |")


@functools.cache
def read() -> dict[str, dict[str, dict[str, str]]]:
    """The cells of the page by section, first cell of the row, and column."""
    tables: dict[str, dict[str, dict[str, str]]] = {}
    title, columns = "", []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("## "):
            title, columns = line[3:], []
            tables[title] = {}
        elif line.startswith("| ") and not columns:
            columns = cells
        elif line.startswith("| "):
            tables[title][cells[0]] = dict(zip(columns, cells, strict=True))
    return tables


def written(title: str, name: str, column: str, *, rounding: float = 1e-14) -> float:
    """The error that a test may find where the page has this figure: other processors round in another way."""
    return max(10 * float(read()[title][name][column]), rounding)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tests/models/family_page.py docs/family.md")
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
