"""Commands that score models: on text, on pairs of sentences, by their vectors, on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pretrain.cli.options import Device, ModelName, Tokenizer, TrustCode, app, console


@app.command()
def evaluate(
    model: ModelName,
    data: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="files, globs, directories, python-stdlib")
    ] = None,
    beside: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="score this one too, a column of the same table (repeat)")
    ] = None,
    minimal_pairs: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="sentence pairs as of BLiMP; a folder is one set (repeat)")
    ] = None,
    similarity: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="two texts and a score: mean-pooled vectors (repeat)")
    ] = None,
    retrieval: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="queries and what answers them (repeat)")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(metavar="TASK[,..]", help="decoders: lm-eval tasks, YAML files, folders of them")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="tasks: examples before each question")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="at most so many examples of each file and task")] = None,
    pair_fields: Annotated[str, typer.Option(help="GOOD,BAD[,GROUP]; default: as BLiMP calls them")] = "",
    similarity_fields: Annotated[str, typer.Option(help="default: sentence1,sentence2,score")] = "",
    retrieval_fields: Annotated[str, typer.Option(help="default: query,positive")] = "",
    pseudo_likelihood: Annotated[
        str, typer.Option(help="masked models, minimal pairs: within-word or original")
    ] = "within-word",
    kind: Annotated[str, typer.Option(help="auto, causal, mlm or seq2seq")] = "auto",
    text_field: Annotated[str, typer.Option(help="the field with the text; INPUT,REFERENCE of pairs")] = "text",
    document: Annotated[str, typer.Option(help="auto, row, file, line or paragraph")] = "auto",
    context: Annotated[int | None, typer.Option(help="tokens; default: the model's, at most 1024")] = None,
    stride: Annotated[int | None, typer.Option(help="causal: sliding context, new tokens a window")] = None,
    num_beams: Annotated[int | None, typer.Option(help="encoder-decoder: as of `pretrain generate`")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="encoder-decoder: of an output; default 100")] = None,
    bleu_tokenizer: Annotated[str, typer.Option(help="encoder-decoder: auto, 13a, intl, zh, char or none")] = "auto",
    max_bytes: Annotated[int | None, typer.Option(help="use about this much text; default: all of it")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16")] = "fp32",
    pseudo_perplexity: Annotated[int, typer.Option(help="masked: over this many sentences; 0 for none")] = 100,
    tokenizer: Tokenizer = None,
    device: Device = None,
    trust_remote_code: TrustCode = False,
    output: Annotated[Path | None, typer.Option(help="write the scores as JSON here")] = None,
) -> None:
    """Score any Hugging Face model: on text (bits per byte, masked accuracy, BLEU), minimal pairs, vectors, tasks."""
    from pretrain.config_evaluate import measures_of

    measures = measures_of(
        minimal_pairs=minimal_pairs,
        similarity=similarity,
        retrieval=retrieval,
        tasks=[name for given in tasks or () for name in _words(given)],
        num_fewshot=num_fewshot,
        limit=limit,
        pair_fields=_words(pair_fields),
        similarity_fields=_words(similarity_fields),
        retrieval_fields=_words(retrieval_fields),
        pseudo_likelihood=pseudo_likelihood,
    )
    from pretrain.evaluate import evaluate_model, show_scores

    scores = evaluate_model(
        model,
        data or (),
        measures=measures,
        beside=beside or (),
        kind=kind,
        text_field=_fields(text_field),
        document=document,
        context=context,
        stride=stride,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        bleu_tokenizer=bleu_tokenizer,
        max_bytes=max_bytes,
        precision=precision,
        pseudo_perplexity=pseudo_perplexity,
        tokenizer=tokenizer,
        device=device,
        trust_remote_code=trust_remote_code,
        out=output,
        console=console(),
    )
    show_scores(scores, Console(soft_wrap=True))


def _words(given: str) -> list[str]:
    return [word.strip() for word in given.split(",") if word.strip()]


def _fields(text_field: str) -> str | tuple[str, str]:
    source, comma, target = text_field.partition(",")
    return (source, target) if comma else text_field
