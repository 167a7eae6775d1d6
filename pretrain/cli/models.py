"""Commands that take a model directory: ask it, look into it, write it in another form."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pretrain.cli.options import Device, ModelDirectory, ModelName, Tokenizer, TrustCode, app, console


@app.command()
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(help="the text to go on from, or the input of an encoder-decoder")],
    max_new_tokens: Annotated[int | None, typer.Option(help="tokens to add at most; default: what fits")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token; default: 0.8, of an encoder-decoder 0")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="sample from the k likeliest")] = None,
    top_p: Annotated[float | None, typer.Option(help="sample from the likeliest that hold this much")] = None,
    num_beams: Annotated[int | None, typer.Option(help="keep so many outputs on the way to the likeliest")] = None,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    tokenizer: Tokenizer = None,
    device: Device = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Continue a text with any causal model, or answer it with any encoder-decoder."""
    from pretrain.generate import generate_text

    text = generate_text(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_beams=num_beams,
        seed=seed,
        tokenizer=tokenizer,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    sys.stdout.write(text + "\n")


@app.command()
def fill(
    model: ModelName,
    text: Annotated[str, typer.Argument(help="a text with one or more [MASK]")],
    top_k: Annotated[int, typer.Option(help="candidates for each mask")] = 5,
    tokenizer: Tokenizer = None,
    device: Device = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Fill the masks of a text with any masked model."""
    from pretrain.fill import fill_masks, show_candidates

    filled = fill_masks(
        model, text, top_k=top_k, tokenizer=tokenizer, device=device, trust_remote_code=trust_remote_code
    )
    show_candidates(filled, Console(soft_wrap=True))


@app.command()
def attention(
    model: ModelName,
    text: Annotated[str, typer.Argument(help="what it reads")],
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("attention.html"),
    target: Annotated[str | None, typer.Option(help="an encoder-decoder's output; default: what it generates")] = None,
    tokenizer: Tokenizer = None,
    device: Device = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Write a page that shows where a model looks: a map of every head, rollout, head importance."""
    from pretrain.attention import write_attention

    path = write_attention(
        model,
        text,
        out,
        target=target,
        tokenizer=tokenizer,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    console().print(f"wrote {path}", highlight=False)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="a run directory, a checkpoint, or a model directory")],
    out: Annotated[Path, typer.Argument(help="the directory to make")],
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    max_shard_bytes: Annotated[
        int, typer.Option(help="larger models are split over files of this size")
    ] = 5_000_000_000,
    code: Annotated[bool, typer.Option("--code", help="our own form with its code, which holds any shape")] = False,
) -> None:
    """Write a model for publishing, and prove that stock transformers computes the same logits."""
    from pretrain.card import write_card
    from pretrain.cards.facts import origin_of
    from pretrain.export import export_model

    proof = export_model(checkpoint, out, dtype=dtype, max_shard_bytes=max_shard_bytes, code=code)
    console().print(proof.describe())
    run, made_from = origin_of(checkpoint)
    write_card(out, run, checkpoint=made_from)


@app.command(name="import")
def import_(
    model: ModelDirectory,
    out: Annotated[Path, typer.Argument(help="the directory to make")],
) -> None:
    """Turn a stock directory of a design that we hold into a Loom one, and prove that the logits are equal."""
    from pretrain.export import import_model

    console().print(import_model(model, out).describe())
