"""Checkpoints that are whole by their digests and lack something; saves of what was loaded.

What lives here: taking tensors out of a checkpoint, or casting them, with every digest made right again; saving what
was loaded. What must not: what a row of the table demands.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tiny

WEIGHTS = "model/model.safetensors"
OPTIMIZER = "optimizer/optimizer-00001-of-00001.safetensors"


@dataclass(frozen=True)
class Case:
    """What is done (`without` or `cast`) to which tensor of which file; `rng` is the random generators."""

    what: str
    file: str
    tensor: str


def cases(checkpoint: Path) -> list[Case]:
    """One tensor of every kind left out, and cast; one random generator left out."""
    from safetensors.torch import load_file

    found = []
    optimizer, weights = load_file(checkpoint / OPTIMIZER), load_file(checkpoint / WEIGHTS)
    for key in sorted({name.split("/")[1] for name in optimizer}):
        name = next(name for name in optimizer if name.endswith(f"/{key}"))
        found += [Case(what, OPTIMIZER, name) for what in ("without", "cast")]
    name = next(iter(weights))
    return [
        *found,
        *(Case(what, WEIGHTS, name) for what in ("without", "cast")),
        Case("without", "trainer.json", "rng"),
    ]


def operate(checkpoint: Path, case: Case) -> None:
    """Do it, and write the digests as if the checkpoint had been saved so."""
    import torch
    from safetensors.torch import load_file, save_file

    from pretrain.files import MANIFEST, manifest_bytes, read_manifest, sha256_file

    path = checkpoint / case.file
    if case.tensor == "rng":
        trainer = json.loads(path.read_text(encoding="utf-8"))
        del trainer["rng"][0]["torch"]
        path.write_text(json.dumps(trainer, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        if case.what == "without":
            del tensors[case.tensor]
        else:
            tensors[case.tensor] = tensors[case.tensor].to(torch.bfloat16)
        save_file(tensors, path, {"format": "pt"})
    manifest = read_manifest(checkpoint, "checkpoint")
    manifest.files[case.file] = sha256_file(path)
    (checkpoint / MANIFEST).write_bytes(manifest_bytes(manifest))


def three_saves(folder: Path, optimizer: str) -> str:
    """Train, save, load, save, load, save; what differs between the three, empty when nothing does."""
    from rich.console import Console

    from pretrain.config import load_config
    from pretrain.runtime import set_seed

    run = tiny.make(folder, train={"steps": 5}, optimizer={"name": optimizer})
    config = load_config(run.config)
    quiet = Console(quiet=True)
    from pretrain.train import build_trainer

    first = build_trainer(config, console=quiet)
    first.train()
    saves = [_contents(run)]
    for seed in (11, 12):
        set_seed(seed)
        trainer = build_trainer(config, console=quiet)
        set_seed(seed)  # whatever the generators are before, loading must put them back
        progress = trainer.saver.resume()
        assert progress is not None
        trainer.saver.save(progress)
        saves.append(_contents(run))
    for other in saves[1:]:
        if differing := sorted(name for name in {*saves[0], *other} if saves[0].get(name) != other.get(name)):
            return f"{optimizer}: {differing[0]} differs"
    return ""


def _contents(run: tiny.Run) -> dict[str, bytes]:
    newest = max(run.checkpoints.glob("step-*"))
    return {path.relative_to(newest).as_posix(): path.read_bytes() for path in newest.rglob("*") if path.is_file()}
