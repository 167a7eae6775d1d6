"""A tag a word: parts of speech, named entities, or anything that words are marked with.

What lives here: words to tokens and back. What must not: how windows are cut, or how a metric is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from pretrain.config_task import Column, TokenTask
from pretrain.tasks import metrics
from pretrain.tasks.base import Evaluated, Task
from pretrain.tasks.examples import IGNORED, Example, padded
from pretrain.tasks.rows import Row
from pretrain.tasks.windows import best_windows, check_offsets, framed, windows

_OUTSIDE = "O"
_SHARED = 4  # neighbouring windows of a long sentence share this part of their room
_PROBE = ("the", "cat", "sat")
_UNSPACED = (  # scripts that are written without spaces between words, by code point
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0xA4CF),  # Chinese, Japanese, their punctuation
    (0xF900, 0xFAFF),
    (0xFF00, 0xFFEF),
    (0x20000, 0x3FFFF),
)


class Tokens(Task):
    """A tag a word. One token of a word carries its tag: an encoder's first one, a decoder's last one.

    A decoder has seen a word only at its last token. Tags that are spans (B- and I-) are scored as seqeval does:
    precision, recall and F1 of whole spans, and accuracy; others by accuracy and macro F1. Every word of every row is
    scored: a long sentence is cut into windows that overlap, and a word of which the tokenizer leaves nothing is given
    `O`, or the most frequent tag.
    """

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    section: TokenTask

    def fit(self, rows: Sequence[Row]) -> None:
        """Take the tags from the training rows, and see what the tokenizer looks at."""
        self.learn_tags(rows)
        self.lead = lead_of(self.tokenizer)

    def learn_tags(self, rows: Sequence[Row]) -> None:
        """Take the tags from the training rows, and whether they are spans."""
        counts = Counter(tag for row in rows for tag in self.words_and_tags(row)[1])
        self.tags = sorted(counts)
        if len(self.tags) < 2:
            raise ValueError(
                f"task.tags: column `{self.section.tags}` of the training rows has {len(self.tags)} tag(s) "
                f"({', '.join(self.tags)}); tagging needs two"
            )
        marked = any(tag.startswith(("B-", "I-")) for tag in self.tags)
        if self.section.spans and not marked:
            raise ValueError(
                f"task.spans: true, but no tag of the training rows begins with B- or I- ({', '.join(self.tags[:8])})"
            )
        self.spans = marked if self.section.spans is None else self.section.spans
        self.fallback = _OUTSIDE if self.spans and _OUTSIDE in counts else counts.most_common(1)[0][0]

    def model_keys(self) -> dict[str, Any]:
        """Names of the tags."""
        return {
            "num_labels": len(self.tags),
            "id2label": dict(enumerate(self.tags)),
            "label2id": {name: number for number, name in enumerate(self.tags)},
        }

    @property
    def metric(self) -> str:
        """F1 of spans, or accuracy."""
        return "f1" if self.spans else "accuracy"

    # --- words to tokens ---------------------------------------------------------------------------------------------

    def _list(self, row: Row, column: Column) -> list[str]:
        """A column that holds a list of texts, or a text of words with spaces between."""
        value = row[column]
        entries = value.split() if isinstance(value, str) else value
        if not isinstance(entries, list | tuple) or not all(isinstance(entry, str) for entry in entries):
            raise ValueError(f"{row.where}: column `{column}` holds {str(value)[:60]!r}, and a list of texts is needed")
        return list(entries)

    def words_and_tags(self, row: Row) -> tuple[list[str], list[str]]:
        """The words and the tags of a row.

        Raises:
            ValueError: when they are no texts, or not equally many.
        """
        words, tags = self._list(row, self.section.tokens), self._list(row, self.section.tags)
        if len(words) != len(tags):
            raise ValueError(
                f"{row.where}: {len(words)} words in `{self.section.tokens}` and {len(tags)} tags in "
                f"`{self.section.tags}`; a word has one tag"
            )
        return words, tags

    def encode(self, rows: Sequence[Row], *, training: bool) -> list[Example]:
        """One example a sentence; of one that is too long a window each. Each word is a target of one example."""
        pairs = [self.words_and_tags(row) for row in rows]
        places = [place for place, (words, _) in enumerate(pairs) if words]
        if not places:
            return []
        texts = [self._spaced(pairs[place][0], rows[place]) for place in places]
        made = self.tokenizer(texts, is_split_into_words=True, truncation=False, verbose=False)
        check_offsets(made)
        self._counts: Counter[str] = Counter()
        examples = [
            example
            for number, place in enumerate(places)
            for example in self._examples(made, number, place, pairs[place][1])
        ]
        self._note(len(rows), "training" if training else "evaluation")
        return examples

    def _spaced(self, words: Sequence[str], row: Row) -> list[str]:
        """Words with the space before them that running text has there, where the tokenizer looks at it."""
        if not self.lead:
            return list(words)
        misc = row.values.get("misc")  # CoNLL-U says here what was written without a space after it
        known = isinstance(misc, list) and len(misc) == len(words)
        glued = ["SpaceAfter=No" in str(entry) for entry in misc or ()] if known else [False] * len(words)
        spaced = list(words[:1])
        for before, close, word in zip(words[:-1], glued[:-1], words[1:], strict=True):
            close = close or _unspaced(before[-1:]) or _unspaced(word[:1])
            spaced.append(word if close else self.lead + word)
        return spaced

    def _examples(self, made: Any, number: int, place: int, tags: Sequence[str]) -> list[Example]:
        """The examples of one sentence."""
        owners = made.word_ids(number)
        body = np.array([owner is not None for owner in owners])
        self._counts["dropped"] += len(tags) - len({owner for owner in owners if owner is not None})
        if not body.any():
            return []
        frame = framed(made, number, body)
        words, starts, sizes = np.unique(
            [owner for owner in owners if owner is not None], return_index=True, return_counts=True
        )
        room = self.section.max_length - frame.around
        if room < 1:
            raise ValueError(f"task.max_length: {self.section.max_length} leaves no room for a word; raise it")
        sizes = np.minimum(sizes, room)
        cut = list(windows(sizes.tolist(), room, room // _SHARED))
        chosen = best_windows(sizes.tolist(), cut, causal=self.causal)
        self._counts["long"] += len(cut) > 1
        numbers = {tag: one for one, tag in enumerate(self.tags)}
        examples = []
        for window, (first, last) in enumerate(cut):
            tokens = np.concatenate([np.arange(starts[one], starts[one] + sizes[one]) for one in range(first, last)])
            inputs = frame.window(tokens)
            ends = len(frame.before["input_ids"]) + np.cumsum(sizes[first:last])  # (words of the window,)
            carriers = ends - 1 if self.causal else ends - sizes[first:last]
            label = np.full(len(inputs["input_ids"]), IGNORED, dtype=np.int64)
            kept = []
            for one in range(first, last):
                if chosen[one] == window:
                    word, carrier = int(words[one]), int(carriers[one - first])
                    label[carrier] = numbers.get(tags[word], IGNORED)
                    self._counts["unknown"] += tags[word] not in numbers
                    kept.append((word, carrier))
            examples.append(Example(inputs, label, place, extra=kept))
        return examples

    def _note(self, rows: int, which: str) -> None:
        """Say what was out of the ordinary."""
        counts = self._counts
        if counts["long"]:
            self.notes.append(
                f"{counts['long']:,} of {rows:,} {which} sentences are longer than task.max_length: cut into windows"
            )
        if counts["dropped"]:
            self.notes.append(
                f"{counts['dropped']:,} words of the {which} rows leave no token: taken for {self.fallback}"
            )
        if counts["unknown"]:
            self.notes.append(f"{counts['unknown']:,} words of the {which} rows have a tag that no training row has")

    def collate(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Examples as arrays; a label a token."""
        made = padded(examples, self.padding())
        short = made["input_ids"].shape[1] - made["labels"].shape[1]
        made["labels"] = np.pad(made["labels"], [(0, 0), (0, short)], constant_values=IGNORED)
        return made

    # --- tokens to words ---------------------------------------------------------------------------------------------

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """Cross-entropy of the words."""
        logits = outputs.logits.float()  # (B, L, tags)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    def predictions(self, outputs: Any, batch: Mapping[str, Tensor]) -> Sequence[Any]:
        """The number of the likeliest tag of every token."""
        numbers: list[list[int]] = outputs.logits.argmax(-1).tolist()
        return numbers

    def answer_of(self, row: Row) -> list[str]:
        """Its tags."""
        return self.words_and_tags(row)[1]

    def score(self, rows: Sequence[Row], examples: Sequence[Example], predictions: Sequence[Any]) -> Evaluated:
        """Scores over all words of all rows."""
        truth = [self.words_and_tags(row)[1] for row in rows]
        said = [[self.fallback] * len(tags) for tags in truth]
        for example, numbers in zip(examples, predictions, strict=True):
            for word, carrier in example.extra:
                said[example.row][word] = self.tags[numbers[carrier]]
        return Evaluated(self.scores_of(truth, said), said)

    def scores_of(self, truth: Sequence[list[str]], said: Sequence[list[str]]) -> dict[str, float]:
        """Scores of tags, a list a sentence: of spans, or of each."""
        return metrics.tag_spans(truth, said) if self.spans else metrics.tags(truth, said)


def lead_of(tokenizer: Any) -> str:
    """What must stand before a word within a sentence for the tokens that it has in running text: a space, or nothing.

    Byte-level BPE has one id for ` cat` and another for `cat`; WordPiece has one; Unigram adds its own mark.
    """
    running = tokenizer(" ".join(_PROBE), add_special_tokens=False)["input_ids"]
    for lead in ("", " "):
        words = [_PROBE[0], *(lead + word for word in _PROBE[1:])]
        if tokenizer(words, is_split_into_words=True, add_special_tokens=False)["input_ids"] == running:
            return lead
    return " "


def _unspaced(character: str) -> bool:
    """Whether a character is of a script that is written without spaces."""
    return bool(character) and any(first <= ord(character) <= last for first, last in _UNSPACED)
