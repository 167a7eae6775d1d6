#!/usr/bin/env python
"""Load a model from a Hub as anybody would, by plain transformers, and compare it with directories on this disk.

    cd /tmp && python -P ~/checkout/scripts/from_hub.py OWNER/NAME main=$RUN/export \\
        step-1000=$RUN/train/checkpoints/step-00001000/model

Each argument is a revision and the directory that it must equal. `pretrain` cannot be imported in this process. What is
found is written as one line of JSON: for each revision its commit, its files, the class that its configuration names,
and whether class and stack give the same numbers bit for bit; of `main` also the card, whether its lines run, and what
the model says to `--text`. `HF_ENDPOINT`, `HF_TOKEN` and `HF_HOME` say where from, as who, and where to.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

PROJECT = "pretrain"
TEXTS = (
    "The door was closed, and nobody had seen him leave. He came back at 7:45 with 1,200 pages (all of them read)!",
    "他在门口站了一会儿，没有说话。第二天早上，大家才知道这件事。",
)
_ENDINGS = {
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", None),  # version 5 has no pipeline for these
    "MTModel": ("AutoModelForSeq2SeqLM", None),
    "ForPreTraining": ("AutoModelForPreTraining", None),
}
_MASK = "[MASK]"


class Absent(MetaPathFinder):
    """As if the project were not installed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Nothing, or a refusal."""
        if name.partition(".")[0] == PROJECT:
            raise ModuleNotFoundError(f"`{name}` is not to be had here", name=name)
        return None


def class_of(config: Any) -> tuple[str, str | None]:
    """The Auto class, and the pipeline, that a configuration asks for."""
    architecture = str(next(iter(config.architectures or ()), ""))
    return next((found for ending, found in _ENDINGS.items() if architecture.endswith(ending)), ("AutoModel", None))


def inputs_for(tokenizer: Any, config: Any) -> list[dict[str, Any]]:
    """Rows to compare on: sentences, and pieces from the whole vocabulary, as many as there are positions up to 128."""
    import torch

    text = config.get_text_config(decoder=False)
    length = min(128, getattr(text, "max_position_embeddings", None) or 128)
    rows = [torch.tensor(tokenizer(sentence)["input_ids"][:length])[None] for sentence in TEXTS]
    rows.append((torch.arange(length) * text.vocab_size // length)[None])
    if not config.is_encoder_decoder:
        return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    start = config.decoder_start_token_id
    begun = [torch.cat([torch.full((1, 1), start), row[:, :-1]], 1) for row in rows]
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "decoder_input_ids": of_decoder}
        for row, of_decoder in zip(rows, begun, strict=True)
    ]


def are_equal(first: Any, second: Any, rows: list[dict[str, Any]]) -> bool:
    """Whether two models give the same bits for every row."""
    import torch

    for row in rows:
        with torch.no_grad():
            outputs = [model.eval()(**row) for model in (first, second)]
        # A stack that is loaded from a model with a head may have a pooler that nobody trained, drawn at each loading.
        found = [
            {name: value for name, value in output.items() if torch.is_tensor(value) and name != "pooler_output"}
            for output in outputs
        ]
        if not found[0] or found[0].keys() != found[1].keys():
            return False
        # Compared as bytes: a NaN equals itself, and 0 is not -0.
        pairs = [(found[0][name], found[1][name]) for name in found[0]]
        if any(a.dtype != b.dtype or a.shape != b.shape for a, b in pairs):
            return False
        if any(not torch.equal(*(value.contiguous().view(torch.uint8) for value in pair)) for pair in pairs):
            return False
    return True


def look_at(repository: str, revision: str, directory: Path) -> dict[str, Any]:
    """A revision against the directory that it must equal."""
    import transformers
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    hub = HfApi()
    entries = hub.list_repo_tree(repository, revision=revision, recursive=True)
    sizes = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
    config = transformers.AutoConfig.from_pretrained(repository, revision=revision)
    tokenizer = transformers.AutoTokenizer.from_pretrained(repository, revision=revision)
    own = transformers.AutoTokenizer.from_pretrained(directory)
    auto, _ = class_of(config)
    rows = inputs_for(tokenizer, config)
    equal = all(tokenizer(text)["input_ids"] == own(text)["input_ids"] for text in TEXTS)
    for name in dict.fromkeys((auto, "AutoModel")):
        loaded = getattr(transformers, name).from_pretrained(repository, revision=revision, dtype="auto")
        expected = getattr(transformers, name).from_pretrained(directory, dtype=loaded.dtype)
        equal = equal and type(loaded) is type(expected) and are_equal(loaded, expected, rows)
    return {
        "commit": hub.repo_info(repository, revision=revision).sha,
        "files": len(sizes),
        "bytes": sum(sizes.values()),
        "class": str(next(iter(config.architectures or ()), "")),
        "equal": equal,
    }


def speak(repository: str, text: str) -> str:
    """What the model of `main` says: the filled mask, what comes after the text before it, or the other side."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(repository)
    auto, task = class_of(config)
    if task == "fill-mask":
        pipe = transformers.pipeline(task, repository)
        filled = pipe(text.replace(_MASK, pipe.tokenizer.mask_token, 1), top_k=5)
        return f"{text}  ->  " + ", ".join(f"{entry['token_str'].strip()} {entry['score']:.2f}" for entry in filled)
    begun = text.partition(_MASK)[0].strip()
    if task == "text-generation":
        pipe = transformers.pipeline(task, repository)
        said = pipe(begun, max_new_tokens=16, do_sample=False, return_full_text=False)[0]["generated_text"]
        return f"{begun}  ->  {' '.join(said.split())}"
    if auto != "AutoModelForSeq2SeqLM":
        return "(a model that writes nothing)"
    tokenizer = transformers.AutoTokenizer.from_pretrained(repository)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(repository).eval()
    ids = model.generate(**tokenizer(begun, return_tensors="pt"), max_new_tokens=16)
    return f"{begun}  ->  {tokenizer.decode(ids[0], skip_special_tokens=True)}"


def run_lines(card: str) -> str:
    """Run the lines of the card that load the model; what goes wrong, or nothing."""
    lines = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    if lines is None:
        return "the card has no lines that load the model"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(lines[1], "README.md", "exec"), {"__name__": "card"})
    except Exception as error:  # whatever the lines end with is what this reports
        return f"the card's lines end with {type(error).__name__}: {error}"
    return ""


def main() -> None:
    """Look at every revision; write what was found."""
    parser = argparse.ArgumentParser(description="Load a model from a Hub, and compare it with what lies here.")
    parser.add_argument("repository", metavar="OWNER/NAME")
    parser.add_argument("revisions", metavar="REVISION=DIRECTORY", nargs="+")
    parser.add_argument("--text", default=f"He looked at the {_MASK} and said nothing.", help=f"with a {_MASK}")
    given = parser.parse_args()
    if _MASK not in given.text:
        parser.error(f"--text {given.text!r} has no {_MASK}")
    sys.meta_path.insert(0, Absent())
    from huggingface_hub import ModelCard

    found: dict[str, Any] = {"revisions": {}}
    for pair in given.revisions:
        revision, _, directory = pair.partition("=")
        found["revisions"][revision] = look_at(given.repository, revision, Path(directory))
    card = ModelCard.load(given.repository).content
    found |= {"card": card, "lines": run_lines(card), "says": speak(given.repository, given.text)}
    assert PROJECT not in sys.modules
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
