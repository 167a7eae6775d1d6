"""Training from prepared shards imports the ten libraries of its own and what they bring, nothing of the text tools."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import yaml
from packaging.requirements import Requirement

from pretrain.config import config_to_dict

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from synthetic import make_run

NEEDED = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "pydantic",
    "pyyaml",
    "typer",
    "rich",
)
TEXT_TOOLS = {"datasets", "datatrove", "orjson", "pyarrow", "zstandard", "pandas"}

# Runs `pretrain` where the modules in argv[1] are not installed, as far as any finder can tell.
WITHOUT = """
import json, sys
from importlib.machinery import PathFinder

missing = set(json.loads(sys.argv.pop(1)))


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in missing else PathFinder.find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Without
from pretrain.cli import main

main()
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_with(names: tuple[str, ...]) -> set[str]:
    """The distributions that these require, without extras, and they themselves."""
    found: set[str] = set()
    waiting = [canonical(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            requirements = [Requirement(line) for line in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue  # for another platform
        waiting += [canonical(r.name) for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def modules_beyond(names: tuple[str, ...]) -> set[str]:
    """Top-level modules of every other distribution that is installed."""
    kept = installed_with(names) | {"pretrain"}
    owners = metadata.packages_distributions()
    return {module for module, by in owners.items() if not kept & {canonical(owner) for owner in by}} | TEXT_TOOLS


def test_training_needs_ten_libraries(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = make_run(
        tmp_path, tokens=4000, model=sizes, data={"sequence_length": 32}, train={"steps": 2, "batch_tokens": 128}
    )
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(config_to_dict(config)))))
    missing = modules_beyond(NEEDED)
    assert "pytest" in missing
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(sorted(missing)), "train", str(file)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((config.directory / "train" / "result.json").read_text())
    assert result["step"] == 2
    assert result["scores"]["validation/loss"] > 0, "validation rows are read too"
