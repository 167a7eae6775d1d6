"""The embedded corpora: text that is on every machine where this project runs, so that nothing is downloaded.

What lives here: their names and their files. What must not: reading them, or importing what they belong to.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

STDLIB = "python-stdlib"
HEADERS = "torch-headers"

Corpus = list[tuple[str, Path]]
"""(relative path, path), sorted."""

_NOT_IN_STDLIB_CORPUS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "__pycache__",
}
_STDLIB_MINIMUM = 5_000_000
_HEADER_FOLDERS = ("c10", "torch")  # ATen's are for the greater part written by a program
_HEADERS_MINIMUM = 3_000_000


def stdlib_corpus() -> Corpus:
    """The source files of this machine's Python standard library.

    Left out: tests, idlelib, lib2to3, encodings, site- and dist-packages, pydoc_data.

    Raises:
        ValueError: when fewer than 5 MB are there, as on an interpreter without its library's sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = _files(root, (root,), (".py",), _NOT_IN_STDLIB_CORPUS)
    _refuse_little(STDLIB, "Python source", root, found, _STDLIB_MINIMUM, "use a Python with its library's sources")
    return found


def torch_headers() -> Corpus:
    """The C++ headers of the installed PyTorch below `c10` and `torch`, without those that a program wrote.

    Raises:
        ValueError: when fewer than 3 MB are there, as where a distribution packs headers apart.
    """
    spec = find_spec("torch")
    places = spec.submodule_search_locations if spec is not None else None
    root = Path(next(iter(places or ["torch"]))) / "include"
    folders = [root / name for name in _HEADER_FOLDERS]
    found = _files(root, folders, (".h", ".hpp"), {"generated"})
    _refuse_little(HEADERS, "C++ headers", root, found, _HEADERS_MINIMUM, "use PyTorch's own wheel, which has them")
    return found


EMBEDDED: Mapping[str, Callable[[], Corpus]] = {STDLIB: stdlib_corpus, HEADERS: torch_headers}
"""The files of each corpus, by its name."""


def embedded_paths(names: Iterable[str]) -> dict[str, Path]:
    """Where the files of embedded corpora lie that are named so (`python-stdlib/ast.py`); others are left out."""
    wanted = {name.partition("/")[0] for name in names} & set(EMBEDDED)
    found: dict[str, Path] = {}
    for corpus in sorted(wanted):
        try:
            found |= {f"{corpus}/{name}": path for name, path in EMBEDDED[corpus]()}
        except ValueError:  # a Python without its library's sources, say
            continue
    return found


def _files(root: Path, folders: Iterable[Path], suffixes: tuple[str, ...], left_out: Collection[str]) -> Corpus:
    """The files below folders by suffix, in the order of their paths relative to `root`."""
    found: Corpus = []
    for top in folders:
        for folder, inner, names in os.walk(top):
            inner[:] = [name for name in inner if name not in left_out]
            paths = (Path(folder, name) for name in names if name.endswith(suffixes))
            found.extend((path.relative_to(root).as_posix(), path) for path in paths)
    return sorted(found)


def _refuse_little(corpus: str, what: str, root: Path, found: Corpus, least: int, remedy: str) -> None:
    size = sum(path.stat().st_size for _, path in found)
    if size < least:
        raise ValueError(
            f"{corpus}: `{root}` holds {size:,} bytes of {what}, fewer than {least:,}; {remedy}, or give text files of "
            "your own in data.train"
        )
