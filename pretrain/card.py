"""The verb `card`: the README.md of a model, made from the artifacts of the run that made it.

What lives here: which sections a card has, and writing it with what lies beside it. What must not: what a section says
(`pretrain.cards`), or a number that no artifact holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain.cards import of_run, of_tuning, sections
from pretrain.cards.curve import FILE as CURVE
from pretrain.cards.curve import draw_curve
from pretrain.cards.facts import Facts, gather
from pretrain.cards.loading import PLACE
from pretrain.cards.metadata import evaluation_files, is_ours, metadata
from pretrain.cards.scores import read_scores
from pretrain.cards.tuned import read_tuning, refuse_another_model
from pretrain.cards.words import cell
from pretrain.files import (
    MANIFEST,
    ArtifactError,
    make_directories,
    manifest_bytes,
    read_manifest,
    sha256_file,
    update_file,
)

CARD = "README.md"
_RESULTS = ".eval_results"


def write_card(
    directory: Path,
    run: Path | None = None,
    *,
    checkpoint: Path | None = None,
    result: Mapping[str, Any] | None = None,
    repository: str | None = None,
    license: str | None = None,
    languages: Sequence[str] = (),
    scores: Sequence[Path] = (),
    watts: float | None = None,
    overhead: float | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the card of a model directory, the picture of its training, and files of scores on the Hub's benchmarks.

    Args:
        directory: a Hugging Face model directory; the files are written into it.
        run: the directory of the pretraining or fine-tuning that it comes from; None: the card says what the model's
            directory alone tells.
        checkpoint: the checkpoint of the run that it is; None: the end of the run.
        result: what `result.json` of a fine-tuning will hold, when that is not written yet.
        repository: its name on the Hub, by which the card's lines load it.
        license: of the model, in place of the run's `export.license`.
        languages: of its text, in place of the run's `export.language`.
        scores: JSON files of `pretrain evaluate` or lm-eval, whose numbers are shown too.
        watts: power of a process's device, for the estimate of energy.
        overhead: power usage effectiveness of the building, for that estimate.
        overwrite: whether a card that is there may be replaced.

    Returns:
        The card.

    Raises:
        ArtifactError: when there is no model, no run, a card already, or the model is not the run's.
    """
    path = directory / CARD
    if path.exists() and not overwrite:
        raise ArtifactError(f"`{path}` is there already; --overwrite makes it anew, and what was written is lost")
    tuning = None if run is None else read_tuning(run, result)
    if run is not None and tuning is None:
        _refuse_another(directory, run, checkpoint)
    elif run is not None and tuning is not None and result is None:
        refuse_another_model(directory, run, tuning)
    facts = gather(
        directory,
        run,
        checkpoint=checkpoint,
        tuning=tuning,
        repository=repository,
        license=license,
        languages=languages,
        scores=[score for file in scores for score in read_scores(file)],
        watts=watts,
        overhead=overhead,
    )
    picture = None
    if facts.run is not None:
        picture = draw_curve(facts.run.curves, facts.run.evaluations, f"{facts.title}: loss")
    if picture is not None:
        update_file(directory / CURVE, picture.encode())
    results = evaluation_files(facts)
    for name, text in results.items():
        make_directories(directory / _RESULTS)
        update_file(directory / _RESULTS / name, text.encode())
    update_file(path, card_text(facts, CURVE if picture is not None else None).encode())
    written = [CARD, *(f"{_RESULTS}/{name}" for name in results), *([CURVE] if picture is not None else [])]
    _renew_manifest(directory, written, _remove_old(directory, written))
    return path


def card_text(facts: Facts, curve: str | None = None) -> str:
    """The whole card; `curve` names the picture beside it. Sections that have nothing to say are left out."""
    parts = _of_tuning(facts) if facts.tuning is not None else _of_run(facts, curve)
    body = [f"# {cell(facts.title)}", sections.summary(facts)]
    body += [f"## {title}\n\n{text}" for title, text in parts.items() if text]
    return f"---\n{metadata(facts)}\n---\n\n" + "\n\n".join(body) + "\n"


def _of_run(facts: Facts, curve: str | None) -> dict[str, str]:
    return {
        "Use": sections.use(facts),
        "Limits": sections.limits(facts),
        "Data": of_run.data(facts),
        "Tokenizer": sections.tokenizer(facts),
        "Architecture": sections.architecture(facts),
        "Recipe": of_run.recipe(facts),
        "Training": of_run.training(facts, curve),
        "Scores": of_run.scores(facts),
        "Versions": of_run.versions(facts),
        "Citation": sections.citation(facts),
    }


def _of_tuning(facts: Facts) -> dict[str, str]:
    return {
        "Use": of_tuning.use(facts),
        "Limits": of_tuning.limits(facts),
        "Task": of_tuning.task(facts),
        "Data": of_tuning.data(facts),
        "Tokenizer": sections.tokenizer(facts),
        "Architecture": sections.architecture(facts),
        "Recipe": of_tuning.recipe(facts),
        "Scores": of_tuning.scores(facts),
        "Versions": of_tuning.versions(facts),
        "Citation": sections.citation(facts),
    }


def readdressed(card: str, repository: str) -> str:
    """A card whose lines load the model from a repository; a card without such lines comes back as it is."""
    return re.sub(rf'(?m)^{PLACE}".*"$', lambda _: PLACE + json.dumps(repository), card)


def _refuse_another(directory: Path, run: Path, checkpoint: Path | None) -> None:
    """Refuse an export that says it was made from another checkpoint than the one to be told of."""
    if not (directory / MANIFEST).is_file():
        return
    try:
        made_from = read_manifest(directory, "export").inputs.get("checkpoint")
    except ArtifactError:  # of something else than an export, which says nothing of its checkpoint
        return
    known = {
        path.parent: read_manifest(path.parent, "checkpoint").digest
        for path in ([checkpoint / MANIFEST] if checkpoint is not None else run.glob(f"train/checkpoints/*/{MANIFEST}"))
    }
    if made_from is not None and known and made_from not in known.values():
        raise ArtifactError(
            f"`{directory}` was not exported from `{checkpoint or run}`: its manifest names another checkpoint; give "
            "the run that it comes from, or export it again"
        )


def _remove_old(directory: Path, written: Collection[str]) -> list[str]:
    """Remove the picture and the scores of an earlier card; files of results that others have made stay."""
    folder = directory / _RESULTS
    ours = [path for path in folder.glob("*.yaml") if path.is_file() and is_ours(path)]
    names = [CURVE, *(f"{_RESULTS}/{path.name}" for path in ours)]
    old = [name for name in names if name not in written and (directory / name).is_file()]
    for name in old:
        (directory / name).unlink()
    if old and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    return old


def _renew_manifest(directory: Path, written: Iterable[str], removed: Collection[str]) -> None:
    """Bring what was written and removed here up to date in the manifest of an export.

    The other files' stay: a file that somebody has put beside the model, or altered, is none of the export's.
    """
    if not (directory / MANIFEST).is_file():
        return
    try:
        made = read_manifest(directory, "export")
    except ArtifactError:
        return
    kept = {name: digest for name, digest in made.files.items() if name not in removed}
    files = kept | {name: sha256_file(directory / name) for name in written}
    update_file(directory / MANIFEST, manifest_bytes(replace(made, files=dict(sorted(files.items())))))
