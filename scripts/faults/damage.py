"""Damage to files: a flipped byte, a zeroed block, a cut end, a file that is gone.

What lives here: which file is damaged how, and doing it. What must not: what must hold after.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import tiny

_BLOCK = 4096


def damages(run: tiny.Run, *, kinds: Sequence[str], tries: int, newest: int) -> list[tuple[str, str, int]]:
    """`tries` triples (file, kind, seed) over the newest checkpoint and the pointers, every file as often as can be."""
    step = run.checkpoints / f"step-{newest:08d}"
    files = [path.relative_to(run.checkpoints).as_posix() for path in sorted(step.rglob("*")) if path.is_file()]
    files += ["latest.json", "best.json"]
    pairs = [(file, kind) for kind in kinds for file in files]
    return [(*pairs[number % len(pairs)], number) for number in range(tries)]


def damaged(path: Path, kind: str, seed: int) -> None:
    """Damage a file in place; its size stays, except where it is cut or gone."""
    generator = random.Random(seed)
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
        return
    place = generator.randrange(len(data))
    if kind == "flip":
        data[place] ^= 1 << generator.randrange(8)
    elif kind == "zero":
        while not data[place]:  # a block that is zero already is no damage
            place = generator.randrange(len(data))
        first = place - place % _BLOCK
        data[first : first + _BLOCK] = bytes(len(data[first : first + _BLOCK]))
    else:
        assert kind == "cut", kind
        del data[place:]
    path.write_bytes(data)
