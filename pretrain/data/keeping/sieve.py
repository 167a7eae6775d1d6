"""What goes through to the shards, document by document: filters first, then decontamination.

What lives here: the steps of a configuration as a part of the plan, and their order. What must not: how a filter or a
search for shared words works, or deduplication, which needs all documents first.

Decontamination comes before deduplication: of two near copies the clean one is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pretrain.config_data import DataConfig, FilterStep
from pretrain.data.keeping.decontamination import KnownRuns, evaluation_files
from pretrain.data.keeping.filters import Judge, check_filters, filter_labels
from pretrain.data.keeping.kept_out import Tally, sample_of
from pretrain.data.preparing.parts import Plan, is_training
from pretrain.data.preparing.splits import Split
from pretrain.data.reading.documents import input_digest
from pretrain.data.reading.lines import Document
from pretrain.data.reading.sources import Told

DECONTAMINATE, DEDUP = "decontaminate", "dedup"
"""Names of steps, as filters have theirs."""


def check_steps(data: DataConfig) -> None:
    """Refuse what cannot work before any text is read.

    Raises:
        ValueError: for a filter that is unknown, misused or lacks something; for evaluation files that are not there.
    """
    check_filters(data.filters)
    evaluation_files(data.decontamination)


def with_steps(plan: Plan, data: DataConfig, told: Told | None = None) -> Plan:
    """The plan with the steps that decide what is kept out; evaluation files are hashed."""
    decontamination, deduplication = data.decontamination, data.deduplication
    steps: dict[str, Any] = {}
    if data.filters:
        steps["filters"] = [step.model_dump(mode="json") for step in data.filters]
    if decontamination is not None:
        files = {file.name: input_digest(file, None, told) for file in evaluation_files(decontamination)}
        steps[DECONTAMINATE] = {"ngrams": decontamination.ngrams, "files": files}
    if deduplication is not None:
        steps[DEDUP] = deduplication.model_dump(mode="json")
    return replace(plan, steps=steps)


def inputs_of(plan: Plan) -> dict[str, str]:
    """A digest for each input: of the text, and of the evaluation files."""
    files = plan.steps.get(DECONTAMINATE, {"files": {}})["files"]
    return {**plan.inputs(), **{f"{DECONTAMINATE}: {name}": digest for name, digest in files.items()}}


def labels_of(plan: Plan) -> list[str]:
    """The names of the plan's steps, in the order in which documents meet them."""
    filters = filter_labels([FilterStep(**step) for step in plan.steps.get("filters", ())])
    return [*filters, *(name for name in (DECONTAMINATE, DEDUP) if name in plan.steps)]


def source_of(plan: Plan, file: int) -> str:
    """What a file's documents are counted under: the name of its source, or its line of the configuration."""
    return plan.files[file].source or plan.files[file].entry


class Sieve:
    """Takes the documents of a part and lets through what is kept, counting the rest."""

    def __init__(self, plan: Plan, split: str, known: KnownRuns | None, *, held_out_only: bool = False) -> None:
        """`split` is the part's; only training files are sieved. With `held_out_only` nothing else is let through."""
        filters = [FilterStep(**step) for step in plan.steps.get("filters", ())]
        self.tally = Tally([label for label in labels_of(plan) if label != DEDUP])
        self._plan, self._held_out_only = plan, held_out_only
        self._judge = Judge(filters) if filters and is_training(split) else None
        self._known = known if is_training(split) else None

    def sides(self, whole: Document, split_of: Split, file: int) -> Iterator[tuple[str, Document]]:
        """The document, or its pieces, each with the split it goes to."""
        source = source_of(self._plan, file)
        sides = list(split_of(whole))
        if self._held_out_only and all(is_training(split) for split, _ in sides):
            return
        if self._judge is not None:
            sides = self._judged(self._judge, whole, sides, split_of, source)
        for split, document in sides:
            if self._held_out_only and is_training(split):
                continue
            if self._known is None or not is_training(split) or self._is_clean(self._known, document, source):
                yield split, document

    def _judged(
        self, judge: Judge, whole: Document, sides: list[tuple[str, Document]], split_of: Split, source: str
    ) -> list[tuple[str, Document]]:
        where = f"{whole.file}:{whole.position}"
        text, passed, reason = judge.judge(whole.text, where)
        size = len(whole.text.encode())
        for label in passed:
            self.tally.keep(label, source, size)
        if text is None:
            label = judge.labels[len(passed)]
            self.tally.remove(label, source, size, reason)
            self.tally.show(label, reason, sample_of(where, whole.text))
            return []
        if text == whole.text:
            return sides
        kept = replace(whole, text=text)
        return [(sides[0][0], kept)] if len(sides) == 1 else list(split_of(kept))

    def _is_clean(self, known: KnownRuns, document: Document, source: str) -> bool:
        size = len(document.text.encode())
        found = known.find(document.text)
        if found is None:
            self.tally.keep(DECONTAMINATE, source, size)
            return True
        reason = f"shares words with {found[0]}"
        sample = sample_of(f"{document.file}:{document.position}", document.text, repeats=found[1])
        self.tally.remove(DECONTAMINATE, source, size, reason)
        self.tally.show(DECONTAMINATE, reason, sample)
        return False
