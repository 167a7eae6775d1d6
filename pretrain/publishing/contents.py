"""What is in a model directory, and whether it may leave: every file that would be sent, hashed, and refusals.

What lives here: what is refused (pickles, links that lead out, torn weights, secrets), and the digests of what is sent.
What must not: the Hub, or which files go (`selection`).
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pretrain.files import ArtifactError, sha256_file
from pretrain.publishing.leaks import secrets_in
from pretrain.publishing.selection import INDEX, Selection, is_document, is_of_a_model, refuse_links_outside, select

CONFIG, CARD, ADAPTER = "config.json", "README.md", "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz", ".mar", ".nemo")
_PICKLED_WEIGHTS = re.compile(r"(pytorch|adapter)_model.*\.bin")
_PICKLED = re.compile(rb"\x80[\x02-\x05]")
_TEXT_BYTES = 64 << 20  # larger files that are no weights are searched in their first bytes only
_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Piece:
    """A file to be sent.

    Attributes:
        name: its path in the repository.
        path: where it lies.
        size: in bytes.
        sha256: of its bytes.
        data: its bytes where it lies nowhere.
    """

    name: str
    path: Path
    size: int
    sha256: str
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Contents:
    """A model directory that may leave.

    Attributes:
        directory: the model directory.
        pieces: the files that go, by name in order.
        selection: what stays, and why.
        config: what `config.json` says.
    """

    directory: Path
    pieces: tuple[Piece, ...]
    selection: Selection
    config: Mapping[str, Any]

    @property
    def weights(self) -> dict[str, str]:
        """SHA-256 of the files with tensors."""
        return {piece.name: piece.sha256 for piece in self.pieces if piece.name.endswith(_WEIGHTS)}


def look_into(directory: Path, digests: Mapping[str, str] | None = None, also: Sequence[str] = ()) -> Contents:
    """Hash and check every file of a model directory that would be sent.

    Args:
        directory: the model directory.
        digests: SHA-256 by name, as they were written down when the files were made; other bytes are refused, of
            cards, licences and results excepted. Files that are not among them stay.
        also: patterns of files that go too.

    Raises:
        ArtifactError: when it is no whole model, or what would be sent must not leave: a pickle, a link that leads out
            of it, a secret. Names the file and the remedy, never the secret.
    """
    if not directory.is_dir():
        raise ArtifactError(f"`{directory}` is no model directory; give a run, a checkpoint or a model directory")
    selection = select(directory, digests, also)
    names = list(selection.goes)
    refuse_links_outside(directory, names)
    if digests is not None:
        _refuse_missing(directory, names, digests)
    _refuse_no_model(directory, names)
    _refuse_pickled_parts(names, selection.unknown, directory)
    for name in names:
        if not (directory / name).is_file():
            raise ArtifactError(f"`{directory / name}` is no file; remove it")
        _refuse_pickle(directory / name, name)
    for name in names:
        if name.endswith(_WEIGHTS):
            _check_weights(directory / name)
        else:
            _refuse_secrets(directory / name, _text_of(directory / name), name)
            _refuse_torn(directory / name, name)
    config = _check_config(directory, names)
    _check_index(directory, names)
    pieces = tuple(
        Piece(name, directory / name, (directory / name).stat().st_size, sha256_file(directory / name))
        for name in names
    )
    for piece in pieces:
        known = (digests or {}).get(piece.name, piece.sha256)
        if known != piece.sha256 and not is_document(piece.name):
            raise ArtifactError(f"`{piece.path}` was altered: its SHA-256 is not the manifest's; make it again")
    return Contents(directory, pieces, selection, config)


# --- refusals -------------------------------------------------------------------------------------------------------


def _refuse_missing(directory: Path, names: Sequence[str], digests: Mapping[str, str]) -> None:
    for name in sorted(set(digests) - set(names)):
        if not is_document(name) and not (directory / name).is_file():
            raise ArtifactError(f"`{directory / name}` is missing, and the manifest names it; make it again")


def _refuse_no_model(directory: Path, names: Sequence[str]) -> None:
    weights = any(name.endswith(_WEIGHTS) for name in names)
    if CONFIG in names and weights:
        return
    refuse_adapters_alone(directory)
    held = "no whole model"
    if not weights and any(directory.glob("pytorch_model*.bin")):
        held = "weights as a pickle alone, which runs code when it is loaded"
    raise ArtifactError(
        f"`{directory}` holds {held}: it needs {CONFIG} and weights in .safetensors files; export one first "
        "(`pretrain export DIRECTORY OUT`, or `save_pretrained` of transformers)"
    )


def refuse_adapters_alone(directory: Path) -> None:
    """Refuse the directory of a LoRA.

    Raises:
        ArtifactError: names the remedy.
    """
    if (directory / ADAPTER).is_file() and not (directory / CONFIG).is_file():
        raise ArtifactError(
            f"`{directory}` holds adapters without their model; publish the merged model, which carries them in the "
            "folder adapter: OUT/NAME, as `pretrain finetune` made it, or merge_and_unload of PEFT"
        )


def _refuse_pickle(path: Path, name: str) -> None:
    """Whatever would run code when it is loaded."""
    with path.open("rb") as file:
        start = file.read(4)
    held = ""
    if name.lower().endswith(_PICKLES):
        held = "may hold a pickle"
    elif _PICKLED.match(start):
        held = "is a pickle"
    elif start == b"PK\x03\x04" and _zipped_pickle(path):
        held = "holds a pickle"
    if held:
        raise ArtifactError(
            f"`{path}` {held}, which runs code when it is loaded; weights are sent as .safetensors alone"
        )


def _zipped_pickle(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as opened:
            return any(name.endswith((".pkl", ".pickle")) for name in opened.namelist())
    except zipfile.BadZipFile:
        return False


def _check_weights(path: Path) -> None:
    """The header is read, and says as many bytes as there are."""
    try:
        with safe_open(path, framework="np") as opened:
            metadata = dict(opened.metadata() or {})
            names = list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"`{path}` cannot be read ({error}); make it again") from error
    _refuse_secrets(path, [json.dumps(metadata), *names], path.name)


def _refuse_torn(path: Path, name: str) -> None:
    """A file that a model or its tokenizer is loaded from, and that nothing can be read from."""
    if not is_of_a_model(name):
        return
    if not path.stat().st_size and not name.endswith("merges.txt"):  # of a vocabulary of characters, it may be
        raise ArtifactError(f"`{path}` is empty, so the model could not be loaded; make it again")
    if name.endswith(".json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(f"`{path}` cannot be read ({error}); make it again") from error


def _text_of(path: Path) -> Iterator[str]:
    """What can be searched in a file."""
    with path.open("rb") as file:
        data = file.read(_TEXT_BYTES)
    yield data.decode("utf-8", errors="replace")


def _refuse_secrets(path: Path, texts: Any, name: str) -> None:
    for text in (name, *texts):
        found = next(secrets_in(text), None)
        if found is not None:
            raise ArtifactError(f"`{path}` holds {found}, and would be sent; take it out, and make that secret invalid")


def _check_config(directory: Path, names: list[str]) -> Mapping[str, Any]:
    path = directory / CONFIG
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"`{path}` cannot be read ({error}); export the model again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ArtifactError(f"`{path}` names no model_type; export the model again")
    for name in names:
        if name.rpartition("/")[2] == CONFIG:
            _check_code(directory, name, names)
    return config


def _check_code(directory: Path, name: str, names: Sequence[str]) -> None:
    """The code that a configuration names lies beside it, and goes with it."""
    config: Any = json.loads((directory / name).read_text(encoding="utf-8"))
    code = config.get("auto_map") if isinstance(config, dict) else None
    for target in code.values() if isinstance(code, dict) else ():
        for entry in target if isinstance(target, list) else [target]:
            module = f"{name.removesuffix(CONFIG)}{str(entry).partition('.')[0]}.py"
            if entry is not None and "--" not in str(entry) and module not in names:
                raise ArtifactError(
                    f"`{directory / name}` says that the model's code is in {module}, which is not there"
                )


def _refuse_pickled_parts(names: Sequence[str], stays: Sequence[str], directory: Path) -> None:
    """A folder that goes needs its weights: of a module that has them as a pickle alone, nothing would be loaded."""
    for name in stays:
        folder, _, last = name.rpartition("/")
        beside = [other for other in names if other.rpartition("/")[0] == folder]
        if folder and _PICKLED_WEIGHTS.fullmatch(last) and beside and not any(o.endswith(_WEIGHTS) for o in beside):
            raise ArtifactError(
                f"`{directory / name}` holds the weights of `{folder}` as a pickle alone, which runs code when it is "
                "loaded; load the model and save it again with save_pretrained, which writes .safetensors"
            )


def _check_index(directory: Path, names: list[str]) -> None:
    """Every file that the index of a split model names is there."""
    if INDEX not in names:
        return
    path = directory / INDEX
    try:
        named = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(f"`{path}` cannot be read ({error}); export the model again") from error
    if missing := sorted(named - set(names)):
        raise ArtifactError(f"`{directory / missing[0]}` is missing, and {INDEX} names it; export the model again")
