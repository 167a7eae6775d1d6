"""Token ids as text that a person can read, and that no terminal or browser can be misled by.

What lives here: the text of each token among its neighbours, and marks for what cannot be seen. What must not: colours,
layout, or which tokens are shown.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pretrain.data.vocabulary import SpecialIds

GOES_ON = "‥"
"""Stands for bytes that go on with the character before, which is shown where it begins."""
NEWLINE, TAB = "⏎", "⇥"
_CARRIER = "◌"

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
_ORDINARY_SPACES = (" ", "\u3000")


def visible(text: str) -> str:
    """The text with a mark for each character that cannot be seen, or that would steer a terminal.

    Control characters become their pictures (ESC: ␛), marks of direction, zero-width and unassigned characters
    their code, ⟨U+202E⟩. Letters of any script stay.
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_seen, text))


@lru_cache(maxsize=1 << 16)
def _seen(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return NEWLINE if character == "\n" else TAB
    if code < 0x20 or code == 0x7F:
        return chr(0x2400 + code) if code < 0x20 else "\u2421"
    category = unicodedata.category(character)
    if category in _HIDDEN or (category == "Zs" and character not in _ORDINARY_SPACES):
        return f"⟨U+{code:04X}⟩"
    return character


class Spelling:
    """Reads ids as the text they stand for.

    Tokens that are bytes are joined before they are read as UTF-8: a character that several tokens share is shown at
    the first of them, the others show GOES_ON. Bytes that are no UTF-8 show as ⟨E5⟩.
    """

    def __init__(self, directory: Path, special: SpecialIds) -> None:
        """Read the tokenizer in `directory`."""
        self._take((directory / "tokenizer.json").read_text(encoding="utf-8"), special)

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int, special: Collection[int]) -> Spelling:
        """Of a tokenizer that is loaded, with as many ids, of which these stand for no text."""
        made = cls.__new__(cls)
        known = tuple(sorted(token for token in special if 0 <= token < vocab_size))
        made._take(tokenizer.to_str(), SpecialIds(vocab_size, known))
        return made

    def _take(self, written: str, special: SpecialIds) -> None:
        self._tokenizer = Tokenizer.from_str(written)
        self._special = special
        steps = list(_steps(json.loads(written).get("decoder")))
        kinds = {step["type"] for step in steps}
        self._in_bytes = "ByteLevel" in kinds
        self._falls_back = "ByteFallback" in kinds
        replaced = [step.get("pattern", {}).get("String") for step in steps if step["type"] == "Replace"]
        self._metaspace = "Metaspace" in kinds or _METASPACE in replaced
        self._known: dict[int, bytes] = {}

    def name(self, token: int) -> str:
        """The token as the vocabulary writes it, with nothing hidden."""
        written = self._tokenizer.id_to_token(token)
        return visible(written) if written is not None else f"⟨id {token}⟩"

    def alone(self, token: int) -> str:
        """The token's text by itself."""
        return self.spell([token])[0]

    def text(self, tokens: Sequence[int]) -> str:
        """The text of a document as the tokenizer decodes it, with nothing marked."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def spell(self, tokens: Sequence[int]) -> list[str]:
        """The text of each of the tokens, which follow each other; special tokens by their names."""
        spelled = [""] * len(tokens)
        run: list[int] = []  # places of the tokens with text that follow each other
        for place, token in enumerate(tokens):
            if not self.is_special(token):
                run.append(place)
                continue
            spelled[place] = self.name(token)
            self._read(run, tokens, spelled)
            run = []
        self._read(run, tokens, spelled)
        return spelled

    def is_special(self, token: int) -> bool:
        """Whether the token stands for no text."""
        return not 0 <= token < self._special.vocab_size or bool(self._special.is_special[token])

    def _read(self, run: list[int], tokens: Sequence[int], spelled: list[str]) -> None:
        """Fill in the texts of the places in `run`."""
        parts = [self._bytes(tokens[place]) for place in run]
        for place, text in zip(run, _characters(parts), strict=True):
            alone = bool(text) and unicodedata.combining(text[0]) > 0  # an accent whose letter is another token
            spelled[place] = f"{_CARRIER}{text}" if alone else text or "⟨⟩"

    def _bytes(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = self._read_bytes(token)
        return self._known[token]

    def _read_bytes(self, token: int) -> bytes:
        written = self._tokenizer.id_to_token(token)
        if written is None:
            return f"⟨id {token}⟩".encode()
        table = _byte_table()
        if self._in_bytes and all(character in table for character in written):
            return bytes(table[character] for character in written)
        if self._falls_back and (found := _BYTE_TOKEN.fullmatch(written)):
            return bytes([int(found[1], 16)])
        if self._metaspace:
            written = written.replace(_METASPACE, " ")
        return written.encode("utf-8", errors="replace")


def _steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Every step of a decoder as tokenizer.json describes it."""
    if decoder is None:
        return
    yield decoder
    for inner in decoder.get("decoders", ()):
        yield from _steps(inner)


@cache
def _byte_table() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (Radford et al. 2019), turned around."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    table = {chr(byte): byte for byte in plain}
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}


def _characters(parts: list[bytes]) -> list[str]:
    """What each part shows of the UTF-8 text that they are together."""
    try:
        return [visible(part.decode()) for part in parts]  # no character is shared
    except UnicodeDecodeError:
        pass
    data = b"".join(parts)
    owner = [number for number, part in enumerate(parts) for _ in part]
    shown = [""] * len(parts)
    place = 0
    while place < len(data):
        size, text = _next_character(data, place)
        shown[owner[place]] += text
        for later in sorted({*owner[place + 1 : place + size]} - {owner[place]}):
            shown[later] = GOES_ON
        place += size
    return shown


def _next_character(data: bytes, place: int) -> tuple[int, str]:
    """How many bytes the character at `place` has, and what is shown of it."""
    lead = data[place]
    size = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    try:
        return size, visible(data[place : place + size].decode())
    except UnicodeDecodeError:
        return 1, f"⟨{lead:02X}⟩"
