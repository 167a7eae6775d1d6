"""The sections of a card about the run: its data, its recipe, what it took, its scores, its versions.

What lives here: one function a section, as in `sections`; each is empty where the run tells nothing. What must not:
reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pretrain.cards.cost import energy_of, epochs_of, flops_of, hardware_of
from pretrain.cards.facts import Facts, Run
from pretrain.cards.places import hub_name, public
from pretrain.cards.scores import Score
from pretrain.cards.words import cell, code, compact, counted, facts_table, number, scientific, table, told

EMBEDDED = {"python-stdlib": "PSF-2.0", "torch-headers": "BSD-3-Clause"}
"""Licences of the corpora that come with the machine, by what their packages say."""
_UNKNOWN = "unknown"
_MOST_FILES = 6
_DROPOUTS = (
    "hidden_dropout",
    "attention_dropout",
    "embedding_dropout",
    "resid_pdrop",
    "attn_pdrop",
    "embd_pdrop",
    "dropout_rate",
    "dropout",
    "mlp_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
)


# --- data -----------------------------------------------------------------------------------------------------------


def data(facts: Facts) -> str:
    """Where the text comes from, under which licences, how much of it, and what was kept out."""
    run = facts.run
    if run is None:
        return "Unknown: the directory does not say what it was trained on."
    settings = run.made_from or run.section("data")
    entries = list(settings.get("train") or ())
    parts = []
    if entries:
        head = ("source", "files", "licence", "weight", "epochs")
        parts.append(table(head, [_source(entry, run) for entry in entries]))
        if any(licence_of(entry) is None for entry in entries):
            parts.append("A licence that is unknown was not stated by who made this model: ask before you rely on it.")
    else:
        parts.append("The prepared shards do not say which text they hold.")
    if amounts := _amounts(run):
        parts.append(amounts)
    parts.append("**Kept out.** " + " ".join(_kept_out(settings, run)))
    return "\n\n".join(parts)


def licence_of(entry: Any) -> str | None:
    """Of a source: what its configuration says, or what is known of an embedded corpus; None when it is unknown."""
    if isinstance(entry, Mapping):
        given = entry.get("license")
        known = {EMBEDDED.get(str(file)) for file in entry.get("files") or ()}
        return str(given) if given else (known.pop() if len(known) == 1 else None)
    return EMBEDDED.get(str(entry))


def _source(entry: Any, run: Run) -> tuple[str, ...]:
    named = isinstance(entry, Mapping)
    files = [str(file) for file in entry.get("files") or ()] if named else [str(entry)]
    shown = ", ".join(linked(file) for file in files[:_MOST_FILES])
    if len(files) > _MOST_FILES:
        shown += f" and {len(files) - _MOST_FILES:,} more"
    name = str(entry.get("name")) if named else ""
    epochs = epochs_of(run)
    read = epochs.get(name, epochs.get(""))
    weight = _weight(name, entry if named else {}, run)
    licence = licence_of(entry)
    return (
        cell(name) if named else "",
        shown,
        cell(licence) if licence else _UNKNOWN,
        weight,
        _UNKNOWN if read is None else f"{read:.2f}",
    )


def linked(file: str) -> str:
    """A file, or a dataset of the Hub, as a stranger may read it."""
    dataset = hub_name(file)
    return f"[{cell(dataset)}](https://huggingface.co/datasets/{dataset})" if dataset else code(public(file))


def _weight(name: str, entry: Mapping[str, Any], run: Run) -> str:
    phases = run.section("data").get("phases") or ()
    if phases:
        return " → ".join(f"{(phase.get('weights') or {}).get(name, 0):g}" for phase in phases)
    return f"{entry['weight']:g}" if entry.get("weight") is not None else "by size"


def _amounts(run: Run) -> str:
    rows = []
    for split, counts in (run.data.get("splits") or {}).items():
        size = counts.get("bytes")
        rows.append(
            (
                cell(split),
                number(counts.get("documents", _UNKNOWN)),
                number(counts.get("tokens", _UNKNOWN)),
                number(size) if size else _UNKNOWN,
            )
        )
    return table(("split", "documents", "tokens", "bytes of text"), rows) if rows else ""


def _kept_out(settings: Mapping[str, Any], run: Run) -> Iterable[str]:
    """Sentences about bad lines, filters, deduplication, decontamination and what is held out."""
    bad = run.data.get("bad") or {}
    if "count" in bad:
        yield f"{counted(int(bad['count']), 'line or row', 'lines or rows')} could not be read."
    if run.data.get("empty"):
        yield f"{counted(int(run.data['empty']), 'document')} without text."
    for step in run.data.get("kept_out") or ():
        came = step["documents"] + step["kept_documents"]
        if came:
            share = f"{step['documents']:,} of {counted(came, 'document')} ({step['documents'] / came:.1%})"
            yield f"{cell(step['step'])}: {share}."
    if not settings.get("filters"):
        yield "No filters."
    if not settings.get("dedup"):
        yield "No deduplication."
    if not settings.get("decontaminate"):
        yield "No decontamination."
    held_out = settings.get("validation")
    if isinstance(held_out, Mapping) and held_out.get("fraction"):
        yield f"{held_out['fraction']:.2%} of the documents, by a hash of their text, were held out for validation."
    elif isinstance(held_out, Mapping) and held_out.get("tail"):
        yield f"The last {held_out['tail']:.2%} of each file were held out for validation."
    elif held_out:
        yield "Validation is on texts of its own."


# --- recipe ---------------------------------------------------------------------------------------------------------


def recipe(facts: Facts) -> str:
    """Objective, optimizer, schedule, batch, precision, engine, seeds."""
    run = facts.run
    if run is None:
        return ""
    train, length = run.section("train"), run.section("data").get("sequence_length")
    batch = train.get("batch_tokens")
    rows: dict[str, Any] = {
        "objective": told(run.section("objective"), "kind"),
        "started from": code(public(str(run.section("model")["from"])))
        if run.section("model").get("from")
        else "random weights",
        "optimizer": told(run.section("optimizer"), "name"),
        "schedule": told(run.section("schedule"), "kind"),
        "batch": f"{number(batch)} tokens" + (f", {batch // length:,} rows of {number(length)}" if length else "")
        if batch
        else None,
        "micro-batch": number(run.progress["micro_batch"]) if run.progress.get("micro_batch") else None,
        "gradients clipped at": number(train["max_grad_norm"]) if train.get("max_grad_norm") else None,
        "precision": _precision(run),
        "engine": cell(run.progress.get("split") or train.get("strategy") or _UNKNOWN),
        "seed": number(train["seed"]) if train.get("seed") is not None else None,
        "dropout": _dropout(facts),
    }
    changes = run.progress.get("changes") or ()
    changed = [
        f"- step {change['step']:,}: {code(change['key'])} from {code(change['before'])} to {code(change['after'])}"
        for change in changes
        if isinstance(change, Mapping) and {"step", "key", "before", "after"} <= set(change) and _is_plain(change)
    ]
    return facts_table(rows) + ("\n\nChanged on the way:\n\n" + "\n".join(changed) if changed else "")


def _is_plain(change: Mapping[str, Any]) -> bool:
    """Whether a change is of numbers: texts may name places."""
    return all(isinstance(change[side], int | float | None) for side in ("before", "after"))


def _precision(run: Run) -> str:
    arithmetic = run.progress.get("arithmetic")
    return cell(arithmetic or run.section("train").get("precision") or _UNKNOWN)


def _dropout(facts: Facts) -> str | None:
    found = {facts.model.config[name] for name in _DROPOUTS if isinstance(facts.model.config.get(name), int | float)}
    return " / ".join(f"{value:g}" for value in sorted(found)) or None


# --- what it took ---------------------------------------------------------------------------------------------------


def training(facts: Facts, curve: str | None = None) -> str:
    """Tokens, operations, hours, energy, and the picture of the loss (its file name)."""
    run = facts.run
    if run is None:
        return ""
    rows: dict[str, Any] = {}
    tokens, text = run.progress.get("tokens"), run.progress.get("text_tokens")
    rows["steps"] = number(run.progress["step"]) if run.progress.get("step") is not None else _UNKNOWN
    rows["tokens seen"] = _UNKNOWN if tokens is None else number(tokens)
    if tokens and text and text != tokens:
        rows["tokens seen"] += f" positions, {text / tokens:.1%} of them text"
    if epochs := epochs_of(run):
        rows["epochs"] = ", ".join(
            (f"{cell(name)} " if name else "") + f"{count:.2f}" for name, count in epochs.items()
        )
    flops, hardware = flops_of(facts), hardware_of(run)
    rows["operations"] = _UNKNOWN if flops is None else f"{scientific(flops.total)} FLOPs ({flops.how})"
    if hardware is None:
        rows["hardware"] = _UNKNOWN
    else:
        rows["hardware"] = f"{_processes(hardware.processes)} on {_machines(hardware.machines)}"
        rows["hours of training steps"] = f"{hardware.hours:.3g} process hours, without evaluations and saves"
        if flops is not None and hardware.hours:
            rows["rate"] = f"{compact(flops.total / hardware.hours / 3600.0)}FLOP/s a process"
        energy = energy_of(facts, hardware)
        rows["energy, an estimate"] = (
            _UNKNOWN if energy is None else f"{energy.kilowatt_hours:.2g} kWh: {energy.assumptions}"
        )
    if skipped := run.result.get("skipped") or (run.progress.get("guard") or {}).get("skipped"):
        rows["steps skipped"] = ", ".join(f"{cell(why)} {number(count)}" for why, count in skipped.items())
    picture = f"\n\n![Loss over tokens]({curve})" if curve else ""
    return facts_table(rows) + picture


def _processes(counts: Sequence[int]) -> str:
    return ", then ".join(counted(count, "process", "processes") for count in counts)


def _machines(machines: Sequence[str]) -> str:
    return ", then ".join(map(cell, machines)) or "a machine that was not recorded"


# --- scores ---------------------------------------------------------------------------------------------------------


def scores(facts: Facts) -> str:
    """A row for each number."""
    if not facts.scores:
        return "None were recorded."
    return score_table(facts.scores) + "\n\n" + _meaning(facts)


def score_table(scores: Sequence[Score]) -> str:
    """A table of scores, with those before the first step where some are known."""
    several = any(score.at_start is not None for score in scores)
    head = ("measured on", "metric", "value", *(("before step 1",) if several else ()), "how")
    return table(head, [_score(score, several) for score in scores])


def _score(score: Score, several: bool) -> tuple[str, ...]:
    value = number(score.value) + (f" ± {number(score.spread)}" if score.spread is not None else "")
    start = ("" if score.at_start is None else number(score.at_start),) if several else ()
    on = linked(f"hub:{score.dataset}") if score.dataset else cell(score.on)
    how = ", ".join(filter(None, (score.config and cell(score.config), score.split and cell(score.split), score.note)))
    return (f"{on} ({cell(score.on)})" if score.dataset else on, cell(score.label), value, *start, how)


def _meaning(facts: Facts) -> str:
    """What the numbers of validation sets can be compared with."""
    settings = {} if facts.run is None else facts.run.made_from or facts.run.section("data")
    lines = ["These are the makers' own numbers."]
    if isinstance(settings.get("validation"), Mapping):
        lines.append("Held-out documents come from the sources of the training text, so they flatter the model.")
    if any(score.metric in ("loss", "perplexity") for score in facts.scores):
        lines.append("Loss and perplexity depend on the tokenizer: compare them between models that share it.")
    return " ".join(lines)


def versions(facts: Facts) -> str:
    """What it was made with."""
    run = facts.run
    last: Mapping[str, Any] = run.starts[-1] if run is not None and run.starts else {}
    known = dict(last.get("versions") or {})
    if run is not None and run.code_version:
        known.setdefault("pretrain", run.code_version)
    written = facts.model.config.get("transformers_version")
    if written:
        known.setdefault("transformers", written)
    identity = None if run is None else run.progress.get("run_id")
    rows = {cell(name): cell(version) for name, version in known.items()}
    rows |= {"run": code(identity)} if identity else {}
    rows |= {"started last": cell(last["time"])} if last.get("time") else {}
    return facts_table(rows) if rows else ""
