"""What an encoder-decoder writes for an input, and how near it comes to a reference.

What lives here: inputs and rules of generation that `generate` and `evaluate` share, outputs for many inputs, BLEU and
chrF through sacrebleu. What must not: reading text, or printing.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from pretrain.evaluation.loading import LoadedModel
from pretrain.evaluation.passes import Passes, turns
from pretrain.evaluation.text import TextTally

DEFAULT_NEW_TOKENS = 100
_OF_BEAMS = ("length_penalty", "early_stopping")
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_UNSPACED = re.compile(r"[\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff]")  # Thai to Khmer, kana
BLEU_TOKENIZERS = ("auto", "13a", "intl", "zh", "char", "none")


def input_ids(model: LoadedModel, text: str) -> list[int]:
    """As the tokenizer frames a text; where it adds nothing, EOS at the end, as in training."""
    plain = list(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    framed = list(model.tokenizer(text, verbose=False)["input_ids"])
    if not plain:
        raise ValueError("the input is empty; give the text that the encoder reads")
    eos = model.tokenizer.eos_token_id
    return [*framed, eos] if framed == plain and eos is not None and plain[-1] != eos else framed


def output_room(model: LoadedModel, input_tokens: int, max_new_tokens: int | None) -> int:
    """How many tokens an output may have.

    Raises:
        ValueError: when the input or `max_new_tokens` does not fit the model's positions.
    """
    longest = model.max_positions
    if longest is not None and max(input_tokens, max_new_tokens or 1) > longest:
        what = (
            f"an input of {input_tokens} tokens does" if input_tokens > longest else f"{max_new_tokens} new tokens do"
        )
        remedy = "give a shorter text" if input_tokens > longest else f"max_new_tokens may be {longest} at most"
        raise ValueError(f"{what} not fit the {longest} positions of `{model.source}`; {remedy}")
    if max_new_tokens is not None:
        return max_new_tokens
    return DEFAULT_NEW_TOKENS if longest is None else min(DEFAULT_NEW_TOKENS, longest)


def generation_config(model: LoadedModel, max_new_tokens: int, choice: dict[str, Any]) -> GenerationConfig:
    """What ends and fills a row, beside the choice of the next token."""
    own = getattr(model.model, "generation_config", None)
    eos = getattr(own, "eos_token_id", None)
    eos = eos if eos is not None else model.tokenizer.eos_token_id
    pad = model.tokenizer.pad_token_id
    first_eos = eos[0] if isinstance(eos, list) else eos
    options = choice | (_output_rules(model, own, choice["num_beams"]) if model.kind == "seq2seq" else {})
    make: Any = GenerationConfig
    config: GenerationConfig = make(
        max_new_tokens=max_new_tokens,
        bos_token_id=model.tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=pad if pad is not None else first_eos,
        **options,
    )
    return config


def _output_rules(model: LoadedModel, own: Any, num_beams: int) -> dict[str, Any]:
    """What the directory of an encoder-decoder says of its outputs: what they begin with, what must not stand there."""
    start = getattr(own, "decoder_start_token_id", None)
    start = start if start is not None else getattr(model.model.config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError(
            f"`{model.source}`: decoder_start_token_id is not set, so nothing says what an output begins with; set it "
            "in config.json to the token it was trained with"
        )
    names = ["bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", *(_OF_BEAMS if num_beams > 1 else ())]
    said = {name: getattr(own, name, None) for name in names}
    return {"decoder_start_token_id": start} | {name: value for name, value in said.items() if value is not None}


@dataclass(frozen=True)
class Outputs:
    """Texts in the order of their inputs, and how they were made; `cut_off` of them did not end by themselves."""

    texts: list[str]
    num_beams: int
    max_new_tokens: int
    cut_off: int


def write_outputs(
    model: LoadedModel,
    inputs: Sequence[str],
    passes: Passes,
    *,
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
) -> Outputs:
    """The likeliest output of an encoder-decoder for each input.

    Inputs of like length share a batch; padding is masked, so the outputs do not depend on the batch.

    Args:
        model: an encoder-decoder.
        inputs: texts.
        passes: device, precision, and how many tokens of inputs, times beams, a batch holds at most.
        num_beams: as of `generate_text`.
        max_new_tokens: tokens of an output at most; default 100, or as many as the model's positions leave.

    Raises:
        ValueError: when an input is empty or does not fit the model's positions.
    """
    if num_beams is not None and num_beams < 1:
        raise ValueError(f"num_beams: {num_beams} must be at least 1")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens} must be at least 1")
    encoded = []
    room = output_room(model, 1, max_new_tokens)
    for number, text in enumerate(inputs, start=1):
        try:
            encoded.append(input_ids(model, text))
            output_room(model, len(encoded[-1]), max_new_tokens)
        except ValueError as error:
            raise ValueError(f"input {number} (`{text[:40]}`): {error}") from error
    own = getattr(model.model, "generation_config", None)
    beams = num_beams or getattr(own, "num_beams", None) or 1
    return write_encoded(model, encoded, passes, num_beams=beams, max_new_tokens=room)


def write_encoded(
    model: LoadedModel,
    encoded: Sequence[Sequence[int]],
    passes: Passes,
    *,
    num_beams: int,
    max_new_tokens: int,
    stops: Collection[int] = (),
) -> Outputs:
    """The likeliest output for each input of token ids, of an encoder-decoder or, going on from it, of a decoder.

    A decoder's inputs share a batch when they are equally long, so that none is padded.

    Args:
        model: an encoder-decoder or a decoder.
        encoded: ids of each input, at least one.
        passes: as of `write_outputs`.
        num_beams: outputs that are looked at beside each other.
        max_new_tokens: tokens of an output at most.
        stops: ids that end an output, beside the model's own.
    """
    continues = model.kind != "seq2seq"
    options = generation_config(model, max_new_tokens, {"do_sample": False, "num_beams": num_beams})
    options.eos_token_id = sorted({*torch.tensor(options.eos_token_id).reshape(-1).tolist(), *stops})
    ends, pad = torch.tensor(options.eos_token_id), options.pad_token_id
    batches = _batches([len(ids) for ids in encoded], passes.batch_tokens // num_beams, alike=continues)
    shared = passes.ranks.world > 1
    said: dict[int, str] = {}
    done = cut_off = 0
    with passes.of(model.model):
        for members, counts, everyone in turns(batches, passes):
            width = len(encoded[members[0]])
            ids = torch.full((len(members), width), pad, dtype=torch.int64)  # (B, L)
            mask = torch.zeros_like(ids)
            for row, member in enumerate(members):
                ids[row, : len(encoded[member])] = torch.tensor(encoded[member])
                mask[row, : len(encoded[member])] = 1
            made = model.model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=options,
                synced_gpus=shared,  # one that is done passes on until all are: sharded engines meet in each pass
            )
            made = made[:, width if continues else 1 :].cpu()
            if counts:
                cut_off += int((~torch.isin(made, ends).any(dim=1)).sum())
                texts = model.tokenizer.batch_decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                said |= {member: str(text).strip() for member, text in zip(members, texts, strict=True)}
            done += len(everyone)
            if passes.progress is not None:
                passes.progress("outputs", done, len(encoded))
    for others in passes.ranks.gather(said):
        said |= {int(member): text for member, text in others.items()}  # JSON's keys are text
    (cut_off_of_all,) = passes.ranks.sum([cut_off])
    return Outputs([said[member] for member in range(len(encoded))], num_beams, max_new_tokens, int(cut_off_of_all))


def _batches(lengths: Sequence[int], limit: int, *, alike: bool) -> Iterator[list[int]]:
    """Numbers of inputs, longest first, at most `limit` padded tokens together; `alike`: all of one length."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    while order:
        width = lengths[order[0]]
        rows = max(1, limit // width)
        if alike:
            rows = min(rows, sum(lengths[number] == width for number in order))
        yield order[:rows]
        order = order[rows:]


def score_outputs(
    model: LoadedModel,
    pairs: Iterable[tuple[str, str]],
    passes: Passes,
    *,
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
    max_bytes: int | None = None,
    bleu_tokenizer: str = "auto",
) -> dict[str, Any]:
    """BLEU (Papineni et al. 2002) and chrF (Popovic 2015) of the outputs, as sacrebleu counts them (Post 2018).

    Args:
        model: an encoder-decoder.
        pairs: input and reference of each.
        passes: as of `write_outputs`.
        num_beams: as of `write_outputs`.
        max_new_tokens: as of `write_outputs`.
        max_bytes: stop after the pair whose reference reaches this many bytes.
        bleu_tokenizer: how BLEU finds words: one of `BLEU_TOKENIZERS`; "auto" takes "zh" (each Chinese character a
            word) when the references are mostly Chinese, "char" when they are in another script without spaces
            (Japanese, Thai, Lao, Burmese, Khmer), else sacrebleu's own default, "13a".

    Returns:
        `bleu` and `chrf` (0 to 100) with their signatures, `num_beams`, `max_new_tokens`, `cut_off` (outputs that did
        not end by themselves), `text` (pairs, bytes of the references, their SHA-256), and `outputs`, one a pair.

    Raises:
        ValueError: when there is no pair, an input does not fit, or sacrebleu is not installed.
    """
    _sacrebleu()
    if bleu_tokenizer not in BLEU_TOKENIZERS:
        raise ValueError(f"bleu_tokenizer: {bleu_tokenizer} is unknown; use {', '.join(BLEU_TOKENIZERS)}")
    inputs: list[str] = []
    references: list[str] = []
    tally = TextTally()
    for source, reference in pairs:
        if max_bytes is not None and tally.bytes >= max_bytes:
            break
        tally.add(reference)
        inputs.append(source)
        references.append(reference)
    if not references:
        raise ValueError("there is no pair to score; check the files and the columns of inputs and references")
    made = write_outputs(model, inputs, passes, num_beams=num_beams, max_new_tokens=max_new_tokens)
    scores = bleu_and_chrf(made.texts, references, bleu_tokenizer)
    text = {"documents": tally.documents, "bytes": tally.bytes, "sha256": tally.sha256}
    how = {"num_beams": made.num_beams, "max_new_tokens": made.max_new_tokens, "cut_off": made.cut_off}
    return scores | how | {"text": text, "outputs": made.texts}


def bleu_and_chrf(outputs: Sequence[str], references: Sequence[str], bleu_tokenizer: str = "auto") -> dict[str, Any]:
    """`bleu` and `chrf` (0 to 100) of outputs by one reference each, with sacrebleu's signatures.

    Args:
        outputs: texts.
        references: as many.
        bleu_tokenizer: as of `score_outputs`.

    Raises:
        ValueError: when sacrebleu is not installed.
    """
    metrics = _sacrebleu()
    words = _word_finder(references) if bleu_tokenizer == "auto" else bleu_tokenizer
    scores: dict[str, Any] = {}
    for name, metric in (("bleu", metrics.BLEU(tokenize=words)), ("chrf", metrics.CHRF())):
        scores[name] = float(metric.corpus_score(list(outputs), [list(references)]).score)
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores


def without_spaces(texts: Sequence[str]) -> bool:
    """Whether texts are mostly in a script without spaces between words (Chinese, Japanese, Thai, ...)."""
    return _word_finder(texts) != "13a"


def _word_finder(references: Sequence[str]) -> str:
    """What sacrebleu calls the way to find words, by the script of most letters."""
    text = "".join(references)
    han, other, letters = len(_HAN.findall(text)), len(_UNSPACED.findall(text)), sum(map(str.isalpha, text))
    if 2 * (han + other) <= letters:
        return "13a"
    return "char" if other * 20 >= han else "zh"


def _sacrebleu() -> Any:
    try:
        return importlib.import_module("sacrebleu.metrics")
    except ImportError as error:
        raise ValueError(
            "outputs are scored by sacrebleu, which is not installed: pip install 'pretrain[metrics]'"
        ) from error
