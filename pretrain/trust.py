"""What a model directory may say of itself: read before transformers acts on it.

What lives here: the small files beside the weights, and what in them would open a pickle, leave the directory or switch
on code. What must not: reading a model, or a choice of class.

Transformers is told `trust_remote_code=False`, and keeps to it; but some words of a config reach past that: weights
that an index calls `x.bin` are unpickled, `../x.safetensors` is read, an attention of the name `someone/kernel` is
fetched from the Hub and run, an adapter names another model and modules to import. So these words are refused here,
for a directory and for a name on the Hub, before anything else is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from pretrain.files import ArtifactError, check_inside, is_below

CONFIG, INDEX, ADAPTER = "config.json", "model.safetensors.index.json", "adapter_config.json"
_TOKENIZER, _GENERATION = "tokenizer_config.json", "generation_config.json"
_READ = (".json", ".safetensors", ".txt", ".model", ".jinja", ".py", ".tiktoken")
"""Endings of the files of a model directory that are read, or copied into another."""

# Keys that choose code by a name, and the names that are in the installed libraries; all others may be fetched.
_CHOICES: dict[str, tuple[str, ...]] = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
_CHOICES |= {f"_{key}": names for key, names in tuple(_CHOICES.items())}
_CHOICES |= {f"_{key}_internal": _CHOICES[key] for key in ("attn_implementation", "experts_implementation")}
_SWITCHES = ("trust_remote_code", "allow_all_kernels", "use_kernels", "kernel_config", "custom_generate")
_OTHER_READERS = ("quantization_config", "compression_config")
"""Weights in the form of a further library, which transformers hands the directory to."""


def check_model(source: str | Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a model directory, or a name on the Hub, that would open a pickle, reach outside, or run code.

    Args:
        source: what will be read; one that is not there passes, its reader says so.
        trust_remote_code: the user allows the code that comes with it; pickles and paths are refused all the same.

    Raises:
        ArtifactError: names the file, the key and the remedy.
    """
    path = Path(source)
    if path.is_dir():
        _stay_inside(path)
    if _entries(source, ADAPTER) is not None:
        raise ArtifactError(
            f"`{source}` carries an adapter ({ADAPTER}), which may name another model, pickled weights and modules to "
            "import; merge it into its model (PEFT's merge_and_unload) and save that"
        )
    config = _entries(source, CONFIG) or {}
    named = config.get("transformers_weights")
    indices = {INDEX} if named is None else {INDEX, _weights_name(source, CONFIG, named)}
    for file in sorted(name for name in indices if name.endswith(".json")):
        weights = (_entries(source, file) or {}).get("weight_map", {})
        for name in sorted(set(map(str, weights.values() if isinstance(weights, Mapping) else [weights]))):
            _weights_name(source, file, name)
    if not trust_remote_code:
        _no_code(source, CONFIG, config)
        _no_code(source, _GENERATION, _entries(source, _GENERATION))


def check_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a tokenizer's directory, or name on the Hub, that would reach outside or run code; weights do not matter.

    Raises:
        ArtifactError: names the file, the key and the remedy.
    """
    if Path(source).is_dir():
        _stay_inside(Path(source))
    entries = _entries(source, _TOKENIZER) or {}
    named = entries.get("fast_tokenizer_files")
    for name in map(str, named if isinstance(named, list) else []):
        if not is_below(name):
            raise ArtifactError(f"`{source}`: {_TOKENIZER} names `{name}`, which lies outside; remove that entry")
    if not trust_remote_code:
        _no_code(source, _TOKENIZER, entries)


def _stay_inside(directory: Path) -> None:
    for path in sorted(directory.iterdir()):
        if path.suffix in _READ:
            check_inside(path)


def _entries(source: str | Path, name: str) -> dict[str, Any] | None:
    """A small JSON file of a model; None when there is none, or it is none (then its reader says so)."""
    directory = Path(source)
    found: str | Path | None = directory / name
    if not directory.is_dir():
        found = cached_file(
            str(source), name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False
        )
    try:
        entries = json.loads(Path(found).read_text(encoding="utf-8")) if found is not None else None
    except FileNotFoundError:
        return None
    except ValueError:
        entries = {}
    return entries if entries is None or isinstance(entries, dict) else {}


def _weights_name(source: str | Path, file: str, name: Any) -> str:
    """A name of weights that is a safetensors file, or the index of some, in the directory."""
    wanted = (".safetensors", ".safetensors.index.json") if file == CONFIG else ".safetensors"
    if not isinstance(name, str) or not is_below(name) or not name.endswith(wanted):
        raise ArtifactError(
            f"`{source}`: {file} names the weights `{name}`; only .safetensors files in the directory are read, never "
            "pickled ones or what lies outside; save the model again, or convert its weights"
        )
    return name


def _no_code(source: str | Path, file: str, entries: Mapping[str, Any] | None) -> None:
    """Refuse keys that would run code, wherever in a file they stand."""
    for key, value in _pairs(entries):
        chosen = [*value.values()] if isinstance(value, Mapping) else [value]
        named = [one for one in chosen if one is not None and one not in _CHOICES.get(key, ())]
        if key in _CHOICES and named:
            why = f"which is none of {', '.join(_CHOICES[key])} and may be fetched from the Hub and run"
        elif key in _SWITCHES and value:
            why = "which switches on code; only the command line can"
        elif key in _OTHER_READERS and value:
            why = "so that another library reads its weights; give the model as it was before"
        else:
            continue
        raise ArtifactError(
            f"`{source}`: {file} says `{key}: {json.dumps(value)[:80]}`, {why}; remove that entry, or, if you trust "
            "the directory, give --trust-remote-code where a command has it"
        )


def _pairs(entries: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, of mappings in mappings and lists too."""
    if isinstance(entries, Mapping):
        for key, value in entries.items():
            yield str(key), value
            yield from _pairs(value)
    elif isinstance(entries, list):
        for value in entries:
            yield from _pairs(value)
