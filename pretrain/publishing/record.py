"""`pretrain.json`: what a published model is, beside it in its repository.

What lives here: the record, and by it whether two models are the same one. What must not: the Hub, or making models.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from pretrain import __version__
from pretrain.publishing.contents import Contents, Piece

RECORD = "pretrain.json"
_FORMAT_VERSION = 1
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Origin:
    """Where a model comes from; None where that is not known.

    Attributes:
        run_id: of the run that trained it.
        step: optimizer steps done.
        tokens: token positions seen.
    """

    run_id: str | None = None
    step: int | None = None
    tokens: int | None = None

    def describe(self) -> str:
        """A few words for a commit's message."""
        if self.step is None:
            return "model"
        return f"step {self.step:,}" + ("" if self.tokens is None else f", {self.tokens:,} tokens seen")


@dataclass(frozen=True)
class Record:
    """What `pretrain.json` says.

    Attributes:
        origin: where the model comes from.
        model_type: of its configuration.
        files: SHA-256 of every file that was sent with it.
    """

    origin: Origin
    model_type: str
    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, data: bytes) -> Self | None:
        """The record in these bytes; None when they are none."""
        try:
            raw = json.loads(data)
            origin = Origin(raw["run_id"], raw["step"], raw["tokens"])
            files = {str(name): str(digest) for name, digest in raw["files"].items()}
            return cls(origin, str(raw["model_type"]), files)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    @property
    def weights(self) -> dict[str, str]:
        """SHA-256 of the files with tensors."""
        return {name: digest for name, digest in self.files.items() if name.endswith(".safetensors")}

    def is_same_model(self, origin: Origin, weights: Mapping[str, str]) -> bool:
        """Whether it is of the same run, or has the very same weights."""
        if origin.run_id is not None and origin.run_id == self.origin.run_id:
            return True
        return bool(weights) and dict(weights) == self.weights

    def describe(self) -> str:
        """For people."""
        run = f"of run {self.origin.run_id}" if self.origin.run_id else "of an unknown run"
        return f"a {self.model_type} model {run}, {self.origin.describe()}"


def record_piece(contents: Contents, origin: Origin, sent: Iterable[Piece]) -> Piece:
    """The record of a model that is to be sent, as a file of its own; the same bytes for the same model."""
    content: dict[str, Any] = {
        "format_version": _FORMAT_VERSION,
        "run_id": origin.run_id,
        "step": origin.step,
        "tokens": origin.tokens,
        "model_type": contents.config["model_type"],
        "architectures": contents.config.get("architectures"),
        "code": {"pretrain": __version__, "commit": _commit()},
        "versions": _versions(),
        "files": {piece.name: piece.sha256 for piece in sent},
    }
    data = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    return Piece(RECORD, Path(RECORD), len(data), sha256(data).hexdigest(), data)


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def _commit() -> str | None:
    """The commit of this code where it runs from a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
