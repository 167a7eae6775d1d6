"""The source distribution of the installed transformers, unpacked and completed until its own tests can be imported.

What lives here: fetching it (`pip download`), unpacking its `tests` folder, small files in place of those that it
imports and does not carry. What must not: the tests of our classes (`model_cases.py`, `tokenizer_cases.py`).

Nothing of transformers is kept: all of it lands in a folder that the caller throws away.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

# Files of transformers' repository that its tests import and its distribution leaves out: the test classes of
# generation and of export, what starts several processes, keys that any config takes, a text for tokenizers.
_ABSENT = {
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/utils/test_configuration_utils.py": (
        'config_common_kwargs = {"dtype": "float16", "output_hidden_states": True, "return_dict": False,\n'
        '    "chunk_size_feed_forward": 5, "problem_type": "regression", "architectures": ["One"]}\n'
    ),
    "tests/distributed_testing_utils.py": (
        "import unittest\n"
        "def absent(*given, **named):\n"
        "    raise unittest.SkipTest('what starts several processes is not in the source distribution')\n"
        "run_distributed = _get_distributed_backend = _get_distributed_device_type = absent\n"
        "_get_rank_device = _set_rank_device = _start_rank_processes = absent\n"
    ),
    "tests/fixtures/sample_text.txt": "The water ran past the house.\n\nA letter came by night, from the garden.\n",
}

# Of the package `parameterized` the tests use one decorator.
_PARAMETERIZED = '''\
"""One test method for each entry of a list, named after its place and its first value."""
import inspect
import re


class parameterized:
    @staticmethod
    def expand(entries):
        def decorate(method):
            names = inspect.currentframe().f_back.f_locals
            for place, entry in enumerate(entries):
                values = entry if isinstance(entry, tuple) else (entry,)

                def one(self, *, _method=method, _values=values):
                    return _method(self, *_values)

                one.__dict__.update(method.__dict__)
                one.__doc__ = method.__doc__
                said = re.sub(r"\\W+", "_", str(values[0]))
                one.__name__ = f"{method.__name__}_{place}_{said}"
                names[one.__name__] = one

        return decorate
'''


def download(folder: Path) -> Path:
    """Fetch the source distribution of the installed version; raises ValueError where pip cannot."""
    version = transformers.__version__
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformers"]
    done = subprocess.run([*command, f"transformers=={version}", "-d", str(folder)], capture_output=True, text=True)
    found = sorted(folder.glob("transformers-*.tar.gz"))
    if done.returncode or not found:
        raise ValueError(f"pip cannot download the source of transformers {version}; give --sdist\n{done.stderr}")
    return found[0]


def unpack(sdist: Path, folder: Path) -> None:
    """Put the `tests` of the distribution into the folder, as a package that can be imported.

    Raises ValueError for a distribution of another version than the installed one, or without tests.
    """
    expected = f"transformers-{transformers.__version__}"
    with tarfile.open(sdist) as archive:
        top = archive.getnames()[0].split("/")[0]
        if top != expected:
            raise ValueError(f"{sdist} holds {top}, but {expected} is installed: give the distribution of that version")
        members = [member for member in archive.getmembers() if member.name.startswith(f"{top}/tests/")]
        if not members:
            raise ValueError(f"{sdist} has no tests: give the source distribution (.tar.gz), not a wheel")
        archive.extractall(folder, members=members, filter="data")
    shutil.move(folder / top / "tests", folder / "tests")
    (folder / top).rmdir()
    for name, text in _ABSENT.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for package in (folder / "tests", *(path for path in (folder / "tests").iterdir() if path.is_dir())):
        (package / "__init__.py").touch()
    if importlib.util.find_spec("parameterized") is None:
        (folder / "parameterized.py").write_text(_PARAMETERIZED, encoding="utf-8")
