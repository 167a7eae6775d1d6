"""The verb `report`: one page about one run or several, for looking at and passing on.

What lives here: gathering what a run left behind, as far as it is there: curves, skips, starts, samples, data,
tokenizer, attention, configuration. What must not: how the page looks (`pretrain.pages.report`), or a change of a run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from pretrain import __version__
from pretrain.attention import attention_of
from pretrain.config import RunConfig, config_from_dict
from pretrain.config_text import parse_yaml
from pretrain.config_types import redacted
from pretrain.data.shards import VALIDATION, ShardFacts, TokenStore
from pretrain.data_report import report_data
from pretrain.evaluation.loading import LoadedModel, load_model
from pretrain.files import MANIFEST, ArtifactError, make_directories, read_manifest, replace_file
from pretrain.pages.attention import Stack
from pretrain.pages.curves import Mark, RunCurves, scripts
from pretrain.pages.report import RunPage, report_page, spread
from pretrain.reporting.places import Place, model_directory, names_of, places_of, read_json
from pretrain.reporting.words import changes, events, facts, kind_of, notes, remarks, skip_words
from pretrain.training.history import Curves, Scores, read_lines, read_metrics
from pretrain.training.records import newest_state

MOST_POINTS = 1000
"""Of a curve; a longer run is shown in spans."""

_MOST_MARKS = 400  # of a kind, on a chart
_MOST_DATA_TOKENS = 400_000_000  # whose statistics are counted for the page: some seconds
_MOST_WEIGHT_BYTES = 3_000_000_000  # of a model that is loaded for its attention unasked
_MOST_ATTENTION_TOKENS = 32
_SENTENCES = 2
_LEAST_TOKENS, _MOST_DOCUMENTS = 8, 1000  # of a document whose beginning is shown; looked at for one

Found = TypeVar("Found")


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    texts: Sequence[str] = (),
    attention: bool = True,
    console: Console | None = None,
) -> Path:
    """Write a self-contained HTML page about runs, finished or not; return its path.

    Args:
        runs: run directories (OUT/NAME) of pretrainings and fine-tunings, or their `train` directories.
        out: the file.
        texts: sentences whose attention is shown; default: of validation text and samples.
        attention: whether the models are loaded for attention maps at all.
        console: where progress is shown.

    Raises:
        ArtifactError: when a directory is no run.
        ValueError: when plotly is not installed, or no run is given.
    """
    if not runs:
        raise ValueError("give one or more run directories")
    carried = scripts()
    places = [place for run in runs for place in places_of(Path(run))]
    pages = []
    for place, name in zip(places, names_of(places), strict=True):
        if console is not None:
            console.print(f"reading {place.root}", markup=False, highlight=False)
        pages.append(_run_page(place, name, texts, attention))
    made = f"made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by pretrain {__version__}"
    path = Path(out)
    make_directories(path.parent)
    replace_file(path, report_page(pages, carried, made).encode("utf-8", errors="replace"))
    return path


def _run_page(place: Place, name: str, texts: Sequence[str], attention: bool) -> RunPage:
    left_out: dict[str, str] = {}

    def tried(section: str, make: Callable[[], Found], otherwise: Found) -> Found:
        """A section that fails is left out, with the reason in its place."""
        try:
            return make()
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            left_out[section] = f"left out: {redacted(' '.join(str(error).split()))[:500]}"
            return otherwise

    nothing: dict[str, Any] = {}
    raw = tried("configuration", lambda: _raw_config(place), nothing)
    found, scores = read_metrics(place.train / "metrics.jsonl", most=MOST_POINTS)
    skips = read_lines(place.train / "skipped.jsonl")
    starts = read_lines(place.train / "starts.jsonl")
    state = newest_state(place.train) or {}
    samples = _samples(place)
    for section, reason in _absent(found, scores, samples).items():
        left_out.setdefault(section, reason)
    sentences = [*texts] or _sentences(samples)
    shown: list[tuple[str, Sequence[Stack]]] = []
    if attention:
        shown = tried("attention", lambda: _attention(place, raw, sentences, asked=bool(texts)), [])
    else:
        left_out["attention"] = "not asked for"
    return RunPage(
        name=name,
        directory=str(place.root),
        facts=tried("result", lambda: facts(place, found, scores, state, skips, starts), {}),
        notes=notes(found),
        remarks=remarks(found),
        curves=tried("curves", lambda: _curves(name, found, scores, skips, starts, state), RunCurves(name)),
        events=tried("events", lambda: events(skips, starts, state, found), []),
        samples=samples,
        data=tried("data", lambda: _data(place, raw), None),
        tokenizer=tried("tokenizer", lambda: _tokenizer(place), {}),
        attention=shown,
        config=_flat(raw),
        left_out=left_out,
    )


def _absent(found: Curves, scores: Scores, samples: Sequence[Any]) -> dict[str, str]:
    absent = {}
    if not found.lines:
        absent["curves"] = "nothing was logged yet"
    if not scores:
        absent["evaluations"] = "none was made"
    if not samples:
        absent["samples"] = "none were kept: evaluate.samples names the prompts"
    return absent


# --- numbers --------------------------------------------------------------------------------------------------------


def _curves(
    name: str,
    found: Curves,
    scores: Scores,
    skips: Sequence[Mapping[str, Any]],
    starts: Sequence[Mapping[str, Any]],
    state: Mapping[str, Any],
) -> RunCurves:
    marks = [Mark(kind_of(skip), skip["step"], f"step {skip['step']:,}: {skip_words(skip)}") for skip in skips]
    known = {mark.step for mark in marks}
    marks += [
        Mark("not finite", step, f"step {step:,}: the loss is not finite")
        for step in found.not_finite
        if step not in known
    ]
    marks += [Mark("changed", step, words) for step, _, words in changes(state)]
    kept: list[Mark] = []
    for kind in dict.fromkeys(mark.kind for mark in marks):
        of_kind = [mark for mark in marks if mark.kind == kind]
        kept += [of_kind[place] for place in spread(len(of_kind), _MOST_MARKS)]
    curves = {
        key: [curve.mean] if curve.low is None or curve.high is None else [curve.mean, curve.low, curve.high]
        for key, curve in found.curves.items()
    }
    return RunCurves(name, found.along, curves, scores, kept, [start["step"] for start in starts[1:]][-_MOST_MARKS:])


# --- the other sections ---------------------------------------------------------------------------------------------


def _samples(place: Place) -> list[dict[str, Any]]:
    samples = []
    for line in read_lines(place.train / "samples.jsonl"):
        if not (isinstance(line.get("prompt"), str) and isinstance(line.get("text"), str)):
            continue
        try:
            gaps = [[(str(word), float(chance)) for word, chance in gap] for gap in line.pop("candidates", ())]
        except (TypeError, ValueError):
            gaps = []
        samples.append({**line, "candidates": gaps})
    return samples


def _raw_config(place: Place) -> dict[str, Any]:
    for path in (place.train / "config.yaml", place.root / "config.yaml"):
        if path.is_file():
            raw = parse_yaml(path.read_text(encoding="utf-8"), str(path))
            if isinstance(raw, dict):
                return raw
    raise ArtifactError("config.yaml is missing")


def _run_config(place: Place, raw: Mapping[str, Any]) -> RunConfig:
    """The configuration of a pretraining, with the place where the run lies now."""
    config = config_from_dict(dict(raw), str(place.train / "config.yaml"))
    root = place.root if place.root.name else place.root.absolute()
    return config.model_copy(update={"out": str(root.parent), "name": root.name})


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys and their values as text; passwords in URLs are left out, whoever wrote the file."""
    if isinstance(value, Mapping) and value:
        flat: dict[str, str] = {}
        for key, inner in value.items():
            flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        return flat
    if not prefix:
        return {}
    return {prefix: redacted(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))}


def _data(place: Place, raw: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    if not (place.root / "data").is_dir():
        raise ArtifactError("there is no directory `data` in the run")
    manifest = read_manifest(place.root / "data", "data")
    tokens = sum(int(split["tokens"]) for split in manifest.facts["splits"].values())
    if tokens > _MOST_DATA_TOKENS:
        raise ArtifactError(
            f"{tokens:,} tokens take long to count; `pretrain data {place.train / 'config.yaml'} --html PAGE` makes "
            "a page of its own about them"
        )
    return manifest.digest, report_data(_run_config(place, raw))


def _tokenizer(place: Place) -> dict[str, str]:
    directory = place.root / "tokenizer"
    if not directory.is_dir():
        raise ArtifactError("there is no directory `tokenizer` in the run")
    if not (directory / MANIFEST).is_file():
        raise ArtifactError("it was taken over from the model; nothing was measured of it")
    manifest = read_manifest(directory, "tokenizer")
    measured = read_json(directory / "report.json")
    taken = manifest.config.get("from")
    figures = {
        "algorithm": str(measured.get("algorithm") or manifest.config.get("algorithm") or NOT_SAID),
        "ids": f"{int(manifest.facts['vocab_size']):,}",
    }
    if taken:
        figures = {"from": redacted(str(taken)), "ids": figures["ids"]}
    if learnt := manifest.facts.get("learnt"):
        figures["learnt"] = f"{int(learnt):,}"
    corpus = manifest.facts.get("corpus") or {}
    if corpus:
        figures["learnt from"] = f"{corpus.get('sample_bytes', 0):,} of {corpus.get('bytes', 0):,} bytes"
    total = measured.get("total") or manifest.facts.get("total") or {}
    for key, name, form in _TOKENIZER_RATES:
        if key in total:
            figures[name] = f"{float(total[key]):{form}}"
    return figures


NOT_SAID = "not said"
_TOKENIZER_RATES = (
    ("bytes_per_token", "bytes a token", ".3f"),
    ("fertility", "tokens a word", ".3f"),
    ("unknown_rate", "unknown tokens", ".3%"),
    ("exact_share", "lines that come back exactly", ".2%"),
)


def _sentences(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of the last samples, where there are any: what is to be filled in, or what was read and what was written."""
    last = max((sample["step"] for sample in samples), default=0)
    return [
        sample["prompt"] if sample.get("candidates") else f"{sample['prompt']}{sample['text']}"
        for sample in samples
        if sample["step"] == last
    ]


def _attention(
    place: Place, raw: Mapping[str, Any], sentences: Sequence[str], *, asked: bool
) -> list[tuple[str, Sequence[Stack]]]:
    directory = model_directory(place)
    if directory is None:
        raise ArtifactError("no model is saved here yet")
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    if size > _MOST_WEIGHT_BYTES and not asked:
        raise ArtifactError(f"a model of {size / 1e9:.1f} GB is loaded only when --text asks for it")
    model = load_model(directory, device="cpu")
    made: list[tuple[str, Sequence[Stack]]] = []
    if not asked:
        read = _validation_text(place, model)
        sentences = [*read[: _SENTENCES - min(1, len(sentences))], *sentences][:_SENTENCES]
    for text in sentences:
        short = text if asked else _shortened(model, text)
        if short.strip():
            made.append((short, attention_of(model, short)))
    if not made:
        raise ArtifactError("there is no sentence to show; give one with --text")
    return made


def _shortened(model: LoadedModel, text: str) -> str:
    """The beginning of a text, as many tokens as a map can show."""
    encoded = model.tokenizer(text, add_special_tokens=False, verbose=False)
    ids = encoded["input_ids"][:_MOST_ATTENTION_TOKENS]
    return str(model.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _validation_text(place: Place, model: LoadedModel) -> list[str]:
    """The beginnings of some documents of the validation set; none where there is no such set."""
    if not (place.root / "data").is_dir():
        return []
    manifest = read_manifest(place.root / "data", "data")
    split = next((name for name in manifest.facts["splits"] if name.startswith(VALIDATION)), None)
    if split is None:
        return []
    facts = [ShardFacts(**shard) for shard in manifest.facts["splits"][split]["shards"]]
    store = TokenStore(place.root / "data", facts, int(manifest.facts["tokenizer"]["vocab_size"]))
    tokens, ends = store.shard(0)
    texts: list[str] = []
    for start, end in pairwise([0, *ends[:_MOST_DOCUMENTS].tolist()]):
        if end - start >= _LEAST_TOKENS and len(texts) < _SENTENCES:
            ids = tokens[start : min(end, start + _MOST_ATTENTION_TOKENS)].tolist()
            texts.append(str(model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)))
    return texts
