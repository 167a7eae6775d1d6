"""The verb `tokenizer`: text, or an existing tokenizer, to a directory that `AutoTokenizer` loads.

What lives here: when the artifact is stale, the manifest. What must not: algorithms, or reading text.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from pretrain.config import LEARNING_KEYS, RunConfig, TokenizerConfig, difference
from pretrain.config_data import DocumentStart, ValidationSplit
from pretrain.config_objective import CORRUPTED_SPAN, MODEL_KINDS
from pretrain.config_types import redacted
from pretrain.data.noise import most_spans
from pretrain.data.preparing.shared import take_artifact
from pretrain.data.preparing.splits import Split
from pretrain.data.reading.documents import resolve_sources
from pretrain.data.reading.pairs import TextField
from pretrain.data.reading.remote import below, is_url
from pretrain.data.reading.sources import (
    SourceFile,
    digest_of_files,
    fetch_files,
    first_files,
    hash_files,
    state_of,
)
from pretrain.data.vocabulary import read_vocabulary, sentinel
from pretrain.files import (
    ArtifactError,
    commit_directory,
    owning_directory,
    read_manifest,
    remove_leftovers,
    sha256_file,
    sha256_json,
    verify_manifest,
    write_bytes,
    write_json,
    write_manifest,
)
from pretrain.tokenization import (
    TokenizerReport,
    bare_tokenizer,
    draw_sample,
    fit_tokenizer,
    measure_tokenizer,
    write_tokenizer,
)
from pretrain.tokenization.extend import EXTENDED, extend_tokenizer
from pretrain.tokenization.report import REPORT_BYTES
from pretrain.tokenizer_text import first_bytes, split_of_file, text_files, training_documents
from pretrain.trust import check_tokenizer

KIND = "tokenizer"
_CONFIG_FILE = "tokenizer_config.json"
_BORDERS = {  # what prepared rows put around text
    "encoder": ("cls_token", "sep_token"),
    "decoder": ("eos_token",),
    "seq2seq": ("eos_token", "pad_token"),
}
_SENTINELS = 100  # as many as T5's vocabulary has, at least


@owning_directory
def train_tokenizer(config: RunConfig, *, max_bytes: int | None = None, console: Console | None = None) -> Path:
    """Make `<out>/<name>/tokenizer`, or leave it when it is made and unchanged; return its path.

    With `tokenizer.from` an existing tokenizer is taken over as it is. A `model.from` without `tokenizer.from` takes
    the model's own.

    Args:
        config: the run configuration.
        max_bytes: for trials: read about the first `max_bytes` of the text and no more of it.
        console: where progress and the report are shown.

    Raises:
        ArtifactError: when one stands there that was made with another configuration.
        ValueError: when there is no text, the vocabulary is too small, or an existing tokenizer lacks what the
            objective needs.
    """
    console = console or Console(stderr=True)
    directory = config.directory / KIND
    if is_trained(config, max_bytes=max_bytes, console=console):
        return directory
    _refuse_other(config, directory, max_bytes)
    remove_leftovers(config.directory)
    tokenizer = _effective(config)
    if tokenizer.from_ is not None:
        with commit_directory(directory, replace=True) as temporary:
            take_tokenizer(tokenizer.from_, temporary, objective=config.objective.kind, kind=config.kind)
            if tokenizer.extend is not None:
                _extend(config, tokenizer, temporary, max_bytes, console)
            _manifest(config, temporary, None, max_bytes, console)
        return directory
    if tokenizer.algorithm == "ids":
        with commit_directory(directory, replace=True) as temporary:
            bare = bare_tokenizer(tokenizer, _architecture(config))
            write_tokenizer(temporary, bare, model_max_length=_max_length(config))
            _manifest(config, temporary, None, max_bytes, console)
        return directory
    files = text_files(config)
    fetch_files(files if max_bytes is None else first_files(files, max_bytes), console)
    with commit_directory(directory, replace=True) as temporary:
        report = make_tokenizer(
            tokenizer,
            files,
            temporary,
            architecture=_architecture(config),
            model_max_length=_max_length(config),
            document=config.data.document,
            text_field=config.data.text_field,
            split_of=lambda file: split_of_file(config, file, max_bytes),
            max_bytes=max_bytes,
            console=console,
        )
        _manifest(config, temporary, report, max_bytes, console)
        write_report(temporary, report)
    console.print(report.as_markdown(), highlight=False, markup=False, soft_wrap=True)
    return directory


def make_tokenizer(
    tokenizer: TokenizerConfig,
    files: Sequence[SourceFile],
    directory: Path,
    *,
    architecture: str,
    model_max_length: int,
    document: str | DocumentStart = "auto",
    text_field: TextField = "text",
    split_of: Callable[[SourceFile], Split | None] = lambda file: None,
    max_bytes: int | None = None,
    console: Console | None = None,
) -> TokenizerReport:
    """Read the files, train, write `tokenizer.json` and `tokenizer_config.json` into `directory`, measure.

    Args:
        split_of: gives a file's split into training and validation; None reads all of it.
        max_bytes: for trials: read about the first `max_bytes` of the text (`tokenizer.max_bytes` bounds the sample).

    Raises:
        ValueError: when there is no text, or the vocabulary is too small.
    """
    started = time.perf_counter()
    with _progress(console or Console(stderr=True)) as progress:
        documents = training_documents(files, document, text_field, split_of, max_bytes, progress)
        budget = tokenizer.max_bytes
        if tokenizer.algorithm == "bytes":  # nothing is learnt: some text, for the report
            budget, documents = REPORT_BYTES, first_bytes(documents, REPORT_BYTES)
        with draw_sample(documents, budget, tokenizer.seed, directory) as sample:
            task = progress.add_task(f"training {tokenizer.algorithm}", total=None)
            trained = fit_tokenizer(tokenizer, sample, architecture)
            write_tokenizer(directory, trained, model_max_length=model_max_length)
            progress.update(task, description="measuring")
            report = measure_tokenizer(tokenizer.algorithm, trained, sample)
    report.seconds = time.perf_counter() - started
    report.peak_rss_bytes = _peak_rss_bytes()
    return report


def write_report(directory: Path, report: TokenizerReport) -> None:
    """Write `report.json` and `report.md`; after the manifest, whose digest seconds and memory must not change."""
    write_json(directory / "report.json", report.as_dict())
    write_bytes(directory / "report.md", report.as_markdown().encode())


def take_tokenizer(source: str, directory: Path, *, objective: str, kind: str | None = None) -> None:
    """Write an existing tokenizer (a Hub name or a directory) into `directory`.

    Args:
        source: a Hub name or a directory.
        directory: where it is written.
        objective: `objective.kind` of the run; mlm needs a mask token.
        kind: encoder (each piece stands between CLS and SEP), decoder (EOS ends a document), seq2seq (EOS ends both
            sides, padding begins the output), or None where the model comes from elsewhere: then the objective tells,
            and for one of one's own any will do.

    Raises:
        ValueError: when it cannot be loaded, is not a fast one, or lacks a token that the run needs.
    """
    from transformers import AutoTokenizer

    remote = is_url(source)
    if remote:
        take_artifact(source, directory, KIND)
    try:
        check_tokenizer(directory if remote else source)
        tokenizer = AutoTokenizer.from_pretrained(directory if remote else source, trust_remote_code=False)
    except ArtifactError as error:
        raise ValueError(f"tokenizer.from: {error}") from error
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizer.from: `{redacted(source)}` cannot be loaded as a tokenizer: {error}") from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer.from: `{redacted(source)}` has no tokenizer.json; convert it to a fast tokenizer first"
        )
    kind = kind or MODEL_KINDS.get(objective)
    borders = [roles for name, roles in _BORDERS.items() if kind in (name, None)]
    missing: list[str] = []
    if objective in ("mlm", "rtd") and tokenizer.mask_token is None:
        missing.append(f"no mask_token, which objective.kind: {objective} needs")
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if objective == "span-corruption" and sentinel(0) not in special:
        missing.append(f"no sentinels ({sentinel(0)}, {sentinel(1)}, ...), which objective.kind: span-corruption needs")
    if not any(all(getattr(tokenizer, role) is not None for role in roles) for roles in borders):
        wanted = " or ".join(" and ".join(roles) for roles in borders)
        missing.append(f"no {wanted}, which {'an ' + kind if kind == 'encoder' else 'a ' + (kind or 'model')} needs")
    if missing:
        raise ValueError(
            f"tokenizer.from: `{redacted(source)}` has {', and '.join(missing)}; "
            "add it with tokenizer.add_special_tokens and save_pretrained, and name that directory"
        )
    if not remote and _is_ours(source):  # byte for byte, so that shards which were made with it fit
        take_artifact(source, directory, KIND)
    elif not remote:
        _save(tokenizer, directory)


def _extend(
    config: RunConfig, wanted: TokenizerConfig, directory: Path, max_bytes: int | None, console: Console
) -> None:
    """Teach the tokenizer in `directory` more pieces from the training text; `EXTENDED` says what they are made of."""
    assert wanted.extend is not None
    files = text_files(config)
    fetch_files(files if max_bytes is None else first_files(files, max_bytes), console)
    with _progress(console) as progress:
        documents = training_documents(
            files,
            config.data.document,
            config.data.text_field,
            lambda file: split_of_file(config, file, max_bytes),
            max_bytes,
            progress,
        )
        with draw_sample(documents, wanted.max_bytes, wanted.seed, directory) as sample:
            old = Tokenizer.from_file(str(directory / "tokenizer.json"))
            texts = (piece.text for piece in sample)
            extension = extend_tokenizer(old, texts, wanted.extend, wanted.min_frequency)
    write_bytes(directory / "tokenizer.json", extension.tokenizer.to_str(pretty=True).encode())
    write_json(directory / EXTENDED, {str(new): parts for new, parts in extension.made_of.items()})
    learnt = len(extension.made_of)
    fewer = f" (of {wanted.extend:,}: no more pairs stand {wanted.min_frequency} times)"
    said = f"the tokenizer learnt {learnt:,} pieces of the new text{fewer if learnt < wanted.extend else ''}"
    console.print(said, highlight=False)


def _save(tokenizer: Any, directory: Path) -> None:
    """Write a loaded tokenizer so that transformers 4.57 and 5 read it, flushed to the disk."""
    tokenizer.save_pretrained(directory)
    written = json.loads((directory / _CONFIG_FILE).read_text(encoding="utf-8"))
    if written.get("tokenizer_class") == "TokenizersBackend":  # a name that transformers 4.57 does not know
        written["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("is_local", "local_files_only", "auto_map"):  # where it was loaded from, and code that does not come
        written.pop(key, None)
    for path in sorted(directory.iterdir()):  # written once more, flushed to the disk
        if path.name == _CONFIG_FILE:
            write_json(path, written)
        else:
            write_bytes(path, path.read_bytes())


def _is_ours(source: str) -> bool:
    """Whether it is a tokenizer that a run made."""
    try:
        read_manifest(Path(source), KIND)
    except ArtifactError:
        return False
    return True


# --- stale or not ---------------------------------------------------------------------------------------------------


def is_trained(config: RunConfig, *, max_bytes: int | None = None, console: Console | None = None) -> bool:
    """Whether the tokenizer is there, whole, and made with this configuration from the text that is there now."""
    directory = config.directory / KIND
    try:
        manifest = read_manifest(directory, KIND)
        verify_manifest(directory, manifest)
    except ArtifactError:
        return False
    if manifest.config != _deciding(config, max_bytes):
        return False
    state = _sources_state(config)
    # Hashing all text takes a while: it is spared when names, sizes and times are as they were.
    return manifest.facts.get("sources_state") == state or manifest.inputs == _inputs(config, max_bytes, console)


def _refuse_other(config: RunConfig, directory: Path, max_bytes: int | None) -> None:
    if not directory.exists():
        return
    try:
        made_with = read_manifest(directory, KIND).config
    except ArtifactError as error:
        raise ArtifactError(f"{error}; remove `{directory}`, or choose another name") from error
    if changed := difference(made_with, _deciding(config, max_bytes)):
        details = "; ".join(f"{key}: {before!r} -> {after!r}" for key, (before, after) in sorted(changed.items()))
        raise ArtifactError(
            f"`{directory}` was made with another configuration ({details}); choose another name=, or remove it"
        )


def _deciding(config: RunConfig, max_bytes: int | None) -> dict[str, Any]:
    """The part of the configuration that decides the tokenizer."""
    tokenizer = _effective(config)
    if tokenizer.from_ is not None:
        made = {"from": redacted(tokenizer.from_), "objective": config.objective.kind}
        if tokenizer.extend is None:
            return made
        learning = {key: getattr(tokenizer, key) for key in ("extend", *LEARNING_KEYS)}
        return {**made, **learning, **_deciding_text(config, max_bytes)}
    plain: dict[str, Any] = tokenizer.model_dump(mode="json", by_alias=True, exclude={"from_"})
    if tokenizer.algorithm == "ids":
        return {**plain, "architecture": _architecture(config), "model_max_length": _max_length(config)}
    shape = {"architecture": _architecture(config), "model_max_length": _max_length(config)}
    return {**plain, **shape, **_deciding_text(config, max_bytes)}


def _deciding_text(config: RunConfig, max_bytes: int | None) -> dict[str, Any]:
    """The part of the configuration that decides the text to learn from."""
    data = config.data.model_dump(mode="json")
    named_files = not isinstance(config.data.validation, ValidationSplit)
    return {
        "text": {
            "train": config.data.text_sources,
            **{key: data[key] for key in ("document", "text_field", "ids_field", "encoding")},
        },
        "validation": None if named_files else data["validation"],
        **({} if max_bytes is None else {"first_bytes": max_bytes}),
    }


def _effective(config: RunConfig) -> TokenizerConfig:
    """The tokenizer section; a model from elsewhere brings its own tokenizer."""
    tokenizer = config.tokenizer
    if config.model.from_ is None and tokenizer.from_ is None:
        more = _sentinels(config)
        special = (*tokenizer.special_tokens, *more)
        return tokenizer.model_copy(update={"special_tokens": special}) if more else tokenizer
    if tokenizer.from_ is not None:
        return tokenizer
    learning = {key: getattr(tokenizer, key) for key in ("extend", *LEARNING_KEYS)} if tokenizer.extend else {}
    if tokenizer != TokenizerConfig(**learning):
        raise ValueError(
            f"model.from: `{config.model.from_}` has its own vocabulary, so a tokenizer cannot be trained for it; "
            "remove the section tokenizer, or give tokenizer.from"
        )
    return TokenizerConfig.model_validate({"from": config.model.from_, **learning})


def _sentinels(config: RunConfig) -> tuple[str, ...]:
    """The sentinels that span corruption needs, unless tokenizer.special_tokens has some; the first has the highest id.

    As many as the longest piece has spans, and as T5 has, at least; in T5's order.
    """
    objective, data = config.objective, config.data
    if objective.kind != "span-corruption" or sentinel(0) in config.tokenizer.special_tokens:
        return ()
    span = CORRUPTED_SPAN if objective.span is None else objective.span
    most = most_spans(data.sequence_length, data.target_length, objective.rate, span)
    return tuple(sentinel(number) for number in reversed(range(max(_SENTINELS, most))))


def _architecture(config: RunConfig) -> str:
    assert config.model.architecture is not None  # else the tokenizer comes from the model
    return config.model.architecture


def _max_length(config: RunConfig) -> int:
    return config.model.max_position_embeddings or config.data.sequence_length


def _sources(config: RunConfig, max_bytes: int | None = None) -> list[SourceFile]:
    """The files that the tokenizer is made from (the first `max_bytes`); Hub names have none."""
    tokenizer = _effective(config)
    if tokenizer.from_ is not None and is_url(tokenizer.from_):
        return resolve_sources([below(tokenizer.from_, "tokenizer.json")], key="tokenizer.from", download=False)
    if tokenizer.from_ is not None:
        directory = Path(tokenizer.from_)
        paths = sorted(directory.glob("*token*.json")) if directory.is_dir() else []
        taken = [SourceFile(path.name, str(path), "txt", path.stat().st_size) for path in paths]
        if tokenizer.extend is None:
            return taken
        files = text_files(config)
        files = files if max_bytes is None else first_files(files, max_bytes)
        return taken + [file for file in files if file.format != "hub"]
    if tokenizer.algorithm in ("bytes", "ids"):
        return []
    files = text_files(config)
    files = files if max_bytes is None else first_files(files, max_bytes)
    return [file for file in files if file.format != "hub"]


def _sources_state(config: RunConfig) -> str:
    return sha256_json([[file.name, state_of(file)] for file in _sources(config)])


def _inputs(config: RunConfig, max_bytes: int | None, console: Console | None) -> dict[str, str]:
    sources = _sources(config, max_bytes)
    fetch_files(sources, console)
    with _progress(console) as progress:
        sizes = [file.bytes if max_bytes is None else min(file.bytes, max_bytes) for file in sources]
        task = progress.add_task("hashing the text", total=sum(sizes))
        paths = [file.path for file in sources]
        digests = hash_files(paths, max_bytes=max_bytes, told=lambda size: progress.advance(task, size))
    return {"sources": digest_of_files((file.name, digest) for file, digest in zip(sources, digests, strict=True))}


def _manifest(
    config: RunConfig, directory: Path, report: TokenizerReport | None, max_bytes: int | None, console: Console
) -> None:
    facts: dict[str, Any] = read_vocabulary(directory).facts()
    facts["sources_state"] = _sources_state(config)
    if report is not None:
        facts["learnt"] = report.learnt
        facts["corpus"] = {"bytes": report.corpus_bytes, "documents": report.corpus_documents}
        facts["corpus"] |= {"sha256_sum": report.corpus_digest, "sample_bytes": report.sample_bytes}
        facts["total"] = asdict(report.total)
    files = {path.name: sha256_file(path) for path in sorted(directory.iterdir())}
    deciding, inputs = _deciding(config, max_bytes), _inputs(config, max_bytes, console)
    write_manifest(directory, kind=KIND, config=deciding, inputs=inputs, files=files, facts=facts)


def _progress(console: Console | None) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("tokenizer: {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=console is None or not console.is_terminal,
    )


def _peak_rss_bytes() -> int:
    """The most memory that this process has held so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024
