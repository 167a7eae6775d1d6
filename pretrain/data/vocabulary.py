"""What the data plane knows of a tokenizer: how many ids, which are special, which may stand in for another.

What lives here: ids and roles, read from a tokenizer directory or a data manifest. What must not: encoding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.files import ArtifactError

ROLES = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")


@dataclass(frozen=True)
class SpecialIds:
    """Special ids by role (None where the tokenizer has none).

    `special` are all ids that stand for no text, padding of the vocabulary included: never masked, never drawn as a
    random replacement. `vocab_size` counts all ids. `sentinels` are those of <extra_id_0>, <extra_id_1>, ...
    """

    vocab_size: int
    special: tuple[int, ...]
    pad: int | None = None
    unk: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    bos: int | None = None
    eos: int | None = None
    sentinels: tuple[int, ...] = ()
    is_special: npt.NDArray[np.bool_] = field(init=False, repr=False, compare=False)
    replaceable: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        table = np.zeros(self.vocab_size, dtype=np.bool_)
        table[list(self.special)] = True
        object.__setattr__(self, "is_special", table)
        object.__setattr__(self, "replaceable", np.flatnonzero(~table).astype(np.int64))

    def need(self, role: str, why: str) -> int:
        """The id of a role.

        Raises:
            ValueError: when the tokenizer has none.
        """
        value = getattr(self, role)
        if value is None:
            raise ValueError(f"the tokenizer has no {role}_token, which {why} needs; train it for this architecture")
        return int(value)

    def facts(self) -> dict[str, Any]:
        """Plain data, for a manifest."""
        roles = {role: getattr(self, role) for role in ROLES if getattr(self, role) is not None}
        facts = {"vocab_size": self.vocab_size, "special_ids": roles, "all_special_ids": list(self.special)}
        return facts | ({"sentinel_ids": list(self.sentinels)} if self.sentinels else {})

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> SpecialIds:
        """What `facts` wrote."""
        sentinels = tuple(facts.get("sentinel_ids", ()))
        return cls(facts["vocab_size"], tuple(facts["all_special_ids"]), sentinels=sentinels, **facts["special_ids"])


def read_vocabulary(directory: Path) -> SpecialIds:
    """Read roles and special ids from a tokenizer directory (tokenizer.json, tokenizer_config.json).

    Raises:
        ArtifactError: when the files are missing.
    """
    try:
        tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"`{directory}` holds no tokenizer: {Path(error.filename).name} is missing") from error
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    vocabulary = tokenizer["model"].get("vocab", {})
    # Unigram lists [piece, score] pairs in the order of ids; the others map pieces to ids.
    known = len(vocabulary) if isinstance(vocabulary, list) else 1 + max(vocabulary.values(), default=-1)
    size = max(known, 1 + max((token["id"] for token in added.values()), default=-1))
    roles = {}
    for role in ROLES:
        token = config.get(f"{role}_token")
        content = token["content"] if isinstance(token, dict) else token
        if content is None:
            continue
        if content in added:
            roles[role] = added[content]["id"]
        elif isinstance(vocabulary, dict) and content in vocabulary:
            roles[role] = vocabulary[content]
        else:
            raise ArtifactError(f"`{directory}`: {role}_token `{content}` is not in the vocabulary")
    special = {token["id"] for token in added.values() if token["special"]} | set(roles.values())
    return SpecialIds(size, tuple(sorted(special)), sentinels=_sentinels(added), **roles)


def sentinel(number: int) -> str:
    """The token that stands for the span of that number, as T5's vocabulary writes it."""
    return f"<extra_id_{number}>"


def _sentinels(added: dict[str, Any]) -> tuple[int, ...]:
    """Ids of the sentinels from the first up to where the tokenizer has no further one."""
    ids: list[int] = []
    while (token := added.get(sentinel(len(ids)))) is not None and token["special"]:
        ids.append(token["id"])
    return tuple(ids)


@dataclass(frozen=True)
class ReadyIds:
    """How ready token ids become documents under a vocabulary.

    Packing puts its own special tokens around documents. So one BOS or CLS at the start of ready ids and one EOS or SEP
    at their end are taken off, and padding at both ends where padding is no such token.

    `separator` is the id that parts the documents of a file without an index; `field` the column or key of ready ids;
    `numbers`, for a bare vocabulary, how many numbers it has: then text is numbers with white space between them.
    """

    vocab_size: int
    opening: frozenset[int] = frozenset()
    closing: frozenset[int] = frozenset()
    pad: int | None = None
    separator: int | None = None
    field: str | None = None
    numbers: int | None = None

    @classmethod
    def of(cls, directory: Path, field: str | None = None) -> ReadyIds:
        """Under the tokenizer in a directory; errors as of `read_vocabulary`."""
        tokens = read_vocabulary(directory)
        opening = frozenset(token for token in (tokens.bos, tokens.cls) if token is not None)
        closing = frozenset(token for token in (tokens.eos, tokens.sep) if token is not None)
        return cls(
            tokens.vocab_size,
            opening,
            closing,
            pad=None if tokens.pad in {*opening, *closing, tokens.unk} else tokens.pad,
            separator=tokens.eos if tokens.eos is not None else tokens.sep,
            field=field,
            numbers=_numbers_of(directory),
        )

    def problem(self, ids: npt.NDArray[Any]) -> tuple[int, str] | None:
        """The place of the first id that is none of the vocabulary, and what is wrong with it; None when all are."""
        if not len(ids) or (ids.min() >= 0 and ids.max() < self.vocab_size):
            return None
        place = int(np.flatnonzero((ids < 0) | (ids >= self.vocab_size))[0])
        return place, f"id {ids[place]} is beyond the vocabulary of {self.vocab_size}"

    def payload(self, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The ids (T,) without what packing puts around them."""
        start, end = 0, len(ids)
        if self.pad is not None and end and self.pad in (ids[0], ids[-1]):
            filled = np.flatnonzero(ids != self.pad)
            start, end = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 0)
        if start < end and int(ids[start]) in self.opening:
            start += 1
        if start < end and int(ids[end - 1]) in self.closing:
            end -= 1
        return ids[start:end]


def _numbers_of(directory: Path) -> int | None:
    """How many numbers a bare vocabulary has; None for a tokenizer that text was learnt for."""
    model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    if model.get("type") != "WordLevel":
        return None
    vocabulary = model["vocab"]
    numbers = 0
    while vocabulary.get(str(numbers)) == numbers:
        numbers += 1
    return numbers or None
