"""`pretrain evaluate MODEL TEXT...`: how well a model predicts text it has not seen, and what else it can do.

What lives here: reading the text, choosing the context, further measures, several models, the scores as one JSON, and a
run's own validation sets. What must not: what a score means; that is `pretrain.evaluation`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pretrain.config import RunConfig
from pretrain.config_data import DocumentStart
from pretrain.config_evaluate import MeasuresConfig
from pretrain.data.batches import Batch, layout_of
from pretrain.data.loader import DataPlane
from pretrain.data.reading.documents import SourceFile, read_documents, resolve_sources
from pretrain.data.reading.pairs import TextField, sides
from pretrain.data.validation import ValidationPass
from pretrain.evaluation.likelihood import evaluate_batches, perplexity, score_causal, score_masked
from pretrain.evaluation.loading import (
    LoadedModel,
    describe_model,
    describe_tokenizer,
    kind_of_model,
    load_model,
)
from pretrain.evaluation.measures import Measures, check_kind, default_window
from pretrain.evaluation.outputs import score_outputs
from pretrain.evaluation.passes import DEFAULT_BATCH_TOKENS, Passes
from pretrain.evaluation.passes import Progress as ProgressCallback
from pretrain.evaluation.table import score_table
from pretrain.files import replace_file
from pretrain.model_dir import DTYPES
from pretrain.model_reading import read_detector, read_loom, read_stock
from pretrain.models import pick_backend
from pretrain.runtime import describe_machine, resolve_precision
from pretrain.stock_model import adapt
from pretrain.training.checkpoint import verify_model


def evaluate_model(
    model: str | Path,
    files: Sequence[str] = (),
    *,
    measures: MeasuresConfig | None = None,
    beside: Sequence[str | Path] = (),
    tokenizer: str | Path | None = None,
    kind: str = "auto",
    document: str | DocumentStart = "auto",
    text_field: TextField = "text",
    context: int | None = None,
    stride: int | None = None,
    pseudo_perplexity: int = 100,
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
    bleu_tokenizer: str = "auto",
    max_bytes: int | None = None,
    precision: str = "fp32",
    device: str | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    console: Console | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Score a model directory (any Hugging Face one) on all that is asked, and say exactly what was scored and how.

    Causal models: loss (nats a token), perplexity, bits per byte; every token of every document is scored once. The
    end of a document is not scored, its start is predicted from BOS. Masked language models: loss and accuracy at 15%
    masks that the text alone decides, and pseudo-perplexity over a sample of sentences (Salazar et al. 2020).
    Encoder-decoders: BLEU and chrF of their outputs for the inputs of pairs, against the references.

    Args:
        model: a directory with config.json, safetensors and a tokenizer, or a Hub name.
        files: text: files, directories, globs, or whatever `data.train` of a run takes.
        measures: minimal pairs, similarity, retrieval and lm-eval tasks; `measure_at` means nothing here.
        beside: further models, which are scored on the same; `kind` and `tokenizer` are of `model` alone.
        tokenizer: where the tokenizer lies, when it is not in `model`.
        kind: "causal" or "mlm"; "auto" goes by the class in config.json.
        document: what one document is, as `data.document` of a run.
        text_field: the field of jsonl, csv and parquet rows that holds the text; two for an encoder-decoder, of the
            inputs and of the references.
        context: positions of input a forward pass; default: what the model takes, at most 1,024.
        stride: causal: new tokens a window; default `context`, windows without overlap.
        pseudo_perplexity: mlm: sentences in the sample for it; 0 leaves it out.
        num_beams: encoder-decoder: outputs that are kept on the way to the likeliest; default: as its directory says.
        max_new_tokens: encoder-decoder: tokens of an output at most; default 100, or what its positions leave.
        bleu_tokenizer: encoder-decoder: how BLEU finds words; "auto": "zh" for Chinese references, "char" for other
            scripts without spaces, else "13a".
        max_bytes: stop after the document that reaches this many bytes of text.
        precision: "fp32", "bf16" (autocast; the weights stay fp32), "fp16" (CUDA), or "auto": bf16 where it is native.
        device: default CUDA where there is one.
        batch_tokens: tokens a forward pass, at most, padding included.
        trust_remote_code: run the code that the directories, and the tasks, carry.
        out: write the scores there, as JSON.
        console: shows a progress bar.
        progress: told now and then what is scored, the targets done, and the targets in all.

    Raises:
        ValueError: when the model, its tokenizer or the text cannot be used; names the remedy.
    """
    wanted = measures or MeasuresConfig()
    if not files and not wanted.has_measures:
        raise ValueError(
            "nothing is asked: give text to score, or --minimal-pairs, --similarity, --retrieval or --tasks"
        )
    sources = resolve_sources(list(files), key="TEXT") if files else []
    names = [str(model), *map(str, beside)]
    head = bool(files) or wanted.needs_head
    for number, name in enumerate(names):
        verify_model(Path(name))
        if head:
            of_first = kind if number == 0 else "auto"
            check_kind(wanted, kind_of_model(name, of_first, trust_remote_code=trust_remote_code), name)
    asked = Measures.read(wanted, trust_code=trust_remote_code)
    of_outputs: dict[str, object] = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    of_outputs["bleu_tokenizer"] = None if bleu_tokenizer == "auto" else bleu_tokenizer
    chosen: dict[str, Any] = {"stride": stride, "sentences": pseudo_perplexity, "max_bytes": max_bytes}
    on_text = _OnText(sources, document, text_field, context=context, of_outputs=of_outputs, **chosen)
    found: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        started = time.monotonic()
        own: dict[str, Any] = {"tokenizer": tokenizer, "kind": kind} if number == 0 else {}
        loaded = load_model(name, device=device, trust_remote_code=trust_remote_code, head=head, **own)
        with _progress_bar(console, progress) as callback:
            scores = _score(loaded, on_text, asked, precision, batch_tokens, callback)
        found.append(scores | {"seconds": round(time.monotonic() - started, 3)})
    result = found[0] | ({"beside": found[1:]} if beside else {})
    if out is not None:
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
    return result


def _score(
    loaded: LoadedModel,
    on_text: _OnText,
    asked: Measures,
    precision: str,
    batch_tokens: int,
    told: ProgressCallback,
) -> dict[str, Any]:
    """All scores of one model, and what exactly was scored."""
    on_text.check(loaded)
    arithmetic = resolve_precision(precision, loaded.device)
    window = _window(loaded, on_text.context)
    passes = Passes(loaded.device, None if arithmetic == "fp32" else DTYPES[arithmetic], batch_tokens, told)
    of_text = on_text.score(loaded, passes, window) if on_text.sources else {}
    return {"kind": loaded.kind, **of_text, **asked.score(loaded, passes, window=window), **_about(loaded, arithmetic)}


@dataclass(frozen=True)
class _OnText:
    """Text, and how it is to be scored."""

    sources: Sequence[SourceFile]
    document: str | DocumentStart
    text_field: TextField
    context: int | None
    stride: int | None
    sentences: int
    max_bytes: int | None
    of_outputs: dict[str, Any]

    def check(self, loaded: LoadedModel) -> None:
        """Refuse options that have no effect on a model.

        Raises:
            ValueError: names the option.
        """
        of_text: dict[str, object] = {"context": self.context, "stride": self.stride}
        of_causal: dict[str, object] = {} if loaded.kind == "causal" else {"stride": self.stride}
        refused = of_text if loaded.kind == "seq2seq" else self.of_outputs | of_causal
        _check_options(loaded, self.text_field, refused, has_text=bool(self.sources))

    def score(self, loaded: LoadedModel, passes: Passes, window: int) -> dict[str, Any]:
        """The scores of one model, by what kind it is of."""
        texts = _texts(self.sources, self.document, self.text_field)
        ours: dict[str, Any] = {"window": window, "max_bytes": self.max_bytes}
        if loaded.kind == "seq2seq":
            pairs = (sides(text) for text in texts)
            chosen = self.of_outputs | {"bleu_tokenizer": self.of_outputs["bleu_tokenizer"] or "auto"}
            scores = score_outputs(loaded, pairs, passes, max_bytes=self.max_bytes, **chosen)
        elif loaded.kind == "causal":
            scores = score_causal(loaded.model, loaded.tokenizer, texts, passes, stride=self.stride, **ours)
        else:
            scores = score_masked(loaded.model, loaded.tokenizer, texts, passes, sentences=self.sentences, **ours)
        scores["text"] = {"files": [source.name for source in self.sources], **scores["text"]}
        return scores


def _about(loaded: LoadedModel, arithmetic: str) -> dict[str, Any]:
    return {
        "model": describe_model(loaded),
        "tokenizer": describe_tokenizer(loaded),
        "precision": arithmetic,
        "machine": describe_machine(loaded.device),
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
    }


def evaluate_run(
    config: RunConfig, directory: Path, *, console: Console | None = None, progress: ProgressCallback | None = None
) -> dict[str, Any]:
    """Score a run's model in fp32 on every validation set that the run prepared, in the rows of its training.

    Each token of the set is a target once, its documents' EOS too; masked models are scored at 15% masks that are the
    same in every run.

    Args:
        config: the run configuration.
        directory: the model.
        console: shows a progress bar and the scores.
        progress: told after each batch which set is scored, the rows done, and the rows in all.

    Returns:
        For each set its `loss`, `num_targets`, `context`, `precision`, and `bits_per_byte` with `perplexity` or
        `accuracy`.

    Raises:
        ArtifactError: when the data is not prepared, or `directory` holds no model, or an altered one of a checkpoint.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    verify_model(directory)
    model = _run_model(config, directory, device)
    scores: dict[str, Any] = {}
    for split in DataPlane.validation_splits(config):
        rows = DataPlane.validation(config, split).batches()
        with _progress_bar(console, progress, unit="rows") as told:
            batches = _told(rows, split, told)
            found: dict[str, Any] = dict(evaluate_batches(model, batches, device=device, num_bytes=rows.num_bytes))
        if "accuracy" not in found:
            found["perplexity"] = perplexity(found["loss"])
        scores[split] = found | {"context": config.data.sequence_length, "precision": "fp32"}
        if console is not None:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float))
            console.print(f"{split}: {shown}", highlight=False)
    return scores


def _run_model(config: RunConfig, directory: Path, device: torch.device) -> Any:
    """The model of a run in the class that it trains, so that packed rows mean the same."""
    if config.model.class_ == "stock":
        kind = layout_of(config.objective)
        stock: Any = read_stock(directory, kind)
        stock.to(device)
        adapt(stock, kind, config.data.sequence_length)
        return stock
    model: Any = read_detector(directory) if config.objective.kind == "rtd" else read_loom(directory)
    model.set_attn_implementation(pick_backend(model.config, device)[0])
    return model.to(device)


def _told(rows: ValidationPass, split: str, told: ProgressCallback) -> Iterator[Batch]:
    """The batches of a pass; `told` hears of each when it is done with."""
    done = 0
    told(split, done, rows.num_rows)
    for batch in rows:
        yield batch
        done += len(batch.row_ids)
        told(split, done, rows.num_rows)


@contextmanager
def _progress_bar(
    console: Console | None, also: ProgressCallback | None, *, unit: str = "targets"
) -> Iterator[ProgressCallback]:
    """A bar a stage on `console`, if it is a terminal, and whoever else wants to know."""
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit}, ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=console is None or not console.is_terminal,
        transient=True,
    )
    tasks: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total)
        bar.update(tasks[stage], completed=done)
        if also is not None:
            also(stage, done, total)

    with bar:
        yield show


def _texts(sources: Sequence[SourceFile], document: str | DocumentStart, text_field: TextField) -> Iterator[str]:
    for source in sources:
        for entry in read_documents(source, document=document, text_field=text_field):
            yield entry.text


def _check_options(
    loaded: LoadedModel, text_field: TextField, refused: Mapping[str, object], *, has_text: bool
) -> None:
    """Fields and options that do not belong to this kind of model."""
    if has_text and loaded.kind == "seq2seq" and isinstance(text_field, str):
        raise ValueError(
            f"`{loaded.source}` is an encoder-decoder, which predicts an output from an input: give a table of pairs "
            "and name the columns of both, --text-field INPUT,REFERENCE"
        )
    if loaded.kind != "seq2seq" and not isinstance(text_field, str):
        raise ValueError(
            f"text_field: {','.join(text_field)} names the two sides of pairs, which encoder-decoders are scored on; "
            f"`{loaded.source}` takes one"
        )
    for name, value in refused.items():
        if value is not None:
            whose = {"stride": "causal models", "context": "models of one text"}.get(name, "encoder-decoders")
            raise ValueError(f"{name}: {value} belongs to {whose} and has no effect on `{loaded.source}`; leave it out")


def _window(loaded: LoadedModel, context: int | None) -> int:
    longest = loaded.max_positions
    if context is None:
        return default_window(loaded)
    if context < 1 or (longest is not None and context > longest):
        raise ValueError(f"context: {context} does not fit `{loaded.source}`, which takes 1 to {longest} tokens")
    return context


def show_scores(scores: Mapping[str, Any], console: Console) -> None:
    """The scores of `evaluate_model` as a table, a column for each model."""
    console.print(score_table([scores, *scores.get("beside", ())]))
