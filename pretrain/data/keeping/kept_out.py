"""What was kept out of the data, step by step: counts for the manifest, and samples to look at.

What lives here: counting, adding up, wording. What must not: why a document is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

SAMPLES = 20
"""This many removed documents of each step are kept to look at."""
SAMPLE_CHARACTERS = 500

Counted = dict[str, Any]


class Tally:
    """Documents and UTF-8 bytes that came to each step, by source, and why some went no further."""

    def __init__(self, steps: Sequence[str]) -> None:
        self.steps: dict[str, Counted] = {step: {"sources": {}, "reasons": {}} for step in steps}
        self.samples: dict[str, list[dict[str, Any]]] = {step: [] for step in steps}

    def keep(self, step: str, source: str, size: int, *, documents: int = 1) -> None:
        """Count documents that go on."""
        count = self._of(step, source)
        count["kept_documents"] += documents
        count["kept_bytes"] += size

    def remove(self, step: str, source: str, size: int, reason: str, *, documents: int = 1) -> None:
        """Count documents that do not."""
        for count in (self._of(step, source), self._because(step, reason)):
            count["documents"] += documents
            count["bytes"] += size

    def show(self, step: str, reason: str, sample: dict[str, Any]) -> None:
        """Keep a removed document to look at, unless there are enough."""
        if len(self.samples[step]) < SAMPLES:
            self.samples[step].append({"step": step, "reason": reason, **sample})

    def _of(self, step: str, source: str) -> Counted:
        nothing = {"documents": 0, "bytes": 0, "kept_documents": 0, "kept_bytes": 0}
        counts: Counted = self.steps[step]["sources"].setdefault(source, nothing)
        return counts

    def _because(self, step: str, reason: str) -> Counted:
        counts: Counted = self.steps[step]["reasons"].setdefault(reason, {"documents": 0, "bytes": 0})
        return counts

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"steps": self.steps, "samples": self.samples}

    def add(self, other: dict[str, Any]) -> None:
        """Add what `to_json` gave; its samples come after those that are here."""
        for step, counted in other["steps"].items():
            for kind in ("sources", "reasons"):
                for name, counts in counted[kind].items():
                    total = self.steps[step][kind].setdefault(name, dict.fromkeys(counts, 0))
                    for key, value in counts.items():
                        total[key] += value
            self.samples[step].extend(other["samples"][step][: SAMPLES - len(self.samples[step])])

    def facts(self) -> list[Counted]:
        """For the manifest: {step, documents, bytes (left out), kept_documents, kept_bytes, reasons, sources} each."""
        return [
            {
                "step": step,
                **{
                    key: sum(source[key] for source in counted["sources"].values())
                    for key in ("documents", "bytes", "kept_documents", "kept_bytes")
                },
                **counted,
            }
            for step, counted in self.steps.items()
        ]


def sample_of(where: str, text: str, **more: str) -> dict[str, Any]:
    """What a person is shown of a removed document: `file:position` and the text's start."""
    return {"where": where, **more, "text": text[:SAMPLE_CHARACTERS]}


def describe(counted: Counted) -> str:
    """One line on a step, given its entry in the manifest's facts."""
    documents, size = counted["documents"], counted["bytes"]
    came, came_bytes = documents + counted["kept_documents"], size + counted["kept_bytes"]
    if not documents:
        return f"{counted['step']}: left out none of {came:,} documents"
    reason, most = max(counted["reasons"].items(), key=lambda item: item[1]["documents"])
    return (
        f"{counted['step']}: left out {documents:,} of {came:,} documents ({documents / came:.1%}), "
        f"{size:,} of {came_bytes:,} bytes; most often: {reason} ({most['documents']:,})"
    )


def most_removing(facts: Iterable[Counted]) -> Counted | None:
    """The step that left out most documents, or None when none left out any."""
    return max((step for step in facts if step["documents"]), key=lambda step: int(step["documents"]), default=None)
