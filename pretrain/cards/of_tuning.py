"""The sections of a card about a fine-tuning: what it is for, its rows, its recipe, the scores of its seeds.

What lives here: one function a section, as in `sections`, every number out of `result.json`. What must not: reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.cards.facts import Facts
from pretrain.cards.loading import lines_for
from pretrain.cards.of_run import linked, score_table
from pretrain.cards.tuned import TEST, VALIDATION, Tuning
from pretrain.cards.tuned_lines import adapter_lines, use_lines
from pretrain.cards.words import cell, code, counted, facts_table, number, table, told
from pretrain.score_names import score_name

DOES: Mapping[str, tuple[str, str]] = {
    "classification": ("a classifier", "labels texts"),
    "regression": ("a model", "gives a number for a text"),
    "token-classification": ("a classifier", "tags words"),
    "question-answering": ("a model", "marks answers in a text"),
    "multiple-choice": ("a model", "chooses between texts"),
    "text-to-text": ("a model", "writes a text for a text"),
    "instructions": ("a model", "answers in a conversation"),
    "embeddings": ("an encoder", "gives a vector for a text, near those of texts that belong with it"),
}
"""What a model of each kind of task is, and does."""
_COLUMNS = (
    *("text", "text_pair", "label", "tokens", "tags", "question", "choices", "source", "target"),
    *("messages", "prompt", "response", "anchor", "positive", "negative", "score"),
)
_SETTINGS = ("prefix", "separator", "multi_label", "threshold", "ignore_labels", "stride", "num_beams", "spans")
_BUDGETS = ("tokens", "steps", "epochs", "minutes", "hours")
_LABELLED = ("classification", "token-classification")
_WRITING = ("text-to-text", "instructions")
_MOST_LABELS = 200


def _tuning(facts: Facts) -> Tuning:
    assert facts.tuning is not None
    return facts.tuning


def summary(facts: Facts) -> str:
    """What it was made of, by what, and the score that counts."""
    tuning = _tuning(facts)
    whence = f"from {code(tuning.base)}"
    if not tuning.pretrained:
        whence = f"from random weights, in the shape of {code(tuning.base)}"
    languages = ", ".join(code(language) for language in facts.languages) or "not stated"
    said = [
        f"It was fine-tuned with `pretrain` {whence}, on {counted(tuning.result['rows']['train'], 'row')} "
        f"({tuning.of_hub[1].lower()}). {_which(tuning)}",
        f"Language of the text: {languages}. Licence of the model: "
        f"{code(facts.license) if facts.license else 'not stated; ask its makers before you use it'}.",
    ]
    return " ".join(said)


def _which(tuning: Tuning) -> str:
    count, best = len(tuning.seeds), tuning.result["best_seed"]
    metric = tuning.result.get("metric")
    by = f" by validation {code(metric)}" if metric else ""
    if count == 1:
        return f"It is the best checkpoint{by} of one seed ({best})."
    return f"It is the model of seed {best}, the best of {count} seeds{by}."


def use(facts: Facts) -> str:
    """The lines that load it and use it, and of adapters how they are put over their base."""
    tuning = _tuning(facts)
    lines = lines_for(facts.model, facts.place, use_lines(facts))
    where = "the name of its repository, or its directory"
    parts = [f"Needs {lines.needs} alone; `place` is {where}.\n\n```python\n{lines.code}\n```"]
    if tuning.lora is not None:
        base = "" if tuning.hub_base is not None else ", a directory of its makers: put yours in its place"
        parts.append(
            "These weights hold the adapters already. The adapters alone lie in the folder `adapter`, for PEFT over "
            f"{code(tuning.base)}{base}:\n\n```python\n{adapter_lines(facts)}\n```"
        )
    return "\n\n".join(parts)


def limits(facts: Facts) -> str:
    """What it cannot be expected to do, as far as its making tells."""
    tuning, task, found = _tuning(facts), _tuning(facts).task, list[str]()
    found.append(
        "It was trained for one task, on rows of one kind: on other texts it may well be wrong, and not say so."
    )
    languages = ", ".join(code(language) for language in facts.languages)
    of_text = f"its text is in {languages}" if languages else "the language of its text is not stated"
    found.append(f"Language: {of_text}; other languages cannot be expected to work.")
    found.append(f"Inputs: {number(task['max_length'])} tokens at most in training; longer ones were cut, or windowed.")
    if tuning.kind in _LABELLED and facts.model.config.get("id2label"):
        found.append(
            "It knows its labels alone, and gives one of them for any text."
            if not task.get("multi_label")
            else "It knows its labels alone."
        )
    if not tuning.own.get(TEST):
        found.append("It was not scored on test rows: its scores are of the rows that chose its checkpoint.")
    if len(tuning.seeds) == 1:
        found.append("One seed was trained: how far its scores would move with another one is not known.")
    if not tuning.pretrained:
        found.append("It began with random weights, so nothing that pretraining gives is in it.")
    if tuning.kind == "instructions":
        found.append(
            "It learnt from these conversations alone; nothing in its making taught it to be true or harmless."
        )
    elif tuning.kind in _WRITING:
        found.append("What it writes can be false, or not in its input.")
    found.append("What its base model and its rows hold, prejudice too, it can repeat.")
    return "\n".join(f"- {line}" for line in found)


def task(facts: Facts) -> str:
    """Kind, columns, labels."""
    tuning = _tuning(facts)
    settings = tuning.task
    columns = [
        f"{name.replace('_', ' ')} {_named(settings[name])}" for name in _COLUMNS if settings.get(name) is not None
    ]
    rows: dict[str, Any] = {
        "kind": code(tuning.kind),
        "columns": ", ".join(columns) or None,
        "tokens of an input, at most": number(settings["max_length"]),
        "tokens of an output, at most": number(settings["max_target_length"])
        if settings.get("max_target_length")
        else None,
    }
    rows |= {
        name.replace("_", " "): code(settings[name])
        for name in _SETTINGS
        if settings.get(name) not in (None, "", False, []) and (name != "threshold" or settings.get("multi_label"))
    }
    labels = facts.model.config.get("id2label")
    if tuning.kind in _LABELLED and isinstance(labels, Mapping):
        shown = ", ".join(code(label) for label in list(labels.values())[:_MOST_LABELS])
        more = "" if len(labels) <= _MOST_LABELS else f" and {len(labels) - _MOST_LABELS:,} more"
        rows["labels"] = f"{len(labels):,}: {shown}{more}"
    return facts_table(rows)


def _named(column: Any) -> str:
    return " + ".join(code(name) for name in column) if isinstance(column, list) else code(column)


def data(facts: Facts) -> str:
    """Where the rows come from, how many there are, their digest, and what is to be known of them."""
    tuning = _tuning(facts)
    result = tuning.result
    rows = [
        (part, _whence(tuning.task.get(part)), number(count))
        for part, count in result["rows"].items()
        if count or part != TEST
    ]
    parts = [table(("part", "files", "rows"), rows)]
    if result.get("rows_sha256"):
        parts.append(f"SHA-256 of all rows in order, train, validation and test: {code(result['rows_sha256'])}")
    if notes := result.get("notes"):
        parts.append("\n".join(f"- {cell(note)}" for note in notes))
    parts.append("Licences of the rows are not stated here: ask where they come from.")
    return "\n\n".join(parts)


def _whence(files: Any) -> str:
    if isinstance(files, Mapping):
        together = f"; rows with one {code(files['by'])} stay together" if files.get("by") is not None else ""
        return f"{float(files['fraction']):.4g} of the training rows, by a hash of each{together}"
    return ", ".join(linked(str(file)) for file in files or ())


def recipe(facts: Facts) -> str:
    """Weights, optimizer, schedule, epochs, batch, precision, seeds."""
    tuning = _tuning(facts)
    train: Mapping[str, Any] = tuning.settings.get("train") or {}
    budget = next((name for name in _BUDGETS if train.get(name) is not None), None)
    steps = [f"seed {seed['seed']}: step {seed['best']['step']:,} of {seed['best']['of']:,}" for seed in tuning.seeds]
    precision = tuning.result.get("precision") or train.get("precision")
    rows: dict[str, Any] = {
        "started from": code(tuning.base),
        "weights": "pretrained" if tuning.pretrained else "random: the shape alone was taken",
        "pooling": code(tuning.result["model"]["classifier_pooling"])
        if tuning.result["model"].get("classifier_pooling")
        else None,
        "trained": "every weight" if tuning.lora is None else "LoRA adapters, merged in: " + _keys(tuning.lora),
        "optimizer": told(tuning.settings.get("optimizer") or {}, "name"),
        "schedule": told(tuning.settings.get("schedule") or {}, "kind"),
        "budget": None if budget is None else f"{train[budget]:g} {budget}",
        "batch": counted(train["batch_size"], "row") if train.get("batch_size") else None,
        "gradients clipped at": number(train["max_grad_norm"]) if train.get("max_grad_norm") else None,
        "precision": cell(precision) if precision else None,
        "seeds": ", ".join(str(seed["seed"]) for seed in tuning.seeds),
        "best checkpoints": "; ".join(steps),
        "seconds of training": ", ".join(number(seed["seconds"]) for seed in tuning.seeds),
    }
    return facts_table(rows)


def _keys(section: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {cell(value)}" for key, value in section.items() if value is not None)


def scores(facts: Facts) -> str:
    """Of each score the median over the seeds, the lowest, the highest, and this model's own."""
    tuning = _tuning(facts)
    best = tuning.result["best_seed"]
    head = ("rows", "score", "median", "lowest", "highest", f"this model (seed {best})")
    rows = []
    for part in (TEST, VALIDATION):
        for metric, own in (tuning.own.get(part) or {}).items():
            spread = tuning.result["summary"][f"{part}/{metric}"]
            numbers = (number(spread[key]) for key in ("median", "min", "max"))
            name = "loss" if metric == "loss" else score_name(metric)  # of a regression it is not in nats
            rows.append((part, cell(name), *numbers, number(own)))
    seeds = f"Over {counted(len(tuning.seeds), 'seed')}; the last column is of the model that lies here."
    once = "The test rows were scored once a seed, by its best checkpoint. " if tuning.own.get(TEST) else ""
    parts = [seeds, table(head, rows), f"{once}Validation scores chose the checkpoints, so they flatter the model."]
    others = facts.scores[len(tuning.scores()) :]
    if others:
        parts.append(f"Measured apart from that:\n\n{score_table(others)}")
    return "\n\n".join(parts)


def versions(facts: Facts) -> str:
    """What it was made with, on which machine, and when."""
    result = _tuning(facts).result
    rows = {cell(name): cell(version) for name, version in (result.get("versions") or {}).items()}
    rows |= {"machine": cell(result["machine"])} if result.get("machine") else {}
    rows |= {"finished": f"{cell(result['finished'])} UTC"} if result.get("finished") else {}
    return facts_table(rows) if rows else ""
