"""A text from a text: translation, summarization, and whatever else can be written so.

What lives here: sources and targets as an encoder-decoder or a decoder reads them, and the scores of what it writes.
What must not: the loss, or how text is generated (`writing`).

An encoder-decoder reads the source as its tokenizer frames it. A decoder reads one row: BOS, source, separator, target,
EOS, with the loss on target and EOS.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pretrain.config_task import TextTask
from pretrain.evaluation.outputs import bleu_and_chrf, without_spaces
from pretrain.tasks.base import Evaluated, Evaluation
from pretrain.tasks.examples import Example
from pretrain.tasks.metrics import library
from pretrain.tasks.rows import Row
from pretrain.tasks.writing import WritingTask, check_room, decoder_example, stop_at

_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_PIECES = re.compile(r"[a-z0-9]+|[^\W_]", re.IGNORECASE)
WRITTEN = ("bleu", "chrf", *_ROUGE, "exact_match")
"""Scores that need outputs to be written."""


class TextToText(WritingTask):
    """An output for an input.

    At every evaluation: the mean loss of a target's tokens, `perplexity`, `token_accuracy`. Outputs are written at the
    end by the best model, and at every evaluation only where one of their scores decides which model is best: `bleu`,
    `chrf` and `rouge...` (0 to 100), `exact_match` (a share). ROUGE is that of rouge-score; where the references are in
    a script without spaces its words are single characters, and runs of Latin letters and digits.
    """

    section: TextTask

    def __init__(self, section: TextTask, tokenizer: Any, *, causal: bool) -> None:
        super().__init__(section, tokenizer, causal=causal)
        if tokenizer.eos_token_id is None and causal:
            raise ValueError(
                "task.kind: text-to-text: the tokenizer has no end of text (eos_token), so a decoder could not learn "
                "where an output ends; give a model whose tokenizer has one"
            )

    def prepare_model(self, model: Any) -> None:
        """Refuse rows that do not fit the model's positions; a decoder stops where outputs end."""
        section = self.section
        if self.causal:
            stop_at(model, [self.tokenizer.eos_token_id])
            check_room(
                model, section.max_length + section.max_target_length, "task.max_length and task.max_target_length"
            )
        else:
            check_room(model, section.max_target_length, "task.max_target_length")

    # --- examples ----------------------------------------------------------------------------------------------------

    def encode(self, rows: Sequence[Row], *, training: bool) -> list[Example]:
        """One example a row; rows without a source or a target are left out, long ones cut at the end."""
        section = self.section
        examples, empty, cut_sources, cut_targets = [], 0, 0, 0
        for place, row in enumerate(rows):
            source, target = row.text(section.source), row.text(section.target)
            if not source.strip() or not target.strip():
                empty += 1
                continue
            make = self._of_decoder if self.causal else self._of_encoder_decoder
            example, cuts = make(section.prefix + source, target, place)
            examples.append(example)
            cut_sources += cuts[0]
            cut_targets += cuts[1]
        for count, what in (
            (empty, "have no source or no target: left out"),
            (cut_sources, f"have a source of more than task.max_length: {section.max_length} tokens: cut at its end"),
            (cut_targets, f"have a target of more than task.max_target_length: {section.max_target_length}: cut"),
        ):
            if count:
                self.notes.append(f"{count:,} of {len(rows):,} {'training' if training else 'held-out'} rows {what}")
        if training and "rouge" in section.scores and without_spaces([one.extra["target"] for one in examples]):
            self.notes.append("ROUGE counts characters as words here: the targets are in a script without spaces")
        return examples

    def _of_encoder_decoder(self, source: str, target: str, place: int) -> tuple[Example, tuple[bool, bool]]:
        ids, cut = self._framed(self.section.max_length, text=source)
        label, cut_target = self._framed(self.section.max_target_length, text_target=target)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        extra = {"prompt": ids.tolist(), "target": target}
        return Example(inputs, label, place, extra, written=len(label)), (cut, cut_target)

    def _framed(self, limit: int, **text: str) -> tuple[np.ndarray, bool]:
        """A text as the tokenizer frames it, with EOS where it adds nothing, cut to a limit; whether it was cut."""

        def ids(**keys: Any) -> list[int]:
            return list(self.tokenizer(**text, verbose=False, **keys)["input_ids"])

        plain, framed, eos = ids(add_special_tokens=False), ids(), self.tokenizer.eos_token_id
        if framed == plain and eos is not None and plain[-1:] != [eos]:
            return np.array([*plain[: limit - 1], eos], dtype=np.int64), len(plain) + 1 > limit
        if len(framed) > limit:
            return np.array(ids(truncation=True, max_length=limit), dtype=np.int64), True
        return np.array(framed, dtype=np.int64), False

    def _of_decoder(self, source: str, target: str, place: int) -> tuple[Example, tuple[bool, bool]]:
        section = self.section
        prompt, answer, separator = self._plain(source), self._plain(target), self._plain(section.separator)
        begin = [self.tokenizer.bos_token_id] if self.tokenizer.bos_token_id is not None else []
        room = max(0, section.max_length - len(begin) - len(separator))
        whole = [*begin, *prompt[:room], *separator]
        written = [*answer[: section.max_target_length - 1], self.tokenizer.eos_token_id]
        learnt = np.arange(len(whole) + len(written)) >= len(whole)
        example = decoder_example(whole + written, learnt, place, {"prompt": whole, "target": target})
        return example, (len(prompt) > room, len(answer) + 1 > section.max_target_length)

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    # --- scores ------------------------------------------------------------------------------------------------------

    def more_scores(self, asked: Evaluation, found: Evaluated) -> Evaluated:
        """The scores of outputs too: of all test rows, of `evaluate_limit` of validation; see the class for when."""
        found = super().more_scores(asked, found)
        if asked.part is None and (self.section.metric or self.metric).removeprefix("-") not in WRITTEN:
            return found
        written = self._written(asked, None if asked.part == "test" else self.section.evaluate_limit)
        return Evaluated(found.scores | written.scores, written.predictions)

    def answer_of(self, row: Row) -> str:
        """The target."""
        return row.text(self.section.target)

    def score(self, rows: Sequence[Row], examples: Sequence[Example], predictions: Sequence[Any]) -> Evaluated:
        """How many tokens of the targets are foreseen, each after the right ones before it."""
        return Evaluated(self.token_accuracy(predictions), [None] * len(rows))

    def _written(self, asked: Evaluation, limit: int | None) -> Evaluated:
        """Outputs of the first examples, and their scores; None where a row has none."""
        chosen = asked.examples[:limit]
        outputs = self.write(
            asked,
            [example.extra["prompt"] for example in chosen],
            max_new_tokens=self.section.max_target_length,
            num_beams=self.section.num_beams,
        )
        predictions: list[Any] = [None] * len(asked.rows)
        for example, output in zip(chosen, outputs, strict=True):
            predictions[example.row] = output
        return Evaluated(self._scores(outputs, [example.extra["target"] for example in chosen]), predictions)

    def _scores(self, outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        wanted: set[str] = set(self.section.scores)
        scores: dict[str, float] = {}
        decisive = (self.section.metric or "").removeprefix("-")
        wanted |= {"rouge" if decisive in _ROUGE else decisive} & {"bleu", "chrf", "rouge", "exact_match"}
        if wanted & {"bleu", "chrf"}:
            found = bleu_and_chrf(outputs, references, self.section.bleu_tokenizer)
            scores |= {name: found[name] for name in ("bleu", "chrf") if name in wanted}
        if "rouge" in wanted:
            scores |= rouge(outputs, references)
        if "exact_match" in wanted:
            equal = [_plain_text(a) == _plain_text(b) for a, b in zip(outputs, references, strict=True)]
            scores["exact_match"] = sum(equal) / max(1, len(equal))
        return scores


def rouge(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2, -L and -Lsum (Lin 2004), the mean F1 times 100 of outputs by one reference each, by rouge-score.

    Where the references are mostly in a script without spaces, a word is a character, or a run of Latin letters and
    digits: rouge-score's own words are runs of Latin letters and digits alone, so that of Chinese nothing would count.
    The sentences of ROUGE-Lsum are lines.

    Raises:
        ValueError: when rouge-score is not installed.
    """
    words = _Characters() if without_spaces(references) else None
    scorer = library("rouge_score.rouge_scorer").RougeScorer(list(_ROUGE), use_stemmer=False, tokenizer=words)
    found = [scorer.score(reference, output) for output, reference in zip(outputs, references, strict=True)]
    return {name: 100.0 * sum(one[name].fmeasure for one in found) / max(1, len(found)) for name in _ROUGE}


class _Characters:
    """Words of a script without spaces, in the form that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        """Each letter of other scripts, and runs of Latin letters and digits."""
        return [piece.lower() for piece in _pieces(text)]


def _pieces(text: str) -> Iterator[str]:
    return (match.group() for match in _PIECES.finditer(text))


def _plain_text(text: str) -> str:
    """A text with single spaces, none at its ends."""
    return " ".join(text.split())
