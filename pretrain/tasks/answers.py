"""Extractive question answering: which part of a context answers a question, if any (SQuAD, CMRC 2018).

What lives here: questions to windows of contexts, and logits to answers. What must not: how two texts are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from pretrain.config_task import QuestionAnsweringTask
from pretrain.tasks import answer_scores
from pretrain.tasks.base import Evaluated, Task, parts_pairs
from pretrain.tasks.examples import IGNORED, Example
from pretrain.tasks.rows import Row
from pretrain.tasks.windows import Framed, check_offsets, framed, windows

_WINDOW = "window"
_BLOCK = 1000  # questions that are encoded at a time: where each token stands takes far more memory than its id
_QUESTION, _CONTEXT = 0, 1  # the numbers of a pair's texts, as tokenizers give them


@dataclass(frozen=True)
class _Window:
    """Where a window's tokens stand in the context.

    Attributes:
        first: position of its first token of the context.
        offsets: (tokens of the context, 2): characters, from and to.
        null: the position that stands for "no answer here".
    """

    first: int
    offsets: np.ndarray
    null: int


@dataclass(frozen=True)
class _Answers:
    """What the rows say of one question."""

    texts: list[str]
    span: tuple[int, int] | None
    """Characters of the first one that stands in the context."""
    moved: bool
    """Whether it stands elsewhere than the row says."""


class Answers(Task):
    """A span of the context. A long context is cut into windows, and the likeliest span of all of them is the answer.

    Scores: exact match and F1, of words as SQuAD's script has them or of characters as CMRC 2018's (Cui et al. 2019);
    where training rows have questions without an answer (Rajpurkar et al. 2018), also the F1 of those that have one and
    the accuracy of those that have none. The target of a window without the answer is its first token; of a decoder,
    which sees nothing there, the end of text after the window.
    """

    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    section: QuestionAnsweringTask

    def fit(self, rows: Sequence[Row]) -> None:
        """See whether there are questions without an answer, and how the tokenizer frames a pair."""
        self.unanswerable = any(not self._answers(row).texts for row in rows)
        self.lead = "" if parts_pairs(self.tokenizer) else "\n"

    @property
    def metric(self) -> str:
        """F1."""
        return "f1"

    # --- questions to windows ----------------------------------------------------------------------------------------

    def _answers(self, row: Row) -> _Answers:
        value = row["answers"]
        if isinstance(value, list) and all(isinstance(one, dict) for one in value):
            value = {name: [one.get(name) for one in value] for name in ("text", "answer_start")}
        texts, starts = (value.get(name) if isinstance(value, dict) else None for name in ("text", "answer_start"))
        fitting = isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)
        if not fitting or not all(isinstance(text, str) for text in texts or ()):
            raise ValueError(
                f"{row.where}: `answers` holds {str(value)[:60]!r}, and {{text: [...], answer_start: [...]}} is needed"
            )
        assert isinstance(texts, list)
        assert isinstance(starts, list)
        context = row.text("context")
        for text, start in zip(texts, starts, strict=True):
            found = _nearest(context, text, int(start or 0))
            if found is not None:
                return _Answers(texts, (found, found + len(text)), moved=found != start)
        return _Answers(texts, None, moved=False)

    def encode(self, rows: Sequence[Row], *, training: bool) -> list[Example]:
        """One example a window. Rows whose answers do not stand in the context are left out of training."""
        self._counts: Counter[str] = Counter()
        found = [self._answers(row) for row in rows]
        lost = [bool(one.texts) and one.span is None for one in found]
        places = [place for place in range(len(rows)) if not (training and lost[place])]
        examples: list[Example] = []
        for begin in range(0, len(places), _BLOCK):
            block = places[begin : begin + _BLOCK]
            questions = [rows[place].text("question").strip() for place in block]
            contexts = [self.lead + rows[place].text("context") for place in block]
            made = self.tokenizer(questions, contexts, truncation=False, return_offsets_mapping=True, verbose=False)
            check_offsets(made)
            for number, place in enumerate(block):
                examples += self._examples(made, number, place, found[place], training=training)
        self._counts["lost"] += sum(lost)
        self._counts["moved"] = sum(one.moved for one in found)
        self._note(len(rows), training=training)
        return examples

    def _examples(self, made: Any, number: int, place: int, answers: _Answers, *, training: bool) -> list[Example]:
        """The windows of one question."""
        texts = np.array([-1 if one is None else one for one in made.sequence_ids(number)])
        if not (texts == _CONTEXT).any():
            self._counts["empty"] += 1
            return []
        frame = self._frame(made, number, texts)
        room = self.section.max_length - frame.around - self._ends
        if room < 1:
            raise ValueError(f"task.max_length: {self.section.max_length} leaves no room for a context; raise it")
        offsets = np.array(made["offset_mapping"][number], dtype=np.int32)[texts == _CONTEXT] - len(self.lead)
        answer = _touched(offsets, answers.span)
        if answers.span is not None and answer is None:
            self._counts["lost"] += 1
            if training:
                return []
        shared = min(self.section.stride, room // 2)
        examples = []
        for first, last in windows([1] * len(offsets), room, shared):
            inputs = self._with_end(frame.window(slice(first, last)))
            window = _Window(
                first=len(frame.before["input_ids"]),
                offsets=offsets[first:last],
                null=len(inputs["input_ids"]) - 1 if self._ends else 0,
            )
            if answers.texts and answer is None:
                label = (IGNORED, IGNORED)
            elif answer is not None and first <= answer[0] and answer[1] < last:
                label = (window.first + answer[0] - first, window.first + answer[1] - first)
            else:
                label = (window.null, window.null)
            examples.append(Example(inputs, np.array(label, dtype=np.int64), place, extra=window))
        self._counts["windows"] += len(examples) > 1
        return examples

    def _frame(self, made: Any, number: int, texts: np.ndarray) -> Framed:
        """The pair, with no more of the question than half the input holds."""
        question = np.flatnonzero(texts == _QUESTION)
        kept = self.section.max_length // 2
        without = np.zeros(len(texts), dtype=bool)
        without[question[kept:]] = True
        self._counts["cut"] += len(question) > kept
        return framed(made, number, texts == _CONTEXT, without=without)

    @property
    def _ends(self) -> int:
        """Tokens that a decoder's windows get at their end."""
        return int(self.causal and self.tokenizer.eos_token_id is not None)

    def _with_end(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A decoder's window, with an end of text after it: the one place that has seen it all and is no answer."""
        if not self._ends:
            return inputs
        last = {name: array[-1:] for name, array in inputs.items()} | {
            "input_ids": np.array([self.tokenizer.eos_token_id])
        }
        return {name: np.concatenate([array, last[name]]) for name, array in inputs.items()}

    def _note(self, rows: int, *, training: bool) -> None:
        """Say what was out of the ordinary."""
        which = "training" if training else "evaluation"
        lines = {
            "windows": "contexts are longer than task.max_length: cut into windows",
            "moved": "answers do not stand at their answer_start: taken where they stand nearest to it",
            "lost": "questions have answers that do not stand in the context"
            + (": left out" if training else ": scored all the same"),
            "cut": "questions are longer than half of task.max_length: cut at their end",
            "empty": "contexts are empty: no answer is given",
        }
        for name, line in lines.items():
            if self._counts[name]:
                self.notes.append(f"{self._counts[name]:,} of {rows:,} {which} {line}")

    # --- logits to answers -------------------------------------------------------------------------------------------

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """Cross-entropy of the first token and of the last: two targets an example."""
        return sum(
            (
                F.cross_entropy(logits.float(), labels[:, side], ignore_index=IGNORED, reduction="sum")  # (B, L)
                for side, logits in enumerate((outputs.start_logits, outputs.end_logits))
            ),
            start=labels.new_zeros((), dtype=outputs.start_logits.float().dtype),
        )

    def collate(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Examples as arrays, with `window` (B, 3): where the context begins and ends, and the null position."""
        places = [(one.extra.first, one.extra.first + len(one.extra.offsets), one.extra.null) for one in examples]
        return super().collate(examples) | {_WINDOW: np.array(places, dtype=np.int64)}

    def call(self, forward: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Any:
        """The model's outputs; it is not told of `window`."""
        return forward(**{name: array for name, array in inputs.items() if name != _WINDOW})

    def predictions(self, outputs: Any, batch: Mapping[str, Tensor]) -> Sequence[Any]:
        """[sum of logits, first, last] of the likeliest span of each window's context, and the sum of the null."""
        sides = [logits.detach().float().cpu().numpy() for logits in (outputs.start_logits, outputs.end_logits)]
        said = []
        for starts, ends, (begin, end, null) in zip(*sides, batch[_WINDOW].tolist(), strict=True):
            total, span = likeliest_span(starts[begin:end], ends[begin:end], self.section.max_answer_length)
            said.append([total, *span, float(starts[null] + ends[null])])
        return said

    def answer_of(self, row: Row) -> list[str]:
        """Its answers; none where there is no answer."""
        return self._answers(row).texts

    def score(self, rows: Sequence[Row], examples: Sequence[Example], predictions: Sequence[Any]) -> Evaluated:
        """Scores over the questions, and the answers."""
        best: dict[int, tuple[float, int, int]] = {}
        nulls: dict[int, float] = {}
        for example, (total, first, last, null) in zip(examples, predictions, strict=True):
            nulls[example.row] = min(nulls.get(example.row, np.inf), null)
            if example.row not in best or total > best[example.row][0]:
                offsets = example.extra.offsets
                best[example.row] = total, int(offsets[first, 0]), int(offsets[last, 1])
        said = []
        for place, row in enumerate(rows):
            text = ""
            if place in best and not (self.unanswerable and nulls[place] > best[place][0]):
                _, begin, end = best[place]
                text = row.text("context")[max(begin, 0) : end].strip()
            said.append({"id": str(row.values.get("id", place)), "answer": text})
        texts = [answer["answer"] for answer in said]
        truth = [self._answers(row).texts for row in rows]
        return Evaluated(self._scores(truth, texts), said)

    def _scores(self, truth: Sequence[Sequence[str]], said: Sequence[str]) -> dict[str, float]:
        compare = answer_scores.of_characters if self.section.characters else answer_scores.of_words
        pairs = np.array([compare(one, texts) for one, texts in zip(said, truth, strict=True)])  # (questions, 2)
        exact, overlap = pairs.mean(0)
        scores = {"exact_match": float(exact), "f1": float(overlap)}
        if self.unanswerable:
            known = np.array([bool(texts) for texts in truth])
            if known.any():
                scores["answerable_f1"] = float(pairs[known, 1].mean())
            if not known.all():
                scores["unanswerable_accuracy"] = float(pairs[~known, 0].mean())
        return scores


def likeliest_span(starts: np.ndarray, ends: np.ndarray, longest: int) -> tuple[float, tuple[int, int]]:
    """The span with the largest sum of logits: (sum, (first, last)). Of all spans, not of some best ends alone.

    Args:
        starts: (tokens,) logits of being the first.
        ends: (tokens,) logits of being the last.
        longest: tokens of a span, at most.
    """
    best, chosen = -np.inf, (0, 0)
    for more in range(min(longest, len(starts))):
        sums = starts[: len(starts) - more] + ends[more:]
        first = int(sums.argmax())
        if sums[first] > best:
            best, chosen = float(sums[first]), (first, first + more)
    return best, chosen


def _nearest(context: str, text: str, start: int) -> int | None:
    """Where a text stands in a context nearest to a place, if it does."""
    if not text.strip():
        return None
    if context[start : start + len(text)] == text:
        return start
    found, at = [], context.find(text)
    while at >= 0:
        found.append(at)
        at = context.find(text, at + 1)
    return min(found, key=lambda one: abs(one - start), default=None)


def _touched(offsets: np.ndarray, span: tuple[int, int] | None) -> tuple[int, int] | None:
    """The first and the last token that have a character of a span; a token may begin before it and end after it."""
    if span is None:
        return None
    begins, ends = offsets[:, 0], offsets[:, 1]
    touched = np.flatnonzero((ends > span[0]) & (begins < span[1]) & (ends > begins))
    return (int(touched[0]), int(touched[-1])) if touched.size else None
