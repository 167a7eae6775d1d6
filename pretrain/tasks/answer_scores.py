"""How alike an answer and the right ones are: as SQuAD's script compares words, and CMRC 2018's characters.

What lives here: two texts in, exact match and F1 out. What must not: models, rows.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII = str.maketrans("", "", string.punctuation)
_CHINESE_PUNCTUATION = frozenset(
    "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』"
)  # those that CMRC 2018 passes over
_WORD = re.compile(r"[\u4e00-\u9fa5]|[^\W\u4e00-\u9fa5]+(?:[.,][^\W\u4e00-\u9fa5]+)*|[^\w\s]")


def of_words(said: str, right: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1) of words, the best over the right answers; case, punctuation and articles are passed over.

    No right answer means that nothing is to be said (SQuAD 2.0).
    """
    kept = [text for text in right if normalized(text)] or [""]
    return _best(said, kept, normalized, _bag_f1)


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_ASCII)).split())


def _bag_f1(said: str, right: str) -> float:
    """F1 of words in any order."""
    ours, theirs = normalized(said).split(), normalized(right).split()
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1(sum((Counter(ours) & Counter(theirs)).values()), len(ours), len(theirs))


def of_characters(said: str, right: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1) of Chinese characters and of words in other scripts, the best over the right answers.

    F1 is of the longest run that both have, as CMRC 2018 counts it.
    """
    return _best(said, list(right) or [""], _without_punctuation, _run_f1)


def _without_punctuation(text: str) -> str:
    return "".join(letter for letter in text.lower().strip() if letter not in _CHINESE_PUNCTUATION)


def _run_f1(said: str, right: str) -> float:
    ours, theirs = (_WORD.findall(_without_punctuation(text)) for text in (said, right))
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1(_longest_run(ours, theirs), len(ours), len(theirs))


def _longest_run(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Length of the longest run of pieces that stands in both."""
    longest, above = 0, [0] * (len(theirs) + 1)
    for one in ours:
        row = [0] * (len(theirs) + 1)
        for number, other in enumerate(theirs, start=1):
            if one == other:
                row[number] = above[number - 1] + 1
                longest = max(longest, row[number])
        above = row
    return longest


def _best(
    said: str, right: Sequence[str], normal: Callable[[str], str], overlap: Callable[[str, str], float]
) -> tuple[float, float]:
    exact = max(float(normal(said) == normal(one)) for one in right)
    return exact, max(overlap(said, one) for one in right)


def _f1(common: int, ours: int, theirs: int) -> float:
    if not common:
        return 0.0
    precision, recall = common / ours, common / theirs
    return 2 * precision * recall / (precision + recall)
