"""The house rules, read from the imports: levels, doors, cycles, sizes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pretrain"

# A module may import from rooms whose level is lower, and from its own room.
LEVELS = {
    "__init__": 0,
    "config_text": 0,
    "config_types": 0,
    "score_names": 0,
    "config_data": 1,
    "config_evaluate": 1,
    "config_model": 1,
    "config_objective": 1,
    "config_loop": 1,
    "config": 2,
    "config_task": 3,
    "files": 2,
    "plugins": 2,
    "changes": 3,
    "ranks": 3,
    "stores": 3,
    "trust": 3,
    "strategy": 3,
    "heartbeat": 3,
    "runtime": 3,
    "models": 4,
    "data": 4,
    "tokenization": 4,
    "planning": 4,
    "training": 5,
    "evaluation": 5,
    "interop": 5,
    "pages": 5,
    "cards": 6,
    "card": 7,
    "model_dir": 6,
    "model_reading": 6,
    "published_store": 7,
    "publishing": 3,
    "publish": 8,
    "stock_model": 6,
    "growing": 5,
    "continuing": 6,
    "tokenizer_text": 6,
    "building": 7,
    "tokenizer": 7,
    "prepare": 7,
    "train": 8,
    "evaluate": 7,
    "export": 7,
    "generate": 7,
    "fill": 7,
    "attention": 7,
    "inspect": 7,
    "data_report": 7,
    "tasks": 7,
    "finetune": 9,
    "plan": 8,
    "reporting": 6,
    "report": 8,
    "launching": 6,
    "launch": 7,
    "run": 9,
    "cli": 10,
    "__main__": 11,
}
STRANGERS = {"data": {"models", "tokenization"}, "tokenization": {"models", "data"}, "models": {"data", "tokenization"}}
STRANGERS["training"] = {"models", "data", "tokenization", "interop", "evaluation"}
STRANGERS["planning"] = {"models", "data", "tokenization"}
STRANGERS["interop"] = {"data", "tokenization", "training", "evaluation"}

# One door per library: who may import it.
DOORS = {
    "accelerate": ("training/",),
    "deepspeed": ("training/engines/",),
    "wandb": ("training/metrics.py",),
    "trackio": ("training/metrics.py",),
    "datasets": ("data/reading/documents.py", "data/reading/sources.py"),
    "datatrove": ("data/preparing/", "data/keeping/"),
    "fsspec": ("data/reading/remote.py", "stores.py"),
    "huggingface_hub": ("publishing/", "cards/", "interop/"),  # interop: an error class of transformers
    "sacrebleu": ("evaluation/outputs.py",),
    "plotly": ("pages/curves.py",),
    "yaml": ("config.py", "config_text.py", "evaluation/task_files.py"),
    "lm_eval": ("evaluation/harness.py",),
    "typer": ("cli/",),
}
MODEL_IMPORTS = {"torch", "transformers", "pretrain"}
TRAIN_IMPORTS = {
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "pydantic",
    "yaml",
    "typer",
}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "_recipes" not in path.parts)


@cache
def imports(path: Path, *, top_level_only: bool = False) -> tuple[str, ...]:
    """Dotted names of what a file imports; relative ones are resolved."""
    return tuple(_imports(path, top_level_only))


def _imports(path: Path, top_level_only: bool) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module or "")))
            for alias in node.names:
                inner = ROOT.joinpath(*module.split("."), f"{alias.name}.py")
                yield f"{module}.{alias.name}" if inner.is_file() else module


def room(dotted: str) -> str:
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    here = room_of(path)
    assert here in LEVELS, f"{here} has no level: give it one"
    if here == "__init__":
        return  # the public surface, imported on first use
    for name in imports(path):
        if name.split(".")[0] != "pretrain" or room(name) in (here, "__init__"):
            continue
        there = room(name)
        assert there not in STRANGERS.get(here, ()), f"{path.name} imports {name}"
        assert LEVELS[there] < LEVELS[here], f"{path.name} imports {name}, which is not below it"


@pytest.mark.parametrize("library", sorted(DOORS))
def test_one_door_per_library(library: str) -> None:
    for path in modules():
        if library in {name.split(".")[0] for name in imports(path)}:
            inside = path.relative_to(PACKAGE).as_posix()
            assert inside.startswith(DOORS[library]), f"{inside} imports {library}"


def test_there_are_no_cycles() -> None:
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in modules()
    }
    graph = {
        name: {other for other in imports(path, top_level_only=True) if other in names and other != name}
        for name, path in names.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_models_are_portable() -> None:
    """The Hub copy follows `from .sibling import` alone, and carries torch and transformers only."""
    for path in (PACKAGE / "models").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path.name}: {ast.unparse(node)}"
                assert not (node.level == 1 and (node.module is None or "." in node.module)), ast.unparse(node)
    library = {name.split(".")[0] for path in (PACKAGE / "models").glob("*.py") for name in imports(path)}
    standard = {"__future__", "collections", "copy", "dataclasses", "difflib", "functools", "math", "typing"}
    standard |= {"re", "warnings"}
    assert library - standard <= MODEL_IMPORTS


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 600, "split it by meaning"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "say what lives here"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 100, f"{node.name} is too long"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, "a bare except"
            assert ast.unparse(node.type) != "Exception", "a broad except"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", "library code does not print"


def test_no_file_is_called_utils() -> None:
    assert not [path for path in modules() if path.stem in ("utils", "helpers", "common", "misc")]


def test_nothing_pickles() -> None:
    """Neither torch.save nor torch.load nor pickle, nor Accelerate's save_state, anywhere in the package."""
    for path in modules():
        text = path.read_text(encoding="utf-8")
        for word in ("torch.save(", "torch.load(", "import pickle", ".save_state(", ".load_state("):
            assert word not in text, f"{path.name} uses {word}"
