"""Which files of a model directory are the model's, and go; which stay here, and why.

What lives here: names alone. What must not: what is in a file (`contents`), or the Hub.

A directory that was written with a manifest goes by it. Beside what the manifest names, go the files that are written
later: the card and its picture, results of evaluations, licences, the settings of generation. A directory without one
goes by the names that transformers, PEFT and sentence-transformers give their files. Whatever else lies there stays,
until somebody asks for it by name.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from pretrain.files import ArtifactError, is_below

INDEX = "model.safetensors.index.json"
_NEVER = frozenset({"manifest.json", "pretrain.json", "Thumbs.db"})
_NEVER_FOLDERS = frozenset({"__pycache__"})
_HIDDEN_THAT_GO = frozenset({".eval_results", ".gitattributes"})

# Written by people, or anew by `pretrain card`: they may differ from what a manifest says of them, or be gone.
_DOCUMENTS = re.compile(
    r"README\.md|training-curve\.svg|\.eval_results/[^/]+\.ya?ml|\.gitattributes|CITATION\.cff"
    r"|(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)(-\w+(\.\d+)*)?(\.(md|txt|rst|pdf|html))?",
    re.IGNORECASE,
)
_WRITTEN_LATER = re.compile(r"generation_config\.json|chat_template\.(jinja|json)")

_WEIGHTS = r"model(\.\w+)?(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index(\.\w+)?\.json"
_TOKENIZER = (
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)"
    r"|[\w-]*vocab[\w-]*\.(json|txt|bpe)|merges\.txt|normalizer\.json|dict\.txt|bpe\.codes|[\w.-]+\.(model|spm|tiktoken)"
    r"|(encoder|emoji|word_shape|word_pronunciation|tekken)\.json"
)
_OTHERS = (
    r"config\.json|generation_config\.json|((image_|video_)?pre)?processor_config\.json"
    r"|modules\.json|router_config\.json|config_sentence_transformers\.json|sentence_\w+_config\.json"
)
_ADAPTER = r"adapter_config\.json|adapter_model\.safetensors"
_OF_A_MODEL = re.compile(f"{_WEIGHTS}|{_TOKENIZER}|{_OTHERS}|{_ADAPTER}")

_FOLDERS = frozenset({"", "generator", "adapter"})
"""The model's own, that of a detector's generator, the adapters beside a merged model."""
_TEMPLATES = re.compile(r"additional_chat_templates/[^/]+\.jinja")
_CODE = re.compile(r"\w+\.py")


@dataclass(frozen=True)
class Selection:
    """The files of a directory by their paths in it, in order.

    Attributes:
        goes: what is sent.
        unknown: what stays because it is not known to belong to the model; somebody may ask for it.
        never: what stays whatever is asked: hidden files and our own records; folders end with a slash.
    """

    goes: tuple[str, ...]
    unknown: tuple[str, ...]
    never: tuple[str, ...]


def select(directory: Path, manifest: Collection[str] | None, also: Sequence[str] = ()) -> Selection:
    """Sort the files of a model directory.

    Args:
        directory: the model directory.
        manifest: the files that were written down when it was made; None when nobody has done that.
        also: patterns (`*.txt`, `figures/*`) of files that are asked for.

    Raises:
        ArtifactError: for a pattern that no file answers to.
    """
    files, never = _listed(directory)
    if manifest is None:
        folders, shards = _FOLDERS | _modules(directory), _shards(directory)
        with_code = {folder for folder in folders if _carries_code(directory / folder)}
        goes = {name for name in files if _is_a_models(name, folders, with_code) or name in shards}
    else:
        goes = {name for name in files if name in manifest or _WRITTEN_LATER.fullmatch(name)}
    goes |= {name for name in files if is_document(name)}
    for pattern in also:
        asked = {name for name in files if _answers(name, pattern)}
        if not asked:
            hidden = [name for name in never if _answers(name.rstrip("/"), pattern.rstrip("/"))]
            why = f"; `{hidden[0]}` never leaves this machine" if hidden else "; give a file's path in it, or a pattern"
            raise ArtifactError(f"--also {pattern}: no file of `{directory}` is called so{why}")
        goes |= asked
    return Selection(tuple(sorted(goes)), tuple(sorted(set(files) - goes)), tuple(sorted(never)))


def is_document(name: str) -> bool:
    """Whether a file is a card, a licence, or results: written for people, and again after the model was made."""
    return bool(_DOCUMENTS.fullmatch(name))


def is_of_a_model(name: str) -> bool:
    """Whether a library loads a model or its tokenizer from a file of this name."""
    return bool(_OF_A_MODEL.fullmatch(name.rpartition("/")[2]))


def in_few_words(names: Iterable[str]) -> list[str]:
    """Names as a person reads them: files of a folder as one entry."""
    folders: Counter[str] = Counter()
    shown = []
    for name in names:
        folder, slash, rest = name.partition("/")
        if slash and rest:
            folders[folder] += 1
        else:
            shown.append(name)
    return sorted([*shown, *(f"{folder}/ ({count} file{'s' * (count > 1)})" for folder, count in folders.items())])


def _answers(name: str, pattern: str) -> bool:
    """Whether a path is meant by a pattern, whose `*` stays within a folder as in a shell."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _is_a_models(name: str, folders: Collection[str], with_code: Collection[str]) -> bool:
    """Whether a path is one that the libraries give a model's files."""
    folder, _, last = name.rpartition("/")
    if _TEMPLATES.fullmatch(name) or (folder in with_code and _CODE.fullmatch(last)):
        return True
    return folder in folders and is_of_a_model(last)


def _carries_code(folder: Path) -> bool:
    """Whether the configuration of a model, its tokenizer or its processor says that code lies beside it."""
    return any(_read(path).get("auto_map") for path in folder.glob("*config.json"))


def _modules(directory: Path) -> set[str]:
    """The folders of sentence-transformers' modules, those among which a router chooses too.

    One that holds no file (`2_Normalize`) is not there in what was downloaded.
    """
    listed = _read_any(directory / "modules.json")
    entries = listed if isinstance(listed, list) else []
    named = [str(entry.get("path", "")) for entry in entries if isinstance(entry, dict)]
    named = [name for name in named if is_below(name)]
    for folder in ["", *named]:
        routes = _read(directory / folder / "router_config.json").get("types")
        named += [f"{folder}/{name}".lstrip("/") for name in routes] if isinstance(routes, dict) else []
    return {PurePosixPath(name).as_posix() for name in named}


def _shards(directory: Path) -> frozenset[str]:
    """The files of weights that the index of a split model names."""
    found = _read(directory / INDEX).get("weight_map")
    return frozenset(map(str, found.values())) if isinstance(found, dict) else frozenset()


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's entries; none of what is no such file, which `contents` refuses."""
    found = _read_any(path)
    return found if isinstance(found, dict) else {}


def _read_any(path: Path) -> Any:
    """What a JSON file holds; None of what is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _listed(directory: Path) -> tuple[list[str], list[str]]:
    """Paths of all that could go, links to folders among them, and of what never does."""
    files: list[str] = []
    never: list[str] = []
    for found, folders, names in os.walk(directory):
        place = Path(found)

        def path_of(name: str, place: Path = place) -> str:
            return (place / name).relative_to(directory).as_posix()

        for name in _that_never_go(folders, _NEVER_FOLDERS):
            never.append(f"{path_of(name)}/")
            folders.remove(name)
        hidden = _that_never_go(names, _NEVER)
        never += [path_of(name) for name in hidden]
        files += [path_of(name) for name in names if name not in hidden]
        files += [path_of(name) for name in folders if (place / name).is_symlink()]
    return files, never


def _that_never_go(names: Iterable[str], own: Collection[str]) -> list[str]:
    return [name for name in names if name in own or (name.startswith(".") and name not in _HIDDEN_THAT_GO)]


def refuse_links_outside(directory: Path, names: Iterable[str]) -> None:
    """Refuse files that lie elsewhere.

    Raises:
        ArtifactError: names the link and the remedy.
    """
    inside = directory.resolve()
    for name in names:
        path = directory / name
        target = Path(os.path.realpath(path))  # of a link to itself, the link
        if path.is_symlink() and (target.is_dir() or not target.is_relative_to(inside)):
            raise ArtifactError(
                f"`{path}` is a link to `{target}`; nothing from outside of the directory is sent. Copy it with what "
                f"its links lead to, and publish the copy: cp -rL {directory} COPY"
            )
