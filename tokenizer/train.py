"""Train a tokenizer from one of the recipes beside this file, without a run configuration.

    python tokenizer/train.py tokenizer/wordpiece-en.yaml --files 'text/*.txt' --out my-tokenizer [KEY=VALUE ...]

KEY=VALUE changes a key of the recipe's `tokenizer` section, as in `vocab_size=8192`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console

from pretrain.config import TokenizerConfig, parse_yaml
from pretrain.data.reading.documents import resolve_sources
from pretrain.files import commit_directory
from pretrain.tokenizer import make_tokenizer, write_report


class Recipe(BaseModel):
    """What a recipe says: whose special tokens, how long, and the `tokenizer` section of a run configuration."""

    model_config = ConfigDict(extra="forbid")

    architecture: str
    sequence_length: int
    tokenizer: TokenizerConfig


def read_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read a recipe, with keys of its tokenizer section replaced.

    Raises:
        ValueError: on unknown keys and wrong values.
    """
    raw: dict[str, Any] = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"`{override}`: write it as key=value, for example vocab_size=8192")
        raw["tokenizer"][key.removeprefix("tokenizer.")] = parse_yaml(value, override)
    if raw["tokenizer"].get("special_tokens"):
        raw["tokenizer"]["special_tokens"] = tuple(raw["tokenizer"]["special_tokens"])
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise ValueError(f"{path}: {key}: {problem['msg']} (given: {problem['input']!r})") from None


def main(arguments: list[str] | None = None) -> int:
    """Train, write the directory, show the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--files", nargs="+", required=True, help="files, globs, directories, hub:NAME, python-stdlib")
    parser.add_argument("--out", type=Path, required=True, help="the directory to make")
    parser.add_argument("--document", default="auto", help="auto, row, file, line or paragraph")
    parser.add_argument("--text-field", default="text", help="the field of jsonl, csv and parquet that holds the text")
    options = parser.parse_intermixed_args(arguments)
    console = Console(stderr=True)
    try:
        recipe = read_recipe(options.recipe, options.overrides)
        with commit_directory(options.out) as directory:
            report = make_tokenizer(
                recipe.tokenizer,
                resolve_sources(options.files, key="--files"),
                directory,
                architecture=recipe.architecture,
                model_max_length=recipe.sequence_length,
                document=options.document,
                text_field=options.text_field,
                console=console,
            )
            write_report(directory, report)
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    console.print(report.as_markdown(), markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
