"""What a stranger may send: files that touch a marker when they are believed, and tiny models to put them into."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


class Marker:
    """The file that a payload makes; `made` says whether one did, and forgets it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def pickled(self) -> bytes:
        """A pickle that makes the marker."""
        return pickle.dumps(Bomb(self.path), protocol=4)

    @property
    def python(self) -> str:
        """A module that makes the marker, and has whatever is asked of it."""
        return (
            f"import os\nos.makedirs({str(self.path)!r}, exist_ok=True)\n"
            "from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast\n"
            "class Config(GPT2Config):\n    model_type = 'evil'\n"
            "class Model(GPT2LMHeadModel):\n    config_class = Config\n"
            "class Words(PreTrainedTokenizerFast):\n    pass\n"
            "def generate(model, *inputs, **options):\n    return inputs\n"
        )

    def made(self) -> bool:
        """Whether code ran since the last look."""
        was = self.path.exists()
        shutil.rmtree(self.path, ignore_errors=True)
        return was


def change(directory: Path, file: str, **keys: Any) -> Path:
    """Set keys of a JSON file of a model directory."""
    path = directory / file
    entries = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(entries | keys))
    return directory
