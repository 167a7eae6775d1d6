"""The YAML at the head of a card, and the files of evaluation results beside it, as the Hub reads them.

What lives here: which key says what. What must not: prose.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]

from pretrain.cards.facts import Facts
from pretrain.cards.loading import PIPELINES, auto_class
from pretrain.cards.places import hub_name, is_hub_name
from pretrain.cards.scores import benchmark_entries, hub_metric, model_index

_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1
lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
lgpl-lr deepfloyd-if-license llama2 gemma unknown other
"""
LICENSES = frozenset(_LICENSES.split())
"""The Hub's identifiers of licences (hub-docs, repositories-licenses); another one goes by `other` and its name."""

OURS = "# Made by `pretrain card`, which removes it when the card no longer has these scores.\n"
"""The first line of our files of evaluation results."""

_METRICS = frozenset(
    {
        *("accuracy", "perplexity", "f1", "precision", "recall", "matthews_correlation", "bleu", "chrf", "rouge"),
        *("exact_match", "pearsonr", "spearmanr", "mse"),
    }
)


def metadata(facts: Facts) -> str:
    """The YAML between the lines of dashes."""
    license, named = facts.license, None
    if license is not None and license not in LICENSES:
        license, named = "other", license
    kind = facts.objective
    tags = ["pretrain", *([kind] if kind is not None and ":" not in kind else [])]
    if facts.model.needs_code:
        tags.append("custom_code")
    auto = auto_class(facts.model)
    tuning = facts.tuning
    if tuning is not None:
        tags += [tuning.kind, *(["lora"] if tuning.lora is not None else [])]
    base = _base(facts)
    card = ModelCardData(
        language=list(facts.languages) or None,
        license=license,
        license_name=named,
        library_name="sentence-transformers" if facts.model.sentences else "transformers",
        pipeline_tag=_pipeline_of(facts, auto),
        tags=tags,
        datasets=_datasets(facts) or None,
        base_model=base,
        base_model_relation="finetune" if tuning is not None and base is not None else None,
        metrics=sorted({hub_metric(score.metric) for score in facts.scores} & _METRICS) or None,
        model_name=facts.title,
        eval_results=model_index(facts.scores, facts.title) or None,
    )
    if not facts.scores:
        card.model_name = None
    text: str = card.to_yaml(line_break="\n")
    return text


def _pipeline_of(facts: Facts, auto: str) -> str | None:
    if facts.model.sentences:
        return "sentence-similarity"
    if facts.tuning is not None:  # a decoder writes: its pipeline is that of its class, whatever its task is called
        return PIPELINES[auto] if auto == "AutoModelForCausalLM" else facts.tuning.of_hub[0]
    return "translation" if facts.objective == "translation" else PIPELINES.get(auto)


def _datasets(facts: Facts) -> list[str]:
    """The Hub's datasets among the training text."""
    settings: Mapping[str, Any] = {} if facts.run is None else facts.run.made_from or facts.run.section("data")
    if facts.tuning is not None:
        parts = [facts.tuning.task.get(part) for part in ("train", "validation", "test")]
        settings = {"train": [file for part in parts if isinstance(part, list) for file in part]}
    files = [
        str(file)
        for entry in settings.get("train") or ()
        for file in ((entry.get("files") or ()) if isinstance(entry, Mapping) else (entry,))
    ]
    return list(dict.fromkeys(name for file in files if (name := hub_name(file)) is not None))


def _base(facts: Facts) -> str | None:
    """The Hub's name of the model that the run went on from; None for a directory."""
    if facts.tuning is not None:
        return facts.tuning.hub_base if facts.tuning.pretrained else None
    base = None if facts.run is None or facts.run.base_is_local else facts.run.section("model").get("from")
    return base if isinstance(base, str) and is_hub_name(base) else None


def evaluation_files(facts: Facts) -> dict[str, str]:
    """The files of `.eval_results`, by name."""
    entries = benchmark_entries(facts.scores)
    return {f"{name}.yaml": OURS + _plain_yaml(eval_result_entries_to_yaml(found)) for name, found in entries.items()}


def is_ours(path: Path) -> bool:
    """Whether a file of `.eval_results` was made here: others are of people, or of other programs."""
    with path.open("rb") as file:
        return file.read(len(OURS)) == OURS.encode()


def _plain_yaml(value: Any) -> str:
    """YAML as the Hub's client writes it: a date is quoted, so that it stays a text."""
    text: str = yaml_dump(value, sort_keys=False)
    return text
